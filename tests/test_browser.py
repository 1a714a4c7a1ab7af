"""The helper that looks at pages finds what is wrong with them."""

import pytest

from tests.browser import (
    PHONE,
    axe_violations,
    chromium,
    needs_chromium,
    overflow,
    svg_text_contrasts,
)
from tests.browser import visit as open_page

pytestmark = needs_chromium
BAD = """<!doctype html><html><head><title>x</title></head>
<body style="background:#fff"><p style="color:#aaa">pale</p><img src="http://127.0.0.1:9/a.png">
<div style="width:900px">wide</div>
<svg width="50" height="20"><text y="9" fill="#ccc">t</text></svg>
<script>console.warn("hm"); fetch("https://example.org/"); nothing();</script></body></html>"""
GOOD = """<!doctype html><html lang="en"><head><title>x</title><meta name="viewport"
content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'">
</head><body><main><h1>fine</h1><svg role="img" aria-label="t" width="50" height="20"><text y="9">t
</text></svg></main></body></html>"""


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


def test_a_bad_page(browser, tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(BAD)
    with open_page(browser, page, width=PHONE) as seen:
        violations = "\n".join(axe_violations(seen))
        assert "color-contrast" in violations and "image-alt" in violations
        assert "html-has-lang" in violations
        assert any("hm" in line for line in seen.complaints)
        assert any("nothing" in line for line in seen.complaints)
        assert set(seen.requests) == {"http://127.0.0.1:9/a.png", "https://example.org/"}
        assert overflow(seen) > 500
        assert svg_text_contrasts(seen) == [("t", pytest.approx(1.606, abs=1e-3))]


def test_a_good_page(browser, tmp_path):
    page = tmp_path / "good.html"
    page.write_text(GOOD)
    with open_page(browser, page, width=PHONE) as seen:
        assert axe_violations(seen) == [] and seen.complaints == [] and seen.requests == []
        assert overflow(seen) == 0 and svg_text_contrasts(seen)[0][1] == pytest.approx(21)
