"""Many conversations on the few streams of one session.

    scheduler = Scheduler(session)
    scheduler.submit("ada", tokenizer.encode("Hello"), SamplingParams(), AnswerParams(max_tokens=50))
    while scheduler.has_work:
        for event in scheduler.step():
            print(event.conversation, event.text)

Each conversation goes on for ever and hears only itself: it gets what a session of its own would give. At any time a
conversation is in a stream of the session, parked (its stream copied out, to be put back bit by bit) or new.

No threads and no clocks: whoever owns the session calls `step`, which does one run of a graph.
"""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
import numpy.typing as npt

from sinkrt.answer import Answer, AnswerParams
from sinkrt.conversation import NO_IDS, Conversation, starts
from sinkrt.errors import BackendError, SinkError, UsageError, problem
from sinkrt.sampler import SamplingParams
from sinkrt.session import Session
from sinkrt.stream_slots import Places

SLICE_TOKENS = 256
"""Tokens that a conversation keeps its stream for while others wait; parking one costs about as much as one token."""

MAX_CONVERSATIONS = 64


@dataclasses.dataclass(frozen=True)
class Event:
    """What one run did for one conversation.

    A request's first event, with nothing in it, tells that the conversation has a stream; there is one for the first
    token of the answer too, even if it shows no text yet.

    text: what its answer grew by, whole characters. finish_reason: of `Answer`, or ``error`` or ``cancelled``; None
    while it goes on. error: the reason, in one line. prompt_tokens, answer_tokens: fed so far for this request.
    """

    conversation: str
    text: str
    finish_reason: str | None
    error: str | None
    prompt_tokens: int
    answer_tokens: int


@dataclasses.dataclass(frozen=True)
class Load:
    """How busy a scheduler is, in conversations: in a stream with work, without one but with work, parked, all."""

    running: int
    waiting: int
    parked: int
    conversations: int


class _StreamError(Exception):
    """A stream cannot go on."""

    def __init__(self, reason: SinkError) -> None:
        super().__init__(str(reason))
        self.reason = reason


class Scheduler:
    """N conversations on the B streams of `session`, which nobody else may use.

    max_conversations: how many are remembered, >= 1. The least recently active one without work is forgotten for a new
    one, `lasting` ones last.
    slice_tokens: how long a conversation keeps its stream while others wait.
    max_parked_bytes: memory for parked streams (see `places.stream_bytes`); None: whatever max_conversations takes.
    When it is full, idle conversations are forgotten; those at work wait until a stream is free.

    Raises: UsageError.
    """

    def __init__(
        self,
        session: Session,
        *,
        max_conversations: int = MAX_CONVERSATIONS,
        slice_tokens: int = SLICE_TOKENS,
        max_parked_bytes: int | None = None,
    ) -> None:
        for name, value in (("max_conversations", max_conversations), ("slice_tokens", slice_tokens)):
            if value < 1:
                raise UsageError(problem(name, received=value, expected=">= 1", fix=f"raise {name}"))
        if max_parked_bytes is not None and max_parked_bytes < 0:
            raise UsageError(problem("max_parked_bytes", received=max_parked_bytes, expected=">= 0", fix="raise it"))
        self._session = session
        self._max_conversations = max_conversations
        # By name; the least recently active first.
        self._conversations: collections.OrderedDict[str, Conversation] = collections.OrderedDict()
        self._places = Places(session, slice_tokens, max_parked_bytes, lambda c: self.forget(c.name))
        self._stepped_last = False
        self._prompt_tokens = 0
        self._answer_tokens = 0

    @property
    def prompt_tokens(self) -> int:
        """Tokens of prompts fed so far, of all conversations."""
        return self._prompt_tokens

    @property
    def answer_tokens(self) -> int:
        """Tokens of answers fed so far, of all conversations."""
        return self._answer_tokens

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._places.num_waiting) or any(owner.is_ready for owner in self._places.owners)

    @property
    def load(self) -> Load:
        """How busy it is."""
        return Load(
            running=sum(owner.has_work for owner in self._places.owners),
            waiting=self._places.num_waiting,
            parked=self._places.num_parked,
            conversations=len(self._conversations),
        )

    def __contains__(self, name: str) -> bool:
        return name in self._conversations

    def position(self, name: str) -> int:
        """Tokens that a conversation's stream has taken.

        Raises: UsageError for an unknown conversation.
        """
        return self._known(name).history.count

    def num_pending(self, name: str) -> int:
        """Tokens of its prompt that a conversation has not been fed yet.

        Raises: UsageError for an unknown conversation.
        """
        return self._known(name).num_pending

    def is_at_work(self, name: str) -> bool:
        """Whether a conversation has a request that is not done.

        Raises: UsageError for an unknown conversation.
        """
        return self._known(name).has_work

    def find_start(self, ids: npt.ArrayLike) -> str | None:
        """The idle conversation that has taken exactly the longest start of `ids`, or None; no `lasting` one.

        Submitting the rest of `ids` (from `position` on) to it gives what all of `ids` give to a new one. ids: int [N].
        """
        tokens = np.asarray(ids, dtype=np.int64)
        idle = [c for c in self._conversations.values() if c.history.count and not (c.has_work or c.lasting)]
        digests = starts(tokens, [c.history.count for c in idle])
        found = [c for c in idle if digests.get(c.history.count) == c.history.digest()]
        return max(found, key=lambda c: c.history.count).name if found else None

    def submit(
        self,
        name: str,
        ids: npt.ArrayLike,
        sampling: SamplingParams,
        params: AnswerParams,
        *,
        lasting: bool = False,
    ) -> None:
        """Queue a prompt and its answer for a conversation, which begins with it if it is new.

        ids: int [N]; N = 0 lets a conversation that has begun go on. lasting: of a new conversation, that it is
        forgotten only if no other can be.

        Raises: UsageError if the ids are not the model's, the conversation is at work already, or all of
        max_conversations are.
        """
        model = self._session.manifest.model
        tokens = np.asarray(ids)
        conversation = self._conversations.get(name)
        begun = conversation is not None and bool(conversation.history.count or conversation.num_pending)
        if tokens.ndim != 1 or not (tokens.size or begun) or (tokens.size and tokens.dtype.kind not in "iu"):
            raise UsageError(
                problem(
                    "prompt",
                    received=f"{tokens.dtype} {list(tokens.shape)}",
                    expected="integers [N], N >= 1",
                    fix="give some text",
                )
            )
        outside = tokens[(tokens < 0) | (tokens >= model.vocab_size)]
        if outside.size:
            raise UsageError(
                problem(
                    "token id",
                    received=int(outside[0]),
                    expected=f"0 .. {model.vocab_size - 1}",
                    fix="use the tokenizer of this model",
                )
            )
        if conversation is not None and conversation.has_work:
            raise UsageError(
                problem(
                    "conversation",
                    received=f"'{name}', which is at work",
                    expected="an idle one",
                    fix="wait for its answer, or cancel it",
                )
            )
        answer = Answer(self._session.tokenizer, model.eos_token_ids, model.vocab_size, sampling, params)
        if conversation is None:
            self._make_room()
            conversation = self._conversations[name] = Conversation(name, lasting)
        rest = conversation.pending[conversation.fed :]  # of a prompt that was cut short
        conversation.pending, conversation.fed = np.concatenate([rest, tokens.astype(np.int64)]), 0
        conversation.answer, conversation.announced, conversation.paused = answer, False, False
        conversation.followed, conversation.goes_on = False, not conversation.pending.size
        self._conversations.move_to_end(name)
        self._places.enter(conversation)

    def cancel(self, name: str, *, keep_prompt: bool = False) -> Event | None:
        """Stop what a conversation is at; it keeps the tokens that it has taken. Returns its last event, if any.

        keep_prompt: what it has not taken of its prompt it takes before the next one; otherwise that is dropped.

        Raises: UsageError for an unknown conversation.
        """
        conversation = self._known(name)
        if not conversation.has_work:
            return None
        rest = conversation.pending[conversation.fed :].copy()
        event = self._finished(conversation, "", "cancelled")
        if keep_prompt:
            conversation.pending = rest
        return event

    def pause(self, name: str) -> None:
        """Let a conversation rest, because nobody takes its text: it may lose its stream, but not its place in memory.

        Raises: UsageError for an unknown conversation.
        """
        conversation = self._known(name)
        conversation.paused = conversation.has_work
        self._places.stop_waiting(conversation)

    def resume(self, name: str) -> None:
        """End a pause.

        Raises: UsageError for an unknown conversation.
        """
        conversation = self._known(name)
        conversation.paused = False
        self._places.enter(conversation)

    def forget(self, name: str) -> None:
        """Drop a conversation, at work or not.

        Raises: UsageError for an unknown conversation.
        """
        conversation = self._known(name)
        self.cancel(name)
        self._places.leave(conversation)
        del self._conversations[name]

    def step(self) -> list[Event]:
        """One run of a graph: a chunk of one conversation's prompt, or one token of all that are past theirs.

        The two take turns, so that neither a long prompt nor long answers hold up the others. What fails, fails alone.

        Returns: what became of the conversations that took part.
        """
        self._places.assign(self._by_age())
        at_work = [owner for owner in self._places.owners if owner.is_ready]
        events = []
        for conversation in at_work:
            if not conversation.announced:
                conversation.announced = True
                events.append(self._event(conversation, "", None))
        smallest = self._session.smallest_chunk
        in_chunks = [c for c in at_work if c.num_pending >= smallest]
        in_steps = [c for c in at_work if c.num_pending < smallest]
        if in_chunks and (self._stepped_last or not in_steps):
            self._stepped_last = False
            # The one that has had its stream for the fewest tokens goes first: prompts advance side by side.
            return events + self._feed_chunk(min(in_chunks, key=lambda c: c.placed_tokens))
        self._stepped_last = True
        return events + self._feed_tokens(in_steps)

    def _feed_chunk(self, conversation: Conversation) -> list[Event]:
        size = min(conversation.num_pending, self._session.chunk_size)
        ids = conversation.pending[conversation.fed : conversation.fed + size]
        try:
            self._session.prefill(ids, streams=[conversation.the_stream])
        except SinkError as error:
            return [self._failed(conversation, error)]
        conversation.fed += size
        conversation.took(ids)
        self._prompt_tokens += size
        return []

    def _feed_tokens(self, conversations: list[Conversation]) -> list[Event]:
        events, chosen = [], []
        for conversation in conversations:
            try:
                token = self._next_token(conversation)
                rest = conversation.the_answer.flush() if token is None else ""
            except _StreamError as error:
                events.append(self._failed(conversation, error.reason))
            except Exception as error:  # of sampling or decoding: the stream has no part in it
                events.append(self._broken_off(conversation, error))
            else:
                if token is None:
                    events.append(self._finished(conversation, rest))
                else:
                    chosen.append((conversation, token))
        failures = self._run(chosen)
        for conversation, token in chosen:
            if conversation.name in failures:
                events.append(self._failed(conversation, failures[conversation.name]))
            else:
                events += self._took(conversation, token)
        return events

    def _run(self, chosen: list[tuple[Conversation, int]]) -> dict[str, SinkError]:
        """Feed one token to each conversation. Returns the errors of those that cannot take theirs, by name."""
        if not chosen:
            return {}
        try:
            self._session.step([token for _, token in chosen], [c.the_stream for c, _ in chosen])
        except SinkError as error:
            if len(chosen) == 1:
                return {chosen[0][0].name: error}
            # No position has advanced: each on its own shows whose fault it is.
            return {name: reason for one in chosen for name, reason in self._run([one]).items()}
        return {}

    def _took(self, conversation: Conversation, token: int) -> list[Event]:
        conversation.took(np.array([token], dtype=np.int64))
        if conversation.num_pending:
            conversation.fed += 1
            self._prompt_tokens += 1
            return []
        self._answer_tokens += 1
        answer = conversation.the_answer
        try:
            text = answer.push(token)
            if answer.finish_reason is not None:
                text += answer.flush()
        except Exception as error:  # of decoding: the stream has taken the token
            return [self._broken_off(conversation, error)]
        if answer.finish_reason is not None:
            return [self._finished(conversation, text)]
        if text or answer.num_tokens == 1:
            return [self._event(conversation, text, None)]
        return []

    def _next_token(self, conversation: Conversation) -> int | None:
        """The prompt's next token, or the answer's; None at the end of the text.

        Raises: _StreamError if the stream cannot go on; whatever sampling raises, after which it can.
        """
        stream, session = conversation.the_stream, self._session
        position = conversation.history.count
        if position >= session.manifest.stream.position_limit:
            raise _StreamError(
                UsageError(
                    problem(
                        "conversation", received=f"{position} tokens", expected="room for more", fix="begin a new one"
                    )
                )
            )
        if conversation.num_pending:
            return int(conversation.pending[conversation.fed])
        answer, recent = conversation.the_answer, session.recent_ids(stream)
        if not conversation.followed:
            conversation.followed = True
            answer.follow(recent.tolist(), goes_on=conversation.goes_on)
        try:
            return answer.pick(session.logits[stream], recent, position)
        except BackendError as error:  # the model's numbers are none, and so are the stream's
            raise _StreamError(error) from error

    def _by_age(self) -> list[Conversation]:
        """All conversations, the one to be forgotten first at the front."""
        return sorted(self._conversations.values(), key=lambda c: c.lasting)  # stable: the least recently active first

    def _make_room(self) -> None:
        if len(self._conversations) < self._max_conversations:
            return
        idle = next((c for c in self._by_age() if not c.has_work), None)
        if idle is None:
            raise UsageError(
                problem(
                    "conversations",
                    received=f"{len(self._conversations)} at work",
                    expected=f"fewer than {self._max_conversations}",
                    fix="wait for one to end",
                )
            )
        self.forget(idle.name)

    # --- ends ---

    def _finished(self, conversation: Conversation, text: str, reason: str | None = None) -> Event:
        event = self._event(conversation, text, reason or conversation.the_answer.finish_reason)
        conversation.answer, conversation.paused = None, False
        conversation.pending, conversation.fed = NO_IDS, 0
        self._places.stop_waiting(conversation)
        self._conversations.move_to_end(conversation.name)
        return event

    def _broken_off(self, conversation: Conversation, error: Exception) -> Event:
        """The answer is over and nothing else: the conversation goes on from what its stream has taken."""
        reason = " ".join(str(error).split())
        if not isinstance(error, SinkError):
            reason = f"{type(error).__name__}: {reason}"
        return dataclasses.replace(self._finished(conversation, "", "error"), error=reason)

    def _failed(self, conversation: Conversation, error: SinkError) -> Event:
        """The conversation is over: its stream may hold half a chunk, or numbers that are none."""
        event = dataclasses.replace(self._finished(conversation, "", "error"), error=str(error))
        self._session.reset([conversation.the_stream])
        self.forget(conversation.name)
        return event

    def _event(self, conversation: Conversation, text: str, reason: str | None) -> Event:
        return Event(conversation.name, text, reason, None, conversation.fed, conversation.the_answer.num_tokens)

    def _known(self, name: str) -> Conversation:
        conversation = self._conversations.get(name)
        if conversation is None:
            raise UsageError(
                problem(
                    "conversation",
                    received=f"'{name}'",
                    expected="one that has begun and is kept",
                    fix="submit something to it first",
                )
            )
        return conversation
