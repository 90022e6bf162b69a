"""POST /tokenize and /detokenize: the ids that the model would get, in the forms of vLLM and llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sinkexport.serve.settings import Limits

from tests.exporter.serve.serving import Alone, Served, alone, chat_ids, many_bundle, serving, user
from tests.runtime.toy import BOS, EOS

__all__ = ["alone", "many_bundle"]  # fixtures


@pytest.fixture(scope="module")
def served(many_bundle: Path) -> Iterator[Served]:
    with serving(many_bundle, Limits(max_prompt_tokens=2000, grace_s=0)) as served:
        yield served


def post(served: Served, path: str, body: dict[str, Any], status: int = 200) -> dict[str, Any]:
    response = httpx.post(served.url + path, json=body)
    assert response.status_code == status, response.text
    return dict(response.json())


def test_ids_are_those_of_a_prompt(served: Served, alone: Alone) -> None:
    for text in ("hé", "", " a<eos>b\n"):
        answer = post(served, "/tokenize", {"model": "toy", "prompt": text})
        assert answer == {
            "tokens": alone.tokenizer.prompt_ids(text),
            "count": len(answer["tokens"]),
            "max_model_len": 2000,
        }
        assert post(served, "/tokenize", {"content": text})["tokens"] == alone.tokenizer.prompt_ids(text, begun=True)
    messages = [{"role": "system", "content": "x"}, user("hi")]
    assert post(served, "/tokenize", {"messages": messages})["tokens"] == chat_ids(alone.tokenizer, messages)
    whole_body = {"messages": messages, "max_tokens": 5, "stream": True, "enable_thinking": None, "min_p": 0.1}
    assert post(served, "/tokenize", whole_body)["tokens"] == chat_ids(alone.tokenizer, messages)
    with_text = post(served, "/tokenize", {"prompt": "hé", "return_token_strs": True, "add_special_tokens": False})
    assert with_text["token_strs"] == ["h", "\ufffd", "\ufffd"]


def test_texts_become_no_control_tokens_unless_asked(served: Served) -> None:
    body = {"prompt": "a<eos>b"}
    assert EOS not in post(served, "/tokenize", body)["tokens"]
    assert EOS in post(served, "/tokenize", {**body, "allow_special": True})["tokens"]
    chat = {"messages": [user("<eos><bos>")]}
    assert post(served, "/tokenize", chat)["tokens"].count(EOS) == 1
    assert post(served, "/tokenize", {**chat, "allow_special": True})["tokens"].count(EOS) == 2


def test_texts_of_ids(served: Served) -> None:
    text = post(served, "/detokenize", {"tokens": [BOS, *"hé".encode(), EOS]})
    assert text == {"prompt": "<bos>hé<eos>", "content": "<bos>hé<eos>"}
    assert post(served, "/detokenize", {"tokens": [], "frobnicate": 1})["prompt"] == ""
    assert post(served, "/detokenize", {"tokens": [2**31 - 1, 65]})["prompt"] == "A"


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/tokenize", {}, "prompt: received nothing, expected one of prompt, content and messages"),
        ("/tokenize", {"prompt": "a", "content": "b"}, "prompt: received prompt and content, expected one of"),
        ("/tokenize", {"prompt": 5}, "prompt: received 5, expected a text"),
        ("/tokenize", {"messages": []}, "messages: received an empty list, expected a list of messages"),
        ("/tokenize", {"messages": [{"role": "function", "content": "x"}]}, "messages.0.role: received"),
        (
            "/tokenize",
            {"content": "a", "add_special": True},
            "add_special: llama.cpp's options are not implemented here",
        ),
        ("/tokenize", {"messages": [user("a")], "tools": [{}]}, "tools.0.type: received nothing, expected"),
        ("/detokenize", {}, "tokens: received nothing, expected a list of token ids"),
        ("/detokenize", {"tokens": [-1]}, "tokens: received -1 among the ids"),
        ("/detokenize", {"tokens": ["a"]}, 'tokens: received "a" among the ids'),
    ],
)
def test_refusals(served: Served, path: str, body: dict[str, Any], words: str) -> None:
    assert words in post(served, path, body, 400)["error"]["message"]


def test_other_models_are_unknown(served: Served) -> None:
    assert post(served, "/tokenize", {"prompt": "a", "model": "x"}, 404)["error"]["code"] == "model_not_found"
    assert post(served, "/detokenize", {"tokens": [], "model": "x"}, 404)["error"]["code"] == "model_not_found"
