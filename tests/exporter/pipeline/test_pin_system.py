"""A system message that the sinks cover: counted at export as the runtime counts it, and never forgotten."""

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
from tests.support import export_model

SYSTEM = "Be brief."


def tokenizer(template: str | None = CHAT_TEMPLATE) -> SourceTokenizer:
    return SourceTokenizer("toy", toy_tokenizer(), template, {"bos_token": "<bos>", "eos_token": "<eos>"})


def test_sinks_grow_to_the_message_and_its_frame(tmp_path: Path) -> None:
    config = ExportConfig(num_sink_tokens=4, window_size=12, chunk_size=4, pin_system=SYSTEM)
    model = tiny_model("llama", vocab_size=258)
    export_model(model, tmp_path / "bundle", config, tokenizer=tokenizer())
    with Session.load(tmp_path / "bundle", threads=1) as session:
        rendered = f"[system]{SYSTEM}<eos>\n[user]"
        assert session.num_sink_tokens == len(session.tokenizer.encode(rendered, special=False))
        session.require_pinned(SYSTEM)
        with pytest.raises(UsageError, match=f"--sink-tokens {session.num_sink_tokens + 3}"):
            session.require_pinned(SYSTEM + " Or")
        # What is pinned is what the chat begins with: its keys stay where they were forever.
        chat = session.tokenizer.render_chat(
            [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Hello"}]
        )
        ids = session.tokenizer.encode(chat, special=False)
        session.prefill(ids)
        sinks = session.buffers["sink_k.0"].copy()
        session.prefill(np.random.default_rng(0).integers(3, 258, 6 * 12))
        np.testing.assert_array_equal(session.buffers["sink_k.0"], sinks)
        assert np.abs(sinks).sum(axis=(0, 1, 3)).all()  # every sink holds a token


def test_more_sinks_stay_more(tmp_path: Path) -> None:
    config = ExportConfig(num_sink_tokens=40, window_size=4, chunk_size=1, pin_system=SYSTEM)
    loaded = LoadedModel(tiny_model("llama", vocab_size=258), tokenizer(), "tiny")
    manifest = export_loaded(loaded, tmp_path / "bundle", config)
    assert manifest.stream.num_sink_tokens == 40


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_a_model_without_a_chat_template_is_refused(tmp_path: Path, with_tokenizer: bool) -> None:
    loaded = LoadedModel(tiny_model("llama", vocab_size=258), tokenizer(None) if with_tokenizer else None, "tiny")
    with pytest.raises(UsageError, match="--pin-system: received a model without a chat template"):
        export_loaded(loaded, tmp_path / "bundle", ExportConfig(pin_system=SYSTEM))
    assert not list(tmp_path.iterdir())
