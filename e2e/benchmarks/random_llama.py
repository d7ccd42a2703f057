"""A Llama model of random bf16 weights as Hugging Face writes one: its tensors, config.json, tokenizer.json and
model.safetensors; who wants other numbers writes those behind its head in the order of `tensors`. Needs Python alone.
"""

import dataclasses
import json
import math
import random
import struct


@dataclasses.dataclass(frozen=True)
class Shape:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    theta: float
    epsilon: float = 1e-5


def tensors(shape):
    """Yields (name, dimensions); norms have one dimension, and are ones."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "model.embed_tokens.weight", (shape.vocabulary, shape.hidden)
    for i in range(shape.layers):
        layer = f"model.layers.{i}."
        yield layer + "input_layernorm.weight", (shape.hidden,)
        yield layer + "self_attn.q_proj.weight", (queries, shape.hidden)
        yield layer + "self_attn.k_proj.weight", (keys, shape.hidden)
        yield layer + "self_attn.v_proj.weight", (keys, shape.hidden)
        yield layer + "self_attn.o_proj.weight", (shape.hidden, queries)
        yield layer + "post_attention_layernorm.weight", (shape.hidden,)
        yield layer + "mlp.gate_proj.weight", (shape.intermediate, shape.hidden)
        yield layer + "mlp.up_proj.weight", (shape.intermediate, shape.hidden)
        yield layer + "mlp.down_proj.weight", (shape.hidden, shape.intermediate)
    yield "model.norm.weight", (shape.hidden,)
    yield "lm_head.weight", (shape.vocabulary, shape.hidden)


def write_json(directory, shape):
    """Writes config.json and tokenizer.json."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate, "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim, "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.context, "rms_norm_eps": shape.epsilon, "rope_theta": shape.theta,
        "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer(shape.vocabulary)))


def tokenizer(size):
    """A byte-level vocabulary with fillers up to `size`: every id is a token, and what the text says is nothing."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {b: chr(b) for b in printable}
    alphabet |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in alphabet)}
    vocabulary = {alphabet[b]: b for b in range(256)} | {f"filler{i}": i for i in range(256, size)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": level, "post_processor": None,
            "decoder": level, "model": {"type": "BPE", "vocab": vocabulary, "merges": []}}  # fmt: skip


def safetensors_head(shape):
    """Eight bytes of length, then JSON, padded to eight bytes; the data follows in the order of `tensors`."""
    head, offset = {}, 0
    for name, dimensions in tensors(shape):
        size = 2 * math.prod(dimensions)
        head[name] = {"dtype": "BF16", "shape": dimensions, "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(head).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded


# The upper byte of a bf16 number: its sign, and an exponent of -7 or -6 (the lower byte has the exponent's last bit).
UPPER_BYTES = bytes([0x3C] * 128 + [0xBC] * 128)


def random_bf16(generator, dimensions):
    """Little-endian bf16 numbers between 2^-7 and 2^-5 with a random sign, about 0.02 in the mean square."""
    numbers = bytearray(generator.randbytes(2 * math.prod(dimensions)))
    numbers[1::2] = numbers[1::2].translate(UPPER_BYTES)
    return numbers


def ones_bf16(n):
    return struct.pack("<H", 0x3F80) * n


def write(directory, shape):
    """Writes the whole model, unless the directory has one of this shape already."""
    weights, complete = directory / "model.safetensors", directory / "complete"
    if complete.exists() and complete.read_text() == repr(shape):
        return
    write_json(directory, shape)
    generator = random.Random(0)
    with weights.open("wb") as file:
        file.write(safetensors_head(shape))
        for _, dimensions in tensors(shape):
            is_norm = len(dimensions) == 1
            file.write(ones_bf16(dimensions[0]) if is_norm else random_bf16(generator, dimensions))
    complete.write_text(repr(shape))
