"""The lines of a search."""

import pytest
from scipy.stats import beta

from kd_lightning.cli.tuning.judge import Judge
from kd_lightning.cli.tuning.progress import accuracy_interval, trial_line, value_text
from kd_lightning.cli.tuning.study import Ended
from kd_lightning.cli.tuning.trial import Metric

ACCURACY = Metric("val/accuracy", "max", best=True)
LR = {"model.init_args.optimizer.init_args.lr": 0.0123456}


def ended(number=2, state="complete", value=0.75, values=LR, folds=(), reason=""):
    return Ended(number, state, value, dict(values), [*folds], reason, 1.0)


def test_lines():
    best = ended(1, value=0.8)
    line = trial_line("tiny", 9, ACCURACY, ended(), best, 75)
    assert line == "trial 2/9 of tiny: val/accuracy 0.75; best 0.8 (trial 1); lr 0.01235; about 75 s left"
    line = trial_line("tiny", 9, ACCURACY, ended(values={}), ended(), 0.0)
    assert line == "trial 2/9 of tiny: val/accuracy 0.75; the best so far; the config's own values; done"
    line = trial_line("tiny", 9, ACCURACY, ended(state="pruned", reason="after epoch 1"), best, None)
    assert line == "trial 2/9 of tiny: val/accuracy 0.75, pruned after epoch 1; best 0.8 (trial 1); lr 0.01235"
    line = trial_line("tiny", 9, ACCURACY, ended(state="failed", value=None, reason="val/loss is nan"), None, None)
    assert line == "trial 2/9 of tiny: failed: val/loss is nan; lr 0.01235"


def test_interval():
    """Clopper and Pearson's, by the beta distribution."""
    low, high = accuracy_interval(0.75, 40, ACCURACY)
    assert low == pytest.approx(beta.ppf(0.025, 30, 11)) and high == pytest.approx(beta.ppf(0.975, 31, 10))
    assert accuracy_interval(0.751, 40, ACCURACY) is None  # of dense labels
    assert accuracy_interval(0.75, 40, Metric("val/loss", "min", best=True)) is None
    assert accuracy_interval(2.0, 40, ACCURACY) is None


def test_values():
    judge = Judge(40, "", [], [40])
    assert value_text(ended(), judge, ACCURACY) == "val/accuracy 0.75 [0.588, 0.873] (95 %, n = 40)"
    loss = Metric("val/loss", "min", best=True)
    assert value_text(ended(), judge, loss) == "val/loss 0.75 (n = 40)"
    folds = ended(value=2.0, folds=(1.0, 2.0, 3.0))
    assert value_text(folds, judge, loss) == "val/loss 2 ± 0.58 (standard error over 3 folds, n = 40)"
