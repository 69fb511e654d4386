"""OpenSetFilter: Otsu's threshold, pools with unknown classes, complaints."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from kd_lightning import (
    DatasetSource,
    FixedThreshold,
    InputError,
    OpenSetFilter,
    PseudoLabelModule,
    PseudoLabelRefresh,
    SemiSupervisedDataModule,
)
from kd_lightning.pseudo_labels.selection.open_set_filter import count_bins, otsu_threshold


@pytest.mark.parametrize(
    ("shares", "last"),
    [
        ([1, 0, 0, 0], 0),  # one group alone: nothing to split
        ([0, 0, 0, 1], 0),
        ([1, 0, 0, 1], 0),  # each split is as good: the lowest counts
        ([4, 3, 0, 3], 1),
        ([5, 1, 1, 5, 5], 1),  # 2.33 beside 2.28
    ],
)
def test_otsu(shares, last):
    assert int(otsu_threshold(torch.tensor(shares, dtype=torch.float64) / sum(shares))) == last


def test_more_rows_than_float32_can_count():
    """As the positions of large maps. A sum of ones in float32 ends at 2^24."""
    bins = torch.zeros((), dtype=torch.long).expand(2**24 + 3)
    counts = count_bins(torch.cat([bins, torch.ones(2, dtype=torch.long)]))
    assert counts[:3].tolist() == [2**24 + 3, 2, 0]
    assert len(counts) == 64


def rows(count, scale, classes, seed):
    logits = torch.randn(count, classes, generator=torch.Generator().manual_seed(seed))
    logits[torch.arange(count), torch.arange(count) % classes] += scale
    return logits.softmax(1)


@pytest.mark.parametrize("classes", [2, 5, 100])
def test_half_of_the_pool_is_unknown(classes):
    """Confident rows stay, unsure ones go, though all of them pass the threshold of 0."""
    selection = OpenSetFilter(FixedThreshold(0.0), momentum=0.5)
    selection.setup(None, classes)
    for seed in range(10):
        p = torch.cat([rows(200, 12.0, classes, seed), rows(200, 0.0, classes, seed + 50)])
        _, weight = selection(p, p[:0], None)
    assert weight[:200].mean() > 0.95
    assert weight[200:].mean() < (0.5 if classes == 2 else 0.05)


CENTRES = torch.tensor([[-2.0, 0.0], [2.0, 0.0], [0.0, 0.0]])  # the third class is unknown


def open_pool():
    """2 known classes with 10 labels each; of the 400 samples of the pool, 200 lie between them."""
    generator = torch.Generator().manual_seed(0)
    y = torch.tensor([0, 1] * 10 + [0, 1] * 100 + [2] * 200)
    x = CENTRES[y] + 0.4 * torch.randn(len(y), 2, generator=generator)
    labels = torch.where(torch.arange(len(y)) < 20, y, -100)
    data = SemiSupervisedDataModule(
        DatasetSource(TensorDataset(x, labels)), val_size=0, batch_size=50, labeled_batch_size=10, seed=0
    )
    return data, x[20:], y[20:]


@pytest.mark.parametrize("refreshed", [False, True])
def test_fewer_unknown_samples_are_learned(quiet_trainer, refreshed):
    """Weights of the pool after a fit with and without the filter, at a threshold that many unknown samples pass."""
    found = {}
    for name in ("plain", "filtered"):
        data, x, y = open_pool()
        torch.manual_seed(0)
        inner = FixedThreshold(0.6)
        selection = inner if name == "plain" else OpenSetFilter(inner, 0.0 if refreshed else 0.9)
        module = PseudoLabelModule(
            nn.Linear(2, 2),
            unsupervised_weight=0.0,  # both see the same predictions
            pseudo_labels="refreshed" if refreshed else "online",
            selection=None if refreshed else selection,
            optimizer=partial(torch.optim.SGD, lr=0.3),
        )
        refresh = PseudoLabelRefresh(selection=selection, warmup_epochs=0)
        quiet_trainer(max_epochs=5, callbacks=[refresh] if refreshed else []).fit(module, datamodule=data)
        if refreshed:
            weight = refresh.table.weight
        else:
            p = module(x).detach().softmax(1)
            weight = module.selection(p, p[:0], None)[1]
        found[name] = [weight[y < 2].mean().item(), weight[y == 2].mean().item()]
    assert found["plain"][1] > 0.3
    assert found["filtered"][1] < found["plain"][1] / 2
    assert found["filtered"][0] > 0.9


def test_complaints():
    with pytest.raises(InputError, match="OpenSetFilter has no state yet; call setup"):
        OpenSetFilter(FixedThreshold(0.5))(torch.ones(1, 2) / 2, torch.zeros(0, 2), None)
    with pytest.raises(InputError, match=r"momentum must lie in \[0, 1\), got 1.0"):
        OpenSetFilter(FixedThreshold(0.5), 1.0)
    assert "momentum=0.99" in repr(OpenSetFilter(FixedThreshold(0.5)))
