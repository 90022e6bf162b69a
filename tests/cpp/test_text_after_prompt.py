"""Answers in text begin where the prompt ends: the space of their first word is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from sinkrt import Session

from tests.cpp.build import CppRuntime
from tests.cpp.tokenizer_kinds import LLAMA_DECODER, added, replace, sequence, whole
from tests.runtime.toy import VOCAB_SIZE, Toy, build_toy, rehash


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A toy whose tokens are single characters, words with a mark before them, and bytes."""
    folder = build_toy(tmp_path / "toy", Toy(chunk_size=4), chat=False)
    texts = ["<unk>", "<s>", "▁", *"abcdefghij", *(f"<0x{byte:02X}>" for byte in (0xC3, 0xA9, 0x41))]
    texts += [f"▁{a}{b}" for a in "abcdefghijklmnop" for b in "abcdefghijklmnopq"][: VOCAB_SIZE - len(texts)]
    model = {
        "type": "BPE",
        "vocab": {text: i for i, text in enumerate(texts)},
        "merges": [],
        "unk_token": "<unk>",
        "byte_fallback": True,
        "fuse_unk": True,
        "ignore_merges": True,
    }
    normalizer = sequence("normalizers", {"type": "Prepend", "prepend": "▁"}, replace(" ", "▁"))
    raw = whole(model, normalizer=normalizer, decoder=LLAMA_DECODER, added_tokens=[added("<s>", 1, special=True)])
    (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    rehash(folder)
    return folder


def test_answers_go_on_after_the_prompt(cpp_runtime: CppRuntime, bundle: Path, tmp_path: Path) -> None:
    library = tokenizers.Tokenizer.from_file(str(bundle / "tokenizer.json"))
    state, run = tmp_path / "state", [cpp_runtime.generate, bundle, "--ignore-eos", "--threads", "1"]
    for prompt in ("ab", "ab a", "a<s>", "b\u00e9"):
        ids = library.encode(prompt).ids
        with Session.load(bundle, threads=1) as session:
            session.prefill(ids)
            answer: list[int] = []
            for _ in range(20):
                answer.append(int(session.logits[0].argmax()))
                session.step(answer[-1:])
        done = cpp_runtime.run(*run, "--prompt", prompt, "--max-tokens", "12", "--save-state", state)
        assert done.returncode == 0, done.stderr
        shown = library.decode(ids + answer[:12])[len(library.decode(ids)) :]
        assert done.stdout == shown + "\n"
        # What the answer showed is not shown again, and its last word is not the first of a text.
        done = cpp_runtime.run(*run, "--load-state", state, "--max-tokens", "8")
        assert done.stdout == library.decode(ids + answer)[len(library.decode(ids + answer[:12])) :] + "\n"
