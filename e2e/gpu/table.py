"""Prints the table of a run: python3 table.py RESULTS > RESULTS.md. Percentages are of ceilings measured in that run."""

import json
import pathlib
import sys

# What was expected of an H200 before the run, and where the figure came from.
PREDICTED = {
    "decode 64 x 4k": "88", "decode 1 x 4k": "37", "prefill 8k": "300", "itl": "4.7", "mix": "14,000", "mix 200": "8,300",
    "static": "20", "ttft": "48", "ready": "3", "2048_128": "1,950", "128_2048": "13,000", "2048_2048": "5,700",
}  # fmt: skip
PREDICTION_NOTE = ("Predictions were written before each run, from runs on an H100 and an H200 before (decode by bandwidth, "
                   "products and prefill by equal tensor cores).")  # fmt: skip


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

    print("## Against the goals of this round\n\n| what | goal | predicted | measured |\n|---|---|---|---|")

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

    if serving:
        print("\n## The server over HTTP (random weights of Llama-3.1-8B's shape, bf16, greedy, ignore_eos, medians of 3)\n")
        print("| context | inter-token latency, ms |\n|---|---|")
        for context, ms in serving["itl_ms"].items():
            print(f"| 1 x {context} | {ms} |")
        print("\n| prompt | time to first token, ms |\n|---|---|")
        for n, ms in serving["ttft_ms"].items():
            print(f"| {n} | {ms} |")
        print("\n| sequences, 128 tokens of prompt | decode, tokens/s |\n|---|---|")
        for batch, rate in serving["decode_tokens_s"].items():
            print(f"| {batch} | {rate:,} |")
        print("\n| workload (input, output) | predicted | output tokens/s | runs |\n|---|---|---|---|")
        workloads = [("ShareGPT-like mix, 1,000", "mix", serving["mix"]), ("its first 200", "mix 200", serving["mix_200"]),
                     ("(128, 128), 1,000", "", serving["128_128"])]  # fmt: skip
        for name in ("2048_128", "128_2048", "2048_2048"):
            if found := read(folder, name):
                workloads.append((f"({name.replace('_', ', ')}), {found['requests']:,}", name, found))
        for title, key, found in workloads:
            print(f"| {title} | {PREDICTED.get(key, '')} | {found['median']:,} | {found['all']} |")
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
