"""Strong views that samples have themselves: the entry x_strong of an item."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from kd_lightning import DatasetSource, FixedThreshold, InputError, PseudoLabelModule, SemiSupervisedDataModule
from kd_lightning.batch import Batch
from kd_lightning.data.transforms import GaussianNoise, MixUp, TokenDropout

SIZE = 24


def text(number, strong=False):
    length = 1 + (number * (3 if strong else 5)) % 7
    ids = torch.arange(length) + 10 * number + 500 * strong
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Texts(Dataset):
    """Two texts of different lengths; ``form`` is that of the items."""

    def __init__(self, form="mapping", numbers=range(SIZE), without=()):
        self.form, self.numbers, self.without = form, [*numbers], without

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index):
        number = self.numbers[index]
        inputs = {**text(number), "x_strong": text(number, strong=True)}
        if number in self.without:
            del inputs["x_strong"]
        if self.form == "lists":  # as Hugging Face's rows
            inputs = {
                k: {n: v.tolist() for n, v in p.items()} if k == "x_strong" else p.tolist() for k, p in inputs.items()
            }
        return (inputs, number % 3) if self.form == "pair" else {**inputs, "labels": number % 3}


def make(train, **options):
    test = options.pop("test", None)
    source = DatasetSource(train, test)
    return SemiSupervisedDataModule(source, **({"labeled": 2, "val_size": 1, "batch_size": 7} | options))


def tokens(x, row):
    return x["input_ids"][row][x["attention_mask"][row] == 1].tolist()


class Count(nn.Module):
    """Returns the names that it gets, and adds one to each token."""

    def forward(self, inputs):
        assert sorted(inputs) == ["attention_mask", "input_ids"]
        return {**inputs, "input_ids": inputs["input_ids"] + 1}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("form", ["mapping", "pair", "lists"])
def test_texts(form, workers):
    if form == "lists" and workers:
        pytest.skip("the same")
    data = make(Texts(form), test=Texts(form), num_workers=workers)
    assert data.train_dataloader().dataset.more_tensors == 2
    for batch in data.train_dataloader():
        assert batch.x["input_ids"].shape == batch.x_strong["input_ids"].shape
        for row, number in enumerate(batch.index.tolist()):
            assert tokens(batch.x, row) == text(number)["input_ids"].tolist()
            assert tokens(batch.x_strong, row) == text(number, strong=True)["input_ids"].tolist()
    for loader in (data.val_dataloader(), data.test_dataloader(), data.pool_dataloader()):
        assert all(batch.x_strong is None and sorted(batch.x) == ["attention_mask", "input_ids"] for batch in loader)


def test_transforms_get_their_own_text():
    data = make(Texts(), train_transform=Count(), strong_transform=Count(), eval_transform=Count())
    for batch in data.train_dataloader():
        for row, number in enumerate(batch.index.tolist()):
            assert tokens(batch.x, row) == (text(number)["input_ids"] + 1).tolist()
            assert tokens(batch.x_strong, row) == (text(number, strong=True)["input_ids"] + 1).tolist()
    assert [*data.val_dataloader()]


def test_replay():
    """Dropped tokens of the second text depend on seed, sample and view alone."""

    def views(**options):
        data = make(Texts(), strong_transform=TokenDropout([], 0.5, mask_token=3), val_size=0, **options)
        loader, found = data.train_dataloader(), {}
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            for batch in loader:
                for row, key in enumerate(zip(batch.index.tolist(), batch.view.tolist(), strict=True)):
                    found[key] = tokens(batch.x_strong, row)
        return found

    first = views()
    assert first == views(batch_size=5, num_workers=2) == views(batch_size=SIZE)
    assert views(seed=1) != first
    plain = {(n, v): text(n, strong=True)["input_ids"].tolist() for n, v in first}
    dropped = [(a == 3, a == b) for key in first for a, b in zip(first[key], plain[key], strict=True)]
    assert all(one != other for one, other in dropped)
    assert 0.2 < sum(one for one, _ in dropped) / len(dropped) < 0.6
    assert any(first[n, 0] != first[n, 1] for n in range(SIZE))


@pytest.mark.parametrize("form", ["tensor", "array", "named"])
def test_one_tensor(form):
    """Of embeddings, which may also be mixed: both views alike."""
    x = np.random.default_rng(0).normal(size=(2, SIZE, 5)).astype(np.float32)

    class Vectors(Dataset):
        def __len__(self):
            return SIZE

        def __getitem__(self, index):
            one, two = x[:, index] if form == "array" else torch.from_numpy(x[:, index])
            return {"embedding": one, "x_strong": {"embedding": two} if form == "named" else two, "label": index % 3}

    for batch in make(Vectors()).train_dataloader():
        assert torch.equal(batch.x, torch.from_numpy(x[0])[batch.index])
        assert torch.equal(batch.x_strong, torch.from_numpy(x[1])[batch.index])
    for batch in make(Vectors(), mix=MixUp(1.0)).train_dataloader():
        share = batch.share.double().numpy()[:, None]
        for found, own in ((batch.x, x[0]), (batch.x_strong, x[1])):
            expected = share * own[batch.index] + (1 - share) * own[batch.partner]
            np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_second_text_is_no_other_sample():
    """A sample has the same name with and without it: splits go on, and copies in the test part are found."""
    data, plain = make(Texts()), make(Texts(without=range(SIZE)))
    assert data.identities("train") == plain.identities("train")


def test_resume_refuses_other_texts(quiet_trainer, tmp_path):
    """Which the names of samples leave out. A resumed fit with the same ones equals an unbroken one."""

    class Others(Texts):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            item["x_strong"]["input_ids"] += 1
            return item

    def fit(texts, epochs, **options):
        torch.manual_seed(0)
        made = PseudoLabelModule(Bag(), selection=FixedThreshold(0.3))
        data = make(texts, strong_transform=TokenDropout([], 0.3), val_size=0, labeled_batch_size=2)
        trainer = quiet_trainer(max_epochs=epochs, limit_train_batches=1.0)
        trainer.fit(made, datamodule=data, **options)
        return trainer, made

    _, whole = fit(Texts(), 2)
    trainer, _ = fit(Texts(), 1)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    _, resumed = fit(Texts(), 2, ckpt_path=tmp_path / "x.ckpt")
    assert torch.equal(whole.student.words.weight, resumed.student.words.weight)
    with pytest.raises(InputError, match="x_strong: the checkpoint was trained with"):
        fit(Others(), 2, ckpt_path=tmp_path / "x.ckpt")
    with pytest.raises(InputError, match="x_strong: the checkpoint was trained with .* got None"):
        fit(Texts(without=range(SIZE)), 2, ckpt_path=tmp_path / "x.ckpt")


def test_batches_of_a_loader():
    """Of a DataLoader of the project's own."""
    for items in (DataLoader(Texts("mapping", [4, 4])), DataLoader(Texts("pair", [4, 4]))):
        batch = Batch.from_any(next(iter(items)))
        assert sorted(batch.x) == sorted(batch.x_strong) == ["attention_mask", "input_ids"]
        assert torch.equal(batch.x_strong["input_ids"][0], text(4, strong=True)["input_ids"])
    batch = Batch.from_any({"x": torch.zeros(2, 3), "x_strong": torch.ones(2, 3), "y": torch.zeros(2).long()})
    assert torch.equal(batch.x, torch.zeros(2, 3)) and torch.equal(batch.x_strong, torch.ones(2, 3))
    batch = Batch.from_any({"ids": torch.zeros(2, 3), "x_strong": {"ids": torch.ones(2, 3)}})
    assert torch.equal(batch.x, torch.zeros(2, 3)) and torch.equal(batch.x_strong, torch.ones(2, 3))


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.EmbeddingBag(1000, 3)

    def forward(self, input_ids, attention_mask):
        return self.words(input_ids, per_sample_weights=None) * attention_mask.sum(dim=1, keepdim=True)


def test_the_loss_is_on_the_second_text(quiet_trainer):
    """FixMatch by hand: the label of the first text, the loss of the second one."""
    from functools import partial

    still = partial(torch.optim.SGD, lr=0.0)
    options = {"val_size": 0, "batch_size": SIZE}
    made = PseudoLabelModule(Bag().double(), selection=FixedThreshold(0.6), optimizer=still)
    trainer = quiet_trainer(max_epochs=1, limit_train_batches=1.0)
    trainer.fit(made, datamodule=make(Texts(), **options))
    data = make(Texts(), **options)
    (batch,) = data.train_dataloader()
    pool = ~torch.isin(batch.index, torch.tensor(data.split.labeled))
    weak, strong = (made.student(**x).softmax(1) for x in (batch.x, batch.x_strong))
    confidence, label = weak.max(dim=1)
    rows = pool & (confidence >= 0.6)
    assert 0 < rows.sum() < pool.sum()
    expected = -strong[rows, label[rows]].log().sum() / pool.sum()
    assert trainer.callback_metrics["train/unsupervised"].item() == pytest.approx(expected.item(), rel=1e-5)


class TestRefused:
    def test_some_samples_without(self):
        with pytest.raises(InputError, match="x_strong: all training samples or none must have it, sample .* has none"):
            [*make(Texts(without=[3, 4, 5, 6, 7])).train_dataloader()]

    def test_another_form(self):
        items = [({"a": torch.zeros(3), "b": torch.zeros(2), "x_strong": {"a": torch.zeros(3)}}, 0)] * 6
        with pytest.raises(
            InputError, match=r"x_strong of a sample must have the names and shapes of the other inputs"
        ):
            [*make(items, labeled=None, val_size=0).train_dataloader()]

    def test_nothing_else(self):
        with pytest.raises(InputError, match="must have an entry besides x_strong, got none"):
            [*make([({"x_strong": torch.zeros(3)}, 0)] * 6, labeled=None, val_size=0).train_dataloader()]

    def test_whole_batch_transforms(self):
        items = [({"a": torch.zeros(3), "x_strong": torch.zeros(3)}, 0)] * 6
        data = make(items, labeled=None, val_size=0, strong_transform=GaussianNoise(0.1))
        with pytest.raises(InputError, match="whole-batch transforms take images alone"):
            [*data.train_dataloader()]

    def test_dense_labels(self):
        items = [{**text(n), "x_strong": text(n, strong=True), "labels": text(n)["input_ids"] % 3} for n in range(6)]
        data = SemiSupervisedDataModule(DatasetSource(items, dense=True), val_size=0, batch_size=3)
        with pytest.raises(InputError, match="x_strong of sample . may move its dense labels; give a strong_transform"):
            [*data.train_dataloader()]
