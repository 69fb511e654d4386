import functools
import logging
import subprocess
import sys
import textwrap
import types
from collections import deque
from enum import Enum
from typing import NamedTuple

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from kd_lightning import InputError
from kd_lightning.cache.content import fingerprint
from kd_lightning.models import DigitsCNN


class Plain:
    def __init__(self, value):
        self.value = value


class Slots:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


class OneSlot:
    __slots__ = "gain"

    def __init__(self, gain):
        self.gain = gain


class PrivateSlot:
    __slots__ = ("__gain",)

    def __init__(self, gain):
        self.__gain = gain


class Longer(list):
    def __init__(self, gain):
        super().__init__([1])
        self.gain = gain


class Point(NamedTuple):
    gain: int


class Colour(Enum):
    RED = 1
    BLUE = 2


def scale(x, by=2):
    return x * by


def closure(by):
    return lambda x: x * by


def made(body):
    """A class from a prompt, whose source nobody can read."""
    space = {"__name__": "prompt"}
    exec(f"class Made:\n    def __call__(self, x):\n        return {body}", space)
    return space["Made"]()


def in_module(text):
    """What ``made`` is in a module of this text."""
    module = types.ModuleType("prompt")
    exec(textwrap.dedent(text), vars(module))
    return module.made


HELPER = """
    def helper(x):
        return x * {factor}

    class Made:
        def __call__(self, x):
            return helper(x)

    made = Made()
"""
VALUE = """
    FACTOR = {factor}
    made = lambda images: [x * FACTOR for x in images]
"""
ATTRIBUTE = """
    class Made:
        factor = {factor}
        scale = staticmethod(lambda x: x)

    made = Made()
"""
INHERITED = """
    class Base:
        def apply(self, x):
            return x * {factor}

    class Made(Base):
        pass

    made = Made()
"""


OBJECT = """
    import argparse, functools
    from torch import nn
    from torchvision.transforms import v2

    ARGS = argparse.Namespace(gain={factor})
    AUGMENT = v2.RandomAffine(0, scale=(0.9, {factor}))
    PART = functools.partial(pow, {factor})

    def made(x):
        return {name}
"""
HELD = """
    import functools
    from torch import nn

    class Gain(nn.Module):
        def __init__(self, gain):
            super().__init__()
            self.gain = gain

    class Made:
        layer = Gain({factor})
        scale = functools.partialmethod(pow, {factor})

    made = Made()
"""


def through_a_module(factor):
    other = types.ModuleType("ops")
    exec(f"GAIN = {factor}\ndef act(x):\n    return x * GAIN", vars(other))
    module = types.ModuleType("prompt")
    module.ops = other
    exec("def made(x):\n    return ops.act(x)", vars(module))
    return module.made


def hooked(gain):
    network = nn.Linear(1, 1)
    torch.nn.init.zeros_(network.weight), torch.nn.init.zeros_(network.bias)
    network.register_forward_hook(lambda module, x, y: y * gain)
    return network


def with_attribute(gain):
    def function(x):
        return x * function.gain

    function.gain = gain
    return function


def enumerated(value):
    return Enum("Made", {"ONE": value}).ONE


def patched(name):
    made = in_module(INHERITED.format(factor=2))
    setattr(type(made), name, lambda self, x: x)
    return made


DIFFERENT = {
    "a helper's code": (in_module(HELPER.format(factor=2)), in_module(HELPER.format(factor=3))),
    "a value of the module": (in_module(VALUE.format(factor=0.1)), in_module(VALUE.format(factor=0.11))),
    "an attribute of the class": (in_module(ATTRIBUTE.format(factor=1)), in_module(ATTRIBUTE.format(factor=2))),
    "an inherited method": (in_module(INHERITED.format(factor=1)), in_module(INHERITED.format(factor=2))),
    "a method put into the class": (in_module(INHERITED.format(factor=2)), patched("apply")),
    "a module's function": (through_a_module(2), through_a_module(3)),
    "arguments of the program": [in_module(OBJECT.format(factor=f, name="x * ARGS.gain")) for f in (1.1, 1.2)],
    "a transform of the module": [in_module(OBJECT.format(factor=f, name="AUGMENT(x)")) for f in (1.1, 1.2)],
    "a partial of the module": [in_module(OBJECT.format(factor=f, name="PART(x)")) for f in (1.1, 1.2)],
    "a class's layer": [in_module(HELD.format(factor=f)) for f in (1, 2)],
    "a slot named by a text": (OneSlot(1), OneSlot(2)),
    "a private slot": (PrivateSlot(1), PrivateSlot(2)),
    "an attribute of a list": (Longer(1), Longer(2)),
    "a named tuple": (Point(1), (1,)),
    "an enum's value": (enumerated(1), enumerated(2)),
    "a deque": (deque([Plain(1)]), deque([Plain(2)])),
    "a hook": (hooked(1), hooked(2)),
    "a function's attribute": (with_attribute(1), with_attribute(2)),
    "an array of objects": (np.array([Plain(1), None]), np.array([Plain(2), None])),
    "pixels": (Image.new("L", (2, 2), 1), Image.new("L", (2, 2), 2)),
    "numbers": (1, 2),
    "number and text": (1, "1"),
    "int and float": (1, 1.0),
    "order": ([1, 2], [2, 1]),
    "nesting": ([[1], 2], [1, [2]]),
    "values of a mapping": ({"a": 1}, {"a": 2}),
    "attribute": (Plain(1), Plain(2)),
    "slot": (Slots(1), Slots(2)),
    "class": (Plain(1), Slots(1)),
    "enum": (Colour.RED, Colour.BLUE),
    "function": (scale, closure(2)),
    "closure": (closure(2), closure(3)),
    "lambda": (lambda x: x + 1, lambda x: x + 2),
    "lambda's names": (lambda x: x.sin(), lambda x: x.cos()),
    "partial": (functools.partial(scale, by=2), functools.partial(scale, by=3)),
    "method": (Plain(1).__init__, Plain(2).__init__),
    "code without source": (made("x + 1"), made("x + 2")),
    "array": (np.zeros(3), np.ones(3)),
    "dtype": (np.zeros(2, np.float32), np.zeros(2, np.int32)),
    "tensor": (torch.zeros(3), torch.tensor([0, 0, 1.0])),
    "shape": (torch.zeros(2, 3), torch.zeros(3, 2)),
    "bfloat16": (torch.zeros(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16)),
    "transform's degrees": (v2.RandomAffine(10), v2.RandomAffine(11)),
    "interpolation": (v2.RandomAffine(9), v2.RandomAffine(9, interpolation=v2.InterpolationMode.BILINEAR)),
    "order of transforms": (
        v2.Compose([v2.RandomCrop(3), v2.RandomHorizontalFlip()]),
        v2.Compose([v2.RandomHorizontalFlip(), v2.RandomCrop(3)]),
    ),
    "lambda in a transform": (v2.Lambda(lambda x: x + 1), v2.Lambda(lambda x: x - 1)),
    "activation": (nn.Sequential(nn.ReLU()), nn.Sequential(nn.GELU())),
    "stride": (nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3, stride=2)),
    "buffer": (nn.BatchNorm1d(2), nn.BatchNorm1d(2, eps=0.1)),
}


@pytest.mark.parametrize("pair", DIFFERENT.values(), ids=DIFFERENT)
def test_differences(pair):
    first, second = map(fingerprint, pair)
    assert first != second
    assert first == fingerprint(pair[0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: Plain([1, {"a": Plain(2)}]),
        lambda: v2.Compose([v2.RandomAffine(5), v2.Normalize([0.5], [0.2])]),
        lambda: {"set": {"b", "a", "c"}, "frozen": frozenset("xyz")},
        lambda: closure(3),
    ],
)
def test_equal_things(make):
    assert fingerprint(make()) == fingerprint(make())


def test_mode_and_numbers_of_hooks_do_not_count():
    network = DigitsCNN(4)
    before = fingerprint(network)
    handle = network.register_forward_hook(scale)
    hooked = fingerprint(network)
    handle.remove()
    network.eval()
    network(torch.zeros(2, 1, 8, 8))
    assert fingerprint(network) == before != hooked
    network.register_forward_hook(scale)  # has another number
    assert fingerprint(network) == hooked
    network._forward_hooks.clear()
    network.train()
    network(torch.zeros(2, 1, 8, 8))  # moves BatchNorm's statistics
    assert fingerprint(network) != before


def test_what_is_nested_too_deeply():
    chain = None
    for _ in range(2000):
        chain = Plain(chain)
    with pytest.raises(InputError, match="Plain is nested too deeply"):
        fingerprint(chain)


def test_services_do_not_count():
    """What a logger holds changes with all that is imported."""
    log = logging.getLogger("a")
    before = fingerprint(Plain(log))
    log.addHandler(logging.NullHandler())
    assert fingerprint(Plain(log)) == before


def test_a_trainer_of_before_does_not_count(quiet_trainer):
    class Own(LightningModule):
        def __init__(self):
            super().__init__()
            self.network = nn.Linear(2, 2)

    module = Own()
    before = fingerprint(module)
    module.trainer = quiet_trainer()
    assert fingerprint(module) == before


def test_what_is_built_of_the_same_text_is_the_same():
    for text in (HELPER, VALUE, ATTRIBUTE, INHERITED):
        assert fingerprint(in_module(text.format(factor=2))) == fingerprint(in_module(text.format(factor=2)))


def test_circles_end():
    one, other = Plain(None), Plain(None)
    one.value, other.value = other, one
    fingerprint(one)
    alone = Plain(None)
    alone.value = alone
    assert fingerprint(alone) != fingerprint(one)


@pytest.mark.slow
def test_all_processes_agree():
    """The order of a set differs in each process."""
    code = (
        "from kd_lightning.cache.content import fingerprint as f; from torchvision.transforms import v2;"
        "g = lambda x: x in {'a', 'b', 'c', 'd'};"
        "print(f([{'p', 'q', 'r', 's'}, v2.RandomAffine(4), v2.Lambda(g)]))"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(2)]
    assert runs[0].stdout == runs[1].stdout != ""


def test_modules_and_builtins():
    assert fingerprint(len) != fingerprint(max)
    assert fingerprint(types) != fingerprint(functools)


def test_one_changed_weight():
    torch.manual_seed(0)
    network = DigitsCNN(8)
    before = fingerprint(network)
    with torch.no_grad():
        next(network.parameters()).view(-1)[0] += 1e-3
    assert fingerprint(network) != before
