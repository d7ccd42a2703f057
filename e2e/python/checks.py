"""What the scripts that drive a client have in common: the server's answers as plain HTTP brings them, which every client must
bring as well, and a runner for functions named `check_...`. Standard library only.
"""

import asyncio
import inspect
import json
import sys
import traceback
import urllib.request

MODEL = "kvasir-demo"
QUESTION = "What is a block table?"
# The demo model answers it in some forty tokens.
PROMPT = "A block table maps"


def post(url, path, **body):
    """An answer without any client, as JSON; greedy unless the body says otherwise."""
    body = json.dumps({"model": MODEL, "temperature": 0, **body}).encode()
    request = urllib.request.Request(url + path, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def chat(url, *messages, **fields):
    """Text, finish reason and (prompt, completion) tokens of a chat."""
    answer = post(url, "/chat/completions", messages=list(messages) or [user(QUESTION)], **fields)
    choice, usage = answer["choices"][0], answer["usage"]
    return choice["message"]["content"], choice["finish_reason"], (usage["prompt_tokens"], usage["completion_tokens"])


def completion(url, prompt=PROMPT, **fields):
    """The same of a completion."""
    answer = post(url, "/completions", prompt=prompt, **fields)
    choice, usage = answer["choices"][0], answer["usage"]
    return choice["text"], choice["finish_reason"], (usage["prompt_tokens"], usage["completion_tokens"])


def user(text):
    return {"role": "user", "content": text}


def equal(found, wanted):
    assert found == wanted, f"{found!r} is not {wanted!r}"


def raises(kind, call):
    """The error of exactly this class that `call` ends with."""
    try:
        answer = call()
    except Exception as error:
        assert type(error) is kind, f"{type(error)} is not {kind}: {error}"
        return error
    raise AssertionError(f"{kind} was expected, and an answer came: {answer!r}")


def run(checks):
    """Calls each `check_...` of a script's globals with the API's URL, the script's first argument; prints as JSON which of
    them held, and how the others failed."""
    url = sys.argv[1]
    held, failed = [], {}
    for name, check in list(checks.items()):
        if not name.startswith("check_"):
            continue
        try:
            done = check(url)
            if inspect.isawaitable(done):
                asyncio.run(done)
            held.append(name)
        except Exception:
            failed[name] = traceback.format_exc(limit=-6)
    print(json.dumps({"held": held, "failed": failed}, indent=1))
