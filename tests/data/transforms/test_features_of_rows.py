"""Strong views of rows of a table: values of other rows, and noise."""

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from kd_lightning import DatasetSource, InputError, SemiSupervisedDataModule
from kd_lightning.cache.content import fingerprint
from kd_lightning.data.transforms import Compose, CorruptFeatures, Draws, GaussianNoise

ROWS = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5.0, 0.1, 2.0])
DRAWS = 3000


def draws(count=DRAWS, seed=0):
    return Draws(seed, torch.arange(count), torch.zeros(count, dtype=torch.long))


def test_corrupted_features_have_values_of_the_same_feature():
    x = torch.full((DRAWS, 4), 99.0)
    found = CorruptFeatures(ROWS, p=0.3)(x, draws())
    changed = found != 99
    assert (changed.double().mean(dim=0) - 0.3).abs().max() < 4 * (0.21 / DRAWS) ** 0.5
    for feature in range(4):
        values, counts = found[changed[:, feature], feature].unique(return_counts=True)
        assert torch.equal(values, ROWS[:, feature].sort().values)  # each row's value, and no other
        expected = counts.double().mean()
        assert ((counts - expected) ** 2 / expected).sum() < 85  # chi-square of 49, p > 0.001
    both = (changed[:, 0] & changed[:, 1]).double().mean()
    assert both.item() == pytest.approx(0.09, abs=0.02)
    rows = {tuple(row) for row in ROWS.tolist()}
    assert not any(tuple(row) in rows for row, all_ in zip(found.tolist(), changed.all(dim=1), strict=True) if all_)


def test_corrupted_features_by_hand():
    found, x = CorruptFeatures(ROWS, p=0.5)(ROWS[:7], draws(7)), ROWS[:7]
    again = draws(7).on_cpu()
    chosen, places = again.uniform(shape=(4,)) < 0.5, again.integers(0, 49, shape=(4,))
    for row in range(7):
        for feature in range(4):
            expected = ROWS[places[row, feature], feature] if chosen[row, feature] else x[row, feature]
            assert found[row, feature] == expected


def test_noise():
    x = torch.zeros(DRAWS, 4, dtype=torch.float64)
    found = GaussianNoise(0.5)(x, draws())
    assert found.dtype == torch.float64
    assert found.mean(dim=0).abs().max() < 4 * 0.5 / DRAWS**0.5
    assert (found.var(dim=0) - 0.25).abs().max() < 4 * 0.25 * (2 / DRAWS) ** 0.5
    assert (np.abs(np.corrcoef(found.T.numpy()) - np.eye(4)) < 4 / DRAWS**0.5).all()
    sides = torch.tensor([0.5, 1.0, 1.5])  # the distribution function at whole deviations
    for side, share in zip(sides, (0.8413, 0.9772, 0.9987), strict=True):
        assert (found < side).double().mean().item() == pytest.approx(share, abs=0.01)
    assert torch.equal(GaussianNoise(0.0)(ROWS, draws(50)), ROWS)
    shifted = GaussianNoise(0.5)(x + 1000, draws())
    assert torch.allclose(shifted - 1000, found, atol=1e-9)  # nothing is clipped


@pytest.mark.parametrize("form", ["tensor", "array"])
def test_replay(form):
    """A view is the same in each batch, order, worker and process."""
    rows = ROWS if form == "tensor" else [*zip(ROWS.numpy().astype(np.float64), range(50), strict=True)]
    labels = torch.arange(50) % 2
    items = TensorDataset(rows, labels) if form == "tensor" else [(row, n % 2) for row, n in rows]
    strong = Compose([CorruptFeatures(items, 0.4), GaussianNoise(0.1)])

    def views(**options):
        data = SemiSupervisedDataModule(DatasetSource(items), labeled=5, strong_transform=strong, val_size=0, **options)
        found = {}
        for batch in data.train_dataloader():
            assert torch.equal(batch.x, ROWS[batch.index])
            keys = zip(batch.index.tolist(), batch.view.tolist(), strict=True)
            found |= dict(zip(keys, batch.x_strong.tolist(), strict=True))
        return found

    first = views(batch_size=50)
    assert first == views(batch_size=7) == views(batch_size=9, num_workers=2)
    assert views(batch_size=50, seed=1) != first


def test_a_resume_compares_the_rows():
    one, other = CorruptFeatures(ROWS), CorruptFeatures(ROWS + 1)
    assert fingerprint(one) == fingerprint(CorruptFeatures(ROWS.clone())) != fingerprint(other)
    assert repr(one) == "CorruptFeatures(p=0.3)"


def test_numbers_of_categories_stay_some():
    x = torch.arange(12).view(6, 2) % 5
    found = CorruptFeatures(x, 0.5)(x, draws(6))
    assert found.dtype == torch.int64
    assert all(set(found[:, n].tolist()) <= set(x[:, n].tolist()) for n in range(2))
    masked = CorruptFeatures(torch.zeros(1, 4), 1.0)(ROWS, draws(50))
    assert not masked.any()


def test_what_does_not_fit():
    for p in (-0.1, 1.1):
        with pytest.raises(InputError, match="p must be 0 to 1, got"):
            CorruptFeatures(ROWS, p)
    for sigma in (-1.0, float("inf"), float("nan")):
        with pytest.raises(InputError, match="sigma must be finite and at least 0, got"):
            GaussianNoise(sigma)
    with pytest.raises(InputError, match="GaussianNoise needs floats, got torch.int64"):
        GaussianNoise(1.0)(torch.zeros(3, 2).long(), draws(3))
    with pytest.raises(
        InputError, match=r"rows must be \[4\] torch.float32, as those that it has, got \[3\] torch.float32"
    ):
        CorruptFeatures(ROWS)(torch.zeros(2, 3), draws(2))
    with pytest.raises(InputError, match=r"rows must be \[4\] torch.float32, .* got \[4\] torch.int64"):
        CorruptFeatures(ROWS)(torch.zeros(2, 4).long(), draws(2))
    with pytest.raises(InputError, match="rows must be a dataset of tensors or arrays of one shape and type, got"):
        CorruptFeatures([(torch.zeros(2), 0), (torch.zeros(3), 0)])
    with pytest.raises(InputError, match="rows must be a dataset .* got none"):
        CorruptFeatures([])
    with pytest.raises(InputError, match=r"rows must be at least one row, \(N, D\), got \[5\]"):
        CorruptFeatures(torch.zeros(5))
    with pytest.raises(InputError, match="rows must be a dataset .* got .*dict"):
        CorruptFeatures([({"a": torch.zeros(2), "b": torch.zeros(2)}, 0)])


def test_from_a_config():
    import jsonargparse
    from torch import nn

    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--strong", type=nn.Module)
    name = "kd_lightning.data.transforms"
    rows = {"class_path": f"{__name__}.Table", "init_args": {"size": 3}}
    parsed = parser.parse_object(
        {"strong": {"class_path": f"{name}.CorruptFeatures", "init_args": {"rows": rows, "p": 0.5}}}
    )
    found = (
        parser.instantiate(parsed).strong
        if hasattr(parser, "instantiate")
        else parser.instantiate_classes(parsed).strong
    )
    assert found.p == 0.5 and found.rows.shape == (3, 2)
    tokens = {"class_path": f"{name}.TokenDropout", "init_args": {"special_tokens": [1, 2], "mask_token": 3}}
    parsed = parser.parse_object({"strong": tokens})
    found = (
        parser.instantiate(parsed).strong
        if hasattr(parser, "instantiate")
        else parser.instantiate_classes(parsed).strong
    )
    assert found.special_tokens == [1, 2]


class Table(torch.utils.data.Dataset):
    def __init__(self, size: int):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return np.zeros(2) + index, 0
