"""``sinkexport run --json-schema, --regex, --grammar``: answers in a form, and refusals in one line."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.runtime.toy import Toy, build_toy
from tests.support import run_cli

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 99}}, "required": ["a"]} | {
    "additionalProperties": False
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_toy(tmp_path_factory.mktemp("form") / "toy", Toy(chunk_size=4))


@pytest.fixture
def schema(tmp_path: Path) -> Path:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA), encoding="utf-8")
    return file


def run(bundle: Path, *options: object, **more: Any) -> Any:
    return run_cli("run", bundle, "--temperature", 1, "--seed", 1, "--max-tokens", 999, *options, **more)


def test_answers_in_a_form(bundle: Path, schema: Path, tmp_path: Path) -> None:
    text = run(bundle, "--prompt", "hi", "--json-schema", schema).succeeded().out
    jsonschema.validate(json.loads(text), SCHEMA)
    assert re.fullmatch("[a-c]{4}\n", run(bundle, "--prompt", "hi", "--regex", "[a-c]{4}").succeeded().out)
    grammar = tmp_path / "g.gbnf"
    grammar.write_text('root ::= "x" [0-9] "y"\n', encoding="utf-8")
    assert re.fullmatch("x[0-9]y\n", run(bundle, "--prompt", "hi", "--grammar", grammar).succeeded().out)
    said = run(bundle, "--chat", "--regex", "[xy]{2}", stdin=b"one\ntwo\n").succeeded().out
    assert re.fullmatch("([xy]{2}\n){2}", said)


def test_bad_forms_are_refused_before_any_text_is_read(bundle: Path, schema: Path, tmp_path: Path) -> None:
    run(bundle, "--prompt", "x", "--regex", "(").refusal("unclosed group")
    run(bundle, "--prompt", "x", "--regex", "").refusal("regex: received nothing")
    run(bundle, "--prompt", "x", "--regex", "a", "--json-schema", schema).refusal("json_schema and regex")
    run(bundle, "--prompt", "x", "--json-schema", tmp_path / "none").refusal("No such file", "check the path")
    run(bundle, "--prompt", "x", "--grammar", tmp_path).refusal("expected a text file")
    schema.write_bytes(b"\xff")
    run(bundle, "--prompt", "x", "--json-schema", schema).refusal("no UTF-8")
    schema.write_bytes(b" " * (2**20 + 1))
    run(bundle, "--prompt", "x", "--json-schema", schema).refusal("make it smaller")
    schema.write_text('{"not": {}}', encoding="utf-8")
    run(bundle, "--json-schema", schema).refusal("Unimplemented keys")
    state = tmp_path / "s"
    run(bundle, "--prompt", "x", "--save-state", state).succeeded()
    run(bundle, "--resume", "--load-state", state, "--regex", "a").refusal("--resume", "leave out")


def test_without_the_package(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    run(bundle, "--prompt", "x", "--regex", "a").refusal("pip install 'sinkexport[grammar]'")
    run(bundle, "--prompt", "x").succeeded()
