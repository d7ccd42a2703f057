"""Writes a model directory of Llama-3.1-8B's shape with random bf16 weights, made on the GPU (16 GB, about 20 s)."""

import pathlib
import sys

import random_llama
import torch

SHAPE = random_llama.Shape(hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8, head_dim=128,
                           vocabulary=128256, context=131072, theta=500000.0)  # fmt: skip


def write(directory):
    directory = pathlib.Path(directory)
    random_llama.write_json(directory, SHAPE)
    generator = torch.Generator("cuda").manual_seed(0)
    with (directory / "model.safetensors").open("wb", buffering=0) as file:
        file.write(random_llama.safetensors_head(SHAPE))
        for _, shape in random_llama.tensors(SHAPE):
            if len(shape) == 1:
                tensor = torch.ones(shape, dtype=torch.bfloat16)
            else:
                tensor = torch.randn(shape, device="cuda", generator=generator, dtype=torch.bfloat16) * 0.02
            data = memoryview(tensor.cpu().view(torch.uint8).numpy()).cast("B")
            while data:
                data = data[file.write(data):]


if __name__ == "__main__":
    write(sys.argv[1])
