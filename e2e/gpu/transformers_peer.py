"""Transformers on the same requests: generate() on static batches of 32, each waiting for its longest member, and
generate_batch(), its continuous batching. Useful output tokens a second: what was asked for, not what was padded."""

import time

import torch
import transformers


def static_batches(model, requests, batch=32):
    from client import prompt

    begun = time.perf_counter()
    for first in range(0, len(requests), batch):
        part = requests[first : first + batch]
        longest = max(n for n, _ in part)
        ids = torch.zeros(len(part), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, (n, _) in enumerate(part):
            ids[i, longest - n :] = torch.tensor(prompt(first + i, n))
            mask[i, longest - n :] = 1
        most = max(m for _, m in part)
        made = model.generate(ids.cuda(), attention_mask=mask.cuda(), max_new_tokens=most, do_sample=False, pad_token_id=0)
        assert made.shape[1] == longest + most, "no batch may end early"
        print(f"{first + len(part)} requests after {time.perf_counter() - begun:.1f} s", flush=True)
    torch.cuda.synchronize()
    return sum(m for _, m in requests) / (time.perf_counter() - begun)


def continuous(model, requests):
    from client import prompt
    from transformers import GenerationConfig

    begun = time.perf_counter()
    longest = max(m for _, m in requests)
    config = GenerationConfig(max_new_tokens=longest, do_sample=False, eos_token_id=-1, pad_token_id=0)
    answers = model.generate_batch(inputs=[prompt(i, n) for i, (n, _) in enumerate(requests)], generation_config=config)
    made = sum(len(answer.generated_tokens) for answer in answers.values())
    return made / (time.perf_counter() - begun)


def load(directory):
    transformers.logging.set_verbosity_error()
    model = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, device_map="cuda").eval()
    model.generation_config.eos_token_id = None  # Every answer has the length that was asked for.
    return model


def measure(directory, requests, way):
    """`way` is one of the two functions above, warmed up on a few short requests."""
    model = load(directory)
    with torch.no_grad():
        way(model, [(32, 8)] * 32)
        rate = round(way(model, requests))
    return {"transformers": transformers.__version__, "torch": torch.__version__, "tokens_s": rate}
