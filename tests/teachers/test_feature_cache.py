"""Stored features: equal to live ones, in their own tables, right after a kill or damage, and refused where wrong."""

import json
import os
import pickle
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kd_lightning import (
    DatasetSource,
    DistillModule,
    EnsembleDistillModule,
    FixedThreshold,
    InputError,
    PseudoLabelRefresh,
    SemiSupervisedDataModule,
    Teacher,
)
from kd_lightning.batch import Batch
from kd_lightning.cache.outputs import OutputRows
from kd_lightning.cache.row_format import HASH_BYTES
from kd_lightning.cache.store import OutputCache
from kd_lightning.data.transforms.mix import MixUp
from kd_lightning.data.views.teacher_outputs import FillingCollate, ViewOutputs
from kd_lightning.features.pooling import Pool
from kd_lightning.features.term import FeatureTerm
from kd_lightning.losses import KDLoss
from kd_lightning.losses.features.mse import MSEFeatureLoss
from kd_lightning.teachers.cache_fill import fill_caches
from kd_lightning.teachers.output_layout import Distances

SAMPLES, BATCH, CLASSES = 40, 8, 3
TRAINING = SAMPLES - 4 * CLASSES  # the others are for validation
MEAN, FIRST = Pool("mean"), Pool("first")


class Net(nn.Module):
    """Counts the samples that reach its first layer."""

    def __init__(self, seed, width=4, scale=1.0):
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.block = nn.Sequential(nn.ReLU(), nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU())
        self.head = nn.Linear(2 * width, CLASSES)
        self.scale = scale
        self.sizes = []

    def forward(self, x):
        self.sizes.append(len(x))
        return self.head(self.block(self.scale * self.stem(x)).mean((2, 3)))


class Shift(nn.Module):
    """Adds a random number to each picture."""

    def forward(self, x):
        return x + torch.rand(1)


def pictures(**kwargs):
    x = torch.randn(SAMPLES, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    source = DatasetSource(TensorDataset(x, torch.arange(SAMPLES) % CLASSES))
    options = {"num_views": 2, "labeled": 2, "val_size": 4, "batch_size": BATCH, "train_transform": Shift()}
    return SemiSupervisedDataModule(source, **options | kwargs)


def terms(*names):
    made = {
        "maps": FeatureTerm({"block": "block"}, MSEFeatureLoss()),
        "vectors": FeatureTerm({"stem": "block"}, MSEFeatureLoss(), pool="mean"),
        "outputs": FeatureTerm({"": ""}, MSEFeatureLoss()),
        "stems": FeatureTerm({"stem": "stem"}, MSEFeatureLoss()),
    }
    return {name: made[name] for name in names}


def fit(trainer, names=("maps", "vectors", "outputs"), data=None, teacher=None, callbacks=(), **cache):
    seed_everything(3, verbose=False)
    teacher = teacher or Teacher(Net(1, 6), **cache)
    module = DistillModule(Net(0), teacher, features=terms(*names), soft_loss=KDLoss(2.0))
    trainer(max_epochs=2, callbacks=[*callbacks]).fit(module, datamodule=data or pictures())
    return module


def assert_same(one, other):
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def folder_of(module):
    (folder,) = module.teacher.cache_folders.values()
    return folder


def computed(module):
    return sum(module.teacher.network.sizes)


@pytest.mark.parametrize(
    "kwargs", [{}, {"mix": MixUp()}, {"num_workers": 1, "num_views": 1}], ids=["", "mixup", "workers"]
)
def test_equal_to_the_live_run_to_the_bit(kwargs, quiet_trainer, tmp_path):
    live = fit(quiet_trainer, data=pictures(**kwargs))
    filling, filled = (
        fit(quiet_trainer, data=pictures(**kwargs), cache=tmp_path, cache_dtype="float32") for _ in range(2)
    )
    assert_same(live, filling)
    assert_same(live, filled)
    batches = -(-pictures(**kwargs).num_views * TRAINING // BATCH)
    assert computed(filling) - computed(filled) == batches * BATCH  # each view once
    assert computed(live) - computed(filled) == 2 * TRAINING - 2 * BATCH  # a batch is computed twice, to compare


def test_several_teachers(quiet_trainer, tmp_path):
    def run(**cache):
        seed_everything(3, verbose=False)
        teachers = [Teacher(Net(1, 6), **cache), Teacher(Net(2, 6))]
        term = FeatureTerm({"block": "0.block", "stem": "1.stem"}, MSEFeatureLoss())
        module = EnsembleDistillModule(Net(0), teachers, features={"maps": term})
        quiet_trainer(max_epochs=2).fit(module, datamodule=pictures())
        return module.student

    assert_same(run(), run(cache=tmp_path, cache_dtype="float32"))


def test_float16_is_near(quiet_trainer, tmp_path):
    live, cached = fit(quiet_trainer), fit(quiet_trainer, cache=tmp_path)
    for one, other in zip(live.student.parameters(), cached.student.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=2e-3)
    assert not torch.equal(live.student.stem.weight, cached.student.stem.weight)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_row_holds_the_parts_alone(dtype, quiet_trainer, tmp_path):
    """Logits, and maps of 12 x 3 x 3 or 6 x 6 x 6. A layer that all terms pool takes one value for each channel."""
    size = {"float16": 2, "float32": 4}[dtype]
    for names, values in {("maps",): 108, ("vectors",): 12, ("maps", "vectors"): 108, ("stems",): 216, (): 0}.items():
        folder = folder_of(fit(quiet_trainer, names, cache=tmp_path, cache_dtype=dtype))
        assert (folder / "outputs").stat().st_size == 2 * TRAINING * (HASH_BYTES + size * (values + CLASSES))


def test_other_layers_have_other_tables(quiet_trainer, tmp_path, caplog):
    caplog.set_level("INFO")
    folders = [
        folder_of(fit(quiet_trainer, names, cache=tmp_path))
        for names in [(), ("maps",), ("vectors",), ("maps", "stems"), ("stems", "maps")]
    ]
    assert len({*folders[:4]}) == 4
    assert folders[3] == folders[4]  # in any order
    assert caplog.text.count("computing all") == 4
    assert caplog.text.count("the most similar cache differs in: layers") == 3


def test_a_teacher_of_an_earlier_fit(quiet_trainer, tmp_path):
    """The second module has no terms, so that its table holds logits alone."""
    teacher = Teacher(Net(1, 6), cache=tmp_path)
    fit(quiet_trainer, ("maps",), teacher=teacher)
    module = fit(quiet_trainer, (), teacher=teacher)
    assert (folder_of(module) / "outputs").stat().st_size == 2 * TRAINING * (HASH_BYTES + 2 * CLASSES)


def test_resumed_in_mid_epoch(quiet_trainer, tmp_path):
    live = fit(quiet_trainer)
    saves = ModelCheckpoint(tmp_path, "mid", every_n_train_steps=7)
    cache = {"cache": tmp_path / "cache", "cache_dtype": "float32"}
    fit(lambda **k: quiet_trainer(enable_checkpointing=True, **k), callbacks=[saves], **cache)
    module = DistillModule(
        Net(0), Teacher(Net(1, 6), **cache), features=terms("maps", "vectors", "outputs"), soft_loss=KDLoss(2.0)
    )
    quiet_trainer(max_epochs=2).fit(module, datamodule=pictures(), ckpt_path=tmp_path / "mid.ckpt", weights_only=True)
    assert_same(live, module)
    assert len([*(tmp_path / "cache").iterdir()]) == 1


@pytest.mark.parametrize("damage", ["checksum", "features", "logits", "gone", "short"])
def test_a_killed_or_damaged_fill_is_completed(damage, quiet_trainer, tmp_path):
    live = fit(quiet_trainer)
    folder = folder_of(fit(quiet_trainer, cache=tmp_path, cache_dtype="float32"))
    file = folder / "outputs"
    whole = file.read_bytes()
    if damage == "checksum":  # killed before it was written
        (folder / "chunks").write_bytes(bytes((folder / "chunks").stat().st_size))
    elif damage == "gone":
        file.unlink()
    elif damage == "short":
        os.truncate(file, 100)
    else:
        place = HASH_BYTES + 2 if damage == "features" else -3
        data = bytearray(whole)
        data[place] ^= 1
        file.write_bytes(bytes(data))
    assert_same(live, fit(quiet_trainer, cache=tmp_path, cache_dtype="float32"))
    assert file.read_bytes() == whole


def test_a_fill_that_was_killed_goes_on(quiet_trainer, tmp_path, monkeypatch):
    live = fit(quiet_trainer)
    monkeypatch.setattr("kd_lightning.teachers.cache_fill.CHUNK", 2 * BATCH)
    whole = fit(quiet_trainer, cache=tmp_path / "a", cache_dtype="float32")
    write = OutputCache.write

    def killed(self, number, rows):
        if number == 2:
            raise KeyboardInterrupt
        write(self, number, rows)

    with monkeypatch.context() as patch:
        patch.setattr(OutputCache, "write", killed)
        with pytest.raises(SystemExit):
            fit(quiet_trainer, cache=tmp_path / "b", cache_dtype="float32")
    rest = fit(quiet_trainer, cache=tmp_path / "b", cache_dtype="float32")
    assert_same(live, rest)
    assert (folder_of(rest) / "outputs").read_bytes() == (folder_of(whole) / "outputs").read_bytes()
    assert computed(whole) - computed(rest) == 2 * 2 * BATCH  # of the two parts that were there


@pytest.mark.parametrize("options", [{"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}])
def test_equal_for_trainers(options, quiet_trainer, tmp_path):
    def run(**cache):
        return fit(lambda **kwargs: quiet_trainer(**kwargs, **options), **cache)

    assert_same(run(), run(cache=tmp_path, cache_dtype="float32"))


@pytest.mark.parametrize("weight", ["head.weight", "stem.bias"])
def test_a_changed_teacher(weight, quiet_trainer, tmp_path):
    first = folder_of(fit(quiet_trainer, cache=tmp_path))
    network = Net(1, 6)
    network.get_parameter(weight).data[0] += 1e-3
    assert folder_of(fit(quiet_trainer, teacher=Teacher(network, cache=tmp_path))) != first


def test_each_part_is_compared_at_its_own_scale():
    """Logits of another teacher are found, although the features are far larger."""
    maps = torch.rand(4, 2, 3, 3) * 1e4
    one, other = (OutputRows(np.zeros(4), np.zeros(4), logits, {"block": maps}) for logits in torch.randn(2, 4, 3))
    distances = Distances()
    distances.add(one, one)
    assert distances.within(0) and not distances.changes(0.01)
    distances.add(one, other)
    assert not distances.within(0.02) and distances.changes(0.2)


def test_zeros_do_not_hide_changes():
    one = torch.zeros(100).index_fill(0, torch.arange(10), 1.0)  # after a ReLU
    distances = Distances()
    distances.add(*(OutputRows(np.zeros(1), np.zeros(1), None, {"": part[None]}) for part in (one, one * 1.001)))
    assert distances.within(0.02)
    assert distances.changes(0.2)


def test_features_too_large_for_float16(quiet_trainer, tmp_path):
    def loud():
        network = Net(1, 6)
        network.stem.weight.data *= 1e6
        network.scale = 1e-6
        return network

    with pytest.warns(UserWarning, match="an output is too large for float16, so the outputs are stored in float32"):
        cached = fit(quiet_trainer, ("stems",), teacher=Teacher(loud(), cache=tmp_path))
    assert_same(cached.student, fit(quiet_trainer, ("stems",), teacher=Teacher(loud())).student)


def test_the_size_is_stated_and_must_fit(quiet_trainer, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    size = 2 * TRAINING * (HASH_BYTES + 2 * (12 * 9 + CLASSES))
    fit(quiet_trainer, ("maps",), cache=tmp_path / "a")
    assert f"cache: computing all of {size / 1024:.1f} KiB of teacher outputs, {2 * TRAINING} rows" in caplog.text
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 0, size - 1))
    teacher = Teacher(Net(1, 6), cache=tmp_path / "b")
    with pytest.raises(InputError, match=r"^cache: .* KiB of outputs do not fit into .*; .*pool"):
        fit(quiet_trainer, ("maps",), teacher=teacher)
    assert sum(teacher.network.sizes) < 2 * TRAINING  # nothing but a sample was computed


def test_top_logits_beside_features(quiet_trainer, tmp_path):
    live = fit(quiet_trainer)
    cached = fit(quiet_trainer, cache=tmp_path, cache_dtype="float32", cache_top_k=CLASSES - 1)  # the rest is one class
    for one, other in zip(live.student.parameters(), cached.student.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_the_pool_of_a_refresh_has_no_features(quiet_trainer, tmp_path):
    refresh = PseudoLabelRefresh(selection=FixedThreshold(0.1), source="teacher")
    module = fit(quiet_trainer, ("maps",), callbacks=[refresh], cache=tmp_path)
    sizes = {views: (folder / "outputs").stat().st_size for views, folder in module.teacher.cache_folders.items()}
    assert sizes["pool_views"] == TRAINING * (HASH_BYTES + 2 * CLASSES)
    assert sizes["train_views"] > sizes["pool_views"]


# Features alone.


class Backbone(nn.Module):
    """Returns tokens and their mean, as backbones of Hugging Face do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.embed = nn.Conv2d(1, 6, 2, stride=2)
        self.norm = nn.LayerNorm(6)
        self.sizes = []

    def forward(self, x):
        self.sizes.append(len(x))
        tokens = self.norm(self.embed(x).flatten(2).transpose(1, 2))
        return {"last_hidden_state": tokens, "pooler_output": tokens.mean(1)}


class Features(LightningModule):
    """Compares a teacher's stored features with live ones."""

    def __init__(self, teacher, layers):
        super().__init__()
        self.student = nn.Linear(1, 1)
        self.teacher = teacher
        teacher.layers = layers
        teacher.needs_logits = False
        self.compared = 0

    def on_fit_start(self):
        fill_caches(self.teacher, self.trainer)

    def training_step(self, batch, _):
        before = len(self.teacher.network.sizes)
        found = self.teacher.features(batch)
        assert len(self.teacher.network.sizes) == before
        assert self.teacher.stored(batch) is None  # there are no logits
        for name, live in self.teacher.compute_features(batch).items():
            assert found[name].shape == live.shape
            assert found[name].dtype == live.dtype
            torch.testing.assert_close(found[name], live, rtol=2e-3, atol=1e-4)
        self.compared += len(batch)
        self.batch = batch
        return self.student(batch.x.new_ones(1))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


LAYERS = {"": None, "norm": Pool("first", "last"), "embed": None}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_features_alone(dtype, quiet_trainer, tmp_path):
    module = Features(Teacher(Backbone(), cache=tmp_path, cache_dtype=dtype), LAYERS)
    quiet_trainer().fit(module, datamodule=pictures())
    assert module.compared == TRAINING
    size = {"float16": 2, "float32": 4}[dtype]
    rows = 2 * TRAINING
    assert (folder_of(module) / "outputs").stat().st_size == rows * (HASH_BYTES + size * (6 + 6 + 6 * 9))


def test_what_a_batch_holds(quiet_trainer, tmp_path):
    teacher = Teacher(Backbone(), cache=tmp_path)
    module = Features(teacher, LAYERS)
    quiet_trainer().fit(module, datamodule=pictures())
    batch = module.batch
    assert len(batch) == TRAINING % BATCH
    whole = teacher.features(batch)
    rows = torch.tensor([3, 0])
    pieces = [*batch.split([1, len(batch) - 1])]
    for name, feature in whole.items():
        assert torch.equal(teacher.features(batch.select(rows))[name], feature[rows])
        assert torch.equal(torch.cat([teacher.features(piece)[name] for piece in pieces]), feature)
    copied = pickle.loads(pickle.dumps(batch.teacher))
    found = copied.features("teacher", LAYERS)
    assert all(torch.equal(found[name], feature) for name, feature in whole.items())
    with pytest.raises(KeyError, match="teacher"):
        batch.teacher["teacher"]
    assert batch.to("meta").teacher.features("teacher", {"": None})[""].shape == (len(batch), 6)
    count = len(teacher.network.sizes)
    teacher.layers = {"": None}
    assert torch.equal(teacher.features(batch)[""], whole[""])  # some of the stored ones
    assert len(teacher.network.sizes) == count
    for others in ({"norm": MEAN}, {"norm": None}, {"embed": None, "norm": None}):  # what is not stored
        teacher.layers = others
        assert teacher.features(batch).keys() == others.keys()
    assert len(teacher.network.sizes) == count + 3
    teacher.layers = {"": None}
    batch.x += 1  # the stored ones are of other pictures
    with pytest.warns(UserWarning, match="the inputs of a batch are not those"):
        assert not torch.equal(teacher.features(batch)[""], whole[""])


def test_top_logits_of_a_module_without_logits(quiet_trainer, tmp_path):
    module = Features(Teacher(Backbone(), cache=tmp_path, cache_top_k=2), LAYERS)
    with pytest.raises(InputError, match="^cache_top_k needs a module that uses the teacher's logits, got 2$"):
        quiet_trainer().fit(module, datamodule=pictures())


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"emb": None}, "layer 'emb': Backbone has none of that name"),
        ({"embed": FIRST}, "pool: first needs tokens"),
        ({"norm": None, "embed.0": None}, "layer 'embed.0': Backbone has none of that name"),
    ],
)
def test_layers_that_a_teacher_does_not_have(layers, message, quiet_trainer, tmp_path):
    module = Features(Teacher(Backbone(), cache=tmp_path), layers)
    with pytest.raises(InputError, match=message):
        quiet_trainer().fit(module, datamodule=pictures())
    assert not [*tmp_path.iterdir()]


class Random(Backbone):
    def forward(self, x):
        return super().forward(x)["pooler_output"] + 0.1 * torch.randn(6)


def test_random_features_are_refused(quiet_trainer, tmp_path):
    module = Features(Teacher(Random(), cache=tmp_path), {"": None})
    with pytest.raises(InputError, match="outputs for the same batch differ in each pass"):
        quiet_trainer().fit(module, datamodule=pictures())
    assert not [*tmp_path.iterdir()]


# Tokens.


class Reader(nn.Module):
    """Returns logits of each token."""

    def __init__(self, seed, width=4):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(50, width)
        self.head = nn.Linear(width, CLASSES)
        self.sizes = []

    def forward(self, input_ids, attention_mask):
        self.sizes.append(len(input_ids))
        return self.head(self.embed(input_ids).tanh())


class Table:
    """The views of all texts, one each."""

    def __init__(self, batch_of):
        self.outputs = ViewOutputs(np.arange(SAMPLES), 1)
        self.read = lambda batches, seed=0: (batch_of([*map(int, rows)]) for rows in batches)
        self.parts = lambda: {"samples": "texts"}
        self.finish = lambda batch: batch

    def __len__(self):
        return SAMPLES


class Texts(LightningDataModule):
    """Texts of 3 to 7 tokens. They are padded to the longest of a batch, or to ``length``."""

    def __init__(self, length=None):
        super().__init__()
        self.length = length
        self.batch_size = BATCH
        self.table = Table(self.batch_of)

    def batch_of(self, indices):
        texts = [torch.arange(i, i + 3 + i % 5) % 49 + 1 for i in indices]
        size = self.length or max(map(len, texts))
        ids = torch.stack([nn.functional.pad(text, (0, size - len(text))) for text in texts])
        index = torch.tensor(indices)
        mask = (ids > 0).long()
        labels = torch.where(mask > 0, ids % CLASSES, -100)
        x = {"input_ids": ids, "attention_mask": mask}
        return Batch(x, labels, index=index, view=torch.zeros_like(index))

    def train_views(self):
        return self.table

    def train_dataloader(self):
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(1)).tolist()
        return DataLoader(order, BATCH, collate_fn=FillingCollate(self.batch_of, self.table.outputs))


def read(trainer, length=None, pool=None, **cache):
    seed_everything(3, verbose=False)
    term = FeatureTerm({"embed": "embed"}, MSEFeatureLoss(), pool=pool)
    module = DistillModule(Reader(0), Teacher(Reader(1), **cache), features={"embed": term}, class_dim=-1)
    trainer(max_epochs=2).fit(module, datamodule=Texts(length))
    return module


@pytest.mark.parametrize("options", [{"pool": "mean"}, {"pool": "first"}, {"length": 9}])
def test_logits_of_tokens_beside_features(options, quiet_trainer, tmp_path):
    live = read(quiet_trainer, **options)
    for _ in range(2):
        cached = read(quiet_trainer, **options, cache=tmp_path, cache_dtype="float32")
        assert_same(live, cached)
    assert computed(cached) < SAMPLES


def test_features_of_tokens_in_their_own_lengths_are_refused(quiet_trainer, tmp_path):
    with pytest.raises(InputError, match=r"at layer embed must have one shape for all samples|stored for sequences of"):
        read(quiet_trainer, cache=tmp_path)


def test_a_batch_of_another_length_is_refused(quiet_trainer, tmp_path):
    module = read(quiet_trainer, length=9, cache=tmp_path)
    data = module.trainer.datamodule
    data.length = 8
    with pytest.raises(InputError, match="^cache: features of embed are stored for sequences of 9 tokens"):
        data.table.outputs.fill(data.batch_of([0, 1]))


@pytest.mark.slow
def test_two_processes_fill_one_table(table_of_two_processes):
    parts = json.loads((table_of_two_processes(__file__) / "cache.json").read_text())["parts"]
    assert "block" in json.loads(parts["layers"])
