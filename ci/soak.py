"""Many clients at once, most of them badly behaved, against a server of our own with the built-in model.

Usage: soak.py PROGRAM [SECONDS [CLIENTS [FLAG..]]]. Clients stream, go away in the middle, read slowly or not at all,
and send malformed and oversized bodies; one that is told to come back later does. 16 texts go at once unless
a flag says otherwise. Checked at the end: no crash, every client that stayed got the very text that it gets
alone, who read nothing was cut off, nothing is left running, and memory is back to where it was after a
warm-up of a quarter of the time. What counts as memory is what is resident without the
kept prefixes, which fill their bound on purpose (`flash_moe_prefix_bytes`).
"""

import http.client
import json
import random
import re
import socket
import subprocess
import sys
import threading
import time

program = sys.argv[1]
seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 60
clients = int(sys.argv[3]) if len(sys.argv) > 3 else 64
ALLOWED_GROWTH_KIB = 32 << 10
BODY_MAX = 1 << 20
PATIENCE = 5  # seconds that the server waits for a client
QUESTIONS = [f"Tell me a story about {what}." for what in ("a robot", "the moon", "two cats", "a lost key", "rain")]
counts, wrong, lock = {}, [], threading.Lock()

flags = ["serve", "--port", "0", "--memory", "4GiB", "--max-body", str(BODY_MAX), "--client-timeout", str(PATIENCE)]
if "--parallel" not in sys.argv:
    flags += ["--parallel", "16", "--queue", "64"]
flags += sys.argv[4:]
server = subprocess.Popen([program, *flags], stderr=subprocess.PIPE, text=True)
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


def memory_kib():
    with open(f"/proc/{server.pid}/status") as status:
        resident = int(re.search(r"VmRSS:\s+(\d+)", status.read())[1])
    kept = int(float(re.search(r"^flash_moe_prefix_bytes (\S+)", http_get("/metrics").decode(), re.M)[1])) >> 10
    return resident - kept, kept


def answered(text, tokens):
    """A response that is no refusal for want of room."""
    while True:
        connection, response = ask(text, tokens, True)
        if response.status == 200:
            return connection, response
        if response.status != 429 or not response.getheader("retry-after"):
            raise RuntimeError(f"{response.status}: {response.read()}")
        with lock:
            counts["429"] = counts.get("429", 0) + 1
        time.sleep(1)


def well(chance):
    question = chance.choice(QUESTIONS)
    connection, response = answered(question, 24)
    if (text := streamed(response)) != expected[question]:
        wrong.append((question, text))
    return "whole"


def leaver(chance):
    connection, response = answered(f"Tell me the long story number {chance.randrange(1000)}.", 400)
    response.read(chance.randrange(1, 2000))
    connection.close()
    return "left"


def slow(chance):
    question = chance.choice(QUESTIONS)
    connection, response = answered(question, 24)
    body = b""
    while piece := response.read(97):
        body += piece
        time.sleep(0.002)
    if (text := streamed(body.splitlines())) != expected[question]:
        wrong.append((question, text))
    return "slow"


def deaf(chance):
    """Reads nothing of much more than sockets hold, until the server must have lost its patience."""
    body = {"messages": [{"role": "user", "content": f"Story {chance.randrange(1000)}, please."}], "stream": True,
            "max_tokens": 1900, "n": 4, "logprobs": True, "top_logprobs": 20, "logit_bias": {"4085": -100, "4083": -100}}
    body = json.dumps(body)
    host, port = address.split(":")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((host, int(port)))
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {address}\r\ncontent-length: {len(body)}\r\n"
        connection.sendall(f"{head}content-type: application/json\r\n\r\n{body}".encode())
        told = connection.recv(12)
        if told.endswith(b"429"):
            return "429"
        time.sleep(45)
        try:
            while piece := connection.recv(1 << 16):
                told = told[-64:] + piece
        except ConnectionResetError:
            pass
        if b"[DONE]" in told:
            wrong.append("an answer that nobody read was sent to its end")
    return "deaf"


def bad(chance):
    connection = http.client.HTTPConnection(address, timeout=120)
    body = chance.choice(["{", "[]", '{"messages": 5}', "x" * (BODY_MAX + 1), "\0\xff", '{"a":' * 200])
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
    # A few of the clients, since each holds four places.
    kinds = [deaf] if number % 32 == 5 else [well, well, leaver, slow, bad]
    while time.monotonic() < end:
        kind = chance.choice(kinds)
        try:
            what = kind(chance)
        except Exception as error:
            wrong.append(f"{kind.__name__}: {error!r}")
            return
        with lock:
            counts[what] = counts.get(what, 0) + 1
        if what == "429":
            time.sleep(1)


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


expected = {}
for question in QUESTIONS:
    connection, response = ask(question, 24, True)
    expected[question] = streamed(response)
    assert expected[question], question
rounds(time.monotonic() + seconds / 4)
warm, warm_kept = memory_kib()
rounds(time.monotonic() + seconds * 3 / 4)
after, kept = memory_kib()
server.terminate()
print(f"{dict(sorted(counts.items()))}; KiB without prefixes {warm} when warm, {after} at the end; "
      f"of prefixes {warm_kept} and {kept}; exit {server.wait(60)}")
assert not wrong, wrong[:5]
assert server.returncode == 0 and after < warm + ALLOWED_GROWTH_KIB
