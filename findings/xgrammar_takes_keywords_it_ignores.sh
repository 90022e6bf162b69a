#!/usr/bin/env bash
# XGrammar 0.2.9: schemas with uniqueItems, not, contains and dependentRequired compile, and what they forbid is let through.
#
# Expected: a schema that cannot be followed is refused, or a warning says what is left out.
# Happens:  `compile_json_schema` returns a grammar without an error or a warning that accepts `[1,1]` for uniqueItems.
# Matters:  "guaranteed" structured output that breaks the schema; llguidance 1.9.1 refuses each of them by name.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --quiet --disable-pip-version-check torch transformers llguidance==1.9.1 xgrammar==0.2.9
cat > "$work/see.py" <<'PYTHON'
import json

import llguidance
import xgrammar

CASES = [
    ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, "[1,1]"),
    ({"not": {"type": "string"}}, '"x"'),
    ({"type": "array", "items": {"type": "integer"}, "contains": {"const": 5}}, "[1]"),
    ({"type": "object", "properties": {"a": {"type": "integer"}}, "dependentRequired": {"a": ["b"]}}, '{"a":1}'),
]
tokens = [bytes([i]) for i in range(256)] + [b"<eos>"]
info = xgrammar.TokenizerInfo(tokens, xgrammar.VocabType.RAW, vocab_size=257, stop_token_ids=[256])
compiler = xgrammar.GrammarCompiler(info, max_threads=1)
seen = []
for schema, wrong in CASES:
    compact = compiler.compile_json_schema(json.dumps(schema), any_whitespace=True)
    matcher = xgrammar.GrammarMatcher(compact)
    taken = all(matcher.accept_token(byte) for byte in wrong.encode()) and matcher.accept_token(256)
    text = llguidance.LLMatcher.grammar_from_json_schema(schema)
    is_error, messages = llguidance.LLMatcher.validate_grammar_with_warnings(text)
    print(f"{json.dumps(schema)}: XGrammar takes {wrong}: {taken}; llguidance: {messages[0] if is_error else 'takes it'}")
    seen.append(taken and is_error)
raise SystemExit(not all(seen))
PYTHON
"$work/venv/bin/python" "$work/see.py" 2> "$work/log" || { cat "$work/log" >&2; exit 1; }
