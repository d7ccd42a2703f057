"""A crowd that comes and goes: clients with prompts and answers of random lengths and random sampling, a quarter of whom
leave early. No request may fail, the same requests give the same tokens before and after, the host's memory stays flat,
nothing stays in the pool, and the server drains with status 0 while streams run.

    python3 soak.py KVASIR-SERVER [--seconds 600] [--clients 32] [--model demo]

For the CPU, with the demo model; e2e/gpu/run.py runs the same on a GPU. Standard library only.
"""

import argparse
import concurrent.futures
import dataclasses
import http.client
import json
import os
import random
import signal
import statistics
import sys
import threading
import time

import client


@dataclasses.dataclass(frozen=True)
class Crowd:
    clients: int
    seconds: float
    # Prompts are of ids below n_ids + 300.
    n_ids: int
    prompt_tokens: int
    output_tokens: int

    def request(self, generator):
        """A random one: a prompt in token ids or, one in three, as text; output tokens; sampling."""
        n = generator.randrange(1, self.prompt_tokens)
        ids = client.prompt(generator.randrange(1 << 20), n, self.n_ids)
        text = "".join(generator.choice("aeinorst ,.\n") for _ in range(n))
        sampling = {"temperature": generator.choice([0, 0.7, 1.0]), "top_p": generator.choice([1, 0.9]),
                    "seed": generator.randrange(1 << 30)}  # fmt: skip
        return generator.choice([ids, ids, text]), generator.randrange(1, self.output_tokens), sampling


# The mean of the host's memory in the last quarter of the looks may be so much above that of the second.
HOST_GROWTH_MB = 16


def run(server, crowd, look=lambda: {}):
    """What came of it; `look` says more than the host's memory. `failures` quotes what broke a promise of this file."""
    failures = []
    reference = [crowd.request(random.Random(-i)) for i in range(1, 9)]

    def answers():
        return [client.whole(ids, n, **sampling) for ids, n, sampling in reference]

    before = answers()
    counts, memory = mingle(server, crowd, look, failures)
    if answers() != before:
        failures.append("the same requests alone gave other tokens after the crowd than before")
    growth_mb = growth([at["host_mb"] for at in memory])
    if growth_mb > HOST_GROWTH_MB:
        failures.append(f"the host's memory grew by {growth_mb} MB; {HOST_GROWTH_MB} are allowed")
    failures += held_after(server)
    exit_status = drain(crowd, server, failures)
    if exit_status != 0:
        failures.append(f"the server ended with {exit_status}")
    return {"seconds": crowd.seconds, "clients": crowd.clients, **counts, "memory": memory, "host_growth_mb": growth_mb,
            "exit": exit_status, "failed": len(failures), "failures": failures[:20]}  # fmt: skip


def mingle(server, crowd, look, failures):
    """Lets the clients come and go; counts of how they ended, and some forty looks at the memory meanwhile."""
    ends = time.monotonic() + crowd.seconds
    counts = {"whole": 0, "left": 0}
    lock = threading.Lock()

    def come_and_go(i):
        generator = random.Random(i)
        while time.monotonic() < ends:
            is_leaving = generator.random() < 0.25
            patience = generator.randrange(1, 40) if is_leaving else None
            ids, n, sampling = crowd.request(generator)
            try:
                client.streamed(ids, n, lambda n_pieces, patience=patience: n_pieces == patience, **sampling)
                with lock:
                    counts["left" if is_leaving else "whole"] += 1
            except (OSError, RuntimeError, http.client.HTTPException) as error:
                print("failed:", repr(error), flush=True)
                with lock:
                    failures.append(repr(error))

    memory = []
    with concurrent.futures.ThreadPoolExecutor(crowd.clients) as pool:
        futures = [pool.submit(come_and_go, i) for i in range(crowd.clients)]
        while time.monotonic() < ends:
            memory.append({"host_mb": server.resident_mb(), **look()})
            time.sleep(crowd.seconds / 40)
        for future in futures:
            future.result()
    return counts, memory


def growth(resident_mb):
    """From the second quarter's mean to the last one's: before that, buffers and pages are touched for the first time."""
    quarter = max(len(resident_mb) // 4, 1)
    return round(statistics.fmean(resident_mb[-quarter:]) - statistics.fmean(resident_mb[quarter : 2 * quarter]))


def held_after(server, patience_s=30):
    """What the server still holds when nobody asks for anything, in words; it may take a moment to see clients gone."""
    ends = time.monotonic() + patience_s
    while True:
        load = json.loads(client.get("/load")[1])
        held = {"running": load["queue"]["running"], "waiting": load["queue"]["waiting"],
                "active pages": load["blocks"]["active"], "prompt tokens to come": load["prefillBacklogTokens"]}  # fmt: skip
        found = [f"{n} {what} after everybody had gone" for what, n in held.items() if n]
        if not found or time.monotonic() > ends:
            return found
        time.sleep(0.2)


def drain(crowd, server, failures):
    """SIGTERM while four streams run, which must come whole within --drain-seconds; the exit status."""
    jobs = [(client.prompt(i, 64, crowd.n_ids), crowd.output_tokens) for i in range(4)]
    try:
        return client.beside(jobs, lambda: server.end(signal.SIGTERM), leave_after_work=False)[0]
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        failures.append(f"a stream did not survive the drain: {error!r}")
        return server.process.wait(90)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server", help="the binary")
    parser.add_argument("--model", default="demo", help="its context has room for 1,300 tokens")
    parser.add_argument("--vocabulary", type=int, default=2048, help="the model's token ids, at least 301")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--log", default="soak.log", help="of the server")
    arguments = parser.parse_args()
    crowd = Crowd(arguments.clients, arguments.seconds, arguments.vocabulary - 300, prompt_tokens=700, output_tokens=300)
    server = client.Server(arguments.server, arguments.model, ["--device", "cpu"], arguments.log)
    try:
        found = run(server, crowd)
    finally:
        server.process.kill()
    print(json.dumps({**found, "load_average": os.getloadavg()}, indent=1), flush=True)
    sys.exit(f"{found['failed']} failures, see above" if found["failed"] else 0)


if __name__ == "__main__":
    main()
