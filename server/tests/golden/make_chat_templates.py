#!/usr/bin/env python3
"""Makes chat_templates.json: chat templates written for the purpose and what Transformers renders them to.

Run by hand like make.py. The file:

    transformers      version that made it
    now               the local time that strftime_now saw (it is frozen, so that the renderings stay true)
    special_tokens    bos_token and the like: what the template finds under these names
    cases[]           {why, template, messages, add_generation_prompt, tools?, kwargs?} and one of
        rendered      the exact text of apply_chat_template(..., tokenize=False)
        error         the message with which the template itself refused (raise_exception)

`tools` is absent where the caller gave none: the template then sees none (as a null). `kwargs` are further names
that the caller passes to the template.
"""

import datetime
import json
import pathlib

import jinja2
import transformers
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

HERE = pathlib.Path(__file__).resolve().parent
NOW = datetime.datetime(2026, 7, 4, 9, 5, 3)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}

CHATML = """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a careful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if not (loop.first and message.role == 'system') %}
        {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>' ~ '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

HEADERS = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {{- "Functions you may call:\\n\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role == 'tool' or message.role == 'ipython' %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("One call at a time, please.") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- call.arguments | tojson }}
        {{- "}<|eot_id|>" }}
    {%- elif message.role in ['user', 'assistant'] %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
    {%- else %}
        {{- raise_exception("Unknown role: " + message.role + ".") }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

ALTERNATING = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system = messages[0]['content'].strip() + '\\n\\n' %}{% else %}{% set loop_messages = messages %}{% set system = '' %}{% endif %}{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if loop.first and system %}{% set content = system + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""

NAMESPACE = """\
{%- set ns = namespace(system='', n_user=0, last_user=-1, multi_step=true) -%}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {%- set ns.system = ns.system ~ ('\\n' if ns.system else '') ~ message.content -%}
    {%- elif message.role == 'user' -%}
        {%- set ns.n_user = ns.n_user + 1 -%}
        {%- set ns.last_user = loop.index0 -%}
    {%- endif -%}
{%- endfor -%}
{{ ns.system }}|{{ ns.n_user }}|{{ ns.last_user }}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and not(message.content.startswith('<tool>') and message.content.endswith('</tool>')) %}
        {%- set ns.multi_step = false %}
        {{- '|query at ' ~ index }}
    {%- endif %}
{%- endfor %}
"""

THINKING = """\
{%- for message in messages %}
{%- if message.role == 'assistant' %}
    {%- set content = message.content %}
    {%- set reasoning = '' %}
    {%- if message.reasoning_content is string %}
        {%- set reasoning = message.reasoning_content %}
    {%- elif '</think>' in content %}
        {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {%- if loop.last or (not loop.last and reasoning) %}
        {{- '<a><think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') + '</a>' }}
    {%- else %}
        {{- '<a>' + content + '</a>' }}
    {%- endif %}
{%- else %}
    {{- '<u>' + message.content + '</u>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<a>' }}{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}
"""

METHODS = """\
{% macro yes(x) %}{{ 'yes' if x else 'no' }}{% endmacro %}
{% for message in messages %}
{{ message.role.upper() }}/{{ message['role']|capitalize }}/{{ message.role.title() }}: {{ message.get('name', 'nobody') }}
  {% for key, value in message.items() %}{{ key }}={{ value|string|length }}{% if not loop.last %}, {% endif %}{% endfor %}

  {{ message.content.replace('a', 'A').strip().split(' ')|join('_') }} {{ message.content[:3] }} {{ message.content[-3:] }}
  {{ yes(message.content.lower().startswith('h')) }} {{ yes('x' in message.content) }} {{ message.content | length }} {{ message.content.split()[0] }}
  {{ yes((message.content | trim).endswith('.')) }} {{ message.keys() | list | length }} {{ yes(message.missing is defined) }} {{ yes(none is none) }}
{% endfor %}
{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list | length }} {{ messages[-1].content.find('e') }}
{{ messages | map(attribute='role') | join(', ') }}; {{ (messages | last)['role'] }}; {{ 7 // 2 }} {{ 7 % 4 }} {{ 2 ** 3 }} {{ ([1, 2] + [3]) | join('+') }}
"""

PARTS = """\
{%- macro show(content) -%}
    {%- if content is string -%}{{ content }}
    {%- else -%}
        {%- for part in content -%}
            {%- if part.type == 'text' -%}{{ part['text'] }}
            {%- elif part.type == 'image' or 'image' in part -%}<image>
            {%- else -%}{{ raise_exception('only text and image parts are known, not ' ~ part.type) }}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
[{{ message.role }}] {{ show(message.content) }}
{% endfor -%}
{{ '[assistant]' if add_generation_prompt }}
"""

JSON = """\
{{ messages[0] | tojson }}
{{ messages[0].content | tojson }}
{{ messages | tojson(indent=2) }}
{{ {'b': [1, 2.5, true, none], 'a': {}, 'c': []} | tojson }}
{{ {'b': [1, 2.5, true, none], 'a': {}, 'c': []} | tojson(indent=1) }}
"""

LOOPS = """\
{%- for message in messages -%}
    {%- if message.role == 'system' -%}{%- continue -%}{%- endif -%}
    {%- if message.content == 'stop' -%}{%- break -%}{%- endif -%}
    {{ loop.index }}:{{ message.content }}{{ ' <- ' ~ loop.previtem.role if not loop.first and loop.previtem is defined }}{{ ' -> ' ~ loop.nextitem.role if loop.nextitem is defined }}
{% endfor -%}
"""

GENERATION = """\
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
<a>{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}

{%- else -%}
<u>{{ message.content }}
{%- endif -%}
{%- endfor -%}
{{- '<a>' if add_generation_prompt -}}
"""

BLOCKS = """\
  {% if true %}
  kept, with its two leading spaces
  {% endif %}
{# a comment of its own line #}
{% for message in messages %}
{{ message.content }}
{% endfor %}
end"""

SYSTEM = {"role": "system", "content": "  Answer in one sentence.\n"}
USER = {"role": "user", "content": " Hello there, who are you? "}
ASSISTANT = {"role": "assistant", "content": "I am <b>\"Kvasir\"</b> & I'm 1/2 é 漢字 🙂.\n"}
AGAIN = {"role": "user", "content": "Thanks."}
TALK = [SYSTEM, USER, ASSISTANT, AGAIN]
TOOL = {"type": "function", "function": {"name": "scale", "description": "Sets the <replicas> of a deployment.",
        "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}}}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "scale", "arguments": {"n": 3, "why": "load > 80 %"}}}]}


def cases():
    both = (False, True)
    for prompt in both:
        yield dict(why="ChatML, system given", template=CHATML, messages=TALK, add_generation_prompt=prompt)
        yield dict(why="ChatML, default system", template=CHATML, messages=[USER], add_generation_prompt=prompt)
        yield dict(why="headers, system given", template=HEADERS, messages=TALK, add_generation_prompt=prompt)
        yield dict(why="alternating roles", template=ALTERNATING, messages=TALK, add_generation_prompt=prompt)
        yield dict(why="content in parts", template=PARTS, add_generation_prompt=prompt,
                   messages=[SYSTEM, {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "image"}, {"type": "text", "text": "?"}]}])
        yield dict(why="reasoning cut out", template=THINKING, add_generation_prompt=prompt,
                   messages=[USER, {"role": "assistant", "content": "<think>\nhm\n\n</think>\n\nYes."}, AGAIN, {"role": "assistant", "content": "Bye.\n"}])
    yield dict(why="headers, a date handed in", template=HEADERS, messages=[USER], add_generation_prompt=True, kwargs={"date_string": "1 Jan 2000"})
    yield dict(why="headers, tools and a call", template=HEADERS, add_generation_prompt=True, tools=[TOOL],
               messages=[USER, CALL, {"role": "tool", "content": {"replicas": 3, "note": "scaled <up>"}}, AGAIN])
    yield dict(why="headers, two calls at once", template=HEADERS, add_generation_prompt=True,
               messages=[USER, {**CALL, "tool_calls": CALL["tool_calls"] * 2}])
    yield dict(why="headers, unknown role", template=HEADERS, messages=[USER, {"role": "critic", "content": "No."}], add_generation_prompt=True)
    yield dict(why="alternating roles, user twice", template=ALTERNATING, messages=[USER, AGAIN], add_generation_prompt=False)
    yield dict(why="alternating roles, assistant first", template=ALTERNATING, messages=[ASSISTANT], add_generation_prompt=False)
    yield dict(why="content in parts, unknown part", template=PARTS, messages=[{"role": "user", "content": [{"type": "sound", "x": 1}]}], add_generation_prompt=True)
    yield dict(why="namespace", template=NAMESPACE, messages=[*TALK, {"role": "user", "content": "<tool>5</tool>"}, SYSTEM], add_generation_prompt=False)
    yield dict(why="thinking switched off", template=THINKING, messages=[USER], add_generation_prompt=True, kwargs={"enable_thinking": False})
    yield dict(why="methods of strings and dicts", template=METHODS, messages=TALK, add_generation_prompt=False)
    yield dict(why="tojson: no escapes of HTML or of other scripts", template=JSON, messages=TALK, add_generation_prompt=False)
    yield dict(why="continue, break, neighbours", template=LOOPS, add_generation_prompt=False,
               messages=[SYSTEM, USER, ASSISTANT, {"role": "user", "content": "stop"}, AGAIN])
    yield dict(why="blocks are trimmed and stripped on the left", template=BLOCKS, messages=[USER, AGAIN], add_generation_prompt=False)
    yield dict(why="strftime_now", template="{{ strftime_now('%Y-%m-%d %H:%M:%S %A %B %j %-d %y %I %p %%') }}", messages=[USER], add_generation_prompt=False)
    yield dict(why="undefined names are empty", template="[{{ nothing }}][{{ messages[0].nothing }}][{{ 'x' if nothing else 'y' }}][{{ tools is none }}]", messages=[USER], add_generation_prompt=False)
    yield dict(why="True, False and None as Python writes them", template="{{ 'a' if True }}{{ 'b' if False }}{{ 'c' if tools is none and tools == None }}{{ 'd' if add_generation_prompt == True }}",
               messages=[USER], add_generation_prompt=True)
    yield dict(why="the generation block of training templates", template=GENERATION, messages=TALK, add_generation_prompt=True)


class Frozen(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(NOW.year, NOW.month, NOW.day, NOW.hour, NOW.minute, NOW.second)


def render(case):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0}, "<unk>")), **SPECIAL)
    try:
        return {"rendered": tokenizer.apply_chat_template(
            case["messages"], chat_template=case["template"], tools=case.get("tools"), tokenize=False,
            add_generation_prompt=case["add_generation_prompt"], **case.get("kwargs", {}))}
    except jinja2.exceptions.TemplateError as error:
        return {"error": str(error)}


if __name__ == "__main__":
    chat_template_utils.datetime = Frozen
    golden = {"transformers": transformers.__version__, "now": NOW.isoformat(), "special_tokens": SPECIAL,
              "cases": [{**case, **render(case)} for case in cases()]}
    refused = [c["why"] for c in golden["cases"] if "error" in c]
    (HERE / "chat_templates.json").write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n")
    print(len(golden["cases"]), "cases; refused:", refused)
