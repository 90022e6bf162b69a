"""Metrics for Prometheus: requests, tokens, conversations, times and memory. Times in seconds, memory in bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sinkexport.util.process_memory import resident_bytes

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_WAIT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "sinkexport_requests", "HTTP requests that are done", ["route", "status"], registry=self._registry
        )
        self.finished = Counter(
            "sinkexport_answers", "Answers by the reason of their end", ["reason"], registry=self._registry
        )
        self.key_requests = Counter(
            "sinkexport_key_requests", "HTTP requests by the key's name", ["key", "status"], registry=self._registry
        )
        self.key_tokens = Counter(
            "sinkexport_key_tokens",
            "Tokens of prompts that were fed and of answers, by the key's name",
            ["key", "kind"],
            registry=self._registry,
        )
        self.queue_s = self._histogram("queue_seconds", "From a request's arrival until it has a stream", _WAIT_BUCKETS)
        self.first_token_s = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token", _WAIT_BUCKETS
        )
        self.output_token_s = self._histogram(
            "time_per_output_token_seconds", "Mean over an answer, its first token left out", _TOKEN_BUCKETS
        )
        memory = Gauge("sinkexport_resident_memory_bytes", "Resident memory", registry=self._registry)
        memory.set_function(resident_bytes)

    def watch(self, totals: Callable[[], Totals]) -> None:
        """Read the decode loop's figures whenever somebody asks for the metrics."""
        self._registry.register(_TotalsCollector(totals))

    def text(self) -> bytes:
        """Write all metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"sinkexport_{name}", about, buckets=buckets, registry=self._registry)


class Totals:
    """Figures of the decode loop, written by its thread alone: plain numbers, so that readers need no lock.

    prompt_tokens, reused_tokens, answer_tokens: since the start, tokens of prompts fed, of prompts that a stream had
    taken already, and of answers.
    running, waiting, parked, conversations: see `sinkrt.scheduler.Load`. failed: the loop is down.
    prefixes, prefix_bytes: beginnings of prompts that are kept in memory, and what they take.
    """

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.reused_tokens = 0
        self.answer_tokens = 0
        self.running = 0
        self.waiting = 0
        self.parked = 0
        self.conversations = 0
        self.prefixes = 0
        self.prefix_bytes = 0
        self.failed = False


class _TotalsCollector(Collector):
    def __init__(self, totals: Callable[[], Totals]) -> None:
        self._totals = totals

    def collect(self) -> Iterable[Metric]:
        totals = self._totals()
        for name, about in (
            ("prompt_tokens", "Tokens of prompts that were fed"),
            ("reused_tokens", "Tokens of prompts that a stream had taken already"),
            ("answer_tokens", "Tokens of answers"),
        ):
            yield CounterMetricFamily(f"sinkexport_{name}", about, value=getattr(totals, name))
        for name, about in (
            ("running", "Conversations at work in a stream"),
            ("waiting", "Conversations with work and without a stream"),
            ("parked", "Conversations whose stream is copied out"),
        ):
            yield GaugeMetricFamily(f"sinkexport_{name}_conversations", about, value=getattr(totals, name))
        yield GaugeMetricFamily("sinkexport_conversations", "Conversations remembered", value=totals.conversations)
        yield GaugeMetricFamily("sinkexport_prefixes", "Beginnings of prompts kept in memory", value=totals.prefixes)
        yield GaugeMetricFamily("sinkexport_prefix_bytes", "Memory that they take", value=totals.prefix_bytes)
        yield GaugeMetricFamily("sinkexport_engine_up", "1 while decoding works", value=0 if totals.failed else 1)
