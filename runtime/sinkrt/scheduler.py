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

import numpy as np
import numpy.typing as npt

from sinkrt.answer import Answer, AnswerParams
from sinkrt.arguments import prompt_ids
from sinkrt.conversation import NO_IDS, Conversation
from sinkrt.conversation_folder import ConversationFolder
from sinkrt.conversation_runner import ConversationRunner
from sinkrt.conversation_table import ConversationTable
from sinkrt.errors import UsageError, problem
from sinkrt.events import Event, Load
from sinkrt.keeper import SAVE_EVERY, Keeper
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
    folder: keeps `lasting` conversations, also beyond the process; None: nothing does. save_every: tokens after which
    one at work is saved again, >= 1; it is saved in any case when its work ends.

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
        folder: ConversationFolder | None = None,
        save_every: int = SAVE_EVERY,
    ) -> None:
        numbers = {"max_conversations": max_conversations, "slice_tokens": slice_tokens, "save_every": save_every}
        for name, value in numbers.items():
            if value < 1:
                raise UsageError(problem(name, received=value, expected=">= 1", fix=f"raise {name}"))
        if max_parked_bytes is not None and max_parked_bytes < 0:
            raise UsageError(problem("max_parked_bytes", received=max_parked_bytes, expected=">= 0", fix="raise it"))
        self._session = session
        self._conversations = ConversationTable(max_conversations)
        self._slots = StreamSlots(session, slice_tokens, max_parked_bytes, lambda c: self._runner.forget(c))
        self._keeper = Keeper(session, prefixes, folder, save_every)
        self._runner = ConversationRunner(session, self._conversations, self._slots, self._keeper)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of prompts fed so far, of all conversations."""
        return self._runner.prompt_tokens

    @property
    def answer_tokens(self) -> int:
        """Tokens of answers fed so far, of all conversations."""
        return self._runner.answer_tokens

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
        return self._keeper.longest(owner, np.asarray(ids, dtype=np.int64))

    def submit(
        self,
        name: str,
        ids: npt.ArrayLike,
        sampling: SamplingParams,
        params: AnswerParams,
        *,
        lasting: bool = False,
        owner: str = "",
        opening: int | None = 0,
    ) -> None:
        """Queue a prompt and its answer for a conversation, which begins with it if it is new.

        ids: int [N]; N = 0 lets a conversation that has begun go on. lasting: of a new conversation, that it is
        forgotten only if no other can be. owner, opening: of a new conversation, who may share beginnings of prompts
        with it, and how many of its ids others are likely to begin with, 0: unknown, None: it shares none.
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
                self._runner.forget(idle)
            conversation = Conversation(name, lasting, owner=owner)
            if opening is not None:
                tokens = self._keeper.begin(conversation, tokens, opening, self._slots.park)
        rest = conversation.pending[conversation.fed :]  # of a prompt that was cut short
        conversation.pending, conversation.fed = np.concatenate([rest, tokens]), 0
        conversation.answer, conversation.announced, conversation.paused = answer, False, False
        conversation.followed, conversation.goes_on = False, not conversation.pending.size
        self._conversations.touch(conversation)
        self._slots.enter(conversation)

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
        self.submit(name, ids, sampling, params, owner=first.owner, opening=None)
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
        return self._runner.finish(conversation, "", "cancelled", rest=rest if keep_prompt else NO_IDS)

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

    def recall(self, name: str) -> bool:
        """Take up a conversation that is only in the folder. Returns: whether there is one of that name now.

        Raises: UsageError if there is no room for one more.
        """
        if name in self._conversations or not self._keeper.has(name):
            return name in self._conversations
        if (idle := self._conversations.in_the_way()) is not None:
            self._runner.forget(idle)
        found = self._keeper.read(name)
        if found is None:
            return False
        if not self._slots.park_somehow(*found, self._conversations.by_age()):
            raise UsageError(
                problem(
                    "parked conversations",
                    received="no memory for one more",
                    expected="room for one that was saved",
                    fix="wait for one to end, or allow more memory",
                )
            )
        self._conversations.touch(found[0])
        return True

    def is_kept(self, name: str) -> bool:
        """Whether a conversation is remembered, here or in the folder."""
        return name in self._conversations or self._keeper.has(name)

    def delete(self, name: str) -> None:
        """Drop a conversation, at work or not, and what is saved of it. An unknown one is none."""
        if name in self._conversations:
            self.forget(name)
        self._keeper.remove(name)

    def close(self, *, save: bool = True) -> None:
        """Save what has changed of all `lasting` conversations, and wait until it is on the disk.

        save: whether to; not after a failure, which may have left any of them half done.
        """
        for conversation in self._conversations.by_age() if save else []:
            self._keeper.save(conversation)
        self._keeper.close()

    def forget(self, name: str) -> None:
        """Drop a conversation, at work or not; what is saved of it stays.

        Raises: UsageError for an unknown conversation.
        """
        self._runner.forget(self._conversations.known(name))

    def step(self) -> list[Event]:
        """Run a graph once: a chunk of one conversation's prompt, or one token of all that are past theirs.

        The two take turns, so that neither a long prompt nor long answers hold up the others. What fails, fails alone.

        Returns: events of the conversations that took part.
        """
        return self._runner.step()
