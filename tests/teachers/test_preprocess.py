"""Functions and torchvision's v1 transforms as a teacher's preprocessing."""

import functools
import random

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as v1
from torchvision.transforms import v2

from kd_lightning import (
    Batch,
    DatasetSource,
    DistillModule,
    EnsembleDistillModule,
    InputError,
    SemiSupervisedDataModule,
    Teacher,
)

X = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(2 * 4 * 4, 3))


def shrink(x, size=6):
    return v2.functional.resize(x, [size, size])


class Scale:
    """A callable object."""

    def __init__(self, factor: float = 2.0):
        self.factor = factor

    def __call__(self, x):
        return x * self.factor

    def apply(self, x):
        return x + self.factor


@pytest.mark.parametrize(
    "preprocess",
    [
        v1.Compose([v1.Resize(6), v1.Normalize([0.5] * 3, [0.25] * 3)]),
        v1.Compose([v1.Resize((6, 6)), v1.Lambda(lambda x: x / 2)]),
        v2.Compose([v2.Resize(6), v2.Normalize([0.5] * 3, [0.25] * 3)]),
        lambda x: x[..., 1:7, 1:7],
        shrink,
        functools.partial(shrink, size=6),
    ],
    ids=["v1 Compose", "v1 Lambda", "v2 Compose", "lambda", "function", "partial"],
)
def test_preprocess(preprocess):
    teacher = Teacher(network(), preprocess=preprocess)
    assert torch.equal(teacher(X), network()(preprocess(X)))
    module = DistillModule(nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), teacher, soft_weight=1.0)
    module.training_step((X, torch.tensor([0, 1, 2, 0])), 0).backward()


def test_fingerprints_identify_functions():
    factor = 2
    functions = [
        lambda x: x / 2,
        lambda x: x / 3,
        lambda x: x / factor,
        shrink,
        functools.partial(shrink, size=6),
        functools.partial(shrink, size=5),
        v1.Compose([v1.Resize(6)]),
        v1.Compose([v1.Resize(5)]),
        v1.Compose([v1.Lambda(lambda x: x / 2)]),
        v1.Compose([v1.Lambda(lambda x: x / 3)]),
        v2.Lambda(lambda x: x / 2),
        v2.Lambda(lambda x: x / 3),
        v2.Compose([v2.Lambda(lambda x: x / 2)]),
        v2.Compose([lambda x: x / 3]),
        Scale(2),
        Scale(3),
        Scale(2).apply,
    ]
    found = [Teacher(network(), preprocess=function).fingerprint() for function in functions]
    assert len({*found}) == len(found)
    again = [Teacher(network(), preprocess=function).fingerprint() for function in functions]
    assert found == again
    architectures = {Teacher(network(), preprocess=function).architecture() for function in functions}
    assert len(architectures) == len(found)  # what caches compare


_SCRIPT = """
import torch
from torch import nn
from kd_lightning import Teacher

torch.manual_seed(0)
print(Teacher(nn.Linear(2, 2), preprocess=lambda x: x * {factor}).fingerprint())
"""


@pytest.mark.slow
def test_another_process_finds_the_same(tmp_path, monkeypatch, processes):
    monkeypatch.chdir(tmp_path)
    for number, factor in enumerate((2, 2, 3)):
        (tmp_path / f"{number}.py").write_text(_SCRIPT.format(factor=factor))
    codes, outputs = processes.run(*(([f"{number}.py"], {}) for number in range(3)))
    assert codes == [0, 0, 0], outputs
    first, second, other = (output.split()[-1] for output in outputs)
    assert first == second != other


def student():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 3))


@pytest.mark.parametrize("wrap", [lambda f: f, v1.Lambda, v2.Lambda, lambda f: v2.Compose([f])])
def test_to_resume_with_another_lambda_is_refused(wrap, quiet_trainer, tmp_path):
    loader = DataLoader([(one, number % 3) for number, one in enumerate(X)], 2)
    functions = {
        "first": lambda x: x[..., 1:7, 1:7],
        "same": lambda x: x[..., 1:7, 1:7],
        "other": lambda x: x[..., 2:8, 1:7],
    }

    def module(name):
        return DistillModule(student(), Teacher(network(), preprocess=wrap(functions[name])))

    saver = ModelCheckpoint(tmp_path)
    quiet_trainer(enable_checkpointing=True, callbacks=[saver]).fit(module("first"), loader)
    resumed = module("same")
    quiet_trainer(max_epochs=2).fit(resumed, loader, ckpt_path=saver.best_model_path)
    assert resumed.global_step == 4
    with pytest.raises(InputError, match="trained with another teacher"):
        quiet_trainer(max_epochs=2).fit(module("other"), loader, ckpt_path=saver.best_model_path)


def test_values_that_a_function_finds_later_count():
    """A fingerprint is taken at the start of a fit, not when the teacher is made."""
    prints = []
    for value in (2, 2, 3):
        factors = []
        teacher = Teacher(network(), preprocess=lambda x, factors=factors: x * factors[0])
        factors.append(value)
        prints.append(teacher.fingerprint())
    assert prints[0] == prints[1] != prints[2]


def test_what_a_pass_changes_does_not_count():
    class Counting(Scale):
        def __call__(self, x):
            self.calls = getattr(self, "calls", 0) + 1
            return shrink(x)

    teacher = Teacher(network(), preprocess=Counting())
    first = teacher.fingerprint()
    for _ in range(2):
        teacher(X)
        assert teacher.fingerprint(anew=True) == first


def test_inputs_by_name():
    """A function gets them as the network does."""
    teacher = Teacher(network(), preprocess=lambda image, scale: shrink(image) * scale)
    x = {"image": X, "scale": torch.full((4, 1, 1, 1), 0.5)}
    for _ in range(2):
        assert torch.equal(teacher(Batch(x)), network()(shrink(X) / 2))


@pytest.mark.parametrize(
    ("preprocess", "expected"),
    [
        (f"{__name__}.shrink", shrink(X)),
        ({"class_path": f"{__name__}.Scale", "init_args": {"factor": 0.5}}, X / 2),
        ({"class_path": "torchvision.transforms.v2.Resize", "init_args": {"size": [6, 6]}}, v2.Resize([6, 6])(X)),
    ],
    ids=["function", "callable", "transform"],
)
def test_in_yaml(preprocess, expected):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--teacher", type=nn.Module)
    init_args = {"network": {"class_path": "torch.nn.Flatten"}, "preprocess": preprocess}
    config = parser.parse_object({"teacher": {"class_path": "kd_lightning.Teacher", "init_args": init_args}})
    config = parser.parse_string(parser.dump(config))
    assert torch.equal(parser.instantiate_classes(config).teacher(X), expected.flatten(1))


class Pictures(Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        return X[index % 4], index % 3


@pytest.mark.parametrize("p", [0.02, 0.5])
@pytest.mark.parametrize("kind", ["distill", "ensemble"])
@pytest.mark.parametrize("version", [v1, v2])
def test_random_transforms_are_refused_with_a_cache(version, kind, p, quiet_trainer, tmp_path):
    """Also if they draw the same in the passes that are compared."""
    teacher = Teacher(network(), preprocess=version.RandomHorizontalFlip(p), cache=tmp_path)
    module = (
        DistillModule(student(), teacher)
        if kind == "distill"
        else EnsembleDistillModule(student(), [network(), teacher])
    )
    data = SemiSupervisedDataModule(DatasetSource(Pictures()), labeled=2, val_size=2, num_views=1, batch_size=6)
    with pytest.raises(InputError, match="cache: the teacher's preprocess draws random numbers"):
        quiet_trainer().fit(module, datamodule=data)


@pytest.mark.parametrize("source", ["numpy", "random"])
def test_each_global_generator_is_seen(source, quiet_trainer, tmp_path):
    def jitter(x):
        return x + (np.random.rand() if source == "numpy" else random.random()) * 1e-9

    teacher = Teacher(network(), preprocess=jitter, cache=tmp_path)
    data = SemiSupervisedDataModule(DatasetSource(Pictures()), labeled=2, val_size=2, num_views=1, batch_size=6)
    with pytest.raises(InputError, match="cache: the teacher's preprocess draws random numbers"):
        quiet_trainer().fit(DistillModule(student(), teacher), datamodule=data)
