"""``sinkexport serve``: a bundle behind the OpenAI HTTP API."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

KEY_VARIABLE = "SINKEXPORT_API_KEY"


@click.command(name="serve")
@click.argument("bundle", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; others need an API key.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any that is free.")
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help=f"Holds the key that clients must send; else {KEY_VARIABLE} of the environment.",
)
@click.option("--model-name", metavar="NAME", help="What clients call the model.  [default: the bundle's name of it]")
@click.option(
    "--max-waiting",
    type=int,
    default=32,
    show_default=True,
    metavar="N",
    help="Requests at work besides one a stream; more get 429.",
)
@click.option(
    "--max-conversations",
    type=int,
    default=64,
    show_default=True,
    metavar="N",
    help="Conversations remembered; the least recently active is forgotten.",
)
@click.option(
    "--max-parked-mib",
    type=int,
    default=1024,
    show_default=True,
    metavar="MIB",
    help="Memory for conversations that are in no stream.",
)
@click.option("--max-prompt-tokens", type=int, default=16384, show_default=True, metavar="N", help="Longest prompt.")
@click.option(
    "--max-tokens",
    type=int,
    default=4096,
    show_default=True,
    metavar="N",
    help="Longest answer, and that of requests that do not say.",
)
@click.option("--max-body-bytes", type=int, default=2**20, show_default=True, metavar="N", help="Largest request.")
@click.option(
    "--max-connections",
    type=int,
    default=256,
    show_default=True,
    metavar="N",
    help="Open connections; silent ones go first when there are more.",
)
@click.option("--pin-system", is_flag=True, help="Refuse system messages that the sinks do not keep for ever.")
@click.option(
    "--template-arg",
    "template_args",
    multiple=True,
    metavar="KEY=VALUE",
    help="Set a variable of the chat template, e.g. enable_thinking=false, for requests without "
    "chat_template_kwargs of that name. VALUE is read as JSON where it is JSON, else as text; may be "
    "repeated.  [default: the template's own]",
)
@click.option(
    "--allow-special",
    is_flag=True,
    help="Let names of special tokens in texts, such as <|im_end|>, become those tokens, for requests that "
    "do not say.  [default: they stay ordinary text]",
)
@click.option(
    "--backend",
    type=click.Choice(["ort", "ort-cuda", "tensorrt"]),
    default="ort",
    show_default=True,
    help="What computes.",
)
@click.option("--threads", type=int, metavar="N", help="CPU threads.  [default: all physical cores]")
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
    max_prompt_tokens: int,
    max_tokens: int,
    max_body_bytes: int,
    max_connections: int,
    pin_system: bool,
    template_args: tuple[str, ...],
    allow_special: bool,
    backend: str,
    threads: int | None,
    log_requests: bool,
) -> None:
    """Serve the bundle DIR over the OpenAI HTTP API, many conversations at a time.

    POST /v1/chat/completions and /v1/completions, GET /v1/models, /health and /metrics (Prometheus). A bundle that
    was exported with --batch B decodes B conversations together. Ctrl-C or SIGTERM ends the server once requests at
    work are done, at the latest after twelve seconds.
    """
    import os

    from sinkexport.serve.settings import MIB, Limits, check_exposure, listen, read_api_key

    limits = Limits(
        max_waiting,
        max_conversations,
        max_prompt_tokens,
        max_tokens,
        max_body_bytes,
        max_parked_mib * MIB,
        max_connections=max_connections,
    )
    api_key = read_api_key(api_key_file, os.environ.get(KEY_VARIABLE))
    check_exposure(host, api_key)
    from sinkrt import Session
    from sinkrt.text.template_args import parse_template_args

    from sinkexport.serve.server import Server

    variables = parse_template_args(template_args)

    with listen(host, port) as listener, Session.load(bundle, backend, threads=threads) as session:
        server = Server(
            session,
            limits,
            model_name=model_name,
            api_key=api_key,
            pin_system=pin_system,
            log_requests=log_requests,
            template_args=variables,
            allow_special=allow_special,
        )
        where = f"[{host}]" if ":" in host else host
        facts = session.manifest.stream
        click.echo(
            f"Serving '{server.model}' at http://{where}:{listener.getsockname()[1]}/v1: {facts.batch} stream(s), "
            f"S={facts.num_sink_tokens} W={facts.window_size}; Ctrl-C ends",
            err=True,
        )
        with _orderly_end():
            server.run(listener)
    click.echo("Stopped.", err=True)


@contextlib.contextmanager
def _orderly_end() -> Iterator[None]:
    """Ctrl-C and SIGTERM are how a server is meant to end: not errors, even though uvicorn raises them once more."""
    if threading.current_thread() is not threading.main_thread():  # signals belong to the main one
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before: dict[int, Any] = {number: signal.signal(number, lambda *_: None) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
