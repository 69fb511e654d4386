"""Tensors as lists, chained schedules and groups of parameters on the command line and in config files."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable

from kd_lightning import SupervisedModule
from kd_lightning.__main__ import main
from kd_lightning.cli.parse import parse_config
from kd_lightning.runs.build import build
from kd_lightning.runs.run import Run

WEIGHT = [1, 2.5, 0.1, 1, 1, 1, 1, 1, 1, 1e-3]
HARD_LOSS = {"class_path": "torch.nn.CrossEntropyLoss", "init_args": {"weight": WEIGHT}}
COSINE = {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR"}
WARM_UP = {"class_path": "torch.optim.lr_scheduler.LinearLR", "init_args": {"start_factor": 0.1, "total_iters": 3}}
SCHEDULE = {
    "class_path": "kd_lightning.SequentialSchedule",
    "init_args": {"schedulers": [WARM_UP, COSINE], "milestones": [3]},
}
RUN = Path("runs/tiny/version_0")


def last_checkpoint(run=RUN):
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)


def test_a_run_with_all_of_them(config, capsys):
    """Fit, resume, test and read the saved config: the list stays as it was written."""
    arguments = config["model"]["init_args"]
    arguments |= {"hard_loss": HARD_LOSS, "lr_scheduler": SCHEDULE, "lr_interval": "step"}
    arguments |= {"weight_decay_exclude_1d": True}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", "config.yaml"])
    whole = last_checkpoint()
    (scheduler,) = whole["lr_schedulers"]
    assert scheduler["_schedulers"][1]["T_max"] == 8 - 3
    assert [group["name"] for group in whole["optimizer_states"][0]["param_groups"]] == ["decay", "no_decay"]
    saved = Run(RUN).model_arguments
    assert saved["hard_loss"]["init_args"]["weight"] == WEIGHT
    assert [type(number) for number in saved["hard_loss"]["init_args"]["weight"]] == [type(n) for n in WEIGHT]
    assert saved["lr_scheduler"]["init_args"]["schedulers"][1]["init_args"]["T_max"] is None
    assert Run(RUN).rows()

    capsys.readouterr()
    main(["fit", "--config", str(RUN / "config.yaml"), "--ckpt_path", "last"])  # the same run
    main(["test", "--config", "config.yaml"])
    assert [path.name for path in Path("runs/tiny").iterdir()] == ["version_0"]
    for key, value in whole["state_dict"].items():
        assert torch.equal(last_checkpoint()["state_dict"][key], value), key


def test_the_command_line(config, capsys):
    Path("config.yaml").write_text(yaml.safe_dump(config))
    given = ["--model.hard_loss", "torch.nn.CrossEntropyLoss", "--model.hard_loss.weight", str(WEIGHT)]
    with pytest.raises(SystemExit):
        main(["fit", "--config", "config.yaml", *given, "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["init_args"]["hard_loss"]["init_args"]["weight"] == WEIGHT


class Nulls(torch.nn.Module):
    """A network with arguments that may be null, also in a list."""

    def __init__(
        self, sizes: list[int | None] | None = None, name: str | None = "a", inner: torch.nn.Module | None = None
    ):
        super().__init__()


class TestNullsOfTheCommandLine:
    """An argument of an argument: jsonargparse makes the text None of null."""

    @pytest.fixture
    def printed(self, config, capsys, monkeypatch):
        module = ModuleType("project")
        module.Nulls = Nulls
        monkeypatch.setattr(Nulls, "__module__", "project")
        monkeypatch.setitem(sys.modules, "project", module)
        config["model"]["init_args"] |= {"lr_scheduler": COSINE | {"init_args": {"T_max": 3}}}
        Path("config.yaml").write_text(yaml.safe_dump(config))

        def parse(*given):
            with pytest.raises(SystemExit):
                main(["fit", "--config", "config.yaml", *given, "--print_config"])
            return yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]

        return parse

    @pytest.mark.parametrize(
        "given",
        [
            ["--model.init_args.lr_scheduler.init_args.T_max=null"],
            ["--model.lr_scheduler.T_max", "null"],
            ["--model.lr_scheduler.init_args.T_max=~"],
            [f"--model.lr_scheduler={COSINE | {'init_args': {'T_max': 'null'}}}".replace("'null'", "null")],
        ],
    )
    def test_a_number(self, printed, given):
        assert printed(*given)["lr_scheduler"]["init_args"]["T_max"] is None

    def test_null_for_an_object(self, printed):
        assert printed("--model.lr_scheduler=null")["lr_scheduler"] is None

    def test_other_values(self, printed):
        student = ["--model.student=project.Nulls", "--model.student.inner=project.Nulls"]
        given = printed(
            *student, "--model.student.init_args.inner.init_args.sizes=[1, null]", "--model.student.name=null"
        )
        assert given["student"]["init_args"]["name"] is None
        assert given["student"]["init_args"]["inner"]["init_args"]["sizes"] == [1, None]
        assert printed(*student, "--model.student.name=None")["student"]["init_args"]["name"] == "None"

    def test_what_takes_no_null(self, config, fails):
        Path("config.yaml").write_text(yaml.safe_dump(config))
        message = fails("fit", "--config", "config.yaml", "--model.student.width=null")
        place = "model.init_args.student.init_args.width"
        assert message == f"error: {place}: DigitsCNN takes no null here; leave the key out"


def test_help_of_an_argument_of_an_argument(capsys):
    main(["fit", "--model.help=DistillModule", "--model.student.help=DigitsCNN"])
    text = capsys.readouterr().out
    assert "--model.student.init_args.KEY VALUE" in text
    assert "\n  width " in text


WEIGHT_KEY = "model.init_args.hard_loss.init_args.weight: "
BCE = {"class_path": "torch.nn.BCEWithLogitsLoss"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hard_loss": HARD_LOSS | {"init_args": {"weight": ["a"]}}}, WEIGHT_KEY + "a tensor must be written as"),
        ({"hard_loss": HARD_LOSS | {"init_args": {"weight": [[1], [1, 2]]}}}, WEIGHT_KEY + "a tensor must be written"),
        ({"hard_loss": HARD_LOSS | {"init_args": {"weight": {"a": 1}}}}, WEIGHT_KEY + "a tensor must be written as"),
        (
            {"hard_loss": HARD_LOSS | {"init_args": {"wieght": [1]}}},
            "wieght: CrossEntropyLoss has no such key",
        ),
        (
            {"hard_loss": HARD_LOSS | {"init_args": {"weight": [1, 2]}}},
            "hard_loss.weight must hold one number for each of the student's 10 outputs, got the shape [2]",
        ),
        (
            {"lr_scheduler": {"class_path": "torch.optim.lr_scheduler.StepLR"}},
            "model.init_args.lr_scheduler.init_args.step_size: missing, but StepLR needs it",
        ),
        (
            {"lr_scheduler": COSINE | {"init_args": {"T_max": "long"}}},
            "model.init_args.lr_scheduler.init_args.T_max: Expected a int",
        ),
        (
            {"lr_scheduler": SCHEDULE | {"init_args": {"schedulers": [WARM_UP, COSINE], "milestones": [3, 4]}}},
            "lr_scheduler: milestones must be one fewer than the schedulers, of which there are 2, got [3, 4]",
        ),
        (
            {"lr_scheduler": SCHEDULE | {"init_args": {"schedulers": [WARM_UP, {**COSINE, "init_args": {"T": 1}}]}}},
            "CosineAnnealingLR has no such key",
        ),
    ],
)
def test_bad_values(config, fails, arguments, message):
    config["model"]["init_args"] |= arguments
    Path("config.yaml").write_text(yaml.safe_dump(config))
    assert message in fails("fit", "--config", "config.yaml")
    assert not Path("runs/tiny/version_0/checkpoints").exists()


def test_modules_of_others_need_the_length(config, fails, monkeypatch):
    """They build the schedule themselves."""
    module = ModuleType("project")

    class Foreign(LightningModule):
        def __init__(self, lr_scheduler: LRSchedulerCallable):
            super().__init__()

    class Ours(SupervisedModule):
        def __init__(self, head_scheduler: LRSchedulerCallable, **kwargs):
            super().__init__(**kwargs)

    for kind in (Foreign, Ours):
        kind.__module__, kind.__qualname__ = "project", kind.__name__
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, "project", module)
    own = {name: config["model"]["init_args"][name] for name in ("student", "optimizer")}
    for kind, arguments, name in (
        ("Foreign", {"lr_scheduler": COSINE}, "lr_scheduler"),
        ("Ours", {**own, "lr_scheduler": COSINE, "head_scheduler": COSINE}, "head_scheduler"),
    ):
        config["model"] = {"class_path": f"project.{kind}", "init_args": arguments}
        Path("config.yaml").write_text(yaml.safe_dump(config))
        message = f"error: model.init_args.{name}.init_args.T_max: missing, but CosineAnnealingLR needs it"
        assert fails("fit", "--config", "config.yaml") == message


def test_null_counts_as_left_out(config):
    config["model"]["init_args"] |= {"hard_loss": HARD_LOSS | {"init_args": {"weight": None}}}
    config["model"]["init_args"] |= {"lr_scheduler": COSINE | {"init_args": {"T_max": None}}}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", "config.yaml"])
    assert last_checkpoint()["lr_schedulers"][0]["T_max"] == 2


@pytest.mark.parametrize("nested", [False, True])
def test_aliases_stand_for_values_of_their_own(nested, tmp_path, monkeypatch):
    """The second place of an alias lost its dict_kwargs: a teacher of 1000 classes in place of 7."""
    monkeypatch.chdir(tmp_path)
    network = "{class_path: torchvision.models.resnet18, dict_kwargs: {num_classes: 7}}"
    model = f"class_path: DistillModule\ninit_args:\n  student: &net {network}\n  teacher: *net\n"
    data = "data: {class_path: SemiSupervisedDataModule, init_args: {source: {class_path: FakeData}}}\n"
    if nested:
        Path("model.yaml").write_text(model)
        Path("config.yaml").write_text(f"model: model.yaml\n{data}")
    else:
        Path("config.yaml").write_text("model:\n  " + model.replace("\n", "\n  ") + f"\n{data}")
    arguments = parse_config(["--config=config.yaml"], "fit")["model"]["init_args"]
    for role in ("student", "teacher"):
        assert arguments[role]["init_args"]["num_classes"] == 7
    same = {"class_path": "torchvision.models.resnet18", "dict_kwargs": {"num_classes": 7}}
    config = {"class_path": "DistillModule", "init_args": {"student": same, "teacher": same}}
    built = build(LightningModule, config)
    assert built.student.fc.out_features == built.teacher.network.fc.out_features == 7
