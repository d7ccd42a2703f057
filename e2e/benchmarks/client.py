"""A kvasir-server as a process, and a small load generator over plain sockets: prompts in, streamed or whole completions
out, in threads of one process each, so that many answers cost the client little. Standard library only."""

import concurrent.futures
import http.client
import itertools
import json
import signal
import socket
import subprocess
import sys
import threading
import time


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


PORT = free_port()


class Server:
    """kvasir-server as a process; ready when constructed. `ready_s`: from its start until /ready."""

    def __init__(self, binary, model, flags=(), log="server.log", environment=None):
        self.log = open(log, "ab")
        begun = time.monotonic()
        self.process = subprocess.Popen([binary, "--model", str(model), "--port", str(PORT), *flags],
                                        stdout=self.log, stderr=self.log, env=environment)  # fmt: skip
        while not self.is_ready():
            if self.process.poll() is not None or time.monotonic() - begun > 240:
                sys.exit(f"the server did not become ready: {open(log).read()[-2000:]}")
            time.sleep(0.02)
        self.ready_s = time.monotonic() - begun

    def is_ready(self):
        try:
            return get("/ready")[0] == 200
        except OSError:
            return False

    def stop(self):
        """Ends it as a drain does, at once; its exit status."""
        return self.end(signal.SIGINT)

    def end(self, with_signal):
        self.process.send_signal(with_signal)
        return self.process.wait(90)

    def resident_mb(self):
        status = open(f"/proc/{self.process.pid}/status").read()
        return int(status.split("VmRSS:")[1].split()[0]) // 1024


def get(path):
    """Status and text."""
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=60)
    connection.request("GET", path)
    response = connection.getresponse()
    return response.status, response.read().decode()


def prompt(seed, n, n_ids=120000):
    """Token ids below `n_ids` + 300."""
    return [(seed * 7919 + 31 * i + i * i % 977) % n_ids + 300 for i in range(n)]


_seeds = itertools.count(1000)


def fresh_prompt(n, n_ids=120000):
    """One that begins as no other before it: nothing of it is in a prefix cache."""
    return prompt(next(_seeds), n, n_ids)


def post(body, timeout=600):
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=timeout)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"HTTP {response.status}: {response.read()[:300]!r}")
    return connection, response


def body(ids, output_tokens, **more):
    return {"prompt": ids, "max_tokens": output_tokens, "temperature": 0, "ignore_eos": True, **more}


def whole(ids, output_tokens, **more):
    """Token ids of a completion that comes in one piece."""
    _, response = post(body(ids, output_tokens, return_token_ids=True, **more))
    return json.loads(response.read())["choices"][0]["token_ids"]


def streamed(ids, output_tokens, leaves=lambda n_pieces: False, times=None, **more):
    """Seconds from the request to each piece of a stream, also appended to `times` as they come. The client leaves after
    a piece where `leaves` says so; a stream that it does not leave must come to its end with all of its tokens."""
    times = [] if times is None else times
    begun = time.perf_counter()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    connection, response = post(body(ids, output_tokens, **options, **more))
    usage, done = None, False
    for line in response:
        if line.startswith(b'data: {"error"'):
            raise RuntimeError(f"the stream ended with {line[:300]!r}")
        if line.startswith(b"data: {") and b'"choices":[]' in line:
            usage = json.loads(line[6:])["usage"]
        elif line.startswith(b"data: {"):
            times.append(time.perf_counter() - begun)
            if leaves(len(times)):
                connection.close()
                return times
        done = done or line.startswith(b"data: [DONE]")
    if not done or usage is None or usage["completion_tokens"] != output_tokens:
        raise RuntimeError(f"a stream of {output_tokens} tokens broke off after {len(times)} pieces; usage: {usage}")
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


def beside(jobs, work, leave_after_work=True):
    """Runs `work` while the streams (prompt, output tokens) run, once all of them have had some tokens; what it gave,
    when it began and ended, and the time of each piece of each stream. The streams then go on to their ends, or their
    clients leave."""
    threading.stack_size(256 * 1024)
    finished = threading.Event()
    pieces = [[] for _ in jobs]
    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
        origin = time.perf_counter()

        def stream(job, times):
            begun = time.perf_counter() - origin
            streamed(*job, lambda _: leave_after_work and finished.is_set(), times)
            return [begun + at for at in times]

        running = [pool.submit(stream, job, times) for job, times in zip(jobs, pieces)]
        try:
            while not all(len(times) >= 8 for times in pieces) and not any(future.done() for future in running):
                time.sleep(0.02)
            begun = time.perf_counter() - origin
            found = work()
            ended = time.perf_counter() - origin
        finally:
            finished.set()
        return found, (begun, ended), [future.result() for future in running]
