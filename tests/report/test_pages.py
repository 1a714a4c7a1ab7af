"""Whole pages: what is in them, what they are compared with, and how a browser sees them."""

import json
import re
import shutil

import numpy as np
import pytest

from tests.browser import (
    PHONE,
    axe_violations,
    chromium,
    needs_chromium,
    overflow,
    svg_text_contrasts,
    visit,
)
from tests.report.conftest import HOSTILE
from vlp_jax import evaluate
from vlp_jax.errors import UserError
from vlp_jax.report import page, pictures, section_retrieval
from vlp_jax.report.blocks import Cards, Code, Fold, Section, Table, Text, Tile, Tiles
from vlp_jax.report.page import MAX_BYTES, render, render_small
from vlp_jax.report.pictures import Album
from vlp_jax.report.run_record import RunRecord, read_baseline, short_names
from vlp_jax.report.section_run import curves_section

SECTIONS = (
    *("summary", "scores", "curves", "zero-shot-zero_shot", "retrieval-retrieval", "heat"),
    *("data", "time", "config"),
)


def command(*arguments):
    return evaluate.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def other(workdir, tmp_path_factory):
    """A second run: the first one's files, with another rate, fewer scores and better ones."""
    folder = tmp_path_factory.mktemp("other") / "runs" / "second"
    shutil.copytree(workdir, folder)
    config = json.loads((folder / "config.json").read_text())
    config["optimizer"]["learning_rate"] = 0.123
    (folder / "config.json").write_text(json.dumps(config))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in lines:
        record.update({key: 1.0 for key in record if key.endswith("_r1")})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    return folder


@pytest.fixture(scope="module")
def report(workdir, other, tmp_path_factory):
    """A report with another run for a baseline."""
    file = tmp_path_factory.mktemp("pages") / "report.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "HEATED", 1)  # each is computed on eight devices here
        assert command("--workdir", workdir, "--report", file, "--baseline", other) == 0
    return file


@pytest.fixture(scope="module")
def comparison(workdir, other, tmp_path_factory):
    file = tmp_path_factory.mktemp("pages") / "both.html"
    assert command("--workdir", workdir, "--compare", other, "--report", file) == 0
    return file


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A page in which all text tries to be markup, and every kind of block stands."""
    table = Table(HOSTILE, [HOSTILE, "b"], [[HOSTILE], [HOSTILE, HOSTILE]], (1,))
    blocks = [Text(HOSTILE), Tiles([Tile(HOSTILE, HOSTILE, [HOSTILE], (HOSTILE, "good"))]), table]
    picture = Album(10**6).add(np.zeros((8, 8, 3), np.uint8), HOSTILE, HOSTILE)
    card = section_retrieval.Card([picture], [(HOSTILE, HOSTILE)], (HOSTILE, "bad"))
    blocks += [Cards(HOSTILE, [card], HOSTILE), Fold(HOSTILE, [Code(HOSTILE, HOSTILE)])]
    file = tmp_path_factory.mktemp("pages") / "hostile.html"
    html = render(HOSTILE, [HOSTILE], [Section("a", HOSTILE, blocks)], {HOSTILE: HOSTILE})
    page.write(page.check_output(file), html)
    return file


def test_the_report_says_what_the_run_said(workdir, report):
    html = report.read_text()
    assert len(html.encode()) < MAX_BYTES
    assert [key for key in SECTIONS if f'<section id="{key}"' not in html] == []
    scores, _ = RunRecord.read(workdir).last_scores()
    assert f"{100 * scores['eval/zero_shot/top1']:.1f}\N{NO-BREAK SPACE}%" in html
    assert "0.123" in html and "1 key that differ" in html
    assert html.count("data:image/png;base64,") > 20


def test_the_baseline_of_a_run_is_its_last_scores(report, other):
    html = report.read_text()
    value = RunRecord.read(other).last_scores()[0]["eval/retrieval/image_to_text_r1"]
    assert value == 1.0
    row = re.search(r'<th scope="row">image to text R@1</th>(.*?)</tr>', html, re.DOTALL)[1]
    assert "100.0\N{NO-BREAK SPACE}%" in row and "worse" in row and "▼" in row


def test_the_comparison(comparison):
    html = comparison.read_text()
    row = re.search(r"retrieval: image to text R@1</th>(.*?)</tr>", html, re.DOTALL)[1]
    first, second = re.findall(r"<td[^>]*>(.*?)</td>", row)
    assert "★" not in first and "★ 100.0" in second
    assert "1 key that differ" in html and "optimizer.learning_rate" in html and "0.123" in html
    assert "goodput" in html and 'aria-label="loss: first from' in html
    assert "base64" not in html  # nothing was computed


def test_numbers_for_a_baseline(workdir, tmp_path, capsys):
    numbers, file = tmp_path / "numbers.json", tmp_path / "report.html"
    numbers.write_text('{"zero_shot/top1": 0.0, "eval/zero_shot/top2": 0.5}', "utf-8-sig")
    arguments = ("--workdir", workdir, "--evaluators", "zero_shot", "--report", file)
    assert command(*arguments, "--baseline", numbers) == 0
    told = "'zero_shot/top2', which was not evaluated; did you mean 'zero_shot/top"
    out = capsys.readouterr().out
    assert f"wrote {file}" in out and told in out
    html = file.read_text()
    assert told.replace("'", "&#39;") in html and 'id="retrieval-retrieval"' not in html


def mistake(capsys, *arguments):
    """The last line of a command that fails by a mistake of its user."""
    assert command(*arguments) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_mistakes_are_one_line(workdir, tmp_path, capsys):
    base = ("--workdir", workdir, "--report")
    file, empty = tmp_path / "r.html", tmp_path / "empty"
    empty.mkdir()
    assert "is a folder: name a file" in mistake(capsys, *base, tmp_path)
    assert "holds no run" in mistake(capsys, *base, file, "--baseline", empty)
    assert "add --report" in mistake(capsys, "--workdir", workdir, "--baseline", empty)
    assert "leave --all" in mistake(capsys, *base, file, "--all")
    assert "named twice" in mistake(capsys, *base, file, "--compare", workdir)
    assert "holds no run" in mistake(capsys, *base, file, "--compare", empty)
    assert "leave --step out" in mistake(capsys, *base, file, "--compare", empty, "--step", "1")
    assert not file.exists()
    with pytest.raises(UserError, match="the folder .*no does not exist"):
        page.check_output(tmp_path / "no" / "r.html")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[1]", "must be an object"),
        ('{"zero_shot/top1": "high"}', "zero_shot/top1 is 'high', not a number"),
        ('{"zero_shot/top1": NaN}', "not a number"),
        ('{"zero_shut/top1": 0.5}', "did you mean 'zero_shot'"),
        ('{"top1": 0.5}', "must be EVALUATOR/SCORE"),
    ],
)
def test_a_baseline_that_is_none(tmp_path, text, message):
    numbers = tmp_path / "n.json"
    numbers.write_text(text)
    with pytest.raises(UserError, match=message):
        read_baseline(numbers, ["retrieval", "zero_shot"])
    with pytest.raises(UserError, match="does not exist"):
        read_baseline(tmp_path / "no", ["zero_shot"])


def test_a_run_without_checkpoint(workdir, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(workdir / name, tmp_path / "run" / name)
    file = tmp_path / "r.html"
    arguments = ("--workdir", tmp_path / "run", "--evaluators", "zero_shot", "--report", file)
    assert "checkpoint" in mistake(capsys, *arguments) and not file.exists()
    with pytest.raises(UserError, match="no scores yet"):
        read_baseline(tmp_path / "run", ["zero_shot"])


def test_a_long_run_is_a_small_section(workdir):
    run = RunRecord.read(workdir)
    rng = np.random.default_rng(0)
    names = ["train/loss", "train/grad_norm", *(f"train/metric_{n}" for n in range(30))]
    records = [
        {
            "step": 10 * n,
            "train/skipped": float(n == 70),
            **dict(zip(names, rng.random(32).tolist())),
        }
        for n in range(10_000)
    ]
    long = RunRecord(run.path, run.config, records, run.run_time, run.summary, ())
    html = render("long", [], [curves_section(long)], {})
    assert len(html) < 400_000 and "Skipped steps" in html and ">700<" in html


def test_a_page_with_more_pictures_than_it_holds():
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (224, 224, 3), np.uint8) for _ in range(40)]
    sizes = []

    def build(album):
        made = [album.add(image, "noise") for image in images * 5]
        cards = [section_retrieval.Card([p], []) for p in made if p]
        # Text that leaves no room for the first budget.
        sections = [Section("a", "a", [Cards("a", cards), Code("c", "x" * 2_500_000)])]
        html = render("many", [], sections, {})
        sizes.append(len(html))
        return html

    assert MAX_BYTES * 0.5 < len(render_small(build)) < MAX_BYTES
    assert len(sizes) == 2 and sizes[0] > MAX_BYTES


def test_short_names():
    assert short_names(["/a/b/run", "/a/c/run/"]) == ["b/run", "c/run"]
    assert short_names(["/a/x", "/a/y"]) == ["x", "y"]


@needs_chromium
@pytest.mark.parametrize(
    "name", ["report", pytest.param("comparison", marks=pytest.mark.slow), "hostile"]
)
def test_in_a_browser(name, request):
    """Light and dark, wide and narrow: no complaint, no request, no violation, no overflow."""
    file = request.getfixturevalue(name)
    with chromium() as browser:
        for dark, width in ((False, 1280), (True, PHONE)):
            with visit(browser, file, dark=dark, width=width) as seen:
                assert overflow(seen) <= 0
                ground = "getComputedStyle(document.body).backgroundColor"
                system = seen.page.evaluate(ground)
                for theme in ("dark", "light"):
                    seen.page.check(f"#theme-{theme}")
                    seen.page.evaluate(
                        "for (const d of document.querySelectorAll('details')) d.open = true"
                    )
                    assert (seen.page.evaluate(ground) == system) == ((theme == "dark") == dark)
                    assert axe_violations(seen) == [], (theme, width)
                    assert [pair for pair in svg_text_contrasts(seen) if pair[1] < 4.5] == []
                assert overflow(seen) <= 0
                assert seen.complaints == [] and seen.requests == []


@needs_chromium
def test_the_policy_of_the_page_forbids_scripts_and_network(hostile, tmp_path):
    """If something were not escaped after all, it would come to nothing."""
    broken = tmp_path / "broken.html"
    html = hostile.read_text()
    extra = "<script>document.title = 'run'</script><img src='http://127.0.0.1:9/x.png' alt=''>"
    broken.write_text(html.replace("</main>", f"{extra}</main>"))
    with chromium() as browser, visit(browser, broken) as seen:
        assert seen.page.title() != "run"
        blocked = "\n".join(c for c in seen.complaints if "Content Security Policy" in c)
        assert "script" in blocked and "img-src data:" in blocked


@pytest.mark.slow
def test_the_report_of_a_masked_autoencoder(tmp_path, shapes_dir):
    from vlp_jax import config as config_lib
    from vlp_jax import smoke as smoke_lib
    from vlp_jax.observe.throughput import StartupClock
    from vlp_jax.train import train

    config = smoke_lib.smoke(config_lib.load("mae_then_clip:mae"))
    train(config, tmp_path / "run", StartupClock())
    assert command("--workdir", tmp_path / "run", "--report", tmp_path / "r.html") == 0
    html = (tmp_path / "r.html").read_text()
    assert 'id="painted"' in html and html.count("data:image/png") == 3 * 12
    assert 'id="heat"' not in html and "of the patches are hidden" in html
