"""Whole conversations through LangChain's ChatOpenAI and OpenAI: python drive_langchain.py URL/v1"""

import pydantic
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAI
from langchain_openai.chat_models.base import OpenAIContextOverflowError, OpenAIInvalidRequestError, OpenAIModelNotFoundError

from checks import MODEL, PROMPT, QUESTION, chat, completion, equal, raises, run, user


def model(url, **options):
    return ChatOpenAI(base_url=url, api_key="none", max_retries=0, timeout=60, **{"model": MODEL, "temperature": 0, **options})


def parts(message):
    """Text, finish reason and (prompt, completion) tokens."""
    used = message.usage_metadata
    equal(used["total_tokens"], used["input_tokens"] + used["output_tokens"])
    return message.content, message.response_metadata["finish_reason"], (used["input_tokens"], used["output_tokens"])


def total(chunks):
    """The chunks of a stream added up, as LangChain does it."""
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert len(chunks) > 3, "the answer comes in pieces"
    return whole


class Scale(pydantic.BaseModel, extra="forbid"):
    """Sets the replicas of a deployment."""

    deployment: str = pydantic.Field(max_length=8)
    replicas: int = pydantic.Field(ge=1, le=9)


def check_structured_output(url):
    """By a schema in the answer's format, by a call, and by JSON alone."""
    for method in ("json_schema", "function_calling"):
        answer = model(url, temperature=1, seed=3).with_structured_output(Scale, method=method).invoke(QUESTION)
        equal(type(answer), Scale)
    schema = {"title": "block", "type": "object", "properties": {"index": {"type": "integer", "minimum": 0, "maximum": 9}},
              "required": ["index"], "additionalProperties": False}  # fmt: skip
    answer = model(url).with_structured_output(schema, strict=True).invoke(QUESTION)
    assert 0 <= answer["index"] <= 9, answer


def check_tools(url):
    """An agent's turn: a call, its result, an answer."""
    bound = model(url, temperature=1, seed=5).bind_tools([Scale], tool_choice="any", parallel_tool_calls=False)
    answer = bound.invoke(QUESTION)
    (call,) = answer.tool_calls
    equal((call["name"], answer.response_metadata["finish_reason"]), ("Scale", "tool_calls"))
    Scale.model_validate(call["args"])
    equal(total(list(bound.stream(QUESTION))).tool_calls[0]["args"], call["args"])
    named = model(url).bind_tools([Scale], tool_choice="Scale").invoke(QUESTION)
    Scale.model_validate(named.tool_calls[0]["args"])
    messages = [HumanMessage(QUESTION), answer, ToolMessage("done", tool_call_id=call["id"])]
    assert model(url).invoke(messages).content


def check_invoke(url):
    answer = model(url).invoke(QUESTION)
    equal(parts(answer), chat(url))
    equal((answer.type, answer.tool_calls, answer.response_metadata["model_name"]), ("ai", [], MODEL))
    assert "block" in answer.content


def check_stream(url):
    chunks = list(model(url, stream_usage=True).stream(QUESTION))
    equal(parts(total(chunks)), chat(url))
    # An own base URL leaves the usage out by default.
    whole = total(list(model(url).stream(QUESTION)))
    equal((whole.content, whole.response_metadata["finish_reason"]), chat(url)[:2])
    # `streaming` makes invoke a stream inside.
    equal(model(url, streaming=True, stream_usage=True).invoke(QUESTION).content, chat(url)[0])


def check_batch(url):
    texts = [QUESTION, "What is the KV cache?"] * 4
    for text, answer in zip(texts, model(url).batch(texts, config={"max_concurrency": 8})):
        equal(parts(answer), chat(url, user(text)))


async def check_async(url):
    api = model(url, stream_usage=True)
    equal(parts(await api.ainvoke(QUESTION)), chat(url))
    equal(parts(total([chunk async for chunk in api.astream(QUESTION)])), chat(url))
    texts = [QUESTION, "What is the KV cache?"] * 4
    for text, answer in zip(texts, await api.abatch(texts)):
        equal(parts(answer), chat(url, user(text)))


def check_conversation(url):
    api = model(url)
    system = {"role": "system", "content": "Answer in short."}
    first = api.invoke([SystemMessage("Answer in short."), HumanMessage(QUESTION)])
    equal(parts(first), chat(url, system, user(QUESTION)))
    second = api.invoke([SystemMessage("Answer in short."), HumanMessage(QUESTION), first, HumanMessage("Why?")])
    said = {"role": "assistant", "content": first.content}
    equal(parts(second), chat(url, system, user(QUESTION), said, user("Why?")))
    third = api.invoke([HumanMessage([{"type": "text", "text": QUESTION}]), AIMessage(""), HumanMessage("Why?")])
    equal(parts(third), chat(url, user(QUESTION), {"role": "assistant", "content": ""}, user("Why?")))


def check_chain(url):
    chain = ChatPromptTemplate.from_messages([("system", "Answer in short."), ("human", "What is {thing}?")])
    chain = chain | model(url) | StrOutputParser()
    wanted = chat(url, {"role": "system", "content": "Answer in short."}, user(QUESTION))[0]
    equal(chain.invoke({"thing": "a block table"}), wanted)
    equal("".join(chain.stream({"thing": "a block table"})), wanted)


def check_options(url):
    """Everything that ChatOpenAI has a name for and the server takes."""
    api = model(url, temperature=1, top_p=0.9, seed=5, max_tokens=9, logprobs=True, top_logprobs=2, n=1,
                presence_penalty=0, frequency_penalty=0, model_kwargs={"user": "me"}, store=False,
                extra_body={"top_k": 50, "ignore_eos": True})  # fmt: skip
    answer = api.invoke(QUESTION)
    wanted = chat(url, temperature=1, top_p=0.9, seed=5, max_tokens=9, top_k=50, ignore_eos=True)
    equal(parts(answer), wanted)
    equal(wanted[1:], ("length", (wanted[2][0], 9)))
    content = answer.response_metadata["logprobs"]["content"]
    equal("".join(token["token"] for token in content), answer.content)
    equal([len(token["top_logprobs"]) for token in content], 9 * [2])
    answer = model(url).invoke(QUESTION, stop=["list"])
    equal((answer.content, answer.response_metadata["finish_reason"]), (chat(url)[0].split("list")[0], "stop"))


def check_completions(url):
    api = OpenAI(base_url=url, api_key="none", model=MODEL, temperature=0, max_tokens=12, max_retries=0)
    text = completion(url, max_tokens=12)[0]
    equal(api.invoke(PROMPT), text)
    equal("".join(api.stream(PROMPT)), text)
    found = api.generate([PROMPT, "The pool"])
    equal([one[0].text for one in found.generations], [text, completion(url, "The pool", max_tokens=12)[0]])
    equal(found.llm_output["token_usage"]["completion_tokens"], 24)


def check_errors(url):
    """Each by LangChain's own class, which its agents go by, and by OpenAI's."""
    error = raises(OpenAIInvalidRequestError, lambda: model(url, temperature=-1).invoke(QUESTION))
    equal((error.param, error.status_code), ("temperature", 400))
    raises(OpenAIModelNotFoundError, lambda: model(url, model="none").invoke(QUESTION))
    for n_words in (5000, 90000):
        error = raises(OpenAIContextOverflowError, lambda n=n_words: model(url).invoke("block " * n))
        equal(error.code, "context_length_exceeded")
    # A schema that can't be enforced is refused by name, before anything is computed.
    structured = model(url).with_structured_output({"title": "answer", "type": "object", "properties": {"a": {"not": {}}}})
    equal(raises(OpenAIInvalidRequestError, lambda: structured.invoke(QUESTION)).param, "response_format.json_schema.schema")


run(globals())
