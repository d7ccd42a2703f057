#!/usr/bin/env python3
"""Makes the beam searches of Transformers that the server's are tested against, beside the golden files of make.py.

Run once by hand after make.py, with the same versions; everything is seeded:

    pip install torch==2.9.1 transformers==5.23.0 tokenizers==0.23.3
    python server/tests/golden/make_beams.py

Each <case>/beams.json holds

    transformers, torch   versions that made the file
    searches[]            one object a search, in float32 with eager attention:
      prompt              index into the prompts of golden.json
      stop_token_ids      what ends a hypothesis besides its length
      max_tokens          its longest
      width, length_penalty, early_stopping   as `generate` names them (num_beams)
      answers[]           {ids, score}: all hypotheses, best first, the token that ended each included

A search is kept only if float64 and noise of 1e-4 on every log-probability leave its sequences as they are: what is
left is no matter of rounding.
"""

import json
import pathlib

import torch
import transformers
from transformers import LogitsProcessor

import make

HERE = pathlib.Path(__file__).resolve().parent
CASES = ("gqa-5-1", "gemma3-mha-3-window")
PROMPTS = (2, 3)
MAX_TOKENS = 14
NOISE = 1e-4


class Noise(LogitsProcessor):
    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids, scores):
        return scores + NOISE * torch.randn(scores.shape, generator=self.generator)


def stop_tokens(model, ids):
    """Tokens that some beams choose and others don't: runners-up of greedy decoding."""
    out, stops = list(ids), []
    for step in range(8):
        top = model(torch.tensor([out])).logits[0, -1].topk(3).indices.tolist()
        if step in (3, 6):
            stops.append(top[1])
        out.append(top[0])
    return sorted(set(stops))


def search(model, ids, stops, noise=None, **how):
    """All hypotheses of a search: token ids and scores."""
    found = model.generate(
        torch.tensor([ids]), max_new_tokens=MAX_TOKENS, do_sample=False, num_return_sequences=how["num_beams"],
        eos_token_id=stops or None, pad_token_id=0, return_dict_in_generate=True, output_scores=True,
        logits_processor=[] if noise is None else [Noise(noise)], **how)
    answers = []
    for sequence, beams, score in zip(found.sequences, found.beam_indices, found.sequences_scores):
        n = int((beams >= 0).sum())
        answers.append({"ids": sequence[len(ids):len(ids) + n].tolist(), "score": float(f"{score.item():.9g}")})
    return answers


def is_clear(models, answers, *args, **how):
    ids = [answer["ids"] for answer in answers]
    others = [search(models[1], *args, **how)] + [search(models[0], *args, noise=seed, **how) for seed in range(4)]
    return all([answer["ids"] for answer in other] == ids for other in others)


def examine(directory):
    prompts = json.loads((directory / "golden.json").read_text())["prompts"]
    # It makes this version accept the shapes of the cases.
    make.build_config(make.CASES[directory.name])
    models = [make.load(directory, dtype) for dtype in (torch.float32, torch.float64)]
    for model in models:
        # Nothing of the model's own settings but what is said here.
        model.generation_config = transformers.GenerationConfig()
    searches, n_unclear = [], 0
    for prompt in PROMPTS:
        ids = prompts[prompt]["ids"]
        stops = stop_tokens(models[0], ids)
        for stops in (stops, []):
            for width in (2, 4):
                for length_penalty in (0.5, 1.0, 2.0):
                    for early_stopping in (True, False, "never"):
                        how = dict(num_beams=width, length_penalty=length_penalty, early_stopping=early_stopping)
                        if not stops and early_stopping:
                            continue
                        answers = search(models[0], ids, stops, **how)
                        if not is_clear(models, answers, ids, stops, **how):
                            n_unclear += 1
                            continue
                        searches.append({"prompt": prompt, "stop_token_ids": stops, "max_tokens": MAX_TOKENS,
                                         "width": width, "length_penalty": length_penalty,
                                         "early_stopping": early_stopping, "answers": answers})
    lengths = {len(answer["ids"]) for one in searches for answer in one["answers"]}
    print(directory.name, len(searches), "searches,", n_unclear, "left out, lengths", sorted(lengths))
    assert len(searches) > 2 * n_unclear and len(lengths) > 4, "too little to compare"
    return searches


@torch.no_grad()
def main():
    for case in CASES:
        out = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0],
               "searches": examine(HERE / case)}
        text = json.dumps(out, separators=(",", ":")).replace('{"prompt"', '\n{"prompt"')
        (HERE / case / "beams.json").write_text(text + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    main()
