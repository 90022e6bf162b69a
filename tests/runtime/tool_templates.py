"""Chat templates reduced to what they do with tools: written after those of the models that each is named for."""

from __future__ import annotations

_TURNS = """
{%- for m in messages %}
{%- if m.role in ('system', 'user') %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% elif m.role == 'assistant' %}<|im_start|>assistant
{{ m.content }}{% for call in m.tool_calls or [] %}{{ '\n' if m.content or not loop.first }}CALL{% endfor %}<|im_end|>
{% else %}<|im_start|>user
<tool_response>
{{ m.content }}
</tool_response><|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
_SYSTEM = """{%- if tools %}<|im_start|>system
# Tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}Write {"name": .., "arguments": ..} within <tool_call></tool_call>.<|im_end|>
{% endif %}"""

HERMES = _SYSTEM + _TURNS.replace(
    "CALL",
    '<tool_call>\n{"name": "{{ call.function.name }}", "arguments": '
    "{{ call.function.arguments | tojson }}}\n</tool_call>",
)
"""Qwen 2.5 and 3, Hermes."""

HERMES_TEXT = _SYSTEM + _TURNS.replace(
    "CALL",
    '<tool_call>\n{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments }}}\n</tool_call>',
)
"""The same, with arguments as the text that OpenAI's clients send."""

THINKING = (
    HERMES.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}") + "{#</think>#}"
)
"""A Hermes template whose prompt opens what is thought."""
THINKING += "{% if false %}</think>{% endif %}"

TAGS = _SYSTEM + _TURNS.replace(
    "CALL",
    "<tool_call>\n<function={{ call.function.name }}>\n{% for key, value in call.function.arguments | items %}"
    "<parameter={{ key }}>\n{{ value if value is string else value | tojson }}\n</parameter>\n{% endfor %}"
    "</function>\n</tool_call>",
)
"""Qwen3-Coder."""

SMOLLM3 = _SYSTEM.replace("tools", "xml_tools").replace("tool | tojson", "tool | string") + _TURNS.replace("CALL", "")
"""It reads ``xml_tools``, and shows no calls."""

LFM2 = """{%- if tools %}<|im_start|>system
List of tools: <|tool_list_start|>[{% for tool in tools %}{{ tool | tojson }}{% endfor %}]<|tool_list_end|><|im_end|>
{% endif %}""" + _TURNS.replace("CALL", "")
"""It shows no calls, and describes none."""

LFM25 = """{%- if tools %}<|im_start|>system
List of tools: {{ tools | tojson }}<|im_end|>
{% endif %}{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% if m.tool_calls %}<|tool_call_start|>[{% for call in m.tool_calls %}{{ call.function.name }}({% for
key, value in call.function.arguments.items() %}{{ key }}={{ "'" + value + "'" if value is string else value | string }}
{{- ', ' if not loop.last }}{% endfor %}){{ ', ' if not loop.last }}{% endfor %}]<|tool_call_end|>{% endif %}<|im_end|>
{% endfor %}{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

LLAMA = """{{ bos_token }}{%- for m in messages %}
{%- if m.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>

{{ m.content | tojson }}<|eot_id|>
{%- elif m.tool_calls %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception('single tool-calls only') }}{% endif %}
{%- set call = m.tool_calls[0].function %}<|start_header_id|>assistant<|end_header_id|>

{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}<|eot_id|>
{%- else %}<|start_header_id|>{{ m.role }}<|end_header_id|>

{% if loop.first and tools %}{% for tool in tools %}{{ tool | tojson(indent=4) }}
{% endfor %}{% endif %}{{ m.content }}<|eot_id|>
{%- endif %}{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""

_MISTRAL = """{{ bos_token }}{%- for m in messages %}
{%- if m.role == 'user' %}{% if tools and loop.index0 == 0 %}[AVAILABLE_TOOLS] {{ tools | tojson }}
{{- '[/AVAILABLE_TOOLS]' }}{% endif %}[INST]{{ m.content }}[/INST]
{%- elif m.tool_calls %}CALLS{{ eos_token }}
{%- elif m.role == 'tool' %}
{%- if m.tool_call_id | length != 9 %}{{ raise_exception('ids of 9 characters') }}{% endif %}[TOOL_RESULTS]
{{- m.content }}[/TOOL_RESULTS]
{%- else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"""

MISTRAL = _MISTRAL.replace(
    "CALLS",
    '[TOOL_CALLS] [{% for call in m.tool_calls %}{{ (call.function | tojson)[:-1] }}, "id": "{{ call.id }}"}'
    "{{ ', ' if not loop.last }}{% endfor %}]",
)
"""Mistral Nemo, Small 3.1."""

MISTRAL_NAMED = _MISTRAL.replace(
    "CALLS",
    "{% for call in m.tool_calls %}[TOOL_CALLS]{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}"
    "{% endfor %}",
)
"""Mistral Small 3.2, Magistral, Devstral."""

GPT_OSS = """{%- set last = namespace(name='') %}<|start|>system<|message|># Valid channels: analysis, final.<|end|>
{%- if tools %}<|start|>developer<|message|>namespace functions {
{% for tool in tools %}type {{ tool.function.name }} = (_: {{ tool.function.parameters | tojson }}) => any;
{% endfor %}}<|end|>{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}<|start|>functions.{{ last.name }} to=assistant<|channel|>commentary<|message|>
{{- m.content | tojson }}<|end|>
{%- elif m.tool_calls %}{% set call = m.tool_calls[0].function %}{% set last.name = call.name %}
{%- if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif -%}
<|start|>assistant to=functions.{{ call.name }}<|channel|>commentary json<|message|>
{{- call.arguments | tojson }}<|call|>
{%- elif m.role == 'assistant' %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>
{%- else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|start|>assistant{% endif %}"""

NO_TOOLS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}[assistant]"
UNKNOWN = HERMES.replace("<tool_call>", "<calls>").replace("</tool_call>", "</calls>")

MARKS = (
    *("<|im_start|>", "<|im_end|>", "<|tool_call_start|>", "<|tool_call_end|>", "<|tool_list_start|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"),
    *("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[INST]", "[/INST]"),
    *("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>", "<|return|>"),
)
"""Tokens that are special in those models' tokenizers."""
EOS_NAMES = ("<|im_end|>", "<|eot_id|>", "<|call|>", "<|return|>")
ADDED = ("<tool_call>", "</tool_call>", "<think>", "</think>")
"""Tokens that are added, and not special: answers show them."""
