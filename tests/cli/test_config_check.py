"""Config files: several are read as one, and each mistake is reported with its place."""

from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import pytest
import torch
import yaml
from torch import nn

from kd_lightning.__main__ import main
from kd_lightning.cli.config_check import _check_spec, config_files, read_configs
from kd_lightning.errors import InputError
from kd_lightning.models import DigitsCNN
from kd_lightning.runs.class_paths import arguments_of, did_you_mean, find_class, takes_any_argument, walk_config


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("trainer: {max_epochs: 1, devices: 2}\nname: a\n")
    Path("b.yaml").write_text("trainer: {max_epochs: 3}\nlist: [{x: 1}]\n")
    Path("broken.yaml").write_text("trainer: {max_epochs: 1\nmodel: [")


def test_later_files_over_earlier_ones(folder):
    args = ["fit", "--config", "a.yaml", "--config=b.yaml", "-c", "broken.yaml", "--config", "gone.yaml", "--config"]
    assert [(key, str(path)) for key, path in config_files(args)] == [
        ("", "a.yaml"),
        ("", "b.yaml"),
        ("", "broken.yaml"),
    ]
    assert read_configs(args) == {"trainer": {"max_epochs": 3, "devices": 2}, "name": "a", "list": [{"x": 1}]}


def test_files_named_by_files_and_options(tmp_path, monkeypatch):
    """The content takes the place of the file, relative to the folder of the file that names it."""
    monkeypatch.chdir(tmp_path)
    Path("sub").mkdir()
    Path("sub/x.yaml").write_text(
        "{data: data.yaml, model: {class_path: A, init_args: {b: b.yml, c: c.yaml}}, name: n.yaml}"
    )
    Path("sub/data.yaml").write_text("{class_path: D, init_args: {e: data.yaml, source: [b.yml]}}")
    Path("sub/b.yml").write_text("{class_path: B}")
    Path("sub/c.yaml").write_text("{no: class}")  # an argument may be a file of this kind
    Path("trainer.yaml").write_text("{max_epochs: 1}")
    data = {"class_path": "D", "init_args": {"e": "data.yaml", "source": ["b.yml"]}}
    model = {"class_path": "A", "init_args": {"b": {"class_path": "B"}, "c": "c.yaml"}}
    args = ["fit", "--config=sub/x.yaml", "--trainer", "trainer.yaml"]
    assert read_configs(args) == {"data": data, "model": model, "name": "n.yaml", "trainer": {"max_epochs": 1}}
    nested = read_configs(
        ["--model.init_args.b=sub/b.yml", "--model.b", "sub/b.yml", "--model.init_args.c", "sub/c.yaml"]
    )
    assert nested == {"model": {"init_args": {"b": {"class_path": "B"}}}}


def test_walk_config_yields_places_and_owners():
    config = {"model": {"class_path": "A", "init_args": {"b": [{"class_path": "C", "dict_kwargs": {"d": 1}}]}}}
    found = {path: owner for path, _, _, owner in walk_config(config)}
    assert found["model.init_args.b"] == "A"
    assert found["model.init_args.b[0].dict_kwargs.d"] == "C"
    assert found["model.class_path"] is None


def test_find_class():
    assert find_class("DigitsCNN") is find_class("kd_lightning.models.DigitsCNN") is DigitsCNN
    assert find_class("kd_lightning.models.Nothing") is find_class("no.such.Thing") is find_class(3) is None
    assert find_class("") is find_class("..") is None


def test_did_you_mean():
    assert did_you_mean("soft_wieght", ["soft_weight", "hard_loss"]) == "; did you mean soft_weight?"
    assert did_you_mean("zzz", ["soft_weight"]) == ""


def remove(path):
    *parents, last = path.split(".")

    def change(config):
        for name in parents:
            config = config[name]
        del config[last]

    return change


def rename(path, name):
    def change(config):
        *parents, last = path.split(".")
        for parent in parents:
            config = config[parent]
        config[name] = config.pop(last)

    return change


def put(path, value):
    def change(config):
        *parents, last = path.split(".")
        for parent in parents:
            config = config[parent]
        config[last] = value

    return change


def at_once(*changes):
    def change(config):
        for one in changes:
            one(config)

    return change


STUDENT, TEACHER = "model.init_args.student", "model.init_args.teacher"
CASES = {
    "top": (rename("data", "daata"), "daata: no such key; did you mean data?"),
    "group": (rename("trainer.max_epochs", "max_epoch"), None),
    "in a group": (put("trainer.max_epoch", 1), "trainer.max_epoch: no such key; did you mean trainer.max_epochs?"),
    "spec": (rename(f"{STUDENT}.init_args", "init_arg"), f"{STUDENT}.init_arg: no such key; did you mean init_args?"),
    "spec, deeper": (
        rename(f"{TEACHER}.init_args.model.class_path", "clas_path"),
        f"{TEACHER}.init_args.model.clas_path: no such key; did you mean class_path?",
    ),
    "in a list": (
        put("trainer.callbacks", [{"class_path": "SoftWeightAnnealing", "init_arg": {}}]),
        "trainer.callbacks[0].init_arg: no such key; did you mean init_args?",
    ),
    "argument": (put(f"{STUDENT}.init_args.widht", 3), f"{STUDENT}.init_args.widht: DigitsCNN has no such key"),
    "argument of another class": (
        put(f"{STUDENT}.init_args.lr", 3),  # the optimiser has one, and stands first
        f"{STUDENT}.init_args.lr: DigitsCNN has no such key",
    ),
    "argument of a Teacher": (
        put(f"{TEACHER}.init_args.cache", "folder"),
        f"{TEACHER}.init_args.cache: load_weights has no such key; allowed: model, path, prefix; cache is an argument "
        "of kd_lightning.Teacher",
    ),
    "argument of a Teacher, behind **kwargs": (
        put(TEACHER, {"class_path": "torchvision.models.resnet18", "init_args": {"cache": "folder"}}),
        f"{TEACHER}.init_args.cache: resnet18 has no such key; allowed: weights, progress, num_classes",
    ),
    "argument of a Teacher, to a function that takes any": (
        put(TEACHER, {"class_path": "timm.create_model", "init_args": {"cache": "folder"}}),
        "and any in dict_kwargs; cache is an argument of kd_lightning.Teacher",
    ),
    "shared argument": (
        put("model.init_args.lr_intervall", "step"),
        "model.init_args.lr_intervall: DistillModule has no such key; did you mean lr_interval?; allowed: student, ",
    ),
    "shared argument of another module": (
        at_once(put("model.class_path", "HintModule"), put("model.init_args.lr_intervall", "step")),
        "model.init_args.lr_intervall: HintModule has no such key; did you mean lr_interval?; allowed: student, ",
    ),
    "shared argument null": (put("model.init_args.task", None), "model.init_args.task: DistillModule takes no null"),
    "shared argument null in another module": (
        at_once(put("model.class_path", "kd_lightning.HintModule"), put("model.init_args.task", None)),
        "model.init_args.task: HintModule takes no null here",
    ),
    "no class": (remove(f"{STUDENT}.class_path"), f"{STUDENT}.class_path is missing"),
    "no model class": (remove("model.class_path"), "model.class_path is missing"),
    "empty spec": (put(STUDENT, {}), f"{STUDENT}.class_path is missing"),
    "empty optimizer": (
        at_once(
            put("model.class_path", "HintModule"),
            put("model.init_args.hints", {"2": "2"}),
            put("model.init_args.hint_epochs", 1),
            put("model.init_args.hint_optimizer", {}),
        ),
        "model.init_args.hint_optimizer.class_path is missing",
    ),
    "negative width": (
        put(f"{TEACHER}.init_args.model.init_args.width", -8),
        f"{TEACHER}.init_args.model.init_args.width: it makes a tensor of negative dimension -8",
    ),
    "empty scheduler": (put("model.init_args.lr_scheduler", {}), "model.init_args.lr_scheduler.class_path is missing"),
    "empty model": (put("model", {}), "model.class_path is missing"),
    "no path": (put(f"{STUDENT}.class_path", 3), f"{STUDENT}.class_path must be the import path of a class, got 3"),
    "no arguments": (put(f"{STUDENT}.init_args", 3.7), f"{STUDENT}.init_args must hold arguments and their values"),
    "null arguments": (put("model.init_args", None), "model.init_args must hold arguments and their values, got None"),
    "no mapping": (put("checkpoint", [1]), "checkpoint must hold keys and their values, got [1]"),
    "model is a list": (put("model", [1]), "model must be a mapping with a class_path, got [1]"),
    "required": (remove(f"{TEACHER}.init_args.path"), f"{TEACHER}.init_args.path: missing, but load_weights needs it"),
    "required twice": (remove(f"{TEACHER}.init_args"), f"{TEACHER}.init_args.path: missing, but load_weights needs"),
    "data": (remove("data"), "data is missing: DistillModule has no loaders of its own"),
    "union": (put("trainer.max_epochs", "much"), "trainer.max_epochs: Expected a int, got much"),
    "union of two": (put("seed_everything", "x"), "seed_everything: Expected a bool or a int, got x"),
    "another kind": (put(STUDENT, {"class_path": "Digits"}), f"{STUDENT}: Digits is not what can stand here"),
    "no network": (put(STUDENT, True), f"{STUDENT}: Not a valid subclass of Module, got True"),
    "a function": (
        put(f"{STUDENT}", {"class_path": "resnet20"}),
        f"{STUDENT}: a function needs its full path, kd_lightning.models.cifar_resnet.resnet20",
    ),
    "inputs": (
        put(STUDENT, {"class_path": "kd_lightning.models.resnet20"}),
        "the student cannot take inputs of shape [32, 1, 8, 8]: ",
    ),
    "refused by Lightning": (put("trainer.val_check_interval", 100), "val_check_interval"),
    "no such figure": (
        at_once(put("early_stopping", 3), put("checkpoint.monitor", "val/acc"), put("checkpoint.save_top_k", 0)),
        "Early stopping conditioned on metric `val/acc` which is not available",
    ),
    "null": (put("data.init_args.batch_size", None), "batch_size: SemiSupervisedDataModule takes no null here"),
    "null inside": (put(f"{STUDENT}.init_args.width", None), f"{STUDENT}.init_args.width: DigitsCNN takes no null"),
    "name": (put("name", None), "name must be the name of the run's folder, got None"),
}


@pytest.mark.parametrize(("change", "message"), CASES.values(), ids=CASES)
def test_each_mistake_at_its_place(config, fails, change, message):
    config["checkpoint"] = {}
    change(config)
    Path("config.yaml").write_text(yaml.safe_dump(config))
    last = fails("fit", "--config", "config.yaml")
    assert (message or "trainer.max_epoch: no such key; did you mean trainer.max_epochs?") in last
    assert not Path("runs").exists() or "inputs" in last or "val" in last  # these are found in the first steps


MODULES = ["torch.nn", "torchvision.models", "torch.relu", "torch.pi", "torch.Tensor", "builtins.dict", "kd_lightning"]


@pytest.mark.parametrize("class_path", MODULES)
def test_what_is_no_network(config, fails, class_path):
    config["model"]["init_args"]["student"]["class_path"] = class_path
    Path("config.yaml").write_text(yaml.safe_dump(config))
    assert "student" in fails("fit", "--config", "config.yaml")


def test_doubled_key(config, fails):
    Path("config.yaml").write_text(yaml.safe_dump(config) + "name: again\n")
    line = len(Path("config.yaml").read_text().splitlines())
    assert fails("fit", "--config", "config.yaml").endswith(
        f"name appears twice, the second time in line {line} of config.yaml"
    )


def test_doubled_key_inside(config, fails):
    Path("config.yaml").write_text("trainer:\n  callbacks:\n  - {a: 1, b: 2, a: 3}\n")
    assert "trainer.callbacks[0].a appears twice, the second time in line 3" in fails("fit", "--config", "config.yaml")


def test_key_that_is_a_list(config, fails):
    Path("config.yaml").write_text("name: a\n? [b, c]\n: 1\n")
    assert "line 2 of config.yaml: a key must be a plain word" in fails("fit", "--config", "config.yaml")


def test_another_class_in_a_second_file(config, capsys):
    Path("config.yaml").write_text(yaml.safe_dump(config))
    student = {"class_path": "kd_lightning.models.resnet20", "init_args": {"num_classes": 10}}
    Path("second.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"student": student}}}))
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", "config.yaml", "--config", "second.yaml", "--print_config"])
    assert not end.value.code
    assert yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["student"]["init_args"] == {"num_classes": 10}


def test_file_before_the_command(config, capsys):
    Path("config.yaml").write_text(yaml.safe_dump({"fit": config}))
    with pytest.raises(SystemExit) as end:
        main(["--config", "config.yaml", "fit", "--print_config"])
    assert not end.value.code


def test_merge_keys_are_no_doubles(config, capsys):
    network = "  init_args:\n    student: &net {class_path: DigitsCNN}\n    teacher: {<<: *net}\n"
    Path("config.yaml").write_text(f"model:\n  class_path: DistillModule\n{network}")
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", "config.yaml", "--print_config"])
    assert not end.value.code


def test_no_yaml(folder, fails):
    assert "broken.yaml is no YAML: " in fails("fit", "--config=broken.yaml")


@pytest.mark.parametrize("text", ["a: &a [*a]", "a: &a {b: *a}", "&a {model: *a}"])
def test_config_that_holds_itself(folder, fails, text):
    Path("itself.yaml").write_text(text)
    Path("outer.yaml").write_text("trainer: itself.yaml")
    for file in ("itself.yaml", "outer.yaml"):
        last = fails("fit", "--config", file)
        assert "itself.yaml cannot be read: line 1: a value holds itself" in last
    assert "holds itself" in fails("fit", "--config", text)


@pytest.mark.parametrize("key", ["config", "trainer", "model"])
def test_file_that_names_itself(folder, fails, key):
    Path("itself.yaml").write_text(f"{key}: itself.yaml")
    assert "loop" in fails("fit", "--config", "itself.yaml")


def test_aliases_that_repeat_too_much(folder, fails):
    lines = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    Path("laughs.yaml").write_text("\n".join(["a0: &a0 [x]", *lines]))
    assert "laughs.yaml cannot be read: its aliases" in fails("fit", "--config", "laughs.yaml")


@pytest.mark.parametrize("key", ["trainer.max_epoch", "nam", "data.init_args.label"])
def test_abbreviations_are_no_keys(config, fails, key):
    Path("config.yaml").write_text(yaml.safe_dump(config))
    assert key in fails("fit", "--config", "config.yaml", f"--{key}", "3")


def build(
    a: int = 1, b: int | None = 2, c: Any = 3, d: Literal["x", None] = "x", e: int = None, f=4, *, g: nn.Module  # noqa: RUF013
) -> nn.Module:  # fmt: skip
    """Takes null here and there."""


@pytest.mark.parametrize(("name", "takes"), zip("abcdefg", (False, True, True, True, True, True, False), strict=True))
def test_null(name, takes, monkeypatch):
    monkeypatch.setattr("kd_lightning.models.build", build, raising=False)
    spec = {"class_path": "kd_lightning.models.build", "init_args": {name: None}}
    if takes:
        _check_spec(spec, "model", [])
    else:
        with pytest.raises(InputError, match=f"model.init_args.{name}: build takes no null here; leave the key out"):
            _check_spec(spec, "model", [])


class Shared(TypedDict, total=False):
    """Arguments of several classes."""

    rate: float
    name: str | None


class Parent:
    """Takes them."""

    def __init__(self, size: int, **kwargs: Unpack[Shared]):
        pass


class Child(Parent):
    """Passes them on, and all else."""

    def __init__(self, *, depth: int = 1, **kwargs: Any):
        super().__init__(**kwargs)


class Anything:
    """Does not reveal its arguments."""

    def __init__(self, known: int = 1, **kwargs: Any):
        self.rest = kwargs


@pytest.mark.parametrize(
    ("owner", "names", "any_argument"),
    [
        (Parent, ["size", "rate", "name"], False),
        (Child, ["depth", "size", "rate", "name"], False),
        (Anything, ["known"], True),
        (build, [*"abcdefg"], False),
        (nn.Identity, [], True),
        (None, [], True),
        (3.14, [], True),
        (torch.relu, [], True),
        ({}, [], True),
    ],
)
def test_arguments_are_those_of_the_parser(owner, names, any_argument):
    assert arguments_of(owner) == names
    assert takes_any_argument(owner) is any_argument


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 1, "rat": 0.1}, "model.init_args.rat: Child has no such key; did you mean rate?"),
        ({"size": 1, "rate": None}, "model.init_args.rate: Child takes no null here"),
        ({"size": None}, "model.init_args.size: Child takes no null here"),
        ({"size": 1, "name": None}, None),
    ],
)
def test_arguments_behind_kwargs_are_checked(arguments, message, monkeypatch):
    monkeypatch.setattr("kd_lightning.models.Child", Child, raising=False)
    spec = {"class_path": "kd_lightning.models.Child", "init_args": arguments}
    if message is None:
        _check_spec(spec, "model", [])
    else:
        with pytest.raises(InputError) as error:
            _check_spec(spec, "model", [])
        assert message in str(error.value)


@pytest.mark.parametrize("module", ["DistillModule", "HintModule"])
def test_help_shows_the_shared_arguments(module, capsys):
    main(["fit", "--model.help", module])
    text = capsys.readouterr().out
    for name in ("student", "soft_weight", "task", "hard_loss", "optimizer", "lr_scheduler", "lr_interval"):
        assert f"\n  {name} " in text


def test_what_is_right_is_left_alone(config, capsys):
    """Another class on the command line, a second file without one, a file in a file, arguments of ``**kwargs``."""
    Path("data.yaml").write_text(yaml.safe_dump(config["data"]))
    config["data"] = "data.yaml"
    Path("config.yaml").write_text(yaml.safe_dump(config))
    Path("second.yaml").write_text("model: {init_args: {soft_weight: 0.25}}")
    args = ["fit", "--config", "config.yaml", "--config", "second.yaml"]
    args += ["--model.init_args.student.class_path", "torchvision.models.resnet18"]
    args += ["--model.init_args.student.dict_kwargs.num_classes", "10"]
    with pytest.raises(SystemExit) as end:
        main([*args, "--print_config"])
    assert not end.value.code
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["init_args"]["soft_weight"] == 0.25
    assert printed["data"]["init_args"]["labeled"] == 5


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("data.init_args.source.init_args.decoded", "ImageFolder has no such key; data.init_args has the key decoded"),
        ("data.init_args.source.init_args.decode", "ImageFolder has no such key; data.init_args has the key decoded"),
        ("data.init_args.source.decoded", "no such key; data.init_args has the key decoded; allowed: class_path"),
        ("decoded", "no such key; data.init_args has the key decoded"),
        ("max_epochs", "no such key; trainer has the key max_epochs"),
        ("checkpoint.max_epochs", "no such key; trainer has the key max_epochs"),
        ("trainer.seed_everything", "no such key; the top level has the key seed_everything"),
        ("model.soft_weight", "no such key; model.init_args has the key soft_weight"),
        ("model.init_args.width", "DistillModule has no such key; model.init_args.student.init_args has the key width"),
        ("model.init_args.zzzzzz", "DistillModule has no such key; allowed: "),
    ],
)
def test_a_key_at_the_wrong_place_names_the_right_one(config, fails, path, hint):
    config["data"]["init_args"]["source"] = {"class_path": "ImageFolder", "init_args": {"train": "x"}}
    *parents, last = path.split(".")
    node = config
    for name in parents:
        node = node.setdefault(name, {})
    node[last] = 1
    Path("config.yaml").write_text(yaml.safe_dump(config))
    assert fails("fit", "--config", "config.yaml").startswith(f"error: {path}: {hint}")
    if path.count(".") > 2 and last == "decoded" and "init_args" in parents[-1]:
        del node[last]
        Path("config.yaml").write_text(yaml.safe_dump(config))
        assert hint in fails("fit", "--config", "config.yaml", f"--{path}=x")
