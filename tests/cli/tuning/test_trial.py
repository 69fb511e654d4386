"""What a trial's fit reports: the value of what a run would deploy."""

from types import SimpleNamespace

import pytest
import torch

from kd_lightning.cli.tuning.judge import Judge
from kd_lightning.cli.tuning.trial import REPORTS, Metric, TrialFailedError, TrialPrunedError, Watch, mean_over_folds


def watch_fit(values, metric=None, report=lambda share, value: False, every=1, module=None, **trainer):
    """Follow the validations of a fit; one of each ``every`` epochs."""
    metric = metric or Metric("val/accuracy", "max", best=True)
    watch = Watch(metric, report)
    module = module or torch.nn.Linear(2, 2)
    defaults = {"sanity_checking": False, "max_epochs": len(values) * every, "max_steps": -1, "global_step": 0}
    for number, value in enumerate(values, 1):
        callback_metrics = {metric.name: torch.tensor(value)} if value is not None else {}
        settings = defaults | {"current_epoch": number * every - 1, "callback_metrics": callback_metrics} | trainer
        watch.on_validation_end(SimpleNamespace(**settings), module)
    return watch


@pytest.mark.parametrize(
    ("mode", "best", "value"), [("max", True, 0.75), ("min", True, 0.25), ("max", False, 0.5), ("min", False, 0.5)]
)
def test_the_value_is_that_of_the_deployed_weights(mode, best, value):
    assert watch_fit([0.25, 0.75, 0.5], Metric("val/x", mode, best)).value == value


@pytest.mark.parametrize(
    ("validations", "every", "shares"),
    [(2, 1, [4, 8]), (4, 1, [2, 4, 6, 8]), (8, 1, [*range(1, 9)]), (40, 1, [*range(1, 9)]), (5, 4, [1, 3, 4, 6, 8])],
)
def test_reports_are_at_equal_shares_of_the_fit(validations, every, shares):
    """A fit of a quarter of the epochs is compared with others at the same share of theirs."""
    reports = []
    watch_fit([0.5] * validations, report=lambda share, value: reports.append(share), every=every)
    assert reports == shares and reports[-1] == REPORTS


def test_reports_of_a_fit_of_steps():
    reports = []
    for step in (100, 250, 500):
        watch = watch_fit(
            [0.5], report=lambda share, value: reports.append(share), max_epochs=-1, max_steps=500, global_step=step
        )
    assert reports == [1, 4, 8] and watch.value == 0.5


def test_a_report_prunes():
    with pytest.raises(TrialPrunedError, match="after epoch 2"):
        watch_fit([0.5, 0.1, 0.1, 0.1], Metric("val/x", "max", best=False), lambda share, value: value < 0.3)


def test_values_that_are_not_finite():
    with pytest.raises(TrialFailedError, match="val/accuracy is nan after epoch 2") as error:
        watch_fit([0.5, float("nan")])
    assert error.value.trained
    module = torch.nn.Linear(2, 2)
    with torch.no_grad():
        module.bias[1] = float("inf")
    with pytest.raises(TrialFailedError, match="weights are not finite after epoch 1"):
        watch_fit([0.5], module=module)


def test_a_metric_that_is_not_logged():
    with pytest.raises(TrialFailedError, match=r"monitor: val/accuracy is not logged by validation.*: none") as error:
        watch_fit([None])
    assert not error.value.trained


def test_the_sanity_check_does_not_count():
    assert watch_fit([0.5], sanity_checking=True).value is None


def test_the_mean_over_folds_counts_samples():
    judge = Judge(10, "", [], [2, 8])
    assert mean_over_folds([0.5], judge) == 0.5
    assert mean_over_folds([0.5, 1.0], judge) == pytest.approx(0.9)
