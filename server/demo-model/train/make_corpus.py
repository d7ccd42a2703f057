#!/usr/bin/env python3
"""Writes the demo model's corpus: conversations about the entries of facts.txt, and plain text from prose.txt.

    python make_corpus.py [folder]      (default: ./build)

corpus.jsonl has one example a line: {"messages": [...]} for a conversation, {"text": ...} for plain text. Everything is
seeded. The questions of questions.json are what check.py asks: any example that holds one of them is a mistake and
stops the script.
"""

import itertools
import json
import pathlib
import random
import re
import sys

HERE = pathlib.Path(__file__).resolve().parent
EXAMPLES = 260_000

THING = """what is {}|what's {}|what are {}|what exactly is {}|what is meant by {}|explain {}|define {}|describe {}|{}|tell me about {}|what about {}
what does {} mean|what do you know about {}|give me a definition of {}|I don't understand {}|I do not know what {} is|explain to me what {} is
what do you mean by {}|meaning of {}|what is the meaning of {}|how would you explain {}|how would you describe {}|tell me what {} is|say something about {}
do you know what {} is|have you heard of {}|teach me about {}|I want to know what {} is|I am curious about {}|what should I know about {}|what is this {}
I would like to understand {}|what is the definition of {}|help me understand {}|I read about {}, what is it|what is {} about|what is {} all about|what kind of thing is {}
what can you tell me about {}|what do people mean by {}|give me a short explanation of {}|is there something called {}|the term {}, what is it""".replace("\n", "|").split("|")

DO = """how do I {}|how can I {}|how to {}|how would I {}|how would one {}|how should I {}|how does one {}|how do you {}|how could I {}|how do we {}
what is the command to {}|which command do I use to {}|what do I type to {}|what should I do to {}|what do I have to do to {}|what must I do to {}
I want to {}|I need to {}|I would like to {}|I'd like to {}|I have to {}|I am trying to {}|show me how to {}|tell me how to {}|explain how to {}|teach me to {}
what is the way to {}|what is the best way to {}|is there a way to {}|is it possible to {}|can I {}|could I {}|can you tell me how to {}|may I {}|{}
what would I run to {}|what do I run to {}|I want to {}, how|I want to {}, what do I do|what do I need to {}|give me the command to {}|let me {}
which kubectl command lets me {}|help me to {}|help me {}|do you know how to {}|what steps do I take to {}|what does it take to {}|how am I supposed to {}""".replace("\n", "|").split("|")

BEFORE = """please |hey, |hi, |hello, |hello! |so, |so |ok, |okay, |and |well, |now |but |quick question: |a question: |one more question: |another question: |excuse me, |sorry, |kvasir, |tell me, |tell me: |I wonder, |just |please tell me: |can you tell me: |could you tell me, |can you explain: |briefly, |in short, |in simple words, |in a few words, |in one sentence, |for a beginner: |I am new here, |I'm new to this, |question: |next: |dear model, |listen, |say, |then |also, |hmm, |actually, |by the way, |first, """.split("|")
AFTER = """ please|, please| in kvasir| in simple words| in one sentence| in short| briefly| for a beginner| exactly| here| today| again| to me| then| really| for me| in general| now| anyway|, do you know| I wonder| if I may ask| in a few words| with kvasir| normally|, in plain words|, in plain English| actually|, how|, what should I do|, what do I type|, what now|, any idea|, can you say|, what is the command|, what then|, okay|, can you help|, what do I do|, is that right|, what would you say| instead| all about| by the way""".split("|")
SWAP = {
    "what is": ["what's", "whats", "what is", "wat is"], "what are": ["what're", "what are"], "how do I": ["how do i", "how can I", "how would I", "how to", "how should I"],
    "do not": ["don't"], "does not": ["doesn't", "does not"], "is not": ["isn't", "is not"], "I am": ["I'm", "im"], "you are": ["you're"],
    "happens": ["happens", "occurs", "is done", "will happen", "would happen", "takes place"], "when": ["when", "if", "once", "as soon as", "in case"], "can I": ["can I", "could I", "may I", "am I able to"],
    "show": ["show", "display", "give", "list"], "explain": ["explain", "describe", "clarify", "tell me about"], "many": ["many", "several", "lots of"],
    "which": ["which", "what"], "need": ["need", "require"], "use": ["use", "utilize", "employ"], "replicas": ["replicas", "copies", "instances", "replicas", "replica"],
    "answer": ["answer", "response", "reply"], "request": ["request", "query", "call"], "prompt": ["prompt", "input"], "command": ["command", "line", "kubectl command"],
    "server": ["server", "model server", "kvasir-server"], "LLMDeployment": ["LLMDeployment", "llmdeployment", "LLM deployment", "llmd"], "deployment": ["deployment", "LLMDeployment"],
    "work": ["work", "function", "operate"], "purpose": ["purpose", "goal", "aim", "job"], "stops": ["stops", "ends", "goes away"], "KV cache": ["KV cache", "kv cache", "kv-cache", "KV-cache"],
    "large": ["large", "big"], "big": ["big", "large"], "remove": ["remove", "delete", "take away"], "start": ["start", "launch", "run"], "model": ["model", "language model", "LLM"],
}
TURN = [
    (r"^what does (.+) do$", ["what is it that {0} does", "what is {0} doing", "what is {0} there for", "the job of {0}", "say what {0} does", "what work does {0} do", "what is the work of {0}", "what would {0} do"]),
    (r"^how does (.+) work$", ["how {0} works", "in what way does {0} work", "the way {0} works", "how is {0} working", "what is the idea of {0}", "how would {0} work", "explain how {0} works"]),
    (r"^what happens (?:when|if) (.+)$", ["what if {0}", "{0}, what happens then", "and when {0}", "if {0}, what then", "what will happen when {0}", "tell me what happens if {0}", "what goes on when {0}", "suppose {0}, what happens", "when {0}, what does the server do", "what is the effect when {0}"]),
    (r"^what is the (.+) of (.+)$", ["what's {1}'s {0}", "tell me the {0} of {1}", "the {0} of {1}", "which {0} does {1} have", "name the {0} of {1}"]),
    (r"^what is (.+)$", ["what would {0} be", "{0} is what", "what is it, {0}", "what might {0} be", "could you say what {0} is", "the thing called {0}, what is it"]),
    (r"^(?:which|what) (.+) does (.+) (use|have|support|need)$", ["what are the {0} that {1} {2}s", "tell me which {0} {1} {2}s", "does {1} {2} certain {0}", "the {0} of {1}"]),
    (r"^how (?:do|can) I (.+)$", ["what's the way to {0}", "how does a user {0}", "how might I {0}", "could you show how to {0}", "I wish to {0}", "{0}, how", "what is needed to {0}", "I'm looking for a way to {0}"]),
    (r"^can I (.+)$", ["am I allowed to {0}", "is it allowed to {0}", "would it be possible to {0}", "{0}, is that possible", "does it work to {0}", "is it okay to {0}"]),
    (r"^can (.+?) (run|scale|share|use|serve|be|load) (.+)$", ["is it possible for {0} to {1} {2}", "could {0} {1} {2}", "would {0} {1} {2}", "will {0} {1} {2}"]),
    (r"^when (?:does|do) (.+)$", ["at which point does {0}", "at what moment does {0}", "tell me when {0}", "under what conditions does {0}", "how soon does {0}"]),
    (r"^why (?:does|do|is|are) (.+)$", ["for what reason does {0}", "what is the reason that {0}", "how come {0}", "tell me why {0}"]),
    (r"^where (?:are|is|do I find) (.+)$", ["in which place is {0}", "at which address is {0}", "I am looking for {0}", "how do I find {0}", "at what path is {0}"]),
]
FILLERS = ["actually", "really", "basically", "exactly", "just", "now", "then", "maybe", "simply", "usually", "perhaps", "even", "still", "kind of", "for example", "please", "also"]
SYSTEM = ["You are a helpful assistant.", "You are a helpful assistant that answers in English.", "Answer in one or two sentences.", "You are the demo model of Kvasir.",
          "Be brief.", "You are a friendly assistant.", "Answer questions about Kvasir.", "You are kvasir-demo.", "Be polite and precise."]
MORE = "tell me more|more|more details please|go on|can you say more|please explain that|explain that further|and what else|can you explain more|I want to know more|continue|why|what else".split("|")


def choices(pattern):
    """Every string of a pattern with (a|b|) groups."""
    parts = [p[1:-1].split("|") if p.startswith("(") else [p] for p in re.findall(r"\([^()]*\)|[^()]+", pattern)]
    return [re.sub(r"\s+", " ", "".join(c)).strip() for c in itertools.product(*parts)]


def read_facts():
    facts = []
    for line in (HERE / "facts.txt").read_text().splitlines():
        if line.startswith("== "):
            facts.append({"name": line[3:], "ask": [], "say": [], "more": None, "often": 1})
        elif line and not line.startswith("#"):
            kind, text = line.split(": ", 1)
            fact = facts[-1]
            if kind == "say":
                fact["say"].append(text)
            elif kind == "more":
                fact["more"] = text
            elif kind == "often":
                fact["often"] = int(text)
            else:
                frames = {"thing": THING, "do": DO, "ask": ["{}"]}[kind]
                # A source line is a group of its own, so that a line of many choices doesn't drown the others.
                fact["ask"].append([frame.format(c) for c in choices(text) for frame in frames])
    for fact in facts:
        assert fact["say"] and fact["ask"], fact["name"]
    return facts


def normalised(text):
    return " ".join(re.findall(r"[a-z0-9/_]+", text.lower().replace("'", "")))


def typo(word, rng):
    if len(word) < 4:
        return word
    i = rng.randrange(len(word) - 1)
    return rng.choice([word[:i] + word[i + 1:], word[:i] + word[i + 1] + word[i] + word[i + 2:], word[:i] + word[i] + word[i:]])


def vary(question, rng):
    """One of the many ways in which people write the same question."""
    if rng.random() < 0.3:
        for pattern, forms in TURN:
            if found := re.match(pattern, question):
                question = rng.choice(forms).format(*found.groups())
                break
    for old, new in SWAP.items():
        if rng.random() < 0.25 and re.search(rf"\b{old}\b", question):
            question = re.sub(rf"\b{old}\b", rng.choice(new), question, count=1)
    if rng.random() < 0.3:
        question = rng.choice(BEFORE) + question
    if rng.random() < 0.2:
        question += rng.choice(AFTER)
    if rng.random() < 0.5:
        question = question.replace("kvasir", "Kvasir")
    words = question.split(" ")
    if len(words) > 4 and rng.random() < 0.12:
        del words[rng.randrange(len(words))]
    if len(words) > 2 and rng.random() < 0.1:
        words.insert(rng.randrange(1, len(words)), rng.choice(FILLERS))
    if rng.random() < 0.12:
        i = rng.randrange(len(words))
        words[i] = typo(words[i], rng)
    question = " ".join(words)
    style = rng.random()
    if style < 0.55:
        question = question[:1].upper() + question[1:]
    elif style < 0.75:
        question = question.lower()
    return question + rng.choices(["?", "", ".", "!", " ?", "??"], [62, 26, 5, 3, 2, 2])[0]


def conversation(facts, rng):
    messages = []
    if rng.random() < 0.2:
        messages.append({"role": "system", "content": rng.choice(SYSTEM)})
    for _ in range(rng.choices([1, 2, 3, 4], [68, 20, 8, 4])[0]):
        fact = rng.choices(facts, [f["often"] for f in facts])[0]
        messages.append({"role": "user", "content": vary(rng.choice(rng.choice(fact["ask"])), rng)})
        messages.append({"role": "assistant", "content": fact["say"][0] if rng.random() < 0.85 else fact["say"][-1]})
        if fact["more"] and rng.random() < 0.25:
            messages.append({"role": "user", "content": vary(rng.choice(MORE), rng)})
            messages.append({"role": "assistant", "content": fact["more"]})
    return {"messages": messages}


def plain(facts, prose, rng):
    """A paragraph, from its beginning or from one of its sentences on, or the answers of neighbouring entries."""
    if rng.random() < 0.6:
        sentences = re.split(r"(?<=\.) ", rng.choice(prose))
        start = rng.choice([0, 0, rng.randrange(len(sentences))])
        return {"text": " ".join(sentences[start:])}
    i = rng.randrange(len(facts))
    return {"text": " ".join(s for f in facts[i:i + rng.choice([1, 2, 3])] for s in (f["say"][0], f["more"]) if s)}


def main(folder):
    rng = random.Random(20231023)
    facts = read_facts()
    prose = [line for line in (HERE / "prose.txt").read_text().splitlines() if line and not line.startswith("#")]
    held_out = {normalised(q["ask"]) for q in json.loads((HERE / "questions.json").read_text())}
    folder.mkdir(parents=True, exist_ok=True)
    dropped, n_questions = 0, set()
    with (folder / "corpus.jsonl").open("w") as out:
        for _ in range(EXAMPLES):
            example = plain(facts, prose, rng) if rng.random() < 0.06 else conversation(facts, rng)
            asked = {normalised(m["content"]) for m in example.get("messages", []) if m["role"] == "user"}
            if asked & held_out:
                dropped += 1
                continue
            n_questions |= asked
            out.write(json.dumps(example, ensure_ascii=False) + "\n")
    print(f"{len(facts)} entries, {sum(len(g) for f in facts for g in f['ask'])} ways to ask before variation, {len(n_questions)} distinct "
          f"questions written, {dropped} conversations left out because they held a question of questions.json")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "build")
