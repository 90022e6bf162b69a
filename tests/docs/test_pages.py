"""Links go somewhere, named files exist, commands parse, README's snippet runs and README stays short."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
from sinkexport.cli import cli
from sinkexport.families import EXPORTED

from tests.docs.pages import NAMES, ROOT, anchors, commands, fences, prose, text_of
from tests.runtime.toy import Toy, build_toy

FOLDERS = ("exporter", "runtime", "plugins", "tests", "docs", "benchmarks", "recipes", "tools", "findings")
_PATH = re.compile(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`")
_PLACEHOLDER = re.compile(r"[A-Z]{4}")
"""`NAME` and `COMMAND` in a path stand for what a reader chooses."""
COMMANDS = sorted({(name, line) for name in NAMES for line in commands(text_of(name))})


@pytest.mark.parametrize("name", NAMES)
def test_links_go_somewhere(name: str) -> None:
    """Relative links name a file of the repository, and an anchor that it has."""
    page = ROOT / name
    for target in re.findall(r"\]\(([^()\s]+)\)", prose(page.read_text(encoding="utf-8"))):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("name", [name for name in NAMES if name != "CHANGELOG.md"])
def test_files_that_are_named_exist(name: str) -> None:
    """A path in `code` that begins with a folder of the repository is there, or beside the page."""
    named = [path for path in _PATH.findall(prose(text_of(name))) if not _PLACEHOLDER.search(Path(path).stem)]
    places = (ROOT, (ROOT / name).parent)
    assert [path for path in named if not any((place / path).exists() for place in places)] == []


def test_scripts_that_are_run_exist() -> None:
    """`python FILE` in the docs names a file."""
    for name in NAMES:
        for script in re.findall(r"python ([\w/]+\.py)", text_of(name)):
            assert (ROOT / script).is_file(), f"{name}: {script}"


def test_findings_have_one_line_a_script() -> None:
    """findings/README.md lists each script of its folder once."""
    listed = re.findall(r"^\| `(\w+\.sh)` \|", text_of("findings/README.md"), re.MULTILINE)
    assert listed == sorted(path.name for path in (ROOT / "findings").glob("*.sh"))


@pytest.mark.parametrize(("name", "line"), COMMANDS, ids=[line[:60] for _, line in COMMANDS])
def test_commands_parse(name: str, line: str) -> None:
    """Every option of a command in the docs is one that the command has."""
    _, command_name, *arguments = shlex.split(line)
    context = click.Context(cli, info_name="sinkexport", **cli.context_settings)
    command = cli.get_command(context, command_name)
    assert command is not None, f"{name}: {line}"
    arguments = [argument for argument in arguments if argument not in ("..", "[..]")]
    command.make_parser(click.Context(command, context)).parse_args(arguments)


@pytest.mark.parametrize("name", NAMES)
def test_python_snippets_are_python(name: str) -> None:
    """They compile; `...` stands for what is left out."""
    for snippet in fences(text_of(name), "python"):
        compile(snippet, name, "exec")


def test_readme_s_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """The snippet as it stands, in a folder with a bundle named `bundle`."""
    build_toy(tmp_path / "bundle", Toy(chunk_size=4))
    monkeypatch.chdir(tmp_path)
    (snippet,) = fences(text_of("README.md"), "python")
    exec(compile(snippet, "README.md", "exec"), {})
    assert capsys.readouterr().out
    assert (tmp_path / "stream.safetensors").is_file()


def test_readme_is_short() -> None:
    """About 900 words, so that it is read."""
    assert len(text_of("README.md").split()) <= 1000


def test_readme_counts_the_families() -> None:
    """The number of tested families is that of the table."""
    assert f"[{len(EXPORTED)} that are tested](docs/families.md)" in text_of("README.md")


def test_make_targets_that_are_named_exist() -> None:
    """`make X` in README and CONTRIBUTING is a target."""
    makefile = text_of("Makefile")
    for name in ("README.md", "CONTRIBUTING.md", "docs/benchmarks.md"):
        for target in re.findall(r"(?:`|^|; )make ([a-z][a-z-]*)", text_of(name), re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{name}: make {target}"
