"""Grammars made ready for one tokenizer."""

from __future__ import annotations

import collections
import concurrent.futures
import importlib
import json
import threading
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from sinkrt.errors import UsageError, problem
from sinkrt.grammar.matcher import MAX_GRAMMAR_TOKENS, Matcher, reason_of
from sinkrt.grammar.spec import Grammar
from sinkrt.grammar.tokens import TokenTable
from sinkrt.text import Tokenizer

BUILD_S = 10.0
"""Longest time to build a grammar."""
MAX_CACHED = 8
"""Grammars that are kept, the last ones asked for."""
RENEWAL_TOKENS = 8192
"""Tokens of answers after which a grammar is built anew: all answers share the states that llguidance makes on the way.
It lets go of none, and there may be `max_lexer_states`."""
STACK_BYTES = 256 * 2**20
"""Stack of the threads that build and follow grammars: llguidance descends into rules by calls within calls."""
TRIED_TOKENS = 4
"""Tokens for which a grammar is followed before it is used."""
LIMITS = {
    "max_items_in_row": 2000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,  # 1 to 2 KB each
    "max_grammar_size": 200_000,
    "verbose_errors": False,  # they would show the grammar
}


_STACKS = threading.Lock()


def require_library() -> Any:
    """The module ``llguidance``.

    Raises: UsageError if it is not installed.
    """
    try:
        return importlib.import_module("llguidance")
    except ImportError as error:
        raise UsageError(
            problem(
                "grammar",
                received="a Python without llguidance",
                expected="that package, which follows JSON schemas, regular expressions and grammars",
                fix="pip install 'sinkexport[grammar]'",
            )
        ) from error


class CompiledGrammar:
    """A grammar ready for the tokenizer of one model. Make one with `GrammarCompiler.compile`.

    max_tokens: of an answer under it. num_tokens: taken by all answers under it.
    """

    def __init__(self, native: Any, vocab_size: int, thread: ThreadPoolExecutor, max_tokens: int) -> None:
        self._native, self._vocab_size, self._thread = native, vocab_size, thread
        self.max_tokens, self.num_tokens = max_tokens, 0

    def _count(self) -> None:
        self.num_tokens += 1

    def matcher(self, ends: Collection[int]) -> Matcher:
        """The state of one answer. ends: tokens that end it."""
        return Matcher(self._native.deep_copy, self._vocab_size, ends, self._thread, self._count)


class GrammarCompiler:
    """Makes grammars ready for a tokenizer and the vocabulary of a model. Callable from any thread.

    vocab_size: of the model. build_s: longest time to build one. max_tokens: of an answer under one.
    renewal_tokens: of all answers under one, after which it is built anew.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        *,
        build_s: float = BUILD_S,
        max_tokens: int = MAX_GRAMMAR_TOKENS,
        renewal_tokens: int = RENEWAL_TOKENS,
    ) -> None:
        self._tokenizer, self._vocab_size, self._build_s = tokenizer, vocab_size, build_s
        self._max_tokens, self._renewal_tokens = max_tokens, renewal_tokens
        self._lock = threading.Lock()
        self._table: Any = None
        self._limits: Any = None
        self._compiled: collections.OrderedDict[Grammar, CompiledGrammar] = collections.OrderedDict()
        self._masks = _executor(1, "sinkrt-grammar")
        self._builds = _executor(2, "sinkrt-grammar-build")

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Make a grammar ready, or give what an earlier call has made.

        Raises: UsageError for a grammar that is wrong or takes too long, for a tokenizer that it cannot be used with,
        and without the package.
        """
        table = self._the_table()
        with self._lock:
            found = self._compiled.get(grammar)
            if found is not None and found.num_tokens < self._renewal_tokens:
                self._compiled.move_to_end(grammar)
                return found
        building: Future[Any] = self._builds.submit(self._build, table, grammar)
        try:
            native = building.result(self._build_s)
        except concurrent.futures.TimeoutError:
            building.cancel()
            raise _refused(f"one that takes more than {self._build_s:g} s to build") from None
        compiled = CompiledGrammar(native, self._vocab_size, self._masks, self._max_tokens)
        with self._lock:
            self._compiled[grammar] = compiled
            while len(self._compiled) > MAX_CACHED:
                self._compiled.popitem(last=False)
        return compiled

    def close(self) -> None:
        """End the threads. Nothing can be compiled or followed afterwards."""
        self._masks.shutdown(wait=False, cancel_futures=True)
        self._builds.shutdown(wait=False, cancel_futures=True)

    def _the_table(self) -> Any:
        """The tokens in llguidance's form, made on first use: a second or two for 262,144 of them."""
        library = require_library()
        with self._lock:
            if self._table is None:
                table = TokenTable(self._tokenizer, self._vocab_size)
                wrapped = library.TokenizerWrapper(table)
                self._table = library.LLTokenizer(wrapped, n_vocab=self._vocab_size + 1, eos_token=table.eos_token_id)
                self._limits = library.LLParserLimits(**LIMITS)
            return self._table

    def _build(self, table: Any, grammar: Grammar) -> Any:
        """Raises: UsageError."""
        library = require_library()
        try:
            text = _source(library, grammar)
        except Exception as error:  # of the conversion from GBNF, in Python
            raise _refused(reason_of(str(error)) or type(error).__name__) from error
        is_error, messages = library.LLMatcher.validate_grammar_with_warnings(text, table, limits=self._limits)
        if is_error or messages:  # a warning says what would be ignored
            raise _refused(reason_of(messages[0]))
        native = library.LLMatcher(table, text, log_level=0, limits=self._limits)
        _try(native.deep_copy(), self._vocab_size)
        return native


def _executor(threads: int, name: str) -> ThreadPoolExecutor:
    """Threads with a deep stack: all of them are started now, since its size is a setting of the whole process."""
    executor = ThreadPoolExecutor(threads, name)
    with _STACKS:
        before = threading.stack_size(STACK_BYTES)
        try:
            all_there = threading.Barrier(threads + 1)
            for _ in range(threads):
                executor.submit(all_there.wait)
            all_there.wait()
        finally:
            threading.stack_size(before)
    return executor


def _try(native: Any, vocab_size: int) -> None:
    """Follow the grammar for some tokens: one that is too much for its limits mostly is so from the beginning.

    Raises: UsageError.
    """
    for count in range(TRIED_TOKENS):
        mask = b"" if native.is_error() else native.compute_bitmask()
        if native.is_error():
            reason = reason_of(native.get_error())
            raise _refused("one that no text matches" if reason.startswith("NoExtension") else reason)
        allowed = np.flatnonzero(np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little"))
        if not (allowed.size or count):
            raise _refused("one that no text matches")
        if not allowed.size or allowed[0] >= vocab_size or native.is_stopped():
            return
        native.consume_token(int(allowed[0]))


def _source(library: Any, grammar: Grammar) -> str:
    """The grammar as llguidance reads it: a list of grammars, the one to begin with first."""
    if grammar.kind == "json_schema":
        body: dict[str, Any] = {"json_schema": json.loads(grammar.text)}
    elif grammar.kind == "regex":
        body = {"lark_grammar": f"start: /{library.regex_to_lark(grammar.text, '')}/"}
    else:
        convert = importlib.import_module("llguidance.gbnf_to_lark").any_to_lark
        body = {"lark_grammar": convert(grammar.text)}
    if not grammar.around:
        return json.dumps({"grammars": [body]})
    start = f"start: {grammar.around}\n{grammar.rules}"
    return json.dumps({"grammars": [{"lark_grammar": start}, {"name": "body", **body}]})


def _refused(reason: str) -> UsageError:
    return UsageError(
        problem("grammar", received=reason, expected="one that can be built", fix="see docs/structured-output.md")
    )
