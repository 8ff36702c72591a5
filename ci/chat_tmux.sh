#!/usr/bin/env bash
# A chat in tmux, as a person has it: typed, streamed, stopped, left, resumed, resized, at 40 columns, suspended,
# piped, killed. Each screen is printed, and checked for what must be on it.
#   ci/chat_tmux.sh PROGRAM
set -euo pipefail
program=$(realpath "${1:?the program}")
scratch=$(mktemp -d)
windows=0
socket=chat-$$-0
mux() { tmux -L "$socket" -f /dev/null "$@"; }
trap 'mux kill-server 2>/dev/null || true; rm -rf "$scratch"' EXIT
home=(env "HOME=$scratch" "XDG_DATA_HOME=$scratch/data" "XDG_CACHE_HOME=$scratch/cache")
# Slow kernels, so that an answer is still coming when it is looked at.
flags=(--memory 600MiB --threads 1 --seed 5 --isa scalar)

screen() { mux capture-pane -p -t chat; }
fail() { echo "FAIL: $1"; screen; exit 1; }
# Looks until the screen has the text, or half a minute has passed.
wait_for() {
  for _ in $(seq 300); do
    if screen | grep -qF -- "$1"; then return; fi
    sleep 0.1
  done
  fail "no '$1'"
}
gone() {
  for _ in $(seq 300); do
    if ! screen | grep -qF -- "$1"; then return; fi
    sleep 0.1
  done
  fail "still '$1'"
}
show() { printf '\n-- %s\n' "$1"; screen; }
# The chat in a window of so many columns and rows; the shell behind it shows how it ended.
start() {
  local columns=$1 rows=$2
  shift 2
  mux kill-server 2>/dev/null || true
  windows=$((windows + 1))
  socket=chat-$$-$windows
  mux new-session -d -s chat -x "$columns" -y "$rows" \
    "${home[*]} $program chat ${flags[*]} $*; echo status \$?; stty -a | grep -o -- '-\?icanon'; sleep 600"
}
type_line() { mux send-keys -t chat -l "$1"; mux send-keys -t chat Enter; }

start 80 24
wait_for "/help says more"
type_line "Tell me a story about a robot."
wait_for "Ctrl-C stops"
show "an answer streams"
mux send-keys -t chat C-c
wait_for "stopped"
gone "Ctrl-C stops"
show "stopped"

mux send-keys -t chat -l "a draft of a message that is longer than forty columns are wide"
wait_for "columns are wide"
mux resize-window -t chat -x 40 -y 24
wait_for "tiny"
show "resized to 40 columns"
mux resize-window -t chat -x 100 -y 30
wait_for "> a draft of a message that is longer than forty columns are wide"
show "resized to 100 columns"
[ "$(screen | grep -c '> a draft')" = 1 ] || fail "the draft is there more than once"
mux send-keys -t chat C-u
type_line "/stats"
wait_for "experts"
type_line "/quit"
wait_for "status 0"
screen | grep -qx "icanon" || fail "the terminal is raw"

start 40 24 --resume
wait_for "> Tell me a story about a robot."
type_line "And then?"
wait_for "Ctrl-C stops"
wait_for "tok/s"
show "resumed, at 40 columns"
mux send-keys -t chat C-c
gone "Ctrl-C stops"
type_line "/help"
wait_for "suspend"
show "help at 40 columns"

start 80 24 -n 1000
wait_for "/help says more"
type_line "A long story, please."
wait_for "Ctrl-C stops"
kill -9 "$(mux list-panes -t chat -F '#{pane_pid}' | xargs -I{} pgrep -P {} -f "$program" | head -1)"
wait_for "Killed"
start 80 24 --resume
wait_for "> A long story, please."
show "resumed after kill -9"
mux send-keys -t chat C-d
wait_for "status 0"

# A terminal that goes away, with an answer under way: the chat ends by itself.
start 80 24 --resume -n 1000
wait_for "> A long story, please."
type_line "Another one."
wait_for "Ctrl-C stops"
chat=$(mux list-panes -t chat -F '#{pane_pid}' | xargs -I{} pgrep -P {} -f "$program" | head -1)
mux kill-session -t chat
for _ in $(seq 100); do
  kill -0 "$chat" 2>/dev/null || break
  sleep 0.2
done
kill -0 "$chat" 2>/dev/null && { echo "FAIL: the chat goes on without a terminal"; kill -9 "$chat"; exit 1; }
echo "== the terminal gone: ended"

# Ctrl-Z in a shell that has jobs: the terminal is the shell's, and the chat's again after fg.
mux kill-server 2>/dev/null || true
windows=$((windows + 1))
socket=chat-$$-$windows
mux new-session -d -s chat -x 80 -y 24 "env PS1='shell: ' bash --norc --noprofile -i"
wait_for "shell:"
type_line "${home[*]} $program chat ${flags[*]}"
wait_for "/help says more"
mux send-keys -t chat -l "before and"
wait_for "> before and"
mux send-keys -t chat C-z
wait_for "Stopped"
type_line "stty -a | grep -o -- '-\?icanon'"
wait_for "icanon"
screen | grep -qx "icanon" || fail "the terminal is raw while the chat is stopped"
type_line "fg"
mux send-keys -t chat -l " after"
wait_for "> before and after"
show "suspended and continued"
mux send-keys -t chat C-u
type_line "/quit"
gone "> before and after"

start 80 24 --plain -n 20
wait_for ">"
type_line "Hello there."
# The row behind what was typed begins with a letter, and the prompt follows.
for _ in $(seq 300); do
  screen | grep -A1 "^> Hello there\." | tail -1 | grep -q "^[A-Za-z]" && screen | grep -qx ">" && break
  sleep 0.1
done
screen | grep -A1 "^> Hello there\." | tail -1 | grep -q "^[A-Za-z]" || fail "no answer"
mux send-keys -t chat C-d
wait_for "status 0"
show "plain"
piped=$(printf 'Hello\n/stats\n' | "${home[@]}" "$program" chat "${flags[@]}" -n 20 2>/dev/null)
echo "$piped" | head -1 | grep -q "^[A-Za-z]" || { echo "FAIL: no answer: $piped"; exit 1; }
echo "$piped" | grep -qE "^answer +[1-9]" || { echo "FAIL: piped: $piped"; exit 1; }
echo "chat in tmux: ok"
