"""tools.mae_flops: what the compiler counts is what the analytic figures say."""

import jax
import pytest

from tools import mae_flops

TINY = ["--width", "64", "--mlp-dim", "256", "--heads", "2", "--depth", "2", "--decoder-depth", "1"]
TINY += ["--image-size", "128", "--batch-size", "4"]


@pytest.mark.slow  # tests/objectives/test_objectives.py has a smaller one of the encoder
def test_the_encoder_costs_what_it_sees(capsys, monkeypatch):
    monkeypatch.setattr(mae_flops.jax.config, "update", lambda *a: None)  # this process is set up
    rows = []
    table = mae_flops.table
    monkeypatch.setattr(
        mae_flops, "table", lambda found, *a: rows.extend(found) or table(found, *a)
    )
    assert mae_flops.main([*TINY, "--markdown"]) == 0
    encoder, whole = rows
    assert encoder.ratios.compiled < 0.35
    assert encoder.ratios.compiled == pytest.approx(encoder.ratios.analytic, rel=0.1)
    assert whole.ratios.compiled == pytest.approx(whole.ratios.analytic, rel=0.1)
    assert encoder.ratios.compiled < whole.ratios.compiled < 1  # the decoder sees all tokens
    for row in rows:  # the analytic figures leave out all but matrix products
        for cost in (row.masked, row.unmasked):
            assert cost.analytic < cost.compiled * 1.05 < 1.6 * cost.analytic
    out = capsys.readouterr().out
    assert "17 of 65 tokens" in out and f"| {encoder.ratios.compiled:.3f} |" in out
    assert jax.__version__ in out


def test_layers_count_one_by_one():
    def compiled(depth):
        arguments = mae_flops.parse([*TINY, "--depth", str(depth)])
        objective = mae_flops.make_objective(arguments, 0.75)
        few = mae_flops.EncoderAlone(objective.model.image, objective.kept)
        return mae_flops.cost(few, 128, 4)

    one, two = compiled(1), compiled(2)
    assert two.compiled - one.compiled == pytest.approx(two.analytic - one.analytic, rel=0.25)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--mask-ratio", "1"], "mask_ratio must be in [0, 1)"),
        (["--mask-ratio", "0"], "hides none"),
        (["--image-size", "100"], "do not tile"),
        (["--depth", "0"], "--depth is at least 1"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, words, monkeypatch, capsys):
    monkeypatch.setattr(mae_flops.jax.config, "update", lambda *a: None)
    assert mae_flops.main(arguments) == 2
    assert words in capsys.readouterr().err
