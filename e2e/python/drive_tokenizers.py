"""Our tokens of a text beside those of the `tokenizers` package, which Transformers uses: python drive_tokenizers.py URL/v1"""

import json
import pathlib
import random
import urllib.error
import urllib.request

import tokenizers

from checks import equal, run

DEMO = pathlib.Path(__file__).resolve().parents[2] / "server/demo-model/tokenizer.json"
# What separates words in every way that patterns tell apart, and what they are made of.
PIECES = [" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "a", "the", " block", "BLOCK", "isn't", "we'LL", "1", "2024", ".", "?!",
          "é", "e\u0301", "块", "表", "ї", "🦀", "👩‍💻", "<|end|>", "<|user|>", "_", "\\n", "\x00"]  # fmt: skip


def post(url, text):
    """Our ids, or the error's status and message."""
    root = url.removesuffix("/v1")
    body = json.dumps({"prompt": text}).encode()
    request = urllib.request.Request(root + "/tokenize", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["tokens"]
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]["message"]


def compare(url, texts):
    oracle = tokenizers.Tokenizer.from_file(str(DEMO))
    for text in texts:
        ours, theirs = post(url, text), oracle.encode(text).ids
        assert ours == theirs, f"{text[:80]!r}, {len(text)} characters: {ours[:20]!r} is not {theirs[:20]}"


def check_mixed_texts(url):
    generator = random.Random(0)
    compare(url, ["".join(generator.choices(PIECES, k=generator.randrange(1, 60))) for _ in range(400)])


def check_long_texts(url):
    """Cut into pieces by us, tokenized at once by them."""
    generator = random.Random(1)
    compare(url, ["".join(generator.choices(PIECES, k=60_000)), "the block table of a sequence\n" * 9_000])


def check_blanks_in_a_row(url):
    """As many as one text may have without a place to cut it."""
    for run_of in (" " * 899_998, "\t\n" * 449_999, "\n" * 400_000 + " " * 499_998):
        compare(url, ["x" + run_of + "x"])


def check_more_is_refused(url):
    for blanks in (" " * 1_000_001, " \n" * 2_000_000):
        status, message = post(url, "x" + blanks + "x")
        equal((status, "have to be tokenized at once" in message), (400, True))


run(globals())
