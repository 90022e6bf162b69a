"""Errors that a user can cause, each told in one line: what, received, expected, fix."""

from __future__ import annotations


class SinkError(Exception):
    """Base of every error that the command line reports without a traceback (exit code 2)."""


class UsageError(SinkError):
    """Bad input: an argument, an id, a shape."""


class BundleError(SinkError):
    """A bundle that is missing, corrupt, newer than this runtime or inconsistent."""


class StateError(SinkError):
    """A saved state that is truncated, of another model or of another version."""


class BackendError(SinkError):
    """A backend that is not installed or cannot run the bundle."""


def problem(what: str, *, received: object, expected: str, fix: str) -> str:
    """One line in the house form, e.g. ``window size: received 0, expected >= 1; pass --window``."""
    return f"{what}: received {received}, expected {expected}; {fix}"
