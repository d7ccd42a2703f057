#!/usr/bin/env python3
"""Asks the demo model the 40 questions of questions.json, which training never saw, and counts the right answers.

    python check.py [model folder] [--corpus build/corpus.jsonl]

Plain Transformers, greedy, in bfloat16 and in float32. An answer is right if it ends by itself and holds the fact asked
for, as a regular expression. Fails below 36 of 40, or if a question occurs in the corpus (letters and digits compared).
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from make_corpus import normalised

HERE = pathlib.Path(__file__).resolve().parent


def assert_unseen(questions, corpus):
    if not corpus.exists():
        subprocess.run([sys.executable, HERE / "make_corpus.py", corpus.parent], check=True)
    held_out = {normalised(q["ask"]) for q in questions}
    with corpus.open() as lines:
        for line in lines:
            example = json.loads(line)
            for text in [example.get("text", "")] + [m["content"] for m in example.get("messages", [])]:
                assert normalised(text) not in held_out, f"{corpus} holds the test question {text!r}"


@torch.no_grad()
def answer(model, tokenizer, question):
    ids = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True,
                                        return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=120, do_sample=False)[0][ids["input_ids"].shape[1]:]
    ended = int(out[-1]) == tokenizer.eos_token_id
    return tokenizer.decode(out, skip_special_tokens=True), ended


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("model", nargs="?", type=pathlib.Path, default=HERE.parent)
    arguments.add_argument("--corpus", type=pathlib.Path, default=HERE / "build" / "corpus.jsonl")
    options = arguments.parse_args()
    questions = json.loads((HERE / "questions.json").read_text())
    assert len(questions) == 40
    assert_unseen(questions, options.corpus)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    failed = False
    for dtype in (torch.bfloat16, torch.float32):
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).eval()
        right = 0
        for question in questions:
            text, ended = answer(model, tokenizer, question["ask"])
            holds = ended and re.search(question["holds"], text, re.IGNORECASE | re.DOTALL) is not None
            right += holds
            print("ok   " if holds else "WRONG", question["ask"], "->", text)
        print(f"{dtype}: {right} of {len(questions)} answers hold the fact asked for\n", flush=True)
        failed |= right < 36
    sys.exit(failed)


if __name__ == "__main__":
    main()
