"""The ceilings of this GPU and PyTorch's own attention on the shapes of the kernels' benchmark: contiguous K and V, bf16,
32 query and 8 KV heads of 128, in CUDA graphs whose calls rotate over different tensors."""

import statistics

import torch
import torch.nn.functional as functional
from torch.nn.attention import SDPBackend, sdpa_kernel

LAUNCHES = 12


def time(call):
    """Microseconds of call(i), the median of graph replays."""
    for i in range(LAUNCHES):
        call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(LAUNCHES):
            call(i)
    times = []
    for _ in range(9):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        graph.replay()
        begin.record()
        for _ in range(3):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / 3 / LAUNCHES)
    return statistics.median(times)


def copy_gb_s():
    """Bytes read and written by an element-wise kernel: what PyTorch's own copy_ leaves to the copy engine is slower."""
    source, target = (torch.empty(1 << 30, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    return 2 * (2 << 30) / time(lambda i: torch.neg(source, out=target)) / 1e3


def product_tflop_s():
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / time(lambda i: a @ b) / 1e6


def attention(backend, batch, queries, context, causal):
    sets = max(1, min(LAUNCHES, (4 << 30) // (batch * context * 4096)))
    q = torch.randn(batch, 32, queries, 128, device="cuda", dtype=torch.bfloat16)
    kv = [torch.randn(2, batch, 8, context, 128, device="cuda", dtype=torch.bfloat16) for _ in range(sets)]
    with sdpa_kernel(backend):
        return time(lambda i: functional.scaled_dot_product_attention(
            q, kv[i % sets][0], kv[i % sets][1], is_causal=causal, enable_gqa=True))  # fmt: skip


def measure():
    results = {"copy_gb_s": round(copy_gb_s()), "product_tflop_s": round(product_tflop_s()), "attention": []}
    backends = [("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)]
    for batch, context in [(1, 4096), (1, 32768), (8, 4096), (64, 4096), (64, 16384), (256, 2048)]:
        for name, backend in backends:
            try:
                us = attention(backend, batch, 1, context, False)
            except RuntimeError as error:
                print(name, batch, context, str(error)[:100], flush=True)
                continue
            results["attention"].append({"what": "decode", "peer": name, "batch": batch, "context": context,
                                         "us": round(us, 2), "gb_s": round(batch * context * 4096 / us / 1e3)})  # fmt: skip
    for tokens in (2048, 8192, 16384):
        for name, backend in backends:
            try:
                us = attention(backend, 1, tokens, tokens, True)
            except RuntimeError as error:
                print(name, tokens, str(error)[:100], flush=True)
                continue
            flop = 2 * 2 * 32 * 128 * tokens * (tokens + 1) / 2
            results["attention"].append({"what": "prefill", "peer": name, "tokens": tokens, "us": round(us, 2),
                                         "tflop_s": round(flop / us / 1e6)})  # fmt: skip
    return results


if __name__ == "__main__":
    print(measure())
