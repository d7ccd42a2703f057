#!/usr/bin/env python3
"""Makes the golden files of Transformers that the server is tested against.

Run once by hand, not in CI; everything is seeded, so a second run with the same versions writes the same files:

    pip install torch==2.9.1 transformers==5.23.0 tokenizers==0.23.3
    python server/tests/golden/make.py [case ...]

Each folder <case>/ is a model directory as Hugging Face writes it (config.json, one or many *.safetensors; random
weights) plus golden.json:

    transformers, torch   versions that made the file
    stored_dtype          dtype of the tensors in the safetensors
    float32_error         largest |float32 - float64| over all logits of all prompts: the noise in the figures below
    bfloat16_error        largest |bfloat16 - float32| over the same logits: what bfloat16 costs Transformers itself
    margin_bound          2 * bfloat16_error: two runs that are each within bfloat16_error of the float32 logits
                          choose the same token wherever the margin of the first two logits is larger than this
    routing_error, routing_margin   of models with experts: largest |bfloat16 - float32| of any router's logits, and
                        the smallest float32 gap between the last expert chosen and the first one not chosen
    prompts[]             one object a prompt:
      ids                 the prompt's token ids (no special token is added)
      float32             the model run in float32 with eager attention:
        rows[]            {position, logsumexp, top}: at some positions of the prompt the log of the sum of exp over
                          the whole row, and the 8 largest logits as [id, logit], largest first
        last_row          every logit at the prompt's last position, by id
        greedy            24 tokens, each the largest logit (no end-of-sequence stops it)
        margins           at each of these 24 steps the first logit minus the second
      bfloat16            the weights rounded to bfloat16 and the model run in it:
        last_row_error    largest |bfloat16 - float32| in the last row of the prompt
        greedy, margins   as above, each run following its own tokens; a margin is of bfloat16 logits
        forced            24 tokens: the largest logit when fed float32's greedy tokens instead of its own

chat_templates.json is made by make_chat_templates.py and tokenizers/ by make_tokenizers.py beside this file.
"""

import json
import math
import pathlib
import shutil
import sys

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

HERE = pathlib.Path(__file__).resolve().parent
STEPS = 24
LENGTHS = (1, 2, 17, 33, 130)

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# Gemma 3 has a RoPE of its own for local and for global layers.
GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
}
GEMMA3_LINEAR_ROPE = {**GEMMA3_ROPE, "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0}}

PHI3_LONG_ROPE = {
    "short_factor": [1.0, 1.0, 1.05, 1.1, 1.2, 1.3, 1.5, 1.75],
    "long_factor": [1.0, 1.1, 1.9, 2.5, 3.75, 5.5, 7.0, 8.0],
}

# Each case: the model's type (Llama where none is said), its shape, the dtype that is stored, and how the directory is
# written. `old_config` writes the field names of Transformers 4 (rope_theta, rope_scaling, torch_dtype), which most
# published models carry; `drop` and `add` say what else the published config.json of that family lacks or has. `std`,
# `embed_std` and `norm_std` scale the weights, `routed` how far apart a token's experts are from the others, and
# `distinct` is the least median of different tokens in an answer.
CASES = {
    "gqa-5-1": dict(
        config=dict(hidden_size=52, num_attention_heads=5, num_key_value_heads=1, head_dim=14, intermediate_size=77,
                    vocab_size=301, num_hidden_layers=3, rms_norm_eps=1e-5),
        dtype="float32"),
    "gqa-6-2-tied": dict(
        config=dict(hidden_size=60, num_attention_heads=6, num_key_value_heads=2, intermediate_size=101,
                    vocab_size=259, num_hidden_layers=2, rms_norm_eps=1e-6, tie_word_embeddings=True),
        dtype="float16", old_config=True, drop=["head_dim"]),
    "mha-8-8": dict(
        config=dict(hidden_size=71, num_attention_heads=8, num_key_value_heads=8, head_dim=22, intermediate_size=131,
                    vocab_size=517, num_hidden_layers=2, rms_norm_eps=1e-5, rope_theta=1e6),
        dtype="bfloat16", old_config=True, drop=["num_key_value_heads"]),
    "biases": dict(
        config=dict(hidden_size=44, num_attention_heads=4, num_key_value_heads=2, head_dim=18, intermediate_size=59,
                    vocab_size=211, num_hidden_layers=2, rms_norm_eps=1e-6, attention_bias=True, mlp_bias=True,
                    tie_word_embeddings=True),
        dtype="float32", std=0.19),
    "llama3-rope": dict(
        config=dict(hidden_size=39, num_attention_heads=3, num_key_value_heads=1, head_dim=26, intermediate_size=83,
                    vocab_size=307, num_hidden_layers=2, rms_norm_eps=1e-5, rope_theta=500000.0, rope=LLAMA3_ROPE,
                    max_position_embeddings=512),
        dtype="bfloat16", lengths=(1, 17, 33, 130, 300)),
    "llama3-rope-sharded": dict(
        config=dict(hidden_size=46, num_attention_heads=6, num_key_value_heads=3, head_dim=8, intermediate_size=91,
                    vocab_size=283, num_hidden_layers=3, rms_norm_eps=1e-5, rope_theta=500000.0, rope=LLAMA3_ROPE,
                    max_position_embeddings=512),
        dtype="float16", old_config=True, shard_bytes=60_000, std=0.13),
    "smallest": dict(
        config=dict(hidden_size=7, num_attention_heads=3, num_key_value_heads=3, head_dim=2, intermediate_size=5,
                    vocab_size=13, num_hidden_layers=1, rms_norm_eps=1e-6),
        dtype="float32", std=0.3),
    # Head sizes that the CUDA device has.
    "head-64": dict(
        config=dict(hidden_size=50, num_attention_heads=3, num_key_value_heads=1, head_dim=64, intermediate_size=77,
                    vocab_size=263, num_hidden_layers=2, rms_norm_eps=1e-5, rope_theta=500000.0, rope=LLAMA3_ROPE,
                    max_position_embeddings=512),
        dtype="bfloat16"),
    "head-80-biases": dict(
        config=dict(hidden_size=44, num_attention_heads=2, num_key_value_heads=2, head_dim=80, intermediate_size=59,
                    vocab_size=211, num_hidden_layers=2, rms_norm_eps=1e-6, attention_bias=True, mlp_bias=True,
                    tie_word_embeddings=True),
        dtype="float16", std=0.19),
    "head-128": dict(
        config=dict(hidden_size=72, num_attention_heads=4, num_key_value_heads=1, head_dim=128, intermediate_size=90,
                    vocab_size=300, num_hidden_layers=2, rms_norm_eps=1e-5),
        dtype="bfloat16", lengths=(1, 17, 33, 130, 300)),
    # Qwen2 has biases on q, k and v, and can have a window from one layer on.
    "qwen2-gqa-5-1-window": dict(
        type="qwen2",
        config=dict(hidden_size=50, num_attention_heads=5, num_key_value_heads=1, intermediate_size=41, vocab_size=203,
                    num_hidden_layers=3, rms_norm_eps=1e-6, rope_theta=1e6, use_sliding_window=True, sliding_window=21,
                    max_window_layers=1),
        dtype="float32", old_config=True, drop=["layer_types"]),
    "qwen2-head-64-tied": dict(
        type="qwen2",
        config=dict(hidden_size=46, num_attention_heads=3, num_key_value_heads=1, head_dim=64, intermediate_size=77,
                    vocab_size=263, num_hidden_layers=2, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=True),
        dtype="bfloat16", std=0.2),
    # Qwen3 has norms of query and key heads and a head_dim of its own.
    "qwen3-gqa-6-2-tied": dict(
        type="qwen3",
        config=dict(hidden_size=47, num_attention_heads=6, num_key_value_heads=2, head_dim=14, intermediate_size=65,
                    vocab_size=223, num_hidden_layers=3, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=True),
        dtype="float16", old_config=True, drop=["layer_types"], std=0.18),
    "qwen3-head-64": dict(
        type="qwen3",
        config=dict(hidden_size=42, num_attention_heads=3, num_key_value_heads=1, head_dim=64, intermediate_size=61,
                    vocab_size=253, num_hidden_layers=2, rms_norm_eps=1e-6, rope_theta=1e6),
        dtype="bfloat16", std=0.18),
    "qwen3-head-128": dict(
        type="qwen3",
        config=dict(hidden_size=40, num_attention_heads=2, num_key_value_heads=1, head_dim=128, intermediate_size=72,
                    vocab_size=200, num_hidden_layers=2, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=True),
        dtype="bfloat16", old_config=True, drop=["layer_types"], lengths=(1, 17, 33, 130, 300), std=0.22),
    # Gemma 3: local and global layers, norms around attention and MLP, scaled embeddings.
    "gemma3-mha-3-window": dict(
        type="gemma3_text",
        config=dict(hidden_size=39, num_attention_heads=3, num_key_value_heads=3, head_dim=10, intermediate_size=31,
                    vocab_size=227, num_hidden_layers=5, rms_norm_eps=1e-6, query_pre_attn_scalar=23, sliding_window=9,
                    layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention",
                                 "sliding_attention"], rope_parameters=GEMMA3_ROPE),
        dtype="float32", std=0.2, embed_std=0.08, norm_std=0.3, distinct=7),
    "gemma3-head-64-linear-rope": dict(
        type="gemma3_text",
        config=dict(hidden_size=28, num_attention_heads=2, num_key_value_heads=1, head_dim=64, intermediate_size=50,
                    vocab_size=257, num_hidden_layers=7, rms_norm_eps=1e-6, query_pre_attn_scalar=40,
                    sliding_window=16, sliding_window_pattern=3, rope_parameters=GEMMA3_LINEAR_ROPE),
        dtype="bfloat16", old_config=True, drop=["layer_types"], add={"sliding_window_pattern": 3},
        lengths=(1, 17, 33, 130, 300), std=0.2, embed_std=0.08, norm_std=0.3, distinct=7),
    "gemma3-head-256": dict(
        type="gemma3_text",
        config=dict(hidden_size=20, num_attention_heads=2, num_key_value_heads=1, head_dim=256, intermediate_size=34,
                    vocab_size=211, num_hidden_layers=3, rms_norm_eps=1e-6, query_pre_attn_scalar=256,
                    sliding_window=32, sliding_window_pattern=3, rope_parameters=GEMMA3_ROPE),
        dtype="bfloat16", lengths=(1, 17, 33, 130, 300), std=0.2, embed_std=0.08, norm_std=0.3, distinct=6),
    # Gemma 3 with a picture tower, as its larger models are published; only text is run.
    "gemma3-conditional": dict(
        type="gemma3",
        config=dict(hidden_size=22, num_attention_heads=2, num_key_value_heads=1, head_dim=12, intermediate_size=27,
                    vocab_size=137, num_hidden_layers=7, rms_norm_eps=1e-6, query_pre_attn_scalar=12, sliding_window=11,
                    rope_parameters=GEMMA3_LINEAR_ROPE),
        vision=dict(eos_token_id=[1, 106], image_token_index=136, boi_token_index=134, eoi_token_index=135,
                    mm_tokens_per_image=4, vision_config=dict(
                        hidden_size=8, intermediate_size=9, num_hidden_layers=1, num_attention_heads=1, image_size=28,
                        patch_size=14, vision_use_head=False)),
        dtype="bfloat16", old_config=True, drop_text=["layer_types", "_sliding_window_pattern"], std=0.2,
        embed_std=0.08, norm_std=0.3, distinct=6),
    # Mixtral: a router and experts in place of the MLP.
    "mixtral-head-64": dict(
        type="mixtral",
        config=dict(hidden_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=64, intermediate_size=20,
                    vocab_size=263, num_hidden_layers=2, rms_norm_eps=1e-5, rope_theta=1e6, num_local_experts=8,
                    num_experts_per_tok=2),
        dtype="bfloat16", old_config=True, routed=5, std=0.12, distinct=6),
    "mixtral-6-experts": dict(
        type="mixtral",
        config=dict(hidden_size=30, num_attention_heads=3, num_key_value_heads=3, intermediate_size=19,
                    vocab_size=199, num_hidden_layers=3, rms_norm_eps=1e-5, rope_theta=1e6, num_local_experts=6,
                    num_experts_per_tok=3),
        dtype="float32", old_config=True, drop=["head_dim"], routed=5, std=0.1, distinct=5),
    # Qwen3-MoE: layers without experts among those with them; weights renormalised or not.
    "qwen3-moe-head-64": dict(
        type="qwen3_moe",
        config=dict(hidden_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=64, intermediate_size=37,
                    moe_intermediate_size=18, vocab_size=251, num_hidden_layers=3, rms_norm_eps=1e-6, rope_theta=1e6,
                    num_experts=8, num_experts_per_tok=3, norm_topk_prob=True, mlp_only_layers=[1]),
        dtype="bfloat16", old_config=True, drop=["num_local_experts"], add={"num_experts": 8}, routed=5, std=0.1,
        distinct=5),
    "qwen3-moe-sparse-step-2": dict(
        type="qwen3_moe",
        config=dict(hidden_size=31, num_attention_heads=3, num_key_value_heads=1, head_dim=12, intermediate_size=41,
                    moe_intermediate_size=17, vocab_size=193, num_hidden_layers=4, rms_norm_eps=1e-6, rope_theta=1e6,
                    num_experts=7, num_experts_per_tok=2, norm_topk_prob=False, decoder_sparse_step=2),
        dtype="float32", routed=5, std=0.1, distinct=5),
    # Mistral, with a window in every layer and without one.
    "mistral-head-64-window": dict(
        type="mistral",
        config=dict(hidden_size=48, num_attention_heads=3, num_key_value_heads=1, head_dim=64, intermediate_size=71,
                    vocab_size=269, num_hidden_layers=2, rms_norm_eps=1e-5, sliding_window=24),
        dtype="bfloat16", old_config=True, lengths=(1, 17, 33, 130, 300)),
    "mistral-gqa-4-2": dict(
        type="mistral",
        config=dict(hidden_size=43, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=61,
                    vocab_size=229, num_hidden_layers=2, rms_norm_eps=1e-5, rope_theta=1e6, sliding_window=None),
        dtype="float32"),
    # Phi-3: q, k and v in one matrix, gate and up in one, RoPE over a part of each head.
    "phi3-mha-6-6": dict(
        type="phi3",
        config=dict(hidden_size=60, num_attention_heads=6, num_key_value_heads=6, intermediate_size=53, vocab_size=239,
                    num_hidden_layers=2, rms_norm_eps=1e-5, sliding_window=29),
        dtype="float16", old_config=True),
    "phi3-head-64-partial-tied": dict(
        type="phi3",
        config=dict(hidden_size=128, num_attention_heads=2, num_key_value_heads=1, intermediate_size=26,
                    vocab_size=131, num_hidden_layers=2, rms_norm_eps=1e-5, tie_word_embeddings=True,
                    partial_rotary_factor=0.75),
        dtype="bfloat16", old_config=True, add={"partial_rotary_factor": 0.75}, std=0.11),
    # LongRoPE has two sets of factors, by the sequence's length; each case stays on its side of 64 to its last token.
    "phi3-longrope-short": dict(
        type="phi3",
        config=dict(hidden_size=36, num_attention_heads=3, num_key_value_heads=1, intermediate_size=47, vocab_size=211,
                    num_hidden_layers=3, rms_norm_eps=1e-5, partial_rotary_factor=0.5,
                    original_max_position_embeddings=64,
                    rope=dict(rope_type="longrope", short_factor=[1.0, 1.25, 2.5], long_factor=[1.5, 6.0, 8.0])),
        dtype="float32", lengths=(1, 2, 17, 33, 40)),
    "phi3-longrope-long-head-64": dict(
        type="phi3",
        config=dict(hidden_size=128, num_attention_heads=2, num_key_value_heads=2, intermediate_size=26,
                    vocab_size=127, num_hidden_layers=1, rms_norm_eps=1e-5, partial_rotary_factor=0.25,
                    original_max_position_embeddings=64,
                    rope=dict(rope_type="longrope", **PHI3_LONG_ROPE)),
        dtype="bfloat16", old_config=True, add={
            "partial_rotary_factor": 0.25, "rope_scaling": {"type": "longrope", **PHI3_LONG_ROPE}},
        lengths=(65, 66, 97, 130, 300)),
}


def build_config(case):
    """The configuration of a case; `rope` and `rope_theta` become what this version calls rope_parameters."""
    fields = dict(case["config"])
    rope = {"rope_type": "default", **fields.pop("rope", {}), "rope_theta": fields.pop("rope_theta", 10000.0)}
    text = {"max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
            "use_cache": True, "rope_parameters": rope, **fields}
    model_type = case.get("type", "llama")
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING[model_type]
    # Some configurations refuse a hidden size that the head count doesn't divide, though the model itself computes it
    # rightly from head_dim; published models have such shapes, so the check is taken out here.
    known.__class_validators__ = [v for v in known.__class_validators__ if v.__name__ != "validate_architecture"]
    if "vision" in case:
        return AutoConfig.for_model(model_type, text_config=text, **case["vision"])
    return AutoConfig.for_model(model_type, **text)


def random_model(config, seed, case):
    """A float32 model whose every parameter matters: norms are not all alike and biases are not all zero.

    A new norm's weights are all one, or all zero in families that multiply by one plus the weight.
    """
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.add_(case.get("norm_std", 0.2) * noise)
            else:
                std = case.get("std", 0.14)
                parameter.copy_((case.get("embed_std", std) if "embed_tokens" in name else std) * noise)
        if "routed" in case:
            separate_routing(model, case["routed"], generator)
    return model


def routers(model):
    return [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]


def separate_routing(model, strength, generator):
    """Gives each token experts of its own, by a part of its embedding that the routers' rows look for.

    With wholly random weights some token's next expert is always so close behind its last chosen one that bfloat16
    chooses another, and then no logit can be compared.
    """
    embeddings, found = model.get_input_embeddings().weight, routers(model)
    n_experts, chosen = found[0].num_experts, found[0].top_k
    directions = torch.linalg.qr(torch.randn(embeddings.shape[1], n_experts, generator=generator)).Q.T
    for router in found:
        router.weight.add_(directions[torch.randperm(n_experts, generator=generator)])
    weights = torch.linspace(1.5, 1, chosen)
    for row in embeddings:
        row.add_(strength * weights @ directions[torch.randperm(n_experts, generator=generator)[:chosen]])


def write(model, case, directory):
    """Writes the model as a Hugging Face directory in the case's dtype and layout."""
    shutil.rmtree(directory, ignore_errors=True)
    dtype = getattr(torch, case["dtype"])
    limit = {"max_shard_size": case["shard_bytes"]} if "shard_bytes" in case else {}
    model.to(dtype).save_pretrained(directory, **limit)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    if case.get("old_config"):
        text = config.get("text_config", config)
        rope = text.pop("rope_parameters")
        if "sliding_attention" in rope:
            text["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
            rope = rope["full_attention"]
        text["rope_theta"] = rope.pop("rope_theta")
        text["rope_scaling"] = rope if rope["rope_type"] != "default" else None
        config["torch_dtype"] = config.pop("dtype")
    for field in case.get("drop", []):
        del config[field]
    for field in case.get("drop_text", []):
        del config["text_config"][field]
    config.update(case.get("add", {}))
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load(directory, dtype):
    """The model with attention and experts in plain PyTorch, without fused kernels."""
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager", experts_implementation="eager").eval()


@torch.no_grad()
def logits(model, ids):
    return model(torch.tensor([ids])).logits[0]


def router_logits(model, ids):
    """The logits of every router at every position: layers x tokens x experts; no layers where there is no router."""
    seen = []
    hooks = [r.register_forward_hook(lambda _, __, out: seen.append(out[0].double())) for r in routers(model)]
    logits(model, ids)
    for hook in hooks:
        hook.remove()
    return torch.stack(seen) if seen else torch.zeros(0, len(ids), 1)


def greedy(model, ids):
    """STEPS greedy tokens with their margins; the whole context is computed anew each step, so no cache can err."""
    ids, margins = list(ids), []
    for _ in range(STEPS):
        top = logits(model, ids)[-1].float().topk(2)
        margins.append((top.values[0] - top.values[1]).item())
        ids.append(int(top.indices[0]))
    return ids[-STEPS:], margins


def examine(directory, prompts):
    """Runs the stored model in three precisions; the golden object."""
    f64, f32, bf16 = (load(directory, dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16))
    out = {"float32_error": 0.0, "bfloat16_error": 0.0, "margin_bound": 0.0, "prompts": []}
    if routers(f32):
        out |= {"routing_error": 0.0, "routing_margin": math.inf}
    for ids in prompts:
        tokens, margins = greedy(f32, ids)
        whole = ids + tokens[:-1]
        at32, at16 = logits(f32, whole), logits(bf16, whole).float()
        error16 = (at16 - at32).abs()
        out["float32_error"] = max(out["float32_error"], (at32.double() - logits(f64, whole)).abs().max().item())
        out["bfloat16_error"] = max(out["bfloat16_error"], error16.max().item())
        if routers(f32):
            routed = router_logits(f32, whole)
            first = routed.topk(routers(f32)[0].top_k + 1).values
            error = (routed - router_logits(bf16, whole)).abs().max().item()
            out["routing_error"] = max(out["routing_error"], error)
            out["routing_margin"] = min(out["routing_margin"], (first[..., -2] - first[..., -1]).min().item())
        row, last = logits(f32, ids), len(ids) - 1
        positions = sorted({0, last // 3, last // 2, max(last - 1, 0), last})
        tokens16, margins16 = greedy(bf16, ids)
        out["prompts"].append({
            "ids": ids,
            "float32": {
                "rows": [{"position": p, "logsumexp": row[p].logsumexp(0).item(),
                          "top": [[int(i), row[p][i].item()] for i in row[p].topk(8).indices]} for p in positions],
                "last_row": row[last].tolist(), "greedy": tokens, "margins": margins},
            "bfloat16": {
                "last_row_error": error16[last].max().item(), "greedy": tokens16, "margins": margins16,
                "forced": at16[last:].argmax(-1).tolist()},
        })
    out["margin_bound"] = 2 * out["bfloat16_error"]
    return out


def compact(value):
    """JSON with 9 significant digits, enough to give each float32 back, and one line for each innermost part."""
    if isinstance(value, float):
        return f"{value:.9g}"
    if isinstance(value, list):
        if value and isinstance(value[0], dict):
            return "[\n" + ",\n".join(compact(v) for v in value) + "]"
        return "[" + ",".join(compact(v) for v in value) + "]"
    if isinstance(value, dict):
        return "{" + ",\n".join(f"{json.dumps(k)}:{compact(v)}" for k, v in value.items()) + "}"
    return json.dumps(value)


def prompts_for(case, seed):
    generator = torch.Generator().manual_seed(1000 + seed)
    vocab = case["config"]["vocab_size"]
    return [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in case.get("lengths", LENGTHS)]


def make(name, case):
    """Tries seeds until the greedy tokens vary and no float32 choice is closer than its noise could decide."""
    directory = HERE / name
    for seed in range(100):
        write(random_model(build_config(case), seed, case), case, directory)
        golden = examine(directory, prompts_for(case, seed))
        runs = [p["float32"] for p in golden["prompts"]]
        closest = min(min(r["margins"]) for r in runs)
        distinct = sorted(len(set(r["greedy"])) for r in runs)[len(runs) // 2]
        decided = sum(m > golden["margin_bound"] for r in runs for m in r["margins"]) / (STEPS * len(runs))
        routing = golden.get("routing_margin", math.inf) > 2 * golden.get("routing_error", 0.0)
        varied = distinct >= min(case.get("distinct", 10), case["config"]["vocab_size"] // 3)
        if routing and closest > 1e-3 and varied and decided > 0.35:
            break
    else:
        raise SystemExit(f"{name}: no seed of 100 gave varied and well-separated tokens; change `std`")
    assert golden["float32_error"] < 2e-5, golden["float32_error"]
    assert all(math.isfinite(x) for r in runs for x in r["last_row"])
    golden = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0], "seed": seed,
              "stored_dtype": case["dtype"], **golden}
    (directory / "golden.json").write_text(compact(golden) + "\n")
    size = sum(f.stat().st_size for f in directory.iterdir())
    print(f"{name}: seed {seed}, {size} bytes, float32 error {golden['float32_error']:.1e}, bfloat16 error "
          f"{golden['bfloat16_error']:.3f}, closest margin {closest:.4f}, {decided:.0%} of margins above the bound, "
          f"{distinct} distinct tokens of {STEPS}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for chosen in sys.argv[1:] or CASES:
        make(chosen, CASES[chosen])
