"""How many tokens to guess: as many as pay, by how many of the last ones were right."""

from __future__ import annotations

RUN_COST, TOKEN_COST = 0.5, 0.05
"""Cost of verifying a guess beyond that of a step, and of each guessed token, in steps.

SmolLM2-135M on a CPU, ten tokens: 0.5 in float32 and 1.5 with INT8 weights. The choice is the same for both, nearly; it
never looks at a clock, so that the same prompt is verified in the same pieces every time.
"""

DECAY = 0.9
"""Weight of what is known of acceptance when another token is accepted or rejected."""

FIRST_ACCEPTANCE, MAX_ACCEPTANCE = 0.5, 0.97

TRIAL_TOKENS = 2
FIRST_PAUSE, MAX_PAUSE = 8, 64
"""Steps between trials while guesses do not pay: doubled with each in vain."""


class DraftLength:
    """Chooses lengths of guesses, 0 .. most. cost: of making one token of a guess, in steps."""

    def __init__(self, most: int, cost: float = 0.0) -> None:
        self._most, self._token_cost = most, TOKEN_COST + cost
        self._acceptance = FIRST_ACCEPTANCE
        self._pause, self._next_pause, self._is_trial = 0, FIRST_PAUSE, False

    def next(self) -> int:
        """Tokens to guess now; 0: a plain step is better."""
        if self._pause:
            self._pause -= 1
            return 0
        best, found, a = 1.0, 0, self._acceptance
        for count in range(1, self._most + 1):
            tokens = (1 - a ** (count + 1)) / (1 - a)  # of a round, expected
            if (gain := tokens / (1 + RUN_COST + self._token_cost * count)) > best:
                best, found = gain, count
        self._is_trial = not found
        return found or min(TRIAL_TOKENS, self._most)

    def update(self, guessed: int, accepted: int) -> None:
        """Learn from one round: of `guessed` tokens the first `accepted` were right."""
        for i in range(min(accepted + 1, guessed)):
            self._acceptance = DECAY * self._acceptance + (1 - DECAY) * (i < accepted)
        self._acceptance = min(self._acceptance, MAX_ACCEPTANCE)
        if accepted:
            self._next_pause = FIRST_PAUSE
        elif self._is_trial:
            self._pause, self._next_pause = self._next_pause, min(2 * self._next_pause, MAX_PAUSE)
