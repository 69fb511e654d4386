"""A search as a whole: on validation samples alone, resumed, alike for the method and its baseline."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from kd_lightning import Digits
from kd_lightning.__main__ import main
from kd_lightning.cli.baseline import baseline_of, with_seed
from kd_lightning.cli.commands.experiment import _datamodule
from kd_lightning.cli.fit_once import fit_once
from kd_lightning.cli.parse import parse_config
from kd_lightning.cli.tuning import tune as module
from kd_lightning.cli.tuning.trial import Metric, Watch
from kd_lightning.cli.tuning.tune import tune
from kd_lightning.errors import InputError
from kd_lightning.models import DigitsCNN
from kd_lightning.runs.csv_logger import read_metrics

pytestmark = pytest.mark.usefixtures("parsed_once")

LR = "model.init_args.optimizer.init_args.lr"


@pytest.fixture
def quick(config):
    """The tiny config with few labels, whose optimiser learns something in 2 epochs."""
    config["trainer"]["limit_train_batches"] = 3
    config["model"]["init_args"]["optimizer"]["init_args"]["lr"] = 0.03
    return config


@pytest.fixture
def search(quick, monkeypatch):
    """Runs a search; gives what was chosen, and the searches of the baseline and of the method."""

    def run(total=2, space=None, out="out", **changes):
        for key, value in changes.items():
            section, _, name = key.partition("__")
            part = quick[section]["init_args"] if section in ("data", "model") else quick.setdefault(section, {})
            part[name] = value
        Path("tiny.yaml").write_text(yaml.safe_dump(quick))
        file = None
        if space is not None:
            file = Path("space.yaml")
            file.write_text(yaml.safe_dump(space))
        kept = []
        choose = module._choose
        monkeypatch.setattr(module, "_choose", lambda sides, *rest: kept.extend(sides) or choose(sides, *rest))
        whole = parse_config(["--config", "tiny.yaml"], "experiment")
        tuned = tune(with_seed(whole, 0), _datamodule(whole), total, file, Path(out))
        monkeypatch.setattr(module, "_choose", choose)
        return tuned, *(side.search for side in kept)

    return run


def figures(*searches):
    return [[(one.number, one.state, one.value, one.values, one.folds) for one in s.ended()] for s in searches]


@pytest.mark.slow
def test_a_trial_is_the_fit_that_it_stands_for(search, capsys, monkeypatch):
    tuned, alone, method = search(out="out")
    assert [len(one.ended()) for one in (alone, method)] == [2, 2]
    assert method.ended()[1].values.keys() > alone.ended()[1].values.keys() == {LR, "trainer.max_epochs"}
    assert not [*Path("out").rglob("*.ckpt")] and not [*Path("out").rglob("*.safetensors")]
    text = capsys.readouterr().out
    assert "tune: the 119 validation samples decide" in text and f"tune: {LR}: 0.003 to 0.3, log\n" in text
    assert "soft_weight: 0.1 to 1 (the method alone)\n" in text
    assert "trial 1/2 of tiny_alone: val/accuracy" in text and "trial 2/2 of tiny: val/accuracy" in text
    assert text.count("; done\n") == 1 and "left" in text
    for one, config, is_alone in ((alone, tuned.alone, True), (method, tuned.method, False)):
        best = one.best()
        # the value is the best one of the run, whose weights are deployed
        [metrics] = (one.folder / f"trial_{best.number - 1:04d}").rglob("metrics.csv")
        assert best.value == max(row["val/accuracy"] for row in read_metrics(metrics) if "val/accuracy" in row)
        run = fit_once(parse_config(baseline_of(config), "experiment") if is_alone else config)
        assert best.value == max(row["val/accuracy"] for row in run.validations())

    def garbage(self, load=Digits.load):
        parts = load(self)
        x, y = parts.test.images.tensors[0], parts.test.targets
        x[:] = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
        y[:] = y.flip(0)
        return parts

    monkeypatch.setattr(Digits, "load", garbage)
    _, *others = search(out="other")
    assert figures(*others) == figures(alone, method)  # no test sample is read
    assert [one.study_name for one in others] == [one.study_name for one in (alone, method)]


@pytest.mark.slow
def test_stopped_and_resumed(search, monkeypatch, capsys):
    space = {"model.soft_weight": [0.2, 0.5], LR: {"low": 0.01, "high": 0.1, "log": True}}
    _, *unbroken = search(space=space, out="unbroken", trainer__max_epochs=1)
    report = Watch.on_validation_end
    seen = []

    def stop(self, trainer, pl_module):
        report(self, trainer, pl_module)
        if not trainer.sanity_checking:
            seen.append(trainer.default_root_dir)
        if len(seen) == 2:  # in the second trial
            raise KeyboardInterrupt

    monkeypatch.setattr(Watch, "on_validation_end", stop)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        search(space=space)
    assert "trial_0001" in seen[1] and not [*Path("out").rglob("trial_0001/fit_0")]
    monkeypatch.setattr(Watch, "on_validation_end", report)
    capsys.readouterr()
    _, *resumed = search(space=space)
    assert "tune: 1 of 2 trials of tiny_alone are finished" in capsys.readouterr().out
    assert figures(*resumed) == figures(*unbroken)
    _, *again = search(space=space)
    assert "trial " not in capsys.readouterr().out.replace("in trial ", "")
    assert figures(*again) == figures(*resumed)
    # another config of the same name
    _, alone, method = search(total=1, space=space, model__soft_weight=0.7)
    assert {alone.study_name, method.study_name} & {one.study_name for one in resumed} == {alone.study_name}


@pytest.mark.slow
def test_a_trial_that_fails(search, capsys):
    _, alone, _ = search(total=3, space={LR: [1e25, 0.03]}, trainer__max_epochs=1)
    failed = [one for one in alone.ended() if one.state == "failed"]
    assert failed and all("not" in one.reason and one.values == {LR: 1e25} for one in failed)
    assert alone.best().values in ({}, {LR: 0.03})
    assert "failed: " in capsys.readouterr().out


@pytest.mark.slow
def test_own_values_that_diverge_and_others_that_do_not(search):
    _, alone, _ = search(
        total=3, space={LR: [0.01, 0.03]}, trainer__max_epochs=1, model__optimizer={
            "class_path": "torch.optim.AdamW", "init_args": {"lr": 1e25},
        },
    )  # fmt: skip
    assert alone.ended()[0].state == "failed"
    assert alone.best().number > 1


@pytest.mark.slow
def test_folds_of_few_labels_and_a_label_file(search, capsys):
    digits = Digits().load().train.targets
    text = "index,label,kind\n" + "".join(f"{n},{int(digits[n])},noisy\n" for n in range(0, 100, 4))
    Path("labels.csv").write_text(text)
    tuned, alone, method = search(
        total=1,
        space={"trainer.max_epochs": [1]},
        trainer__max_epochs=1,
        checkpoint__monitor="val/loss",
        data__labeled=3,
        data__val_size=0,
        data__unlabeled="none",
        data__label_file="labels.csv",
    )
    text = capsys.readouterr().out
    assert "0 validation samples are fewer than 100, so" in text and "n = 5" in text
    for one in (alone, method):
        [trial] = one.ended()
        assert len(trial.folds) >= 3 and min(trial.folds) <= trial.value <= max(trial.folds)
        assert one.metric == Metric("val/loss", "min", best=False)  # without validation, the last weights are deployed
    assert tuned.method["data"]["init_args"]["label_file"] == "labels.csv"  # of the config, not of a fold
    assert tuned.method["data"]["init_args"]["labeled"] == 3
    assert "folds of all" in tuned.remarks[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"checkpoint__monitor": "val/accuracy2", "checkpoint__mode": "max"},
            "val/accuracy2 is not logged.*val/accuracy",
        ),
        ({"checkpoint__monitor": "train/loss"}, "needs a metric of validation as checkpoint.monitor, got train/loss"),
        ({"data__labeled": 1, "data__val_size": 0}, "0 validation samples are too few"),
        ({"trainer__check_val_every_n_epoch": 5}, "no validation ran"),
        ({"model__teacher": None}, "teacher"),
    ],
)
def test_refused(search, changes, message):
    with pytest.raises(InputError, match=message) as error:
        search(total=1, space={LR: [0.03]}, **changes)
    assert "\n" not in str(error.value)


def test_nothing_to_tune(search, monkeypatch):
    monkeypatch.setattr(module, "default_space", lambda config: ([], []))
    with pytest.raises(InputError, match="the config has no key of the default space; name keys and values by --space"):
        search()


def test_without_optuna(search, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match=r"--tune needs optuna: pip install 'kd-lightning\[tune\]'"):
        search()


def test_arguments(config, fails):
    Path("tiny.yaml").write_text(yaml.safe_dump(config))
    Path("space.yaml").touch()
    assert "--tune must be at least 1, got 0" in fails("experiment", "tiny.yaml", "--tune", "0")
    assert "--space: space.yaml needs --tune N" in fails("experiment", "tiny.yaml", "--space", "space.yaml")
    text = fails("experiment", "tiny.yaml", "--tune", "2", "--space", "gone.yaml")
    assert "--space: no file at gone.yaml" in text
    assert "space.yaml must hold keys" in fails("experiment", "tiny.yaml", "--tune", "2", "--space", "space.yaml")


@pytest.mark.slow
def test_experiment(quick, capsys, monkeypatch):
    torch.manual_seed(0)
    torch.save(DigitsCNN(8).state_dict(), "teacher.pt")
    quick["trainer"]["max_epochs"] = 1
    Path("tiny.yaml").write_text(yaml.safe_dump(quick))
    Path("space.yaml").write_text(f"{LR}: [0.003, 0.1]\n")
    arguments = ["experiment", "tiny.yaml", "--seeds", "2", "--tune", "2", "--space", "space.yaml"]
    main(arguments)
    first = capsys.readouterr().out
    out = Path("runs/tiny_tuned_comparison")
    content = json.loads((out / "comparison.json").read_text())
    assert [group["name"] for group in content["groups"]] == ["tiny_alone_tuned", "tiny_tuned"]
    assert all(len(group["runs"]) == 2 for group in content["groups"])
    said = "Both were tuned by 2 trials each, at seed 0, without any test sample: the 119 validation samples decide."
    assert content["remarks"][0] == said and len(content["remarks"]) == 4
    assert said in (out / "comparison.md").read_text() and said in (out / "report.html").read_text()
    for name, run in (("tiny", "tiny_tuned"), ("tiny_alone", "tiny_alone_tuned")):
        file = out / f"tuned_{name}.yaml"
        assert f"tune: written to {file}" in first and file.read_text().startswith(f"# {said}\n")
        chosen = parse_config(["--config", str(file)], "experiment")
        assert chosen["name"] == run and chosen["seed_everything"] == 0
        assert fit_once(chosen).seeds == (0, 0)
        assert "is done" in capsys.readouterr().out
    main(arguments)
    assert capsys.readouterr().out.count("is done") == 4
    for run in ("tiny_tuned", "tiny_alone_tuned"):
        assert sorted(path.name for path in Path("runs", run).iterdir()) == ["version_0", "version_1"]
    main(["report", str(out)])
    assert said in (out / "report.html").read_text()
