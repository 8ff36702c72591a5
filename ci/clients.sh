#!/usr/bin/env bash
# The official clients against the built program with the built-in model: Python's openai and
# anthropic, Node's openai. Makes an environment of its own below the directory it is given.
# Usage: ci/clients.sh PROGRAM [DIRECTORY]
set -euo pipefail
cd "$(dirname "$0")/.."
program=$1
place=${2:-$(mktemp -d)}
template=crates/engine/tests/template/qwen3.5.jinja

if [ ! -x "$place/venv/bin/python" ]; then
  python3 -m venv "$place/venv"
  "$place/venv/bin/pip" install -q "openai>=2" "anthropic>=0.70"
fi

"$program" serve --port 0 --memory 600MiB --queue 64 --chat-template "$template" 2>"$place/log" &
server=$!
trap 'kill $server 2>/dev/null || true' EXIT
for _ in $(seq 300); do
  base=$(sed -n 's/.*listening on \(http:[^ ]*\).*/\1/p' "$place/log")
  [ -n "$base" ] && break
  kill -0 $server || { cat "$place/log"; exit 1; }
  sleep 0.1
done

"$place/venv/bin/python" ci/clients/openai_client.py "$base"
"$place/venv/bin/python" ci/clients/anthropic_client.py "$base"
node_ready() {
  command -v npm >/dev/null && command -v node >/dev/null || return 1
  mkdir -p "$place/node"
  [ -d "$place/node/node_modules/openai" ] ||
    npm install --silent --no-fund --no-audit --prefix "$place/node" openai
}
if node_ready; then
  cp ci/clients/openai_client.mjs "$place/node/"
  node "$place/node/openai_client.mjs" "$base"
else
  echo "SKIP: Node's client could not be installed"
fi
kill -TERM $server
wait $server
echo "the server ended in order"
