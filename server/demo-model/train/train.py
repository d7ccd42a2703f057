#!/usr/bin/env python3
"""Trains the demo model on corpus.jsonl and writes it, with its tokenizer, as a Hugging Face directory.

    python train.py [--corpus build/corpus.jsonl] [--out ..] [--epochs 3] [--minutes 600]

Needs torch, transformers and tokenizers; uses a GPU where there is one. Stops early, with the learning rate brought
down, so as to end within --minutes.
"""

import argparse
import json
import math
import pathlib
import random
import time

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

HERE = pathlib.Path(__file__).resolve().parent
VOCAB = 2048
BEGIN, END, ROLES = "<|begin|>", "<|end|>", ["<|system|>", "<|user|>", "<|assistant|>"]
BATCH_TOKENS = 16384
PEAK_RATE = 2e-3
QUESTION_WEIGHT = 0.1  # the model answers questions; it needn't be good at asking them

CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- if tools %}"
    "{{- '<|system|>\\nYou may call these functions:\\n' }}"
    "{%- for tool in tools %}{{- tool | tojson ~ '\\n' }}{%- endfor %}"
    "{{- 'A call is <tool_call>\\n{\"name\": ..., \"arguments\": {...}}\\n</tool_call><|end|>\\n' }}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message['role'] not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{- raise_exception('unknown role ' ~ message['role'] ~ ': expected system, user, assistant or tool') }}"
    "{%- endif %}"
    "{%- if message['role'] == 'tool' %}"
    "{{- '<|user|>\\n<tool_response>\\n' ~ message['content'] | trim ~ '\\n</tool_response><|end|>\\n' }}"
    "{%- else %}"
    "{{- '<|' ~ message['role'] ~ '|>\\n' }}"
    "{%- if message['content'] %}{{- message['content'] | trim }}{%- endif %}"
    "{%- for call in message['tool_calls'] or [] %}"
    "{{- '<tool_call>\\n{\"name\": \"' ~ call.function.name ~ '\", \"arguments\": ' ~ call.function.arguments | tojson ~ '}\\n</tool_call>' }}"
    "{%- endfor %}"
    "{{- '<|end|>\\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"
)


def train_tokenizer(examples):
    """A byte-level BPE: any text can be written in it, and no token crosses from one word into the next."""
    tokenizer = Tokenizer(models.BPE())
    split = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(split), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    texts = [e["text"] if "text" in e else "\n".join(m["content"] for m in e["messages"]) for e in examples]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCAB, min_frequency=2, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in (BEGIN, END, *ROLES)]))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN}:1 $B:1", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))])
    assert tokenizer.get_vocab_size() == VOCAB, tokenizer.get_vocab_size()
    return tokenizer


def write_tokenizer(tokenizer, out):
    tokenizer.save(str(out / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN, "eos_token": END, "pad_token": END,
              "clean_up_tokenization_spaces": False, "model_max_length": 2048, "chat_template": CHAT_TEMPLATE}
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def encode(example, tokenizer):
    """Token ids and the weight of each in the loss."""
    special = {t: tokenizer.token_to_id(t) for t in (BEGIN, END, *ROLES)}
    ids, weights = [special[BEGIN]], [0.0]

    def add(part, weight):
        part = tokenizer.encode(part, add_special_tokens=False).ids
        ids.extend(part)
        weights.extend([weight] * len(part))

    if "text" in example:
        add(example["text"] + END + "\n", 1.0)
    else:
        for message in example["messages"]:
            answer = message["role"] == "assistant"
            add(f"<|{message['role']}|>\n", QUESTION_WEIGHT)
            add(message["content"] + END, 1.0 if answer else QUESTION_WEIGHT)
            add("\n", QUESTION_WEIGHT)
    return ids, weights


def batches(encoded, rng, device):
    """One epoch: examples of like length together, at most BATCH_TOKENS in a batch, in random order."""
    order = sorted(range(len(encoded)), key=lambda i: (len(encoded[i][0]) + rng.random() * 8))
    groups, group, width = [], [], 0
    for i in order:
        width = -(-len(encoded[i][0]) // 16) * 16
        if group and width * (len(group) + 1) > BATCH_TOKENS:
            groups.append(group)
            group = []
        group.append(i)
    rng.shuffle(groups)
    for group in groups:
        width = -(-max(len(encoded[i][0]) for i in group) // 16) * 16
        ids = torch.zeros(len(group), width, dtype=torch.long)
        weights = torch.zeros(len(group), width)
        for row, i in enumerate(group):
            ids[row, :len(encoded[i][0])] = torch.tensor(encoded[i][0])
            weights[row, :len(encoded[i][1])] = torch.tensor(encoded[i][1])
        yield ids.to(device, non_blocking=True), weights.to(device, non_blocking=True)


def build_model(tokenizer):
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCAB, hidden_size=256, intermediate_size=640, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=2048, rms_norm_eps=1e-5, tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(BEGIN), eos_token_id=tokenizer.token_to_id(END),
        pad_token_id=tokenizer.token_to_id(END)))


def train(model, encoded, device, epochs, minutes):
    rng = random.Random(7)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
                                  lr=PEAK_RATE, betas=(0.9, 0.98))
    total_tokens = epochs * sum(len(ids) for ids, _ in encoded)
    done, step, start, smooth = 0, 0, time.time(), None
    for _ in range(epochs):
        for ids, weights in batches(encoded, rng, device):
            progress = max(done / total_tokens, (time.time() - start) / (60 * minutes))
            if progress >= 1:
                return
            rate = PEAK_RATE * min(1, (step + 1) / 200) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            with torch.autocast(device, torch.bfloat16):
                logits = model(input_ids=ids[:, :-1]).logits
            losses = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            weight = weights[:, 1:].flatten()
            loss = (losses * weight).sum() / weight.sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done, step = done + int(ids.numel()), step + 1
            if step % 100 == 0:
                smooth = loss.item()
                print(f"step {step}, {progress:.0%}, {done / (time.time() - start):.0f} tokens/s, loss {smooth:.4f}", flush=True)


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--corpus", type=pathlib.Path, default=HERE / "build" / "corpus.jsonl")
    arguments.add_argument("--out", type=pathlib.Path, default=HERE.parent)
    arguments.add_argument("--epochs", type=int, default=3)
    arguments.add_argument("--minutes", type=float, default=600)
    options = arguments.parse_args()
    torch.manual_seed(7)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    examples = [json.loads(line) for line in options.corpus.open()]
    tokenizer = train_tokenizer(examples[:20_000])
    encoded = [encode(e, tokenizer) for e in examples]
    model = build_model(tokenizer).to(device)
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{n_parameters} parameters, {sum(len(i) for i, _ in encoded)} tokens an epoch, longest {max(len(i) for i, _ in encoded)}, on {device}", flush=True)
    train(model, encoded, device, options.epochs, options.minutes)
    options.out.mkdir(parents=True, exist_ok=True)
    model.generation_config.update(do_sample=False, max_new_tokens=None)
    model.to("cpu", torch.bfloat16).save_pretrained(options.out)
    write_tokenizer(tokenizer, options.out)


if __name__ == "__main__":
    main()
