"""A stored output is used only for the images, the inputs and the teacher that it was computed from."""

import os
import random
import types
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.plugins import Precision
from PIL import Image
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from kd_lightning import DatasetSource, Digits, DistillModule, InputError, SemiSupervisedDataModule, Teacher
from kd_lightning.cache import tensors
from kd_lightning.models import DigitsCNN
from kd_lightning.teachers.cache_fill import fill_caches

COUNT, SIDE, BATCH = 14, 4, 5

# Datasets and transforms as a user's file would define them.

CODE = """
import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

GAIN = {gain}
SHIFT = {shift}


class Files(Dataset):
    def __init__(self, root, held):
        self.root, self.held = root, held
        self.targets = [number % 2 for number in range({count})]

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, number):
        return np.asarray(Image.open(self.path(number)), np.float32) * SHIFT, self.targets[number]

    def path(self, number):
        return {path}


def transform(x):
    x = torch.from_numpy(np.array(x))[None] / 255 * GAIN * {constant}
    return x + 0.1 * torch.rand(1)
"""


class Holder:
    def __init__(self, paths):
        self.paths = paths


WAYS = {
    "list": (lambda paths: paths, "self.held[number]"),
    "tuple": (tuple, "self.held[number]"),
    "array": (np.array, "str(self.held[number])"),
    "table": (lambda paths: pd.DataFrame({"path": paths, "other": range(len(paths))}), "self.held.path.iloc[number]"),
    "holder": (Holder, "self.held.paths[number]"),
    "format": (lambda paths: range(len(paths)), 'self.root / f"{number}.png"'),
    "stems": (lambda paths: [Path(path).stem for path in paths], 'self.root / (self.held[number] + ".png")'),
}


class Net(nn.Module):
    """A teacher with state of every kind."""

    def __init__(self, gain, buffer, extra):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(SIDE * SIDE, 3)
        self.gain, self.extra = gain, SimpleNamespace(get=lambda extra=extra: extra)
        self.register_buffer("shift", torch.tensor(buffer), persistent=False)
        self.computed = 0

    def get_extra_state(self):
        return {"extra": self.extra.get()}

    def set_extra_state(self, state):
        pass

    def forward(self, x):
        self.computed += 1
        return self.layer(x.flatten(1)) * self.gain + self.shift + self.extra.get()


def write(root, number, value):
    Image.fromarray(np.full((SIDE, SIDE), value, np.uint8)).save(root / f"{number}.png")


class Setting:
    """Everything that one fit is made of."""

    def __init__(self, root, cache, way):
        self.root, self.cache, self.way = root, cache, way
        self.code = {"gain": 1.0, "shift": 1.0, "constant": 2.0}
        self.net = {"gain": 1.0, "buffer": 0.5, "extra": 0.25}
        for number in range(COUNT):
            write(root, number, 10 * number)

    def fit(self):
        """Return how many rows were stale, and how many were not computed, in two epochs after the start of a fit."""
        hold, path = WAYS[self.way]
        module = types.ModuleType("users_file")
        exec(CODE.format(path=path, count=COUNT, **self.code), vars(module))
        dataset = module.Files(self.root, hold([str(self.root / f"{number}.png") for number in range(COUNT)]))
        data = SemiSupervisedDataModule(
            DatasetSource(dataset), num_views=2, batch_size=BATCH, val_size=0, train_transform=module.transform
        )
        data.setup("fit")
        teacher = Teacher(Net(**self.net), cache=self.cache, cache_dtype="float32")
        fill_caches(teacher, trainer(data))
        stale = found = 0
        for epoch in range(2):
            loader = data.train_dataloader()
            loader.sampler.set_epoch(epoch)
            for batch in loader:
                found += len(batch) * (teacher.stored(batch) is not None)
                near = torch.isclose(
                    teacher(batch), teacher.compute(batch), rtol=0, atol=1e-5
                )  # rounded, since sizes of batches differ
                stale += int((~near).any(dim=1).sum())
        return stale, found


def trainer(data):
    """What a fill uses of a trainer, without the seconds that a fit takes."""
    strategy = SimpleNamespace(
        root_device=torch.device("cpu"), batch_to_device=lambda batch: batch, barrier=lambda name: None
    )
    return SimpleNamespace(
        lightning_module=LightningModule(),
        datamodule=data,
        precision="32-true",
        precision_plugin=Precision(),
        strategy=strategy,
        is_global_zero=True,
        world_size=1,
        num_devices=1,
        local_rank=0,
        global_rank=0,
        progress_bar_callback=None,
    )


def replace_file(way):
    def change(setting, rng):
        setting.way = way
        setting.fit()
        number = rng.randrange(COUNT)
        before = (setting.root / f"{number}.png").stat()
        write(setting.root, number, 10 * number + rng.choice([1, 100]))
        if rng.random() < 0.5:  # neither size nor time shows it
            os.utime(setting.root / f"{number}.png", ns=(before.st_atime_ns, before.st_mtime_ns))

    return change


def change_code(name):
    def change(setting, rng):
        setting.code[name] += rng.choice([0.001, 1.0, -0.5])

    return change


def change_net(name):
    def change(setting, rng):
        setting.net[name] += rng.choice([0.001, 1.0, -0.5])

    return change


KINDS = {f"file, {way}": replace_file(way) for way in WAYS}
KINDS |= {"constant of the transform": change_code("constant"), "constant of its module": change_code("gain")}
KINDS |= {"code of the dataset": change_code("shift"), "attribute of the teacher": change_net("gain")}
KINDS |= {"buffer that is not saved": change_net("buffer"), "extra state": change_net("extra")}


SOME = range(len(KINDS))  # each kind once
PARTS = [pytest.param(SOME, id="some"), pytest.param(range(SOME.stop, 104), id="the others", marks=pytest.mark.slow)]


@pytest.mark.filterwarnings("ignore:cache. . of . images of a batch")
@pytest.mark.parametrize("numbers", PARTS)
def test_a_hundred_changes(tmp_path, numbers):
    rng, names = random.Random(numbers.start), [*KINDS]
    found_after = 0
    for number in numbers:
        root = tmp_path / str(number)
        root.mkdir()
        setting = Setting(root, tmp_path / f"cache {number}", rng.choice([*WAYS]))
        total = 2 * COUNT
        assert setting.fit() == (0, total)
        if number < len(names):
            assert setting.fit() == (0, total), "an unchanged fit finds all"
        name = names[number % len(names)]
        KINDS[name](setting, rng)
        for _ in range(2):
            stale, found = setting.fit()
            assert stale == 0, name
            found_after += found
    assert found_after > len(numbers) * COUNT  # the cache is of use after a change, too


# Whole fits.


def network(seed=1, width=8):
    torch.manual_seed(seed)
    return DigitsCNN(width)


def digits(images=None, **kwargs):
    part = Digits().load().train
    source = DatasetSource(TensorDataset(part.images.tensors[0][:60], part.targets[:60]) if images is None else images)
    source.train_transform = Digits().train_transform
    return SemiSupervisedDataModule(source, **{"num_views": 2, "batch_size": 16, "val_size": 0} | kwargs)


def students(quiet_trainer, cache, make_data=digits, make_callbacks=lambda: [], make=DistillModule, **kwargs):
    """The trained students of a run without a cache, of the run that fills it, and of one that finds it filled."""
    trained = []
    for folder in (None, cache, cache):
        seed_everything(3, verbose=False)
        module = make(network(0, 4), Teacher(network(), cache=folder, cache_dtype="float32"))
        module.student.load_state_dict(network(0, 4).state_dict())
        quiet_trainer(max_epochs=3, callbacks=make_callbacks(), **kwargs).fit(module, datamodule=make_data())
        trained.append(module.student.state_dict())
    return trained


def assert_same(states):
    first, *others = states
    for other in others:
        for name, tensor in first.items():
            assert torch.equal(tensor, other[name]), name


class Pictures(Dataset):
    """Its paths stand in a table, which no fingerprint reads."""

    def __init__(self, root):
        self.table = pd.DataFrame({"path": [str(root / f"{number}.png") for number in range(40)]})
        self.targets = [number % 10 for number in range(40)]

    def __len__(self):
        return 40

    def __getitem__(self, number):
        with Image.open(self.table.path.iloc[number]) as image:
            return torch.from_numpy(np.array(image))[None] / 255, self.targets[number]


def picture(root, number, seed):
    pixels = np.random.default_rng([number, seed]).integers(0, 255, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(root / f"{number}.png")


@pytest.mark.filterwarnings("ignore:cache. . of .. images of a batch")
def test_a_file_replaced_between_two_fits(quiet_trainer, tmp_path):
    for number in range(40):
        picture(tmp_path, number, 0)

    def make():
        return digits(Pictures(tmp_path), train_transform=nn.Identity())

    assert_same(students(quiet_trainer, tmp_path / "cache", make))
    for number in (7, 8):
        picture(tmp_path, number, 1)
        assert_same(students(quiet_trainer, tmp_path / "cache", make))


def test_files_replaced_while_a_fit_runs(quiet_trainer, tmp_path):
    class Replace(Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 1:
                picture(tmp_path, 7, 1)

    def make():
        picture(tmp_path, 7, 0)
        return digits(Pictures(tmp_path), train_transform=nn.Identity())

    for number in range(40):
        picture(tmp_path, number, 0)
    with pytest.warns(UserWarning, match="cache: 1 of 16 images of a batch are not those whose outputs are stored"):
        assert_same(students(quiet_trainer, tmp_path / "cache", make, lambda: [Replace()]))


class Scaled(nn.Module):
    def __init__(self, factor=1.0):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


@pytest.mark.parametrize("workers", [0, 1])
def test_a_transform_that_changes_while_a_fit_runs(workers, quiet_trainer, tmp_path):
    class Stronger(Callback):
        def on_train_epoch_end(self, trainer, module):
            trainer.datamodule.train_transform.factor += 0.1

    def run():
        return students(
            quiet_trainer,
            tmp_path / "cache",
            lambda: digits(train_transform=Scaled(), num_workers=workers),
            lambda: [Stronger()],
            reload_dataloaders_every_n_epochs=1,
        )

    with pytest.warns(UserWarning, match="cache: 16 of 16 images of a batch"):
        assert_same(run())


class BeforeTransfer(DistillModule):
    """Changes the inputs on the way to the teacher, where no transform shows it."""

    gain = 1.5

    def on_before_batch_transfer(self, batch, dataloader_idx):
        batch.x = batch.x * self.gain
        return batch


def test_a_hook_before_the_transfer(quiet_trainer, tmp_path, monkeypatch, recwarn):
    assert_same(students(quiet_trainer, tmp_path, make=BeforeTransfer))
    monkeypatch.setattr(BeforeTransfer, "gain", 1.5001)  # no fingerprint of the hook shows it
    assert_same(students(quiet_trainer, tmp_path, make=BeforeTransfer))
    assert not [warning for warning in recwarn if "cache:" in str(warning.message)]


class Growing(DistillModule):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        batch.x = batch.x * (1 + self.current_epoch)
        return batch


class InPlace(DistillModule):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        batch.x.mul_(1 + self.current_epoch)
        return batch


class Mixing(DistillModule):
    def losses(self, batch):
        return super().losses(replace(batch, x=(batch.x + batch.x.flip(0)) / 2))


@pytest.mark.parametrize("make", [Growing, InPlace, Mixing])
def test_inputs_that_change_after_the_loader(make, quiet_trainer, tmp_path):
    with pytest.warns(UserWarning, match="cache: the inputs of a batch are not those"):
        assert_same(students(quiet_trainer, tmp_path, make=make))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("make", "hashed"), [(DistillModule, 1), (BeforeTransfer, 8)])
def test_only_inputs_that_a_hook_replaces_are_hashed_in_each_step(
    make, hashed, workers, quiet_trainer, tmp_path, monkeypatch
):
    """8 steps: an unchanged tensor of the loader is known; one of them is checked all the same."""
    module, calls = make(network(0, 4), Teacher(network(), cache=tmp_path)), []
    monkeypatch.setattr(
        "kd_lightning.teachers.stored_lookup.hash_rows", lambda x: calls.append(len(x)) or tensors.hash_rows(x)
    )
    quiet_trainer(max_epochs=2).fit(module, datamodule=digits(num_workers=workers))
    assert len(calls) == hashed


class OfOthers(DistillModule):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        batch.x = batch.x - batch.x.mean(dim=0)
        return batch


def test_inputs_that_depend_on_the_batch_are_refused(quiet_trainer, tmp_path):
    with pytest.raises(InputError, match="depends on the other images of a batch"):
        students(quiet_trainer, tmp_path, make=OfOthers)


def test_outputs_of_another_teacher_of_the_same_name(tmp_path):
    """Both are called ``teacher``, each in a fit of its own."""
    data, teachers = [digits(), digits()], []
    for one, seed in zip(data, (1, 2), strict=True):
        one.setup("fit")
        teachers.append(Teacher(network(seed), cache=tmp_path, cache_dtype="float32"))
        fill_caches(teachers[-1], trainer(one))
    batch = next(iter(data[0].train_dataloader()))
    assert [teacher.stored(batch) is not None for teacher in teachers] == [True, False]
    torch.testing.assert_close(teachers[1](batch), teachers[1].compute(batch))
    teachers[0].cache = None
    fill_caches(teachers[0], trainer(data[1]))
    assert teachers[0].stored(batch) is None


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_precision_plugins_leave_outputs_as_they_are(precision, quiet_trainer, tmp_path):
    class Wide(nn.Module):
        """Its outputs do not fit into 16 bits."""

        def __init__(self):
            super().__init__()
            self.network = network()

        def forward(self, x):
            return self.network(x).float() * 1.2345678

    class Squares(nn.Module):
        def forward(self, student, teacher, y):
            assert teacher.dtype == torch.float32
            return (student.float() - teacher).square().mean()

    class Wider(DistillModule):
        def __init__(self, student, teacher):
            teacher = Teacher(Wide(), cache=teacher.cache, cache_dtype="float32")
            super().__init__(student, teacher, soft_loss=Squares())

    assert_same(students(quiet_trainer, tmp_path, make=Wider, precision=precision))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_serves_what_is_stored(workers, quiet_trainer, tmp_path):
    class Count(DistillModule):
        def on_train_epoch_start(self):
            self.used = []

        def on_train_batch_start(self, batch, batch_idx):
            self.used.append(batch.teacher is not None and set(batch.teacher.outputs) == {"teacher"})

    module = Count(network(0, 4), Teacher(network(), cache=tmp_path))
    data = digits(num_workers=workers)
    quiet_trainer(max_epochs=1).fit(module, datamodule=data)
    assert module.used == [True] * 4
