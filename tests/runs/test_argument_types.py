"""Lists in configs for arguments that are tensors, and schedules that leave out their length."""

import sys
from types import ModuleType

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from kd_lightning.errors import InputError
from kd_lightning.runs.argument_types import to_numbers
from kd_lightning.runs.build import ObjectParser, build
from kd_lightning.runs.class_paths import arguments_of, takes_none

DEFAULT = torch.tensor([0.1, 1e-7, 3.0, torch.inf])


class Users(nn.Module):
    """A module of a project, with tensors as arguments."""

    def __init__(
        self,
        anchors: Tensor,
        mask: Tensor | None = None,
        scale: Tensor = DEFAULT,
        parts: list[Tensor] | None = None,
        rate: float | Tensor = 0.1,
    ) -> None:
        super().__init__()
        self.given = anchors, mask, scale, parts, rate
        anchors.mul_(2)


COUNTS, FLAGS = torch.tensor([1, 2]), torch.tensor([True, False])
MEANS, SMALL = torch.tensor([0.1], dtype=torch.float64), torch.tensor([1], dtype=torch.uint8)
SIZES = (torch.tensor([1]), torch.tensor([2]))


class Typed(nn.Module):
    """A module of a project, whose defaults are tensors of several types."""

    def __init__(
        self,
        counts: Tensor = COUNTS,
        flags: Tensor | None = FLAGS,
        means: Tensor = MEANS,
        small: Tensor = SMALL,
        sizes: tuple[Tensor, ...] = SIZES,
        ids: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.given = counts, flags, means, small, sizes, ids


def make_weights(count: int = 3) -> Tensor:
    """Return tensors by a function, as configs could before."""
    return torch.full((count,), 7.0)


class Inherits(CosineAnnealingLR):
    """A schedule that passes its arguments on."""

    def __init__(self, optimizer, factor: float, **kwargs) -> None:
        super().__init__(optimizer, **kwargs)


@pytest.fixture(autouse=True)
def project(monkeypatch):
    module = ModuleType("project")
    for part in (Users, Typed, make_weights, Inherits):
        setattr(module, part.__name__, part)
        monkeypatch.setattr(part, "__module__", "project")
    monkeypatch.setitem(sys.modules, "project", module)


def users(**arguments):
    return {"class_path": "project.Users", "init_args": arguments}


def equal(found, values, dtype=torch.float32):
    torch.testing.assert_close(found, torch.tensor(values, dtype=dtype), rtol=0, atol=0)


def test_losses_of_torch():
    loss = build(nn.Module, {"class_path": "torch.nn.CrossEntropyLoss", "init_args": {"weight": [1, 2, 3]}})
    equal(loss.weight, [1.0, 2.0, 3.0])
    logits, target = torch.randn(5, 3), torch.tensor([0, 1, 2, 2, 1])
    expected = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0]))(logits, target)
    assert loss(logits, target) == expected  # integers would fail
    loss = build(nn.Module, {"class_path": "BCEWithLogitsLoss", "init_args": {"pos_weight": [0.5, 3]}})
    equal(loss.pos_weight, [0.5, 3.0])


def test_modules_of_a_project():
    anchors, mask, scale, parts, rate = build(
        nn.Module, users(anchors=[[1, 2], [3, 4.5]], mask=[True, False], parts=[[1], 2], rate=1)
    ).given
    equal(anchors, [[2.0, 4.0], [6.0, 9.0]])
    equal(mask, [True, False], torch.bool)
    assert scale is DEFAULT
    equal(parts[0], [1.0])
    equal(parts[1], 2.0)
    assert rate == 1.0
    anchors, mask, *_ = build(nn.Module, users(anchors=0.5, mask=None)).given
    equal(anchors, 1.0)
    assert mask is None


def typed(**arguments):
    return build(nn.Module, {"class_path": "project.Typed", "init_args": arguments}).given


def test_the_type_of_a_default():
    counts, flags, means, small, sizes, ids = typed(
        counts=[3, 2**53 + 1], flags=[False], means=[0.1], small=255, sizes=[[3], 4], ids=[0, 1]
    )
    equal(counts, [3, 2**53 + 1], torch.int64)
    equal(flags, [False], torch.bool)
    equal(means, [0.1], torch.float64)
    equal(small, 255, torch.uint8)
    equal(sizes[0], [3], torch.int64)
    equal(sizes[1], 4, torch.int64)
    equal(ids, [0.0, 1.0])
    counts, flags, *_ = typed()
    assert counts is COUNTS
    assert flags is FLAGS


def test_a_saved_default_keeps_its_type():
    parser = ObjectParser()
    parser.add_subclass_arguments(nn.Module, "object")
    config = parser.parse_object({"object": {"class_path": "project.Typed"}})
    text = parser.dump(config, skip_unset=False)
    saved = yaml.safe_load(text)["object"]["init_args"]
    assert saved["counts"] == [1, 2]
    assert saved["means"] == [0.1]
    counts, flags, means, small, *_ = parser.instantiate(parser.parse_string(text)).object.given
    for found, default in ((counts, [1, 2]), (flags, [True, False]), (small, [1])):
        assert found.tolist() == default
    assert [part.dtype for part in (counts, flags, means, small)] == [
        torch.int64,
        torch.bool,
        torch.float64,
        torch.uint8,
    ]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("counts", [1, 2.5], "numbers that its type int64 can hold, which 2.5 is not"),
        ("counts", [2**63], f"numbers that its type int64 can hold, which {2**63} is not"),
        ("counts", [True, False], "numbers, as its default is"),
        ("flags", [1, 0], "true and false, as its default is"),
        ("small", [-1], "numbers that its type uint8 can hold, which -1 is not"),
        ("small", [256], "numbers that its type uint8 can hold, which 256 is not"),
        ("ids", [0, 1, 16777217], "numbers that its type float32 can hold, which 16777217 is not"),
        ("ids", [10**400], f"numbers that its type float32 can hold, which {10**400} is not"),
        ("ids", [1e39], "numbers that its type float32 can hold, which 1e+39 is not"),
    ],
)
def test_numbers_that_a_type_cannot_hold(name, value, message):
    with pytest.raises(InputError) as caught:
        typed(**{name: value})
    assert str(caught.value).startswith(f"{name}: a tensor must be written as {message}")


def test_functions_that_return_a_tensor():
    spec = {"class_path": "project.make_weights", "init_args": {"count": 2}}
    equal(build(nn.Module, users(anchors=spec)).given[0], [14.0, 14.0])
    equal(build(nn.Module, users(anchors="project.make_weights")).given[0], [14.0] * 3)


def test_the_config_holds_the_list():
    """As it was written, also after objects were built that change their tensors; read again it is the same."""
    parser = ObjectParser()
    parser.add_subclass_arguments(nn.Module, "object")
    config = parser.parse_object({"object": users(anchors=[[1, 0.1], [2, 3.0]], mask=[True])})
    for _ in range(2):  # each object has a tensor of its own
        equal(parser.instantiate(config).object.given[0], [[2.0, 0.2], [4.0, 6.0]])
    text = parser.dump(config, skip_unset=False)
    saved = yaml.safe_load(text)["object"]["init_args"]
    assert str(saved["anchors"]) == "[[1, 0.1], [2, 3.0]]"
    assert saved["mask"] == [True]
    assert saved["scale"] == [0.1, 1e-7, 3.0, torch.inf]  # a default
    again = parser.instantiate(parser.parse_string(text)).object.given
    equal(again[0], [[2.0, 0.2], [4.0, 6.0]])
    assert torch.equal(again[2], DEFAULT)


def test_the_command_line():
    parser = ObjectParser()
    parser.add_subclass_arguments(nn.Module, "object")
    config = parser.parse_args(["--object=torch.nn.CrossEntropyLoss", "--object.weight=[1, 2e-1]"])
    assert config.object.init_args.weight == [1, 0.2]
    equal(parser.instantiate(config).object.weight, [1.0, 0.2])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["a"], "a number or as lists of numbers"),
        ([None], "a number or as lists of numbers"),
        ([], "a number or as lists of numbers"),
        ("abc", "a number or as lists of numbers"),
        ({"a": 1}, "a number or as lists of numbers"),
        ([[1], [1, 2]], "rows of one length"),
        ([1, [2]], "rows of one length"),
        ([True, 0.5], "numbers alone, or true and false alone"),
    ],
)
@pytest.mark.parametrize("name", ["anchors", "mask"])
def test_what_is_no_tensor(name, value, message):
    with pytest.raises(InputError) as caught:
        build(nn.Module, users(**{"anchors": 1, name: value}))
    assert str(caught.value) == f"{name}: a tensor must be written as {message}, got {value}"


def test_errors_of_a_function_count():
    with pytest.raises(InputError, match="^anchors: kount: no such key"):
        build(nn.Module, users(anchors={"class_path": "project.make_weights", "init_args": {"kount": 2}}))


def test_a_learning_rate_stays_a_number():
    """All optimisers of a config would share its tensor, which schedules change in place."""
    with pytest.raises(InputError, match="^rate: Expected a float"):
        build(nn.Module, users(anchors=1, rate=[0.1]))


def test_half_precision_by_default(monkeypatch):
    torch.set_default_dtype(torch.float64)
    try:
        equal(build(nn.Module, users(anchors=[0.1])).given[0], [0.2], torch.float64)
    finally:
        torch.set_default_dtype(torch.float32)


def test_parsing_makes_no_tensor():
    assert to_numbers([1, 2]) == [1, 2]


def scheduler(name, **arguments):
    parser = ObjectParser()
    parser.add_subclass_arguments(LRScheduler, "object", skip={"optimizer"})
    return parser.parse_object({"object": {"class_path": name, "init_args": arguments}}).object.init_args


def test_a_schedule_without_its_length():
    name = "torch.optim.lr_scheduler.CosineAnnealingLR"
    assert scheduler(name).T_max is None
    assert scheduler(name, T_max=None, eta_min=0.1).as_dict() == {"T_max": None, "eta_min": 0.1, "last_epoch": -1}
    assert scheduler(name, T_max=3).T_max == 3
    assert takes_none(CosineAnnealingLR, "T_max")
    assert "T_max" in arguments_of(CosineAnnealingLR)
    for other, missing in (("StepLR", "step_size"), ("CosineAnnealingWarmRestarts", "T_0")):
        with pytest.raises(InputError, match=f"{missing}: missing, but needed"):
            scheduler(f"torch.optim.lr_scheduler.{other}")
    with pytest.raises(InputError, match="factor: missing, but needed"):
        scheduler("project.Inherits")
