"""Functions and torchvision's v1 transforms as a teacher's preprocessing."""

import functools
import subprocess
import sys

import pytest
import torch
from torch import nn
from torchvision import transforms as v1
from torchvision.transforms import v2

from kd_lightning import DistillModule, Teacher

X = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(2 * 4 * 4, 3))


def shrink(x, size=6):
    return v2.functional.resize(x, [size, size])


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
def test_another_process_finds_the_same(tmp_path):
    prints = []
    for factor in (2, 2, 3):
        path = tmp_path / f"{len(prints)}.py"
        path.write_text(_SCRIPT.format(factor=factor))
        end = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=True)
        prints.append(end.stdout.split()[-1])
    assert prints[0] == prints[1] != prints[2]
