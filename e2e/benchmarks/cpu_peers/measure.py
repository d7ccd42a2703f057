"""kvasir-server over HTTP beside llama.cpp, on the same random Llama in bf16, each pinned to the same cores, in turn.

Writes table.md and results.json into --out: the read bandwidth, and the medians of prefill of 128 tokens and of decode
at batch 1, 8 and 16. run.sh in this directory sets everything up and starts it.
"""

import argparse
import http.client
import json
import os
import pathlib
import platform
import signal
import statistics
import subprocess
import sys
import threading
import time

PROMPT_TOKENS, OUTPUT_TOKENS, BATCHES = 128, 48, (1, 8, 16)
# What issue and README promise: ours over theirs.
TARGETS = {"prefill 128": 1.2, "decode, batch 1": 1.0, "decode, batch 8": 1.2, "decode, batch 16": 1.3}


def separate_cores(n):
    """The first `n` CPUs that this process may use and that share no physical core; two threads of one core would
    share its arithmetic units and its way to memory."""
    chosen, taken = [], set()
    for cpu in sorted(os.sched_getaffinity(0)):
        siblings = pathlib.Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        core = siblings.read_text().strip() if siblings.exists() else str(cpu)
        if core not in taken:
            taken.add(core)
            chosen.append(cpu)
    if len(chosen) < n:
        sys.exit(f"{n} cores are wanted, {len(chosen)} are there: {chosen}")
    return chosen[:n]


def weight_bytes_a_token(model):
    """What a decode step at batch 1 reads of the weights: all but the embedding table."""
    c = json.loads((model / "config.json").read_text())
    hidden, heads, kv_heads, head_dim = (
        c[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    layer = attention + 3 * hidden * c["intermediate_size"]
    return 2 * (c["num_hidden_layers"] * layer + c["vocab_size"] * hidden)


class Server:
    """kvasir-server as a process, ready when constructed."""

    def __init__(self, args, pinned):
        self.log = (args.out / "kvasir-server.log").open("w+b")
        command = [*pinned, args.server, "--model", args.model, "--port", "0", "--threads", args.threads,
                   "--dtype", "bfloat16", "--max-model-len", "1024", "--max-num-seqs", "16",
                   "--num-gpu-blocks-override", "1024"]  # fmt: skip
        self.process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, stderr=self.log)
        # It says where it serves and on what when it is ready; the pipe ends where it fails.
        self.says = self.process.stdout.readline().decode().strip()
        if " at http://" not in self.says:
            sys.exit(f"kvasir-server did not become ready; see {self.log.name}")
        self.address = self.says.split(" at http://")[1].split()[0]

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        self.process.wait(60)
        self.log.close()

    def stream(self, seed, output_tokens, arrivals):
        """Sends one completion and appends the arrival time of each generated token to `arrivals`."""
        connection = http.client.HTTPConnection(self.address, timeout=120)
        prompt = [(seed * 7919 + 31 * i) % 31000 + 300 for i in range(PROMPT_TOKENS)]
        body = {"prompt": prompt, "max_tokens": output_tokens, "temperature": 0, "ignore_eos": True,
                "stream": True, "return_token_ids": True}  # fmt: skip
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"HTTP {response.status}: {response.read().decode()}")
        for line in response:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(event["error"])
                for choice in event["choices"]:
                    arrivals.extend([time.monotonic()] * len(choice["token_ids"]))
        connection.close()

    def prefill(self, seed):
        """Tokens a second: prompt tokens over the time to the first token."""
        arrivals, start = [], time.monotonic()
        self.stream(seed, 1, arrivals)
        return PROMPT_TOKENS / (arrivals[0] - start)

    def decode(self, batch, seed):
        """Tokens a second of the whole batch while every one of its streams is decoding."""
        arrivals = [[] for _ in range(batch)]
        threads = [
            threading.Thread(target=self.stream, args=(seed + i, OUTPUT_TOKENS, arrivals[i])) for i in range(batch)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if any(len(a) != OUTPUT_TOKENS for a in arrivals):
            sys.exit(f"not every answer has {OUTPUT_TOKENS} tokens: {[len(a) for a in arrivals]}")
        begin, end = max(a[0] for a in arrivals), min(a[-1] for a in arrivals)
        return sum(sum(begin < t <= end for t in a) for a in arrivals) / (end - begin)


def ours(args, pinned):
    server = Server(args, pinned)
    try:
        server.prefill(1)  # warms pages and threads
        figures = {"prefill 128": statistics.median(server.prefill(seed) for seed in (2, 3, 4))}
        for batch in BATCHES:
            figures[f"decode, batch {batch}"] = server.decode(batch, 100 * batch)
        return figures, server.says
    finally:
        server.stop()


def theirs(args, pinned):
    command = [*pinned, args.llama, "-m", args.model / "model.gguf", "-t", args.threads, "-tb", args.threads,
               "-c", "8192", "-b", "2048", "-ub", "512", "-npp", PROMPT_TOKENS, "-ntg", OUTPUT_TOKENS,
               # Batch 1 twice: the first warms up. As above, the median of its prefills counts.
               "-npl", ",".join(map(str, (1, 1, 1, *BATCHES))), "--output-format", "jsonl"]  # fmt: skip
    with (args.out / "llama.cpp.log").open("w") as log:
        output = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=log, text=True)
    if output.returncode != 0:
        sys.exit(f"{command[len(pinned)]} failed; see {log.name}")
    rows = [json.loads(line) for line in output.stdout.splitlines() if line.startswith("{")]
    alone = [row["speed_pp"] for row in rows if row["pl"] == 1][1:]
    return {"prefill 128": statistics.median(alone)} | {f"decode, batch {r['pl']}": r["speed_tg"] for r in rows}


def bandwidth(args, pinned):
    """GB/s of the best read of 2 GB: the first thing that the kernels' benchmark prints."""
    command = [*pinned, str(args.bandwidth), str(args.threads), "--bench"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        for line in process.stdout:
            if line.startswith(f"read bandwidth, {args.threads} thread"):
                process.kill()
                return float(line.split()[-2])
    sys.exit(f"{args.bandwidth} printed no read bandwidth for {args.threads} threads")


def cpu():
    """The processor in one line, with what it has for bf16."""
    info = pathlib.Path("/proc/cpuinfo").read_text() if pathlib.Path("/proc/cpuinfo").exists() else ""
    field = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in info.splitlines())}
    flags = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in field.get("flags", "").split()]
    return f"{field.get('model name', platform.machine())}, {os.cpu_count()} CPUs, {' '.join(flags)}"


def table(args, cores, says, rounds):
    """The report in Markdown, from the rounds that there are."""
    read = statistics.median(r["bandwidth"] for r in rounds)
    lines = [
        f"{cpu()}; engines on CPUs {','.join(map(str, cores))}; load average {os.getloadavg()[0]:.1f}",
        f"{says}; revision {args.revision}",
        f"medians of {len(rounds)} round(s); read bandwidth, {args.threads} threads: {read:.1f} GB/s",
        "",
        "| tokens/s | kvasir-server, HTTP | llama.cpp | ratio | wanted |",
        "|---|---|---|---|---|",
    ]
    for name, wanted in TARGETS.items():
        a, b = (statistics.median(r[engine][name] for r in rounds) for engine in ("kvasir", "llama"))
        lines.append(f"| {name} | {a:.1f} | {b:.1f} | {a / b:.2f} | {wanted:.1f} |")
    alone = statistics.median(r["kvasir"]["decode, batch 1"] for r in rounds)
    share = alone * weight_bytes_a_token(args.model) / 1e9 / read
    lines += ["", f"decode at batch 1 reads {100 * share:.0f} % of the read bandwidth; wanted: 80 %"]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", required=True, type=pathlib.Path, help="the kvasir-server binary")
    parser.add_argument("--bandwidth", required=True, type=pathlib.Path, help="prints `read bandwidth ... GB/s`")
    parser.add_argument("--llama", required=True, type=pathlib.Path, help="llama.cpp's llama-batched-bench")
    parser.add_argument("--model", required=True, type=pathlib.Path, help="what random_weights.py wrote")
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--revision", default="unknown")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cores", help="CPUs for the engines, as 0,1; default: the first that share no core")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=330, help="begin no round that would end later than this")
    args = parser.parse_args()

    cores = [int(c) for c in args.cores.split(",")] if args.cores else separate_cores(args.threads)
    pinned = ["taskset", "-c", ",".join(map(str, cores))]
    # Whoever measures stays off the measured cores where there are others.
    if others := os.sched_getaffinity(0) - set(cores):
        os.sched_setaffinity(0, others)

    rounds, start, longest = [], time.monotonic(), 0.0
    for i in range(args.rounds):  # interleaved, so that a noisy minute hits everybody
        begin = time.monotonic()
        if rounds and begin - start + longest > args.seconds:
            print(f"{i} rounds, not {args.rounds}: the time is over", file=sys.stderr)
            break
        figures = {"bandwidth": bandwidth(args, pinned)}
        figures["kvasir"], says = ours(args, pinned)
        figures["llama"] = theirs(args, pinned)
        rounds.append(figures)
        longest = max(longest, time.monotonic() - begin)
        print(f"round {i + 1}, {time.monotonic() - begin:.0f} s: {json.dumps(figures)}", file=sys.stderr)
        report = table(args, cores, says, rounds)
        (args.out / "table.md").write_text(report)
        (args.out / "results.json").write_text(json.dumps({"cpu": cpu(), "cores": cores, "rounds": rounds}, indent=1))
    print(report, end="")


if __name__ == "__main__":
    main()
