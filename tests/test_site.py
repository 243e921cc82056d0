"""The built site: strict, complete, linked, and whole in a real browser, without anything from elsewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDE, PHONE = {"width": 1400, "height": 900}, {"width": 390, "height": 844}


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Where the site is served."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(site))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def _pages(site: Path) -> list[str]:
    return sorted(str(path.relative_to(site).parent).strip(".") for path in site.rglob("index.html"))


@pytest.mark.timeout(600)
def test_links_and_anchors_lead_somewhere(address):
    command = [Path(sys.executable).with_name("linkchecker"), "--config", Path(__file__).with_name("linkchecker.ini")]
    done = subprocess.run([*command, "--no-status", f"{address}/"], capture_output=True, text=True, timeout=580)
    counts = re.search(
        r"(\d+) links? in (\d+) URLs? checked\. (\d+) warnings? found\. (\d+) errors? found", done.stdout
    )
    assert counts is not None, done.stdout + done.stderr
    assert int(counts[2]) > 100
    assert (counts[3], counts[4], done.returncode) == ("0", "0", 0), done.stdout


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"a browser: none of {', '.join(BROWSERS)} is installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        opened = playwright.chromium.launch(executable_path=found, args=arguments)
        yield opened
        opened.close()


# What is wrong with a page, asked in the page itself.
_FAULTS = """() => {
  const faults = [];
  const text = (element) => element.textContent.trim().slice(0, 60);
  for (const formula of document.querySelectorAll(".arithmatex"))
    if (!formula.querySelector(".katex")) faults.push("formula not rendered: " + text(formula));
  for (const broken of document.querySelectorAll(".katex-error")) faults.push("formula: " + text(broken));
  for (const image of document.images)
    if (!(image.complete && image.naturalWidth > 0)) faults.push("picture missing: " + image.src);
  for (const picture of document.querySelectorAll(".picture svg"))
    if (picture.getBoundingClientRect().width < 100) faults.push("picture without size");
  const width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > width + 1) faults.push("wider than the window");
  for (const wide of document.querySelectorAll("article table, article pre, article .picture, article div.arithmatex")) {
    const scrolls = wide.closest(".md-typeset__scrollwrap, .highlight, .picture, .arithmatex, pre, code");
    const box = (scrolls || wide).getBoundingClientRect();
    if (box.width && box.right > width + 1) faults.push("sticks out: " + text(wide));
  }
  for (const raw of document.querySelector("article").innerText.match(/.*(--8<--|--8 <|:::|exec="on").*/g) || [])
    faults.push("not rendered: " + raw);
  return faults;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
def test_pages_are_whole_in_a_browser(site, address, browser, size, scheme):
    """CONVEXHEADS_SCREENSHOTS names a folder for pictures of them."""
    folder = os.environ.get("CONVEXHEADS_SCREENSHOTS")
    context = browser.new_context(viewport=size, color_scheme=scheme)
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    # What the next page interrupts has not failed.
    page.on("requestfailed", lambda request: None if "ABORTED" in request.failure else said.append(request.url))
    page.on("request", lambda request: None if request.url.startswith((address, "data:")) else said.append(request.url))
    faults = {}
    for name in _pages(site):
        said.clear()
        page.goto(f"{address}/{name}", wait_until="load")
        found = [*said, *page.evaluate(_FAULTS)]
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        dark = sum(map(int, re.findall(r"\d+", background)[:3])) < 3 * 128
        if dark != (scheme == "dark"):
            found.append(f"background {background}")
        if found:
            faults[name or "home"] = found
        if folder:
            shot = f"{name.replace('/', '_') or 'home'}-{size['width']}-{scheme}.png"
            page.screenshot(path=Path(folder) / shot, full_page=True)
    context.close()
    assert not faults


def test_search_finds(address, browser):
    context = browser.new_context(viewport=WIDE)
    page = context.new_page()
    page.goto(address)
    page.click(".md-search__input")
    page.keyboard.type("certificate")
    page.wait_for_selector(".md-search-result__link", timeout=20_000)
    assert "solvers" in {
        link.split("/")[3]
        for link in page.eval_on_selector_all(".md-search-result__link", "links => links.map(link => link.href)")
    }
    context.close()


def test_scripts_styles_and_pictures_are_the_sites_own(site):
    for path in site.rglob("*.html"):
        text = path.read_text()
        for tag in re.findall(r"<(?:script|img|link rel=\"?(?:stylesheet|preconnect|icon))[^>]*>", text):
            assert "//" not in tag, f"{path.relative_to(site)}: {tag}"
