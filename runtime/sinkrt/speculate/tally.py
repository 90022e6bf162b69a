"""Counts of what guessing has brought."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class Tally:
    """tokens: of the answers. steps: plain ones. rounds: runs that verified a guess. guessed, accepted: tokens."""

    tokens: int = 0
    steps: int = 0
    rounds: int = 0
    guessed: int = 0
    accepted: int = 0

    @property
    def tokens_per_step(self) -> float:
        """Tokens for each run of the model, plain steps among them; 1.0 before the first."""
        runs = self.steps + self.rounds
        return self.tokens / runs if runs else 1.0

    @property
    def acceptance(self) -> float:
        """Share of guessed tokens that were right; 0 before the first."""
        return self.accepted / self.guessed if self.guessed else 0.0

    def report(self) -> str:
        """Report in one line."""
        return (
            f"{self.tokens_per_step:.2f} tokens a step ({self.rounds} guesses verified, {self.steps} plain steps), "
            f"{self.acceptance:.0%} of {self.guessed} guessed tokens accepted"
        )
