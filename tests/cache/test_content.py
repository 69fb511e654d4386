import array
import builtins
import copy
import datetime
import functools
import importlib.util
import logging
import operator
import queue
import random
import re
import sys
import textwrap
import threading
import types
import uuid
import weakref
from collections import deque
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch import LightningModule
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from kd_lightning import InputError
from kd_lightning.cache.content import _is_known_module, fingerprint
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


# Objects without attributes.


def numbers(count):
    yield from range(count)


def advanced(steps):
    iterator = numbers(5)
    for _ in range(steps):
        next(iterator)
    return iterator


def generator(kind, seed, draws):
    made = kind(seed)
    for _ in range(draws):
        made.random()
    return made


class Short:
    """A table in C of another package: no attributes, an abbreviated text, and rules for pickle."""

    __slots__ = ("__weakref__",)
    values = {}

    def __init__(self, values):
        Short.values[id(self)] = values

    def __repr__(self):
        return "[0, ..., 9]"

    def __reduce__(self):
        return Short, (Short.values[id(self)],)


class Rounded(float):
    def __repr__(self):
        return "a number"


class Marked(str):
    def __init__(self, text, mark=0):
        self.mark = mark

    def __new__(cls, text, mark=0):
        return super().__new__(cls, text)


LONG = list(range(5000))
OTHER = [*LONG[:2500], -1, *LONG[2501:]]
OPAQUE = {
    "table": [pd.DataFrame({"a": values}) for values in (LONG, OTHER)],
    "series": [pd.Series(values) for values in (LONG, OTHER)],
    "index of a table": [pd.DataFrame({"a": [1, 2]}, index=index) for index in (["x", "y"], ["x", "z"])],
    "texts of a table": [pd.DataFrame({"a": ["x", text]}) for text in ("y", "z")],
    "categories": [pd.Series(["a", text], dtype="category") for text in ("b", "c")],
    "memoryview": [memoryview(bytes(text, "ascii")) for text in ("ab", "ac")],
    "pattern": [re.compile("a" * 300 + end) for end in "bc"],
    "flags of a pattern": [re.compile("a", flags) for flags in (0, re.IGNORECASE)],
    "generator": [numbers(3), numbers(4)],
    "place in a generator": [advanced(1), advanced(2)],
    "iterator": [iter([1, 2]), iter([1, 3])],
    "enumerate": [enumerate([1]), enumerate([1], 1)],
    "map": [map(abs, [1]), map(abs, [2])],
    "zip": [zip([1], strict=False), zip([2], strict=False)],
    "mappingproxy": [types.MappingProxyType({"a": value}) for value in (1, 2)],
    "values of a dict": [{"a": value}.values() for value in (1, 2)],
    "range": [range(3), range(4)],
    "slice": [slice(3), slice(4)],
    "array": [array.array("i", values) for values in (LONG, OTHER)],
    "type of an array": [array.array(kind, [1]) for kind in "ih"],
    "bytearray": [bytearray(b"a"), bytearray(b"b")],
    "decimal": [Decimal("1.10"), Decimal("1.1")],
    "fraction": [Fraction(1, 3), Fraction(2, 3)],
    "datetime": [datetime.datetime(2020, 1, day) for day in (1, 2)],
    "uuid": [uuid.UUID(int=number) for number in (1, 2)],
    "numpy's generator": [generator(np.random.default_rng, seed, 0) for seed in (1, 2)],
    "state of numpy's generator": [generator(np.random.default_rng, 1, draws) for draws in (0, 1)],
    "numpy's old generator": [generator(np.random.RandomState, seed, 0) for seed in (1, 2)],
    "Python's generator": [generator(random.Random, 1, draws) for draws in (0, 1)],
    "torch's generator": [torch.Generator().manual_seed(seed) for seed in (1, 2)],
    "numpy's scalar": [np.int64(1), np.int64(2)],
    "numpy's record": [np.array([(1, [value] * 2000)], "i4,(2000,)i4")[0] for value in (1, 2)],
    "array of texts": [np.array(["a", text], dtype=np.dtypes.StringDType()) for text in "bc"],
    "array of times": [np.array([time], "M8[s]") for time in (1, 2)],
    "masked array": [np.ma.masked_array([1, 2], mask) for mask in ([0, 1], [1, 0])],
    "rules for pickle": [Short(LONG), Short(OTHER)],
    "exception": [ValueError("a"), ValueError("b")],
    "method of a dict": [{"a": value}.get for value in (1, 2)],
    "operator": [operator.itemgetter(1), operator.itemgetter(2)],
    "number of a class of its own": [Rounded(1), Rounded(2)],
    "text with an attribute": [Marked("a", 1), Marked("a", 2)],
    "alias": [list[int], list[str]],
    "weakly known": [Plain(1), Plain(2)],
}


@pytest.mark.parametrize("pair", OPAQUE.values(), ids=OPAQUE)
def test_objects_without_attributes_count_by_their_state(pair):
    first, other = pair
    assert fingerprint(first) == fingerprint(first) != fingerprint(other)
    assert fingerprint(Plain(first)) != fingerprint(Plain(other))


@pytest.mark.parametrize("name", sorted(OPAQUE.keys() - {"generator", "place in a generator", "rules for pickle"}))
def test_equal_states_are_equal(name):
    first = OPAQUE[name][0]
    try:
        again = copy.deepcopy(first)
    except TypeError:  # cannot be copied
        return
    if "method" not in name:
        assert fingerprint(first) == fingerprint(again)


def test_use_of_a_table_does_not_change_it():
    table = pd.DataFrame({"a": range(50), "b": ["x"] * 50}, index=range(100, 150))
    before = fingerprint(table)
    assert (table.loc[120, "a"], table.index.is_unique, 120 in table.index, len(table.groupby("b"))) == (
        20,
        True,
        True,
        1,
    )
    assert fingerprint(table) == before


@pytest.mark.parametrize("make", [threading.Lock, object, lambda: weakref.ref(Plain), lambda: sys.stdout])
def test_objects_without_any_state_count_by_their_class(make):
    assert fingerprint(make()) == fingerprint(make()) != fingerprint(1)


def test_no_address_counts():
    """An object of the same state elsewhere in memory."""
    kept = [pd.Series([1]), re.compile("x")]
    first = fingerprint([Plain(threading.Lock()), memoryview(b"a"), *kept])
    junk = [bytearray(1000) for _ in range(100)]
    assert fingerprint([Plain(threading.Lock()), memoryview(bytearray(b"a")), *copy.deepcopy(kept)]) == first, len(junk)


def test_pickling_never_fails():
    class Stubborn:
        __slots__ = ()

        def __reduce__(self):
            raise RuntimeError("no")

    assert fingerprint(Stubborn()) == fingerprint(Stubborn())


# Which modules are known.


def module_of(tmp_path, monkeypatch, name, factor):
    """A user's module of this name, imported as they would import it."""
    folder = tmp_path / f"{name} {factor}"
    folder.mkdir()
    (folder / f"{name}.py").write_text(
        f"FACTOR = {factor}\nclass Made:\n    def __call__(self, x):\n        return x * FACTOR\n"
        f"def made(x):\n    return x * {factor}\n"
    )
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["queue", "code", "statistics", "token"])
@pytest.mark.parametrize("take", [lambda m: m.made, lambda m: m.Made(), lambda m: v2.Lambda(m.made)])
def test_a_users_module_named_like_one_of_the_standard_library(name, take, tmp_path, monkeypatch):
    prints = []
    for factor in (2, 3):
        prints.append(fingerprint(take(module_of(tmp_path, monkeypatch, name, factor))))
    assert prints[0] != prints[1]


def test_a_function_that_uses_such_a_module(tmp_path, monkeypatch):
    def using(module):
        space = {"queue": module, "__name__": "users"}
        exec("def act(x):\n    return queue.made(x)", space)
        return space["act"]

    first, other = (fingerprint(using(module_of(tmp_path, monkeypatch, "queue", factor))) for factor in (2, 3))
    assert first != other


def test_a_users_folder_named_like_one_of_the_standard_library(tmp_path, monkeypatch):
    """A namespace package has no file."""
    prints = []
    for factor in (2, 3):
        package = types.ModuleType("code")
        package.__path__ = [str(tmp_path)]
        inner = types.ModuleType("code.part")
        exec(f"def made(x):\n    return x * {factor}", vars(inner))
        monkeypatch.setitem(sys.modules, "code", package)
        prints.append(fingerprint(inner.made))
    assert prints[0] != prints[1]


def test_the_standard_library_counts_by_name():
    assert fingerprint(functools.reduce) == fingerprint(functools.reduce)
    for module in (queue, functools, importlib, builtins, sys):
        assert _is_known_module(module.__name__), module
    assert not _is_known_module("pytest")
    assert not _is_known_module("_pytest.fixtures")
    assert not _is_known_module("__main__")
    assert not _is_known_module("no_such_module")


# Without code.


def test_without_code():
    one, other = in_module(HELPER.format(factor=2)), in_module(HELPER.format(factor=3))
    assert fingerprint(one, code=False) == fingerprint(other, code=False)
    assert fingerprint(closure(2), code=False) != fingerprint(closure(3), code=False)
    assert fingerprint(Plain(1), code=False) != fingerprint(Plain(2), code=False)
    assert fingerprint(Plain(1), code=False) != fingerprint(OneSlot(1), code=False)
    here, there = (
        {"device": torch.device(d), "dtype": t, "path": p}
        for d, t, p in (("cpu", torch.float32, "/home/a/weights"), ("cuda", torch.bfloat16, "/data/weights"))
    )
    assert fingerprint(here, code=False) == fingerprint(there, code=False)
    assert fingerprint(here) != fingerprint(there)
    assert fingerprint(hooked(1), code=False) == fingerprint(hooked(2), code=False)
    states = [generator(np.random.default_rng, seed, 0) for seed in (1, 2)]
    assert fingerprint(states[0], code=False) == fingerprint(states[1], code=False)


@pytest.mark.slow
def test_all_processes_agree(tmp_path, monkeypatch, processes):
    """The order of a set differs in each process."""
    monkeypatch.chdir(tmp_path)
    Path("start.py").write_text("import users")
    Path("users.py").write_text(
        textwrap.dedent(
            """
        import array, datetime, re, types, uuid
        from decimal import Decimal
        import numpy as np
        import pandas as pd
        import torch
        from torchvision.transforms import v2
        from kd_lightning.cache.content import fingerprint

        first = lambda x: x in (1, 2, 3)
        other = lambda x: x in (1, 2, 3) or x == "text"

        class Slots:
            __slots__ = ("a", "__weakref__")

        def numbers():
            yield from (1, 2, 3)

        things = [
            pd.DataFrame({"a": ["x", "y"]}), pd.Series([1, 2]), memoryview(b"a"), re.compile("a"), numbers(), iter([1]),
            np.random.default_rng(1), types.MappingProxyType({"a": 1}), range(3), slice(3), array.array("i", [1]),
            Decimal(1), datetime.datetime(2020, 1, 1), uuid.UUID(int=1), {frozenset("abc"), frozenset("xyz")}, Slots,
            Slots(), object(), first, other, int | str, list[int], torch.Generator().manual_seed(1), print, Slots.a,
            {"a": 1}.values(), torch.channels_last, torch.strided, {"p", "q", "r", "s"}, v2.RandomAffine(4),
            v2.Lambda(lambda x: x in {"a", "b", "c", "d"}),
        ]
        print([fingerprint(thing) for thing in things], fingerprint(things))
        """
        )
    )
    first, (text,) = processes.run((["start.py"], {}))
    codes, (again, other) = processes.run((["start.py"], {}), (["start.py"], {}))  # these read compiled code
    assert first + codes == [0, 0, 0], (text, again, other)
    assert text == again == other != ""  # sets are in another order in the last one
