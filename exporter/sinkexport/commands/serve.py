"""``sinkexport serve``: a bundle behind the OpenAI HTTP API."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import click
from sinkrt.errors import UsageError, problem

from sinkexport.commands.options import (
    allow_special_option,
    backend_option,
    bundle_argument,
    file_option,
    not_negative,
    number_option,
    template_arg_option,
    threads_option,
)
from sinkexport.serve.keys import KEY_VARIABLE, read_api_keys
from sinkexport.serve.settings import Limits, check_exposure, listen
from sinkexport.util.console import geometry
from sinkexport.util.process_memory import MIB
from sinkexport.util.signals import handling_signals

MAX_SECONDS = 86_400.0


def _seconds(_ctx: click.Context, option: click.Parameter, value: float) -> float:
    """Refuse what is no time to wait: a callback of options.

    Raises: UsageError.
    """
    if not 0 < value <= MAX_SECONDS:  # does not hold for NaN either
        expected = f"a number above 0, at most {MAX_SECONDS:.0f} seconds"
        raise UsageError(problem(option.opts[0], received=value, expected=expected, fix="leave it out"))
    return value


@click.command(name="serve")
@bundle_argument
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; others need an API key.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any that is free.")
@file_option(
    "--api-key-file",
    help=f"Holds the key that clients must send, or lines 'NAME: KEY'; else {KEY_VARIABLE} of the environment.",
)
@click.option("--model-name", metavar="NAME", help="What clients call the model.  [default: the bundle's name of it]")
@number_option("--max-waiting", Limits.max_waiting, "Requests at work besides one a stream; more get 429.")
@number_option(
    "--max-conversations", Limits.max_conversations, "Conversations remembered; the least recently active is forgotten."
)
@number_option(
    "--max-parked-mib",
    Limits.max_parked_bytes // MIB,
    "Memory for conversations that are in no stream.",
    metavar="MIB",
    callback=not_negative,
)
@number_option(
    "--max-stored-mib",
    Limits.max_stored_bytes // MIB,
    "Memory for responses that clients refer to by id.",
    metavar="MIB",
    callback=not_negative,
)
@number_option(
    "--max-prefix-mib",
    Limits.max_prefix_bytes // MIB,
    "Memory for beginnings of prompts that clients share; 0: none are kept.",
    metavar="MIB",
    callback=not_negative,
)
@file_option(
    "--prefix-dir", metavar="DIR", help="Keeps these beginnings on the disk too. They show what was in prompts."
)
@number_option(
    "--max-prefix-dir-mib", Limits.max_prefix_dir_bytes // MIB, "Most that these files may take.", metavar="MIB"
)
@file_option(
    "--state-dir",
    metavar="DIR",
    help="Keeps named conversations on the disk, beyond the server's end. They show what was said.",
)
@number_option("--save-every", Limits.save_every, "Tokens after which one at work is saved there again.")
@number_option("--max-state-mib", Limits.max_state_bytes // MIB, "Most that these files may take.", metavar="MIB")
@number_option("--max-prompt-tokens", Limits.max_prompt_tokens, "Longest prompt.")
@number_option("--max-tokens", Limits.max_tokens, "Longest answer, and that of requests that do not say.")
@number_option("--max-body-bytes", Limits.max_body_bytes, "Largest request.")
@number_option(
    "--max-connections", Limits.max_connections, "Open connections; silent ones go first when there are more."
)
@number_option(
    "--body-timeout", Limits.body_s, "Seconds in which a request's body must arrive.", metavar="S", callback=_seconds
)
@number_option(
    "--idle-timeout",
    Limits.keep_alive_s,
    "Seconds that a connection may be without a request.",
    metavar="S",
    callback=_seconds,
)
@number_option(
    "--stall-timeout",
    Limits.stall_s,
    "Seconds until a client that takes no text is given up.",
    metavar="S",
    callback=_seconds,
)
@click.option("--pin-system", is_flag=True, help="Refuse system messages that the sinks do not keep forever.")
@template_arg_option(", for requests without chat_template_kwargs of that name")
@allow_special_option("prompts of completions", ", for requests that do not say")
@backend_option
@threads_option
@click.option("--log-requests", is_flag=True, help="Log every request.")
def command(
    bundle: Path,
    host: str,
    port: int,
    api_key_file: Path | None,
    model_name: str | None,
    max_waiting: int,
    max_conversations: int,
    max_parked_mib: int,
    max_stored_mib: int,
    max_prefix_mib: int,
    prefix_dir: Path | None,
    max_prefix_dir_mib: int,
    state_dir: Path | None,
    save_every: int,
    max_state_mib: int,
    max_prompt_tokens: int,
    max_tokens: int,
    max_body_bytes: int,
    max_connections: int,
    body_timeout: float,
    idle_timeout: float,
    stall_timeout: float,
    pin_system: bool,
    template_args: tuple[str, ...],
    allow_special: bool,
    backend: str,
    threads: int | None,
    log_requests: bool,
) -> None:
    """Serve the bundle DIR over the OpenAI HTTP API, many conversations at a time.

    POST /v1/chat/completions, /v1/completions, /v1/responses, /tokenize and /detokenize, GET /v1/models, /health and
    /metrics (Prometheus). A bundle that
    was exported with --batch B decodes B conversations together. Ctrl-C or SIGTERM ends the server once requests at
    work are done, at the latest after twelve seconds.
    """
    limits = Limits(
        max_waiting=max_waiting,
        max_conversations=max_conversations,
        max_prompt_tokens=max_prompt_tokens,
        max_tokens=max_tokens,
        max_body_bytes=max_body_bytes,
        max_parked_bytes=max_parked_mib * MIB,
        max_stored_bytes=max_stored_mib * MIB,
        max_prefix_bytes=max_prefix_mib * MIB,
        max_prefix_dir_bytes=max_prefix_dir_mib * MIB,
        max_state_bytes=max_state_mib * MIB,
        save_every=save_every,
        max_connections=max_connections,
        body_s=body_timeout,
        keep_alive_s=idle_timeout,
        stall_s=stall_timeout,
    )
    if prefix_dir is not None and not max_prefix_mib:
        raise UsageError(
            problem(
                "--prefix-dir",
                received=f"'{prefix_dir}' with --max-prefix-mib 0",
                expected="memory for what is read from it",
                fix="leave out one of the two",
            )
        )
    api_keys = read_api_keys(api_key_file, os.environ.get(KEY_VARIABLE))
    check_exposure(host, has_key=api_keys is not None)
    from sinkrt import Session
    from sinkrt.text.template_args import parse_template_args

    from sinkexport.serve.server import Server

    variables = parse_template_args(template_args)
    with listen(host, port) as listener, Session.load(bundle, backend, threads=threads) as session:
        server = Server(
            session,
            limits,
            model_name=model_name,
            api_keys=api_keys,
            pin_system=pin_system,
            log_requests=log_requests,
            template_args=variables,
            allow_special=allow_special,
            prefix_dir=prefix_dir,
            state_dir=state_dir,
        )
        where = f"[{host}]" if ":" in host else host
        facts = session.manifest.stream
        kept = geometry(facts.num_sink_tokens, facts.window_size, has_attention=bool(session.manifest.caches))
        click.echo(
            f"Serving '{server.model}' at http://{where}:{listener.getsockname()[1]}/v1: {facts.batch} stream(s), "
            f"{kept}; Ctrl-C ends",
            err=True,
        )
        # Ctrl-C and SIGTERM are how a server ends: no errors, although uvicorn raises them once more.
        with handling_signals(dict.fromkeys((signal.SIGINT, signal.SIGTERM), lambda *_: None)):
            server.run(listener)
    click.echo("Stopped.", err=True)
