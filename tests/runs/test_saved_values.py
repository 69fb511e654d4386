"""Defaults and values that a run's config holds, or leaves out, or refuses."""

import functools
import pathlib
import sys
import warnings
from collections.abc import Callable
from enum import Enum
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from kd_lightning.cli.key_help import key_help
from kd_lightning.cli.record_run import dump_config
from kd_lightning.errors import InputError
from kd_lightning.runs.build import ObjectParser, build
from kd_lightning.runs.parser_errors import ParserError
from kd_lightning.runs.run import Run
from kd_lightning.runs.weights import save_weights
from kd_lightning.runs.yaml_file import dump_yaml, load_yaml

_EMPTY = object()


class Kind(Enum):
    A = 1
    B = 2


class Embed(nn.Module):
    """A part of a network, as classes that a network is called with."""

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size))


def double(x):
    return 2 * x


UNION = str | Callable | type[nn.Module]  # as timm's
# (type hint, default): whether the config holds it
DEFAULTS = {
    "class of callable": (Callable, Embed, False),
    "class of callable or None": (Callable | None, Embed, False),
    "class of a union": (UNION, nn.GELU, False),
    "class of a union or None": (UNION | None, Embed, False),
    "class of type": (type[nn.Module], nn.ReLU, True),
    "class of type or None": (type[nn.Module] | None, nn.ReLU, True),
    "class of Any": (Any, Embed, False),
    "class": (_EMPTY, Embed, False),
    "classes": (list[type[nn.Module]], [nn.ReLU], True),
    "classes in a tuple": (_EMPTY, (nn.ReLU, nn.GELU), False),
    "class of any arguments": (Callable[..., nn.Module], nn.Linear, False),
    "class of any arguments or None": (Callable[..., nn.Module] | None, nn.Linear, False),
    "classes in a mapping": (dict[str, Callable[..., nn.Module]], {"a": Embed}, False),
    "partial": (Callable[..., nn.Module], functools.partial(nn.LayerNorm, eps=1e-6), False),
    "partial or None": (Callable | None, functools.partial(nn.LayerNorm, eps=1e-6), False),
    "lambda": (Callable, lambda x: x + 1, False),
    "function": (Callable, double, True),
    "function of tensors": (Callable[[torch.Tensor], torch.Tensor], double, None),
    "function of torch": (Callable, torch.nn.functional.relu, True),
    "function of Any": (Any, double, False),
    "method": (Callable, torch.Tensor.relu, False),
    "network": (nn.Module, nn.ReLU(), False),
    "enum": (Kind, Kind.B, True),
    "enum or text": (str | Kind, Kind.B, False),
    "dtype": (torch.dtype, torch.float16, None),
    "dtype of Any": (Any, torch.float16, False),
    "device": (torch.device, torch.device("meta"), False),
    "path": (pathlib.Path, pathlib.Path("a/b"), True),
    "path or text": (str | pathlib.Path, pathlib.Path("a/b"), False),
    "size": (_EMPTY, torch.Size([1, 2]), False),
    "slice": (_EMPTY, slice(1, 2), False),
    "tensor": (_EMPTY, torch.tensor([1.5]), False),
    "tuple": (tuple[int, int], (1, 2), True),
    "numbers": (int | tuple[int, int], (1, 2), True),
    "number": (float, 0.5, True),
    "text that is a number": (str, "1e3", True),
    "number or text": (float | str, "1", False),
    "text or None": (str | None, "null", None),
    "text": (_EMPTY, "1e3", False),
    "empty text": (str, "", True),
    "null": (Callable | None, None, True),
}


@pytest.fixture(autouse=True)
def project(monkeypatch):
    module = ModuleType("project")
    for part in (Kind, Embed, double):
        monkeypatch.setattr(part, "__module__", "project")
        setattr(module, part.__name__, part)
    monkeypatch.setitem(sys.modules, "project", module)
    return module


def network(project, hint, default=None):
    """Define a network of the project with an argument of a type hint."""

    def init(self, value=default):
        nn.Module.__init__(self)
        self.__dict__["value"] = value

    init.__annotations__ = {} if hint is _EMPTY else {"value": hint}
    project.Users = type("Users", (nn.Module,), {"__init__": init, "__module__": "project"})


def fit_and_save(text):
    """Return the object that a fit builds from YAML, and its saved config."""
    parser = ObjectParser()
    parser.add_subclass_arguments(nn.Module, "object", fail_untyped=False)
    config = parser.parse_string(text)
    return parser.instantiate(config).object, load_yaml(dump_config(parser, config))["object"]


@pytest.mark.parametrize("case", DEFAULTS)
def test_defaults(project, case):
    hint, default, held = DEFAULTS[case]
    network(project, hint, default)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # jsonargparse warns of what it cannot write
        first, saved = fit_and_save("object: project.Users")
    for value in (first.value, build(nn.Module, saved).value):
        assert type(value) is type(default)
        assert value is default or value == default
    if held is not None:  # not the same with each version of jsonargparse
        assert ("value" in saved.get("init_args", {})) == held


def test_a_class_that_a_callable_returns(project):
    """As an optimizer's class: it stays in the config, as do its arguments."""
    network(project, Callable[[], nn.Module], Embed)
    for given, size in (("", 3), (", init_args: {value: {class_path: project.Embed, init_args: {size: 5}}}", 5)):
        first, saved = fit_and_save(f"object: {{class_path: project.Users{given}}}")
        assert saved["init_args"]["value"]["class_path"] == "project.Embed"
        assert [len(one.value().weight) for one in (first, build(nn.Module, saved))] == [size, size]


@pytest.mark.parametrize("hint", [_EMPTY, Any, str, str | None, float | str, list[str], dict[str, Any], list, Callable])
@pytest.mark.parametrize(
    "text", ['"1e3"', "1e3", '"1"', '"null"', "on", "2020-01-01", "12:30", '["1", "1e3"]', '{a: "1e3"}', "torch.relu"]
)
def test_a_value_is_read_again_or_refused(project, hint, text):
    network(project, hint)
    value = yaml.safe_load(text)
    try:
        first, saved = fit_and_save(f"object: {{class_path: project.Users, init_args: {{value: {text}}}}}")
    except ParserError:  # the hint does not allow the value
        return
    except InputError as error:
        path = "[0]" if isinstance(value, list) else ".a"
        message = f"object.init_args.value{path}: the config of a run must hold the text"
        assert (hint in (_EMPTY, Any, list), str(error).startswith(message)) == (True, True)  # noqa: PT017
        return
    again = build(nn.Module, saved).value
    assert type(again) is type(first.value)
    assert again == first.value


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (nn.Module | dict[str, tuple[float, nn.Module]] | None, "{a: [0.8, {class_path: project.Embed}]}"),
        (nn.Module | dict[str, nn.Module] | None, "{a: {class_path: project.Embed, init_args: {size: 2}}, b: ReLU}"),
        (nn.Module | dict[str, float], "{a: 1.5}"),
    ],
)
def test_a_mapping_where_an_object_can_stand(project, hint, text):
    """Jsonargparse would save it as the arguments of the class of the hint."""
    network(project, hint)
    first, saved = fit_and_save(f"object: {{class_path: project.Users, init_args: {{value: {text}}}}}")
    assert saved["init_args"]["value"].keys() == first.value.keys()
    again = build(nn.Module, saved).value
    assert [*map(str, again.values())] == [*map(str, first.value.values())]
    assert again.keys() == first.value.keys()


def test_a_mapping_in_a_list_where_an_object_can_stand(project):
    network(project, list[nn.Module | dict[str, float]])
    with pytest.raises(InputError, match=r"object.init_args.value\[0\]: the config of a run must hold the mapping"):
        fit_and_save("object: {class_path: project.Users, init_args: {value: [{a: 1.5}]}}")


def test_objects_without_a_path_are_refused(project):
    network(project, Callable)
    with pytest.raises(InputError, match=r"can(not)? hold.* <method 'relu'"):
        fit_and_save("object: {class_path: project.Users, init_args: {value: torch.Tensor.relu}}")


@pytest.mark.parametrize("text", ["1e3", "1E5", "-1e3", "+1e-3", "1_0e3", "4e12345", "1.5", "null", "abc", "e3"])
def test_texts_stay_texts_for_each_reader(text):
    parser = ObjectParser()
    parser.add_argument("--value", type=str)
    written = dump_yaml({"value": text})
    assert parser.parse_string(written).value == text
    assert yaml.safe_load(written) == {"value": text}
    assert dump_yaml([1000.0, 1e-5]) == yaml.safe_dump([1000.0, 1e-5])


def test_help_names_defaults_that_a_config_cannot_hold(project):
    network(project, Callable, Embed)
    line = next(line for line in key_help("model", "project.Users").splitlines() if line.split()[:1] == ["value"])
    assert line.split() == ["value", "Embed"]


def test_networks_of_timm(tmp_path):
    timm = pytest.importorskip("timm")
    arguments = "{img_size: 8, patch_size: 4, embed_dim: 8, depth: 1, num_heads: 2, num_classes: 3}"
    text = f"object: {{class_path: timm.models.VisionTransformerDistilled, init_args: {arguments}}}"
    first, saved = fit_and_save(text)
    assert isinstance(first, timm.models.VisionTransformerDistilled)
    model = {"class_path": "SupervisedModule", "init_args": {"student": saved}}
    (tmp_path / "config.yaml").write_text(dump_yaml({"model": model}))
    save_weights(first.state_dict(), tmp_path / "student.safetensors", {"weights": "step 4"})
    again, x = Run(tmp_path).student().eval(), torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(again(x), first.eval()(x), rtol=0, atol=0)
