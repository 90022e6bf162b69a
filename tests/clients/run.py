"""Clients that people use, each in an environment of its own, against a server with a tiny model.

python -m tests.clients.run FOLDER    what `make test-clients` does; FOLDER has Python with LiteLLM, and node_modules
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from sinkexport.serve.settings import Limits

from tests.exporter.serve.serving import MANY, serving
from tests.runtime import tool_templates
from tests.runtime.toy import build_toy

HERE = Path(__file__).parent
SECONDS = 120
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
THINKING = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content + eos_token }}</think>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]"
    "{% if reasoning_effort is defined or (think is defined and think) %}<think>{% endif %}{% endif %}"
)


def main(folder: Path) -> int:
    """Run all clients; returns the exit code."""
    folder = folder.absolute()
    node, python = folder / "node_modules" / ".bin" / "node", folder / "bin" / "python"
    commands: list[list[str | Path]] = [[python, HERE / "litellm_client.py"]]
    for script in ("openai_client.mjs", "vercel.mjs"):
        shutil.copy(HERE / script, folder)  # node looks for packages beside the script
        commands.append([node, folder / script])
    failed = 0
    key = secrets.token_hex(16)
    chromium = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if chromium is None:
        print("the web page was not tried: there is no Chromium", file=sys.stderr)
    else:
        shutil.copy(HERE / "page.mjs", folder)
        commands.append([node, folder / "page.mjs"])
    with tempfile.TemporaryDirectory() as place:
        bundle = build_toy(Path(place) / "toy", MANY, template=THINKING)
        calling = build_toy(Path(place) / "calling", MANY, template=tool_templates.HERMES)
        limits, longer = Limits(max_tokens=100, grace_s=0), Limits(max_tokens=900, grace_s=0)
        with (
            serving(bundle, limits) as served,
            serving(bundle, limits, api_key=key) as locked,
            serving(calling, longer) as tools,
        ):
            found = {"LOCKED_URL": locked.url, "KEY": key, "CHROMIUM": chromium or ""}
            found |= {"BASE_URL": f"{served.url}/v1", "TOOLS_URL": f"{tools.url}/v1"}
            for command in commands:
                environment = {**os.environ, **found}
                environment.pop("PYTHONPATH", None)
                failed += subprocess.run(command, check=False, timeout=SECONDS, env=environment).returncode != 0
    print(f"{len(commands) - failed} of {len(commands)} clients are served as they expect")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
