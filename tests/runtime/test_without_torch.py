"""The runtime needs no torch: with an import hook that forbids it, and in a bare virtual environment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import venv
from pathlib import Path

import pytest

from tests.runtime.toy import build_toy

REPOSITORY = Path(__file__).parents[2]
FORBIDDEN = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "gguf", "accelerate")
OURS = ("PYTHONPATH", "VIRTUAL_ENV", "SINKEXPORT_BUILD_CPU", "SINKEXPORT_CPU_LIBRARY")
"""Environment variables that would say where sources or a library are."""
HOOK = f"""
    import sys
    FORBIDDEN = {FORBIDDEN!r}

    class Forbid:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in FORBIDDEN:
                raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
            return None

    sys.meta_path.insert(0, Forbid())
"""


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(HOOK) + textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
    )


def cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_python("from sinkexport.cli import main; main()", *arguments)


def test_the_hook_forbids() -> None:
    assert "No module named 'torch'" in run_python("import torch").stderr


def test_the_runtime_decodes(toy_bundle: Path) -> None:
    done = run_python(
        """
        import sinkrt
        session = sinkrt.Session.load(sys.argv[1])
        session.prefill([1, 2, 3])
        print(len("".join(session.generate("a", max_tokens=20, ignore_eos=True))) > 0, *session.position)
        assert not set(FORBIDDEN) & {name.partition(".")[0] for name in sys.modules}
        """,
        toy_bundle,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("True 24\n", "", 0)


def test_reading_a_manifest_needs_no_onnxruntime_either(toy_bundle: Path) -> None:
    done = run_python(
        """
        from pathlib import Path
        import sinkrt, sinkrt.ring
        from sinkrt.contract import load_manifest
        print(load_manifest(Path(sys.argv[1])).model.name)
        assert not {"onnxruntime", "numpy", "tokenizers"} & set(sys.modules)
        """,
        toy_bundle,
    )
    assert (done.stdout, done.stderr) == ("toy\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("--version",),
        ("run", "--help"),
        ("run", "BUNDLE", "--prompt", "a", "--max-tokens", "5"),
        ("inspect", "--help"),
        ("inspect", "BUNDLE"),
        ("inspect", "families"),
    ],
    ids=" ".join,
)
def test_commands_that_work(toy_bundle: Path, arguments: tuple[str, ...]) -> None:
    done = cli(*(toy_bundle if argument == "BUNDLE" else argument for argument in arguments))
    assert done.returncode == 0, done.stderr
    assert done.stdout and not done.stderr


@pytest.mark.parametrize(
    "arguments", [("export", "some/model", "-o", "OUT"), ("verify", "BUNDLE", "--against", "some/model")], ids=" ".join
)
def test_commands_that_need_more_say_so(toy_bundle: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    paths = {"BUNDLE": toy_bundle, "OUT": tmp_path / "out"}
    done = cli(*(paths.get(argument, argument) for argument in arguments))
    assert done.returncode == 2
    assert done.stderr.startswith("sinkexport: error: this command needs the package '")
    assert done.stderr.endswith("pip install 'sinkexport[export]'\n")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_bare_environment(tmp_path: Path) -> None:
    """`pip install .` as a user does it, without extras: the command is there, runs, and has brought no torch.

    The CPU library is there where a compiler is.
    """
    source = tmp_path / "source"  # building writes into the folder it builds
    source.mkdir()
    for name in ("exporter", "runtime", "plugins/cpu"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    environment = {key: value for key, value in os.environ.items() if key not in OURS}

    def run(*command: object) -> str:
        done = subprocess.run(
            [*map(str, command)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    constraints = ["-c", REPOSITORY / "constraints.txt"]
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *constraints, source)
    bundle = build_toy(tmp_path / "bundle")
    command = tmp_path / "venv" / "bin" / "sinkexport"
    text = run(command, "run", bundle, "--prompt", "Hello", "--max-tokens", 100, "--ignore-eos")
    assert len(text) > 10
    assert "ToyForCausalLM" in run(command, "inspect", bundle)
    assert run(command, "--version").startswith("sinkexport, version ")
    library = json.loads(run(command, "inspect", "cpu", "--json"))
    assert (library["problem"] is None) == any(map(shutil.which, ("c++", "g++", "clang++"))), library
    installed = {line.split("==")[0].lower() for line in run(python, "-m", "pip", "freeze", "--all").splitlines()}
    assert "onnxruntime" in installed
    assert not installed & {"torch", "transformers", "onnx", "onnxscript", "onnx-ir", "gguf", "accelerate"}
    where = run(python, "-c", "import sinkrt, sinkexport; print(sinkrt.__file__, sinkexport.__file__)")
    assert where.count("site-packages") == 2
