"""clean and query where samples have several labels; clean for the binary task."""

import csv
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from cleanlab.multilabel_classification.filter import find_multilabel_issues_per_class
from PIL import Image, ImageDraw
from torch import nn

import kd_lightning.cli.commands.clean as clean
from kd_lightning.__main__ import main
from kd_lightning.cli.cross_fitting import fit_folds, predict_fold
from kd_lightning.cli.several_labels import (
    SeveralReview,
    folds_of_several,
    judge_several,
    learned_labels,
    write_several_review,
)
from kd_lightning.data import ImageTable, SemiSupervisedDataModule
from kd_lightning.errors import InputError

NAMES = ["disc", "frame", "cross"]
COUNT = 64
TRUTH = torch.rand(COUNT, 3, generator=torch.Generator().manual_seed(0)) < torch.tensor([0.5, 0.4, 0.3])
TRUTH = TRUTH.long()
WRONG = [(5, 0), (11, 1), (20, 2), (33, 0)]


class Marks(nn.Module):
    """Sees where the marks are: bright pixels of each of three regions."""

    def __init__(self, outputs=3):
        super().__init__()
        self.last = nn.Linear(3, outputs)

    def forward(self, x):
        x = x.mean(dim=1)
        regions = [x[:, 6:10, 6:10].mean((1, 2)), x[:, :, 0].mean(1), x[:, 3, 2:5].mean(1)]
        return self.last(torch.stack(regions, dim=1))


def picture(labels, number):
    image = Image.new("RGB", (16, 16))
    image.putpixel((13, 13), (number, number, number))  # copies of a picture would be in one fold
    draw = ImageDraw.Draw(image)
    disc, frame, cross = labels
    if disc:
        draw.ellipse((5, 5, 10, 10), fill=(250, 120, 80))
    if frame:
        draw.rectangle((0, 0, 15, 15), outline=(90, 250, 120))
    if cross:
        draw.line((1, 3, 5, 3), fill=(120, 150, 255))
        draw.line((3, 1, 3, 5), fill=(120, 150, 255))
    return image


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Pictures with marks, four of whose labels are wrong, and a config; the current folder."""
    monkeypatch.chdir(tmp_path)
    given = TRUTH.clone()
    for row, label in WRONG:
        given[row, label] ^= 1
    Path("pictures").mkdir()
    for number, labels in enumerate(TRUTH.tolist()):
        picture(labels, number).save(f"pictures/{number:02}.png")
    lines = [f"{number:02}.png,{','.join(map(str, labels))}" for number, labels in enumerate(given.tolist())]
    Path("table.csv").write_text("\n".join([f"path,{','.join(NAMES)}", *lines, ""]))
    optimizer = {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.5}}
    student = {"class_path": f"{__name__}.Marks"}
    source = {"class_path": "ImageTable", "init_args": {"table": "table.csv", "folder": "pictures", "image_size": 16}}
    data = {"source": source, "val_size": 0, "batch_size": 32, "unlabeled": "none"}
    data |= {name: {"class_path": f"{__name__}.Plain"} for name in ("train_transform", "eval_transform")}
    config = {
        "name": "marks",
        "seed_everything": 1,
        "trainer": {"max_epochs": 12, "accelerator": "cpu", "limit_val_batches": 0}
        | dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False),
        "model": {
            "class_path": "SupervisedModule",
            "init_args": {"student": student, "optimizer": optimizer, "task": "multilabel"},
        },
        "data": {"class_path": "SemiSupervisedDataModule", "init_args": data},
    }
    Path("config.yaml").write_text(yaml.safe_dump(config))
    return given


class Plain(nn.Module):
    """Pictures to tensors."""

    def forward(self, image):
        return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


def rows(path):
    with Path(path).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def command_of(text):
    """The last command that was printed."""
    words = text[text.rindex("kd-lightning") :].replace("\\\n", "")
    return shlex.split(words)[1:]


@pytest.mark.parametrize("action", ["drop", "relabel"])
def test_clean(folder, action, capsys):
    """The wrong labels are found, and the printed command trains without them."""
    main(["clean", "config.yaml", "--folds", "2", "--action", action])
    text = capsys.readouterr().out
    found = rows("runs/marks_clean/suspects.csv")
    assert {(int(row["index"]), NAMES.index(row["class"])) for row in found} == {*WRONG}
    for row in found:
        given = int(folder[int(row["index"]), NAMES.index(row["class"])])
        assert (int(row["label"]), int(row["suggested"])) == (given, 1 - given)
    assert "4 of 192 labels (2.1 %), of 4 samples, are suspects. Each label was evaluated" in text
    assert {path.name for path in Path("runs/marks_clean").glob("*.*")} == {
        "labels.csv",
        "suspects.csv",
        "suspects.png",
    }
    arguments = command_of(text)
    main(arguments)
    data = SemiSupervisedDataModule(
        ImageTable("table.csv", "pictures", image_size=16), val_size=0, label_file="runs/marks_clean/labels.csv"
    )
    data.setup("")
    expected = TRUTH.float()
    for place in WRONG if action == "drop" else ():
        expected[place] = torch.nan
    torch.testing.assert_close(data.visible_labels(), expected, equal_nan=True)


def test_clean_of_the_validation_part(folder, capsys):
    main(["clean", "config.yaml", "--part", "val", "--data.val_size", "0.5", "--action", "relabel"])
    data = SemiSupervisedDataModule(
        ImageTable("table.csv", "pictures", image_size=16),
        val_size=0.5,
        label_file="runs/marks_clean/val/labels.csv",
        correct_val=True,
    )
    data.setup("")
    found = {(int(row["index"]), NAMES.index(row["class"])) for row in rows("runs/marks_clean/val/suspects.csv")}
    wrong = {place for place in WRONG if place[0] in data.split.val}
    assert wrong & found and {row for row, _ in found} <= {*data.split.val}
    expected = folder.clone()
    for place in found:
        expected[place] ^= 1
    assert torch.equal(data.validation_labels()[data.split.val].long(), expected[data.split.val])


def test_each_label_is_evaluated_by_a_student_trained_without_it(folder):
    """The suspects are cleanlab's for the probabilities of these students."""
    config = clean.parse_config(["--config", "config.yaml"], "clean")
    data = clean.build_data(config, "clean")
    result = clean.review(config, data, 2, Path("fits"), Path("out"))
    index = range(COUNT)
    folds = folds_of_several(folder, index, 2, data.split.seed, "--folds")
    p = torch.zeros(COUNT, 3).double()
    for run, fold in zip(fit_folds(config, data.split, folds, Path("fits")), folds, strict=True):
        assert not {*run.datamodule().split.labeled} & {*fold}
        x = torch.stack([Plain()(Image.open(f"pictures/{n:02}.png")) for n in fold])
        p[fold] = run.student().eval()(x).detach().double().sigmoid()
    torch.testing.assert_close(result.probabilities, p, rtol=1e-5, atol=1e-7)
    labels = [row.nonzero().flatten().tolist() for row in folder]
    assert np.array_equal(result.suspect.numpy(), find_multilabel_issues_per_class(labels, p.numpy(), n_jobs=1))


def test_missing_labels_and_labels_that_are_too_rare():
    """Missing ones are no suspects; a label with one 1 is not judged; others are as without these."""
    generator = torch.Generator().manual_seed(1)
    truth = (torch.rand(80, 4, generator=generator) < 0.4).double()
    truth[:, 2] = 0
    truth[3, 2] = 1
    p = truth * 0.8 + 0.1 + 0.02 * torch.rand(80, 4, generator=generator)
    given = truth.clone()
    given[[4, 9, 30], 0] = 1 - given[[4, 9, 30], 0]
    given[10:25, 1] = torch.nan
    given[40, 1] = 1 - given[40, 1]
    given[:, 3] = 1
    found = judge_several(torch.arange(80), given, p.double(), torch.ones(4, dtype=torch.bool))
    assert found.suspect.nonzero().tolist() == [[4, 0], [9, 0], [30, 0], [40, 1]]
    assert found.judged.tolist() == [True, True, False, False]
    assert found.quality[10:25, 1].isnan().all()
    torch.testing.assert_close(found.quality[:, 0], torch.where(given[:, 0] == 1, p[:, 0], 1 - p[:, 0]))


def test_a_label_that_no_student_has_learned_is_not_judged():
    """Both ones of a label lie in one fold: the student that judges them has seen none."""
    labels = torch.zeros(8, 3)
    labels[[0, 1, 4], 0] = 1
    labels[[0, 1], 1] = 1
    labels[2:, 2] = 1
    labels[[5, 6], 2] = torch.nan
    assert learned_labels(labels, range(8), [[0, 1, 2, 3], [4, 5, 6, 7]]).tolist() == [True, False, False]
    assert learned_labels(labels, range(8), [[]]).tolist() == [True, True, True]
    p = torch.full((8, 3), 0.1).double()
    found = judge_several(torch.arange(8), labels, p, torch.tensor([True, False, False]))
    assert found.judged.tolist() == [True, False, False]
    assert not found.suspect[:, 1:].any()


class TestFolds:
    def test_ones_are_spread(self):
        """Of each label, and sizes differ by few; random folds are worse."""
        labels = (
            torch.rand(90, 4, generator=torch.Generator().manual_seed(2)) < torch.tensor([0.5, 0.3, 0.1, 0.04])
        ).long()
        index = [*range(5, 90)]
        folds = folds_of_several(labels, index, 3, 0, "--folds")
        assert sorted(n for fold in folds for n in fold) == index
        for label in range(4):
            counts = [int(labels[fold, label].sum()) for fold in folds]
            assert max(counts) - min(counts) <= 2, counts
        assert max(map(len, folds)) - min(map(len, folds)) <= 4
        assert folds == folds_of_several(labels, index, 3, 0, "--folds") != folds_of_several(labels, index, 3, 1, "")

    def test_a_group_is_in_one_fold(self):
        labels = (torch.rand(60, 2, generator=torch.Generator().manual_seed(3)) < 0.4).long()
        groups = [str(number // 4) for number in range(60)]
        folds = folds_of_several(labels, range(60), 3, 0, "--folds", groups)
        places = [{groups[n] for n in fold} for fold in folds]
        assert sum(map(len, places)) == 15 and len(set.union(*places)) == 15

    @pytest.mark.parametrize("folds", [1, 5])
    def test_bad_input(self, folds):
        with pytest.raises(InputError, match=f"--folds must lie in 2 ... 4, the number of samples .*, got {folds}"):
            folds_of_several(torch.ones(4, 2), range(4), folds, 0, "--folds")


def test_captions_and_order(folder, monkeypatch):
    """The lowest quality first; a suspect of each label has a picture."""
    seen = []
    monkeypatch.setattr("kd_lightning.cli.several_labels.write_contact_sheet", lambda *args: seen.append(args))
    data = SemiSupervisedDataModule(ImageTable("table.csv", "pictures", image_size=16), val_size=0)
    data.setup("")
    p = torch.full((2, 3), 0.25).double()
    label = torch.tensor([[1.0, 0, torch.nan], [0, 1, 1]])
    suspect = torch.tensor([[True, False, False], [True, True, False]])
    quality = torch.where(label == 1, p, 1 - p)
    result = SeveralReview(torch.tensor([7, 2]), label, p, quality, suspect, torch.ones(3, dtype=torch.bool))
    write_several_review(result, data, Path("out"), "drop", 2)
    _, images, captions, title = seen[0]
    assert title == "Labels that are probably wrong: the 2 of 3 with the lowest quality" and len(images) == 2
    assert captions[0].splitlines() == ["given disc, looks like no disc", "probability 25%", "7: 07.png"]
    order = [(row["index"], row["class"], row["quality"]) for row in rows("out/suspects.csv")]
    assert order == [("7", "disc", "0.25"), ("2", "frame", "0.25"), ("2", "disc", "0.75")]
    cells = [(row["index"], row["kind"], *(row[name] for name in NAMES)) for row in rows("out/labels.csv")]
    assert cells == [("7", "clean", "", "0", ""), ("2", "clean", "", "", "1")]


def test_downweight_is_refused(folder):
    with pytest.raises(InputError, match="--action downweight: labels of the multilabel task have no weights"):
        clean.main(clean_options("config.yaml", "--action", "downweight"))


def clean_options(*args):
    from kd_lightning.cli.arguments import parse

    return parse("clean", [*args])


def test_query(folder, capsys):
    """The filled file is an input of the printed command."""
    main(["fit", "--config", "config.yaml", "--data.labeled", "0.3"])
    capsys.readouterr()
    run = Path("runs/marks/version_0")
    main(["query", str(run), "--n", "6", "--strategy", "entropy"])
    text = capsys.readouterr().out
    header = (run / "query.csv").read_text().splitlines()[0]
    assert header == f"index,path,content,score,{','.join(NAMES)}"
    assert "fill in its columns disc, frame, cross (1, 0, or nothing if unknown), then run" in text
    assert (run / "query.png").is_file()
    main(["query", str(run), "--n", "6", "--strategy", "margin"])  # nothing is lost yet
    found = rows(run / "query.csv")
    for row in found:
        row |= dict(zip(NAMES, TRUTH[int(row["index"])].tolist(), strict=True))
    with (run / "query.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, found[0])
        table.writeheader()
        table.writerows(found)
    with pytest.raises(SystemExit):
        main(["query", str(run), "--n", "6"])
    main(command_of(text))
    data = SemiSupervisedDataModule(
        ImageTable("table.csv", "pictures", image_size=16), labeled="runs/marks/version_1/split.json", val_size=0
    )
    data.setup("")
    index = [int(row["index"]) for row in found]
    assert {*index} <= {*data.split.labeled}
    assert torch.equal(data.visible_labels()[index], TRUTH[index].float())


def test_clean_of_the_binary_task(folder):
    """One logit; the probabilities are those of both classes."""
    lines = [f"{number:02}.png,{int(row[0])}" for number, row in enumerate(folder)]
    Path("table.csv").write_text("\n".join(["path,label", *lines, ""]))
    config = yaml.safe_load(Path("config.yaml").read_text())
    config["model"]["init_args"] |= {"task": "binary"}
    config["model"]["init_args"]["student"]["init_args"] = {"outputs": 1}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    main(["clean", "config.yaml", "--folds", "2"])
    assert sorted(int(row["index"]) for row in rows("runs/marks_clean/suspects.csv")) == [5, 33]
    config = clean.parse_config(["--config", "config.yaml"], "clean")
    data = clean.build_data(config, "clean")
    (run,) = fit_folds(config, data.split, [[]], Path("fit"))
    found = predict_fold(run, data, [3, 1], torch.device("cpu"), "clean")
    x = torch.stack([Plain()(Image.open(f"pictures/{n:02}.png")) for n in (3, 1)])
    p = run.student().eval()(x).detach().double().sigmoid().flatten()
    torch.testing.assert_close(found, torch.stack([1 - p, p], dim=1), rtol=1e-5, atol=1e-7)
