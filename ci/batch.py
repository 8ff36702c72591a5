"""Texts at once: tokens a second of 1, 2, 4 and 8 clients together, and whether each gets the text it gets alone.

Usage: batch.py PROGRAM [MODEL [TOKENS [SERVE FLAGS...]]]. Without a model (or with "-") the built-in one is served.
Every client has a prompt of its own. The rate is of all tokens over the time in which all clients decode, by the
server's own count of decode time.
"""

import http.client
import json
import re
import subprocess
import sys
import threading

CLIENTS = [1, 2, 4, 8]
WORDS = "One day a small robot found an old red boat near the river and".split()

program = sys.argv[1]
model = sys.argv[2] if len(sys.argv) > 2 else "-"
tokens = int(sys.argv[3]) if len(sys.argv) > 3 else 48
flags = sys.argv[4:] + (["-m", model] if model != "-" else [])

server = subprocess.Popen(
    [program, "serve", "--port", "0", "--parallel", str(CLIENTS[-1]), "--prefix-memory", "0", *flags],
    stderr=subprocess.PIPE, text=True,
)
said = []
for line in server.stderr:
    said.append(line)
    if found := re.search(r"listening on http://(\S+)", line):
        address = found[1]
        break
else:
    sys.exit("the server did not start:\n" + "".join(said))
threading.Thread(target=lambda: [None for _ in server.stderr], daemon=True).start()


def request(method, path, body=None):
    connection = http.client.HTTPConnection(address, timeout=3600)
    connection.request(method, path, body and json.dumps(body), {"content-type": "application/json"})
    response = connection.getresponse()
    answer = response.read().decode()
    if response.status != 200:
        raise RuntimeError(f"{path}: {response.status} {answer}")
    return answer


def metric(name):
    return float(re.search(rf"^{name} (\S+)$", request("GET", "/metrics"), re.M)[1])


def text(client, texts):
    body = {"prompt": " ".join(WORDS[client:] + WORDS[:client]), "max_tokens": tokens, "temperature": 0}
    body |= {"logit_bias": {str(eos): -100 for eos in eos_tokens}}
    texts[client] = json.loads(request("POST", "/v1/completions", body))["choices"][0]["text"]


eos_tokens = []
for special in ["<|im_end|>", "<|endoftext|>"]:
    ids = json.loads(request("POST", "/tokenize", {"content": special}))["tokens"]
    eos_tokens += ids if len(ids) == 1 else []

alone = {}
for client in range(CLIENTS[-1]):
    text(client, alone)
base = None
for count in CLIENTS:
    seconds, made, read = map(metric, NAMES := (
        "flash_moe_decode_seconds_total", "flash_moe_generated_tokens_total", "flash_moe_read_bytes_total"))
    texts = {}
    threads = [threading.Thread(target=text, args=(client, texts)) for client in range(count)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    after = [metric(name) for name in NAMES]
    rate = (after[1] - made) / (after[0] - seconds)
    base = base or rate
    same = sum(texts.get(client) == alone[client] for client in range(count))
    print(f"{count} clients: {rate:7.2f} tok/s together, {rate / base:.2f} of one; {rate / count:7.2f} each; "
          f"{(after[2] - read) / 1e6 / (after[1] - made):7.1f} MB read a token, prompts included; {same} of {count} texts as alone", flush=True)
    if same != count:
        sys.exit("a text differs")
server.terminate()
server.wait()
