"""Asks one question through the `openai` package and streams the answer, as a user would; prints JSON."""

import json
import sys

import openai

url, model, question = sys.argv[1:4]
client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
pieces = []
finish_reason = None
for event in client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": question}],
    stream=True,
    temperature=0,
    max_tokens=120,
):
    for choice in event.choices:
        pieces.append(choice.delta.content or "")
        finish_reason = choice.finish_reason or finish_reason
print(json.dumps({"pieces": pieces, "answer": "".join(pieces), "finish_reason": finish_reason}))
