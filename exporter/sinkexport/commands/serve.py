"""``sinkexport serve``: a bundle over the OpenAI HTTP API."""

from __future__ import annotations

import ipaddress
import os
import socket
from pathlib import Path

import click
from sinkrt import Session, UsageError
from sinkrt.errors import problem

API_KEY_VARIABLE = "SINKEXPORT_API_KEY"
DEFAULT_PORT = 8000
GRACE_S = 5
"""How long a server that is told to end waits for answers."""

_count = click.IntRange(min=1)


@click.command(name="serve")
@click.argument("bundle", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Another than localhost needs an API key.")
@click.option("--port", type=click.IntRange(0, 65535), default=DEFAULT_PORT, show_default=True, help="0: any free one.")
@click.option("--model-name", metavar="NAME", help="What clients call the model.  [default: the bundle's own name]")
@click.option("--api-key-file", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE",
              help=f"Clients must send the key in this file.  [default: ${API_KEY_VARIABLE}, or none]")  # fmt: skip
@click.option("--max-conversations", type=_count, default=16, show_default=True, metavar="N",
              help="Conversations kept; the least recently active idle one is forgotten for a new one.")  # fmt: skip
@click.option("--max-waiting", type=click.IntRange(min=0), default=12, show_default=True, metavar="N",
              help="Requests that may wait for a stream; more get status 429.")  # fmt: skip
@click.option("--max-prompt-tokens", type=_count, default=32768, show_default=True, metavar="N",
              help="Of one request, far past the window too.")  # fmt: skip
@click.option("--max-tokens", type=_count, default=1024, show_default=True, metavar="N", help="Of one answer.")
@click.option("--max-body-bytes", type=_count, default=2**20, show_default=True, metavar="N", help="Of one request.")
@click.option("--pin-system", is_flag=True, help="Refuse system messages that the sinks do not keep for ever.")
@click.option("--backend", type=click.Choice(["ort", "ort-cuda", "tensorrt"]), default="ort", show_default=True,
              help="What computes.")  # fmt: skip
@click.option("--threads", type=int, metavar="N", help="CPU threads.  [default: all physical cores]")
def command(
    bundle: Path, host: str, port: int, model_name: str | None, api_key_file: Path | None, max_conversations: int,
    max_waiting: int, max_prompt_tokens: int, max_tokens: int, max_body_bytes: int, pin_system: bool, backend: str,
    threads: int | None,
) -> None:  # fmt: skip
    """Serve the bundle DIR: chat completions and completions as OpenAI's clients know them.

    As many answers are decoded together as the bundle has streams (export --batch); more conversations take turns.
    Routes: /v1/chat/completions, /v1/completions, /v1/models, /v1/conversations/NAME, /health, /metrics.
    """
    api_key = _api_key(api_key_file)
    if api_key is None and not _is_loopback(host):
        raise UsageError(problem("--host", received=f"'{host}' without an API key", expected="a key, or localhost",
                                 fix=f"set ${API_KEY_VARIABLE}, or pass --api-key-file"))  # fmt: skip
    import uvicorn

    from sinkexport.serve.app import ServerOptions, make_app
    from sinkexport.serve.engine import Engine

    with _listening(host, port) as listener, Session.load(bundle, backend, threads=threads) as session:
        options = ServerOptions(
            model_name or session.manifest.model.name, api_key, max_prompt_tokens, max_tokens, max_body_bytes,
            pin_system,
        )
        engine = Engine(session, max_waiting=max_waiting, max_conversations=max_conversations)
        config = uvicorn.Config(make_app(session, engine, options), log_level="warning", access_log=False,
                                timeout_graceful_shutdown=GRACE_S)  # fmt: skip
        address, bound = listener.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        click.echo(f"Serving {options.model_name} on http://{shown}:{bound}/v1 ({session.batch} streams)")
        uvicorn.Server(config).run(sockets=[listener])


def _api_key(file: Path | None) -> str | None:
    if file is None:
        return os.environ.get(API_KEY_VARIABLE) or None
    key = file.read_text(encoding="utf-8").strip()
    if not key:
        raise UsageError(problem("--api-key-file", received=f"'{file}', which is empty", expected="a key",
                                 fix="write one into it"))  # fmt: skip
    return key


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listening(host: str, port: int) -> socket.socket:
    """A bound socket, before gigabytes are loaded.

    Raises: UsageError.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UsageError(problem("address", received=f"{host}:{port} ({error.strerror or error})",
                                 expected="a free address of this machine",
                                 fix="choose another --port or --host"))  from error  # fmt: skip
