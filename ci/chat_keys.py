#!/usr/bin/env python3
"""Time from a key to its echo in `flash-moe chat`, while an answer comes, after a long conversation.

A pseudo-terminal takes the place of the screen: each key is a letter that stands in no row, and its echo is the
moment at which the program has written it. Prints the median, the 95th percentile and the worst, and the bytes
written for a key.

    ci/chat_keys.py PROGRAM [TURNS]
"""

import json
import os
import pty
import select
import statistics
import subprocess
import sys
import tempfile
import time


def session(directory, turns):
    """A conversation of so many turns, as the chat itself would have written it."""
    os.makedirs(directory)
    lines = [{"kind": "session", "version": 1, "id": "long", "model": "flash-moe tiny"}]
    for turn in range(turns):
        lines.append({"kind": "message", "message": {"role": "user", "content": f"Question {turn}?"}})
        answer = {"role": "assistant", "content": "A *word*.\n\n- one\n- two\n", "end": "stop"}
        lines.append({"kind": "message", "message": answer})
    with open(os.path.join(directory, "long.jsonl"), "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


class Terminal:
    def __init__(self, command, environment):
        self.master, slave = pty.openpty()
        os.environ.update(environment)
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *command], stdin=slave, stdout=slave, stderr=slave
        )
        os.close(slave)

    def read(self, seconds):
        ready, _, _ = select.select([self.master], [], [], seconds)
        return os.read(self.master, 65536) if ready else b""

    def read_until(self, text, seconds=60):
        seen, end = b"", time.monotonic() + seconds
        while text not in seen:
            if time.monotonic() > end:
                sys.exit(f"no {text!r} in {seen[-2000:]!r}")
            seen += self.read(0.1)
        return seen


def main():
    program = os.path.realpath(sys.argv[1])
    turns = int(sys.argv[2]) if len(sys.argv) > 2 else 200
    with tempfile.TemporaryDirectory() as home:
        session(os.path.join(home, "flash-moe", "sessions"), turns)
        # The built-in model's 2,048 positions are stretched, so that all turns are in its context.
        flags = ["--memory", "600MiB", "--resume", "long", "--threads", "1", "--no-state"]
        environment = {"XDG_DATA_HOME": home, "XDG_CACHE_HOME": home, "TERM": "xterm-256color"}
        stretched = ["--yarn", "8", "--context", "16384"]
        terminal = Terminal([program, "chat", *stretched, *flags], environment)
        terminal.read_until(b"/help says more")
        terminal.read(1)
        os.write(terminal.master, b"Tell me a long story.\r")
        terminal.read_until(b"Ctrl-C stops", 300)
        times, sizes = [], []
        for key in "QZJXQZJXQZJXQZJXQZJXQZJXQZJXQZJX":
            began = time.monotonic()
            os.write(terminal.master, key.encode())
            seen = terminal.read_until(key.encode(), 10)
            times.append(1000 * (time.monotonic() - began))
            sizes.append(len(seen))
            os.write(terminal.master, b"\x7f")
            time.sleep(0.03)
            while terminal.read(0):
                pass
        terminal.process.kill()
        terminal.process.wait()
    times.sort()
    print(
        f"{turns} turns, {len(times)} keys while answering: median {statistics.median(times):.2f} ms, "
        f"95 % {times[int(0.95 * len(times))]:.2f} ms, worst {times[-1]:.2f} ms; "
        f"{statistics.median(sizes):.0f} bytes a key"
    )


main()
