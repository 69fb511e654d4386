"""``clean --part val``: wrong labels of the validation part, sampled or the source's own."""

import csv
import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from kd_lightning import SemiSupervisedDataModule
from kd_lightning.__main__ import main
from kd_lightning.data import Digits
from kd_lightning.runs.run import Run

CLEAN = """
name: quick
trainer: {max_epochs: 6, accelerator: cpu, enable_progress_bar: false, enable_model_summary: false}
model:
  class_path: SupervisedModule
  init_args:
    student: {class_path: DigitsCNN, init_args: {width: 8}}
    optimizer: {class_path: torch.optim.Adam, init_args: {lr: 0.01}}
data:
  class_path: SemiSupervisedDataModule
  init_args: {source: {class_path: Digits}, labeled: split.json, seed: 0}
"""


def spoil(load, targets):
    def loaded(self):
        parts = load(self)
        return parts._replace(train=parts.train._replace(targets=targets))

    return loaded


@pytest.mark.parametrize(("option", "value"), [("--folds", "3"), ("--action", "downweight")])
def test_options_of_clean_that_are_for_training(tmp_path, monkeypatch, fails, option, value):
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(CLEAN)
    assert f"{option} " in fails("clean", "config.yaml", "--part", "val", option, value)


@pytest.mark.slow
def test_clean_judges_an_own_part(tmp_path, monkeypatch, capsys):
    """Each part has its own files, so that both are corrected, one after the other."""
    monkeypatch.chdir(tmp_path)
    for part in ("train", "val"):
        for name, color in (("cats", 20), ("dogs", 230)):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(20):
                right = 250 - color if number == 7 else color
                Image.new("RGB", (12, 12), (right, right, number)).save(tmp_path / part / name / f"{number}.png")
    config = yaml.safe_load(CLEAN)
    source = {"class_path": "ImageFolder", "init_args": {"train": "train", "val": "val", "image_size": 8}}
    config["data"]["init_args"] = {"source": source, "batch_size": 10}
    student = {"class_path": "kd_lightning.models.resnet8", "init_args": {"num_classes": 2}}
    config["model"]["init_args"]["student"] = student
    Path("config.yaml").write_text(yaml.safe_dump(config))
    main(["clean", "config.yaml", "--folds", "2", "--action", "relabel"])
    main(["clean", "config.yaml", "--part", "val", "--action", "relabel"])
    capsys.readouterr()
    for folder, part in (("runs/quick_clean", "train"), ("runs/quick_clean/val", "val")):
        with Path(folder, "labels.csv").open() as file:
            found = {Path(row["path"]).parts[-3:]: row["label"] for row in csv.DictReader(file)}
        assert found == {(part, "cats", "7.png"): "dogs", (part, "dogs", "7.png"): "cats"}


@pytest.mark.slow
def test_clean_judges_validation_labels(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(CLEAN)
    digits = Digits().load().train
    wrong = digits.targets.clone()
    data = SemiSupervisedDataModule(Digits(), val_size=0.2, seed=0)
    data.setup("fit")
    data.save_split(Path("split.json"))  # a split by class would be another one with other labels
    spoiled = data.split.val[::20]
    wrong[spoiled] = (wrong[spoiled] + 1) % 10
    monkeypatch.setattr("kd_lightning.data.sources.digits.Digits.load", spoil(Digits.load, wrong))
    main(["clean", "config.yaml", "--part", "val", "--action", "relabel"])
    text = capsys.readouterr().out
    assert "validation labels" in text
    assert "--data.correct_val true" in text
    with Path("runs/quick_clean/val/labels.csv").open() as file:
        found = {int(row["index"]) for row in csv.DictReader(file)}
    assert found <= {*data.split.val}
    assert len(found & {*spoiled}) >= 0.7 * len(spoiled)
    capsys.readouterr()
    main(
        [
            "fit",
            "--config",
            "config.yaml",
            "--data.label_file",
            "runs/quick_clean/val/labels.csv",
            "--data.correct_val=true",
        ]
    )
    run = Run(Path("runs/quick/version_0"))
    rows = {row[0]: row[1] for row in json.loads((run.folder / "split.json").read_text())["label_rows"]}
    assert rows.keys() == found
    right = [index for index in found & {*spoiled} if rows[index] == digits.targets[index]]
    assert len(right) >= 0.6 * len(spoiled)
