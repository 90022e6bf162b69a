"""Write ``outside/``: what users lean on, which no change inside may alter without being seen.

The text of every ``--help``, the signatures of what is documented for import, and a tiny bundle: the SHA-256 of each of
its files (the manifest apart, which names versions) and the manifest's fingerprint, which saved states carry.

Regenerate with ``python -m tests.golden.make_outside`` after a change that is meant, and read the difference.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from sinkexport.cli import cli

FOLDER = Path(__file__).with_name("outside")
DOCUMENTED = ("sinkexport", "sinkrt", "sinkrt.contract", "sinkrt.frames", "sinkexport.frames")
"""Modules that README and docs/ import from."""
TORCH = "2.13.0+cpu"
"""Release of torch whose exports have the bytes in ``outside/bundle.json``."""


def help_texts() -> dict[str, str]:
    """File name -> the help of a command, 100 columns wide."""

    def walk(command: click.Command, words: list[str], parent: click.Context | None) -> Iterator[tuple[str, str]]:
        # Commands keep the help option that the first context asks for, so this one has to be as the program's own.
        settings = cli.context_settings if parent is None else {}
        context = click.Context(command, parent, words[-1], terminal_width=100, max_content_width=100, **settings)
        yield "_".join(words) + ".txt", command.get_help(context) + "\n"
        if isinstance(command, click.Group):
            for name in command.list_commands(context):
                found = command.get_command(context, name)
                assert found is not None
                yield from walk(found, [*words, name], context)

    return dict(walk(cli, ["sinkexport"], None))


def signatures() -> dict[str, dict[str, Any]]:
    """Module -> public name -> its signature; for a class: its bases, fields and public methods."""
    found = {}
    for name in DOCUMENTED:
        module = importlib.import_module(name)
        public = getattr(module, "__all__", None) or [
            key
            for key, value in vars(module).items()
            if not key.startswith("_") and getattr(value, "__module__", None) == name
        ]
        found[name] = {key: _describe(getattr(module, key)) for key in sorted(public)}
    return found


def _describe(value: Any) -> Any:
    if inspect.isclass(value):
        members: dict[str, Any] = {"(bases)": [base.__name__ for base in value.__bases__]}
        if not issubclass(value, BaseException):
            members["(call)"] = _signature(value)
        for key, member in sorted(vars(value).items()):
            if key.startswith("_"):
                continue
            if isinstance(member, property):
                members[key] = "property"
            elif isinstance(member, classmethod | staticmethod):
                members[key] = f"{type(member).__name__} {_signature(member.__func__)}"
            elif inspect.isfunction(member):
                members[key] = _signature(member)
        if dataclasses.is_dataclass(value):
            members["(fields)"] = {field.name: str(field.type) for field in dataclasses.fields(value)}
        return members
    return _signature(value) if callable(value) else repr(value)


def _signature(function: Any) -> str:
    return re.sub(r"<function (\S+) at 0x\w+>", r"\1", str(inspect.signature(function)))


def bundle_facts(folder: Path) -> dict[str, Any]:
    """Export a tiny model whose weights are exact on any machine, with a tokenizer, INT8 weights and an INT8 window."""
    from sinkexport import ExportConfig, export
    from sinkexport.quant.recipe import load_recipe

    from tests.exporter.tiny_models import TINY, word_tokenizer

    config_class, arguments = TINY["llama"]
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config_class)(**arguments)).eval()
    with torch.no_grad():
        for number, (_, parameter) in enumerate(sorted(model.named_parameters())):
            # Multiples of 1/256 in (-0.5, 0.5) by integer arithmetic: random numbers may differ from CPU to CPU.
            steps = (torch.arange(parameter.numel()) * 2654435761 + number * 40503) % 65521 % 255 - 127
            parameter.copy_(steps.reshape(parameter.shape) / 256 + (parameter.dim() == 1))
    model.save_pretrained(folder / "model")
    (folder / "model" / "tokenizer.json").write_text(word_tokenizer().to_str())
    found = {}
    for name, recipe in (("fp32", None), ("int8", load_recipe("int8-window"))):
        config = ExportConfig(num_sink_tokens=2, window_size=14, chunk_size=4, target="onnx", recipe=recipe)
        manifest = export(str(folder / "model"), folder / name, config, check=False)
        found[name] = {
            "fingerprint": manifest.fingerprint,
            "files": {
                path: _sha256_by_torch(folder / name / path, facts.sha256)
                for path, facts in sorted(manifest.files.items())
            },
            "states": [dataclasses.asdict(state) for state in manifest.states],
        }
    return found


def _sha256_by_torch(path: Path, listed: str) -> str:
    """Digest that a bundle's file has when TORCH exports it: graphs name the release of torch, once.

    listed: the digest in the manifest, returned where nothing is exchanged.
    """
    if torch.__version__ == TORCH or path.suffix != ".onnx":
        return listed
    here, there = (b"\x1a" + bytes([len(name)]) + name.encode() for name in (torch.__version__, TORCH))
    found = path.read_bytes()  # a ModelProto: its field 3, producer_version, lies outside all others
    assert found.count(here) == 1
    return hashlib.sha256(found.replace(here, there)).hexdigest()


def write() -> None:
    """Write all of ``outside/`` anew."""
    (FOLDER / "help").mkdir(parents=True, exist_ok=True)
    for name, text in help_texts().items():
        (FOLDER / "help" / name).write_text(text)
    with tempfile.TemporaryDirectory() as folder:
        for name, facts in (("signatures", signatures()), ("bundle", bundle_facts(Path(folder)))):
            (FOLDER / f"{name}.json").write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    write()
