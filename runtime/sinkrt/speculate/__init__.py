"""Several tokens a step: drafters guess how a stream goes on, and the model verifies the guess in one run.

What comes out is what the model alone would write: a guess is fed only where the model's own pick is the same token.
docs/speculation.md says what that means for sampling, and what it costs.
"""

from sinkrt.speculate.choice import NGRAM, Speculation, load_speculation
from sinkrt.speculate.drafter import Drafter

__all__ = ["NGRAM", "Drafter", "Speculation", "load_speculation"]
