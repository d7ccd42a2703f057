"""Whole conversations through litellm, by both providers that fit: python drive_litellm.py URL/v1"""

import asyncio
import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # It would be downloaded otherwise.

import litellm  # noqa: E402

from checks import MODEL, PROMPT, QUESTION, chat, completion, equal, raises, run, user  # noqa: E402

PROVIDERS = ("openai", "hosted_vllm")
litellm.suppress_debug_info = True


def fields(url, provider, **more):
    return {"model": f"{provider}/{MODEL}", "api_base": url, "api_key": "none", "messages": [user(QUESTION)], "temperature": 0,
            "num_retries": 0, "timeout": 60, **more}  # fmt: skip


def parts(answer):
    """Text, finish reason and (prompt, completion) tokens."""
    choice, used = answer.choices[0], answer.usage
    equal(used.total_tokens, used.prompt_tokens + used.completion_tokens)
    return choice.message.content, choice.finish_reason, (used.prompt_tokens, used.completion_tokens)


def assembled(url, chunks):
    """A stream, put together by hand and by litellm, must be the answer."""
    assert len(chunks) > 3, "the answer comes in pieces"
    equal("".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices), chat(url)[0])
    equal(parts(litellm.stream_chunk_builder(chunks)), chat(url))


STREAM = {"stream": True, "stream_options": {"include_usage": True}}


def check_completion(url):
    for provider in PROVIDERS:
        answer = litellm.completion(**fields(url, provider))
        equal(parts(answer), chat(url))
        assert "block" in answer.choices[0].message.content
        equal(answer.choices[0].message.role, "assistant")


def check_stream(url):
    for provider in PROVIDERS:
        assembled(url, list(litellm.completion(**fields(url, provider, **STREAM))))


async def check_async(url):
    for provider in PROVIDERS:
        texts = [QUESTION, "What is the KV cache?"] * 4
        calls = (litellm.acompletion(**fields(url, provider, messages=[user(text)])) for text in texts)
        for text, answer in zip(texts, await asyncio.gather(*calls)):
            equal(parts(answer), chat(url, user(text)))
        stream = await litellm.acompletion(**fields(url, provider, **STREAM))
        assembled(url, [chunk async for chunk in stream])


def check_conversation(url):
    for provider in PROVIDERS:
        messages = [{"role": "system", "content": "Answer in short."}]
        for question in (QUESTION, "What is the KV cache?"):
            messages.append(user(question))
            answer = litellm.completion(**fields(url, provider, messages=messages))
            plain = [{"role": m["role"], "content": m["content"]} for m in messages]
            equal(parts(answer), chat(url, *plain))
            # litellm's own object goes back as it came.
            messages.append(answer.choices[0].message.model_dump())


def check_options(url):
    for provider in PROVIDERS:
        more = {"temperature": 1, "top_p": 0.9, "seed": 5, "max_tokens": 9, "n": 1, "presence_penalty": 0,
                "frequency_penalty": 0, "user": "me", "logprobs": True, "top_logprobs": 2,
                "extra_body": {"top_k": 50}}  # fmt: skip
        answer = litellm.completion(**fields(url, provider, **more))
        equal(parts(answer), chat(url, temperature=1, top_p=0.9, seed=5, max_tokens=9, top_k=50))
        content = answer.choices[0].logprobs.content
        equal("".join(token.token for token in content), answer.choices[0].message.content)
        answer = litellm.completion(**fields(url, provider, stop=["list"]))
        equal((answer.choices[0].message.content, answer.choices[0].finish_reason), (chat(url)[0].split("list")[0], "stop"))


def check_text_completion(url):
    for provider in (f"text-completion-openai/{MODEL}", f"hosted_vllm/{MODEL}"):
        answer = litellm.text_completion(model=provider, prompt=PROMPT, api_base=url, api_key="none", temperature=0, max_tokens=12)
        used = (answer.usage.prompt_tokens, answer.usage.completion_tokens)
        equal((answer.choices[0].text, answer.choices[0].finish_reason, used), completion(url, max_tokens=12))


def check_errors(url):
    """Each by litellm's own class, which its routers and fallbacks go by."""
    for provider in PROVIDERS:
        for kind, more in [(litellm.BadRequestError, {"temperature": -1}),
                           (litellm.ContextWindowExceededError, {"messages": [user("block " * 1000)], "max_tokens": 2000}),
                           (litellm.ContextWindowExceededError, {"messages": [user("block " * 5000)]}),
                           (litellm.ContextWindowExceededError, {"messages": [user("block " * 90000)]})]:  # fmt: skip
            raises(kind, lambda: litellm.completion(**fields(url, provider, **more)))
        raises(litellm.NotFoundError, lambda: litellm.completion(**fields(url, provider, model=f"{provider}/none")))


run(globals())
