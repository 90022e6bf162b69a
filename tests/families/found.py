"""Write ``found.json``, from which docs/families.md has its list: what became of each family of transformers.

    python -m tests.families.found [MODEL_TYPE ..]

With names, only those are tried again. `make test-families` compares with it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import transformers

from tests.families.outcome import Outcome, outcome_of
from tests.families.shrink import model_types

PATH = Path(__file__).with_name("found.json")


@dataclasses.dataclass(frozen=True)
class Found:
    """Outcomes by model type, of one release of transformers."""

    transformers: str
    families: Mapping[str, Outcome]

    @classmethod
    def read(cls) -> Found:
        """Read the recorded file."""
        facts = json.loads(PATH.read_text(encoding="utf-8"))
        return cls(facts["transformers"], {name: Outcome(*one) for name, one in facts["families"].items()})

    def write(self) -> None:
        """Write the recorded file, in alphabetical order."""
        families = {name: [one.state, one.reason] for name, one in sorted(self.families.items())}
        facts = {"transformers": self.transformers, "families": families}
        PATH.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main(names: Sequence[str]) -> None:
    """Try the families, and record after each what became of it."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    before = Found.read().families if names else {}
    found = Found(transformers.__version__, {name: before[name] for name in model_types() if name in before})
    for name in names or model_types():
        with tempfile.TemporaryDirectory() as folder:
            outcome = outcome_of(name, Path(folder))
        found = dataclasses.replace(found, families={**found.families, name: outcome})
        found.write()
        print(f"{name}\t{outcome.state}\t{outcome.reason}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
