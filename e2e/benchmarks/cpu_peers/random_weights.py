"""Writes a Llama model of random bf16 weights twice: as a Hugging Face directory for kvasir-server and as a GGUF file for
llama.cpp. Both hold the same numbers, so that both engines do the same work. Needs Python alone.

Usage: python random_weights.py DIRECTORY [--layers N]
"""

import argparse
import dataclasses
import math
import pathlib
import random
import struct

import random_llama

# The shape of TinyLlama-1.1B.
SHAPE = random_llama.Shape(hidden=2048, intermediate=5632, layers=22, heads=32, kv_heads=4, head_dim=64,
                           vocabulary=32000, context=2048, theta=10000.0)  # fmt: skip

# GGUF's names for the parts of Hugging Face's.
GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(name):
    for ours, theirs in GGUF_NAMES.items():
        name = name.replace(ours, theirs)
    return name


GGUF_ALIGNMENT = 32


def gguf_padding(n_bytes):
    return b"\0" * (-n_bytes % GGUF_ALIGNMENT)


def gguf_head(shape):
    """GGUF version 3 (ggml's docs/gguf.md): metadata and tensor infos; norms are in f32, as llama.cpp wants them."""

    def string(text):
        return struct.pack("<Q", len(text)) + text.encode()

    def value(item):
        if isinstance(item, str):
            return struct.pack("<I", 8) + string(item)
        return struct.pack("<If", 6, item) if isinstance(item, float) else struct.pack("<II", 4, item)

    metadata = {
        "general.architecture": "llama",
        "general.file_type": 32,  # mostly bf16
        "llama.context_length": shape.context,
        "llama.embedding_length": shape.hidden,
        "llama.block_count": shape.layers,
        "llama.feed_forward_length": shape.intermediate,
        "llama.attention.head_count": shape.heads,
        "llama.attention.head_count_kv": shape.kv_heads,
        "llama.attention.layer_norm_rms_epsilon": shape.epsilon,
        "llama.rope.freq_base": shape.theta,
        "llama.rope.dimension_count": shape.head_dim,
        "llama.vocab_size": shape.vocabulary,
        "tokenizer.ggml.model": "no_vocab",
    }
    f32, bf16 = 0, 30
    infos, offset = b"", 0
    for name, dimensions in random_llama.tensors(shape):
        # The innermost dimension first.
        infos += string(gguf_name(name)) + struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *reversed(dimensions))
        is_norm = len(dimensions) == 1
        infos += struct.pack("<IQ", f32 if is_norm else bf16, offset)
        size = math.prod(dimensions) * (4 if is_norm else 2)
        offset += size + len(gguf_padding(size))
    count = sum(1 for _ in random_llama.tensors(shape))
    header = b"GGUF" + struct.pack("<IQQ", 3, count, len(metadata))
    header += b"".join(string(key) + value(item) for key, item in metadata.items()) + infos
    return header + gguf_padding(len(header))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--layers", type=int, default=SHAPE.layers)
    args = parser.parse_args()
    shape = dataclasses.replace(SHAPE, layers=args.layers)
    random_llama.write_json(args.directory, shape)

    generator = random.Random(0)
    with (
        (args.directory / "model.safetensors").open("wb") as ours,
        (args.directory / "model.gguf").open("wb") as theirs,
    ):
        ours.write(random_llama.safetensors_head(shape))
        theirs.write(gguf_head(shape))
        for _, dimensions in random_llama.tensors(shape):
            if len(dimensions) == 1:
                ours.write(random_llama.ones_bf16(shape.hidden))
                numbers = struct.pack("<f", 1.0) * shape.hidden
            else:
                numbers = random_llama.random_bf16(generator, dimensions)
                ours.write(numbers)
            theirs.write(numbers)
            theirs.write(gguf_padding(len(numbers)))


if __name__ == "__main__":
    main()
