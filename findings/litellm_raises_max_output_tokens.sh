#!/usr/bin/env bash
# LiteLLM 1.110.2: `responses(max_output_tokens=8)` asks the server for 16.
#
# Expected: the number that the caller gave reaches the server, or the call is refused.
# Happens:  anything below 16 becomes 16, in silence, for every server behind `openai/`: OpenAI's own refuses less than 16.
# Matters:  a test or a caller that counts tokens, or pays for them, gets up to 16; chats with max_tokens=8 get 8.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --quiet --disable-pip-version-check litellm==1.110.2
cat > "$work/see.py" <<'PYTHON'
import http.server
import json
import os
import threading

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
import litellm

seen = {}


class Server(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        seen[self.path] = body.get("max_output_tokens", body.get("max_tokens"))
        self.send_response(400)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


server = http.server.HTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
how = {"model": "openai/any", "api_base": f"http://127.0.0.1:{server.server_port}", "api_key": "x", "num_retries": 0}
for ask in (
    lambda: litellm.completion(messages=[{"role": "user", "content": "hi"}], max_tokens=8, **how),
    lambda: litellm.responses(input="hi", max_output_tokens=8, **how),
):
    try:
        ask()
    except Exception:  # the answer is of no interest
        pass
print("asked for 8 tokens; the server was asked for:", seen)
raise SystemExit(seen.get("/responses") != 16)
PYTHON
"$work/venv/bin/python" "$work/see.py" 2> "$work/log" || { cat "$work/log" >&2; exit 1; }
