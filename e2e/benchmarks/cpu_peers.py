"""kvasir-server over HTTP beside llama.cpp, on the same random 1.1B Llama in bf16, 2 threads, in one run.

Prints, and with --json writes, the medians: read bandwidth, prefill of 128 tokens, decode at batch 1, 8 and 16.
Run it from the repository; see e2e/benchmarks/README.md for the one line that sets it up.
"""

import argparse
import http.client
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import threading
import time

PROMPT_TOKENS, OUTPUT_TOKENS, BATCHES, PORT = 128, 48, (1, 8, 16), 18431
WEIGHT_BYTES_A_TOKEN = 2 * (22 * (2048 * (2 * 2048 + 2 * 256) + 3 * 2048 * 5632) + 32000 * 2048)


class Server:
    """kvasir-server as a process, ready when constructed."""

    def __init__(self, binary, model, threads):
        self.process = subprocess.Popen(
            [binary, "--model", str(model), "--port", str(PORT), "--threads", str(threads), "--dtype", "bfloat16",
             "--max-model-len", "1024", "--max-num-seqs", "16", "--num-gpu-blocks-override", "1024"],
            stderr=subprocess.DEVNULL)  # fmt: skip
        deadline = time.monotonic() + 120
        while not self.ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                sys.exit("kvasir-server did not become ready")
            time.sleep(0.2)

    def ready(self):
        try:
            connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=5)
            connection.request("GET", "/ready")
            return connection.getresponse().status == 200
        except OSError:
            return False

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


def stream(seed, output_tokens, arrivals):
    """Sends one completion and appends the arrival time of each generated token to `arrivals`."""
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=300)
    prompt = [(seed * 7919 + 31 * i) % 31000 + 300 for i in range(PROMPT_TOKENS)]
    body = {"model": "bench", "prompt": prompt, "max_tokens": output_tokens, "temperature": 0, "ignore_eos": True,
            "stream": True, "return_token_ids": True}  # fmt: skip
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        sys.exit(f"HTTP {response.status}: {response.read().decode()}")
    for line in response:
        if line.startswith(b"data: {"):
            choices = json.loads(line[6:])["choices"]
            arrivals.extend([time.monotonic()] * len(choices[0].get("token_ids") or []) if choices else [])


def prefill(seed):
    """Tokens a second: prompt tokens over the time to the first token."""
    arrivals, start = [], time.monotonic()
    stream(seed, 1, arrivals)
    return PROMPT_TOKENS / (arrivals[0] - start)


def decode(batch, seed):
    """Tokens a second of the whole batch while every one of its streams is decoding."""
    arrivals = [[] for _ in range(batch)]
    threads = [threading.Thread(target=stream, args=(seed + i, OUTPUT_TOKENS, arrivals[i])) for i in range(batch)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    begin, end = max(a[0] for a in arrivals), min(a[-1] for a in arrivals)
    return sum(sum(begin < t <= end for t in a) for a in arrivals) / (end - begin)


def ours(binary, model, threads):
    server = Server(binary, model, threads)
    try:
        prefill(1)  # warms pages and threads
        figures = {"prefill 128": prefill(2)}
        for batch in BATCHES:
            figures[f"decode, batch {batch}"] = decode(batch, 100 * batch)
        return figures
    finally:
        server.stop()


def theirs(binary, model, threads):
    output = subprocess.run(
        [binary, "-m", str(model / "model.gguf"), "-t", str(threads), "-tb", str(threads), "-c", "8192", "-b", "2048",
         "-ub", "512", "-npp", str(PROMPT_TOKENS), "-ntg", str(OUTPUT_TOKENS), "-npl", ",".join(map(str, BATCHES)),
         "--output-format", "jsonl"],
        capture_output=True, text=True, check=True).stdout  # fmt: skip
    rows = {row["pl"]: row for row in map(json.loads, (line for line in output.splitlines() if line.startswith("{")))}
    return {"prefill 128": rows[1]["speed_pp"]} | {f"decode, batch {b}": rows[b]["speed_tg"] for b in BATCHES}


def bandwidth(binary, threads):
    """GB/s of the best read of 2 GB: the first thing that the kernels' benchmark prints."""
    with subprocess.Popen([binary, str(threads), "--bench"], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith(f"read bandwidth, {threads} thread"):
                process.kill()
                return float(line.split()[-2])
    sys.exit(f"{binary} printed no read bandwidth for {threads} threads")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", required=True, help="the kvasir-server binary")
    parser.add_argument("--bandwidth", required=True, help="the binary that prints `read bandwidth ... GB/s`")
    parser.add_argument("--llama", required=True, help="llama.cpp's llama-batched-bench")
    parser.add_argument("--model", required=True, type=pathlib.Path, help="what random_llama.py wrote")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()

    reads, kvasir, llama = [], [], []
    for i in range(args.rounds):  # interleaved, so that a noisy minute hits everybody
        reads.append(bandwidth(args.bandwidth, args.threads))
        kvasir.append(ours(args.server, args.model, args.threads))
        llama.append(theirs(args.llama, args.model, args.threads))
        print(f"round {i + 1} of {args.rounds}: {kvasir[-1]} {llama[-1]}", file=sys.stderr)

    read = statistics.median(reads)
    table = {name: (statistics.median(k[name] for k in kvasir), statistics.median(l[name] for l in llama))
             for name in kvasir[0]}  # fmt: skip
    print(f"read bandwidth, {args.threads} threads: {read:.1f} GB/s; load average {os.getloadavg()[0]:.1f}\n")
    print("| tokens/s | kvasir-server, HTTP | llama.cpp | ratio |\n|---|---|---|---|")
    for name, (a, b) in table.items():
        print(f"| {name} | {a:.1f} | {b:.1f} | {a / b:.2f} |")
    share = table["decode, batch 1"][0] * WEIGHT_BYTES_A_TOKEN / 1e9 / read
    print(f"\ndecode at batch 1 reads {100 * share:.0f} % of the read bandwidth")
    if args.json:
        args.json.write_text(json.dumps({"bandwidth": reads, "kvasir": kvasir, "llama": llama}, indent=1))


if __name__ == "__main__":
    main()
