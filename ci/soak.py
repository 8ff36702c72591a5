"""Many clients at once, most of them badly behaved, against a server of our own with the built-in model.

Usage: soak.py PROGRAM [SECONDS [CLIENTS]]. Clients stream, go away in the middle, read slowly, and send
malformed and oversized bodies. Checked at the end: no crash, every well-behaved client got the very text
that it gets alone, nothing is left running, and memory is back to where it was after warming up.
"""

import http.client
import json
import random
import re
import subprocess
import sys
import threading
import time

program = sys.argv[1]
seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 60
clients = int(sys.argv[3]) if len(sys.argv) > 3 else 64
ALLOWED_GROWTH_KIB = 32 << 10
counts, wrong, lock = {}, [], threading.Lock()

server = subprocess.Popen(
    [program, "serve", "--port", "0", "--memory", "800MiB", "--parallel", "8", "--queue", "128", "--max-body", "64K"],
    stderr=subprocess.PIPE, text=True,
)
for line in server.stderr:
    if found := re.search(r"listening on http://(\S+)", line):
        address = found[1]
        break
threading.Thread(target=lambda: [None for _ in server.stderr], daemon=True).start()


def ask(text, tokens, stream):
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": tokens, "temperature": 0, "stream": stream}
    connection = http.client.HTTPConnection(address, timeout=120)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
    return connection, connection.getresponse()


def streamed(response):
    text, ended = "", False
    for line in response:
        line = line.decode().strip()
        ended |= line == "data: [DONE]"
        if line.startswith("data: {"):
            for choice in json.loads(line[6:])["choices"]:
                text += choice["delta"].get("content") or ""
    return text if ended else None


def resident_kib():
    with open(f"/proc/{server.pid}/status") as status:
        return int(re.search(r"VmRSS:\s+(\d+)", status.read())[1])


def well(chance):
    connection, response = ask("Tell me a story.", 24, True)
    text = streamed(response) if response.status == 200 else None
    if response.status == 200 and text != expected:
        wrong.append(text)
    return f"whole {response.status}"


def leaver(chance):
    connection, response = ask("Tell me a long story.", 400, True)
    response.read(chance.randrange(1, 2000))
    connection.close()
    return "left"


def slow(chance):
    connection, response = ask("Tell me a story.", 24, True)
    text = b""
    while piece := response.read(97):
        text += piece
        time.sleep(0.002)
    if response.status == 200 and b"[DONE]" not in text:
        wrong.append(text)
    return f"slow {response.status}"


def bad(chance):
    connection = http.client.HTTPConnection(address, timeout=120)
    body = chance.choice(["{", "[]", '{"messages": 5}', "x" * 100_000, "\0\xff", '{"a":' * 200])
    try:
        connection.request("POST", "/v1/chat/completions", body.encode("latin-1"))
        status = connection.getresponse().status
        if status not in (400, 413):
            wrong.append(status)
        return f"bad {status}"
    except OSError:
        return "bad, cut off"


def client(number):
    chance = random.Random(number)
    while time.monotonic() < end:
        kind = chance.choice([well, well, leaver, slow, bad])
        try:
            what = kind(chance)
        except Exception as error:
            wrong.append(f"{kind.__name__}: {error!r}")
            return
        with lock:
            counts[what] = counts.get(what, 0) + 1


def rounds(until):
    global end
    end = until
    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    while json.loads(http_get("/health"))["live"]:
        time.sleep(0.05)


def http_get(path):
    connection = http.client.HTTPConnection(address, timeout=120)
    connection.request("GET", path)
    return connection.getresponse().read()


connection, response = ask("Tell me a story.", 24, False)
expected = json.loads(response.read())["choices"][0]["message"]["content"]
rounds(time.monotonic() + seconds / 4)
warm = resident_kib()
rounds(time.monotonic() + seconds * 3 / 4)
after = resident_kib()
server.terminate()
print(f"{counts}; resident {warm} KiB when warm, {after} KiB at the end; exit {server.wait(60)}")
assert not wrong, wrong[:5]
assert server.returncode == 0 and after < warm + ALLOWED_GROWTH_KIB
