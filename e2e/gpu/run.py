"""Runs on the machine with the GPU, from the folder that pack.sh made: python3 run.py RESULTS STAGE [STAGE ...]

Stages, each under 9 minutes, each leaving RESULTS/<stage>.json behind, in any order:

  tests      every kernel and the whole device against the f64 reference, every golden model token for token
  sanitizer  compute-sanitizer memcheck and racecheck on the small tests, where the machine has it
  kernels    attention and products alone, beside the copy's bandwidth and PyTorch's attention
  serving    the whole server over HTTP on random weights of Llama-3.1-8B's shape
  2048_128, 128_2048, 2048_2048  the longer workloads: tokens in and out of each request
  2048_128_unbounded  the first of them with --max-decode-stretch 0: prompts fill every step
  defaults   600 requests at once on a server without a flag but the device: how many it refuses
  pacing     gaps in 1, 16 and 64 streams while prompts of 8k arrive without end, and how fast these are computed
  soak       160 clients with random lengths and sampling, a quarter of whom leave: memory, and how the server ends
  peers      Transformers' generate() on the mix's first 200 requests, in static batches
  continuous the same requests in Transformers' continuous batching, whose interface changes from version to version

table.py makes one table of what there is. Needs python3 with torch (and transformers for the last two); no Rust, no network.
"""

import json
import os
import pathlib
import random
import re
import shutil
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
MODEL = pathlib.Path(os.environ.get("KVASIR_GPU_MODEL", "/dev/shm/llama-8b-random"))
FLAGS = ["--device", "cuda", "--max-waiting", "8192", "--max-connections", "4096", "--max-model-len", "40960"]


def environment():
    """cuBLAS as it is installed: on the library path already, or in PyTorch's packages."""
    import torch

    packages = pathlib.Path(torch.__file__).parents[1]
    folders = {str(path.parent) for path in packages.glob("nvidia/**/libcublasLt.so*")}
    path = ":".join([*sorted(folders), os.environ.get("LD_LIBRARY_PATH", "")])
    return {**os.environ, "LD_LIBRARY_PATH": path, "KVASIR_TEST_GPU": "1", "KVASIR_GOLDEN": str(HERE / "golden")}


def machine():
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    gpu = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return {"gpu": gpu, "date": time.strftime("%Y-%m-%d")}


def run_tests(name, *arguments):
    """Runs a test binary; what it printed at the end."""
    begun = time.monotonic()
    done = subprocess.run([HERE / name, *arguments], env=environment(), capture_output=True, text=True)
    counts = re.search(r"(\d+) passed; (\d+) failed", done.stdout)
    print(done.stdout[-3000:], done.stderr[-3000:], flush=True)
    return {"passed": int(counts[1]) if counts else 0, "failed": int(counts[2]) if counts else -1, "exit": done.returncode,
            "seconds": round(time.monotonic() - begun, 1)}  # fmt: skip


def tests():
    return {name: run_tests(name, *arguments) for name, arguments in
            [("cuda_shim", ["--test-threads", "1"]), ("golden_tests", ["cuda"]), ("golden_engine", ["cuda"])]}  # fmt: skip


def sanitizer():
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.path.exists(tool):
        return {"skipped": "there is no compute-sanitizer here"}
    results = {}
    for check, only in [("memcheck", "device::"), ("memcheck", "attention::"), ("racecheck", "attention::"),
                        ("racecheck", "device::a_step"), ("racecheck", "rows::")]:  # fmt: skip
        command = [tool, "--tool", check, "--error-exitcode", "9", HERE / "cuda_shim", only, "--test-threads", "1"]
        begun = time.monotonic()
        done = subprocess.run(command, env=environment(), capture_output=True, text=True)
        lines = [line for line in (done.stdout + done.stderr).splitlines() if "SUMMARY" in line or "test result" in line]
        print(check, only, lines, flush=True)
        results[f"{check} {only}"] = {"exit": done.returncode, "summary": lines,
                                      "seconds": round(time.monotonic() - begun, 1)}  # fmt: skip
    return results


def model():
    if not (MODEL / "model.safetensors").exists():
        import random_weights

        random_weights.write(MODEL)


def mix(n):
    """ShareGPT-like (input, output) lengths: lognormal, sigma 1, clipped to [4, 1024], clipped means 161 and 338."""
    generator = random.Random(0)

    def lengths(mean):
        draws = [generator.gauss(0, 1) for _ in range(200_000)]
        low, high = 0.0, 10.0
        for _ in range(40):
            middle = (low + high) / 2
            found = statistics.fmean(min(max(2.718281828 ** (middle + z), 4), 1024) for z in draws[:20_000])
            low, high = (middle, high) if found < mean else (low, middle)
        return [round(min(max(2.718281828 ** (low + generator.gauss(0, 1)), 4), 1024)) for _ in range(n)]

    return list(zip(lengths(161), lengths(338)))


def median(values):
    return statistics.median(list(values))


def throughput(client, pairs, runs):
    rates = []
    for run in range(runs):
        jobs = [(client.fresh_prompt(n), m) for n, m in pairs]
        seconds = client.all_at_once(jobs)
        rates.append(sum(m for _, m in pairs) / seconds)
        print(f"{len(pairs)} requests: {rates[-1]:.0f} output tokens/s", flush=True)
    return {"median": round(median(rates)), "all": [round(rate) for rate in rates]}


def serving():
    import client

    model()
    results = {"machine": machine()}
    server = client.Server(HERE / "kvasir-server", MODEL, FLAGS, "first.log", environment())
    results["first_ready_s"] = round(server.ready_s, 2)
    server.stop()
    server = client.Server(HERE / "kvasir-server", MODEL, FLAGS, "server.log", environment())
    results["ready_s"] = round(server.ready_s, 2)
    print("ready", results["first_ready_s"], results["ready_s"], flush=True)
    print(open("server.log").read()[-600:], flush=True)
    client.whole(client.fresh_prompt(100), 64)
    results["itl_ms"] = {}
    for context in (128, 4096, 32768):
        streams = []
        for run in range(3):
            times = client.streamed(client.fresh_prompt(context), 160)
            streams.append(median(b - a for a, b in zip(times[20:], times[21:])) * 1e3)
        results["itl_ms"][context] = round(median(streams), 3)
        print("inter-token latency", context, streams, flush=True)
    results["ttft_ms"] = {}
    for n in (128, 512, 2048, 8192):
        firsts = [client.streamed(client.fresh_prompt(n), 2)[0] * 1e3 for _ in range(7)]
        results["ttft_ms"][n] = round(median(firsts), 2)
        print("time to first token", n, firsts, flush=True)
    # The same prompt again, and one that goes on after it: what the prefix cache saves.
    ids = client.fresh_prompt(8192)
    cold, *again = [client.streamed(ids, 2)[0] * 1e3 for _ in range(5)]
    longer = [client.streamed(ids + client.fresh_prompt(64), 2)[0] * 1e3 for _ in range(5)]
    results["ttft_cached_ms"] = {"cold": round(cold, 2), "again": round(median(again), 2), "longer": round(median(longer), 2)}
    print("time to first token with a cached prefix", results["ttft_cached_ms"], flush=True)
    results["decode_tokens_s"] = {}
    for batch in (8, 32, 64, 128, 256):
        rates = []
        for run in range(3):
            short, long = (client.all_at_once([(client.fresh_prompt(128), m) for _ in range(batch)])
                           for m in (32, 224))  # fmt: skip
            rates.append(batch * 192 / (long - short))
        results["decode_tokens_s"][batch] = round(median(rates))
        print("decode", batch, rates, flush=True)
    requests = mix(1000)
    results["mix"] = throughput(client, requests, 3)
    results["mix_200"] = throughput(client, requests[:200], 3)
    results["128_128"] = throughput(client, [(128, 128)] * 1000, 3)
    server.stop()
    return results


def workload(n, m, count, more_flags=()):
    import client

    model()
    flags = [*FLAGS, *more_flags]
    server = client.Server(HERE / "kvasir-server", MODEL, flags, f"{n}_{m}.log", environment())
    rates = throughput(client, [(n, m)] * count, 3)
    server.stop()
    return {"machine": machine(), "requests": count, **rates}


def defaults():
    import concurrent.futures

    import client

    model()
    server = client.Server(HERE / "kvasir-server", MODEL, ["--device", "cuda"], "defaults.log", environment())

    def answer(ids):
        try:
            return len(client.whole(ids, 128)) == 128
        except RuntimeError as error:
            print(error, flush=True)
            return False

    prompts = [client.fresh_prompt(128) for _ in range(600)]
    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as threads:
        refused = list(threads.map(answer, prompts)).count(False)
    server.stop()
    return {"machine": machine(), "requests": len(prompts), "refused": refused}


# Prompts of 8k beside streams.
LOAD = dict(context=128, output_tokens=1500, long_tokens=8000, at_once=4, undisturbed_s=4, disturbed_s=6, alone_s=5)


def pacing():
    import client
    import pacing as measurement

    model()
    server = client.Server(HERE / "kvasir-server", MODEL, FLAGS, "pacing.log", environment())
    load = measurement.Load(**LOAD)
    results = {"machine": machine(), **measurement.run(load, (1, 16, 64))}
    results["short_behind_64_long_s"] = measurement.short_behind_long(load, 64)
    print(results["short_behind_64_long_s"], flush=True)
    results["exit"] = server.stop()
    return results


def gpu_memory():
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    used = subprocess.run(query, capture_output=True, text=True).stdout.split()
    return {"gpu_mb": int(used[0]) if used else None}


def soak(seconds=float(os.environ.get("KVASIR_SOAK_SECONDS", "90"))):
    import client
    import soak as crowd

    model()
    server = client.Server(HERE / "kvasir-server", MODEL, FLAGS, "soak.log", environment())
    many = crowd.Crowd(clients=160, seconds=seconds, n_ids=120000, prompt_tokens=700, output_tokens=300)
    results = {"machine": machine(), **crowd.run(server, many, gpu_memory)}
    print(results, flush=True)
    return results


def kernels():
    import attention_peer

    done = subprocess.run([HERE / "cuda_bench"], env=environment(), capture_output=True, text=True)
    print(done.stdout, done.stderr[-2000:], flush=True)
    ours = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {"machine": machine(), "exit": done.returncode, "ours": ours, "peer": attention_peer.measure()}


def peer(way):
    import transformers_peer

    model()
    found = transformers_peer.measure(MODEL, mix(1000)[:200], getattr(transformers_peer, way))
    return {"machine": machine(), **found}


def peers():
    return peer("static_batches")


def continuous():
    return peer("continuous")


STAGES = {
    "tests": tests, "sanitizer": sanitizer, "kernels": kernels, "serving": serving, "pacing": pacing,
    "soak": soak, "defaults": defaults, "peers": peers, "continuous": continuous,
    "2048_128": lambda: workload(2048, 128, 1000), "128_2048": lambda: workload(128, 2048, 640),
    "2048_2048": lambda: workload(2048, 2048, 384),
    "2048_128_unbounded": lambda: workload(2048, 128, 1000, ("--max-decode-stretch", "0")),
}  # fmt: skip


def main():
    results = pathlib.Path(sys.argv[1])
    results.mkdir(parents=True, exist_ok=True)
    for stage in sys.argv[2:]:
        print(f"=== {stage}", flush=True)
        begun = time.monotonic()
        found = STAGES[stage]()
        found["stage_s"] = round(time.monotonic() - begun)
        (results / f"{stage}.json").write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
