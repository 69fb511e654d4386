import pickle
import random
import textwrap
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.models import resnet18
from torchvision.transforms import v2

from kd_lightning import (
    ApprenticeModule,
    CompileNetworks,
    DatasetSource,
    Digits,
    DistillModule,
    EnsembleDistillModule,
    FixedThreshold,
    HintModule,
    ImageFolder,
    InputError,
    PseudoLabelRefresh,
    SemiSupervisedDataModule,
    Teacher,
    models,
)
from kd_lightning.batch import Batch
from kd_lightning.cache.codecs import DenseCodec, TopKCodec
from kd_lightning.losses import DISTLoss, DKDLoss, KDLoss
from kd_lightning.models import DigitsCNN


class Counting(nn.Module):
    """Counts the batches that its network computes."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.sizes = []

    def forward(self, x):
        self.sizes.append(len(x))
        return self.network(x)


def network(seed=1, width=8):
    torch.manual_seed(seed)
    return DigitsCNN(width)


def digits(size=150, **kwargs):
    images = Digits().load().train
    source = DatasetSource(TensorDataset(images.images.tensors[0][:size], images.targets[:size]))
    source.train_transform = Digits().train_transform
    return SemiSupervisedDataModule(source, **{"labeled": 3, "num_views": 2, "batch_size": 32, "val_size": 2} | kwargs)


def fit(trainer, module, data=None, **kwargs):
    seed_everything(3, verbose=False)
    module.student.load_state_dict(network(0, 4).state_dict())
    trainer(max_epochs=3, **kwargs).fit(module, datamodule=data or digits())
    return {name: value.clone() for name, value in module.student.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.fixture
def live(quiet_trainer):
    return fit(quiet_trainer, DistillModule(network(0, 4), network()))


def folders(root):
    return {path.name for path in Path(root).iterdir()}


# The same as without.

METHODS = {
    "distill": lambda **c: DistillModule(network(0, 4), Teacher(network(), **c)),
    "hint": lambda **c: HintModule(network(0, 4), Teacher(network(), **c), {"5": "5"}, 1),
    "joint hint": lambda **c: HintModule(network(0, 4), Teacher(network(), **c), {"5": "5"}, 0, hint_weight=0.1),
    "apprentice": lambda **c: ApprenticeModule(network(0, 4), Teacher(network(), **c), "fixed_teacher"),
    "average": lambda **c: EnsembleDistillModule(network(0, 4), [Teacher(network(s), **c) for s in (1, 2)]),
    "use_vmap": lambda **c: EnsembleDistillModule(
        network(0, 4), [Teacher(network(s), **c) for s in (1, 2)], use_vmap=True
    ),
    "random by sample": lambda **c: EnsembleDistillModule(
        network(0, 4), [Teacher(network(s), **c) for s in (1, 2)], "random", draw_per="sample"
    ),
    "classes": lambda **c: EnsembleDistillModule(
        network(0, 4), [Teacher(network(1), classes=[*range(9, -1, -1)], **c), Teacher(network(2), **c)]
    ),
    "preprocess": lambda **c: DistillModule(network(0, 4), Teacher(network(), preprocess=nn.ZeroPad2d(1), **c)),
}


@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
def test_equal_to_the_live_run_bit_for_bit(make, quiet_trainer, tmp_path):
    expected = fit(quiet_trainer, make())
    for _ in range(2):  # the second finds it filled
        assert_same(fit(quiet_trainer, make(cache=tmp_path / "cache", cache_dtype="float32")), expected)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_views": 1, "train_transform": nn.Identity()},
        {"labeled_batch_size": 8, "num_views": 3},
        {"views_per_epoch": 2},
        {"unlabeled": "none", "labeled": 7},
        {"num_workers": 1},
    ],
)
def test_equal_for_every_way_of_the_data(kwargs, quiet_trainer, tmp_path):
    expected = fit(quiet_trainer, DistillModule(network(0, 4), network()), digits(**kwargs))
    module = METHODS["distill"](cache=tmp_path / "cache", cache_dtype="float32")
    assert_same(fit(quiet_trainer, module, digits(**kwargs)), expected)


SHIPPED = {
    "resnet32": (models.resnet8, models.resnet32),
    "wrn_40_2": (models.wrn_16_2, models.wrn_40_2),
    "vgg13": (models.vgg8, models.vgg13),
    "fitnet": (models.resnet8, lambda classes: models.FitNet(num_classes=classes)),
    "resnet18": (models.resnet8, lambda classes: resnet18(num_classes=classes)),
}


@pytest.mark.parametrize(
    ("make_student", "make_teacher"),
    [
        pytest.param(*networks, id=name, marks=[] if name == "resnet32" else pytest.mark.slow)
        for name, networks in SHIPPED.items()
    ],
)
def test_equal_for_the_shipped_networks(make_student, make_teacher, quiet_trainer, tmp_path):
    def run(**cache):
        images = torch.randn(48, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        source = DatasetSource(TensorDataset(images, torch.arange(48) % 5))
        data = SemiSupervisedDataModule(
            source, num_views=2, val_size=0, batch_size=16, train_transform=v2.RandomCrop(32, padding=4)
        )
        seed_everything(3, verbose=False)
        module = DistillModule(make_student(5), Teacher(make_teacher(5), **cache))
        quiet_trainer(max_epochs=2).fit(module, datamodule=data)
        return module.student.state_dict()

    expected = run()
    for _ in range(2):
        assert_same(run(cache=tmp_path, cache_dtype="float32"), expected)


@pytest.mark.parametrize("kwargs", [{"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}])
def test_equal_for_trainers(kwargs, quiet_trainer, tmp_path):
    expected = fit(quiet_trainer, DistillModule(network(0, 4), network()), **kwargs)
    module = METHODS["distill"](cache=tmp_path / "cache", cache_dtype="float32")
    assert_same(fit(quiet_trainer, module, **kwargs), expected)


@pytest.mark.parametrize("options", [{}, {"use_vmap": True}, {"strategy": "random", "draw_per": "sample"}])
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "float16"])
def test_only_some_teachers_have_a_cache(options, dtype, quiet_trainer, tmp_path):
    def make(**cache):
        teachers = [Teacher(network(1)), Teacher(network(2), **cache), Teacher(network(3))]
        return EnsembleDistillModule(network(0, 4), teachers, **options)

    expected = fit(quiet_trainer, make())
    for _ in range(2):
        found = fit(quiet_trainer, make(cache=tmp_path / "cache", cache_dtype=dtype))
        if dtype == "float32":
            assert_same(found, expected)


def test_float16_is_near(quiet_trainer, tmp_path, live):
    cached = fit(quiet_trainer, METHODS["distill"](cache=tmp_path / "cache"))
    assert not all(torch.equal(live[name], cached[name]) for name in live)
    for name in live:
        torch.testing.assert_close(cached[name], live[name], rtol=0.02, atol=5e-3)


def test_resumed_in_mid_epoch(quiet_trainer, tmp_path, live):
    saves = ModelCheckpoint(tmp_path, "mid", every_n_train_steps=7)
    cache = {"cache": tmp_path / "cache", "cache_dtype": "float32"}
    fit(quiet_trainer, METHODS["distill"](**cache), callbacks=[saves], enable_checkpointing=True)
    module = METHODS["distill"](**cache)
    quiet_trainer(max_epochs=3).fit(module, datamodule=digits(), ckpt_path=tmp_path / "mid.ckpt", weights_only=True)
    assert_same(module.student.state_dict(), live)


def test_the_teacher_of_a_refresh(quiet_trainer, tmp_path):
    def refreshed(**cache):
        counting = Counting(network())
        module = DistillModule(network(0, 4), Teacher(counting, **cache))
        callback = PseudoLabelRefresh(selection=FixedThreshold(0.1), source="teacher")
        return fit(quiet_trainer, module, callbacks=[callback]), counting.sizes

    expected, sizes = refreshed()
    assert len(sizes) > 20
    first, _ = refreshed(cache=tmp_path / "cache", cache_dtype="float32")
    assert_same(first, expected)
    assert len(folders(tmp_path / "cache")) == 2  # training views, and the pool under evaluation transforms
    again, sizes = refreshed(cache=tmp_path / "cache", cache_dtype="float32")
    assert_same(again, expected)
    assert sizes == [32, 32, 32, 32, 20]  # one batch of each table, twice, to compare, and the validation images


# Computed once.


def test_a_filled_cache_is_compared_in_a_batch(quiet_trainer, tmp_path):
    sizes = []
    for _ in range(2):
        counting = Counting(network())
        fit(quiet_trainer, DistillModule(network(0, 4), Teacher(counting, cache=tmp_path / "cache")))
        sizes.append(counting.sizes)
    assert sizes[0] == [32] * (2 + 9) + [20]  # 130 samples in 2 views, the last batch filled up; validation
    assert sizes[1] == [32, 32, 20]


def test_random_generators_stay_unchanged(quiet_trainer, tmp_path):
    class Draw(DistillModule):
        def on_train_start(self):
            self.sampled = torch.rand(3).tolist(), random.random(), np.random.rand()

    sampled = []
    for cache in (None, tmp_path, tmp_path):
        module = Draw(network(0, 4), Teacher(Drawing(0.0), cache=cache))
        fit(quiet_trainer, module)
        sampled.append(module.sampled)
    assert sampled[0] == sampled[1] == sampled[2]


# Never stale.


def other_images():
    data = digits()
    data.source.train.tensors[0][:] += 0.01
    return data


def biased():
    changed = network()
    with torch.no_grad():
        changed[-1].bias[3] += 0.01
    return changed


def activated():
    changed = network()
    changed[2] = nn.LeakyReLU(0.01)  # without weights
    return changed


CHANGES = {
    "teacher": lambda: (biased, digits, {}),
    "architecture": lambda: (activated, digits, {}),
    "samples": lambda: (network, lambda: digits(labeled=3, unlabeled="none"), {}),
    "seed": lambda: (network, lambda: digits(seed=1), {}),
    "num_views": lambda: (network, lambda: digits(num_views=3), {}),
    "precision": lambda: (network, digits, {"precision": "bf16-mixed"}),
    "batch hooks": lambda: (network, Normalised.digits, {}),
    "compilation": lambda: (network, digits, {"callbacks": [CompileNetworks(channels_last=True, backend=None)]}),
}


class Normalised(SemiSupervisedDataModule):
    """Changes the images little, where no transform shows it."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        batch.x = batch.x * 1.003
        return batch

    @classmethod
    def digits(cls):
        data = digits()
        data.__class__ = cls
        return data


@pytest.mark.parametrize("what", CHANGES)
def test_every_change_makes_a_new_one_and_is_named(what, quiet_trainer, tmp_path, caplog):
    def run(make_network, make_data, kwargs):
        module = DistillModule(network(0, 4), Teacher(make_network(), cache=tmp_path / "cache"))
        trainer = quiet_trainer(max_steps=1, limit_val_batches=0, **kwargs)
        with caplog.at_level("INFO"):
            trainer.fit(module, datamodule=make_data())

    run(network, digits, {})
    run(network, digits, {})
    assert len(folders(tmp_path / "cache")) == 1
    caplog.clear()
    run(*CHANGES[what]())
    assert len(folders(tmp_path / "cache")) == 2
    message = next(record.message for record in caplog.records if "most similar cache differs" in record.message)
    named = {"seed": "samples, seed", "num_views": "views"}.get(what, what)  # with the seed, the split differs, too
    assert message.endswith(f"in: {named})")


@pytest.mark.parametrize("change", [{"make": other_images}, {"train_transform": v2.RandomAffine(9)}])
def test_other_images_make_a_new_one(change, quiet_trainer, tmp_path, caplog):
    make = change.pop("make", lambda: digits(**change))
    computed = []
    for data in (digits, make, digits, make):  # a later fit finds both
        module = DistillModule(network(0, 4), Teacher(network(), cache=tmp_path / "cache"))
        caplog.clear()
        with caplog.at_level("INFO"):
            quiet_trainer(max_steps=1, limit_val_batches=0).fit(module, datamodule=data())
        computed.append([record.message for record in caplog.records if "cache: computing" in record.message])
    assert [len(messages) for messages in computed] == [1, 1, 0, 0]
    assert "32 of 32 compared images are not those in" in computed[1][0]
    assert len(folders(tmp_path / "cache")) == 2


class Scaled(nn.Module):
    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


def through_data(teacher):
    teacher.network[-1].bias.data += 1e-5  # however little: the comparison of a batch does not see it


def in_numpy(teacher):
    teacher.network[-1].bias.detach().numpy()[0] += 1e-5


def another_layer(teacher):
    teacher.network[2] = nn.LeakyReLU(1e-5)


def another_preprocess(teacher):
    teacher._hidden[0].factor = 1 + 1e-6


def rounded(teacher):
    teacher.to(torch.bfloat16)
    teacher.to(torch.float32)


@pytest.mark.parametrize("change", [through_data, in_numpy, another_layer, another_preprocess, rounded])
def test_a_teacher_that_changes_between_two_fits(change, quiet_trainer, tmp_path):
    module = DistillModule(network(0, 4), Teacher(network(), preprocess=Scaled(), cache=tmp_path / "cache"))
    for expected in (1, 1, 2):
        if expected == 2:
            change(module.teacher)
        quiet_trainer(max_epochs=1).fit(module, datamodule=digits())
        assert len(folders(tmp_path / "cache")) == expected


class Drawing(nn.Module):
    """A teacher with random outputs."""

    def __init__(self, factor):
        super().__init__()
        self.network, self.factor = network(), factor

    def forward(self, x):
        return self.network(x) + self.factor * torch.rand(1)


def test_a_random_teacher_is_refused(quiet_trainer, tmp_path):
    with pytest.raises(InputError, match="the teacher's outputs for the same batch differ"):
        fit(quiet_trainer, DistillModule(network(0, 4), Teacher(Drawing(1.0), cache=tmp_path)))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_that_augments_itself_is_refused(workers, quiet_trainer, tmp_path):
    class Own(Dataset):
        targets = [number % 2 for number in range(80)]

        def __len__(self):
            return 80

        def __getitem__(self, number):
            return torch.ones(1, 8, 8) + 0.001 * torch.rand(1), number % 2

    data = SemiSupervisedDataModule(DatasetSource(Own()), num_views=1, val_size=0, num_workers=workers)
    with pytest.raises(InputError, match="the dataset itself augments its images"):
        fit(quiet_trainer, METHODS["distill"](cache=tmp_path), data)


def test_a_hook_with_pythons_generator_is_replayed(quiet_trainer, tmp_path):
    def make():
        flip = v2.RandomHorizontalFlip()
        flip.register_forward_pre_hook(lambda module, inputs: (inputs[0] * random.random(),))
        return digits(train_transform=flip)

    expected = fit(quiet_trainer, DistillModule(network(0, 4), network()), make())
    module = METHODS["distill"](cache=tmp_path / "cache", cache_dtype="float32")
    assert_same(fit(quiet_trainer, module, make()), expected)


def test_a_torchscript_teacher(quiet_trainer, tmp_path):
    for name, of in {"plain": network(), "trained": biased(), "activated": activated()}.items():
        torch.jit.trace(of.eval(), torch.zeros(2, 1, 8, 8)).save(tmp_path / f"{name}.pt")
    for name, expected in ("plain", 1), ("plain", 1), ("trained", 2), ("activated", 3):
        teacher = Teacher(torch.jit.load(tmp_path / f"{name}.pt"), cache=tmp_path / "cache")
        fit(quiet_trainer, DistillModule(network(0, 4), teacher))
        assert len(folders(tmp_path / "cache")) == expected


def test_a_whole_cache_where_nobody_can_write(quiet_trainer, tmp_path, monkeypatch, live):
    def run():
        return fit(quiet_trainer, METHODS["distill"](cache=tmp_path / "cache", cache_dtype="float32"))

    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    run()
    for name in ("filelock.FileLock.acquire", "pathlib.Path.mkdir", "os.fsync"):
        monkeypatch.setattr(name, refuse)
    assert_same(run(), live)


def test_an_unreadable_image_is_named_in_one_line(quiet_trainer, tmp_path):
    """Though a worker reads it, whose traceback torch hands on."""
    for number in range(8):
        path = tmp_path / "images" / str(number % 2) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(path)
    path.write_bytes(b"no image")
    to_tensor = v2.Compose([v2.Grayscale(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    data = SemiSupervisedDataModule(
        ImageFolder(str(tmp_path / "images")), num_views=1, val_size=0, num_workers=1, train_transform=to_tensor
    )
    with pytest.raises(InputError, match="^image .*7.png cannot be read: .*$") as caught:
        fit(quiet_trainer, DistillModule(network(0, 4), Teacher(network(), cache=tmp_path / "cache")), data)
    assert "\n" not in str(caught.value)


def test_a_teacher_can_be_pickled_after_a_fit(quiet_trainer, tmp_path):
    module = METHODS["distill"](cache=tmp_path)
    fit(quiet_trainer, module)
    batch = Batch(torch.randn(4, 1, 8, 8))
    assert torch.equal(pickle.loads(pickle.dumps(module.teacher))(batch), module.teacher(batch))


def test_a_transform_with_a_generator_of_its_own_is_refused(quiet_trainer, tmp_path):
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.from_numpy(np.random.default_rng().random(x.shape)).float()

    module = METHODS["distill"](cache=tmp_path / "cache")
    with pytest.raises(InputError, match="transform has a random generator of its own"):
        fit(quiet_trainer, module, digits(train_transform=Noisy()))


def test_damage_is_found_and_cured(quiet_trainer, tmp_path, live):
    def run():
        return fit(quiet_trainer, METHODS["distill"](cache=tmp_path / "cache", cache_dtype="float32"))

    run()
    (folder,) = (tmp_path / "cache").iterdir()
    whole = (folder / "outputs").read_bytes()
    for damage in (bytes([whole[100] ^ 1]), b""):
        (folder / "outputs").write_bytes(whole[:100] + damage + (whole[101:] if damage else b""))
        with pytest.warns(UserWarning, match="1 of 1 parts of .* are damaged, and computed again"):
            assert_same(run(), live)
        assert (folder / "outputs").read_bytes() == whole


# What cannot be.


def test_endless_views(quiet_trainer, tmp_path):
    with pytest.raises(InputError, match="set the datamodule's num_views"):
        fit(quiet_trainer, METHODS["distill"](cache=tmp_path), digits(num_views=None))


def test_plain_loaders(quiet_trainer, tmp_path, loader):
    with pytest.raises(InputError, match=r"cache needs .* a datamodule with train_views\(\)"):
        quiet_trainer().fit(METHODS["distill"](cache=tmp_path), loader())


def test_a_folder_that_cannot_be(quiet_trainer, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cache: .*file.* cannot be used"):
        fit(quiet_trainer, METHODS["distill"](cache=tmp_path / "file"))


def test_a_full_disk(quiet_trainer, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("usage", (), {"free": 10}))
    with pytest.raises(InputError, match="9.1 KiB of outputs do not fit into .*, where 10 bytes"):
        fit(quiet_trainer, METHODS["distill"](cache=tmp_path / "cache"))


@pytest.mark.parametrize("loss", [DISTLoss(), KDLoss(standardize=True), nn.MSELoss()])
def test_losses_that_need_every_logit(loss):
    few = Teacher(network(), cache="cache", cache_top_k=3)
    with pytest.raises(InputError, match="soft_loss: .* cache_top_k"):
        DistillModule(network(), few, soft_loss=loss)
    with pytest.raises(InputError, match="soft_loss: .* cache_top_k"):
        EnsembleDistillModule(network(), [network(), few], soft_loss=loss)
    DistillModule(network(), few, soft_loss=DKDLoss())


@pytest.mark.parametrize("kwargs", [{"cache_dtype": "bfloat16"}, {"cache_top_k": 0}, {"cache": ""}])
def test_values_out_of_range(kwargs):
    with pytest.raises(InputError, match=next(iter(kwargs))):
        Teacher(network(), **{"cache": "cache"} | kwargs)


@pytest.mark.parametrize("k", [10, 11])
def test_more_logits_than_classes(k, quiet_trainer, tmp_path):
    with pytest.raises(InputError, match=f"below the number of classes, 10, got {k}"):
        fit(quiet_trainer, METHODS["distill"](cache=tmp_path, cache_top_k=k))


# Formats.


class Loud(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.network, self.factor = network(), factor

    def forward(self, x):
        return self.network(x) * self.factor


def test_logits_too_large_for_float16(quiet_trainer, tmp_path):
    loud = DistillModule(network(0, 4), Teacher(Loud(1e6), cache=tmp_path / "cache"), soft_weight=0.1)
    with pytest.warns(UserWarning, match="too large for float16, so the outputs are stored in float32"):
        cached = fit(quiet_trainer, loud)
    assert_same(cached, fit(quiet_trainer, DistillModule(network(0, 4), Loud(1e6), soft_weight=0.1)))
    assert len(folders(tmp_path / "cache")) == 2
    assert len(loud.teacher.cache_folders) == 1


def test_all_logits():
    logits = torch.tensor([[1.0, -2.5, 60000.0], [0.1, -torch.inf, torch.nan]])
    exact, half = DenseCodec(3, "float32"), DenseCodec(3, "float16")
    for codec, expected in (exact, logits), (half, logits.half().float()):
        found = codec.decode(torch.from_numpy(codec.encode(logits)))
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert (exact.row_bytes, half.row_bytes) == (12, 6)
    assert half.encode(logits * 1.1) is None


@pytest.mark.parametrize("k", [1, 4, 9])
def test_top_logits_against_probabilities_written_out(k):
    logits = 3 * torch.randn(50, 10, generator=torch.Generator().manual_seed(0))
    codec = TopKCodec(10, "float32", k)
    cached = codec.decode(torch.from_numpy(codec.encode(logits))).double().softmax(1)
    p = logits.double().softmax(1)
    for mine, row in zip(cached, p, strict=True):
        order = row.argsort(descending=True)
        torch.testing.assert_close(mine[order[:k]], row[order[:k]], rtol=1e-5, atol=1e-7)
        rest = row[order[k:]].sum() / (10 - k)
        torch.testing.assert_close(mine[order[k:]], rest.expand(10 - k), rtol=1e-4, atol=1e-7)


def test_top_logits_where_the_rest_is_impossible():
    codec = TopKCodec(4, "float16", 2)
    logits = torch.tensor([[-torch.inf, 2.0, -torch.inf, 1.0]])
    assert torch.equal(codec.decode(torch.from_numpy(codec.encode(logits))), logits)


def test_top_logits_in_a_run(quiet_trainer, tmp_path, live):
    module = METHODS["distill"](cache=tmp_path / "cache", cache_top_k=8, cache_dtype="float32")
    cached = fit(quiet_trainer, module)
    for name in live:
        torch.testing.assert_close(cached[name], live[name], rtol=0.05, atol=0.02)


def test_shape_of_binary_logits_stays(quiet_trainer, tmp_path):
    class One(nn.Module):
        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.network = DigitsCNN(4, num_classes=1)

        def forward(self, x):
            return self.network(x).flatten()

    def run(**cache):
        images = Digits().load().train
        source = DatasetSource(TensorDataset(images.images.tensors[0][:60], images.targets[:60] % 2))
        data = SemiSupervisedDataModule(source, num_views=1, val_size=0)
        module = DistillModule(One(0), Teacher(One(1), **cache), task="binary")
        quiet_trainer(max_epochs=2).fit(module, datamodule=data)
        return module.student.state_dict()

    assert_same(run(cache=tmp_path, cache_dtype="float32"), run())


# Several processes.

SCRIPT = """
    import os, random, shutil, signal, sys, time
    import torch
    sys.path[:0] = [{tests!r}, {package!r}]
    from lightning.pytorch import Trainer
    import test_cache_fill as t
    from kd_lightning import *

    def fit(**kwargs):
        teacher = Teacher(t.Slow(t.network()), cache="cache", cache_dtype="float32")
        trainer = Trainer(
            max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, accelerator="cpu", **kwargs
        )
        t.seed_everything(3, verbose=False)
        module = DistillModule(t.network(0, 4), teacher)
        trainer.fit(module, datamodule=t.digits(num_views=40))
        return module.student.state_dict()
"""


class Slow(Counting):
    """A teacher that takes its time, so that there is some in which to be killed."""

    def forward(self, x):
        import time

        time.sleep(0.003)
        return super().forward(x)


def write_script(folder, body):
    names = {"tests": str(Path(__file__).parent), "package": str(Path(__file__).parents[2])}
    (folder / "script.py").write_text(textwrap.dedent(SCRIPT).format(**names) + textwrap.dedent(body))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, processes):
    root = tmp_path_factory.mktemp("undisturbed")
    write_script(root, "torch.save(fit(), 'student.pt')")
    with chdir(root):
        processes.run_ranks(["script.py"], world=1)
    (folder,) = (root / "cache").iterdir()
    return folder.name, (folder / "outputs").read_bytes(), torch.load(root / "student.pt")


def assert_undisturbed(root, undisturbed):
    name, outputs, _ = undisturbed
    (folder,) = (root / "cache").iterdir()
    assert folder.name == name
    assert (folder / "outputs").read_bytes() == outputs


@pytest.mark.slow
def test_killed_at_ten_moments(tmp_path, monkeypatch, undisturbed, processes):
    """Each run is killed while it fills; the last one ends with the cache of an undisturbed one."""
    monkeypatch.chdir(tmp_path)
    write_script(
        tmp_path,
        """
        def start():
            child = os.fork()
            if not child:
                fit()
                os._exit(0)
            return child

        begin = time.perf_counter()
        os.waitpid(start(), 0)
        seconds = time.perf_counter() - begin  # of a whole fit, which depends on the machine
        shutil.rmtree("cache")
        moments = random.Random(1)
        for number in range(10):
            child = start()
            time.sleep(moments.uniform(0.05, 0.4) * seconds)
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            print("killed", os.WIFSIGNALED(status), flush=True)
        torch.save(fit(), "student.pt")
        """,
    )
    processes.run_ranks(["script.py"], world=1)
    assert Path("output_0.txt").read_text().count("killed True") >= 5
    assert_undisturbed(tmp_path, undisturbed)
    assert_same(torch.load(tmp_path / "student.pt"), undisturbed[2])


@pytest.mark.slow
@pytest.mark.dist
def test_two_runs_fill_at_once(tmp_path, monkeypatch, undisturbed, processes):
    monkeypatch.chdir(tmp_path)
    write_script(tmp_path, "torch.save(fit(), f'{os.getpid()}.pt')")
    codes, outputs = processes.run(*[(["script.py"], {})] * 2)
    assert codes == [0, 0], outputs
    assert_undisturbed(tmp_path, undisturbed)
    students = [torch.load(path) for path in tmp_path.glob("*.pt")]
    assert len(students) == 2, outputs
    for student in students:
        assert_same(student, undisturbed[2])


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_fill_together(tmp_path, monkeypatch, undisturbed, processes):
    """Each has computed its share, and none has computed all."""
    monkeypatch.chdir(tmp_path)
    write_script(
        tmp_path,
        """
        if __name__ == "__main__":
            import gc
            fit(strategy="ddp", devices=2)
            computed = [len(s.sizes) for s in gc.get_objects() if isinstance(s, t.Slow)]
            open(f"computed_{os.environ['LOCAL_RANK']}", "w").write(str(sum(computed)))
        """,
    )
    processes.run_ranks(["script.py"])
    assert_undisturbed(tmp_path, undisturbed)
    counts = [int((tmp_path / f"computed_{rank}").read_text()) for rank in (0, 1)]
    batches = -(-130 * 40 // 32)
    assert all(count < 0.7 * batches for count in counts), counts
    assert sum(counts) >= batches


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_find_that_images_have_changed(tmp_path, monkeypatch, processes):
    """Though only one of them reads an image that has changed."""
    monkeypatch.chdir(tmp_path)
    write_script(tmp_path, "fit()")
    processes.run_ranks(["script.py"], world=1)
    write_script(
        tmp_path,
        """
        if __name__ == "__main__":
            original, rank = t.digits, int(os.environ["LOCAL_RANK"])

            def digits(**kwargs):
                data = original(**kwargs)
                data.source.train.tensors[0][:4] += 0.5
                return data

            t.digits = digits
            t.np.random.default_rng = lambda *seed: t.np.random.Generator(t.np.random.PCG64(seed[0] if seed else rank))
            torch.save(fit(strategy="ddp", devices=2), f"student_{rank}.pt")
        """,
    )
    processes.run_ranks(["script.py"])
    assert len(folders(tmp_path / "cache")) == 2
    assert_same(torch.load(tmp_path / "student_0.pt"), torch.load(tmp_path / "student_1.pt"))


@pytest.mark.slow
@pytest.mark.dist
def test_one_process_without_room_ends_both(tmp_path, monkeypatch, processes):
    monkeypatch.chdir(tmp_path)
    Path("cache").touch()
    write_script(
        tmp_path,
        """
        if __name__ == "__main__":
            try:
                fit(strategy="ddp", devices=2)
            except InputError as error:
                print("refused", error)
        """,
    )
    processes.run_ranks(["script.py"])
    for rank in range(2):
        assert "refused cache: " in Path(f"output_{rank}.txt").read_text()


def test_a_loader_gives_no_outputs_without_a_cache():
    data = digits()
    data.setup("fit")
    assert next(iter(data.train_dataloader())).teacher is None
    assert isinstance(data.train_dataloader(), DataLoader)
