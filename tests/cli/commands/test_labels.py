"""labels: the tables of a run's ledger, its least confident images, and the cross-fitted precision."""

import csv
import json
import shutil
from collections import Counter
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from scipy.stats import beta
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import kd_lightning.cli.commands.labels as command
import kd_lightning.cli.cross_fitting
from kd_lightning.__main__ import main as command_line
from kd_lightning.cli.arguments import parse
from kd_lightning.cli.commands.labels import (
    Estimate,
    aggregate,
    cross_fit,
    explain,
)
from kd_lightning.data import Digits, SemiSupervisedDataModule
from kd_lightning.data.splits import Split, make_split
from kd_lightning.errors import InputError
from kd_lightning.pseudo_labels.ledger import read_round, write_round
from kd_lightning.pseudo_labels.table import PseudoLabels, PseudoValues
from kd_lightning.pseudo_labels.values_ledger import write_values
from kd_lightning.runs.run import Run

TARGETS = Digits().load().train.targets
NAMES = [str(number) for number in range(10)]


def main(args):
    """Run the command; errors come as they are."""
    command.main(parse("labels", args))


def labels(label, confidence, accepted, *, index=None, changed=None, number=0, epoch=1):
    """A table from plain lists."""
    size = len(label)
    index = torch.arange(size) if index is None else torch.tensor(index)
    changed = torch.zeros(size, dtype=torch.bool) if changed is None else torch.tensor(changed, dtype=torch.bool)
    accepted = torch.tensor(accepted, dtype=torch.bool)
    return PseudoLabels(index, torch.tensor(label), torch.tensor(confidence), accepted, changed, number, epoch)


def cells(text, title):
    """The rows of a printed table."""
    lines = text.split(title)[1].split("\n\n")[0].split("\n \n")[0].splitlines()
    start = next(number for number, line in enumerate(lines) if "───" in line) + 1
    rows = []
    for line in lines[start:]:
        if not line.strip():
            break
        rows.append([cell.strip() for cell in line.split("  ") if cell.strip()])
    return rows


@pytest.fixture
def run(tmp_path):
    """A run of two rounds on the digits, as fit leaves it; nothing was trained."""
    folder = tmp_path / "runs" / "tiny" / "version_0"
    split = make_split(TARGETS, 5, 0.1, 0)
    split.save(folder / "split.json")
    data = {"class_path": "SemiSupervisedDataModule", "init_args": {"source": {"class_path": "Digits"}}}
    data["init_args"] |= {"labeled": 20, "seed": 7}  # another split, if it were made again
    config = {"name": "tiny", "data": data, "model": {}, "trainer": {}, "checkpoint": {}, "ckpt_path": None}
    config["trainer"] |= {"accelerator": "cpu", "devices": 1, "num_nodes": 1}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    index = split.unlabeled[:8]
    first = labels([0, 0, 1, 1, 2, 2, 3, 3], [0.5] * 8, [1] + 7 * [0], index=index)
    confidence = [0.9, 0.3, 0.8, 0.7, 0.3, 0.6, 0.2, 1.0]
    second = {"changed": [1, 0, 0, 1, 0, 0, 0, 0], "number": 1, "epoch": 4, "index": index}
    write_round(folder, first, NAMES, lambda index: None)
    second = labels([0, 0, 0, 1, 2, 2, 3, 3], confidence, [1, 0, 1, 1, 0, 0, 0, 1], **second)
    write_round(folder, second, NAMES, lambda index: None)
    return folder


def test_tables(run, capsys):
    main([str(run)])
    text = capsys.readouterr().out
    rounds = cells(text, "Pseudo-labels")
    assert rounds[0][:7] == ["0", "1", "8", "1 (12.5 %)", "-", "0.500", "0.500"]
    # (0.9 + 0.3 + 0.8 + 0.7 + 0.3 + 0.6 + 0.2 + 1) / 8 and (0.9 + 0.8 + 0.7 + 1) / 4
    assert rounds[1][:7] == ["1", "4", "8", "4 (50.0 %)", "25.0", "0.600", "0.850"]
    assert rounds[1][7] == "2 0.0 % ... 0 50.0 %"
    classes = cells(text, "Accepted labels of round 1")
    assert classes[:4] == [
        ["0", "2", "50.0", "0.850", "10.0"],
        ["1", "1", "25.0", "0.700", "10.0"],
        ["2", "0", "0.0", "-", "10.0"],
        ["3", "1", "25.0", "1.000", "10.0"],
    ]
    assert [row[0] for row in classes] == NAMES
    assert max(map(len, text.splitlines()[:-1])) <= 130 and "…" not in text


def test_another_round(run, capsys):
    main([str(run), "--round", "0"])
    rows = cells(capsys.readouterr().out, "Accepted labels of round 0")
    assert rows[0] == ["0", "1", "100.0", "0.500", "10.0"]
    with pytest.raises(InputError, match=r"has rounds 0 ... 1, got 2"):
        main([str(run), "--round", "2"])


def test_nothing_accepted(run, capsys):
    write_round(run, labels([0, 1], [0.5, 0.5], [0, 0], number=2), NAMES, lambda index: None)
    main([str(run)])
    text = capsys.readouterr().out
    assert cells(text, "Pseudo-labels")[2] == ["2", "1", "2", "0 (0.0 %)", "0.0", "0.500", "-", "-"]
    assert cells(text, "Accepted labels of round 2")[0] == ["0", "0", "-", "-", "10.0"]


def test_many_classes_and_names_with_brackets(run, capsys):
    """Of 50 classes the extremes; a name is never taken for a style."""
    names = [f"[red]{number}" for number in range(50)]
    many = labels([*range(50), 49], [0.5] * 51, [1] * 51, number=2)
    write_round(run, many, names, lambda index: None)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"] = {}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(InputError):
        main([str(run)])
    text = capsys.readouterr().out
    rows = cells(text, "Accepted labels of round 2")
    assert len(rows) == 30 and ["[red]49", "2", "3.9", "0.500", "-"] in rows
    # 50 here, and the 4 names of the other rounds
    assert "the 15 rarest and the 15 most frequent of 54 classes" in " ".join(text.split())


@pytest.fixture
def seen(monkeypatch):
    """The arguments of the contact sheet."""
    calls = []
    real = command.write_contact_sheet

    def spy(out, images, captions, title):
        calls.append((images, captions))
        return real(out, images, captions, title)

    monkeypatch.setattr(command, "write_contact_sheet", spy)
    return calls


def test_sheet_shows_the_least_confident(run, seen, capsys):
    main([str(run), "--images", "3"])
    path = run / "pseudo_labels" / "doubtful.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert str(path) in capsys.readouterr().out
    index = make_split(TARGETS, 5, 0.1, 0).unlabeled[:8]
    images, captions = seen[0]
    # 0.2, then the two of 0.3, the lower index first
    found = [(3, 20, index[6]), (0, 30, index[1]), (2, 30, index[4])]
    assert captions == [f"looks like {name}\nconfidence {share}.0%\n{sample}" for name, share, sample in found]
    pixels = Digits().load().train.images.tensors[0]
    assert all(torch.equal(image, pixels[index[row]]) for image, row in zip(images, (6, 1, 4), strict=True))


def test_out(run, seen, tmp_path):
    main([str(run), "--out", str(tmp_path / "new" / "sheet.pdf")])
    assert (tmp_path / "new" / "sheet.pdf").read_bytes().startswith(b"%PDF")
    assert len(seen[0][0]) == 8
    with pytest.raises(InputError, match="--out: .*docx"):
        main([str(run), "--out", str(tmp_path / "sheet.docx")])
    with pytest.raises(InputError, match="--images must be at least 1, got 0"):
        main([str(run), "--images", "0"])


def test_the_split_is_the_runs_own(run):
    assert Run(run).datamodule().split == make_split(TARGETS, 5, 0.1, 0)


def test_the_split_has_the_labels_of_a_label_file(run, tmp_path):
    """The file is not read again: it may be gone, or another by now."""
    answered = Split.load(run / "split.json", TARGETS).with_label_rows([[0, 3, "noisy", 1.0]])
    answered.save(run / "split.json")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["init_args"]["label_file"] = str(tmp_path / "gone.csv")
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    data = Run(run).datamodule()
    assert data.split == answered and data.visible_labels()[0] == 3


def test_no_ledger(run):
    with pytest.raises(InputError, match="name one of its runs: version_0"):
        main([str(run.parent)])
    shutil.rmtree(run / "pseudo_labels")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["trainer"]["max_epochs"] = 2
    refresh = {"class_path": "kd_lightning.callbacks.PseudoLabelRefresh", "init_args": {"warmup_epochs": 3}}
    config["trainer"]["callbacks"] = [refresh]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match="comes after warmup_epochs, 3 epochs; the run has 2 of them"):
        main([str(run)])
    config["trainer"]["callbacks"] = None
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match="has no ledger of pseudo-labels.*; add PseudoLabelRefresh"):
        main([str(run)])
    with pytest.raises(InputError, match="nowhere is no run: it does not exist"):
        main([str(run / "nowhere")])


def test_damaged_ledger(run):
    (run / "pseudo_labels" / "round_0001.csv").write_text("round,epoch\n")
    with pytest.raises(InputError, match="round_0001.csv, line 1: the ledger is damaged: "):
        main([str(run)])


def test_figures_are_shown_without_the_data(run, capsys):
    """The tables come first; then what is missing."""
    config = (run / "config.yaml").read_text()
    for text, message in (
        ("a: [", "config.yaml cannot be read: "),
        ("name: tiny\nmodel: {}", "has no data"),
        (config.replace("class_path: Digits", "class_path: Numbers"), "the data of .* cannot be read: .*Numbers"),
    ):
        (run / "config.yaml").write_text(text)
        with pytest.raises(InputError, match=message):
            main([str(run)])
        text = capsys.readouterr().out
        assert cells(text, "Pseudo-labels")[1][3] == "4 (50.0 %)"
        assert cells(text, "Accepted labels of round 1")[0] == ["0", "2", "50.0", "0.850", "-"]
    (run / "config.yaml").write_text(config)
    split = json.loads((run / "split.json").read_text())
    (run / "split.json").write_text(json.dumps(split | {"seed": 1}))
    with pytest.raises(InputError, match="split.json was changed after it was written"):
        main([str(run)])


def test_a_run_without_a_config(run, capsys, tmp_path):
    """As one that was made in Python: the tables come, and the line that there are no images is no error."""
    (run / "config.yaml").unlink()
    main([str(run)])
    text = capsys.readouterr().out
    assert cells(text, "Pseudo-labels")[1][3] == "4 (50.0 %)"
    assert cells(text, "Accepted labels of round 1")[0] == ["0", "2", "50.0", "0.850", "-"]
    assert text.splitlines()[-1].startswith(f"no contact sheet: {run} has no config.yaml")
    with pytest.raises(InputError, match="is no run: it has no config.yaml"):
        main([str(run), "--out", str(tmp_path / "sheet.png")])
    with pytest.raises(InputError, match="is no run: it has no config.yaml"):
        main([str(run), "--cross-fit", "2"])


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A run on files: two labeled ones of two classes, and a pool of three."""
    monkeypatch.chdir(tmp_path)
    for name in ("train/cat/0.png", "train/dog/1.png", "pool/a.png", "pool/b.png", "pool/c.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((9, 7, 3), len(name) + ord(name[-5]), dtype=np.uint8)).save(name)
    source = {"class_path": "ImageFolder", "init_args": {"train": "train", "unlabeled": "pool", "image_size": 8}}
    arguments = {"source": source, "unlabeled": "source", "val_size": 0}
    run = Path("runs/files/version_0")
    run.mkdir(parents=True)
    config = {"model": {}, "data": {"class_path": "SemiSupervisedDataModule", "init_args": arguments}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    data = Run(run).datamodule()
    table = labels([0, 1, 1], [0.5, 0.75, 0.25], [1, 1, 1], index=[2, 3, 4])
    write_round(run, table, data.class_names, data.path, data.content)
    return run


def caption(sample, file, name, percent):
    """A person finds the file in the table of pseudo-labels by its name."""
    return f"looks like {name}\nconfidence {percent}%\n{sample}: {file}.png"


def test_files(files, seen, capsys):
    main([str(files)])
    assert seen[0][1] == [caption(4, "c", "dog", 25.0), caption(2, "a", "cat", 50.0), caption(3, "b", "dog", 75.0)]
    assert all(isinstance(image, Image.Image) and image.size == (7, 9) for image in seen[0][0])
    assert cells(capsys.readouterr().out, "Accepted labels of round 0") == [
        ["cat", "1", "33.3", "0.500", "50.0"],
        ["dog", "2", "66.7", "0.500", "50.0"],
    ]


def test_files_that_moved_with_their_config(files, seen):
    """What counts is that it is the same file."""
    Path("pool").rename("elsewhere")
    config = (files / "config.yaml").read_text()
    (files / "config.yaml").write_text(config.replace("unlabeled: pool", "unlabeled: elsewhere"))
    main([str(files)])
    assert len(seen) == 1


@pytest.mark.parametrize("content", [True, False])
def test_files_that_moved_in_order(files, seen, content):
    """A new image has the index of another one. Older ledgers have no contents."""
    if not content:
        path = files / "pseudo_labels/round_0000.csv"
        with path.open(newline="") as file:
            rows = [row[:4] + row[5:] for row in csv.reader(file)]
        with path.open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    before = [np.array(Image.open(f"pool/{name}.png")) for name in "cab"]
    Image.new("RGB", (7, 9)).save("pool/aa.png")
    main([str(files)])
    assert seen[0][1] == [caption(5, "c", "dog", 25.0), caption(2, "a", "cat", 50.0), caption(4, "b", "dog", 75.0)]
    assert all(np.array_equal(image, old) for image, old in zip(seen[0][0], before, strict=True))


def test_files_that_were_renamed(files, seen, capsys):
    """Content decides, and a file at the old path of another one is not taken for it."""
    before = np.array(Image.open("pool/a.png"))
    Path("pool/a.png").rename("pool/d.png")
    Path("pool/c.png").unlink()
    Path("pool/b.png").rename("pool/c.png")
    main([str(files)])
    assert seen[0][1] == [caption(3, "d", "cat", 50.0), caption(2, "c", "dog", 75.0)]
    assert np.array_equal(seen[0][0][0], before)
    assert "has changed: 1 of its 3 samples are gone (pool/c.png)" in capsys.readouterr().out


def test_files_that_changed(files, seen, capsys):
    Image.new("RGB", (7, 9)).save("pool/b.png")
    main([str(files)])
    assert len(seen[0][0]) == 3
    assert "has changed: 1 of its 3 samples have another content (pool/b.png)" in capsys.readouterr().out
    Path("pool/c.png").write_text("no image")
    with pytest.raises(InputError, match=r"image pool.c.png cannot be read"):
        main([str(files)])
    for path in Path("pool").iterdir():
        path.unlink()
    Image.new("RGB", (7, 9), 50).save("pool/new.png")
    with pytest.raises(InputError, match="has changed: 3 of its 3 samples are gone"):
        main([str(files)])
    shutil.rmtree("pool")
    with pytest.raises(InputError, match=r"the data of .* cannot be read: unlabeled: pool must hold images"):
        main([str(files)])


# Cross-fitting.


def rounds(folder, *tables):
    """Written, and read again."""
    return [read_round(write_round(folder, table, ["cat", "dog"], lambda index: None)) for table in tables]


def test_counts(tmp_path):
    """Two folds; only held-out samples count, and only rounds that both have."""
    truth = {0: "cat", 1: "dog", 4: "cat", 6: "dog", 7: "dog"}
    at = {"index": [0, 1, 2, 4, 6, 7]}
    first = rounds(
        tmp_path / "0",
        # held out 0, 1, 6: right, right, wrong
        labels([0, 1, 0, 1, 0, 1], [0.5] * 6, [1, 0, 1, 1, 1, 1], **at),
        labels([1, 0, 0, 0, 0, 1], [0.5] * 6, [1, 0, 1, 1, 0, 1], number=1, epoch=3, **at),
        labels([0, 1, 0, 0, 1, 1], [0.5] * 6, [1] * 6, number=2, epoch=5, **at),
    )
    second = rounds(
        tmp_path / "1",
        # held out 4, 7: right, wrong
        labels([1, 0, 0, 0, 0, 0], [0.5] * 6, [1, 1, 1, 1, 1, 0], **at),
        labels([1, 0, 0, 0, 0, 1], [0.5] * 6, [0, 0, 0, 0, 0, 0], number=1, epoch=3, **at),
        labels([1, 0, 0, 0, 0, 1], [0.5] * 6, [1] * 6, number=2, epoch=4, **at),  # stopped early
    )
    found = aggregate([first, second], [[0, 1, 6], [4, 7]], truth)
    # round, epoch, held out, right, accepted, of these right
    assert [astuple(one) for one in found] == [(0, 1, 5, 3, 3, 2), (1, 3, 5, 2, 1, 0)]
    with pytest.raises(InputError, match="round 0 of a fold has no label of sample 5"):
        aggregate([first, second], [[0], [4, 5]], truth)
    with pytest.raises(InputError, match="no round of the same epoch in common"):
        aggregate([first[2:], second[2:]], [[0], [4]], truth)


@pytest.mark.parametrize(("right", "count"), [(7, 9), (0, 4), (4, 4)])
def test_interval(right, count):
    """Clopper and Pearson's, by quantiles of the beta distribution."""
    share, low, high = Estimate(0, 0, held_out=count, right=right).precision(accepted=False)
    assert share == right / count
    assert low == pytest.approx(beta.ppf(0.025, right, count - right + 1) if right else 0)
    assert high == pytest.approx(beta.ppf(0.975, right + 1, count - right) if right < count else 1)
    assert Estimate(0, 0, held_out=count, right=right).precision(accepted=True) is None


def test_explanation_names_weights_that_may_be_trained_on_the_labels():
    loaded = {"class_path": "kd_lightning.load_weights", "init_args": {"model": {}, "path": "teacher.pt"}}
    model = {"init_args": {"teacher": loaded, "initial_weights": None, "student": {"init_args": {"path": "other"}}}}
    text = explain({"model": model}, 5)
    assert "Each run has 4/5 of the labels" in text and "All folds read teacher.pt: " in text
    model["init_args"] |= {"initial_weights": "start.pt", "teacher": None}
    assert "All folds read start.pt: " in explain({"model": model}, 5)
    model["init_args"]["initial_weights"] = None
    assert "All folds" not in explain({"model": model}, 5)


@pytest.fixture
def fake_fit(monkeypatch):
    """Takes the place of the fits: labels every held-out sample rightly but those of class 9; gives the splits."""
    splits = []

    def fit(config, samples=None):
        folder = Path(config["trainer"]["default_root_dir"]) / config["name"]
        split = Split.load(Path(config["data"]["init_args"]["labeled"]), TARGETS)
        splits.append(split)
        label = [int(TARGETS[index]) % 9 for index in split.held_out]
        for number, accepted in enumerate((False, True)):
            table = labels(label, [0.5] * len(label), [accepted] * len(label), index=split.held_out, number=number)
            write_round(folder, replace(table, epoch=2 * number + 1), NAMES, lambda index: None)
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        return Run(folder)

    monkeypatch.setattr(kd_lightning.cli.cross_fitting, "fit_once", fit)
    return splits


def test_cross_fit_of_ledgers(run, fake_fit, capsys):
    main([str(run), "--cross-fit", "4"])
    whole = Split.load(run / "split.json", TARGETS)
    assert len(fake_fit) == 4
    assert sorted(index for split in fake_fit for index in split.held_out) == whole.labeled
    for split in fake_fit:
        assert sorted(split.labeled + split.held_out) == whole.labeled
        assert (split.val, split.unlabeled, split.seed) == (whole.val, whole.unlabeled, whole.seed)
        assert set(Counter(TARGETS[split.labeled].tolist())) == set(range(10))
    text = capsys.readouterr().out
    # 50 labels, 5 of each class: 45 right
    low, high = beta.ppf(0.025, 45, 6), beta.ppf(0.975, 46, 5)
    shown = f"90.0 [{100 * low:.1f}, {100 * high:.1f}]"
    assert cells(text, "Cross-fitted precision") == [
        ["0", "1", "50", "0", "-", shown],
        ["1", "3", "50", "50"] + 2 * [shown],
    ]
    assert "Each run has 3/4 of the labels" in " ".join(text.split())
    with (run / "pseudo_labels" / "cross_fit.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert [first[name] for name in ("accepted", "accepted_right", "accepted_precision_low")] == ["0", "0", ""]
    whole_row = [second[name] for name in ("round", "epoch", "held_out", "right", "accepted", "accepted_right")]
    assert whole_row == ["1", "3", "50", "45", "50", "45"]
    assert float(second["precision"]) == float(second["accepted_precision"]) == 0.9
    assert float(second["precision_low"]) == pytest.approx(low)
    assert float(second["accepted_precision_high"]) == pytest.approx(high)
    board = EventAccumulator(str(run)).Reload()
    steps = {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    assert steps == {
        "pseudo_labels/cross_fit_precision": [(1, pytest.approx(0.9)), (3, pytest.approx(0.9))],
        "pseudo_labels/cross_fit_accepted_precision": [(3, pytest.approx(0.9))],
    }


def test_cross_fit_refused(run, fake_fit):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["trainer"]["devices"] = 2
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match="--cross-fit runs on one process, got 2"):
        cross_fit(run, 2)
    config["trainer"]["devices"] = 1
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    make_split(TARGETS, 1, 0.1, 0).save(run / "split.json")
    with pytest.raises(InputError, match="got 1 of 0, 1, 2, 3"):
        cross_fit(run, 2)
    (run / "split.json").unlink()
    with pytest.raises(InputError, match="needs a run on a SemiSupervisedDataModule with a split.json"):
        cross_fit(run, 2)
    assert not fake_fit


@pytest.mark.slow
def test_cross_fit_of_a_real_run(config, capsys):
    """Whole fits, whose ledgers hold the held-out samples; done ones are not repeated, and a killed one is."""
    refresh = {
        "class_path": "PseudoLabelRefresh",
        "init_args": {
            "every_n_epochs": 1,
            "selection": {"class_path": "FixedThreshold", "init_args": {"threshold": 0.1}},
        },
    }
    config["trainer"] |= {"default_root_dir": "runs", "callbacks": [refresh]}
    student = {"class_path": "DigitsCNN", "init_args": {"width": 4}}
    config["model"] = {"class_path": "SupervisedModule", "init_args": {"student": student}}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    command_line(["fit", "--config", "config.yaml"])
    run = Path("runs/tiny/version_0")
    before = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    found = cross_fit(run, 2)
    assert [(one.round, one.epoch, one.held_out) for one in found] == [(0, 1, 50), (1, 2, 50)]
    assert all(0 <= one.accepted_right <= one.right <= 50 for one in found)
    truth = {name: SemiSupervisedDataModule(Digits(), labeled=str(path)) for name, path in splits(run).items()}
    right = 0  # counted anew, from the folds' files
    for name, data in truth.items():
        data.setup("")
        with (run / f"pseudo_labels/cross_fit/2_folds/{name}/version_0/pseudo_labels/round_0001.csv").open() as file:
            rows = {int(row["index"]): int(row["label"]) for row in csv.DictReader(file)}
        assert set(rows) == {*data.split.unlabeled, *data.split.held_out}
        right += sum(rows[index] == int(TARGETS[index]) for index in data.split.held_out)
    assert found[1].right == right
    assert all(path.read_bytes() == content for path, content in before.items())  # the run is as it was

    capsys.readouterr()
    assert cross_fit(run, 2) == found
    assert capsys.readouterr().out.count("is done") == 2
    Run.write_state(run / "pseudo_labels/cross_fit/2_folds/tiny_fold_1/version_0", finished=False)  # it was killed
    assert cross_fit(run, 2) == found
    text = capsys.readouterr().out
    assert text.count("is done") == 1 and text.count("is resumed") == 1
    folders = sorted(path.name for path in run.glob("pseudo_labels/cross_fit/2_folds/*/version_*"))
    assert folders == ["version_0", "version_0"]


def splits(run):
    return {f"tiny_fold_{n}": run / f"pseudo_labels/cross_fit/2_folds/split_{n}.json" for n in range(2)}


def test_several_labels_of_a_sample(run, capsys):
    """A row is a label; a sample is found once, and its picture may be shown for each of its labels."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["init_args"]["source"] = {"class_path": "DigitProperties"}
    config["data"]["init_args"]["labeled"] = 0.1
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "split.json").unlink()
    for path in (run / "pseudo_labels").iterdir():
        path.unlink()
    one = labels([1, 0, 1, 0], [0.9, 0.8, 0.7, 0.6], [1, 1, 1, 0], index=[3, 3, 5, 8])
    write_round(run, replace(one, output=torch.tensor([0, 2, 1, 0])), ["even", "prime", "above 4"], lambda index: None)
    main([str(run), "--images", "3"])
    text = capsys.readouterr().out
    assert cells(text, "Pseudo-labels")[0][:7] == ["0", "1", "3", "3 (75.0 %)", "-", "0.750", "0.800"]
    found = {row[0]: row[1] for row in cells(text, "Accepted labels of round 0")}
    assert found == {"even": "1", "prime": "1", "above 4": "0", "not above 4": "1", "not even": "0"}
    assert (run / "pseudo_labels" / "doubtful.png").is_file()


def test_values(run, seen, capsys):
    """Of the regression task: spreads in place of confidences, and a sheet of the widest ones."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["init_args"] |= {"source": {"class_path": "DigitAngles"}, "labeled": 0.1}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for path in [run / "split.json", *(run / "pseudo_labels").iterdir()]:
        path.unlink()
    columns = torch.tensor([[0.5, -0.5, 0.1, 0.3], [0.4, 0.1, 0.2, 0.9], [1.0, 1, 1, 0], [3.0, 4, 0, 0]])
    for number in (0, 1):
        write_values(run, PseudoValues(torch.tensor([3, 5, 8, 9]), *columns, number, number), None, lambda index: None)
    main([str(run), "--images", "2"])
    text = capsys.readouterr().out
    assert cells(text, "Pseudo-labels") == [
        ["0", "0", "4", "3 (75.0 %)", "-", "0.200", "0.200"],
        ["1", "1", "4", "3 (75.0 %)", "2.500", "0.200", "0.200"],
    ]
    assert cells(text, "Accepted values of round 1") == [["0", "3 (75.0 %)", "0.200", "-0.5", "0.03333", "0.5"]]
    assert "the values of the widest spread of round 1: " in text
    ((_, captions),) = seen
    assert [caption.splitlines()[:2] for caption in captions] == [["0.3", "spread 0.900"], ["0.5", "spread 0.400"]]
