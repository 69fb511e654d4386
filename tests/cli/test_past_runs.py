"""Finished runs of a config and of its baseline, and what doctor makes of them."""

from contextlib import suppress
from pathlib import Path

import yaml

from kd_lightning.__main__ import main
from kd_lightning.cli.baseline import baseline_of, with_seed
from kd_lightning.cli.fit_once import fit_once
from kd_lightning.cli.parse import parse_config
from kd_lightning.cli.past_runs import past_runs
from kd_lightning.data import Digits, SemiSupervisedDataModule
from tests.cli.commands.test_doctor import Forms


def find(*overrides, seed=0):
    data = SemiSupervisedDataModule(Digits(), labeled=5, batch_size=32, seed=seed)
    data.setup("fit")
    args = ["--config", "config.yaml", "--data.seed", str(seed), *overrides]
    return past_runs(parse_config(args, "doctor"), data)


def test_past_runs(config, capsys):
    config["trainer"] |= {"max_epochs": 1, "callbacks": [{"class_path": "GradientBalance"}]}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    assert find()[1:] == (None, None, None, True)
    whole = with_seed(parse_config(["--config", "config.yaml"], "experiment"), 0)
    for one in (whole, parse_config(baseline_of(whole), "experiment")):  # as experiment does
        fit_once(one)
    capsys.readouterr()

    found = find()
    assert found.taught.folder == Path("runs/tiny/version_0")
    assert found.alone.folder == Path("runs/tiny_alone/version_0") and found.config["name"] == "tiny"
    assert find(seed=1)[1:3] == (None, None)  # another split
    other = find("--model.soft_weight", "0.25")  # another method, and the same baseline
    assert other.taught is None and other.alone.folder == Path("runs/tiny_alone/version_0")
    weights = Path("runs/tiny/version_0/student.safetensors")
    weights.rename(weights.with_suffix(".away"))
    assert find().taught is None
    weights.with_suffix(".away").rename(weights)
    assert past_runs(found.config, Forms("tensor"))[1:] == (None, None, None, False)

    with suppress(SystemExit):  # the teacher is untrained
        main(["doctor", "--config", "config.yaml", "--seed_everything", "0", "--data.seed", "0"])
    printed = capsys.readouterr().out
    assert "student alone: runs/tiny_alone/version_0 is right on " in printed
    assert "following: the student of runs/tiny/version_0 and the teacher decide alike on " in printed
    assert "with those of runs/tiny/version_0)" in printed and "not checked: " not in printed.partition("memory")[2]
