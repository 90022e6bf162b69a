"""Answers in a given form: JSON schemas, regular expressions and grammars, judged by other readers than llguidance."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import tokenizers
from sinkrt import Scheduler, Session, UsageError
from sinkrt.allowed import FEW, Allowed
from sinkrt.answer import Answer, AnswerParams
from sinkrt.grammar import MAX_GRAMMAR_TOKENS, Grammar, GrammarCompiler, Matcher, grammar_of
from sinkrt.grammar.schema import MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH
from sinkrt.grammar.spec import MAX_GRAMMAR_CHARACTERS, MAX_NESTING
from sinkrt.grammar.tokens import TokenTable
from sinkrt.logit_rules import LogitParams
from sinkrt.sampler import Sampler, SamplingParams
from sinkrt.text import Tokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers

from tests.runtime.toy import EOS, VOCAB_SIZE, Toy, build_toy, toy_tokenizer
from tests.support import refused

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["a", "b", None, 2.5, ["\u00e9"]]},
        "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
        "tags": {"type": "array", "items": {"type": ["boolean", "null"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
CHAIN = {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(1000)} | {"1000": {"type": "null"}}
SCHEMAS = [
    PERSON,
    {"type": "array", "prefixItems": [{"const": "x\n"}, {"$ref": "#/$defs/n"}], "items": False, "minItems": 2}
    | {"$defs": {"n": {"type": "number", "minimum": -2, "maximum": 7.5}}},
    {"anyOf": [{"type": "string", "format": "date"}, {"type": "integer", "multipleOf": 7}]},
    {"oneOf": [{"type": "boolean"}, {"type": "string", "minLength": 2, "maxLength": 3}]},
    {"allOf": [{"properties": {"a": {"type": "integer", "minimum": 3}}, "required": ["a"]}]}
    | {"type": "object", "properties": {"a": {"maximum": 9}}, "additionalProperties": False},
    {"type": "object", "patternProperties": {"^x[0-9]$": {"type": "null"}}, "additionalProperties": False}
    | {"maxProperties": 2},
]


@pytest.fixture(scope="module")
def compiler() -> Iterator[GrammarCompiler]:
    made = GrammarCompiler(Tokenizer(toy_tokenizer(), None), VOCAB_SIZE)
    yield made
    made.close()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_toy(tmp_path_factory.mktemp("grammar") / "one", Toy(chunk_size=4))


def walk(matcher: Matcher, seed: int, most: int = 3000) -> list[int] | None:
    """Random tokens that a grammar allows, up to an end; white space seldom. None if there is no end in sight."""
    chance, ids = np.random.default_rng(seed), []
    while len(ids) < most:
        allowed = matcher.allowed()
        if allowed is None:
            return ids
        weights = allowed.mask.astype(float)
        weights[[9, 10, 13, 32]] *= 0.05
        weights[[EOS, ord('"')]] *= 4
        token = int(chance.choice(weights.size, p=weights / weights.sum()))
        if token == EOS:
            return ids
        matcher.take(token)
        ids.append(token)
    return None


def mask(matcher: Matcher) -> np.ndarray:
    allowed = matcher.allowed()
    assert allowed is not None
    return allowed.mask


def text_of(ids: list[int]) -> str:
    return bytes(ids).decode()


@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
def test_random_texts_are_valid(compiler: GrammarCompiler, schema: dict[str, Any]) -> None:
    judge = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    compiled = compiler.compile(Grammar.of_schema(schema))
    texts = set()
    for seed in range(25):
        ids = walk(compiled.matcher([EOS]), seed)
        assert ids is not None
        judge.validate(json.loads(text_of(ids)))
        texts.add(text_of(ids))
    assert len(texts) > 3


@pytest.mark.parametrize("regex", [r"[a-f]+(-\d{2}){1,2}", r"(yes|no)!?", "\u00e9{2}/\\w", r"a\n\[b", "x{3}"])
def test_regular_expressions_hold_as_a_whole(compiler: GrammarCompiler, regex: str) -> None:
    compiled = compiler.compile(Grammar.of_regex(regex))
    for seed in range(10):
        ids = walk(compiled.matcher([EOS]), seed)
        assert ids is not None and re.fullmatch(regex, text_of(ids)), ids


@pytest.mark.parametrize(
    "text",
    [
        'root ::= word (", " word)*\nword ::= [a-c]+ | "\\"x\\""\n',
        'start: word (", " word)*\nword: /[a-c]+/ | "\\"x\\""\n',
    ],
    ids=["GBNF", "Lark"],
)
def test_grammars(compiler: GrammarCompiler, text: str) -> None:
    compiled = compiler.compile(Grammar.of_text(text))
    for seed in range(10):
        ids = walk(compiled.matcher([EOS]), seed)
        assert ids is not None and re.fullmatch(r'([a-c]+|"x")(, ([a-c]+|"x"))*', text_of(ids))


def test_choices(compiler: GrammarCompiler) -> None:
    choices = ["yes", "no", 'a "quoted" one', "\u4e2d"]
    compiled = compiler.compile(Grammar.of_choices(choices))
    found = {text_of(walk(compiled.matcher([EOS]), seed) or []) for seed in range(40)}
    assert found == set(choices)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"not": {}}, 'Unimplemented keys: ["not"]'),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "contains": {}}, "contains"),
        ({"if": {}, "then": {"type": "null"}}, "if"),
        ({"type": "object", "propertyNames": {"maxLength": 3}}, "propertyNames"),
        ({"type": "string", "format": "nonsense"}, "Unknown format"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"$ref": "https://example.com/x"}, "example.com"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength"),
        ({"x-guidance": {"lenient": True}, "not": {}}, "Unimplemented"),
        ({"type": "object", "minProperties": 2}, "'minProperties' above the number of required ones"),
        ({"properties": {"a": {"type": "integer", "minimum": 1, "exclusiveMinimum": True}}}, "as in draft 4"),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, "'exclusiveMinimum' of numbers"),
        ({"exclusiveMaximum": 3}, "'exclusiveMaximum' of numbers"),
        ({"$ref": "#/$defs/0", "$defs": CHAIN}, "1001 references, expected at most 1000"),
        ({"anyOf": [{"disallow": "string"}]}, "draft 3"),
        ({"$schema": "http://json-schema.org/draft-03/schema#"}, "$schema"),
        ({"enum": []}, "Unsatisfiable"),
        (False, "not"),
        ("{", "text that is no JSON"),
        ("[]", "list"),
        ({"enum": [float("nan")]}, "values that are no JSON"),
        ({"enum": ["x" * MAX_SCHEMA_BYTES]}, "at most"),
    ],
)
def test_what_cannot_be_made_sure_is_refused(compiler: GrammarCompiler, schema: Any, words: str) -> None:
    with refused(words, error=UsageError):
        compiler.compile(Grammar.of_schema(schema))


def test_limits_of_size_and_depth(compiler: GrammarCompiler) -> None:
    deep: Any = {}
    for _ in range(MAX_SCHEMA_DEPTH):
        deep = {"type": "array", "items": deep}
    with refused("levels"):
        Grammar.of_schema(deep)
    with refused("JSON"):
        Grammar.of_schema('{"items":' * 100_000)
    for make in (Grammar.of_regex, Grammar.of_text):
        with refused("characters"):
            make("a" * (MAX_GRAMMAR_CHARACTERS + 1))
        with refused("deep"):
            make("(" * (MAX_NESTING + 1))
        with refused("nothing"):
            make(" ")
    for wrong in ([], [""], ["a", 1]):
        with refused("choice"):
            Grammar.of_choices(wrong)  # type: ignore[arg-type]
    with refused("json_schema and regex: received together"):
        grammar_of({}, "a")
    for bomb in (r"(a{1,1000}){1,1000}(b{1,1000}){1,1000}", r"(.{1,500}x){1,100}", "(a|b)*a(a|b){20}"):
        compiler.compile(Grammar.of_regex(bomb))  # quick, whatever it is
    with refused():
        compiler.compile(Grammar.of_schema({"type": "object", "properties": {f"k{i}": {} for i in range(5000)}}))
    assert grammar_of() is None


@pytest.mark.parametrize("text", ["start: x", "start: start", "root ::= (", "start: /[^\\s\\S]/", 'start: "a" @b'])
def test_grammars_that_are_none(compiler: GrammarCompiler, text: str) -> None:
    with refused("grammar: received", error=UsageError):
        compiler.compile(Grammar.of_text(text))


def test_a_grammar_that_takes_too_long_is_given_up() -> None:
    slow = GrammarCompiler(Tokenizer(toy_tokenizer(), None), VOCAB_SIZE, build_s=0)
    with refused("more than 0 s"):
        slow.compile(Grammar.of_schema({"enum": [f"value{i}" for i in range(9000)]}))
    slow.close()


def test_without_the_package_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with Session.load(bundle, threads=1) as session:
        assert "".join(session.generate("a", max_tokens=3, ignore_eos=True))
        with refused("pip install 'sinkexport[grammar]'"):
            session.generate("a", regex="b")
        assert session.position[0] == 4


# --- tokenizers ------------------------------------------------------------------------------------------------------


def sentencepiece_like() -> tokenizers.Tokenizer:
    """A vocabulary that puts a space before every text, writes spaces as U+2581 and other characters as bytes."""
    pieces = [
        "<unk>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "\u2581",
        *'abcxyz{}":,[]0123456789',
        "\u2581a",
        "\u2581{",
    ]
    made = tokenizers.Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    return made


def test_tokens_with_byte_fallback_and_a_space_before_each_text() -> None:
    library = sentencepiece_like()
    tokenizer, size = Tokenizer(library, None), library.get_vocab_size()
    compiler = GrammarCompiler(tokenizer, size + 3)  # some models have more rows than tokens
    schema = {"type": "object", "properties": {"ab": {"const": "\u00e9 x"}, "c": {"type": "integer", "maximum": 9}}}
    compiled = compiler.compile(Grammar.of_schema({**schema, "required": ["ab", "c"], "additionalProperties": False}))
    chance = np.random.default_rng(0)
    for _ in range(5):
        matcher, ids = compiled.matcher([]), []
        while (allowed := matcher.allowed()) is not None:
            assert not allowed.mask[size:].any()
            ids.append(int(chance.choice(np.flatnonzero(allowed.mask))))
            matcher.take(ids[-1])
        decoder = tokenizer.streaming_decoder(tokenizer.encode("a"))
        found = json.loads("".join(map(decoder.push, ids)) + decoder.flush())
        assert found["ab"] == "\u00e9 x" and found["c"] <= 9
    compiler.close()


def test_control_tokens_are_never_text() -> None:
    library = toy_tokenizer()
    table = TokenTable(Tokenizer(library, None), VOCAB_SIZE)
    name = library.id_to_token(EOS)
    assert EOS in table.special_token_ids and EOS not in table(name)
    assert bytes(table(name)).decode() == name
    assert table(b"\xff\xfe") == [0xFF, 0xFE]


def test_tokenizers_whose_tokens_are_not_pieces_of_text_are_refused() -> None:
    words = [*(chr(c) for c in range(32, 127)), "<pad>", "|"]
    made = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="?"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Split("", "isolated"), decoders.CTC()  # "ll" is "l"
    with refused("tokenizer", error=UsageError):
        GrammarCompiler(Tokenizer(made, None), len(words)).compile(Grammar.of_regex("a"))


# --- matchers --------------------------------------------------------------------------------------------------------


def test_a_matcher_rolls_back_and_judges_drafts(compiler: GrammarCompiler) -> None:
    compiled = compiler.compile(Grammar.of_regex("ab(cd|ce)f"))
    matcher = compiled.matcher([EOS])
    assert matcher.num_allowed(list(b"abcx")) == 3 and matcher.num_tokens == 0
    for token in b"abcd":
        matcher.take(token)
    assert list(np.flatnonzero(mask(matcher))) == [ord("f")]
    matcher.rollback(2)
    assert list(np.flatnonzero(mask(matcher))) == [ord("c")]
    assert matcher.num_allowed(list(b"cefz")) == 3
    for token in b"cef":
        matcher.take(token)
    assert matcher.is_over and matcher.allowed() is None
    matcher.rollback(1)
    assert not matcher.is_over
    matcher.rollback(matcher.num_tokens)
    assert list(np.flatnonzero(mask(matcher))) == [ord("a")]
    with pytest.raises(ValueError, match="taken back"):
        matcher.rollback(1)


def test_masks_come_from_the_thread(compiler: GrammarCompiler) -> None:
    """`take` waits for nothing, and what is asked for waits for the thread."""
    gate, thread = threading.Event(), ThreadPoolExecutor(1)
    thread.submit(gate.wait)
    matcher = Matcher(compiler.compile(Grammar.of_regex("ab")).matcher([]).__class__, 1, [], thread)
    matcher.take(97)
    assert matcher.num_tokens == 1
    gate.set()
    with pytest.raises(TypeError):  # what the thread raises
        matcher.allowed()
    thread.shutdown()


def test_ends_are_allowed_where_the_text_may_end(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(Grammar.of_regex("ab*")).matcher([EOS])
    assert not mask(matcher)[EOS]
    matcher.take(ord("a"))
    assert set(np.flatnonzero(mask(matcher))) == {ord("b"), EOS}


def test_a_grammar_is_built_once(compiler: GrammarCompiler) -> None:
    assert compiler.compile(Grammar.of_regex("q+")) is compiler.compile(Grammar.of_regex("q+"))


def test_the_mask_is_the_last_change_of_the_logits() -> None:
    logits = np.array([3.0, 2.0, 1.0, 0.5], dtype=np.float32)
    allowed = Allowed(np.packbits([0, 1, 1, 0] + [0] * 28, bitorder="little"), 4)
    assert Sampler(SamplingParams(), 4).sample(logits, np.array([1]), 0, allowed) == 1
    penalized = SamplingParams(repetition_penalty=10.0)
    assert Sampler(penalized, 4).sample(logits, np.array([1]), 0, allowed) == 2
    drawn = {
        Sampler(SamplingParams(1.0, top_k=3, top_p=0.9, seed=s), 4).sample(logits, NONE, 0, allowed) for s in range(50)
    }
    assert drawn == {1, 2}
    assert logits.tolist() == [3.0, 2.0, 1.0, 0.5]


NONE = np.zeros(0, dtype=np.int64)


@pytest.mark.parametrize("count", [1, 7, FEW, FEW + 1, 3000])
def test_few_and_many_allowed_tokens_are_picked_alike(count: int) -> None:
    size = 3001
    chance = np.random.default_rng(count)
    bits = np.zeros(3008, dtype=np.uint8)
    bits[chance.choice(size, count, replace=False)] = 1
    allowed = Allowed(np.packbits(bits, bitorder="little"), size)
    assert (allowed.ids is None) == (count > FEW) and np.array_equal(allowed.mask, bits[:size] > 0)
    logits = chance.normal(size=size).astype(np.float32)
    forbidden = np.where(allowed.mask, logits, np.float32(-1e30))
    for params in (SamplingParams(), SamplingParams(1.3, 50, 0.9, 1.2, 5), SamplingParams(0.7, seed=2)):
        recent = chance.integers(0, size, 20)
        for position in range(5):
            picked = Sampler(params, size).sample(logits, recent, position, allowed)
            assert picked == Sampler(params, size).sample(forbidden, recent, position)
            assert allowed.mask[picked]


# --- sessions and schedulers -----------------------------------------------------------------------------------------


def test_generate(bundle: Path) -> None:
    judge = jsonschema.Draft202012Validator(PERSON)
    with Session.load(bundle, threads=1) as session:
        for seed in range(3):
            for schema in (PERSON, json.dumps(PERSON)):
                text = "".join(session.generate("hi", json_schema=schema, temperature=1.0, seed=seed, max_tokens=3000))
                judge.validate(json.loads(text))
        assert re.fullmatch("[x-z]{3}", "".join(session.generate("hi", regex="[x-z]{3}", ignore_eos=True)))
        assert "".join(session.generate("hi", grammar='root ::= "a" [b] "c"')) == "abc"
        assert "".join(session.generate("hi", regex="abcdef", max_tokens=3)) == "abc"
        assert "".join(session.generate("hi", regex="abcdef", stop="de")) == "abc"
        before = session.position[0]
        with refused("regex"):
            session.generate("hi", regex="(")
        assert session.position[0] == before
        "".join(session.generate(None, regex="ab"))  # goes on with a new form
        assert session.position[0] == before + 2


def test_each_stream_has_its_own_matcher_with_penalties_and_log_probabilities(tmp_path: Path) -> None:
    with Session.load(build_toy(tmp_path / "three", Toy(batch=3, chunk_size=4)), threads=1) as session:
        scheduler = Scheduler(session)
        forms = {"a": "[ab]{40}", "b": r"\{(c|d){30}\}", "c": "e{5}", "d": "f{9}g"}
        for name, regex in forms.items():
            params = AnswerParams(
                100,
                ignore_eos=True,
                logits=LogitParams(0.5, 0.5, top_logprobs=2),
                grammar=session.grammars.compile(Grammar.of_regex(regex)),
            )
            scheduler.submit(name, list(b"hello there " + name.encode()), SamplingParams(1.2, seed=3), params)
        texts, logprobs, ends = dict.fromkeys(forms, ""), dict.fromkeys(forms, 0), {}
        while scheduler.has_work:
            for event in scheduler.step():
                texts[event.conversation] += event.text
                logprobs[event.conversation] += len(event.logprobs)
                ends[event.conversation] = event.finish_reason
        for name, regex in forms.items():
            assert re.fullmatch(regex, texts[name]), (regex, texts[name])
            assert logprobs[name] == len(texts[name]) and ends[name] == "stop"


def test_an_answer_under_a_grammar_has_an_end(bundle: Path) -> None:
    assert MAX_GRAMMAR_TOKENS == 65536
    with Session.load(bundle, threads=1) as session:
        assert len("".join(session.generate("hi", regex="a*b", ignore_eos=True, temperature=0, max_tokens=20))) <= 20
        short = GrammarCompiler(session.tokenizer, VOCAB_SIZE, max_tokens=50)
        params = AnswerParams(grammar=short.compile(Grammar.of_regex("a{60,}")))
        answer = Answer(session.tokenizer, [EOS], VOCAB_SIZE, SamplingParams(), params)
        logits = np.zeros(VOCAB_SIZE, dtype=np.float32)
        while answer.finish_reason is None:
            token = answer.pick(logits, NONE, answer.num_tokens)
            assert token == ord("a")
            answer.push(token)
        assert (answer.num_tokens, answer.finish_reason) == (50, "length")
        short.close()


def test_a_token_that_was_never_fed_does_not_count(bundle: Path) -> None:
    with Session.load(bundle, threads=1) as session:
        params = AnswerParams(grammar=session.grammars.compile(Grammar.of_regex("abc")))
        answer = Answer(session.tokenizer, [EOS], VOCAB_SIZE, SamplingParams(), params)
        logits = np.zeros(VOCAB_SIZE, dtype=np.float32)
        for expected in b"abc":
            for _ in range(3):  # an error between picking and feeding, twice
                assert answer.pick(logits, NONE, 0) == expected
            answer.push(expected)
        assert answer.finish_reason == "stop"


def test_no_thread_is_left(bundle: Path) -> None:
    before = set(threading.enumerate())
    with Session.load(bundle, threads=1) as session:
        "".join(session.generate("hi", regex="ab"))
    end = time.monotonic() + 10
    while any(thread.name.startswith("sinkrt-grammar") for thread in set(threading.enumerate()) - before):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_long_chains_of_rules_and_references_do_not_end_the_process(compiler: GrammarCompiler) -> None:
    rules = "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(6000)) + 'r6000: "a"\n'
    compiler.compile(Grammar.of_text(rules))
    arrays = {str(i): {"type": "array", "items": {"$ref": f"#/$defs/{i + 1}"}} for i in range(999)}
    with contextlib.suppress(UsageError):  # or one that takes too much
        compiler.compile(Grammar.of_schema({"$ref": "#/$defs/0", "$defs": {**arrays, "999": {"type": "null"}}}))


def test_a_grammar_is_built_anew_after_many_tokens() -> None:
    compiler = GrammarCompiler(Tokenizer(toy_tokenizer(), None), VOCAB_SIZE, renewal_tokens=5)
    grammar = Grammar.of_regex("[a-z]*")
    first = compiler.compile(grammar)
    matcher = first.matcher([])
    for _ in range(5):
        assert compiler.compile(grammar) is first
        matcher.take(ord("a"))
    assert compiler.compile(grammar) is not first
    matcher.take(ord("a"))
    assert matcher.allowed() is not None, "answers that have begun go on"
    compiler.close()
