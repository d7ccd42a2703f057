"""Prints the table of a run: python3 table.py RESULTS > RESULTS.md. Percentages are of ceilings measured in that run."""

import json
import pathlib
import sys

# What was expected of an H200 before the run, and where the figure came from.
PREDICTED = {
    "decode 64 x 4k": "87.5", "decode 1 x 4k": "38.4", "prefill 8k": "311", "itl": "4.52", "mix": "15,500", "mix 200": "9,200",
    "static": "60", "ttft": "49.5", "ready": "1.7", "2048_128": "1,680", "2048_128_unbounded": "2,120", "128_2048": "13,500",
    "2048_2048": "5,900", "pacing": "2.95", "pacing loss": "31",
}  # fmt: skip
PREDICTION_NOTE = ("Predictions were written before the first run of the day's last builds, from the run before it. They count on a choice "
                   "among cuBLASLt's algorithms that was measured and taken out again (PLAN.md), and on prompts that may stretch a "
                   "decode 2.9 times in place of 3.")  # fmt: skip


def read(folder, stage):
    path = folder / f"{stage}.json"
    return json.loads(path.read_text()) if path.exists() else None


def find(rows, **wanted):
    return next((row for row in rows if all(row.get(k) == v for k, v in wanted.items())), None)


def main():
    folder = pathlib.Path(sys.argv[1])
    kernels, serving, peers, continuous, tests, sanitizer = (
        read(folder, s) for s in ("kernels", "serving", "peers", "continuous", "tests", "sanitizer"))  # fmt: skip
    known = serving or kernels or peers
    machine = known["machine"]
    print("# What the GPU device reaches, measured\n")
    print(f"{machine['gpu']}, {machine['date']}. Made by `e2e/gpu/pack.sh FOLDER` here, `python3 run.py RESULTS STAGE ...` "
          f"in that folder on the GPU's machine, and `python3 e2e/gpu/table.py RESULTS`. {PREDICTION_NOTE}\n")  # fmt: skip

    print("## Against the goals\n\n| what | goal | predicted | measured |\n|---|---|---|---|")

    def row(what, goal, key, value):
        print(f"| {what} | {goal} | {PREDICTED.get(key, '')} | {value} |")

    if kernels:
        copy = kernels["peer"]["copy_gb_s"]
        ours = kernels["ours"]
        for batch, context, goal, name in [(64, 4096, ">= 85", "64 x 4k"), (1, 4096, ">= 35", "1 x 4k")]:
            found = find(ours, what="decode", batch=batch, context=context)
            row(f"decode attention, {name}, block 16, % of copy", goal, f"decode {name}",
                f"{100 * found['gb_s'] / copy:.1f}")  # fmt: skip
        row("prefill attention, 8k, TFLOP/s", ">= 280", "prefill 8k",
            find(ours, what="prefill", tokens=8192)["tflop_s"])  # fmt: skip
    if serving:
        row("inter-token latency, batch 1, 128 tokens of context, ms", "<= 5.0", "itl", serving["itl_ms"]["128"])
        row("the mix, 1,000 requests, output tokens/s", ">= 10,000", "mix", f"{serving['mix']['median']:,}")
        row("the mix's first 200, output tokens/s", ">= 5,500", "mix 200", f"{serving['mix_200']['median']:,}")
        if peers:
            row("against Transformers' static batches, same requests", ">= 20x", "static",
                f"{serving['mix_200']['median'] / peers['tokens_s']:.1f}x")  # fmt: skip
        row("time to first token of 2,048, ms", "<= 65", "ttft", serving["ttft_ms"]["2048"])
        row("time to ready, weights in the page cache, s", "<= 6", "ready", serving["ready_s"])
    pacing, soak = read(folder, "pacing"), read(folder, "soak")
    if pacing:
        worst = max(found["p99_ratio"] for found in pacing["streams"].values())
        slowest = min(found["prefill_tokens_s"] for found in pacing["streams"].values())
        loss = 100 * (1 - slowest / pacing["prefill_alone_tokens_s"])
        row("p99 gap of a stream while prompts of 8k arrive, times undisturbed", "<= 3", "pacing", worst)
        row("what that costs in prefill throughput, %", "<= 15", "pacing loss", f"{loss:.0f}")

    if serving:
        print("\n## The server over HTTP (random weights of Llama-3.1-8B's shape, bf16, greedy, ignore_eos, medians of 3)\n")
        print("| context | inter-token latency, ms |\n|---|---|")
        for context, ms in serving["itl_ms"].items():
            print(f"| 1 x {context} | {ms} |")
        print("\n| prompt | time to first token, ms |\n|---|---|")
        for n, ms in serving["ttft_ms"].items():
            print(f"| {n} | {ms} |")
        cached = serving["ttft_cached_ms"]
        print(f"\nA prompt of 8,192 tokens has its first token after {cached['cold']} ms, asked again after {cached['again']} ms, "
              f"and with 64 more tokens behind it after {cached['longer']} ms: the prefix cache.")  # fmt: skip
        print("\n| sequences, 128 tokens of prompt | decode, tokens/s |\n|---|---|")
        for batch, rate in serving["decode_tokens_s"].items():
            print(f"| {batch} | {rate:,} |")
        print("\n| workload (input, output) | predicted | output tokens/s | runs |\n|---|---|---|---|")
        workloads = [("ShareGPT-like mix, 1,000", "mix", serving["mix"]), ("its first 200", "mix 200", serving["mix_200"]),
                     ("(128, 128), 1,000", "", serving["128_128"])]  # fmt: skip
        for name in ("2048_128", "2048_128_unbounded", "128_2048", "2048_2048"):
            if found := read(folder, name):
                n, m, *how = name.split("_")
                flags = ", --max-decode-stretch 0" if how else ""
                workloads.append((f"({n}, {m}), {found['requests']:,}{flags}", name, found))
        for title, key, found in workloads:
            print(f"| {title} | {PREDICTED.get(key, '')} | {found['median']:,} | {found['all']} |")
    if pacing:
        print(f"\n## Streams beside long prompts\n\nFour prompts of 8,000 tokens under way all the time; alone they are computed "
              f"at {pacing['prefill_alone_tokens_s']:,} tokens/s.\n")  # fmt: skip
        print("| streams | gap undisturbed, p50 / p99, ms | beside the prompts | p99 ratio | prompt tokens/s |\n|---|---|---|---|---|")
        for n, found in pacing["streams"].items():
            calm, busy = found["undisturbed"], found["disturbed"]
            print(f"| {n} | {calm['p50']} / {calm['p99']} | {busy['p50']} / {busy['p99']} | {found['p99_ratio']} "
                  f"| {found['prefill_tokens_s']:,} |")  # fmt: skip
        short = pacing["short_behind_64_long_s"]
        print(f"\nA prompt of 100 tokens that comes after 64 of 8,000 has its first token after {short['short']} s; "
              f"the long ones take {short['all']} s.")  # fmt: skip
    if soak:
        first, last = soak["memory"][len(soak["memory"]) // 4], soak["memory"][-1]
        print(f"\n## Soak\n\n160 clients for {soak['seconds']:.0f} s: {soak['whole']:,} answers, {soak['left']:,} left early, "
              f"{soak['failed']} failed. Host memory {first['host_mb']} to {last['host_mb']} MB, the GPU's {first['gpu_mb']} to "
              f"{last['gpu_mb']} MB (from a quarter of the time to its end); the server ended with {soak['exit']}.")  # fmt: skip
    if defaults := read(folder, "defaults"):
        print(f"\nOf {defaults['requests']} requests at once on default flags {defaults['refused']} were refused.")
    for found, way in [(peers, "in static batches of 32"), (continuous, "in its continuous batching")]:
        if found:
            print(f"\nTransformers {found['transformers']} {way}, torch {found['torch']}, the mix's first 200: "
                  f"{found['tokens_s']} useful output tokens/s.")  # fmt: skip

    if kernels:
        peak = kernels["peer"]["product_tflop_s"]
        print(f"\n## The kernels alone\n\nCeilings in the same run: copy {copy:,} GB/s, 8192^3 product {peak} TFLOP/s. "
              "PyTorch's attention reads contiguous K and V.\n")  # fmt: skip
        print("| attention | us | achieved | % of ceiling | flash | cuDNN |\n|---|---|---|---|---|---|")
        for found in ours:
            if found["what"] not in ("decode", "prefill"):
                continue
            same = {k: found[k] for k in ("what", "batch", "context", "tokens") if k in found}
            unit, ceiling = ("gb_s", copy) if found["what"] == "decode" else ("tflop_s", peak)
            name = f"decode {found['batch']} x {found['context']}" if "batch" in found else f"prefill {found['tokens']}"
            if found.get("after"):
                name += f" after {found['after']}, keys in {found['parts']} parts"
                same = {"what": "no peer measured"}
            others = [find(kernels["peer"]["attention"], peer=peer, **same) for peer in ("flash", "cudnn")]
            others = [f"{other[unit]}" if other else "" for other in others]
            print(f"| {name} | {found['us']} | {found[unit]} | {100 * found[unit] / ceiling:.0f} | {' | '.join(others)} |")
        print("\n| GEMM (cuBLASLt; experts: our own) | rows | us | GB/s of weights | TFLOP/s | % of the nearer ceiling |\n|---|---|---|---|---|---|")
        for found in ours:
            if found["what"].startswith("gemm") or found["what"] == "experts":
                share = max(found["gb_s"] / copy, found["tflop_s"] / peak)
                print(f"| {found['what'].removeprefix('gemm ')} | {found['rows']} | {found['us']} | {found['gb_s']} | {found['tflop_s']} "
                      f"| {100 * share:.0f} |")  # fmt: skip
        print("\n| small kernel | rows | us | GB/s |\n|---|---|---|---|")
        for found in ours:
            if found["what"] in ("add_rms_norm", "gated_activation") or found["what"].startswith("sample"):
                print(f"| {found['what']} | {found['rows']} | {found['us']} | {found['gb_s']} |")

    if tests:
        print("\n## Correctness on this GPU\n\n| what | result |\n|---|---|")
        for name, found in tests.items():
            if isinstance(found, dict):
                print(f"| {name} | {found['passed']} passed, {found['failed']} failed |")
        for name, found in (sanitizer or {}).items():
            if isinstance(found, dict):
                print(f"| compute-sanitizer {name} | {'; '.join(line.strip('= ') for line in found['summary'])} |")


main()
