"""UncertaintyThreshold: each value against numpy in float64, and what is refused."""

import numpy as np
import pytest
import torch

from kd_lightning import FixedThreshold, InputError, LabelThresholds, UncertaintyThreshold
from kd_lightning.pseudo_labels.selection.base import check_task


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_against_numpy(dtype):
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(40, 1, 3, generator=generator, dtype=torch.float64)
    views = (torch.randn(40, 5, 3, generator=generator, dtype=torch.float64) * scale + 7).to(dtype)
    target, weight = UncertaintyThreshold(0.5)(views, views[:0], None)
    seen = views.double().numpy()
    for row in range(40):
        for output in range(3):
            values = seen[row, :, output]
            assert target[row, output].item() == pytest.approx(values.mean(), rel=1e-6)
            spread = np.sqrt(((values - values.mean()) ** 2).sum() / 4)
            assert abs(spread - 0.5) > 1e-5
            assert weight[row, output].item() == float(spread <= 0.5)
    assert 0.2 < weight.mean() < 0.8
    assert target.dtype == weight.dtype == dtype


def test_infinity_accepts_all_and_no_rows_are_none():
    views = torch.tensor([[[1e6], [-1e6]]])
    assert UncertaintyThreshold(float("inf"))(views, views[:0], None)[1].tolist() == [[1.0]]
    target, weight = UncertaintyThreshold()(views[:0], views, None)
    assert target.shape == weight.shape == (0, 1)


@pytest.mark.parametrize("limit", [0, -0.1, float("nan")])
def test_limits_that_cannot_be(limit):
    with pytest.raises(InputError, match="limit must be above 0, in standard deviations of the given labels, got"):
        UncertaintyThreshold(limit)


def test_tasks():
    check_task(UncertaintyThreshold(), "regression")
    for selection, task, message in (
        (UncertaintyThreshold(), "multiclass", "is for values of several views .* got task: multiclass; use FixedThr"),
        (UncertaintyThreshold(), "binary", "got task: binary; use LabelThresholds"),
        (FixedThreshold(0.9), "regression", "FixedThreshold is for probabilities that sum to 1 .* use UncertaintyThr"),
        (LabelThresholds(), "regression", r"for labels of 0 or 1 \(task binary or multilabel\), got task: regression"),
    ):
        with pytest.raises(InputError, match=message):
            check_task(selection, task)
