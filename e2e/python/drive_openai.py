"""Whole conversations through the `openai` package: python drive_openai.py URL/v1"""

import asyncio
import json
from typing import Literal

import openai
import pydantic

from checks import MODEL, PROMPT, QUESTION, chat, completion, equal, raises, run, user


def client(url, **options):
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60, **options)


def tokens(usage):
    equal(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens)
    return usage.prompt_tokens, usage.completion_tokens


def ask(api, **fields):
    return api.chat.completions.create(**{"model": MODEL, "messages": [user(QUESTION)], "temperature": 0, **fields})


def assembled(events):
    """Text, finish reason and usage of a stream; each piece belongs to the one answer."""
    events = list(events)
    equal(len({event.id for event in events}), 1)
    choices = [choice for event in events for choice in event.choices]
    delta = [choice.delta.content if hasattr(choice, "delta") else choice.text for choice in choices]
    reasons = [choice.finish_reason for choice in choices if choice.finish_reason]
    equal(len(reasons), 1)
    assert len(events) > 3, "the answer comes in pieces"
    usage = events[-1].usage and tokens(events[-1].usage)
    return "".join(piece or "" for piece in delta), reasons[0], usage


class Block(pydantic.BaseModel):
    index: int = pydantic.Field(ge=0, le=99)
    owner: str = pydantic.Field(max_length=12)


class Table(pydantic.BaseModel):
    state: Literal["active", "cached", "free"]
    blocks: list[Block] = pydantic.Field(max_length=2)
    first: Block | None


class Scale(pydantic.BaseModel):
    """Sets the replicas of a deployment."""

    deployment: str = pydantic.Field(max_length=8)
    replicas: int = pydantic.Field(ge=1, le=9)


SCALE = openai.pydantic_function_tool(Scale, name="scale")


def check_structured_answers(url):
    """A schema out of a class, and the answer as its object; streamed as well."""
    api = client(url)
    fields = {"model": MODEL, "messages": [user(QUESTION)], "temperature": 1, "seed": 3, "response_format": Table}
    choice = api.chat.completions.parse(**fields).choices[0]
    table = choice.message.parsed
    equal((type(table), choice.finish_reason), (Table, "stop"))
    equal(Table.model_validate_json(choice.message.content), table)
    with api.chat.completions.stream(**fields) as stream:
        equal(stream.get_final_completion().choices[0].message.parsed, table)
    several = api.chat.completions.parse(**{**fields, "n": 3}).choices
    equal(several[0].message.parsed, table)
    assert all(type(choice.message.parsed) is Table for choice in several)
    answer = ask(api, response_format={"type": "json_object"}, max_tokens=300, temperature=1, seed=1).choices[0]
    assert answer.finish_reason == "length" or type(json.loads(answer.message.content)) is dict, answer
    for extra, fits in [({"guided_choice": ["free", "cached"]}, ("free", "cached")),
                        ({"structured_outputs": {"regex": "block [0-9]{2}"}}, tuple(f"block {i:02}" for i in range(100)))]:  # fmt: skip
        answer = ask(api, extra_body=extra).choices[0]
        assert answer.message.content in fits and answer.finish_reason == "stop", answer
    error = raises(openai.BadRequestError, lambda: ask(api, extra_body={"guided_json": {"not": {}}}))
    equal(error.param, "guided_json")
    assert "not is not supported" in error.body["message"], error.body


def check_tools(url):
    """A call that is asked for, its result sent back, and the same streamed."""
    api = client(url)
    fields = {"model": MODEL, "temperature": 1, "seed": 5, "tools": [SCALE], "tool_choice": "required"}
    messages = [user(QUESTION)]
    choice = api.chat.completions.parse(messages=messages, parallel_tool_calls=False, **fields).choices[0]
    (call,) = choice.message.tool_calls
    equal((choice.finish_reason, choice.message.content, call.type, call.function.name), ("tool_calls", None, "function", "scale"))
    equal(type(call.function.parsed_arguments), Scale)
    events = list(api.chat.completions.create(messages=messages, parallel_tool_calls=False, stream=True, **fields))
    deltas = [delta for event in events for choice in event.choices for delta in choice.delta.tool_calls or []]
    equal([(delta.index, delta.id, delta.function.name) for delta in deltas if delta.id], [(0, deltas[0].id, "scale")])
    assert len(deltas) > 3, "arguments come in pieces"
    equal("".join(delta.function.arguments for delta in deltas), call.function.arguments)
    equal([choice.finish_reason for event in events for choice in event.choices if choice.finish_reason], ["tool_calls"])
    with api.chat.completions.stream(messages=messages, parallel_tool_calls=False, **fields) as stream:
        final = stream.get_final_completion().choices[0].message
    equal(final.tool_calls[0].function.parsed_arguments, call.function.parsed_arguments)
    named = {"type": "function", "function": {"name": "scale"}}
    choice = ask(api, tools=[SCALE], tool_choice=named).choices[0]
    equal((choice.finish_reason, len(choice.message.tool_calls)), ("stop", 1))
    Scale.model_validate_json(choice.message.tool_calls[0].function.arguments)
    # The package's own object goes back, and the tool's answer with the call's id.
    messages += [choice.message, {"role": "tool", "tool_call_id": choice.message.tool_calls[0].id, "content": "done"}]
    assert ask(api, messages=messages, tools=[SCALE], tool_choice="none").choices[0].message.content


def check_models(url):
    api = client(url)
    found = api.models.list().data
    equal([(model.id, model.object) for model in found], [(MODEL, "model")])
    equal(api.models.retrieve(MODEL).id, MODEL)
    raises(openai.NotFoundError, lambda: api.models.retrieve("none"))


def check_chat(url):
    answer = ask(client(url))
    text, reason, used = chat(url)
    choice = answer.choices[0]
    equal((choice.message.content, choice.finish_reason, tokens(answer.usage)), (text, reason, used))
    equal((choice.message.role, choice.index, answer.object, answer.model), ("assistant", 0, "chat.completion", MODEL))
    assert "block" in text and reason == "stop" and choice.message.tool_calls is None


def check_chat_stream(url):
    api = client(url)
    text, reason, used = chat(url)
    equal(assembled(ask(api, stream=True, stream_options={"include_usage": True})), (text, reason, used))
    equal(assembled(ask(api, stream=True)), (text, reason, None))


def check_stream_helper(url):
    with client(url).chat.completions.stream(model=MODEL, messages=[user(QUESTION)], temperature=0) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    text, reason, _ = chat(url)
    equal((final.choices[0].message.content, final.choices[0].finish_reason), (text, reason))
    assert {"chunk", "content.delta", "content.done"} <= kinds, kinds


def check_conversation(url):
    """Each answer is asked about in the next turn."""
    api = client(url)
    messages = [{"role": "system", "content": "Answer in short."}]
    for question in (QUESTION, "What is the KV cache?", "And what is PagedAttention?"):
        messages.append(user(question))
        answer = ask(api, messages=messages)
        equal((answer.choices[0].message.content, answer.choices[0].finish_reason, tokens(answer.usage)),
              chat(url, *messages))  # fmt: skip
        # The package's own object goes back as it came, with fields that are null.
        messages.append(answer.choices[0].message.model_dump())
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "a block table?"}]
    equal(ask(api, messages=[{"role": "user", "content": parts}]).choices[0].message.content, chat(url)[0])


def check_limits(url):
    api = client(url)
    answer = ask(api, max_completion_tokens=5)
    equal((answer.choices[0].finish_reason, answer.usage.completion_tokens), ("length", 5))
    assert chat(url)[0].startswith(answer.choices[0].message.content)
    answer = ask(api, stop=["list"])
    equal((answer.choices[0].message.content, answer.choices[0].finish_reason), (chat(url)[0].split("list")[0], "stop"))


def check_sampling(url):
    """A seed names one answer."""
    api = client(url)
    fields = {"temperature": 2, "top_p": 0.99, "max_tokens": 40}
    texts = [ask(api, seed=seed, extra_body={"top_k": 500}, **fields).choices[0].message.content for seed in (1, 1, 2, 3, 4)]
    equal(texts[0], texts[1])
    assert len(set(texts)) > 2, texts
    equal(texts[0], chat(url, seed=1, top_k=500, **fields)[0])


def check_logprobs(url):
    answer = ask(client(url), logprobs=True, top_logprobs=3).choices[0]
    content = answer.logprobs.content
    # The end of the sequence is a token too, and no text.
    joined = b"".join(bytes(token.bytes) for token in content[:-1])
    equal((joined.decode(), content[-1].token), (answer.message.content, "<|end|>"))
    for token in content:
        equal(len(token.top_logprobs), 3)
        assert token.logprob <= 0 and token.top_logprobs[0].token == token.token, token
        scores = [top.logprob for top in token.top_logprobs]
        equal(scores, sorted(scores, reverse=True))
    streamed = [token for event in ask(client(url), logprobs=True, stream=True) for choice in event.choices
                for token in (choice.logprobs.content if choice.logprobs else [])]  # fmt: skip
    equal([(t.token, t.logprob) for t in streamed], [(t.token, t.logprob) for t in content])


def check_completions(url):
    api = client(url)
    fields = {"model": MODEL, "temperature": 0, "max_tokens": 12}
    text, reason, used = completion(url, max_tokens=12)
    answer = api.completions.create(prompt=PROMPT, **fields)
    equal((answer.choices[0].text, answer.choices[0].finish_reason, tokens(answer.usage)), (text, reason, used))
    equal((reason, used[1]), ("length", 12))
    events = api.completions.create(prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **fields)
    equal(assembled(events), (text, reason, used))
    answer = api.completions.create(prompt=PROMPT, echo=True, logprobs=2, **fields).choices[0]
    equal(answer.text, PROMPT + text)
    equal("".join(answer.logprobs.tokens), "<|begin|>" + PROMPT + text)
    equal(answer.logprobs.token_logprobs[0], None)
    assert all(score <= 0 for score in answer.logprobs.token_logprobs[1:])
    several = api.completions.create(prompt=[PROMPT, "The pool"], **fields)
    equal([choice.text for choice in several.choices], [text, completion(url, "The pool", max_tokens=12)[0]])


def check_several_answers(url):
    """`n` is served, or refused by its name."""
    try:
        answer = ask(client(url), n=2, max_tokens=6)
    except openai.BadRequestError as error:
        equal(error.param, "n")
        return
    equal([choice.index for choice in answer.choices], [0, 1])
    equal([choice.message.content for choice in answer.choices], 2 * [chat(url, max_tokens=6)[0]])


def check_errors(url):
    api = client(url)
    for param, fields in [("temperature", {"temperature": -1}), ("max_tokens", {"max_tokens": 0}),
                          ("messages", {"messages": []}), ("messages[0].role", {"messages": [{"content": "a"}]}),
                          ("response_format", {"response_format": {"type": "xml"}}),
                          ("tools[0].function.name", {"tools": [{"type": "function", "function": {"name": "f g"}}]}),
                          ("tool_choice", {"tool_choice": "required"}),
                          ("novel", {"extra_body": {"novel": 1}})]:  # fmt: skip
        error = raises(openai.BadRequestError, lambda fields=fields: ask(api, **fields))
        equal((error.param, error.type, error.status_code), (param, "invalid_request_error", 400))
        assert param in error.body["message"], error.body
    error = raises(openai.BadRequestError, lambda: ask(api, messages=[user("block " * 5000)]))
    equal(error.code, "context_length_exceeded")
    error = raises(openai.NotFoundError, lambda: ask(api, model="none"))
    equal((error.code, error.param), ("model_not_found", "model"))
    raises(openai.NotFoundError, lambda: api.embeddings.create(model=MODEL, input="a"))
    # A stream that is refused is refused before it begins.
    raises(openai.BadRequestError, lambda: ask(api, stream=True, temperature=-1))
    raises(openai.APITimeoutError, lambda: ask(client(url).with_options(timeout=0.001), max_tokens=500))


def check_a_client_that_leaves(url):
    api = client(url)
    for _ in range(5):
        with ask(api, stream=True, max_tokens=1000, extra_body={"ignore_eos": True}) as stream:
            for _, _ in zip(range(3), stream):
                pass
    equal(ask(api).choices[0].message.content, chat(url)[0])


async def check_async(url):
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as api:
        texts = ["What is a block table?", "What is the KV cache?"] * 8
        fields = {"model": MODEL, "temperature": 0}
        answers = await asyncio.gather(*(api.chat.completions.create(messages=[user(text)], **fields) for text in texts))
        wanted = {text: chat(url, user(text)) for text in set(texts)}
        for text, answer in zip(texts, answers):
            choice = answer.choices[0]
            equal((choice.message.content, choice.finish_reason, tokens(answer.usage)), wanted[text])
        options = {"stream": True, "stream_options": {"include_usage": True}}
        stream = await api.chat.completions.create(messages=[user(QUESTION)], **options, **fields)
        equal(assembled([event async for event in stream]), chat(url))
        stream = await api.completions.create(prompt=PROMPT, max_tokens=12, **options, **fields)
        equal(assembled([event async for event in stream]), completion(url, max_tokens=12))
        equal([model.id async for model in api.models.list()], [MODEL])
        try:
            await api.chat.completions.create(messages=[user("a")], **{**fields, "temperature": -1})
            raise AssertionError("an error was expected")
        except openai.BadRequestError as error:
            equal(error.param, "temperature")


run(globals())
