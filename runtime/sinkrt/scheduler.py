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
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sinkrt.answer import Answer, AnswerParams
from sinkrt.errors import SinkError, UsageError, problem
from sinkrt.sampler import SamplingParams
from sinkrt.session import Session, StreamCopy

SLICE_TOKENS = 256
"""Tokens that a conversation keeps its stream for while others wait; parking one costs about as much as one token."""

MAX_CONVERSATIONS = 64


@dataclasses.dataclass(frozen=True)
class Event:
    """What one run did for one conversation.

    text: what its answer grew by, whole characters. finish_reason: of `Answer`, or ``error`` or ``cancelled``; None
    while it goes on. error: the reason, in one line. tokens: ids that its stream took in this run, of prompt or answer.
    prompt_tokens, answer_tokens: fed so far for this request.
    """

    conversation: str
    text: str
    finish_reason: str | None
    error: str | None
    tokens: tuple[int, ...]
    prompt_tokens: int
    answer_tokens: int


@dataclasses.dataclass(frozen=True)
class Load:
    """How busy a scheduler is, in conversations: in a stream with work, without one but with work, parked, all."""

    running: int
    waiting: int
    parked: int
    conversations: int


@dataclasses.dataclass(eq=False)
class _Conversation:
    """stream: where it is now, or None. copy: what it was when it was parked. pending: ids to feed, from `fed` on."""

    name: str
    stream: int | None = None
    copy: StreamCopy | None = None
    pending: npt.NDArray[np.int64] = dataclasses.field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    fed: int = 0
    answer: Answer | None = None
    placed_tokens: int = 0  # since it has had its stream

    @property
    def has_work(self) -> bool:
        return self.answer is not None

    @property
    def num_pending(self) -> int:
        return self.pending.size - self.fed


class Scheduler:
    """N conversations on the B streams of `session`, which nobody else may use.

    max_conversations: how many are remembered, >= 1. The least recently active one without work is forgotten for a new
    one. max_conversations - B of them may be parked, each with `Manifest.state_bytes` / B bytes.
    slice_tokens: how long a conversation keeps its stream while others wait.

    Raises: UsageError.
    """

    def __init__(
        self, session: Session, *, max_conversations: int = MAX_CONVERSATIONS, slice_tokens: int = SLICE_TOKENS
    ) -> None:
        for name, value in (("max_conversations", max_conversations), ("slice_tokens", slice_tokens)):
            if value < 1:
                raise UsageError(problem(name, received=value, expected=">= 1", fix=f"raise {name}"))
        self._session = session
        self._max_conversations = max_conversations
        self._slice_tokens = slice_tokens
        # By name; the least recently active first.
        self._conversations: collections.OrderedDict[str, _Conversation] = collections.OrderedDict()
        self._owners: list[_Conversation | None] = [None] * session.batch  # by stream
        self._waiting: collections.deque[_Conversation] = collections.deque()  # with work, without a stream
        self._stepped_last = False

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._waiting) or any(owner is not None and owner.has_work for owner in self._owners)

    @property
    def load(self) -> Load:
        """How busy it is."""
        return Load(
            running=sum(owner is not None and owner.has_work for owner in self._owners),
            waiting=len(self._waiting),
            parked=sum(conversation.copy is not None for conversation in self._conversations.values()),
            conversations=len(self._conversations),
        )

    def __contains__(self, name: str) -> bool:
        return name in self._conversations

    def position(self, name: str) -> int:
        """Tokens that a conversation's stream has taken.

        Raises: UsageError for an unknown conversation.
        """
        conversation = self._known(name)
        if conversation.stream is not None:
            return int(self._session.position[conversation.stream])
        return 0 if conversation.copy is None else conversation.copy.position

    def submit(self, name: str, ids: npt.ArrayLike, sampling: SamplingParams, params: AnswerParams) -> None:
        """Queue a prompt and its answer for a conversation, which begins with it if it is new.

        ids: int [N], N >= 1.

        Raises: UsageError if the ids are not the model's, the conversation is at work already, or all of
        max_conversations are.
        """
        model = self._session.manifest.model
        tokens = np.asarray(ids)
        if tokens.ndim != 1 or not tokens.size or not np.issubdtype(tokens.dtype, np.integer):
            raise UsageError(problem("prompt", received=f"{tokens.dtype} {list(tokens.shape)}",
                                     expected="integers [N], N >= 1", fix="give some text"))  # fmt: skip
        if tokens.min() < 0 or tokens.max() >= model.vocab_size:
            raise UsageError(problem("token id", received=int(tokens.max()), expected=f"0 .. {model.vocab_size - 1}",
                                     fix="use the tokenizer of this model"))  # fmt: skip
        conversation = self._conversations.get(name)
        if conversation is not None and conversation.has_work:
            raise UsageError(problem("conversation", received=f"'{name}', which is at work", expected="an idle one",
                                     fix="wait for its answer, or cancel it"))  # fmt: skip
        answer = Answer(self._session.tokenizer, model.eos_token_ids, model.vocab_size, sampling, params)
        if conversation is None:
            self._make_room()
            conversation = self._conversations[name] = _Conversation(name)
        conversation.pending, conversation.fed, conversation.answer = tokens.astype(np.int64), 0, answer
        self._conversations.move_to_end(name)
        if conversation.stream is None:
            self._waiting.append(conversation)

    def cancel(self, name: str) -> Event | None:
        """Stop what a conversation is at; it keeps the tokens that it has taken. Returns its last event, if any.

        Raises: UsageError for an unknown conversation.
        """
        conversation = self._known(name)
        return self._finished(conversation, "", "cancelled") if conversation.has_work else None

    def forget(self, name: str) -> None:
        """Drop a conversation, at work or not.

        Raises: UsageError for an unknown conversation.
        """
        conversation = self._known(name)
        self.cancel(name)
        if conversation.stream is not None:
            self._owners[conversation.stream] = None
        del self._conversations[name]

    def step(self) -> list[Event]:
        """One run of a graph: a chunk of one conversation's prompt, or one token of all that are past theirs.

        The two take turns, so that neither a long prompt nor long answers hold up the others. What fails, fails alone.

        Returns: what became of the conversations that took part.
        """
        self._place_waiting()
        at_work = [owner for owner in self._owners if owner is not None and owner.has_work]
        smallest = self._session.smallest_chunk
        in_chunks = [c for c in at_work if c.num_pending >= smallest]
        in_steps = [c for c in at_work if c.num_pending < smallest]
        if in_chunks and (self._stepped_last or not in_steps):
            self._stepped_last = False
            # The one that has had its stream for the fewest tokens goes first: prompts advance side by side.
            return self._feed_chunk(min(in_chunks, key=lambda c: c.placed_tokens))
        self._stepped_last = True
        return self._feed_tokens(in_steps)

    def _feed_chunk(self, conversation: _Conversation) -> list[Event]:
        stream = self._stream_of(conversation)
        size = min(conversation.num_pending, self._session.chunk_size)
        try:
            ids = conversation.pending[conversation.fed : conversation.fed + size]
            self._session.prefill(ids, streams=[stream])
        except SinkError as error:
            return [self._failed(conversation, error)]
        conversation.fed += size
        conversation.placed_tokens += size
        return [self._event(conversation, "", None, ids.tolist())]

    def _feed_tokens(self, conversations: list[_Conversation]) -> list[Event]:
        events, fed = [], []
        for conversation in conversations:
            try:
                token = self._next_token(conversation)
            except SinkError as error:
                events.append(self._failed(conversation, error))
                continue
            if token is None:
                events.append(self._finished(conversation, self._answer_of(conversation).flush()))
            else:
                fed.append((conversation, token))
        if not fed:
            return events
        try:
            self._session.step([token for _, token in fed], [self._stream_of(c) for c, _ in fed])
        except SinkError as error:
            return events + [self._failed(conversation, error) for conversation, _ in fed]
        for conversation, token in fed:
            conversation.placed_tokens += 1
            if conversation.num_pending:
                conversation.fed += 1
                events.append(self._event(conversation, "", None, [token]))
                continue
            answer = self._answer_of(conversation)
            text = answer.push(token)
            if answer.finish_reason is not None:
                events.append(self._finished(conversation, text + answer.flush(), tokens=[token]))
            else:
                events.append(self._event(conversation, text, None, [token]))
        return events

    def _next_token(self, conversation: _Conversation) -> int | None:
        """The prompt's next token, or the answer's; None at the end of the text.

        Raises: SinkError.
        """
        stream, session = self._stream_of(conversation), self._session
        position = int(session.position[stream])
        if position >= session.manifest.stream.position_limit:
            raise UsageError(problem("conversation", received=f"{position} tokens", expected="room for more",
                                     fix="begin a new one"))  # fmt: skip
        if conversation.num_pending:
            return int(conversation.pending[conversation.fed])
        return self._answer_of(conversation).pick(session.logits[stream], session.recent_ids(stream), position)

    # --- places ---

    def _place_waiting(self) -> None:
        """Give waiting conversations streams, first come, first served."""
        while self._waiting:
            stream = self._free_stream()
            if stream is None:
                return
            conversation = self._waiting.popleft()
            if conversation.copy is None:
                self._session.reset([stream])
            else:
                self._session.place_stream(stream, conversation.copy)
                conversation.copy = None
            conversation.stream, conversation.placed_tokens = stream, 0
            self._owners[stream] = conversation

    def _free_stream(self) -> int | None:
        """A stream for someone who waits: one that nobody has, or whose owner has no work or has had its share."""
        for stream, owner in enumerate(self._owners):
            if owner is None:
                return stream
        idle = [owner for owner in self._conversations.values() if owner.stream is not None and not owner.has_work]
        spent = [owner for owner in self._owners if owner is not None and owner.placed_tokens >= self._slice_tokens]
        # Of the idle ones the least recently active; of those at work the one that has had the most.
        chosen = idle[0] if idle else max(spent, key=lambda c: c.placed_tokens, default=None)
        return None if chosen is None else self._park(chosen)

    def _park(self, conversation: _Conversation) -> int:
        stream = self._stream_of(conversation)
        conversation.copy, conversation.stream = self._session.copy_stream(stream), None
        self._owners[stream] = None
        if conversation.has_work:
            self._waiting.append(conversation)
        return stream

    def _make_room(self) -> None:
        if len(self._conversations) < self._max_conversations:
            return
        idle = next((c for c in self._conversations.values() if not c.has_work), None)
        if idle is None:
            raise UsageError(problem("conversations", received=f"{len(self._conversations)} at work",
                                     expected=f"fewer than {self._max_conversations}",
                                     fix="wait for one to end"))  # fmt: skip
        self.forget(idle.name)

    # --- ends ---

    def _finished(
        self, conversation: _Conversation, text: str, reason: str | None = None, tokens: Sequence[int] = ()
    ) -> Event:
        event = self._event(conversation, text, reason or self._answer_of(conversation).finish_reason, tokens)
        conversation.answer = None
        conversation.pending, conversation.fed = conversation.pending[:0], 0
        if conversation in self._waiting:
            self._waiting.remove(conversation)
        self._conversations.move_to_end(conversation.name)
        return event

    def _failed(self, conversation: _Conversation, error: SinkError) -> Event:
        """The conversation is over: its stream may hold half a chunk, or numbers that are none."""
        event = dataclasses.replace(self._finished(conversation, "", "error"), error=str(error))
        self._session.reset([self._stream_of(conversation)])
        self.forget(conversation.name)
        return event

    def _event(
        self, conversation: _Conversation, text: str, reason: str | None, tokens: Sequence[int] = ()
    ) -> Event:
        fed, answered = conversation.fed, self._answer_of(conversation).num_tokens
        return Event(conversation.name, text, reason, None, tuple(tokens), fed, answered)

    def _known(self, name: str) -> _Conversation:
        conversation = self._conversations.get(name)
        if conversation is None:
            raise UsageError(problem("conversation", received=f"'{name}'", expected="one that has begun and is kept",
                                     fix="submit something to it first"))  # fmt: skip
        return conversation

    @staticmethod
    def _answer_of(conversation: _Conversation) -> Answer:
        if conversation.answer is None:
            raise RuntimeError(f"conversation '{conversation.name}' has no answer in progress")
        return conversation.answer

    @staticmethod
    def _stream_of(conversation: _Conversation) -> int:
        if conversation.stream is None:
            raise RuntimeError(f"conversation '{conversation.name}' is in no stream")
        return conversation.stream
