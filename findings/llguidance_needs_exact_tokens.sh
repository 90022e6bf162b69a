#!/usr/bin/env bash
# llguidance 1.9.1: a tokenizer that puts a space before every text makes its own grammar impossible.
#
# Expected: text that a grammar forces is cut into tokens of just these bytes, or the tokenizer is refused.
# Happens:  llguidance encodes ',' with the given function, gets the token ' ,' (as SentencePiece tokenizers do), and either
#           allows that token and then refuses it, or panics: "range start index 18446744073709551615 out of range".
# Matters:  `LLTokenizer(TokenizerWrapper(...))` over a Llama 2 kind of tokenizer fails in the middle of answers; what the
#           function returns must be checked against the bytes by whoever writes it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --quiet --disable-pip-version-check llguidance==1.9.1
cat > "$work/see.py" <<'PYTHON'
import llguidance

TOKENS = [bytes([i]) for i in range(256)] + [b" " + bytes([i]) for i in range(33, 127)] + [b"<eos>"]
SPACED = {token: i for i, token in enumerate(TOKENS)}


class Spaced:
    """Encodes as SentencePiece does: a text begins with a space."""

    tokens, eos_token_id, bos_token_id, special_token_ids = TOKENS, len(TOKENS) - 1, None, [len(TOKENS) - 1]

    def __call__(self, text):
        return [SPACED[b" " + text[:1]], *text[1:]] if text[:1] > b" " else list(text)


class Exact(Spaced):
    def __call__(self, text):
        return list(text)


def walk(kind):
    """The tokens that a grammar itself allows, taken one by one; returns the error, if there is one."""
    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(kind()), n_vocab=len(TOKENS))
    limits = llguidance.LLParserLimits(verbose_errors=False)
    schema = {"type": "object", "properties": {"name": {"const": "x"}}, "required": ["name"], "additionalProperties": False}
    schema["x-guidance"] = {"whitespace_flexible": False}
    matcher = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_json_schema(schema), log_level=0, limits=limits)
    while not matcher.is_stopped():
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        if matcher.is_error() or not mask:
            break
        matcher.consume_token((mask & -mask).bit_length() - 1)
    return matcher.get_error().splitlines()[0] if matcher.is_error() else ""


found = {kind.__name__: walk(kind) for kind in (Exact, Spaced)}
for name, error in found.items():
    print(f"{name}: {error or 'a whole answer'}")
raise SystemExit(bool(found["Exact"]) or not found["Spaced"])
PYTHON
"$work/venv/bin/python" "$work/see.py" 2> "$work/log" || { cat "$work/log" >&2; exit 1; }
