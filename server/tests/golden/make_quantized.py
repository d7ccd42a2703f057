#!/usr/bin/env python3
"""Makes tiny quantized Llama checkpoints, each as the tool that writes such files writes it, with what they mean.

Run once by hand, not in CI; everything is seeded:

    pip install torch==2.9.1 transformers==5.23.0 tokenizers==0.23.3
    pip install --no-deps llmcompressor==0.14.0.1 compressed-tensors==0.19.0 auto-round==0.15.1
    pip install datasets loguru accelerate nvidia-ml-py pillow
    python server/tests/golden/make_quantized.py [case ...]

Each folder quantized/<case>/ is a model directory (config.json with its quantization_config, model.safetensors) plus

    golden.json                       as make.py writes it, of the same model with its weights dequantized in float64
    expected/dequantized.safetensors  some rows of every quantized matrix, dequantized in float64: <matrix>.weight is
                                      [rows, in features] and <matrix>.rows says which rows of [out, in] they are

Activations are not quantized in golden.json, whatever quantization_config says of them (input_activations): the
weights alone are what these files pin down.

Who writes the files:

    fp8-*, int4-packed-*   llm-compressor's oneshot and save_pretrained, with its schemes of the same names
    fp8-block-scale-inv    transformers.integrations.finegrained_fp8.Fp8Quantize, extended to a last block that is not
                           full, which DeepSeek-V3's files have and its own kernel.py (weight_dequant) reads
    gptq-*                 this script, after AutoGPTQ 0.7.1: quantization/quantizer.py (find_params, quantize),
                           quantization/gptq.py (g_idx) and nn_modules/qlinear/qlinear_cuda.py (pack), which
                           stores each zero point minus one. The error feedback of GPTQ, which changes the numbers
                           but not the format, is left out.
    awq-*                  this script, after AutoAWQ 0.2.9: quantize/quantizer.py (pseudo_quantize_tensor) and
                           modules/linear/gemm.py (WQLinear_GEMM.from_linear); the search for scales is left out
"""

import json
import pathlib
import shutil
import sys
import tempfile
import types

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import make

HERE = pathlib.Path(__file__).resolve().parent / "quantized"
LENGTHS = (1, 2, 17, 40)
BLOCK = 128
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # column of eight that stands in each nibble, lowest first

# Each case: who writes it, the dtype of what is not quantized, and its shape where it differs from `shape`.
CASES = {
    "fp8-tensor": dict(write="llm_compressor", scheme="FP8", calibrate=True, dtype="bfloat16"),
    "fp8-channel": dict(write="llm_compressor", scheme="FP8_DYNAMIC", dtype="bfloat16"),
    "fp8-block": dict(write="llm_compressor", scheme="FP8_BLOCK", dtype="bfloat16"),
    "fp8-block-scale-inv": dict(write="finegrained_fp8", dtype="bfloat16"),
    "int4-packed-group-128": dict(write="llm_compressor", scheme="W4A16", dtype="bfloat16",
                                  shape=dict(intermediate_size=256)),
    "int4-packed-asymmetric-group-32": dict(write="llm_compressor", scheme="W4A16_ASYM", group=32, dtype="bfloat16",
                                            shape=dict(intermediate_size=160)),
    "gptq-group-128": dict(write="gptq", group=128, symmetric=True, desc_act=False, dtype="float16",
                           shape=dict(intermediate_size=256)),
    "gptq-asymmetric-desc-act-group-32": dict(write="gptq", group=32, symmetric=False, desc_act=True, dtype="float16",
                                              shape=dict(intermediate_size=160)),
    "awq-group-32": dict(write="awq", group=32, dtype="float16", shape=dict(intermediate_size=160)),
}


def base_model(case, seed):
    """A Llama whose weights differ in size from row to row and from column to column, so that every scale matters."""
    shape = dict(hidden_size=128, num_attention_heads=2, num_key_value_heads=1, head_dim=64, intermediate_size=192,
                 vocab_size=97, num_hidden_layers=1, rms_norm_eps=1e-5) | case.get("shape", {})
    model = make.random_model(make.build_config({"config": shape}), seed, {"std": 0.09})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, module in model.named_modules():
            if is_quantized(name, module):
                rows, columns = module.weight.shape
                module.weight.mul_((0.4 * torch.randn(rows, 1, generator=generator)).exp())
                module.weight.mul_((0.4 * torch.randn(1, columns, generator=generator)).exp())
                module.weight.add_(0.03 * torch.randn(rows, 1, generator=generator))
    return model.to(getattr(torch, case["dtype"]))


def is_quantized(name, module):
    return isinstance(module, torch.nn.Linear) and name != "lm_head"


def write_llm_compressor(case, model, directory):
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    scheme = {"scheme": case["scheme"]}
    if "group" in case:
        from compressed_tensors.quantization import preset_name_to_scheme
        group = preset_name_to_scheme(case["scheme"], ["Linear"])
        group.weights.group_size = case["group"]
        scheme = {"config_groups": {"group_0": group}}
    with tempfile.TemporaryDirectory() as source:
        model.save_pretrained(source)  # oneshot reads the configuration back from where the model was loaded
        model = LlamaForCausalLM.from_pretrained(source, dtype="auto")
        data = {}
        if case.get("calibrate"):
            ids = torch.randint(3, 97, (8, 32), generator=torch.Generator().manual_seed(0)).tolist()
            data = {"dataset": Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 32] * 8}),
                    "num_calibration_samples": 8, "max_seq_length": 32, "pipeline": "basic",
                    "processor": some_tokenizer()}
        oneshot(model=model, recipe=QuantizationModifier(targets="Linear", ignore=["lm_head"], **scheme), **data)
        model.save_pretrained(directory, save_compressed=True)
    (directory / "recipe.yaml").unlink(missing_ok=True)


def some_tokenizer():
    """A tokenizer that oneshot wants, though the calibration data are token ids already."""
    from tokenizers import Tokenizer, models
    words = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")


def write_finegrained_fp8(_, model, directory):
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    settings = types.SimpleNamespace(weight_block_size=[BLOCK, BLOCK], scale_fmt=None)
    quantize = Fp8Quantize(types.SimpleNamespace(quantization_config=settings))

    def tensors(name, weight):
        rows, columns = weight.shape
        full = torch.zeros(-(-rows // BLOCK) * BLOCK, -(-columns // BLOCK) * BLOCK)
        full[:rows, :columns] = weight
        found = quantize.convert({name + ".weight": full})
        found[name + ".weight"] = found[name + ".weight"][:rows, :columns].contiguous()
        return found

    replace_weights(model, directory, tensors, {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": ["lm_head"]})


def pack_rows(values):
    """Eight 4-bit values along the first dimension to an int32, the first in the lowest bits."""
    values = values.to(torch.int64).reshape(-1, 8, values.shape[1])
    words = sum(values[:, i] << (4 * i) for i in range(8))
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def pack_columns(values, order=range(8)):
    """Eight 4-bit values along the last dimension to an int32; `order` says which of them is in each nibble."""
    ordered = values.reshape(values.shape[0], -1, 8)[..., list(order)].reshape(values.shape)
    return pack_rows(ordered.T.contiguous()).T.contiguous()


def write_gptq(case, model, directory):
    generator = torch.Generator().manual_seed(7)
    size = case["group"]

    def tensors(name, weight):
        rows, columns = weight.shape
        # With desc_act the columns are taken in order of the Hessian's diagonal, here a random order.
        taken = torch.randperm(columns, generator=generator) if case["desc_act"] else torch.arange(columns)
        grouped = weight.float()[:, taken].reshape(rows, -1, size)
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        if case["symmetric"]:
            high = torch.maximum(low.abs(), high)
            low = torch.where(low < 0, -high, low)
        scales = (high - low) / 15
        zeros = torch.full_like(scales, 8) if case["symmetric"] else torch.round(-low / scales)
        # AutoGPTQ's pack makes garbage of a zero point of 0, since it stores the zero point minus one.
        assert ((zeros >= 1) & (zeros <= 15)).all()
        quantized = (torch.round(grouped / scales[..., None]) + zeros[..., None]).clamp(0, 15)
        of_column = torch.arange(columns) // size
        g_idx = of_column[torch.argsort(taken)].to(torch.int32)
        restored = (scales[..., None] * (quantized - zeros[..., None])).reshape(rows, columns)[:, torch.argsort(taken)]
        scales16 = scales.half().float()
        integers = torch.round((restored + (zeros * scales)[:, g_idx]) / scales16[:, g_idx])
        assert ((integers >= 0) & (integers <= 15)).all()
        return {name + ".qweight": pack_rows(integers.T.contiguous()), name + ".scales": scales.half().T.contiguous(),
                name + ".qzeros": pack_columns((zeros - 1).T.contiguous()), name + ".g_idx": g_idx}

    settings = {"bits": 4, "group_size": size, "damp_percent": 0.01, "desc_act": case["desc_act"],
                "static_groups": False, "sym": case["symmetric"], "true_sequential": True, "quant_method": "gptq"}
    # AutoGPTQ doesn't name the checkpoint's format, GPTQModel does.
    auto_gptq = {"model_name_or_path": None, "model_file_base_name": None, "is_marlin_format": False}
    gptq_model = {"checkpoint_format": "gptq", "lm_head": False, "pack_dtype": "int32",
                  "meta": {"quantizer": ["gptqmodel:7.7.0"]}}
    replace_weights(model, directory, tensors, settings | (gptq_model if case["desc_act"] else auto_gptq))


def write_awq(case, model, directory):
    size = case["group"]

    def tensors(name, weight):
        rows, columns = weight.shape
        grouped = weight.reshape(-1, size)  # in float16, as AutoAWQ computes
        high, low = grouped.amax(1, keepdim=True), grouped.amin(1, keepdim=True)
        scales = (high - low).clamp(min=1e-5) / 15
        zeros = (-torch.round(low / scales)).clamp(0, 15)
        restored = ((torch.round(grouped / scales) + zeros).clamp(0, 15) - zeros) * scales
        scales, zeros = scales.view(rows, -1).T.contiguous(), zeros.view(rows, -1).T.contiguous()
        restored, of_column = restored.view(rows, columns), torch.arange(columns) // size
        integers = torch.round((restored + (zeros * scales)[of_column].T) / scales[of_column].T).T.contiguous()
        assert ((integers >= 0) & (integers <= 15)).all()
        return {name + ".qweight": pack_columns(integers, AWQ_ORDER), name + ".scales": scales,
                name + ".qzeros": pack_columns(zeros, AWQ_ORDER)}

    replace_weights(model, directory, tensors, {
        "quant_method": "awq", "zero_point": True, "group_size": size, "bits": 4, "version": "gemm",
        "modules_to_not_convert": None})


def replace_weights(model, directory, tensors, quantization_config):
    """Saves the model with `tensors(name, weight)` in place of each quantized module's weight."""
    directory.mkdir(parents=True)
    stored = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        if is_quantized(name, module):
            stored |= tensors(name, stored.pop(name + ".weight"))
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(directory)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config |= {"architectures": ["LlamaForCausalLM"], "dtype": str(model.dtype).removeprefix("torch."),
               "quantization_config": quantization_config}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def nibbles(packed, dimension, order=range(8)):
    """The 4-bit values of int32 words along a dimension, as float64."""
    words = packed.to(torch.int64).movedim(dimension, -1) & 0xFFFFFFFF
    values = torch.stack([(words >> (4 * list(order).index(i))) & 15 for i in range(8)], -1)
    return values.flatten(-2).movedim(-1, dimension).double()


def dequantize(name, stored, settings):
    """One matrix [out, in] in float64, from the file's tensors and quantization_config alone."""
    part = {key.removeprefix(name + "."): value for key, value in stored.items() if key.startswith(name + ".")}
    method = settings["quant_method"]
    if method in ("gptq", "awq"):
        scales = part["scales"].double()
        if method == "gptq":
            integers, zeros, group = nibbles(part["qweight"], 0), nibbles(part["qzeros"], 1) + 1, part["g_idx"].long()
        else:
            integers, zeros = (nibbles(part[key], 1, AWQ_ORDER) for key in ("qweight", "qzeros"))
            group = torch.arange(integers.shape[0]) // settings["group_size"]
        return ((integers - zeros[group]) * scales[group]).T.contiguous()
    if "weight_packed" in part:
        rows, columns = part["weight_shape"].tolist()
        integers = nibbles(part["weight_packed"], 1)[:, :columns]
        scales = part["weight_scale"].double()
        zeros = torch.full_like(scales, 8)
        if "weight_zero_point" in part:
            zeros = nibbles(part["weight_zero_point"], 0)[:rows]
        group = torch.arange(columns) // (columns // scales.shape[1])
        return (integers - zeros[:, group]) * scales[:, group]
    weight = part["weight"].double()
    scale = part.get("weight_scale_inv", part.get("weight_scale")).double()
    if scale.numel() == 1 or scale.shape == (weight.shape[0], 1) and not is_block(settings):
        return weight * scale
    rows, columns = (torch.arange(n) // BLOCK for n in weight.shape)
    return weight * scale[rows][:, columns]


def is_block(settings):
    groups = settings.get("config_groups", {})
    return "weight_block_size" in settings or any(g["weights"]["strategy"] == "block" for g in groups.values())


def check_with_the_tool(name, stored, settings, weight):
    """Compressed-tensors' own decompression, which computes in the scale's dtype, says the same."""
    if settings["quant_method"] != "compressed-tensors":
        return
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    scheme = QuantizationScheme.model_validate(settings["config_groups"]["group_0"])
    part = {key.removeprefix(name + "."): value for key, value in stored.items() if key.startswith(name + ".")}
    found = BaseCompressor.get_value_from_registry(settings["format"]).decompress(part, scheme)["weight"].double()
    assert torch.allclose(found, weight, rtol=2**-7, atol=1e-6), (name, (found - weight).abs().max())


def expect(directory):
    """Writes expected/ and returns the dequantized model in float64."""
    config = json.loads((directory / "config.json").read_text())
    settings = config.pop("quantization_config")
    stored = load_file(directory / "model.safetensors")
    model = LlamaForCausalLM(LlamaConfig(**config)).double()
    dense, rows_of = {}, {}
    for name, module in model.named_modules():
        if not is_quantized(name, module):
            continue
        weight = dense[name + ".weight"] = dequantize(name, stored, settings)
        check_with_the_tool(name, stored, settings, weight)
        last = weight.shape[0] - 1
        rows = torch.tensor(sorted({0, 1, 7, 37, last // 2, last - 1, last}))
        rows_of |= {name + ".weight": weight[rows].contiguous(), name + ".rows": rows}
    dense |= {name: stored[name].double() for name in model.state_dict() if name not in dense}
    model.load_state_dict(dense)
    (directory / "expected").mkdir()
    save_file(rows_of, directory / "expected" / "dequantized.safetensors")
    return model


def make_case(name, case):
    """Tries seeds until the greedy tokens vary and no float32 choice is closer than its noise could decide."""
    directory = HERE / name
    for seed in range(30):
        shutil.rmtree(directory, ignore_errors=True)
        globals()["write_" + case["write"]](case, base_model(case, seed), directory)
        (directory / "generation_config.json").unlink(missing_ok=True)
        with tempfile.TemporaryDirectory() as dense:
            expect(directory).save_pretrained(dense)
            prompts = make.prompts_for({"config": {"vocab_size": 97}, "lengths": LENGTHS}, seed)
            golden = make.examine(dense, prompts)
        runs = [p["float32"] for p in golden["prompts"]]
        closest = min(min(r["margins"]) for r in runs)
        distinct = sorted(len(set(r["greedy"])) for r in runs)[len(runs) // 2]
        decided = sum(m > golden["margin_bound"] for r in runs for m in r["margins"]) / (make.STEPS * len(runs))
        if closest > 1e-3 and distinct >= 5 and decided > 0.35:
            break
    else:
        raise SystemExit(f"{name}: no seed gave varied and well-separated tokens")
    assert golden["float32_error"] < 2e-5, golden["float32_error"]
    golden = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0], "seed": seed,
              "stored_dtype": case["dtype"], **golden}
    (directory / "golden.json").write_text(make.compact(golden) + "\n")
    size = sum(f.stat().st_size for f in directory.rglob("*") if f.is_file())
    print(f"{name}: seed {seed}, {size} bytes, float32 error {golden['float32_error']:.1e}, bfloat16 error "
          f"{golden['bfloat16_error']:.3f}, closest margin {closest:.4f}, {decided:.0%} of margins above the bound, "
          f"{distinct} distinct tokens of {make.STEPS}", flush=True)
    with safe_open(directory / "model.safetensors", "pt") as file:
        for key in sorted(file.keys()):
            if "layers.0.mlp.down_proj" in key:
                print("   ", key, file.get_slice(key).get_dtype(), file.get_slice(key).get_shape(), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for chosen in sys.argv[1:] or CASES:
        make_case(chosen, CASES[chosen])
