"""The page in headless Chromium: what a person does on it, with what they see and hear."""

import contextlib
import threading
import time

import browser
import pytest
import uvicorn

from vlp_jax.serve.__main__ import listen
from vlp_jax.serve.app import make_app

pytestmark = browser.needs_chromium


@contextlib.contextmanager
def served(app):
    """The address of the page, while it runs."""
    with listen("127.0.0.1", 0) as opened:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", server_header=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.02)
        try:
            yield f"http://127.0.0.1:{opened.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)


@pytest.fixture
def address(explorer):
    with served(make_app(explorer, ["127.0.0.1"], max_upload=1 << 20)) as url:
        yield url


def search(page, text):
    page.get_by_label("What should the image show?").fill(text)
    page.keyboard.press("Enter")
    page.wait_for_selector("#search-results img")


def look(page, file):
    page.set_input_files("#file", file)
    page.wait_for_selector("#heat-image[src^=blob]", state="visible")
    page.locator("#look-results img").first.wait_for()


@pytest.mark.parametrize(
    ("width", "dark"), [(1280, False), pytest.param(360, True, marks=pytest.mark.slow)]
)
def test_search_and_look(address, folder, width, dark):
    with (
        browser.chromium() as chromium,
        browser.visit(chromium, address, width=width, dark=dark, allowed=(address,)) as seen,
    ):
        page = seen.page
        search(page, "a red circle")
        assert page.locator("#search-results li").count() == 5
        assert page.locator("#search-results").get_by_text("<img src=x").count() == 1  # as a text
        look(page, folder / "red.png")
        assert page.locator("#look-results .name").first.text_content() == "red.png"
        assert page.locator("#classes button").count() == 3
        pressed = page.locator("#classes button[aria-pressed=true] .text").text_content()
        assert pressed in page.locator("#heat-caption").text_content()
        page.locator("#classes button").nth(1).click()
        chosen = page.locator("#classes button").nth(1).locator(".text").text_content()
        page.get_by_alt_text(chosen).wait_for()
        page.get_by_label("Compare it with texts of your own").fill("a blue box\nsomething green")
        page.get_by_role("button", name="Compare").click()
        page.get_by_text("Among your texts").wait_for()
        assert page.locator("#classes button").count() == 2
        page.locator("#search-results button").first.click()  # an image of the index
        page.get_by_text("What it shows").wait_for()
        page.wait_for_selector("#heat-image[src^=blob]", state="visible")
        page.mouse.move(0, 0)
        assert browser.overflow(seen) == 0
        assert browser.axe_violations(seen) == []
        assert seen.complaints == [] and seen.requests == []


def test_what_goes_wrong_is_said(address, folder, tmp_path):
    (tmp_path / "big.png").write_bytes(b"x" * (2 << 20))
    with (
        browser.chromium() as chromium,
        browser.visit(chromium, address, allowed=(address,)) as seen,
    ):
        page = seen.page
        page.set_input_files("#file", folder / "notes.txt")
        page.get_by_text("the file is not an image that can be read").wait_for()
        page.set_input_files("#file", tmp_path / "big.png")
        page.get_by_text("big.png has 2.0 MiB; at most 1 MiB are accepted.").wait_for()
        assert page.locator("#look").is_hidden()
        page.get_by_label("What should the image show?").fill("   ")
        page.keyboard.press("Enter")
        page.get_by_text("the text is empty: type what the image shows").wait_for()
        assert browser.axe_violations(seen) == []


def test_the_server_is_gone(explorer, folder):
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(contextlib.ExitStack())
        url = server.enter_context(served(make_app(explorer, ["127.0.0.1"], 1 << 20)))
        chromium = stack.enter_context(browser.chromium())
        seen = stack.enter_context(browser.visit(chromium, url, allowed=(url,)))
        look(seen.page, folder / "red.png")
        server.close()
        seen.page.get_by_label("What should the image show?").fill("red")
        seen.page.keyboard.press("Enter")
        seen.page.get_by_text("The server does not answer. Is it still running?").wait_for()
