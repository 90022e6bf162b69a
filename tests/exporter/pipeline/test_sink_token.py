"""A sink token of the model's own: every text and every conversation of the bundle begins with it, and it is pinned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sinkexport.config import ExportConfig
from sinkexport.loading.tokenizers.source_tokenizer import SourceTokenizer
from sinkexport.pipeline.export import export_loaded
from sinkexport.sources import LoadedModel
from sinkrt import Session, UsageError

from tests.exporter.tiny_models import tiny_model
from tests.runtime.toy import CHAT_TEMPLATE, toy_tokenizer

TOKEN = "<|sink|>"


def loaded(*, has_token: bool = True) -> LoadedModel:
    plain = toy_tokenizer()
    if has_token:
        plain.add_special_tokens([TOKEN])
    tokenizer = SourceTokenizer("toy", plain, CHAT_TEMPLATE, {"bos_token": "<bos>", "eos_token": "<eos>"})
    return LoadedModel(tiny_model("llama", vocab_size=tokenizer.num_tokens), tokenizer, "tiny")


@pytest.mark.parametrize("asked", [TOKEN, "auto"])
def test_everything_begins_with_it(asked: str, tmp_path: Path) -> None:
    model = loaded()
    config = ExportConfig(num_sink_tokens=1, window_size=8, chunk_size=1, sink_token=asked)
    export_loaded(model, tmp_path / "bundle", config)
    assert model.tokenizer is not None
    number = model.tokenizer.token_id(TOKEN)
    with Session.load(tmp_path / "bundle", threads=1) as session:
        tokenizer = session.tokenizer
        without = model.tokenizer.encode("Hello")
        assert tokenizer.encode("Hello") == [number, *without]
        assert number not in tokenizer.encode_next("Hello")  # inside a stream it does not come again
        chat = tokenizer.encode(tokenizer.render_chat([{"role": "user", "content": "Hi"}]), special=False)
        assert chat[0] == number
        assert number not in chat[1:]
        assert number not in tokenizer.encode(tokenizer.render_next_turn("More"), special=False)
        assert tokenizer.decode([number, *without]) == tokenizer.decode(without)
        session.prefill(tokenizer.encode("Hello"))
        first = session.buffers["sink_k.0"].copy()
        session.prefill(np.arange(3, 40))
        np.testing.assert_array_equal(session.buffers["sink_k.0"], first)
    assert model.tokenizer.encode("Hello") == without  # the model's own tokenizer is left as it was


@pytest.mark.parametrize(
    ("asked", "has_token", "reason"),
    [("auto", False, "0 added tokens"), ("<nothing>", True, "a token of the model's vocabulary")],
)
def test_tokens_that_are_not_there(asked: str, has_token: bool, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"--sink-token: received .*{reason}"):
        export_loaded(loaded(has_token=has_token), tmp_path / "bundle", ExportConfig(1, 8, sink_token=asked))
    ids_only = LoadedModel(tiny_model("llama"), None, "x")
    with pytest.raises(UsageError, match="tokenizer"):
        export_loaded(ids_only, tmp_path / "bundle", ExportConfig(1, 8, sink_token=asked))


def test_without_sinks_nothing_would_keep_it() -> None:
    with pytest.raises(UsageError, match="--sink-tokens 1"):
        ExportConfig(0, 8, sink_token=TOKEN)
