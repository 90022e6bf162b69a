"""One answer in progress: its next token, the text that may be shown already, and when to stop.

It needs no session. `Session.generate` or a `Scheduler` asks it for a token, feeds that, and pushes it back for its
text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from sinkrt.errors import UsageError, problem
from sinkrt.grammar import CompiledGrammar
from sinkrt.logit_rules import LogitParams, LogitRules, TokenLogprob
from sinkrt.sampler import Sampler, SamplingParams
from sinkrt.text import MAX_PENDING, Tokenizer

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
"""Together they bound the text that is held back because it may become a stop sequence."""


@dataclasses.dataclass(frozen=True)
class AnswerParams:
    """Limits of an answer.

    max_tokens: None for no limit. stop: texts that end the answer, which does not show them. Names of special tokens
    count there, although answers do not show those.
    ignore_eos: go on when the model ends its text.
    shown: names of special tokens that the answer shows, for whoever takes it apart. logits: see `LogitParams`.
    grammar: what the answer must match; it ends where that says so, and after the tokens that
    may be under one.

    Raises: UsageError.
    """

    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    shown: frozenset[str] = frozenset()
    logits: LogitParams = dataclasses.field(default_factory=LogitParams)
    grammar: CompiledGrammar | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None and (not isinstance(self.max_tokens, (int, np.integer)) or self.max_tokens < 1):
            raise UsageError(
                problem("max_tokens", received=self.max_tokens, expected="an integer >= 1", fix="leave it out for all")
            )
        if len(self.stop) > MAX_STOPS or not all(0 < len(text) <= MAX_STOP_CHARACTERS for text in self.stop):
            raise UsageError(
                problem(
                    "stop",
                    received=f"{len(self.stop)} texts of {[len(text) for text in self.stop]} characters",
                    expected=f"at most {MAX_STOPS} texts of 1 .. {MAX_STOP_CHARACTERS} characters",
                    fix="leave empty ones out",
                )
            )


class Answer:
    """The state of one answer.

    eos_token_ids: tokens that end the model's text. earlier: ids that the stream took just before, if the answer goes
    on where another was cut short: a character that began in them is completed. after: the same of any other answer
    (see `StreamingDecoder`).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        eos_token_ids: Collection[int],
        vocab_size: int,
        sampling: SamplingParams,
        params: AnswerParams,
        earlier: Sequence[int] = (),
        *,
        after: Sequence[int] = (),
    ) -> None:
        self._rules = None if params.logits == LogitParams() else LogitRules(params.logits, vocab_size)
        self._sampler = Sampler(sampling, vocab_size, rules=self._rules)
        self._tokenizer = tokenizer
        self._matcher = StopMatcher(params.stop)
        self._params = params
        self._max_tokens = params.max_tokens
        if params.grammar is not None:
            self._max_tokens = min(params.max_tokens or params.grammar.max_tokens, params.grammar.max_tokens)
        # A stop sequence that is one special token ends the text as the model's own end does: it is not fed.
        stops = frozenset(token for text in params.stop if (token := tokenizer.special_id(text)) is not None)
        self._ends = stops.union(() if params.ignore_eos else eos_token_ids)
        self._grammar = None if params.grammar is None else params.grammar.matcher(self._ends)
        self._num_tokens = 0
        self._num_characters = 0  # of the text so far, with what is held back
        self._picked: TokenLogprob | None = None
        self._logprobs: list[TokenLogprob] = []
        self._finish_reason: str | None = None
        self.follow(earlier or after, goes_on=bool(earlier))

    def follow(self, after: Sequence[int], *, goes_on: bool = False) -> None:
        """Set what the stream has taken before the answer's first token, where that is known later than the rest."""
        self._decoder = self._tokenizer.streaming_decoder(after[:-MAX_PENDING] if goes_on else after)
        for token in after[-MAX_PENDING:] if goes_on else ():
            self._decoder.push(token)

    @property
    def num_tokens(self) -> int:
        """Tokens pushed so far."""
        return self._num_tokens

    @property
    def finish_reason(self) -> str | None:
        """``stop``: the model ended its text or wrote a stop sequence; ``length``: max_tokens; None: it goes on."""
        return self._finish_reason

    def pick(self, logits: npt.NDArray[np.float32], recent: npt.NDArray[np.int64], position: int) -> int | None:
        """The next token to feed, or None at the end of the text. Arguments as in `Sampler.sample`.

        Raises: BackendError if the logits are not numbers; UsageError if the grammar needs more than it may.
        """
        allowed = None
        if self._grammar is not None:
            self._grammar.rollback(self._grammar.num_tokens - self._num_tokens)  # of a token that was never fed
            allowed = self._grammar.allowed()
            if allowed is None:
                self._finish_reason = "stop"
                return None
        token = self._sampler.sample(logits, recent, position, allowed)
        if token in self._ends:
            self._finish_reason = "stop"
            return None
        self._picked = None if self._rules is None else self._rules.report(logits, token)
        if self._grammar is not None:
            self._grammar.take(token)  # what may come next is found out while the model's step runs
        return token

    def push(self, token: int) -> str:
        """Count a token that was fed. Returns the text that it lets be shown, often none or more than one word."""
        self._num_tokens += 1
        if self._rules is not None:
            self._rules.take(token)
        if self._picked is not None:
            self._logprobs.append(dataclasses.replace(self._picked, offset=self._num_characters))
        text, name = self._decoder.push(token), self._tokenizer.special_text(token)
        if name in self._params.shown:
            text, name = text + name, ""
        self._num_characters += len(text)
        piece = self._matcher.push(text, name)
        if self._matcher.matched or (self._grammar is not None and self._grammar.is_over):
            self._finish_reason = "stop"
        elif self._num_tokens == self._max_tokens:
            self._finish_reason = "length"
        return piece

    def flush(self) -> str:
        """Text that was held back, once the answer is over."""
        return self._matcher.flush(self._decoder.flush())

    def take_logprobs(self) -> tuple[TokenLogprob, ...]:
        """Log probabilities of the tokens pushed since the last call, if `LogitParams.top_logprobs` asks for them."""
        taken, self._logprobs = tuple(self._logprobs), []
        return taken


class StopMatcher:
    """Pass text on up to the first of some stop sequences, however it is cut into pieces.

    Names of special tokens are part of what is searched, and are not passed on. A stop sequence also counts where it
    is found once they are left out. Only an end that may become a stop sequence is held back, so at most the longest
    one less a character.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self._whole = ""  # the end of the text with special tokens that may become a stop sequence
        self._shown: list[bool] = []  # of each character of `_whole`: whether it is passed on
        self._matched = False

    @property
    def matched(self) -> bool:
        """Whether a stop sequence has come: nothing is passed on any more."""
        return self._matched

    def push(self, piece: str, special: str = "") -> str:
        """Take a piece, and the name of a special token that follows it. Returns what may be shown."""
        if self._matched or not (piece or special):
            return ""
        text, whole = self._held + piece, self._whole + piece + special
        shown = [*self._shown, *[True] * len(piece), *[False] * len(special)]
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        found += [len(text) - sum(shown[at:]) for stop in self._stops if (at := whole.find(stop)) >= 0]
        if found:
            self._matched, self._held, self._whole, self._shown = True, "", "", []
            return text[: min(found)]
        keep_whole = max((_overlap(whole, stop) for stop in self._stops), default=0)
        self._whole, self._shown = whole[len(whole) - keep_whole :], shown[len(shown) - keep_whole :]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        keep = max(keep, sum(self._shown))
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self, piece: str = "") -> str:
        """Take the last piece and return all that is left."""
        text = self.push(piece)
        held, self._held = self._held, ""
        return text if self._matched else text + held


def _overlap(text: str, stop: str) -> int:
    """Number of characters at the end of `text` that begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
