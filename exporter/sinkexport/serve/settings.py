"""Limits of a server, and who may call it."""

from __future__ import annotations

import dataclasses
import ipaddress
import socket

from sinkrt.errors import UsageError, problem
from sinkrt.keeper import SAVE_EVERY

from sinkexport.serve.keys import KEY_VARIABLE
from sinkexport.util.process_memory import MIB

BACKLOG = 512
"""Connections that the kernel keeps until they are accepted."""
SECONDS = ("stall_s", "grace_s", "header_s", "body_s", "keep_alive_s")


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of a server, each >= 1 unless stated otherwise. The options of `sinkexport serve` read their defaults
    here.

    max_waiting: requests at work besides the B that streams can take at a time, >= 0.
    max_conversations: remembered, those at work included.
    max_prompt_tokens: of one prompt, with what the cache knows of it already.
    max_tokens: of one answer; also the default of requests that do not say.
    max_body_bytes: of one request. max_parked_bytes: memory for conversations that are in no stream, >= 0.
    max_stored_bytes: memory for responses that clients may refer to, >= 0.
    max_prefix_bytes: memory for beginnings of prompts that clients share, >= 0; 0: none are kept.
    max_prefix_dir_bytes, max_state_bytes: all files of such beginnings, and of named conversations.
    save_every: tokens after which a named conversation at work is saved again.
    stall_s: seconds until a client that takes no text is given up.
    grace_s: seconds that requests get to end when the server is stopped, >= 0.
    max_connections: open at a time.
    header_s, body_s: seconds that a client gets for a request's header and for its body.
    keep_alive_s: seconds that a connection may be without a request.

    Raises: UsageError.
    """

    max_waiting: int = 32
    max_conversations: int = 64
    max_prompt_tokens: int = 16384
    max_tokens: int = 4096
    max_body_bytes: int = MIB
    max_parked_bytes: int = 1024 * MIB
    max_stored_bytes: int = 16 * MIB
    max_prefix_bytes: int = 256 * MIB
    max_prefix_dir_bytes: int = 4096 * MIB
    max_state_bytes: int = 4096 * MIB
    save_every: int = SAVE_EVERY
    stall_s: float = 60.0
    grace_s: float = 10.0
    max_connections: int = 256
    header_s: float = 10.0
    body_s: float = 60.0
    keep_alive_s: float = 30.0

    def __post_init__(self) -> None:
        least = {
            "max_waiting": 0,
            "max_parked_bytes": 0,
            "max_stored_bytes": 0,
            "max_prefix_bytes": 0,
            **dict.fromkeys(SECONDS, 0),
        }
        for field in dataclasses.fields(self):
            value, minimum = getattr(self, field.name), least.get(field.name, 1)
            if value < minimum:
                option = "--" + field.name.replace("_", "-")
                raise UsageError(problem(option, received=value, expected=f">= {minimum}", fix="raise it"))
        at_work = min(self.max_waiting, self.max_conversations)
        if self.max_connections <= at_work:
            raise UsageError(
                problem(
                    "--max-connections",
                    received=self.max_connections,
                    expected=f"more than the {at_work} requests that may wait",
                    fix="raise it, or lower --max-waiting",
                )
            )


def check_exposure(host: str, *, has_key: bool) -> None:
    """Refuse to serve everybody on a network without a key.

    Raises: UsageError, also for a host that does not resolve.
    """
    if not has_key and not all(ipaddress.ip_address(address).is_loopback for address in _addresses(host)):
        raise UsageError(
            problem(
                "--host",
                received=f"'{host}' without an API key",
                expected="127.0.0.1, or a key that clients send",
                fix=f"pass --api-key-file FILE, or set {KEY_VARIABLE}",
            )
        )


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket; port 0 takes any free one.

    Raises: UsageError if the port is taken or not permitted.
    """
    family = socket.AF_INET6 if ":" in _addresses(host)[0] else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise UsageError(
            problem(
                "--port",
                received=f"{port} on '{host}' ({error.strerror or error})",
                expected="a port that is free",
                fix="choose another",
            )
        ) from None


def _addresses(host: str) -> list[str]:
    try:
        found = socket.getaddrinfo(host or "0.0.0.0", None, type=socket.SOCK_STREAM)  # noqa: S104 - to be refused
    except (OSError, UnicodeError) as error:
        raise UsageError(
            problem(
                "--host", received=f"'{host}' ({error})", expected="an address of this machine", fix="pass 127.0.0.1"
            )
        ) from None
    return [str(address[0]).partition("%")[0] for *_, address in found]
