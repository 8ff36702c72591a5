"""An agent of 12 turns with tools against a server of our own, and the same conversation after a restart.

Usage: agent_replay.py PROGRAM [MODEL [TOKENS]]. TOKENS is about the size of the system prompt: 400 for
the built-in model, whose context is 2,048 and to which the tools are as many again, else 6000. Each turn
sends everything said so far, the calls with their arguments written anew and without thinking, as
clients do. Printed for each turn: tokens of the prompt, cached, computed, generated, and the time to the
first token. Then the server is stopped and started with the same --state-dir, the conversation goes on,
and one turn is taken back: on disk a conversation has the point behind its last answer, so that one
begins behind the user's message. A model whose template knows no tools, such as those of `flash-moe synth`,
gets Qwen3.5's. Fails when a turn that goes on computes more than it brought.
"""

import http.client
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
import time

program = sys.argv[1]
model = sys.argv[2] if len(sys.argv) > 2 else None
system_tokens = int(sys.argv[3]) if len(sys.argv) > 3 else 6000 if model else 400
TURNS = 12
# What a turn brings, in the template's wording; it may not compute more than half as much again.
TURN = "<|im_end|>\n<|im_start|>user\n<tool_response>\n12 done\n</tool_response><|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
TEMPLATE = pathlib.Path(__file__).parent.parent / "crates/engine/tests/template/qwen3.5.jinja"
TOOL = {
    "type": "function",
    "function": {
        "name": "act",
        "parameters": {
            "type": "object",
            "required": ["a", "b"],
            "additionalProperties": False,
            "properties": {"a": {"type": "boolean"}, "b": {"type": "boolean"}},
        },
    },
}


def knows_tools():
    """Whether the model has a template with tools; the built-in one and those of synth have none."""
    own = pathlib.Path(model or "") / "chat_template.jinja"
    return bool(model) and own.exists() and "tools" in own.read_text()


class Server:
    def __init__(self, states):
        command = [program, "serve", "--port", "0", "--state-dir", states]
        if model:
            command += ["--model", model, "--context", str(system_tokens * 2 + 8192)]
        else:
            command += ["--memory", "800MiB"]
        if not knows_tools():
            command += ["--chat-template", str(TEMPLATE)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.log, self.address = [], None
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r"listening on http://(\S+)", line):
                self.address = found[1]
                break
        if self.address is None:
            sys.exit("the server did not start: " + "".join(self.log))
        threading.Thread(target=lambda: self.log.extend(self.process.stderr), daemon=True).start()

    def post(self, path, body):
        connection = http.client.HTTPConnection(self.address, timeout=3600)
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            sys.exit(f"{response.status}: {response.read().decode()}")
        return response

    def turn(self, messages):
        """A streamed turn: the call that was made, its usage, and seconds to the first token."""
        body = {
            "messages": messages, "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False,
            "max_tokens": 120, "temperature": 0.7, "seed": 1, "enable_thinking": False,
            "stream": True, "stream_options": {"include_usage": True},
        }
        started, first, calls, usage = time.monotonic(), None, {}, None
        for line in self.post("/v1/chat/completions", body):
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                for piece in choice["delta"].get("tool_calls") or []:
                    first = first or time.monotonic() - started
                    call = calls.setdefault(piece["index"], {"id": "", "name": "", "arguments": ""})
                    call["id"] = piece.get("id") or call["id"]
                    call["name"] += piece["function"].get("name") or ""
                    call["arguments"] += piece["function"].get("arguments") or ""
        return calls, usage, first or time.monotonic() - started

    def tokens(self, text):
        return len(json.load(self.post("/tokenize", {"content": text}))["tokens"])

    def stop(self):
        self.process.terminate()
        if self.process.wait(timeout=600) != 0:
            sys.exit("the server ended badly: " + "".join(self.log[-5:]))


def system_prompt(server):
    line = "Rule {}: look before you act, answer truthfully, and never do a thing twice in a row.\n"
    tokens = server.tokens(line.format(100) * 10) / 10
    return "".join(line.format(100 + i) for i in range(int(system_tokens / tokens)))


def sent_back(calls):
    """The calls as a client writes them: fields in another order, other white space."""
    return {
        "role": "assistant", "content": None,
        "tool_calls": [
            {"id": call["id"], "type": "function", "function": {
                "name": call["name"],
                "arguments": json.dumps(dict(reversed(json.loads(call["arguments"]).items())), indent=1)}}
            for call in calls.values()
        ],
    }


def show(name, usage, seconds):
    prompt, cached = usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]
    print(f"{name:>14} {prompt:7} {cached:7} {prompt - cached:9} {usage['completion_tokens']:10} {seconds * 1e3:10.0f}")
    return prompt - cached


with tempfile.TemporaryDirectory() as states:
    server = Server(states)
    messages = [{"role": "system", "content": system_prompt(server)}, {"role": "user", "content": "Go on."}]
    turn_tokens = server.tokens(TURN) * 3 // 2
    print(f"{'turn':>14} {'prompt':>7} {'cached':>7} {'computed':>9} {'generated':>10} {'ttft_ms':>10}")
    wrong = []
    for turn in range(1, TURNS + 1):
        last = list(messages)
        calls, usage, seconds = server.turn(messages)
        if show(str(turn), usage, seconds) > turn_tokens and turn > 1:
            wrong.append(turn)
        if not calls:
            sys.exit("the model made no call; raise max_tokens")
        messages.append(sent_back(calls))
        for call in calls.values():
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": f"{turn} done"})
    server.stop()
    server = Server(states)
    _, usage, seconds = server.turn(messages)
    if show("restart, 13", usage, seconds) > turn_tokens:
        wrong.append("restart")
    _, usage, seconds = server.turn(last)
    show("back to 12", usage, seconds)
    server.stop()
if wrong:
    sys.exit(f"computed more than they brought: {wrong}")
