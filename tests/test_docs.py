"""The pages: their links lead somewhere, and their lines and README are as long as they may be."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "launch" / "README.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))
MAX_LINE, MAX_README = 100, 150


def named(page):
    return str(page.relative_to(ROOT))


def prose(page):
    """(number, line) of every line that is neither in a code block nor in a table."""
    in_code = False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.startswith("```"):
            in_code = not in_code
        elif not in_code and not line.lstrip().startswith("|"):
            yield number, line


def anchors(page):
    """The headings of a page as GitHub turns them into anchors."""
    titles = (line.lstrip("# ") for _, line in prose(page) if line.startswith("#"))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_lines_are_short(page):
    assert [number for number, line in prose(page) if len(line) > MAX_LINE] == []


def test_the_readme_is_one_page():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= MAX_README
    assert [line for line in lines if len(line) > MAX_LINE] == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_index_lists_every_page():
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert {name for name in pages if f"]({name})" not in index} == set()


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_configs_are_there(page):
    names = set(re.findall(r"configs/(\w+\.py)", page.read_text())) - {"X.py"}
    assert {name for name in names if not (ROOT / "configs" / name).exists()} == set()
