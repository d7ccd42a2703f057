"""Writes a Llama model of random bf16 weights twice: as a Hugging Face directory for kvasir-server and as a GGUF file for
llama.cpp. Both hold the same numbers, so that both engines do the same work.

Usage: python random_llama.py DIRECTORY [--layers N]     (needs numpy, safetensors and gguf)
"""

import argparse
import json
import pathlib

import gguf
import numpy

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


def random_bf16(generator, shape):
    """Normal numbers of standard deviation 0.02, cut to bf16: an array of u16."""
    numbers = generator.standard_normal(shape, dtype=numpy.float32) * numpy.float32(0.02)
    return (numbers.view(numpy.uint32) >> 16).astype(numpy.uint16)


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


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--layers", type=int, default=LAYERS)
    args = parser.parse_args()
    args.directory.mkdir(parents=True, exist_ok=True)

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": args.layers,
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
    (args.directory / "config.json").write_text(json.dumps(config, indent=2))
    (args.directory / "tokenizer.json").write_text(json.dumps(tokenizer()))

    writer = gguf.GGUFWriter(args.directory / "model.gguf", "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(args.layers)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_rope_freq_base(THETA)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_vocab_size(VOCABULARY)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("no_vocab")

    # safetensors: 8 bytes of header length, the header, the data.
    header, offset, generator = {}, 0, numpy.random.default_rng(0)
    for name, _, shape in tensors(args.layers):
        shape = shape or (HIDDEN,)
        size = 2 * int(numpy.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    with (args.directory / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for _, gguf_name, shape in tensors(args.layers):
            if shape is None:
                file.write(numpy.full(HIDDEN, 0x3F80, numpy.uint16).tobytes())
                writer.add_tensor(gguf_name, numpy.ones(HIDDEN, numpy.float32))
            else:
                numbers = random_bf16(generator, shape)
                file.write(numbers.tobytes())
                writer.add_tensor(
                    gguf_name, numbers.view(numpy.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16
                )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
