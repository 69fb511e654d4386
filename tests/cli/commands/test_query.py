"""query: the samples to label next, and how their labels are read."""

import csv
import json
import re
import shlex
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch import LightningModule
from PIL import Image
from safetensors.torch import save_file

import kd_lightning.cli.commands.query as command
from kd_lightning.__main__ import main
from kd_lightning.active.strategies import PoolOutputs, select_samples
from kd_lightning.cli.commands.query import query
from kd_lightning.data import Digits
from kd_lightning.data.splits import make_split
from kd_lightning.errors import InputError
from kd_lightning.models import DigitsCNN
from kd_lightning.modules import SupervisedModule
from kd_lightning.runs.run import Run

DIGITS = Digits().load().train
IMAGES, TARGETS = DIGITS.images.tensors[0], DIGITS.targets
SPLIT = make_split(TARGETS, 5, 0.1, 0)


@pytest.fixture
def make_run(tmp_path):
    """Makes a run's folder on the digits as fit does, with an untrained student whose outputs differ."""

    def make(number=0, *, dropout=0.0, split=SPLIT, **data):
        folder = tmp_path / "runs" / "tiny" / f"version_{number}"
        split.save(folder / "split.json")
        source = {"class_path": "SemiSupervisedDataModule", "init_args": {"source": {"class_path": "Digits"}}}
        source["init_args"] |= {"labeled": 20, "seed": 7, "batch_size": 500} | data  # a new split would differ
        student = {"class_path": "DigitsCNN", "init_args": {"width": 4, "dropout": dropout}}
        model = {"class_path": "SupervisedModule", "init_args": {"student": student}}
        config = {"name": "tiny", "data": source, "model": model, "trainer": {"accelerator": "cpu"}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        save_file(network(number).state_dict(), folder / "student.safetensors")
        return folder

    return make


def network(number):
    """The student of a run."""
    torch.manual_seed(number)
    student = DigitsCNN(4).eval()
    student[-1].weight.data *= 20
    return student


def probabilities(number, index):
    with torch.no_grad():
        return network(number)(IMAGES[index]).double().softmax(dim=1)


def edit(run, change):
    config = yaml.safe_load((run / "config.yaml").read_text())
    change(config)
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def table(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def sheets(monkeypatch):
    """The arguments of the contact sheets."""
    calls = []
    real = command.write_contact_sheet

    def spy(out, images, captions, title):
        calls.append((images, captions))
        return real(out, images, captions, title)

    monkeypatch.setattr(command, "write_contact_sheet", spy)
    return calls


def test_the_smallest_margins(make_run, sheets, capsys):
    run = make_run()
    main(["query", str(run), "--n", "9", "--images", "4"])
    p = probabilities(0, SPLIT.unlabeled).sort(dim=1, descending=True).values
    scores = 1 - (p[:, 0] - p[:, 1])
    best = scores.argsort(descending=True)[:9]
    rows = table(run / "query.csv")
    assert [*rows[0]] == ["index", "path", "content", "score", "label"]
    assert [int(row["index"]) for row in rows] == torch.tensor(SPLIT.unlabeled)[best].tolist()
    assert [float(row["score"]) for row in rows] == pytest.approx(scores[best].tolist(), abs=1e-6)
    assert {(row["path"], row["label"]) for row in rows} == {("", "")}
    images, captions = sheets[0]
    assert all(torch.equal(i, IMAGES[int(r["index"])]) for i, r in zip(images, rows[:4], strict=True))
    for row, caption in zip(rows, captions, strict=False):
        head, *others = caption.split("\n")
        assert re.fullmatch(r"\d \d+% or \d \d+%", head)
        assert others == [f"score {float(row['score']):.3g}", row["index"]]
    assert (run / "query.png").read_bytes().startswith(b"\x89PNG")
    text = capsys.readouterr().out
    assert f"9 of {len(SPLIT.unlabeled)} samples without a label, by margin: {run / 'query.csv'}" in text


def test_strategies_differ_and_the_seed_is_used(make_run, tmp_path):
    run = make_run(dropout=0.5)
    found = {
        strategy: tuple(query([run], 5, strategy, out=tmp_path / "new" / f"{strategy}.csv"))
        for strategy in ("least-confidence", "entropy", "bald", "k-centre", "badge", "random")
    }
    assert len({*found.values()}) == 6
    assert (tmp_path / "new" / "badge.png").is_file()
    for strategy in ("bald", "random"):
        first, second = (tuple(query([run], 5, strategy, seed=seed, out=tmp_path / "x.csv")) for seed in (0, 1))
        assert first == found[strategy] != second


def test_several_runs(make_run):
    """bald scores their disagreement, others their mean; each student has the data of its own run."""
    runs = [make_run(number) for number in range(3)]
    index = torch.tensor(SPLIT.unlabeled)
    members = torch.stack([probabilities(number, index) for number in range(3)])
    pool = PoolOutputs(members.mean(dim=0), member_probabilities=members)
    for strategy in ("bald", "entropy"):
        assert query(runs, 6, strategy) == index[select_samples(strategy, pool, 6).rows].tolist()
    assert not (runs[1] / "query.csv").exists()
    with pytest.raises(InputError, match="badge takes one run, got 3"):
        query(runs, 6, "badge")
    with pytest.raises(InputError, match="bald needs several runs, or a student with dropout"):
        query(runs[:1], 6, "bald")
    other = make_run(3, split=make_split(TARGETS, 4, 0.1, 0))
    with pytest.raises(
        InputError, match="the split of .*version_3 is not that of .*version_0: fit it with --data.labeled"
    ):
        query([runs[0], other], 6, "bald")


def test_runs_on_other_data(make_run, tmp_path):
    """With the same labels and the same split, but other images."""
    write_images(tmp_path, [f"a/{c}/{n}.png" for c in "xy" for n in range(8)])
    write_images(tmp_path, [f"b/{c}/{n}.png" for c in "xy" for n in range(8)], start=50)
    write_images(tmp_path, [f"c/{c}/{n}.png" for c in "xy" for n in range(8)])
    split = make_split(torch.arange(16) // 8, 3, 2, 0)
    runs = [make_run(number, split=split) for number in range(3)]
    for run, folder in zip(runs, "abc", strict=True):
        source = {"class_path": "ImageFolder", "init_args": {"train": str(tmp_path / folder), "image_size": 8}}
        student = {"class_path": "CifarResNet", "init_args": {"depth": 8, "num_classes": 2}}

        def change(config, source=source, student=student):
            config["data"]["init_args"]["source"] = source
            config["model"]["init_args"]["student"] = student

        edit(run, change)
        save_file(Run(run).build_student().state_dict(), run / "student.safetensors")
    with pytest.raises(InputError, match="must have the same data; the samples of .*version_1 are not those of"):
        query(runs[:2], 2)
    assert len(query([runs[0], runs[2]], 2)) == 2  # a copy


def test_disagreement(make_run, tmp_path):
    run = make_run()
    with pytest.raises(InputError, match="needs a module with a frozen teacher, SupervisedModule has none"):
        query([run], 4, "disagreement")
    save_file(network(1).state_dict(), tmp_path / "teacher.safetensors")
    model = {"class_path": "DigitsCNN", "init_args": {"width": 4}}
    teacher = {"class_path": "kd_lightning.load_weights"}
    teacher["init_args"] = {"model": model, "path": str(tmp_path / "teacher.safetensors")}

    def distill(config):
        config["model"]["class_path"] = "DistillModule"
        config["model"]["init_args"]["teacher"] = teacher

    edit(run, distill)
    index = torch.tensor(SPLIT.unlabeled)
    t, s = probabilities(1, index), probabilities(0, index)
    order = (t * (t / s).log()).sum(dim=1).argsort(descending=True)
    assert query([run], 4, "disagreement") == index[order[:4]].tolist()
    (tmp_path / "teacher.safetensors").unlink()
    with pytest.raises(InputError, match="no weights file at .*teacher.safetensors"):
        query([run], 4, "disagreement")
    assert len(query([run], 4, "margin")) == 4  # it needs no teacher


class Caller(SupervisedModule):
    """Calls its student in its own way."""

    def call(self, network, x):
        return network(1 - x)


class Reader(SupervisedModule):
    """Reads batches in its own way."""

    def unpack(self, batch):
        batch = super().unpack(batch)
        return type(batch)(1 - batch.x, batch.y)


class Lit(LightningModule):
    """Of another project, and changes the inputs in its step."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.net = DigitsCNN(width)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(1 - x), y)


def caller(student: torch.nn.Module) -> Caller:
    return Caller(student)


@pytest.mark.parametrize("model", ["Caller", "Reader", "caller", "Lit"])
def test_the_student_gets_what_its_module_gives_it(make_run, tmp_path, model):
    run = make_run()
    teacher = tmp_path / "teacher.safetensors"
    loaded = {"model": {"class_path": "DigitsCNN", "init_args": {"width": 4}}, "path": str(teacher)}
    index = torch.tensor(SPLIT.unlabeled)
    with torch.no_grad():
        p, t = (network(number)(1 - IMAGES[index]).double().softmax(dim=1) for number in (0, 1))

    def change(config):
        config["model"]["class_path"] = f"{__name__}.{model}"
        if model == "Lit":
            module = {"class_path": f"{__name__}.Lit"}
            arguments = {
                "module": module,
                "teacher": {"class_path": "kd_lightning.load_weights", "init_args": loaded},
            }
            config["model"] = {"class_path": "kd_lightning.teach", "init_args": arguments}

    edit(run, change)
    largest = p.max(dim=1).values.argsort(stable=True)
    assert query([run], 5, "least-confidence") == index[largest[:5]].tolist()  # without the teacher's file
    if model == "Lit":
        save_file(network(1).state_dict(), teacher)
        order = (t * (t / p).log()).sum(dim=1).argsort(descending=True)
        assert query([run], 5, "disagreement") == index[order[:5]].tolist()


def test_coarse_samples_are_in_the_pool(make_run):
    groups = {"low": [0, 1, 2, 3, 4], "high": [5, 6, 7, 8, 9]}
    run = make_run(coarse={"class_path": "CoarseLabels", "init_args": {"groups": groups}}, unlabeled="none")
    index = torch.tensor(SPLIT.unlabeled)
    p = torch.where((TARGETS[index] >= 5)[:, None] == (torch.arange(10) >= 5), probabilities(0, index), 0)
    p = p / p.sum(dim=1, keepdim=True)
    order = p.max(dim=1).values.argsort(stable=True)
    assert query([run], 5, "least-confidence") == index[order[:5]].tolist()


def test_paths(tmp_path, monkeypatch):
    """Files have paths; labels are read by path and index."""
    monkeypatch.chdir(tmp_path)
    for name in ("train/cat/0.png", "train/dog/1.png", "pool/a, b.png", "pool/c.png", "pool/d.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(len(name)).integers(0, 255, (9, 7, 3), dtype=np.uint8)).save(name)
    run = Path("runs/files/version_0")
    run.mkdir(parents=True)
    source = {"class_path": "ImageFolder", "init_args": {"train": "train", "unlabeled": "pool", "image_size": 8}}
    data = {"class_path": "SemiSupervisedDataModule"}
    data["init_args"] = {"source": source, "unlabeled": "source", "val_size": 0}
    student = {"class_path": "CifarResNet", "init_args": {"depth": 8, "num_classes": 2}}
    model = {"class_path": "SupervisedModule", "init_args": {"student": student}}
    config = {"data": data, "model": model, "trainer": {"accelerator": "cpu"}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    save_file(Run(run).build_student().state_dict(), run / "student.safetensors")
    assert sorted(query([run], 3)) == [2, 3, 4]
    rows = table(run / "query.csv")
    paths = {"2": "pool/a, b.png", "3": "pool/c.png", "4": "pool/d.png"}
    assert {row["index"]: row["path"] for row in rows} == paths
    with (run / "query.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0]])
        writer.writeheader()
        writer.writerows(row | {"label": "dog" if row["index"] == "3" else ""} for row in rows)
    edit(run, lambda config: config["data"]["init_args"].update(label_file=str(run / "query.csv")))
    assert Run(run).datamodule().split.label_rows == [[3, 1, "clean", 1.0]]
    assert sorted(query([run], 2, out=run / "next.csv")) == [2, 4]


def write_images(folder, names, *, start=0):
    """Different pictures of noise."""
    for number, name in enumerate(names, start):
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng(number).integers(0, 255, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(values).save(path)


def test_images_come_and_go_between_the_fits(config, capsys):
    """The labels of a query stay with their images, whatever the indices and names are."""
    names = [f"{name}/{number:02}.png" for name in ("cats", "dogs") for number in range(12)]
    write_images("train", names)
    source = {"class_path": "ImageFolder", "init_args": {"train": "train", "image_size": 8}}
    data = {"source": source, "labeled": 4, "val_size": 2, "batch_size": 8, "labeled_batch_size": 4}
    config["data"] = {"class_path": "SemiSupervisedDataModule", "init_args": data}
    student = {"class_path": "CifarResNet", "init_args": {"depth": 8, "num_classes": 2}}
    config["model"] = {"class_path": "SupervisedModule", "init_args": {"student": student}}
    config["trainer"] |= {"max_epochs": 1, "limit_train_batches": 1}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", "config.yaml"])
    run = Path("runs/tiny/version_0")
    capsys.readouterr()
    main(["query", str(run), "--n", "6"])
    printed = capsys.readouterr().out
    rows = table(run / "query.csv")
    for number, row in enumerate(rows):  # a label that is wrong shows where it goes
        row["label"] = ("dogs", "cats")[number % 2]
    with (run / "query.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0]])
        writer.writeheader()
        writer.writerows(rows)
    gone, renamed, *others = rows
    unlabeled = {Path(row["path"]) for row in rows}
    other = next(path for path in sorted(Path("train").rglob("*.png")) if path not in unlabeled)
    Path(gone["path"]).unlink()
    Path(renamed["path"]).rename(gone["path"])  # under the name of the deleted one
    other.unlink()
    write_images("train", ["cats/000.png", "dogs/000.png"], start=100)
    main(shlex.split(printed[printed.index("kd-lightning fit") :].replace("\\\n", " "))[1:])
    after = Run(Path("runs/tiny/version_1")).datamodule()
    found = {after.content(index): label for index, label, *_ in after.split.label_rows}
    expected = {row["content"]: after.class_names.index(row["label"]) for row in (renamed, *others)}
    assert found == expected
    paths = {after.path(index) for index, *_ in after.split.label_rows}
    assert paths == {gone["path"], *(row["path"] for row in others)}


def test_from_fit_to_fit(config, capsys):
    """A person labels a part of the selected samples, and the next fit has more labels; twice."""
    config["trainer"] |= {"max_epochs": 1, "limit_train_batches": 2}
    config["data"]["init_args"]["batch_size"] = 128
    Path("config.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", "config.yaml"])
    runs = [Path(f"runs/tiny/version_{number}") for number in range(3)]
    labeled = []
    for run, after in pairwise(runs):
        capsys.readouterr()
        main(["query", str(run), "--n", "6", "--strategy", "entropy"])
        printed = capsys.readouterr().out
        rows = table(run / "query.csv")
        assert not {int(row["index"]) for row in rows} & {index for index, *_ in labeled}
        for row in rows[:4]:  # two stay without a label
            row["label"] = str(int(TARGETS[int(row["index"])]))
            labeled.append([int(row["index"]), int(row["label"]), "clean", 1.0])
        with (run / "query.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0]])
            writer.writeheader()
            writer.writerows(rows)
        line = shlex.split(printed[printed.index("kd-lightning fit") :].replace("\\\n", " "))
        main(line[1:])
        before, split = (json.loads((one / "split.json").read_text()) for one in (run, after))
        assert split["label_rows"] == sorted(labeled)
        assert split["labeled"] == sorted(before["labeled"] + [int(row["index"]) for row in rows[:4]])
        assert split["val"] == before["val"]
    first, last = (json.loads((run / "split.json").read_text()) for run in (runs[0], runs[2]))
    assert len(last["labeled"]) == len(first["labeled"]) + 8
    # a file with labels is not overwritten
    text = (runs[0] / "query.csv").read_text()
    with pytest.raises(InputError, match=r"query.csv exists and may have labels, which would be lost; name another"):
        query([runs[0]], 3)
    assert (runs[0] / "query.csv").read_text() == text


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(",", ";"),
        lambda text: text.replace(",", "\t"),
        lambda text: text.replace("label", "Label"),
        lambda text: text.replace("label", "label,kind"),
        lambda text: text.replace("label", " label"),
        lambda text: text[:-1] + "3\n",
        lambda text: "",
    ],
)
def test_a_changed_file_is_not_overwritten(make_run, change):
    run = make_run()
    query([run], 3)
    query([run], 2)  # it is unchanged
    path = run / "query.csv"
    text = path.read_text()
    assert text.count("\n") == 3
    path.write_text(changed := change(text.replace("\r\n", "\n")))
    with pytest.raises(InputError, match="may have labels"):
        query([run], 3)
    assert path.read_text() == changed


def test_bad_input(make_run, fails, tmp_path):
    run = make_run()
    pool = len(SPLIT.unlabeled)
    for arguments, message in (
        (["--n", "0"], "--n must be at least 1, got 0"),
        (["--n", str(pool + 1)], f"n must be at most {pool}, the number of samples without a label, got {pool + 1}"),
        (["--n", "1", "--strategy", "best"], "strategy must be one of least-confidence, .*random, got 'best'"),
        (["--n", "1", "--seed", "-1"], "seed must lie in"),
        (["--n", "1", "--images", "0"], "--images must be at least 1, got 0"),
        (["--n", "1", "--out", "query.png"], "--out must end in .csv, got query.png"),
    ):
        assert re.search(message, fails("query", str(run), *arguments))
    assert not (run / "query.csv").exists()

    with pytest.raises(InputError, match="runs must be different folders"):
        query([run, run.parent / run.name], 1)
    with pytest.raises(InputError, match="is no run: it has no config.yaml"):
        query([tmp_path], 1)
    with pytest.raises(InputError, match="name one of its runs: version_0"):
        query([run.parent], 1)
    (run / "student.safetensors").rename(run / "gone")
    with pytest.raises(InputError, match="version_0 has no student.safetensors; train it first"):
        query([run], 1)
    (run / "checkpoints").mkdir()
    (run / "checkpoints/last.ckpt").touch()  # it was killed
    with pytest.raises(InputError, match="no student.safetensors; resume it with --ckpt_path last"):
        query([run], 1)
    (run / "gone").rename(run / "student.safetensors")
    everything = make_run(1, split=make_split(TARGETS, None, 0.1, 0))
    with pytest.raises(InputError, match="no sample without a label is left"):
        query([everything], 1)
    with pytest.raises(InputError, match="unlabeled: test; test images get no labels"):
        query([make_run(2, unlabeled="test")], 1)
    edit(run, lambda config: config["model"].update(init_args={"network": {}}))
    with pytest.raises(InputError, match="version_0: SupervisedModule has no student"):
        query([run], 1)
    other, boring = make_run(3), "lightning.pytorch.demos.boring_classes.BoringDataModule"
    (other / "split.json").unlink()
    edit(other, lambda config: config.update(data={"class_path": boring}))
    with pytest.raises(InputError, match="query needs data: SemiSupervisedDataModule, got BoringDataModule"):
        query([other], 1)
