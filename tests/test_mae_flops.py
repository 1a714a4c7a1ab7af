"""tools.mae_flops: what the compiler counts is what the analytic figures say."""

import jax
import pytest

from tools import mae_flops

TINY = ["--width", "64", "--mlp-dim", "256", "--heads", "2", "--depth", "2", "--decoder-depth", "1"]
TINY += ["--decoder-width", "32", "--image-size", "128", "--batch-size", "4"]


def encoder(depth, kept):
    arguments = mae_flops.parse([*TINY, "--depth", str(depth)])
    image = mae_flops.make_objective(arguments, 0.75).model.image
    return mae_flops.cost(mae_flops.EncoderAlone(image, kept), 128, 4)


def test_the_encoder_costs_what_it_sees_and_layers_count_one_by_one():
    row = mae_flops.Row("encoder", encoder(1, 16), encoder(1, 64))
    assert row.ratios.compiled < 0.35
    assert row.ratios.compiled == pytest.approx(row.ratios.analytic, rel=0.1)
    two = encoder(2, 16)
    more = two.analytic - row.masked.analytic
    assert two.compiled - row.masked.compiled == pytest.approx(more, rel=0.25)


@pytest.mark.slow
def test_the_whole_step_saves_less(capsys, monkeypatch):
    monkeypatch.setattr(mae_flops.jax.config, "update", lambda *a: None)  # this process is set up
    rows = []
    table = mae_flops.table
    monkeypatch.setattr(
        mae_flops, "table", lambda found, *a: rows.extend(found) or table(found, *a)
    )
    assert mae_flops.main([*TINY, "--markdown"]) == 0
    encoder, whole = rows
    for row in rows:  # the analytic figures leave out all but matrix products
        assert row.ratios.compiled == pytest.approx(row.ratios.analytic, rel=0.1)
        for cost in (row.masked, row.unmasked):
            assert cost.analytic < cost.compiled * 1.05 < 1.6 * cost.analytic
    assert encoder.ratios.compiled < whole.ratios.compiled < 1  # the decoder sees all tokens
    out = capsys.readouterr().out
    assert "17 of 65 tokens" in out and f"| {encoder.ratios.compiled:.3f} |" in out
    assert jax.__version__ in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--mask-ratio", "1"], "mask_ratio must be in [0, 1)"),
        (["--mask-ratio", "0"], "hides none"),
        (["--image-size", "100"], "do not tile"),
        (["--depth", "0"], "--depth is at least 1"),
        (["--decoder-width", "100"], "--decoder-width is a multiple of 32"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, words, monkeypatch, capsys):
    monkeypatch.setattr(mae_flops.jax.config, "update", lambda *a: None)
    assert mae_flops.main(arguments) == 2
    assert words in capsys.readouterr().err
