#!/usr/bin/env python3
"""What an answer that is held to a JSON schema costs a stream: gaps between its tokens, with and without, in turn.

    python3 e2e/benchmarks/constrained.py target/release/kvasir-server [streams ...]

A Llama of random weights whose steps take some milliseconds on a CPU, 32,768 tokens in its vocabulary; the schema is an
object with a long string, so that nearly every mask has thousands of tokens. Standard library only.
"""

import concurrent.futures
import json
import pathlib
import statistics
import sys
import tempfile

import client
import random_llama

SHAPE = random_llama.Shape(hidden=1024, intermediate=3072, layers=8, heads=16, kv_heads=4, head_dim=64, vocabulary=32768,
                           context=2048, theta=10000.0)  # fmt: skip
SCHEMA = {"type": "object", "properties": {"text": {"type": "string", "minLength": 100_000}}, "required": ["text"]}
OUTPUT_TOKENS = 96
ROUNDS = 5


def gaps(n_streams, **more):
    """Milliseconds between the pieces of `n_streams` streams at once, the first ones left out."""

    def one(ids):
        times = client.streamed(ids, OUTPUT_TOKENS, **more)
        return [(b - a) * 1e3 for a, b in zip(times[8:], times[9:])]

    prompts = [client.fresh_prompt(32, 30000) for _ in range(n_streams)]
    with concurrent.futures.ThreadPoolExecutor(n_streams) as threads:
        return [gap for stream in threads.map(one, prompts) for gap in stream]


def main():
    binary, *streams = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        model = pathlib.Path(folder) / "model"
        random_llama.write(model, SHAPE)
        server = client.Server(binary, model, ["--device", "cpu"], pathlib.Path(folder) / "log")
        gaps(1)
        gaps(1, structured_outputs={"json": SCHEMA})
        for n_streams in map(int, streams or ("1", "16", "64")):
            plain, held = [], []
            for _ in range(ROUNDS):
                plain += gaps(n_streams)
                held += gaps(n_streams, structured_outputs={"json": SCHEMA})
            found = {"streams": n_streams}
            for name, times in (("plain", plain), ("held", held)):
                times.sort()
                found[name] = {"p50": round(statistics.median(times), 3), "p99": round(times[len(times) * 99 // 100], 3)}
            found["p50_ratio"] = round(found["held"]["p50"] / found["plain"]["p50"], 3)
            print(json.dumps(found), flush=True)
        server.stop()


if __name__ == "__main__":
    main()
