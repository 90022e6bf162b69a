"""What Prometheus may ask for."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from sinkexport.serve.engine import Engine
from sinkexport.streams import resident_bytes

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counters and gauges of one server, in a registry of their own."""

    def __init__(self, engine: Engine) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("sinkexport_requests", "HTTP requests", ["route", "status"], registry=registry)
        self.prompt_tokens = Counter("sinkexport_prompt_tokens", "Tokens of prompts fed", registry=registry)
        self.reused_tokens = Counter(
            "sinkexport_reused_tokens", "Tokens of prompts that a stream held already", registry=registry
        )
        self.answer_tokens = Counter("sinkexport_answer_tokens", "Tokens of answers", registry=registry)
        self.cancelled = Counter("sinkexport_cancelled", "Answers whose caller went away", registry=registry)
        self.first_token = Histogram(
            "sinkexport_first_token_seconds", "From request to first text", buckets=SECONDS, registry=registry
        )
        self.per_token = Histogram(
            "sinkexport_token_seconds", "Time per token of an answer after the first text", buckets=SECONDS,
            registry=registry,
        )  # fmt: skip
        gauges = {
            "running": ("Conversations at work in a stream", lambda: engine.load.running),
            "waiting": ("Conversations that wait for a stream", lambda: engine.load.waiting),
            "parked": ("Conversations whose stream is copied out", lambda: engine.load.parked),
            "conversations": ("Conversations remembered", lambda: engine.load.conversations),
            "resident_bytes": ("Resident memory", resident_bytes),
            "engine_up": ("1 while the engine runs", lambda: engine.failure is None),
        }
        for name, (help_text, value) in gauges.items():
            Gauge(f"sinkexport_{name}", help_text, registry=registry).set_function(value)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
