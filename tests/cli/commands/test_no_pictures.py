"""labels, query and clean on samples that are no pictures."""

import csv
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torch.utils.data import TensorDataset

from kd_lightning.__main__ import main
from kd_lightning.data import DatasetSource
from kd_lightning.data.identity import hash_item

CLASSES = 3


class Table(TensorDataset):
    """Rows of 12 numbers whose class can be learned."""

    def __init__(self, kind: str = "float", size: int = 150) -> None:
        generator = torch.Generator().manual_seed(0)
        y = torch.arange(size) % CLASSES
        x = torch.randn(size, 12, generator=generator) + 2 * torch.eye(CLASSES, 12)[y]
        super().__init__({"float": x, "half": x.half(), "bool": x > 1, "complex": x + 0j}[kind], y)


class TableSource(DatasetSource):
    """A table for training and one for the test."""

    def __init__(self, kind: str = "float") -> None:
        super().__init__(Table(kind), Table(kind, 30))


class Rows(nn.Module):
    """A network that takes numbers of any type."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, CLASSES))

    def forward(self, x):
        return self.layers(x.real.float() if x.is_complex() else x.float())


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return [*csv.DictReader(file)]


@pytest.fixture
def table_config(config):
    def make(kind="float"):
        source = {"class_path": f"{__name__}.TableSource", "init_args": {"kind": kind}}
        data = {"source": source, "labeled": 20, "batch_size": 16}
        config["data"] = {"class_path": "SemiSupervisedDataModule", "init_args": data}
        student = {"class_path": f"{__name__}.Rows"}
        config["model"] = {"class_path": "SupervisedModule", "init_args": {"student": student}}
        refresh = {
            "class_path": "PseudoLabelRefresh",
            "init_args": {"selection": {"class_path": "FixedThreshold", "init_args": {"threshold": 0.1}}},
        }
        config["trainer"] |= {"default_root_dir": "runs", "callbacks": [refresh]}
        Path("config.yaml").write_text(yaml.safe_dump(config))

    return make


@pytest.mark.parametrize("kind", ["float", "complex"])
def test_the_commands_end_well(table_config, kind, capsys):
    table_config(kind)
    main(["fit", "--config", "config.yaml"])
    run = Path("runs/tiny/version_0")
    data, hidden = Table(kind).tensors
    capsys.readouterr()

    main(["labels", str(run)])
    text = capsys.readouterr().out
    assert text.count("there is no contact sheet") == 1 and "Accepted labels of round 1" in text
    assert {path.suffix for path in (run / "pseudo_labels").iterdir()} == {".csv"}
    for row in rows(run / "pseudo_labels/round_0001.csv"):
        assert row["content"].partition("#")[0] == hash_item(data[int(row["index"])])

    main(["query", str(run), "--n", "5"])
    text = capsys.readouterr().out
    assert text.count("there is no contact sheet") == 1 and "query.png" not in text
    assert not (run / "query.png").exists()
    found = rows(run / "query.csv")
    assert len(found) == 5
    assert all(row["content"] == hash_item(data[int(row["index"])]) and row["path"] == "" for row in found)

    # the next fit has the labels, also where the samples have other indices
    labels = [row | {"label": str(int(hidden[int(row["index"])])), "index": "0"} for row in found]
    with (run / "query.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*found[0]])
        writer.writeheader()
        writer.writerows(labels)
    line = shlex.split(text[text.index("kd-lightning fit") :].replace("\\\n", " "))
    main(line[1:])
    next_split = yaml.safe_load(Path("runs/tiny/version_1/split.json").read_text())
    expected = sorted([int(row["index"]), int(hidden[int(row["index"])]), "clean", 1.0] for row in found)
    assert next_split["label_rows"] == expected


def test_clean(table_config, capsys):
    table_config()
    noise = ["--data.label_noise", "SymmetricNoise", "--data.label_noise.rate", "0.3"]
    main(["clean", "config.yaml", "--folds", "2", "--trainer.max_epochs", "8", *noise])
    text = capsys.readouterr().out
    out = Path("runs/tiny_clean")
    assert text.count("there is no contact sheet") == 1 and "suspects.png" not in text
    assert not (out / "suspects.png").exists()
    data = Table().tensors[0]
    for name in ("suspects.csv", "labels.csv"):
        found = rows(out / name)
        assert found and all(row["content"] == hash_item(data[int(row["index"])]) for row in found)
