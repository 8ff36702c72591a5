"""The built-in page in headless Chromium against a server of our own with the built-in model.

Usage: page.py PROGRAM DIRECTORY. Needs the playwright package and a system Chromium. In both themes, wide and
at phone width: a message is sent, and the thinking and the answer on the page must be those that the
server gives without it. Fails also when the page logs an error, asks for anything outside, or is wider
than its window. Pictures go to the directory.
"""

import json
import re
import shutil
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

program, place = sys.argv[1], Path(sys.argv[2])
chromium = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])))
template = Path(__file__).parent.parent / "crates/engine/tests/template/qwen3.5.jinja"
QUESTION = "Tell me a story about a robot."
PHONE = 390
problems = []


def start():
    command = [program, "serve", "--port", "0", "--memory", "800MiB", "--think-budget", "24"]
    server = subprocess.Popen(command + ["--chat-template", str(template)], stderr=subprocess.PIPE, text=True)
    log = []
    for line in server.stderr:
        log.append(line)
        if found := re.search(r"listening on (http://\S+)", line):
            threading.Thread(target=server.stderr.read, daemon=True).start()
            return server, found[1]
    sys.exit("the server did not start: " + "".join(log))


def answered(base):
    """The server's own answer, of the same length as on the page."""
    body = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 160}
    request = urllib.request.Request(base + "/v1/chat/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request) as response:
        choice = json.load(response)["choices"][0]
    message = choice["message"]
    assert choice["finish_reason"] == "length", "the page should say that the answer is cut off"
    return message["reasoning_content"], message["content"]


def visit(browser, theme, width, expected):
    name = f"{theme}-{'phone' if width == PHONE else 'wide'}"
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=theme)
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith((base, "data:")) else problems.append(request.url))
    page.goto(base)
    page.screenshot(path=place / f"{name}-empty.png")
    if width == PHONE:
        page.locator("#more").click()
    page.locator("#temperature").fill("0")
    page.locator("#most").fill("160")
    expect(page.locator("#heatnote")).to_contain_text("12 layers down, 48 experts across", timeout=20000)
    if width == PHONE:
        page.screenshot(path=place / f"{name}-panel.png")
        page.locator("#more").click()
    page.locator("#say").fill(QUESTION)
    page.locator("#say").press("Enter")
    expect(page.locator("#go")).to_have_text("Stop")
    expect(page.locator("#go")).to_have_text("Send", timeout=60000)
    expect(page.locator("#talk .note")).to_contain_text("cut off")
    # The panel asks every few seconds; once it has asked again it tells of this answer and that it is over.
    for tile, unknown in ((0, "\u2013"), (1, "\u2013"), (4, "1, 0")):
        expect(page.locator("#stats b").nth(tile)).not_to_have_text(unknown, timeout=20000)
    fold = page.locator("#talk details.thought")
    assert not fold.locator("div").is_visible(), "the thinking is not folded"
    page.screenshot(path=place / f"{name}.png")
    fold.locator("summary").click()
    page.screenshot(path=place / f"{name}-thought.png")
    shown = fold.locator("div").text_content(), page.locator("#talk .answer").text_content()
    assert shown == expected, (shown, expected)
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= width, f"{wide} pixels wide at {width}"
    page.close()


place.mkdir(parents=True, exist_ok=True)
server, base = start()
try:
    expected = answered(base)
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for theme in ("light", "dark"):
            for width in (1280, PHONE):
                visit(browser, theme, width, expected)
        browser.close()
finally:
    server.terminate()
    server.wait(60)
assert not problems, problems
print("page: ok")
