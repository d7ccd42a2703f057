"""A small load generator over plain sockets: token ids in, streamed or whole completions out, in threads of one process
each, so that many answers cost the client little. Standard library only."""

import concurrent.futures
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time

PORT = 18431


class Server:
    """kvasir-server as a process; ready when constructed. `ready_s`: from its start until /ready."""

    def __init__(self, binary, model, flags=(), log="server.log", environment=None):
        self.log = open(log, "ab")
        begun = time.monotonic()
        self.process = subprocess.Popen([binary, "--model", str(model), "--port", str(PORT), *flags],
                                        stdout=self.log, stderr=self.log, env=environment)
        while not self.is_ready():
            if self.process.poll() is not None or time.monotonic() - begun > 240:
                sys.exit(f"the server did not become ready: {open(log).read()[-2000:]}")
            time.sleep(0.02)
        self.ready_s = time.monotonic() - begun

    def is_ready(self):
        try:
            connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=5)
            connection.request("GET", "/ready")
            return connection.getresponse().status == 200
        except OSError:
            return False

    def stop(self):
        """Ends it as a drain does; its exit status."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)

    def resident_mb(self):
        status = open(f"/proc/{self.process.pid}/status").read()
        return int(status.split("VmRSS:")[1].split()[0]) // 1024


def prompt(seed, n):
    return [(seed * 7919 + 31 * i + i * i % 977) % 120000 + 300 for i in range(n)]


def body(ids, output_tokens, **more):
    return json.dumps({"model": os.environ.get("KVASIR_MODEL_NAME", "model"), "prompt": ids, "max_tokens": output_tokens,
                       "temperature": 0, "ignore_eos": True, "return_token_ids": True, **more})  # fmt: skip


def whole(ids, output_tokens):
    """Token ids of a completion that comes in one piece."""
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=600)
    connection.request("POST", "/v1/completions", body(ids, output_tokens), {"Content-Type": "application/json"})
    response = connection.getresponse()
    text = response.read()
    if response.status != 200:
        raise RuntimeError(f"HTTP {response.status}: {text[:300]!r}")
    return json.loads(text)["choices"][0]["token_ids"]


def streamed(ids, output_tokens, leave_after=None, **more):
    """Seconds from the request to each piece of a stream; the client leaves after so many pieces."""
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=600)
    begun = time.perf_counter()
    connection.request("POST", "/v1/completions", body(ids, output_tokens, stream=True, **more),
                       {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"HTTP {response.status}: {response.read()[:300]!r}")
    times = []
    for line in response:
        if line.startswith(b"data: {"):
            times.append(time.perf_counter() - begun)
            if leave_after is not None and len(times) >= leave_after:
                connection.close()
                break
    return times


def all_at_once(jobs):
    """Runs (prompt, output tokens) together; seconds for all."""
    threading.stack_size(256 * 1024)
    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
        begun = time.perf_counter()
        answers = list(pool.map(lambda job: whole(*job), jobs))
        seconds = time.perf_counter() - begun
    for (_, wanted), answer in zip(jobs, answers):
        if len(answer) != wanted:
            raise RuntimeError(f"{len(answer)} tokens instead of {wanted}")
    return seconds


def beside(jobs, work):
    """Runs `work` while the streams (prompt, output tokens) run, once all of them have their first tokens; what it gave,
    when it began and ended, and the time of each piece of each stream."""
    threading.stack_size(256 * 1024)
    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
        origin = time.perf_counter()

        def stream(job):
            begun = time.perf_counter() - origin
            return [begun + at for at in streamed(*job)]

        running = [pool.submit(stream, job) for job in jobs]
        time.sleep(2)
        begun = time.perf_counter() - origin
        found = work()
        ended = time.perf_counter() - origin
        return found, (begun, ended), [future.result() for future in running]
