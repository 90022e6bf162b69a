"""Many conversations on the few streams of one session.

    scheduler = Scheduler(session)
    scheduler.submit("ada", tokenizer.encode("Hello"), SamplingParams(), AnswerParams(max_tokens=50))
    while scheduler.has_work:
        for event in scheduler.step():
            print(event.conversation, event.text)

Each conversation goes on forever and hears only itself: it gets what a session of its own would give. At any time a
conversation is in a stream of the session, parked (its stream copied out, to be put back bit by bit) or new.

No threads and no clocks: whoever owns the session calls `step`, which does one run of a graph.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from sinkrt.answer import Answer, AnswerParams
from sinkrt.arguments import prompt_ids
from sinkrt.conversation import NO_IDS, Conversation
from sinkrt.conversation_table import ConversationTable
from sinkrt.errors import SinkError, UsageError, problem
from sinkrt.events import Event, Load
from sinkrt.feeding import StreamError, feed_one_each, next_token
from sinkrt.graph_runner import shared_chunk
from sinkrt.prefix_store import PrefixStore
from sinkrt.sampler import SamplingParams
from sinkrt.session import Session
from sinkrt.stream_slots import StreamSlots

SLICE_TOKENS = 256
"""Tokens that a conversation keeps its stream for while others wait; parking one costs about as much as one token."""

MAX_CONVERSATIONS = 64

__all__ = ["MAX_CONVERSATIONS", "SLICE_TOKENS", "Event", "Load", "Scheduler"]


class Scheduler:
    """N conversations on the B streams of `session`, which nobody else may use.

    max_conversations: how many are remembered, >= 1. The least recently active one without work is forgotten for a new
    one, `lasting` ones last.
    slice_tokens: how long a conversation keeps its stream while others wait.
    max_parked_bytes: memory for parked streams (see `stream_slots.stream_bytes`); None: whatever max_conversations
    takes. When it is full, idle conversations are forgotten; those at work wait until a stream is free.
    prefixes: beginnings of prompts that several conversations share; None: none are kept.

    Raises: UsageError.
    """

    def __init__(
        self,
        session: Session,
        *,
        max_conversations: int = MAX_CONVERSATIONS,
        slice_tokens: int = SLICE_TOKENS,
        max_parked_bytes: int | None = None,
        prefixes: PrefixStore | None = None,
    ) -> None:
        for name, value in (("max_conversations", max_conversations), ("slice_tokens", slice_tokens)):
            if value < 1:
                raise UsageError(problem(name, received=value, expected=">= 1", fix=f"raise {name}"))
        if max_parked_bytes is not None and max_parked_bytes < 0:
            raise UsageError(problem("max_parked_bytes", received=max_parked_bytes, expected=">= 0", fix="raise it"))
        self._session = session
        self._conversations = ConversationTable(max_conversations)
        self._slots = StreamSlots(session, slice_tokens, max_parked_bytes, lambda c: self.forget(c.name))
        self._prefixes = prefixes
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
        return bool(self._slots.num_waiting) or any(owner.is_ready for owner in self._slots.owners)

    @property
    def load(self) -> Load:
        """Its load now."""
        return Load(
            running=sum(owner.has_work for owner in self._slots.owners),
            waiting=self._slots.num_waiting,
            parked=self._slots.num_parked,
            conversations=len(self._conversations),
        )

    def __contains__(self, name: str) -> bool:
        return name in self._conversations

    def position(self, name: str) -> int:
        """Tokens that a conversation's stream has taken.

        Raises: UsageError for an unknown conversation.
        """
        return self._conversations.known(name).history.count

    def num_pending(self, name: str) -> int:
        """Tokens of its prompt that a conversation has not been fed yet.

        Raises: UsageError for an unknown conversation.
        """
        return self._conversations.known(name).num_pending

    def is_at_work(self, name: str) -> bool:
        """Whether a conversation has a request that is not done.

        Raises: UsageError for an unknown conversation.
        """
        return self._conversations.known(name).has_work

    def find_start(self, ids: npt.ArrayLike, prefix: str = "") -> str | None:
        """The idle conversation that has taken exactly the longest start of `ids`, or None; no `lasting` one.

        Submitting the rest of `ids` (from `position` on) to it gives what all of `ids` give to a new one. ids: int [N].
        prefix: begins the names of those that count.
        """
        found = self._conversations.find_start(np.asarray(ids, dtype=np.int64), prefix)
        return None if found is None else found.name

    def kept_start(self, owner: str, ids: npt.ArrayLike) -> int:
        """Number of first ids that a new conversation of `owner` need not be fed. ids: int [N]."""
        return 0 if self._prefixes is None else self._prefixes.longest(owner, np.asarray(ids, dtype=np.int64))

    def submit(
        self,
        name: str,
        ids: npt.ArrayLike,
        sampling: SamplingParams,
        params: AnswerParams,
        *,
        lasting: bool = False,
        owner: str = "",
        opening: int = 0,
    ) -> None:
        """Queue a prompt and its answer for a conversation, which begins with it if it is new.

        ids: int [N]; N = 0 lets a conversation that has begun go on. lasting: of a new conversation, that it is
        forgotten only if no other can be. owner, opening: of a new conversation, who may share beginnings of prompts
        with it, and how many of its ids others are likely to begin with, 0: unknown.
        Its stream begins with the longest beginning that is kept; `position` says with how many tokens.

        Raises: UsageError if the ids are not the model's, the conversation is at work already, or all of
        max_conversations are.
        """
        model = self._session.manifest.model
        conversation = self._conversations.get(name)
        begun = conversation is not None and bool(conversation.history.count or conversation.num_pending)
        tokens = prompt_ids(ids, model.vocab_size, may_be_empty=begun)
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
            if (idle := self._conversations.in_the_way()) is not None:
                self.forget(idle.name)
            conversation = Conversation(name, lasting, owner=owner)
            tokens = self._begin(conversation, tokens, opening)
        rest = conversation.pending[conversation.fed :]  # of a prompt that was cut short
        conversation.pending, conversation.fed = np.concatenate([rest, tokens]), 0
        conversation.answer, conversation.announced, conversation.paused = answer, False, False
        conversation.followed, conversation.goes_on = False, not conversation.pending.size
        self._conversations.touch(conversation)
        self._slots.enter(conversation)

    def _begin(self, conversation: Conversation, ids: npt.NDArray[np.int64], opening: int) -> npt.NDArray[np.int64]:
        """Give a new conversation the stream of a kept beginning, if there is one. Returns: the ids that are left."""
        if self._prefixes is None:
            return ids
        found = self._prefixes.find(conversation.owner, ids)  # first: a damaged one is dropped, and then kept anew
        conversation.boundaries = self._prefixes.boundaries(conversation.owner, ids, opening)
        if found is None or not self._slots.park(conversation, found.copy):
            return ids
        conversation.history = found.history
        return ids[found.history.count :]

    def submit_sibling(
        self, leader: str, name: str, ids: npt.ArrayLike, sampling: SamplingParams, params: AnswerParams
    ) -> None:
        """Queue another answer to the prompt that `leader`, submitted just before, has not been fed whole.

        The new conversation goes on from a copy of the leader's stream once that has taken the prompt. If that cannot
        be had, because the leader has ended or there is no memory to park a copy, it is fed the prompt by itself.
        ids: int [N], all that the leader's stream will have taken then.

        Raises: UsageError as `submit`, and for a leader that is unknown or has its prompt already.
        """
        first = self._conversations.known(leader)
        if not first.num_pending or name in self._conversations:
            raise UsageError(
                problem(
                    "sibling",
                    received=f"'{name}' of '{leader}'",
                    expected="a new name, and a prompt that is still to be fed",
                    fix="submit it with its leader",
                )
            )
        self.submit(name, ids, sampling, params)
        self._conversations.known(name).follow(first)
        self._slots.stop_waiting(self._conversations.known(name))

    def cancel(self, name: str, *, keep_prompt: bool = False) -> Event | None:
        """Stop what a conversation is at; it keeps the tokens that it has taken. Returns its last event, if any.

        keep_prompt: what it has not taken of its prompt it takes before the next one; otherwise that is dropped.

        Raises: UsageError for an unknown conversation.
        """
        conversation = self._conversations.known(name)
        if not conversation.has_work:
            return None
        rest = conversation.pending[conversation.fed :].copy()
        event = self._finished(conversation, "", "cancelled")
        if keep_prompt:
            conversation.pending = rest
        return event

    def pause(self, name: str) -> None:
        """Let a conversation rest, because nobody takes its text: it may lose its stream, but is not forgotten.

        Raises: UsageError for an unknown conversation.
        """
        conversation = self._conversations.known(name)
        conversation.paused = conversation.has_work
        self._slots.stop_waiting(conversation)

    def resume(self, name: str) -> None:
        """End a pause.

        Raises: UsageError for an unknown conversation.
        """
        conversation = self._conversations.known(name)
        conversation.paused = False
        self._slots.enter(conversation)

    def forget(self, name: str) -> None:
        """Drop a conversation, at work or not.

        Raises: UsageError for an unknown conversation.
        """
        conversation = self._conversations.known(name)
        self.cancel(name)
        self._slots.leave(conversation)
        self._conversations.remove(conversation)

    def step(self) -> list[Event]:
        """Run a graph once: a chunk of one conversation's prompt, or one token of all that are past theirs.

        The two take turns, so that neither a long prompt nor long answers hold up the others. What fails, fails alone.

        Returns: events of the conversations that took part.
        """
        self._slots.assign(self._conversations.by_age())
        at_work = [owner for owner in self._slots.owners if owner.is_ready]
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
            return events + self._feed_chunk(min(in_chunks, key=lambda c: c.placed_tokens), is_alone=not in_steps)
        self._stepped_last = True
        return events + self._feed_tokens(in_steps)

    def _feed_chunk(self, conversation: Conversation, *, is_alone: bool) -> list[Event]:
        largest = self._session.chunk_size if is_alone else shared_chunk(self._session.manifest)
        size = min(conversation.num_in_one_go, largest)
        ids = conversation.pending[conversation.fed : conversation.fed + size]
        try:
            self._session.prefill(ids, streams=[conversation.the_stream])
        except SinkError as error:
            return [self._failed(conversation, error)]
        conversation.fed += size
        conversation.took(ids)
        self._prompt_tokens += size
        self._keep(conversation)
        return []

    def _feed_tokens(self, conversations: list[Conversation]) -> list[Event]:
        events, chosen = [], []
        for conversation in conversations:
            if conversation.siblings and not conversation.num_pending:
                self._fork(conversation)
            try:
                token = next_token(self._session, conversation)
                rest = conversation.the_answer.flush() if token is None else ""
            except StreamError as error:
                events.append(self._failed(conversation, error.reason))
            except Exception as error:  # of sampling or decoding: the stream has no part in it
                events.append(self._broken_off(conversation, error))
            else:
                if token is None:
                    events.append(self._finished(conversation, rest))
                else:
                    chosen.append((conversation, token))
        failures = feed_one_each(self._session, chosen)
        for conversation, token in chosen:
            if conversation.name in failures:
                events.append(self._failed(conversation, failures[conversation.name]))
            else:
                events += self._took(conversation, token)
        return events

    def _keep(self, conversation: Conversation) -> None:
        """Keep the stream of a conversation for others that begin alike, if it has taken just what they share."""
        if self._prefixes is not None and conversation.history.count in conversation.boundaries:
            conversation.boundaries.remove(conversation.history.count)
            copy = self._session.copy_stream(conversation.the_stream)
            self._prefixes.keep(conversation.owner, conversation.history, copy)

    def _fork(self, leader: Conversation) -> None:
        """Let the siblings of a conversation, which has just taken its prompt, go on from a copy of its stream."""
        copy = self._session.copy_stream(leader.the_stream)
        for sibling in leader.end_siblings():
            if self._slots.park(sibling, copy):
                sibling.history = leader.history.copy()
                sibling.fed = int(sibling.pending.size)
            self._slots.enter(sibling)

    def _took(self, conversation: Conversation, token: int) -> list[Event]:
        conversation.took(np.array([token], dtype=np.int64))
        if conversation.num_pending:
            conversation.fed += 1
            self._prompt_tokens += 1
            self._keep(conversation)
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

    # --- ends ---

    def _finished(self, conversation: Conversation, text: str, reason: str | None = None) -> Event:
        event = self._event(conversation, text, reason or conversation.the_answer.finish_reason)
        conversation.answer, conversation.paused = None, False
        conversation.pending, conversation.fed = NO_IDS, 0
        self._slots.stop_waiting(conversation)
        self._conversations.touch(conversation)
        for sibling in conversation.end_siblings():  # nobody feeds the prompt for them any more
            self._slots.enter(sibling)
        return event

    def _broken_off(self, conversation: Conversation, error: Exception) -> Event:
        """End an answer and nothing else: the conversation goes on from what its stream has taken."""
        reason = " ".join(str(error).split())
        if not isinstance(error, SinkError):
            reason = f"{type(error).__name__}: {reason}"
        return dataclasses.replace(self._finished(conversation, "", "error"), error=reason)

    def _failed(self, conversation: Conversation, error: SinkError) -> Event:
        """End a conversation: its stream may hold half a chunk, or numbers that are none."""
        event = dataclasses.replace(self._finished(conversation, "", "error"), error=str(error))
        self._session.reset([conversation.the_stream])
        self.forget(conversation.name)
        return event

    def _event(self, conversation: Conversation, text: str, reason: str | None) -> Event:
        answer = conversation.the_answer
        logprobs = answer.take_logprobs()
        return Event(conversation.name, text, reason, None, conversation.fed, answer.num_tokens, logprobs)
