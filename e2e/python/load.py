"""Keeps a number of requests in flight until standard input closes, then prints how they ended, as JSON.

Each of the workers uses one keep-alive client and streams one long answer after the other. An answer is whole when
it has as many tokens as were asked for, and its time is told; anything else is a failure, quoted.
"""

import json
import sys
import threading
import time

import openai

url, model, n_workers, n_tokens = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
finished = threading.Event()
lock = threading.Lock()
whole_s = []
failures = []


def one_answer(client):
    stream = client.completions.create(
        model=model,
        prompt="A block table",
        max_tokens=n_tokens,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    usage = None
    for event in stream:
        usage = event.usage or usage
    if usage is None or usage.completion_tokens != n_tokens:
        raise RuntimeError(f"the answer broke off: usage {usage}, expected {n_tokens} tokens")


def work():
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=300)
    while not finished.is_set():
        started = time.monotonic()
        try:
            one_answer(client)
            with lock:
                whole_s.append(time.monotonic() - started)
        except Exception as error:  # Every way to fail is a finding.
            with lock:
                failures.append(f"{error!r}, because of {error.__cause__!r}")
            finished.wait(0.2)


workers = [threading.Thread(target=work) for _ in range(n_workers)]
for worker in workers:
    worker.start()
sys.stdin.read()
finished.set()
for worker in workers:
    worker.join()
print(json.dumps({"whole_s": whole_s, "failures": failures}))
