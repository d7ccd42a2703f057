#!/usr/bin/env python3
"""Makes tokenizers/: two small tokenizers trained here, and what Hugging Face's library encodes and decodes with them.

Run by hand like make.py. tokenizers/byte_level/ is a byte-level BPE (GPT-2 and Llama 3 style); tokenizers/byte_fallback/
is a BPE over characters with byte fallback and metaspace (Llama 2 style). Each holds tokenizer.json and golden.json:

    tokenizers   version of the library that made it
    vocab_size   number of tokens, added ones included
    encodings[]  {text, ids, ids_with_special, decoded}: `decoded` is decode(ids) without special tokens
    decodings[]  {ids, skipping, keeping}: token sequences that no text gave (lone bytes, half characters, special
                 tokens in the middle), decoded with special tokens skipped and kept
"""

import json
import pathlib
import random

import tokenizers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

HERE = pathlib.Path(__file__).resolve().parent / "tokenizers"

TEXT = """\
A block table maps the logical blocks of a sequence to the physical blocks of the pool. Each block holds the keys and
the values of a fixed number of tokens, so that memory is given out in small, equal parts and hardly any of it is lost.
When a sequence needs one more token and its last block is full, the pool hands it another block. If there is none, the
newest sequence is preempted: its blocks go back to the pool, and it is computed again when there is room.
def extend(table, pool):\n    if table.length % BLOCK == 0:\n        table.append(pool.take())\n    return table[-1]
kubectl apply -f demo.yaml && kubectl scale llmd/demo --replicas=3 # 12345 67890 3.14159 0x7fff
Ein Block hält die Schlüssel und Werte von sechzehn Tokens; größere Anfragen brauchen mehr Blöcke. Übrigens: schön!
Une requête plus longue demande davantage de blocs, et la mémoire est rendue dès que la réponse est achevée. Ça va ?
La tabla de bloques dice dónde está cada bloque; el niño preguntó: ¿cuántos bloques quedan? ¡Mañana más!
Таблица блоков указывает, где лежит каждый блок. Память выделяется небольшими частями, и почти ничего не теряется.
Ο πίνακας των μπλοκ δείχνει πού βρίσκεται κάθε μπλοκ. जब अनुक्रम को और जगह चाहिए, तो उसे एक और खंड मिलता है।
块表把序列的逻辑块映射到物理块。每个块保存固定数量的词元的键和值。ブロック表は論理ブロックを物理ブロックに対応させます。
블록 테이블은 시퀀스의 논리 블록을 물리 블록에 연결합니다. جدول الكتل يربط الكتل المنطقية بالكتل المادية.
It's fine, they're here, we've said so, I'll go, don't! e.g. (one) [two] {three} "four" 'five' -- six... seven?! #8 @9 $10 %11
🙂 👍 🚀 naïve café résumé coöperate déjà vu
"""

SAMPLES = [
    "", " ", "  ", "\n", "a", " a", "a ", "  a  b ", "Hello, world!", "hello\n\n  world\t!", "kubectl get llmd -o wide",
    "A block table maps logical blocks to physical ones.", "Größe überall: schöne Grüße aus Zürich", "Où est la forêt ?",
    "块表映射块", "ブロック表と한국어", "Память 123456", "नमस्ते दुनिया", "مرحبا بالعالم", "🙂", "a🙂b", "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 👍🏽 tone",
    "e\u0301 combining, \u00a0nbsp, \u200bzero width, \ufeffbom", "\u0000\u0001\u007f", "tail space ", "x" * 50, "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 \U0010ffff",
    "<s>not special?</s> <|user|>", "\ufffd already replaced", "▁metaspace▁itself", "1 22 333 4444 55555",
]


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    split = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(split), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=440, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
                                  special_tokens=["<s>", "</s>", "<|user|>", "<|assistant|>"])
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
    return tokenizer


def byte_fallback():
    """The trainer knows no byte tokens, so a vocabulary is trained without them and built anew with them in front."""
    plain = Tokenizer(models.BPE())
    plain.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    plain.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    plain.train_from_iterator([TEXT[:1500]], trainers.BpeTrainer(vocab_size=180, limit_alphabet=90, show_progress=False))
    trained = json.loads(plain.to_str())["model"]
    first = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {token: i for i, token in enumerate(first + sorted(trained["vocab"], key=trained["vocab"].get))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(m) for m in trained["merges"]], unk_token="<unk>",
                                     fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1, right=0)])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in first[:3]])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", vocab["<s>"])])
    return tokenizer


def sequences(tokenizer, bytes_of, rng):
    """Token ids that no encoder would write: byte tokens in any order, cut characters, anything at random."""
    size = tokenizer.get_vocab_size()
    yield []
    for text in ("🙂", "é漢", "a🙂", "Ж\n"):
        ids = bytes_of(text.encode())
        for cut in range(1, len(ids) + 1):
            yield ids[:cut]
        yield ids[1:]
        yield ids[:-1] + tokenizer.encode("ok then", add_special_tokens=False).ids
    yield bytes_of(b"\xff\xfe\x80\xc3\x28\xf0\x9f\x99")
    yield bytes_of(b"\xed\xa0\x80") + bytes_of(b"\xc0\x80") + bytes_of(b"\xf4\x90\x80\x80")
    special = tokenizer.token_to_id("</s>")
    yield bytes_of("🙂".encode()[:2]) + [special] + bytes_of("🙂".encode()[2:])
    yield [special] + tokenizer.encode("after the end", add_special_tokens=False).ids + [special, special]
    for n in (1, 1, 1, 2, 2, 3, 5, 8, 13, 40, 100):
        yield [rng.randrange(size) for _ in range(n)]
    for _ in range(8):
        yield bytes_of(bytes(rng.choice([rng.randrange(256), rng.choice("aé漢🙂".encode())]) for _ in range(12)))


def write(name, tokenizer, bytes_of):
    folder = HERE / name
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    encode = lambda text, special: tokenizer.encode(text, add_special_tokens=special).ids
    golden = {
        "tokenizers": tokenizers.__version__,
        "vocab_size": tokenizer.get_vocab_size(),
        "encodings": [{"text": t, "ids": encode(t, False), "ids_with_special": encode(t, True),
                       "decoded": tokenizer.decode(encode(t, False))} for t in [*SAMPLES, *TEXT.splitlines()]],
        "decodings": [{"ids": ids, "skipping": tokenizer.decode(ids), "keeping": tokenizer.decode(ids, skip_special_tokens=False)}
                      for ids in sequences(tokenizer, bytes_of, random.Random(5))],
    }
    lines = lambda items: "[\n" + ",\n".join(json.dumps(i, ensure_ascii=True) for i in items) + "\n]"
    (folder / "golden.json").write_text("{" + ",\n".join(
        f"{json.dumps(k)}: {lines(v) if isinstance(v, list) else json.dumps(v)}" for k, v in golden.items()) + "}\n")
    print(name, golden["vocab_size"], "tokens,", len(golden["encodings"]), "texts,", len(golden["decodings"]), "sequences")


if __name__ == "__main__":
    level, fallback = byte_level(), byte_fallback()
    # The byte-level alphabet in byte order: printable bytes stand for themselves, the others are shifted past U+0100.
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    letter = {b: chr(b) for b in printable} | {b: chr(0x100 + n) for n, b in enumerate(others)}
    write("byte_level", level, lambda data: [level.token_to_id(letter[b]) for b in data])
    write("byte_fallback", fallback, lambda data: [fallback.token_to_id(f"<0x{b:02X}>") for b in data])
