"""Chats end: every id that closes a turn is in the manifest, whoever names it, and none that nobody names."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from sinkexport.config import ExportConfig
from sinkexport.loading.tokenizers.source_tokenizer import SourceTokenizer
from sinkexport.loading.tokenizers.turn_ends import beginning_id, end_ids
from sinkexport.pipeline.export import export, export_loaded
from sinkexport.sources import LoadedModel
from sinkrt import Session, UsageError

from tests.exporter.tiny_models import tiny_model
from tests.fidelity.tokenizer_folders import byte_level, write_folder
from tests.support import export_model, run_cli

ROWS = 420
CONFIG = ExportConfig(2, 8, chunk_size=1)
TOKENS = (
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|end|>",
    "<|endoftext|>",
    "<end_of_turn>",
    "<|user|>",
)
LOOP = "{% for m in messages %}"
CHATML = LOOP + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
PHI3 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role != 'system' %}"
    "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>"),
    "llama 3": (LOOP + "<|eot_id|>{{ m.role }}\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}", "<|eot_id|>"),
    "phi 3": (PHI3, "<|end|>"),
    "gemma": (LOOP + "{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}", "<end_of_turn>"),
    "llama 2": (
        LOOP + "{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}",
        "</s>",
    ),
    "no close": (LOOP + "{{ m.role }}: {{ m.content }}\n{% endfor %}", None),
    "text after it": (LOOP + "{{ m.content }} done<|end|>{% endfor %}", None),
    "history left out": ("{{ messages[0].content }}<|end|>", None),
    "users alone": (
        LOOP + "{% if m.role != 'user' %}{{ raise_exception('no') }}{% endif %}{{ m.content }}<|end|>{% endfor %}",
        None,
    ),
    "the last answer open": (LOOP + "{{ m.content }}{% if not loop.last %}<|end|>{% endif %}{% endfor %}", None),
}


def tokenizer(template: str | None = None, **fields: Any) -> SourceTokenizer:
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    return SourceTokenizer("test", byte_level(special=TOKENS), template, named, **fields)


def number(text: str) -> int:
    return TOKENS.index(text)


def model(**changes: Any) -> Any:
    return tiny_model("llama", vocab_size=ROWS, **changes)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_s_own_end(name: str) -> None:
    template, end = TEMPLATES[name]
    assert tokenizer(template).template_end == (None if end is None else number(end))


def test_the_union_of_all_who_name_one(tmp_path: Path) -> None:
    net = model(eos_token_id=[7, 410])
    net.generation_config = transformers.GenerationConfig(eos_token_id=[411, number("<|endoftext|>")])
    loaded = LoadedModel(net, tokenizer(TEMPLATES["phi 3"][0], declared_end_ids=(412,)), "tiny")
    manifest = export_loaded(loaded, tmp_path / "bundle", CONFIG)
    want = sorted({7, 410, 411, 412, number("<|endoftext|>"), number("<|end|>"), number("</s>")})
    assert list(manifest.model.eos_token_ids) == want


def test_a_phi_3_chat_ends(tmp_path: Path) -> None:
    """Its config and tokenizer name <|endoftext|>, its answers close with <|end|>."""
    own = dataclasses.replace(
        tokenizer(TEMPLATES["phi 3"][0]), special_tokens={"bos_token": "<s>", "eos_token": "<|endoftext|>"}
    )
    net = model(eos_token_id=number("<|endoftext|>"))
    prompt = own.encode("<s><|user|>\nHi<|end|>\n<|assistant|>\n", special=False)
    with torch.no_grad():  # the likeliest token after the prompt is <|end|>, by far
        last = net.model(torch.tensor([prompt])).last_hidden_state[0, -1]
        net.lm_head.weight[number("<|end|>")] = 10 * last
    manifest = export_model(net, tmp_path / "bundle", CONFIG, tokenizer=own).manifest
    assert manifest.model.eos_token_ids == (number("<|end|>"), number("<|endoftext|>"))
    with Session.load(tmp_path / "bundle", threads=1) as session:
        chat = session.tokenizer.render_chat([{"role": "user", "content": "Hi"}])
        ids = session.tokenizer.encode(chat, special=False)
        assert ids == prompt
        assert "".join(session.generate(ids, max_tokens=5, temperature=0)) == ""
        assert session.position <= len(ids) + 1  # one token of an answer, and it ends the turn


def test_a_folder_with_a_list_in_generation_config(tmp_path: Path) -> None:
    folder = write_folder(
        tmp_path / "model", byte_level(special=TOKENS), {"eos_token": "</s>", "chat_template": CHATML}
    )
    net = model(eos_token_id=2)
    net.generation_config = transformers.GenerationConfig(eos_token_id=[4, 5])
    net.save_pretrained(folder)
    manifest = export(str(folder), tmp_path / "bundle", CONFIG)
    assert manifest.model.eos_token_ids == (1, 2, 3, 4, 5)  # </s>, config.json, <|im_end|> of the template, the list


def test_none_is_invented(tmp_path: Path) -> None:
    net = model(eos_token_id=None, bos_token_id=None)
    plain = SourceTokenizer("test", byte_level(special=TOKENS))
    manifest = export_model(net, tmp_path / "bundle", CONFIG, tokenizer=plain).manifest
    assert manifest.model.eos_token_ids == ()
    assert manifest.model.bos_token_id is None
    # GPT-J's class fills in 50256, which a small model does not have and nobody wrote down.
    assert export_model(tiny_model("gptj"), tmp_path / "gptj", CONFIG).manifest.model.eos_token_ids == ()


@pytest.mark.parametrize(
    ("changes", "generation", "words"),
    [
        ({"eos_token_id": ROWS}, None, "eos_token_id of config.json: received 420"),
        ({"eos_token_id": [2, -1]}, None, "eos_token_id of config.json: received -1"),
        ({"bos_token_id": 50000}, None, "bos_token_id of config.json: received 50000"),
        ({}, [2, 99999], "eos_token_id of generation_config.json: received 99999"),
        ({}, ["</s>"], "eos_token_id: received '</s>'"),
        ({}, True, "eos_token_id: received True"),
    ],
)
def test_stated_ids_outside_the_vocabulary_are_refused(
    changes: Any, generation: Any, words: str, tmp_path: Path
) -> None:
    net = model()
    for name, value in changes.items():
        setattr(net.config, name, value)
    if generation is not None:
        net.generation_config = transformers.GenerationConfig()
        net.generation_config.eos_token_id = generation
    with pytest.raises(UsageError) as failed:
        export_model(net, tmp_path / "bundle", CONFIG, tokenizer=tokenizer())
    assert words in str(failed.value)
    assert not list(tmp_path.iterdir())


def test_ends_of_a_tokenizer_outside_the_vocabulary_are_left_out() -> None:
    own = tokenizer(declared_end_ids=(3, 5000))
    config = transformers.LlamaConfig(eos_token_id=None, bos_token_id=None)
    assert end_ids(own, config, None, ROWS) == (1, 3)
    assert beginning_id(own, config, ROWS) == 0


def test_templates_see_the_same_names_at_export_and_at_run_time(tmp_path: Path) -> None:
    """The config's eos_token_id where the tokenizer names none, and what only tokenizer_config.json names."""
    template = LOOP + "{{ image_token }}{{ m.role }}\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    config = {"chat_template": template, "image_token": "<|user|>"}
    folder = write_folder(tmp_path / "model", byte_level(special=TOKENS), config)
    model(eos_token_id=[number("<|eot_id|>"), 0]).save_pretrained(folder)
    manifest = export(
        str(folder), tmp_path / "bundle", dataclasses.replace(CONFIG, pin_system="Be brief.", window_size=40)
    )
    assert manifest.model.eos_token_ids == (0, number("<|eot_id|>"))
    with Session.load(tmp_path / "bundle", threads=1) as session:
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
        rendered = session.tokenizer.render_chat(messages)
        assert rendered == "<|user|>system\nBe brief.<|eot_id|>\n<|user|>user\nHi<|eot_id|>\n"
        assert session.num_sink_tokens == len(session.tokenizer.encode(rendered.partition("Hi")[0], special=False))
        session.require_pinned("Be brief.")


# --- templates that cannot be used ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}",
        "{{ raise_exception('never') }}",
        "{{ 1 // 0 }}",
        "{{ messages[5].content }}{{ x.y.z }}",
    ],
)
def test_a_broken_template_is_refused_as_the_source_s(template: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"chat template: received the source's own, which fails"):
        export_model(model(), tmp_path / "bundle", CONFIG, tokenizer=tokenizer(template))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            LOOP + "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
            "{{ m.content }}{% endfor %}",
            "refuses a system message",
        ),
        (PHI3, "leaves a system message out"),
    ],
)
def test_pin_system_with_a_template_that_takes_none(template: str, reason: str, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, pin_system="Be brief.")
    with pytest.raises(UsageError, match=f"--pin-system: received a model whose chat template {reason}"):
        export_model(model(), tmp_path / "bundle", config, tokenizer=tokenizer(template))
    assert not list(tmp_path.iterdir())


def test_pin_system_where_the_message_is_part_of_the_user_s_turn(tmp_path: Path) -> None:
    """Gemma 3 is such a model."""
    template = (
        "{% set first = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
        "{% for m in messages if m.role != 'system' %}"
        "{{ '<|user|>' + (first if loop.first else '') + m.content }}{% endfor %}"
    )
    config = dataclasses.replace(CONFIG, pin_system=" Be brief. ", window_size=40)
    own = tokenizer(template)
    manifest = export_model(model(), tmp_path / "bundle", config, tokenizer=own).manifest
    assert manifest.stream.num_sink_tokens >= len(own.encode("<|user|> Be brief. \n\n", special=False))


def test_the_command_refuses_in_one_line(tmp_path: Path) -> None:
    config = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "chat_template": PHI3}
    folder = write_folder(tmp_path / "model", byte_level(special=TOKENS), config)
    model().save_pretrained(folder)
    arguments = ["export", str(folder), "-o", str(tmp_path / "bundle"), "--pin-system", "Be brief."]
    result = run_cli(*arguments)
    result.refusal("leaves a system message out")
    assert not (tmp_path / "bundle").exists()
