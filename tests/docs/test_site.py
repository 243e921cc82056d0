"""The built site: complete, linked, and whole in a real browser, without anything from elsewhere."""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from lxml import html
from mkdocstrings import Inventory
from public_api import PUBLIC

pytestmark = pytest.mark.site

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDE, PHONE = {"width": 1400, "height": 900}, {"width": 390, "height": 844}


def broken_links(site: Path) -> list[str]:
    """Links within a site that lead to no file, or to no element of a page."""
    pages = {path: html.parse(path).getroot() for path in site.resolve().rglob("*.html")}
    anchors = {path: {*page.xpath("//@id"), *page.xpath("//a/@name")} for path, page in pages.items()}
    broken = []
    for path, page in pages.items():
        links = {link for _, _, link, _ in page.iterlinks()} | {*page.xpath("//@*[name() = 'xlink:href']")}
        for link in sorted(links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            start = site if parts.path.startswith("/") else path.parent
            target = (start / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            fragment = unquote(parts.fragment)
            if not target.is_file() or (fragment and fragment not in anchors.get(target, ())):
                broken.append(f"{path.relative_to(site.resolve())}: {link}")
    return broken


def test_broken_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "index.html").write_text('<h1 id="top">Title</h1><a href="../#here">good</a>')
    links = {
        "good": ("other/", "other/#top", "other/index.html", "#here", "#", "/other/", "https://example.org/nowhere"),
        "bad": ("missing/", "other/#bottom", "#there", "/missing.html", "other/missing.png"),
    }
    page = "".join(f'<a href="{link}">link</a>' for group in links.values() for link in group)
    (tmp_path / "index.html").write_text(f'<p id="here">{page}<img src="missing.svg"><use xlink:href="#shape"/></p>')
    expected = {f"index.html: {link}" for link in (*links["bad"], "missing.svg", "#shape")}
    assert {*broken_links(tmp_path)} == expected


def test_links_and_anchors_lead_somewhere(site: Path) -> None:
    assert not broken_links(site)


def test_everything_is_on_the_site(site: Path) -> None:
    with (site / "objects.inv").open("rb") as file:
        inventory = Inventory.parse_sphinx(file, domain_filter=["py"])
    assert not {path for path, item in PUBLIC.items() if item.docstring} - inventory.keys()


def test_scripts_styles_and_pictures_are_the_sites_own(site: Path) -> None:
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        for tag in re.findall(r"<(?:script|img|link rel=\"?(?:stylesheet|preconnect|icon))[^>]*>", text):
            assert "//" not in tag, f"{path.relative_to(site)}: {tag}"


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


def _find_browser() -> str:
    """The path of a browser; without one, tests are skipped, or fail where continuous integration could install it."""
    for name in BROWSERS:
        if path := shutil.which(name):
            return path
    message = f"a browser: none of {', '.join(BROWSERS)} is installed"
    if os.environ.get("CI") == "true" and hasattr(os, "geteuid") and os.geteuid() == 0:
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, or Google Chrome."""
    found = _find_browser()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
        opened = playwright.chromium.launch(executable_path=found, args=arguments)
        yield opened
        opened.close()


def _pages(site: Path) -> list[str]:
    return sorted(str(path.relative_to(site).parent).strip(".") for path in site.rglob("index.html"))


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


# Whether the background of a page is that of the scheme "light" or "dark".
_HAS_SCHEME = """(scheme) => {
  const [red, green, blue] = getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number);
  return (red + green + blue < 3 * 128) === (scheme === "dark");
}"""


@pytest.mark.timeout(600)
def test_pages_are_whole_in_a_browser(site: Path, address: str, browser: Any) -> None:
    """Each page in both color schemes, and in a narrow window. CONVEXHEADS_SCREENSHOTS names a folder for pictures."""
    folder = os.environ.get("CONVEXHEADS_SCREENSHOTS")
    context = browser.new_context(viewport=WIDE, color_scheme="light")
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    # What the next page interrupts has not failed.
    page.on("requestfailed", lambda request: None if "ABORTED" in request.failure else said.append(request.url))
    page.on("request", lambda request: None if request.url.startswith((address, "data:")) else said.append(request.url))
    faults: dict[str, list[str]] = {}
    for name in _pages(site):
        said.clear()
        found: list[str] = []
        page.set_viewport_size(WIDE)  # before the page is loaded: parts of it take time to follow a change
        page.goto(f"{address}/{name}", wait_until="load")
        for scheme, size in (("light", WIDE), ("dark", WIDE), ("dark", PHONE)):
            page.set_viewport_size(size)
            if size == WIDE:
                page.evaluate(f"document.querySelector('[data-md-color-media*={scheme}]').click()")
                page.wait_for_function(_HAS_SCHEME, arg=scheme, timeout=10_000)
            found += [f"{scheme}, {size['width']} pixels: {fault}" for fault in page.evaluate(_FAULTS)]
            if folder:
                shot = f"{name.replace('/', '_') or 'home'}-{size['width']}-{scheme}.png"
                page.screenshot(path=Path(folder) / shot, full_page=True)
        if found or said:
            faults[name or "home"] = [*said, *found]
    context.close()
    assert not faults


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_color_scheme_is_that_of_the_browser(address: str, browser: Any, scheme: str) -> None:
    context = browser.new_context(color_scheme=scheme)
    page = context.new_page()
    page.goto(address)
    page.wait_for_function(_HAS_SCHEME, arg=scheme, timeout=10_000)
    context.close()


def test_search_finds(address: str, browser: Any) -> None:
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


@pytest.mark.parametrize(("ci", "user", "outcome"), [("true", 0, "fail"), ("true", 1, "skip"), ("", 0, "skip")])
def test_a_missing_browser_fails_where_it_could_be_installed(
    monkeypatch: pytest.MonkeyPatch, ci: str, user: int, outcome: str
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(os, "geteuid", lambda: user, raising=False)
    monkeypatch.setenv("CI", ci)
    with pytest.raises(getattr(pytest, outcome).Exception, match="chromium"):
        _find_browser()
