"""The search space: what a config has keys for, and a project's own."""

from pathlib import Path

import pytest
import yaml

from kd_lightning.cli.parse import parse_config
from kd_lightning.cli.tuning.default_space import default_space, with_written_loss
from kd_lightning.cli.tuning.space import Setting, apply_values, check_space, for_baseline, read_space, write_space
from kd_lightning.errors import InputError

LR = "model.init_args.optimizer.init_args.lr"
WEIGHT = "model.init_args.soft_weight"
TEMPERATURE = "model.init_args.soft_loss.init_args.temperature"


@pytest.fixture
def plan(config):
    """The tiny config with a schedule, whole and with its loss written out."""
    cosine = {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR", "init_args": {"T_max": 8}}
    config["model"]["init_args"]["lr_scheduler"] = cosine
    config["trainer"]["max_epochs"] = 8
    Path("tiny.yaml").write_text(yaml.safe_dump(config))
    return with_written_loss(parse_config(["--config", "tiny.yaml"], "experiment"))


def test_default_space(plan):
    settings, notes = default_space(plan)
    assert settings == [
        Setting(LR, 0.001, 0.1, log=True),
        Setting(TEMPERATURE, 1.0, 10.0, log=True),
        Setting(WEIGHT, 0.1, 1.0),
        Setting("trainer.max_epochs", values=(2, 4, 8)),
    ]
    assert notes == ["T_max follows the number of epochs: schedules keep their shape"]
    check_space(settings, plan)
    assert for_baseline(settings, plan) == [settings[0], settings[3]]
    assert all(one.allows(value) for one, value in zip(settings, (0.01, 4.0, 0.5, 8), strict=True))
    changed = apply_values(plan, {"trainer.max_epochs": 2, LR: 0.05})
    arguments = changed["model"]["init_args"]
    assert arguments["lr_scheduler"]["init_args"]["T_max"] == 2
    assert arguments["optimizer"]["init_args"]["lr"] == 0.05
    assert apply_values(plan, {"trainer.max_epochs": 8}) == plan == apply_values(plan, {})


def test_own_space(plan):
    Path("space.yaml").write_text(
        "model.soft_weight: {low: 0.2, high: 0.4}\n"
        "trainer.max_epochs: {low: 2, high: 8}\n"
        f"{TEMPERATURE}: {{low: 1, high: 8, log: true}}\n"
        "data.init_args.batch_size: [16, 32]\n"
        "model.optimizer: [{class_path: torch.optim.SGD, init_args: {lr: 0.1}}, {class_path: torch.optim.Adam}]\n"
    )
    settings = read_space(Path("space.yaml"), plan)
    assert settings[:3] == [
        Setting(WEIGHT, 0.2, 0.4),
        Setting("trainer.max_epochs", 2, 8, whole=True),
        Setting(TEMPERATURE, 1, 8, log=True),  # 4.0 is no whole number
    ]
    assert settings[3].values == (16, 32) and settings[4].values[1] == {"class_path": "torch.optim.Adam"}
    assert [one.path for one in for_baseline(settings, plan)] == [one.path for one in (settings[1], *settings[3:])]
    write_space(settings, Path("written/space.yaml"))
    assert read_space(Path("written/space.yaml"), plan) == settings


def test_numbers_with_an_exponent(plan):
    """For YAML 1.1, ``1e-3`` is a text."""
    Path("space.yaml").write_text(f"{LR}: {{low: 1e-3, high: 1e-1, log: true}}\nmodel.soft_weight: [1e-1, 0.5]")
    settings = read_space(Path("space.yaml"), plan)
    assert settings == [Setting(LR, 0.001, 0.1, log=True), Setting(WEIGHT, values=(0.1, 0.5))]
    assert {*map(type, settings[1].values)} == {float}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold keys and their values"),
        ("{}", "must hold keys and their values"),
        ("- a", "must hold keys and their values"),
        ("{a: [", "cannot be read"),
        ("model.soft_weigth: [0.1]", "soft_weigth.* did you mean.*soft_weight"),
        ("model.optimizer.momentun: [0.1]", "momentun"),
        ("model.soft_weight: [a, b]", "soft_weight"),
        ("model.soft_weight: []", r"must be \{low:, high:, log:\} or a list of values, got \[\]"),
        ("model.soft_weight: 0.5", "must be .* or a list of values, got 0.5"),
        ("model.soft_weight: {low: 0.5}", "must be .* or a list of values"),
        ("model.soft_weight: {low: 0.5, hi: 1}", "must be .* or a list of values"),
        ("model.soft_weight: {low: 0.5, high: .nan}", "high must be a number, got NaN"),
        ("model.soft_weight: {low: true, high: 1}", "low must be a number, got true"),
        ("model.soft_weight: {low: 0.5, high: 0.5}", "low must be below high, got 0.5 and 0.5"),
        ("model.soft_weight: {low: 0, high: 1, log: true}", "low must be above 0 with log, got 0"),
        ("model.soft_weight: {low: 0.1, high: 1, log: 1}", "log must be true or false, got 1"),
        ("model.soft_weight: [0.1, 0.1]", "a value appears twice"),
        ("{model.soft_weight: [0.1], model.init_args.soft_weight: [0.2]}", "soft_weight appears twice"),
    ],
)
def test_wrong_space(plan, text, message):
    Path("space.yaml").write_text(text)
    with pytest.raises(InputError, match=message) as error:
        read_space(Path("space.yaml"), plan)
    assert "\n" not in str(error.value) and str(error.value).startswith("--space: space.yaml")


def whole(model, data=None, callbacks=None):
    """A config as the parser writes it, without parsing."""
    trainer = {"max_epochs": 1, "max_steps": -1, "callbacks": callbacks}
    return {"trainer": trainer, "model": model, "data": {"class_path": "D", "init_args": data or {}}}


def spec(name, **arguments):
    return {"class_path": name, "init_args": arguments}


def distill(**arguments):
    return spec(
        "kd_lightning.DistillModule", **{"soft_loss": None, "soft_weight": 0.9, "task": "multiclass"} | arguments
    )


def paths(config):
    settings, notes = default_space(with_written_loss(config))
    return [one.path for one in settings], notes


def test_the_default_loss_has_a_temperature():
    assert TEMPERATURE in paths(whole(distill()))[0]
    assert with_written_loss(whole(distill(task="regression"))) == whole(distill(task="regression"))
    apprentice = whole(distill() | {"class_path": "kd_lightning.ApprenticeModule"})
    written = with_written_loss(apprentice)["model"]["init_args"]["soft_loss"]["init_args"]
    assert written == {"temperature": 1.0, "task": "multiclass"}
    taught = whole(spec("kd_lightning.teach", module=spec("M"), soft_loss=None, soft_weight=0.9))
    assert with_written_loss(taught)["model"]["init_args"]["soft_loss"]["init_args"] == {"temperature": 4.0}
    student = whole(spec("kd_lightning.SupervisedModule", task="multiclass"))
    assert with_written_loss(student) == student


def test_several_losses_and_optimisers():
    losses = {"kd": [1.0, spec("kd_lightning.losses.KDLoss", temperature=2.0)], "mse": [1.0, spec("torch.nn.MSELoss")]}
    adam = spec("torch.optim.Adam", lr=0.01)
    found, _ = paths(whole(distill(soft_loss=losses, optimizer=adam, teacher_optimizer=adam)))
    assert found == [
        LR,
        "model.init_args.teacher_optimizer.init_args.lr",
        "model.init_args.soft_loss.kd[1].init_args.temperature",
        WEIGHT,
    ]


def test_the_highest_rate_of_a_cycle_takes_the_place_of_the_optimisers():
    cycle = spec("torch.optim.lr_scheduler.OneCycleLR", max_lr=0.1, total_steps=None)
    found, _ = paths(whole(distill(optimizer=spec("torch.optim.SGD", lr=0.01), lr_scheduler=cycle)))
    assert found[0] == "model.init_args.lr_scheduler.init_args.max_lr" and LR not in found


def test_annealed_numbers_are_left_out():
    annealing = [
        spec("kd_lightning.SoftWeightAnnealing", start=1, end=0),
        spec("kd_lightning.SoftWeightAnnealing", attribute="soft_loss.temperature", start=4, end=1),
    ]
    found, notes = paths(whole(distill(), callbacks=annealing))
    assert found == []
    assert notes == [f"{name} is not tuned: a callback anneals it" for name in ("soft_loss.temperature", "soft_weight")]


def test_crops():
    crop = spec("torchvision.transforms.v2.RandomResizedCrop", size=8, scale=[0.3, 0.9])
    chain = spec("torchvision.transforms.v2.Compose", transforms=[spec("v2.RandomHorizontalFlip"), crop])
    settings, _ = default_space(whole(distill(soft_weight=None), {"train_transform": chain}))
    path = "data.init_args.train_transform.init_args.transforms[1].init_args.scale[0]"
    assert settings == [Setting(path, 0.08, 0.9)]
    erasing = spec("torchvision.transforms.v2.RandomErasing", scale=[0.1, 0.3])
    assert default_space(whole(distill(soft_weight=None), {"train_transform": erasing}))[0] == []
    cached = distill(soft_weight=None, teacher=spec("kd_lightning.Teacher", cache="cache"))
    settings, notes = default_space(whole(cached, {"train_transform": chain}))
    assert settings == [] and "cache would hold other views" in notes[0]
