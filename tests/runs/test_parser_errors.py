"""Errors of the parser: one line that names the key, what is allowed, and the most similar right name."""

import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from kd_lightning.runs.parser_errors import explain_error, explain_parser_error


def change(config, path, value):
    *parents, last = path.split(".")
    for name in parents:
        config = config.setdefault(name, {})
    config[last] = value


MALICIOUS = "malicious.pt"
SOFT_LOSS = "model.init_args.soft_loss"


TERMS = {
    "at": {"class_path": "kd_lightning.FeatureTerm", "init_args": {"weight": 2.0}},
    "crd": {"class_path": "kd_lightning.FeatureTerm"},
}


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("model.init_args.features.att.weight", "features has no att; did you mean at?; allowed: at, crd"),
        ("features.x.init_args.weight", "features has no x; allowed: at, crd"),
        ("model.soft_loss.dkd.temperature", "soft_loss has no dkd; did you mean kd?; allowed: kd"),
    ],
)
def test_option_of_an_entry_that_is_not_there(option, text):
    kd = {"class_path": "kd_lightning.losses.KDLoss"}
    arguments = {"student": {"class_path": "Net"}, "features": TERMS, "soft_loss": {"kd": [1.0, kd]}}
    model = {"class_path": "DistillModule", "init_args": arguments}
    error = explain_parser_error("anything", None, {"model": model}, option=option)
    assert str(error) == f"model.init_args.{text}"


def test_options_that_add_an_entry():
    model = {"class_path": "DistillModule", "init_args": {"features": TERMS}}
    given = ["model.features.x.weight", "trainer.max_epochs"]
    error = explain_parser_error("anything", None, {"model": model}, given=given)
    assert str(error) == "model.init_args.features has no x; allowed: at, crd"
    given.append("model.features.x.class_path")
    assert " has no " not in str(explain_parser_error("anything", None, {"model": model}, given=given))


@pytest.mark.parametrize("option", ["model.optimizer.lr", "model.features.x", "features.at.foo", "trainer.profiler.x"])
def test_other_options_have_their_own_message(option):
    model = {"class_path": "DistillModule", "init_args": {"student": {"class_path": "Net"}, "features": TERMS}}
    config = {"model": model, "trainer": {"logger": {"class_path": "CSVLogger"}}}
    assert " has no " not in str(explain_parser_error("anything", None, config, option=option))


@pytest.mark.parametrize(
    ("path", "value", "parts"),
    [
        ("model.init_args.soft_wieght", 0.5, ["model.init_args.soft_wieght", "did you mean soft_weight?"]),
        ("model.init_args.student.init_args.widht", 4, ["student.init_args.widht", "did you mean width?"]),
        ("trainer.max_epoch", 4, ["trainer.max_epoch", "did you mean trainer.max_epochs?"]),
        ("modle", 3, ["modle", "did you mean model?"]),
        ("data.init_args.labled", 4, ["data.init_args.labled", "did you mean labeled?"]),
        ("model.class_path", "DistilModule", ["model.class_path", "did you mean DistillModule?"]),
        ("model.init_args.teacher.class_path", "torchvision.models.resnet81", ["teacher.class_path", "resnet18"]),
        ("model.init_args.soft_weight", 1.5, ["model.init_args.soft_weight must lie in [0, 1], got 1.5"]),
        ("model.init_args.soft_weight", "much", ["model.init_args.soft_weight", "float", "much"]),
        ("model.init_args.teacher.init_args.path", "nowhere.pt", ["no weights file at nowhere.pt"]),
        ("model.init_args.teacher.init_args.path", MALICIOUS, [MALICIOUS, "refused", "safetensors"]),
        ("model.init_args.teacher.init_args.model.init_args.width", 9, ["of another shape", "[8, 1, 3, 3]"]),
        ("model.init_args.student.init_args.num_classes", 7, ["student", "at least 10", "got 7"]),
        (
            SOFT_LOSS,
            {"class_path": "kd_lightning.losses.KDLoss", "init_args": {"temperature": 0}},
            ["temperature"],
        ),
        ("model.init_args.optimizer.init_args.lr", -1.0, ["optimizer", "learning rate"]),
        ("data.init_args.labeled", 5000, ["labeled", "labeled: 5000 per class", "class '0'"]),
        ("data.init_args.labeled", "gone/split.json", ["labeled", "gone/split.json"]),
        ("data.init_args.batch_size", 0, ["batch_size must be at least 1, got 0"]),
        ("data.init_args.unlabeled", "some", ["unlabeled", "rest", "some"]),
        ("ckpt_path", "gone.ckpt", ["ckpt_path", "gone.ckpt"]),
    ],
)
def test_bad_input(config, fails, path, value, parts):
    class Evil:
        def __reduce__(self):
            return Path.touch, (Path("evil"),)

    torch.save({"state_dict": Evil()}, MALICIOUS)
    change(config, path, value)
    Path("config.yaml").write_text(yaml.safe_dump(config))
    last = fails("fit", "--config", "config.yaml")
    for part in parts:
        assert part in last
    assert not Path("evil").exists()


@pytest.mark.parametrize(
    ("file", "reader"),
    [
        ("net.pt2", "kd_lightning.teachers.ExportedNetwork (argument program: net.pt2)"),
        ("gone.pt2", "kd_lightning.teachers.ExportedNetwork (argument program: gone.pt2)"),
        ("net.safetensors", "kd_lightning.load_weights (arguments model, and path: net.safetensors)"),
        ("net.bytes", ""),
    ],
)
@pytest.mark.parametrize("key", ["model.init_args.teacher", "model.init_args.student"])
def test_a_file_in_place_of_a_network(config, fails, key, file, reader):
    if not file.startswith("gone"):
        Path(file).write_bytes(b"PK\x03\x04\xa8\xf6")
    change(config, key, file)
    Path("config.yaml").write_text(yaml.safe_dump(config))
    expected = f"error: {key} must be a mapping with a class_path, got the file {file}"
    for args in (["--config", "config.yaml"], ["--config", "config.yaml", f"--{key}={file}"]):
        message = fails("fit", *args)
        assert message.startswith(f"{expected}; {reader}" if reader else expected)


INT = "Expected a <class 'int'>. Got value: x"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("two\n  lines\t here", "two lines here"),
        (f'Parser key "trainer.max_epochs":\n  {INT}', "trainer.max_epochs: Expected a int, got x"),
        ("Expected a dot import path string: Digit", "class_path: no class 'Digit'; did you mean Digits?"),
        ("Expected a dot import path string: Xyzzy", "class_path: no class 'Xyzzy'"),
        ("Option 'modle' is not accepted", "modle: no such key"),
        ("Group 'trainer' does not accept option 'max_epoch'", "trainer.max_epoch: no such key; did you mean"),
        ("Subcommand 'fit' does not accept option 'modle'", "modle: no such key"),
    ],
)
def test_without_a_config_file(message, expected):
    assert str(explain_parser_error(message, known=["trainer.max_epochs"])).startswith(expected)


def test_module_without_the_class():
    with pytest.raises(AttributeError) as error:
        torch.optim.Adm  # noqa: B018
    text = str(explain_parser_error("Problem with given class_path 'torch.optim.Adm': ...", error.value))
    assert text == "class_path: torch.optim has no 'Adm'; did you mean Adam?"


def test_place_in_the_config_file():
    config = {"callbacks": [{"class_path": "A"}, {"class_path": "Xyzzy", "init_args": {"width": 0}}]}
    error = explain_parser_error("Expected a dot import path string: Xyzzy", config=config)
    assert str(error).startswith("callbacks[1].class_path: no class 'Xyzzy'")
    assert explain_error(ValueError("width must be 1"), config) == "callbacks[1].init_args.width must be 1"
    assert explain_error(ValueError("width must be 1, got 0")) == "width must be 1, got 0"


def test_constructors_argument_is_the_one_with_the_value():
    config = {"a": {"class_path": "A", "init_args": {"width": 3}}, "b": {"class_path": "B", "init_args": {"width": 0}}}
    assert explain_error(ValueError("width must be 1, got 0"), config).startswith("b.init_args.width must be 1")
    assert explain_error(ValueError("width must be 1, got 7"), config).startswith("a.init_args.width must be 1")


def write(config, path):
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_text(yaml.safe_dump(config))
    return path


STUDENT = "model.init_args.student"
WIDTH = f"{STUDENT}.init_args.width: Expected a int, got much"


@pytest.mark.parametrize(
    "args",
    [
        ["fit", "--config", "sub/x.yaml"],
        ["fit", "--config=sub/x.yaml"],
        ["fit", "-c", "sub/x.yaml"],
        ["fit", "--model=sub/model.yaml", "--config=sub/rest.yaml"],
        ["fit", "--config=sub/rest.yaml", "--model", "sub/model.yaml"],
        ["fit", "--config=sub/nested.yaml"],
        ["--config", "sub/whole.yaml", "fit"],
        ["doctor", "--config", "sub/x.yaml"],
        ["layers", "--config", "sub/x.yaml"],
        ["cache", "sub/x.yaml"],
        ["experiment", "sub/x.yaml"],
        ["clean", "sub/x.yaml"],
    ],
    ids=" ".join,
)
def test_place_in_a_config_of_another_folder(config, fails, args):
    """The parser changes the working directory to the folder of each file that it reads."""
    change(config, f"{STUDENT}.init_args.width", "much")
    write(config, "sub/x.yaml")
    write({"fit": config}, "sub/whole.yaml")
    write(config["model"], "sub/model.yaml")
    write(config | {"model": "model.yaml"}, "sub/nested.yaml")
    write({key: value for key, value in config.items() if key != "model"}, "sub/rest.yaml")
    before = Path.cwd()
    assert WIDTH in fails(*args)
    assert Path.cwd() == before


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (f"{STUDENT}.class_path", "DigitCNN", f"{STUDENT}.class_path: no class 'DigitCNN'; did you mean DigitsCNN?"),
        (
            "model.init_args.optimizer.class_path",
            "torch.optim.Adm",
            "model.init_args.optimizer.class_path: torch.optim has",
        ),
        ("model.init_args.optimizer.init_args.betas", 3, "model.init_args.optimizer.init_args.betas: "),
        ("model.init_args.teacher.init_args.path", None, "model.init_args.teacher.init_args.path"),
        ("data.init_args.batch_size", 0, "data.init_args.batch_size must be at least 1, got 0"),
        ("trainer.max_epochs", "much", "trainer.max_epochs: Expected a int, got much"),
    ],
)
def test_other_mistakes_in_a_config_of_another_folder(config, fails, path, value, message):
    change(config, path, value)
    assert message in fails("fit", "--config", write(config, "sub/x.yaml"))


def test_mistakes_in_a_file_that_a_config_names(config, fails):
    """The file lies beside the config, not in the working directory."""
    write(config["data"], "sub/data.yaml")
    change(config, f"{STUDENT}.init_args.width", "much")
    change(config, STUDENT, write(config["model"]["init_args"]["student"], "sub/student.yaml").removeprefix("sub/"))
    write(config | {"data": "data.yaml"}, "sub/x.yaml")
    assert WIDTH in fails("fit", "--config", "sub/x.yaml")
    config["model"]["init_args"]["student"] = {"class_path": "DigitsCNN"}
    change(config, "data.init_args.batch_size", "much")
    write(config["data"], "sub/data.yaml")
    write(config | {"data": "data.yaml"}, "sub/x.yaml")
    assert "data.init_args.batch_size: Expected a int, got much" in fails("fit", "--config", "sub/x.yaml")
    write({"class_path": "SemiSupervisedDataModule", "init_args": {"labled": 5}}, "sub/data.yaml")
    last = fails("fit", "--config", "sub/x.yaml")
    assert "data.init_args.labled: SemiSupervisedDataModule has no such key; did you mean labeled?" in last
    del config["data"]
    last = fails("fit", "--config", write(config, "sub/x.yaml"), "--data=sub/data.yaml")
    assert "data.init_args.labled: SemiSupervisedDataModule has no such key; did you mean labeled?" in last


def test_checkpoint_beside_a_config_of_another_folder(config, fails):
    """A checkpoint's path is relative to the working directory, as all paths of arguments are."""
    write(config | {"ckpt_path": "a.ckpt"}, "sub/x.yaml")
    Path("sub/a.ckpt").touch()
    assert "ckpt_path: no checkpoint at a.ckpt" in fails("fit", "--config", "sub/x.yaml")
    Path("a.ckpt").touch()
    assert "ckpt_path: a.ckpt is damaged or no checkpoint" in fails("fit", "--config", "sub/x.yaml")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        (f"{STUDENT}.init_args.width", "much", WIDTH),
        (f"{STUDENT}.width", "much", WIDTH),
        (
            f"{STUDENT}.init_args.widht",
            "3",
            f"{STUDENT}.init_args.widht: DigitsCNN has no such key; did you mean width?",
        ),
        (
            "model.init_args.optimizer.init_args.lrr",
            "3",
            "optimizer.init_args.lrr: AdamW has no such key; did you mean lr?",
        ),
        ("data.init_args.batch_size", "much", "data.init_args.batch_size: Expected a int, got much"),
    ],
)
def test_mistakes_on_the_command_line(config, fails, option, value, message):
    last = fails("fit", "--config", write(config, "sub/x.yaml"), f"--{option}", value)
    assert message in last
    assert "NestedArg" not in last


@pytest.mark.parametrize("wrong", ["student", "teacher"])
def test_of_two_arguments_of_one_name_the_wrong_one(config, fails, wrong):
    network = config["model"]["init_args"][wrong]
    network = network["init_args"].get("model", network)
    network["init_args"]["width"] = "much"
    place = STUDENT if wrong == "student" else "model.init_args.teacher.init_args.model"
    assert f"{place}.init_args.width: Expected a int, got much" in fails("fit", "--config", write(config, "sub/x.yaml"))


def test_of_two_callbacks_the_wrong_one(config, fails):
    good, bad = ({"class_path": "SoftWeightAnnealing", "init_args": {"start": 0.9, "end": end}} for end in (0.1, "low"))
    config["trainer"]["callbacks"] = [good, bad]
    last = fails("fit", "--config", write(config, "sub/x.yaml"))
    assert last.endswith("trainer.callbacks[1].init_args.end: Expected a float, got low")
    config["trainer"]["callbacks"] = [good, {"class_path": "SoftWeightAnnealing", "init_args": {"start": 0.9}}]
    last = fails("fit", "--config", write(config, "sub/x.yaml"))
    assert "trainer.callbacks[1].init_args.end: missing, but SoftWeightAnnealing needs it" in last


STUDENT = "model.init_args.student"


def network(class_path, **arguments):
    return {"class_path": class_path, "init_args": arguments}


@pytest.mark.parametrize(
    ("student", "parts"),
    [
        (
            network("timm.create_model", model_name="resnet188"),
            [f"{STUDENT}.init_args.model_name: no such network", "closest names: resnet18, ", "got 'resnet188'"],
        ),
        (
            network("timm.create_model", model_name="no_such_net"),
            [f"{STUDENT}.init_args.model_name: no such network", "closest names: ", "got 'no_such_net'"],
        ),
        (
            network("timm.create_model", model_name="resnet18.none"),
            [f"{STUDENT}.init_args.model_name: no such weights", "resnet18.a1_in1k", "got 'resnet18.none'"],
        ),
        (
            network("timm.create_model", model_name="resnet18", checkpoint_path="gone.pth"),
            [f"{STUDENT}: FileNotFoundError"],
        ),
        (
            network("torchvision.models.get_model", name="resnet118"),
            [f"{STUDENT}.init_args.name: no such network", "resnet18", "got 'resnet118'"],
        ),
        (
            network("torchvision.models.get_model", name="resnet18") | {"dict_kwargs": {"weights": "NONE"}},
            [f"{STUDENT}.dict_kwargs.weights: no such name", "got 'NONE'"],
        ),
        (
            network("torchvision.models.resnet18", weights="IMAGENET1K_V9"),
            [f"{STUDENT}.init_args.weights", "IMAGENET1K_V1", "got IMAGENET1K_V9"],
        ),
    ],
)
def test_names_of_networks_and_weights(config, fails, student, parts):
    config["model"]["init_args"]["student"] = student
    Path("config.yaml").write_text(yaml.safe_dump(config))
    last = fails("fit", "--config", "config.yaml")
    assert all(part in last for part in parts), last


@pytest.mark.parametrize(
    ("class_path", "extra"),
    [("timm.create_model", "timm"), ("timm.models.create_model", "timm"), ("brevitas.nn.QuantLinear", "quant")],
)
def test_missing_extra(config, fails, monkeypatch, class_path, extra):
    package = class_path.partition(".")[0]
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    config["model"]["init_args"]["student"] = network(class_path)
    Path("config.yaml").write_text(yaml.safe_dump(config))
    last = fails("fit", "--config", "config.yaml")
    assert f"{STUDENT}.class_path: {package} is not installed: pip install 'kd-lightning[{extra}]'" in last


def test_message_without_a_key_gets_the_place_of_the_object(config, fails):
    config["model"]["init_args"]["student"] = network(f"{__name__}.Refuses")
    Path("config.yaml").write_text(yaml.safe_dump(config))
    assert fails("fit", "--config", "config.yaml").endswith(f"error: {STUDENT}: No network today")


class Refuses(nn.Module):
    """A network that cannot be built."""

    def __init__(self):
        raise LookupError("No network today")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("features.at.weight", "x", "features.at.init_args.weight: Expected a float, got x"),
        ("features.hint.weight", "x", "features has no hint; allowed: at"),
        (
            "features.at.wieght",
            "0.5",
            "features.at.init_args.wieght: FeatureTerm has no such key; did you mean weight?",
        ),
    ],
)
def test_mistakes_in_a_term_have_its_name(config, fails, option, value, message):
    loss = {"class_path": "kd_lightning.losses.AttentionTransferLoss"}
    term = {"class_path": "kd_lightning.FeatureTerm", "init_args": {"layers": {"5": "5"}, "loss": loss}}
    config["model"]["init_args"]["features"] = {"at": term}
    text = fails("fit", "--config", write(config, "x.yaml"), f"--model.{option}", value)
    assert text.startswith(f"error: model.init_args.{message}")
