"""Metrics of a round of values, against numpy and scikit-learn; and its figures."""

import numpy as np
import pytest
import torch
from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score

from kd_lightning.pseudo_labels import PseudoValues
from kd_lightning.pseudo_labels.values_report import spread_figure, true_values, value_figure, value_metrics

NAN = float("nan")


def table(several, accepted=None):
    generator = torch.Generator().manual_seed(3)
    label, spread, change = torch.randn(3, 12, generator=generator).unbind()
    index = torch.arange(12) // 2 if several else torch.arange(12)
    weight = torch.tensor([1.0, 1, 0, 1, 1, 1, 0, 0, 1, 1, 1, 1]) if accepted is None else accepted
    output = torch.arange(12) % 2 if several else None
    return PseudoValues(index, label, spread.abs(), weight, change.abs(), 1, 4, output)


def truth_of(several):
    truth = torch.randn(*((6, 2) if several else (12,)), generator=torch.Generator().manual_seed(9))
    truth.view(-1)[5] = NAN
    return lambda index: truth[index]


@pytest.mark.parametrize("several", [False, True])
def test_against_references(several):
    one = table(several)
    truth = true_values(one, truth_of(several))
    given = torch.tensor([[1.0, 5.0], [2.0, NAN], [NAN, 9.0], [4.0, 6.0]]) if several else torch.tensor([1.0, 2, 4])
    found = value_metrics(one, given, truth)
    label, spread, accepted, true = (t.double().numpy() for t in (one.label, one.spread, one.weight, truth))
    accepted = accepted > 0
    assert (found["accepted"], found["coverage"]) == (9.0, 0.75)
    assert found["change"] == pytest.approx(np.sqrt((one.change.double().numpy() ** 2).mean()))
    assert np.sort(spread)[[5, 6]].min() <= found["spread"] <= np.sort(spread)[[5, 6]].max()
    assert found["accepted_spread"] == pytest.approx(np.median(spread[accepted]))
    outputs = np.arange(12) % 2 if several else np.zeros(12)
    columns = given.double().numpy().reshape(len(given), -1).T
    ratios = [
        label[accepted & (outputs == n)].std(ddof=1) / column[~np.isnan(column)].std(ddof=1)
        for n, column in enumerate(columns)
    ]
    assert found["std_ratio"] == pytest.approx(np.mean(ratios))
    for prefix, rows in (("", ~np.isnan(true)), ("accepted_", ~np.isnan(true) & accepted)):
        assert found[f"{prefix}mae"] == pytest.approx(mean_absolute_error(true[rows], label[rows]))
        assert found[f"{prefix}rmse"] == pytest.approx(mean_squared_error(true[rows], label[rows]) ** 0.5)
        scores = [r2_score(true[part], label[part]) for n in {*outputs} if (part := rows & (outputs == n)).any()]
        assert found[f"{prefix}r2"] == pytest.approx(np.mean(scores))


def test_what_is_not_known_is_absent():
    none = table(False, torch.zeros(12))
    found = value_metrics(none, torch.tensor([1.0, 2.0]), None)
    assert found.keys() == {"accepted", "coverage", "spread", "change"}
    constant = value_metrics(table(False), torch.tensor([1.0, 2.0]), torch.full((12,), 3.0))
    assert "rmse" in constant
    assert "r2" not in constant
    unknown = value_metrics(table(False), torch.tensor([1.0, 2.0]), torch.full((12,), NAN))
    assert "rmse" not in unknown


@pytest.mark.parametrize("several", [False, True])
def test_figures(several):
    for weight in (None, torch.zeros(12)):
        one = table(several, weight)
        given = torch.rand(5, 2) if several else torch.rand(5)
        (panel,) = spread_figure(one, 0.3).axes
        assert panel.get_title().startswith("round 1: " + ("9 of 12" if weight is None else "0 of 12"))
        assert len(spread_figure(one, float("inf")).axes[0].lines) == 0
        figure = value_figure(one, given)
        figure.canvas.draw()
        assert len(figure.axes) == (2 if several else 1)
