"""Pages in headless Chromium: what they log and ask for, how accessible and how wide they are.

    with chromium() as browser, visit(browser, path, dark=True, width=360) as page:
        assert page.complaints == [] and page.requests == []
        assert axe_violations(page) == []

Nothing is downloaded: the browser is the installed one, axe-core comes with its Python package.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

EXECUTABLE = shutil.which("chromium") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(EXECUTABLE is None, reason="no chromium is installed")
WCAG_AA = ("wcag2a", "wcag2aa", "wcag21a", "wcag21aa")
PHONE = 360  # pixels across

# What axe leaves out: the contrast of text in SVG with the nearest background that is opaque.
_SVG_TEXT = """() => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const luminance = (color) => {
    const [r, g, b] = channels(color).slice(0, 3).map((c) => {
      const s = c / 255;
      return s <= 0.04045 ? s / 12.92 : ((s + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      const alpha = channels(color)[3];
      if (alpha === undefined || alpha === 1) return color;
    }
    return 'rgb(255, 255, 255)';
  };
  return [...document.querySelectorAll('svg text')].map((text) => {
    const pair = [luminance(getComputedStyle(text).fill), luminance(behind(text.ownerSVGElement))];
    return [text.textContent, (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05)];
  });
}"""


@dataclasses.dataclass
class Visit:
    """A page that is open.

    Attributes:
      page: playwright's.
      complaints: messages of the console of level warning or error, and uncaught exceptions.
      requests: what it asked for besides itself (and was refused, unless it is allowed).
    """

    page: Any
    complaints: list[str]
    requests: list[str]


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser; the test is skipped where none is installed."""
    if EXECUTABLE is None:
        pytest.skip("no chromium is installed")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=EXECUTABLE, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def visit(
    browser: Any,
    address: str | Path,
    *,
    width: int = 1280,
    height: int = 900,
    dark: bool = False,
    allowed: Sequence[str] = (),
) -> Iterator[Visit]:
    """Opens a page and waits until it is loaded.

    Args:
      address: a file's path, or a URL.
      width, height: of the window, CSS pixels.
      dark: what the system prefers.
      allowed: how URLs begin that the page may ask for; they are not counted. Everything else but
        the page itself is counted and refused.
    """
    url = address.resolve().as_uri() if isinstance(address, Path) else address
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
    )
    page = context.new_page()
    seen = Visit(page, [], [])
    own = (url, *allowed)

    def look(route: Any) -> None:
        asked = route.request.url
        if asked == url or asked.startswith(tuple(allowed) or ("\0",)):
            route.continue_()
        else:
            route.abort()

    def note(request: Any) -> None:
        if request.url not in own and not request.url.startswith(("data:", "blob:", *allowed)):
            seen.requests.append(request.url)

    def listen(message: Any) -> None:
        if message.type in ("warning", "error"):
            seen.complaints.append(f"{message.type}: {message.text}")

    page.route("**/*", look)
    page.on("request", note)
    page.on("console", listen)
    page.on("pageerror", lambda error: seen.complaints.append(f"exception: {error}"))
    try:
        page.goto(url, wait_until="load")
        yield seen
    finally:
        context.close()


def axe_violations(seen: Visit, tags: Sequence[str] = WCAG_AA) -> list[str]:
    """A line for each element that breaks a rule of axe-core with one of these tags."""
    axe = pytest.importorskip("axe_playwright_python.base")
    # Through the debugger, as the policy of a page may forbid it to evaluate strings.
    debugger = seen.page.context.new_cdp_session(seen.page)
    debugger.send("Runtime.evaluate", {"expression": axe.AXE_SCRIPT})
    options = f"{{runOnly: {list(tags)}, resultTypes: ['violations']}}"
    found = debugger.send(
        "Runtime.evaluate",
        {
            "expression": f"axe.run(document, {options})",
            "awaitPromise": True,
            "returnByValue": True,
        },
    )
    if "exceptionDetails" in found:
        raise AssertionError(f"axe failed: {found['exceptionDetails']}")
    return [
        f"{rule['id']}: {node['target']}: {node.get('failureSummary', '')}"
        for rule in found["result"]["value"]["violations"]
        for node in rule["nodes"]
    ]


def svg_text_contrasts(seen: Visit) -> list[tuple[str, float]]:
    """(text, contrast with its background) of all text in SVG, which axe does not look at."""
    return [tuple(pair) for pair in seen.page.evaluate(_SVG_TEXT)]


def overflow(seen: Visit) -> int:
    """How many pixels the page is wider than the window; what scrolls in a box does not count."""
    return seen.page.evaluate(
        "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    )


def screenshot(seen: Visit, path: Path, whole: bool = False) -> None:
    """Writes what the window shows, or the whole page, as PNG."""
    seen.page.screenshot(path=path, full_page=whole)
