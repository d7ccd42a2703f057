"""Writes a Llama model of random bf16 weights twice: as a Hugging Face directory for kvasir-server and as a GGUF file for
llama.cpp. Both hold the same numbers, so that both engines do the same work. Needs Python alone.

Usage: python random_llama.py DIRECTORY [--layers N]
"""

import argparse
import json
import math
import pathlib
import random
import struct

# The shape of TinyLlama-1.1B.
HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, VOCABULARY, CONTEXT = 2048, 5632, 22, 32, 4, 32000, 2048
HEAD_DIM = HIDDEN // HEADS
EPSILON, THETA = 1e-5, 10000.0


def tensors(layers):
    """Yields (Hugging Face name, GGUF name, shape or None for a norm of ones)."""
    yield "model.embed_tokens.weight", "token_embd.weight", (VOCABULARY, HIDDEN)
    for i in range(layers):
        ours, theirs = f"model.layers.{i}.", f"blk.{i}."
        yield ours + "input_layernorm.weight", theirs + "attn_norm.weight", None
        yield ours + "self_attn.q_proj.weight", theirs + "attn_q.weight", (HEADS * HEAD_DIM, HIDDEN)
        yield ours + "self_attn.k_proj.weight", theirs + "attn_k.weight", (KV_HEADS * HEAD_DIM, HIDDEN)
        yield ours + "self_attn.v_proj.weight", theirs + "attn_v.weight", (KV_HEADS * HEAD_DIM, HIDDEN)
        yield ours + "self_attn.o_proj.weight", theirs + "attn_output.weight", (HIDDEN, HEADS * HEAD_DIM)
        yield ours + "post_attention_layernorm.weight", theirs + "ffn_norm.weight", None
        yield ours + "mlp.gate_proj.weight", theirs + "ffn_gate.weight", (INTERMEDIATE, HIDDEN)
        yield ours + "mlp.up_proj.weight", theirs + "ffn_up.weight", (INTERMEDIATE, HIDDEN)
        yield ours + "mlp.down_proj.weight", theirs + "ffn_down.weight", (HIDDEN, INTERMEDIATE)
    yield "model.norm.weight", "output_norm.weight", None
    yield "lm_head.weight", "output.weight", (VOCABULARY, HIDDEN)


# The upper byte of a bf16 number: its sign, and an exponent of -7 or -6 (the lower byte has the exponent's last bit).
UPPER_BYTES = bytes([0x3C] * 128 + [0xBC] * 128)


def random_bf16(generator, shape):
    """Little-endian bf16 numbers between 2^-7 and 2^-5 with a random sign, about 0.02 in the mean square."""
    numbers = bytearray(generator.randbytes(2 * math.prod(shape)))
    numbers[1::2] = numbers[1::2].translate(UPPER_BYTES)
    return numbers


def tokenizer():
    """A byte-level vocabulary padded to VOCABULARY entries; the text that it makes does not matter."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {b: chr(b) for b in printable}
    alphabet |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in alphabet)}
    vocabulary = {alphabet[b]: b for b in range(256)}
    vocabulary |= {f"filler{i}": i for i in range(256, VOCABULARY)}
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }


def config(layers):
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": EPSILON,
        "rope_theta": THETA,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def safetensors_header(layers):
    """Eight bytes of length, then JSON; the data follows in the order of `tensors`."""
    header, offset = {}, 0
    for name, _, shape in tensors(layers):
        shape = shape or (HIDDEN,)
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded


GGUF_ALIGNMENT = 32


def gguf_padding(n_bytes):
    return b"\0" * (-n_bytes % GGUF_ALIGNMENT)


def gguf_header(layers):
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
        "llama.context_length": CONTEXT,
        "llama.embedding_length": HIDDEN,
        "llama.block_count": layers,
        "llama.feed_forward_length": INTERMEDIATE,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": EPSILON,
        "llama.rope.freq_base": THETA,
        "llama.rope.dimension_count": HEAD_DIM,
        "llama.vocab_size": VOCABULARY,
        "tokenizer.ggml.model": "no_vocab",
    }
    f32, bf16 = 0, 30
    infos, offset = b"", 0
    for _, name, shape in tensors(layers):
        # The innermost dimension first.
        dimensions = tuple(reversed(shape)) if shape else (HIDDEN,)
        infos += string(name) + struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
        infos += struct.pack("<IQ", bf16 if shape else f32, offset)
        size = math.prod(dimensions) * (2 if shape else 4)
        offset += size + len(gguf_padding(size))
    count = sum(1 for _ in tensors(layers))
    header = b"GGUF" + struct.pack("<IQQ", 3, count, len(metadata))
    header += b"".join(string(key) + value(item) for key, item in metadata.items()) + infos
    return header + gguf_padding(len(header))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--layers", type=int, default=LAYERS)
    args = parser.parse_args()
    args.directory.mkdir(parents=True, exist_ok=True)
    (args.directory / "config.json").write_text(json.dumps(config(args.layers), indent=2))
    (args.directory / "tokenizer.json").write_text(json.dumps(tokenizer()))

    generator = random.Random(0)
    with (
        (args.directory / "model.safetensors").open("wb") as ours,
        (args.directory / "model.gguf").open("wb") as theirs,
    ):
        ours.write(safetensors_header(args.layers))
        theirs.write(gguf_header(args.layers))
        for _, _, shape in tensors(args.layers):
            if shape is None:
                ours.write(struct.pack("<H", 0x3F80) * HIDDEN)
                numbers = struct.pack("<f", 1.0) * HIDDEN
            else:
                numbers = random_bf16(generator, shape)
                ours.write(numbers)
            theirs.write(numbers)
            theirs.write(gguf_padding(len(numbers)))


if __name__ == "__main__":
    main()
