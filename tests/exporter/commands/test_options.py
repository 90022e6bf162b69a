"""Shared options are declared once, show the limits that the code has, and answer to their former names."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import click
import pytest
from sinkexport.cli import COMMANDS, cli
from sinkexport.config import DEFAULT_NUM_SINK_TOKENS, DEFAULT_WINDOW_SIZE
from sinkexport.serve.settings import Limits
from sinkrt.backends import BACKENDS

from tests.support import run_cli

FORMER = {
    ("export", "--head-windows"): "--budgets",
    ("analyze", "--head-windows"): "--budgets",
    ("analyze", "--head-window-share"): "--budget-share",
}
NEEDED = {
    "export": ["model", "-o", "out"],
    "analyze": ["model", "--text", "text"],
}
"""Arguments without which a command does not parse."""


def command_of(name: str) -> click.Command:
    return importlib.import_module(f"sinkexport.commands.{name}").command


def parsed(name: str, *words: str) -> dict[str, Any]:
    """Arguments that a command would be called with."""
    return (
        command_of(name)
        .make_context(name, [*NEEDED[name], *words], parent=click.Context(cli, **cli.context_settings))
        .params
    )


def help_of(name: str) -> str:
    command, settings = command_of(name), cli.context_settings
    return command.get_help(click.Context(command, terminal_width=400, max_content_width=400, **settings))


@pytest.mark.parametrize(("command", "option"), FORMER)
def test_former_names_mean_the_same_and_are_not_shown(command: str, option: str) -> None:
    former, value = FORMER[command, option], "0.25" if "share" in option else "file.json"
    assert parsed(command, former, value) == parsed(command, option, value) != parsed(command)
    assert parsed(command, f"{former}={value}") == parsed(command, option, value)
    assert option in help_of(command)
    assert former not in help_of(command)
    # The one that comes last counts, as for any option given twice.
    assert parsed(command, option, "0.75", former, value) == parsed(command, option, value)


def test_former_names_reach_the_code(tmp_path: Path) -> None:
    result = run_cli("export", tmp_path, "-o", tmp_path / "out", "--budgets", tmp_path / "none.json")
    assert "none.json" in result.refusal()


@pytest.mark.parametrize("name", COMMANDS)
def test_options_of_one_name_are_one_declaration(name: str) -> None:
    for option in command_of(name).params:
        if "--backend" in option.opts:
            assert isinstance(option.type, click.Choice)
            assert tuple(option.type.choices) == BACKENDS
            assert option.default == BACKENDS[0]
        if "--threads" in option.opts:
            assert "[default: all physical cores]" in (option.help or "")  # type: ignore[attr-defined]
        if "--budgets" in option.opts:
            pytest.fail("a former name is an option of its own")


@pytest.mark.parametrize(
    "name", [name for name in COMMANDS if any("--threads" in p.opts for p in command_of(name).params)]
)
def test_threads_are_at_least_one_in_every_command(name: str, tmp_path: Path) -> None:
    needed = {
        "calibrate": ("--recipe", "int8-static", "--text", "x", "-o", "y"),
        "eval": ("--text", "x"),
        "tune": ("--labelled", "x", "-o", "y"),
    }
    run_cli(name, tmp_path, *needed.get(name, ()), "--threads", 0).refusal("--threads: received 0, expected >= 1")


def test_serve_shows_the_limits_of_the_server() -> None:
    shown = {option.name: option.default for option in command_of("serve").params}
    for name in ("max_parked", "max_stored", "max_prefix", "max_prefix_dir", "max_state"):
        shown[f"{name}_bytes"] = shown.pop(f"{name}_mib") * 2**20
    for name, option in (("body_s", "body_timeout"), ("keep_alive_s", "idle_timeout"), ("stall_s", "stall_timeout")):
        shown[name] = shown.pop(option)
    limits = {field.name: field.default for field in dataclasses.fields(Limits)}
    assert {name: shown[name] for name in limits if name in shown} == {
        name: value for name, value in limits.items() if name not in ("header_s", "grace_s")
    }


def test_inspect_shows_the_geometry_of_an_export() -> None:
    assert f"[default: {DEFAULT_WINDOW_SIZE}]" in help_of("inspect")
    assert f"[default: {DEFAULT_NUM_SINK_TOKENS}]" in help_of("inspect")
    assert {o.name: o.default for o in command_of("analyze").params}["long_window"] == DEFAULT_WINDOW_SIZE


def test_a_negative_number_is_refused_under_the_option_that_was_given(tmp_path: Path) -> None:
    run_cli("serve", tmp_path, "--max-parked-mib", -1).refusal("--max-parked-mib: received -1, expected >= 0")


def test_outputs_do_not_overwrite_each_other(tmp_path: Path) -> None:
    one = tmp_path / "one.json"
    given = ("analyze", tmp_path, "--text", "x", "--json", one)
    for option in ("--plot", "--head-windows", "--sink-tuning"):
        run_cli(*given, option, tmp_path / "." / "one.json").refusal(f"{option}: received", "as --json")
    assert not one.exists()


def test_windows_that_cannot_differ_are_refused_by_the_long_one(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("a")
    given = ("analyze", tmp_path, "--text", text, "--head-windows", tmp_path / "out.json")
    run_cli(*given, "--long-window", 0).refusal("--long-window: received 0, expected >= 2")


def test_a_number_far_beyond_a_text_takes_no_memory(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("a")
    run_cli("analyze", tmp_path, "--text", text, "--windows", 10**9, "--window-tokens", 10**9).refusal(
        "model: received"
    )


def test_a_file_that_is_no_model_is_refused_as_one(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.write_text("a")
    run_cli("export", file, "-o", tmp_path / "out").refusal("(a file without the ending .gguf)")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("table", ["families", "recipes"])
def test_tables_take_no_memory(table: str) -> None:
    run_cli("inspect", table, "--memory").refusal(f"--memory: received '{table}', expected a bundle or a model")
