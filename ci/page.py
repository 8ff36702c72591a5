"""The built-in page in headless Chromium: a scripted message, the streamed answer, screenshots.

Usage: page.py BASE_URL DIRECTORY. Needs the playwright package and a system Chromium. Takes pictures in
both themes and at phone width, and fails when the page logs an error or asks for anything outside.
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

base, place = sys.argv[1], Path(sys.argv[2])
program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
problems = []


def visit(browser, theme, width, height, name):
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=theme)
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith((base, "data:")) else problems.append(request.url))
    page.goto(base)
    page.locator("#say").fill("Tell me a story about a robot.")
    if width < 800:
        page.locator("#more").click()
        page.screenshot(path=place / f"{name}-panel.png")
        page.locator("#more").click()
    page.locator("#say").press("Enter")
    expect(page.locator("#go")).to_have_text("Send", timeout=60000)
    # The panel asks every few seconds; it has asked once more when it shows a rate.
    if width >= 800:
        expect(page.locator("#stats b").first).not_to_have_text("\u2013", timeout=20000)
        expect(page.locator("#heatnote")).to_contain_text("12 layers down, 48 experts across", timeout=20000)
    assert len(page.locator("#talk > div").last.inner_text()) > 40, "no answer on the page"
    page.screenshot(path=place / f"{name}.png")
    page.close()


place.mkdir(parents=True, exist_ok=True)
with sync_playwright() as play:
    browser = play.chromium.launch(executable_path=program, args=["--no-sandbox"])
    for theme in ("light", "dark"):
        visit(browser, theme, 1280, 800, f"{theme}-wide")
        visit(browser, theme, 390, 800, f"{theme}-phone")
    browser.close()
assert not problems, problems
print("page: ok")
