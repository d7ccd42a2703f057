"""What running streams feel while long prompts arrive without end, and how fast these are computed: the p99 gap between
two pieces of a stream, undisturbed and beside them, and prompt tokens a second, alone and beside the streams.

    python3 pacing.py KVASIR-SERVER [--streams 1 4 16] [--rounds 3]

For the CPU, on a Llama of random weights that it writes (210 MB) where it isn't yet; e2e/gpu/run.py measures the same on a
GPU. Standard library only.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import statistics
import time

import client
import random_llama


@dataclasses.dataclass(frozen=True)
class Load:
    # Tokens of the streams' prompts and answers; the answers must outlast what is measured.
    context: int
    output_tokens: int
    # The prompts that arrive, of so many tokens each, so many under way at all times.
    long_tokens: int
    at_once: int
    # Seconds that are measured undisturbed, beside the prompts, and of the prompts alone.
    undisturbed_s: float
    disturbed_s: float
    alone_s: float
    # Prompts are of ids below n_ids + 300.
    n_ids: int = 120000


def percentile(values, share):
    values = sorted(values)
    return values[min(int(len(values) * share), len(values) - 1)]


def gaps_ms(streams, begun, ended):
    """The gaps of all streams that lie between two times."""
    gaps = [(b - a) * 1e3 for times in streams for a, b in zip(times, times[1:]) if begun <= a and b <= ended]
    return {"p50": round(percentile(gaps, 0.5), 2), "p99": round(percentile(gaps, 0.99), 2), "n": len(gaps)}


def long_prompts(load, seconds):
    """Keeps long prompts under way; prompt tokens computed in a second."""
    ends = time.monotonic() + seconds
    done = []

    def one(_):
        while time.monotonic() < ends:
            client.whole(client.fresh_prompt(load.long_tokens, load.n_ids), 1)
            done.append(load.long_tokens)

    begun = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(load.at_once) as pool:
        list(pool.map(one, range(load.at_once)))
    return round(sum(done) / (time.monotonic() - begun))


def run(load, streams):
    """Of one round, by the number of streams."""
    client.whole(client.fresh_prompt(100, load.n_ids), 64)
    # Libraries load kernels for a number of rows when they first see it, and the server learns what steps cost.
    client.beside([(client.fresh_prompt(load.context, load.n_ids), load.output_tokens)],
                  lambda: long_prompts(load, load.alone_s / 2))  # fmt: skip
    results = {"prefill_alone_tokens_s": long_prompts(load, load.alone_s), "streams": {}}
    for n in streams:
        jobs = [(client.fresh_prompt(load.context, load.n_ids), load.output_tokens) for _ in range(n)]
        _, (begun, ended), times = client.beside(jobs, lambda: time.sleep(load.undisturbed_s))
        undisturbed = gaps_ms(times, begun, ended)
        rate, (begun, ended), times = client.beside(jobs, lambda: long_prompts(load, load.disturbed_s))
        disturbed = gaps_ms(times, begun, ended)
        results["streams"][n] = {"undisturbed": undisturbed, "disturbed": disturbed, "prefill_tokens_s": rate,
                                 "p99_ratio": round(disturbed["p99"] / undisturbed["p99"], 2)}  # fmt: skip
        print(n, results["streams"][n], flush=True)
    return results


def short_behind_long(load, n_long):
    """Seconds to the first token of a short prompt that comes after long ones, and to the last long one's, beside one
    stream."""

    def work():
        begun = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(n_long) as pool:
            prompts = [client.fresh_prompt(load.long_tokens, load.n_ids) for _ in range(n_long)]
            futures = [pool.submit(client.whole, ids, 1) for ids in prompts]
            time.sleep(0.5)
            first = client.streamed(client.fresh_prompt(100, load.n_ids), 2)[0]
            for future in futures:
                future.result()
        return {"short": round(first, 3), "all": round(time.monotonic() - begun, 1)}

    stream = (client.fresh_prompt(load.context, load.n_ids), load.output_tokens)
    return client.beside([stream], work)[0]


# Some 105 million parameters: a decode takes milliseconds on two cores, as a model of billions does on a server's many.
SHAPE = random_llama.Shape(hidden=1024, intermediate=2816, layers=8, heads=16, kv_heads=4, head_dim=64, vocabulary=8192,
                           context=8192, theta=10000.0)  # fmt: skip
LOAD = Load(context=128, output_tokens=4000, long_tokens=2000, at_once=2, undisturbed_s=6, disturbed_s=15, alone_s=10,
            n_ids=SHAPE.vocabulary - 300)  # fmt: skip


def table(rounds, names):
    """Medians of the rounds, in Markdown."""

    def median(of):
        return statistics.median(of(found) for found in rounds)

    alone = median(lambda found: found["prefill_alone_tokens_s"])
    lines = [f"{LOAD.at_once} prompts of {LOAD.long_tokens:,} tokens under way at all times; alone {alone:,.0f} tokens/s", "",
             "| streams | gap undisturbed, p50 / p99, ms | beside the prompts | p99 ratio | prompt tokens/s | lost |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for n in names:
        p50, p99 = ([median(lambda found, s=side, p=p: found["streams"][n][s][p]) for side in ("undisturbed", "disturbed")]
                    for p in ("p50", "p99"))  # fmt: skip
        ratio = median(lambda found: found["streams"][n]["p99_ratio"])
        rate = median(lambda found: found["streams"][n]["prefill_tokens_s"])
        lines.append(f"| {n} | {p50[0]} / {p99[0]} | {p50[1]} / {p99[1]} | {ratio} | {rate:,.0f} | {1 - rate / alone:.0%} |")
    short, long = (median(lambda found, k=k: found["short_behind_16_long_s"][k]) for k in ("short", "all"))
    lines += ["", f"A prompt of 100 tokens that comes after 16 long ones has its first token after {short} s; the long ones "
              f"take {long} s."]  # fmt: skip
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server", help="the binary")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("/tmp/kvasir-pacing"), help="for the model and logs")
    arguments = parser.parse_args()
    model = arguments.work / "model"
    random_llama.write(model, SHAPE)
    flags = ["--device", "cpu", "--dtype", "bfloat16"]
    rounds = []
    for _ in range(arguments.rounds):
        load_before = os.getloadavg()[0]
        server = client.Server(arguments.server, model, flags, arguments.work / "server.log")
        try:
            found = run(LOAD, arguments.streams)
            found["short_behind_16_long_s"] = short_behind_long(LOAD, 16)
            found["exit"] = server.stop()
        finally:
            server.process.kill()
        rounds.append({**found, "load_average": [load_before, os.getloadavg()[0]]})
    (arguments.work / "results.json").write_text(json.dumps(rounds, indent=1) + "\n")
    print(f"{os.cpu_count()} CPUs; load average before and after each round: {[r['load_average'] for r in rounds]}")
    print(f"medians of {len(rounds)} rounds. {table(rounds, arguments.streams)}")


if __name__ == "__main__":
    main()
