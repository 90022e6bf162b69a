"""Next tokens of some conversations, fed in one step; the errors of those that cannot take theirs."""

from __future__ import annotations

from sinkrt.conversation import Conversation
from sinkrt.errors import BackendError, SinkError, UsageError, problem
from sinkrt.session import Session


class StreamError(Exception):
    """A stream cannot go on. reason: why not, for the user."""

    def __init__(self, reason: SinkError) -> None:
        super().__init__(str(reason))
        self.reason = reason


def next_token(session: Session, conversation: Conversation) -> int | None:
    """The prompt's next token, or the answer's; None at the end of the text.

    Raises: StreamError if the stream cannot go on; whatever sampling raises, after which it can.
    """
    stream, position = conversation.the_stream, conversation.history.count
    if position >= session.manifest.stream.position_limit:
        raise StreamError(
            UsageError(
                problem("conversation", received=f"{position} tokens", expected="room for more", fix="begin a new one")
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
        raise StreamError(error) from error


def feed_one_each(session: Session, chosen: list[tuple[Conversation, int]]) -> dict[str, SinkError]:
    """Feed one token to each conversation. Returns: errors of those that cannot take theirs, by name."""
    if not chosen:
        return {}
    try:
        session.step([token for _, token in chosen], [c.the_stream for c, _ in chosen])
    except SinkError as error:
        if len(chosen) == 1:
            return {chosen[0][0].name: error}
        # No position has advanced: each on its own shows whose fault it is.
        return {name: reason for one in chosen for name, reason in feed_one_each(session, [one]).items()}
    return {}
