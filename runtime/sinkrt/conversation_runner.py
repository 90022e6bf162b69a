"""A scheduler's conversations at work: chunks of prompts and tokens of answers, and how each of them ends."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from sinkrt.conversation import NO_IDS, Conversation
from sinkrt.conversation_table import ConversationTable
from sinkrt.errors import SinkError
from sinkrt.events import Event
from sinkrt.feeding import StreamError, feed_one_each, next_token
from sinkrt.graph_runner import shared_chunk
from sinkrt.keeper import Keeper
from sinkrt.session import Session
from sinkrt.stream_slots import StreamSlots


class ConversationRunner:
    """Feeds the conversations of a table to the streams of `session`.

    prompt_tokens, answer_tokens: fed so far, of all conversations.
    """

    def __init__(self, session: Session, conversations: ConversationTable, slots: StreamSlots, keeper: Keeper) -> None:
        self._session, self._conversations, self._slots, self._keeper = session, conversations, slots, keeper
        self._stepped_last = False
        self.prompt_tokens = 0
        self.answer_tokens = 0

    def step(self) -> list[Event]:
        """Do what `Scheduler.step` does."""
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
        self.prompt_tokens += size
        self._keeper.took(conversation)
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
                    events.append(self.finish(conversation, rest))
                else:
                    chosen.append((conversation, token))
        failures = feed_one_each(self._session, chosen)
        for conversation, token in chosen:
            if conversation.name in failures:
                events.append(self._failed(conversation, failures[conversation.name]))
            else:
                events += self._took(conversation, token)
        return events

    def _fork(self, leader: Conversation) -> None:
        """Let the siblings of a conversation, which has just taken its prompt, go on from a copy of its stream."""
        try:
            copy = self._session.copy_stream(leader.the_stream)
        except SinkError:  # the leader's answer shows it; each of the others is fed the prompt by itself
            copy = None
        for sibling in leader.end_siblings():
            if copy is not None and self._slots.park(sibling, copy):
                sibling.history = leader.history.copy()
                sibling.fed = int(sibling.pending.size)
            self._slots.enter(sibling)

    def _took(self, conversation: Conversation, token: int) -> list[Event]:
        conversation.took(np.array([token], dtype=np.int64))
        if conversation.num_pending:
            conversation.fed += 1
            self.prompt_tokens += 1
            self._keeper.took(conversation)
            return []
        self.answer_tokens += 1
        answer = conversation.the_answer
        try:
            text = answer.push(token)
            if answer.finish_reason is not None:
                text += answer.flush()
        except Exception as error:  # of decoding: the stream has taken the token
            return [self._broken_off(conversation, error)]
        if answer.finish_reason is not None:
            return [self.finish(conversation, text)]
        self._keeper.took(conversation)
        if text or answer.num_tokens == 1:
            return [self._event(conversation, text, None)]
        return []

    def forget(self, conversation: Conversation) -> None:
        """Drop a conversation, at work or not."""
        if conversation.has_work:
            self.finish(conversation, "", "cancelled")
        self._slots.leave(conversation)
        self._conversations.remove(conversation)

    def finish(
        self,
        conversation: Conversation,
        text: str,
        reason: str | None = None,
        *,
        rest: npt.NDArray[np.int64] = NO_IDS,
        is_whole: bool = True,
    ) -> Event:
        """End a request. rest: of its prompt, which comes before the next one. is_whole: whether its stream is."""
        event = self._event(conversation, text, reason or conversation.the_answer.finish_reason)
        conversation.answer, conversation.paused = None, False
        conversation.pending, conversation.fed = rest, 0
        if is_whole:
            self._keeper.save(conversation)
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
        return dataclasses.replace(self.finish(conversation, "", "error"), error=reason)

    def _failed(self, conversation: Conversation, error: SinkError) -> Event:
        """End a conversation: its stream may hold half a chunk, or numbers that are none."""
        event = dataclasses.replace(self.finish(conversation, "", "error", is_whole=False), error=str(error))
        self._session.reset([conversation.the_stream])
        self.forget(conversation)
        return event

    def _event(self, conversation: Conversation, text: str, reason: str | None) -> Event:
        answer = conversation.the_answer
        logprobs = answer.take_logprobs()
        return Event(conversation.name, text, reason, None, conversation.fed, answer.num_tokens, logprobs)
