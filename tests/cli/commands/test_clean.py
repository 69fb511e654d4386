"""clean: suspects by confident learning, and their correction."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from cleanlab.filter import find_label_issues
from lightning.pytorch import LightningModule
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset

import kd_lightning.cli.commands.clean as command
from kd_lightning.batch import LabelKind
from kd_lightning.cli.arguments import parse
from kd_lightning.cli.commands.clean import Review, write_review
from kd_lightning.cli.cross_fitting import predict_fold
from kd_lightning.cli.parse import parse_config
from kd_lightning.data import DatasetSource, Digits, ImageFolder, SemiSupervisedDataModule, SymmetricNoise
from kd_lightning.data.splits import Split
from kd_lightning.errors import InputError
from kd_lightning.losses import ForwardCorrectionLoss
from kd_lightning.models import DigitsCNN
from kd_lightning.modules import SupervisedModule
from kd_lightning.runs.run import Run

PART = Digits().load().train
TRUTH = PART.targets
LABELED = 60  # of each class


def main(args):
    """Run the command; errors come as they are."""
    command.main(parse("clean", args))


@pytest.fixture(autouse=True)
def small_sheets(monkeypatch):
    """They take longest."""
    monkeypatch.setattr(command, "_SHEET_IMAGES", 2)


def make_config(**data):
    """The digits, 60 labels of each class, three in ten of them wrong; nothing else to train on."""
    noise = {"class_path": "SymmetricNoise", "init_args": {"rate": 0.3}}
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.03}}
    student = {"class_path": "DigitsCNN", "init_args": {"width": 4}}
    arguments = {"source": {"class_path": "Digits"}, "labeled": LABELED, "unlabeled": "none", "batch_size": 16}
    # without augmentation, for want of epochs
    arguments |= {"label_noise": noise, "train_transform": {"class_path": "torch.nn.Identity"}} | data
    return {
        "name": "tiny",
        "seed_everything": 1,
        "trainer": {"max_epochs": 6, "accelerator": "cpu", "limit_val_batches": 0}
        | dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False),
        "model": {"class_path": "SupervisedModule", "init_args": {"student": student, "optimizer": optimizer}},
        "data": {"class_path": "SemiSupervisedDataModule", "init_args": arguments},
    }


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def shown_labels():
    """What training sees, from the datamodule in Python."""
    data = SemiSupervisedDataModule(Digits(), labeled=LABELED, unlabeled="none", label_noise=SymmetricNoise(0.3))
    return data.visible_labels()


# On real fits.


@pytest.fixture(scope="module")
def cleaned(tmp_path_factory):
    """A finished ``clean`` in a folder of its own."""
    folder = tmp_path_factory.mktemp("clean")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(command, "_SHEET_IMAGES", 2)
        Path("config.yaml").write_text(yaml.safe_dump(make_config()))
        main(["config.yaml", "--folds", "2"])
    return folder


@pytest.fixture
def there(cleaned, monkeypatch):
    monkeypatch.chdir(cleaned)
    return Path("runs/tiny_clean")


def test_suspects_are_wrong_labels(there):
    found, label = rows(there / "suspects.csv"), shown_labels()
    index = [int(row["index"]) for row in found]
    wrong = label[label >= 0] != TRUTH[label >= 0]
    hits = int((label[index] != TRUTH[index]).sum())
    assert 0.25 < wrong.double().mean() < 0.3
    assert hits / len(index) > 0.55  # of labels drawn at random, 0.27; seen 0.72
    assert hits / wrong.sum() > 0.7  # seen 0.89
    assert [int(row["label"]) for row in found] == label[index].tolist()
    assert [row["path"] for row in found] == [""] * len(found)


def test_each_label_is_evaluated_by_a_student_trained_without_it(there):
    """The probabilities anew, from the fits' files."""
    label, logits = shown_labels(), torch.full((len(TRUTH), 10), torch.nan, dtype=torch.float64)
    for number in range(2):
        run = there / f"2_folds/tiny_fold_{number}/version_0"
        held_out = Split.load(run / "split.json", TRUTH).held_out
        student = DigitsCNN(4)
        student.load_state_dict(load_file(run / "student.safetensors"))
        with torch.no_grad():
            logits[held_out] = student.eval()(PART.images.tensors[0][held_out]).double()
    index = (label >= 0).nonzero().flatten()
    probabilities = logits.exp()[index] / logits.exp()[index].sum(1, keepdim=True)
    expected = {}
    for row in find_label_issues(label[index].numpy(), probabilities.numpy()).nonzero()[0]:
        sample = int(index[row])
        quality = float(probabilities[row, label[sample]])
        expected[sample] = (str(int(probabilities[row].argmax())), pytest.approx(quality, rel=1e-4))
    found = rows(there / "suspects.csv")
    assert {int(row["index"]): (row["suggested"], float(row["quality"])) for row in found} == expected
    quality = [float(row["quality"]) for row in found]
    assert quality == sorted(quality)
    loss = ForwardCorrectionLoss(there / "transition.csv")
    anchor = probabilities[:, 3].sort().indices[round(0.97 * (len(index) - 1))]
    matrix = torch.from_numpy(np.loadtxt(there / "transition.csv", delimiter=","))
    torch.testing.assert_close(matrix[3], probabilities[anchor], rtol=1e-4, atol=1e-6)
    assert loss(torch.zeros(1, 10), torch.tensor([0])).isfinite()


def test_again_trains_nothing(there, capsys):
    main(["config.yaml", "--folds", "2", "--out", "elsewhere", "--data.num_workers", "0"])
    text = capsys.readouterr().out
    assert text.count("is done: ") == 2
    assert sorted(path.name for path in there.glob("2_folds/*/version_*")) == ["version_0"] * 2
    assert (there / "suspects.csv").read_bytes() == Path("elsewhere/suspects.csv").read_bytes()
    found, label = rows(there / "suspects.csv"), shown_labels()
    index = [int(row["index"]) for row in found]
    wrong, hits = int((label[label >= 0] != TRUTH[label >= 0]).sum()), int((label[index] != TRUTH[index]).sum())
    assert f"{len(index)} of 600 labels ({len(index) / 6:.1f} %) are suspects" in text
    assert "the same method with 1/2 of the labels" in text and "The noise is simulated" in text
    assert f"{100 * hits / len(index):.1f} % of the suspects" in text
    assert f"{100 * hits / wrong:.1f} % of the {wrong} wrong labels" in text
    command_line = "kd-lightning fit --config=config.yaml --data.num_workers 0 --data.label_file"
    assert f"drop the suspects: {command_line} elsewhere/labels.csv\n" in text


@pytest.mark.parametrize("action", ["drop", "downweight", "relabel"])
def test_the_next_fit_takes_the_labels(there, action, tmp_path):
    weight = ["--weight", "0.25"] if action == "downweight" else []
    main(["config.yaml", "--folds", "2", "--out", str(tmp_path), "--action", action, *weight])
    suspects = {int(row["index"]): row for row in rows(tmp_path / "suspects.csv")}
    noise, path = SymmetricNoise(0.3), tmp_path / "labels.csv"
    data = SemiSupervisedDataModule(Digits(), labeled=LABELED, label_noise=noise, label_file=path)
    before, seen = shown_labels(), {}
    for batch in data.train_dataloader():
        weight = torch.ones(len(batch)) if batch.weight is None else batch.weight
        for index, *rest in zip(batch.index, batch.y, batch.kind, weight, strict=True):
            seen[int(index)] = tuple(value.item() for value in rest)
    assert len(seen) == len(TRUTH) - len(data.split.val) and 0 < len(suspects) < len(seen)
    for index, row in seen.items():
        label = before[index].item()
        expected = (label, LabelKind.MISSING if label == -100 else LabelKind.NOISY, 1.0)
        if index in suspects:
            suggested = int(suspects[index]["suggested"])
            assert suggested != label >= 0
            expected = {
                "drop": (-100, LabelKind.MISSING, 1.0),
                "downweight": (label, LabelKind.NOISY, 0.25),
                "relabel": (suggested, LabelKind.NOISY, 1.0),
            }[action]
        assert row == expected
    assert (suspects.keys() <= set(data.unlabeled_indices())) == (action == "drop")


# On made-up students.


@pytest.fixture
def out_of_fold(monkeypatch, tmp_path):
    """Replaces fits and their students by probabilities of each sample; by default those of the true labels."""
    monkeypatch.chdir(tmp_path)
    probabilities, calls = torch.eye(10, dtype=torch.float64)[TRUTH] * 0.91 + 0.009, []

    def fits(config, split, folds, folder, samples=None):
        calls.append((split, folds, folder))
        yield from (Path(f"run_{number}") for number in range(len(folds)))

    def predict_fold(run, data, index, device, name):
        assert index == calls[-1][1][int(run.name[-1])]
        return probabilities[torch.tensor(index)]

    monkeypatch.setattr(command, "fit_folds", fits)
    monkeypatch.setattr(command, "predict_fold", predict_fold)
    Path("config.yaml").write_text(yaml.safe_dump(make_config(labeled=20)))
    probabilities.calls = calls
    return probabilities


def test_folds_have_every_label_once_in_each_class(out_of_fold):
    main(["config.yaml"])
    split, folds, folder = out_of_fold.calls[0]
    assert sorted(index for fold in folds for index in fold) == split.labeled and len(folds) == 5
    assert folder == Path("runs/tiny_clean/5_folds")
    label = shown_labels()  # 20 of a class are among 60 of it, with the same noise
    for number in range(10):
        counts = [int((label[fold] == number).sum()) for fold in folds]
        assert max(counts) - min(counts) <= 1


def test_a_student_that_knows_finds_all(out_of_fold, capsys):
    main(["config.yaml"])
    data = SemiSupervisedDataModule(Digits(), labeled=20, label_noise=SymmetricNoise(0.3))
    label = data.visible_labels()
    wrong = ((label >= 0) & (label != TRUTH)).nonzero().flatten().tolist()
    found = rows(Path("runs/tiny_clean/suspects.csv"))
    # of equal qualities the lower index first
    assert [int(row["index"]) for row in found] == wrong
    assert [(int(row["label"]), int(row["suggested"])) for row in found] == [(label[i], TRUTH[i]) for i in wrong]
    assert {row["quality"] for row in found} == {"0.009"}
    text = capsys.readouterr().out
    assert f"100.0 % of the suspects are wrong labels (precision), 100.0 % of the {len(wrong)} wrong labels" in text
    assert f"The students agree with {(200 - len(wrong)) / 2:.1f} % of the labels" in text


def test_no_suspects(out_of_fold, capsys):
    """Older files are deleted, and the text has no precision without simulated noise."""
    main(["config.yaml"])
    out = Path("runs/tiny_clean")
    assert {path.name for path in out.iterdir()} == {"labels.csv", "suspects.csv", "suspects.png", "transition.csv"}
    capsys.readouterr()
    main(["config.yaml", "--data.label_noise", "null"])
    text = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"suspects.csv", "transition.csv"}
    assert (out / "suspects.csv").read_text().strip() == "index,path,content,label,suggested,quality"
    assert "0 of 200 labels (0.0 %) are suspects" in text and "no label is suspect" in text
    assert "precision" not in text and "fit" not in text


def test_labels_of_an_earlier_file_stay(out_of_fold, capsys):
    """They are reviewed like other labels, and the next fit has a split with them."""
    data = SemiSupervisedDataModule(Digits(), labeled=20, unlabeled="none")
    data.setup("")
    first, second = data.split.labeled[:2]
    new = data.split.unlabeled[0]
    lines = [f"{first},,missing", f"{second},{TRUTH[second]},clean", f"{new},{(TRUTH[new] + 1) % 10},noisy"]
    Path("labels.csv").write_text("\n".join(["index,label,kind", *lines, ""]))
    main(["config.yaml", "--data.label_file", "labels.csv"])
    split, folds, _ = out_of_fold.calls[0]
    evaluated = {index for fold in folds for index in fold}
    assert first not in evaluated and {second, new} <= evaluated and len(split.label_rows) == 3
    out = Path("runs/tiny_clean")
    suspects = {int(row["index"]) for row in rows(out / "suspects.csv")}
    assert new in suspects and second not in suspects
    text = capsys.readouterr().out
    assert f"--data.labeled {out / 'split.json'} --data.label_file {out / 'labels.csv'}\n" in text
    paths = {"labeled": str(out / "split.json"), "label_file": str(out / "labels.csv")}
    again = SemiSupervisedDataModule(Digits(), unlabeled="none", label_noise=SymmetricNoise(0.3), **paths)
    visible = again.visible_labels()
    assert visible[second] == TRUTH[second]
    # the split has the labels before any other file is written
    assert [answer[0] for answer in Split.load(out / "split.json", TRUTH).label_rows] == sorted([first, second, new])
    assert (visible[[first, new]] == -100).all() and set(again.split.labeled) == evaluated - suspects


def test_files_and_names(tmp_path, monkeypatch):
    """Classes are written by name, files by path; the sheet shows the lowest quality."""
    monkeypatch.chdir(tmp_path)
    for number in range(70):
        path = Path(f"images/{('1', 'a, b', 'Größe')[number % 3]}/{number:02}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((9, 7, 3), number, dtype=np.uint8)).save(path)
    data = SemiSupervisedDataModule(ImageFolder(train="images", image_size=8), val_size=0)
    data.setup("")
    names, labels = data.class_names, data.visible_labels()
    assert names == ["1", "Größe", "a, b"]
    index = torch.arange(70)
    probabilities = torch.full((70, 3), 0.25, dtype=torch.float64)
    probabilities[index, (labels + 1) % 3] = 0.5
    quality = 0.25 + index.flip(0).double() / 1000
    found = Review(index, labels, probabilities, quality, index > 4)
    seen = []
    real = command.write_contact_sheet
    monkeypatch.setattr(command, "write_contact_sheet", lambda *args: seen.append(args) or real(*args))
    monkeypatch.setattr(command, "_SHEET_IMAGES", 60)
    write_review(found, data, Path("out"), "relabel", 0.1)
    corrected = rows(Path("out/labels.csv"))
    assert [int(row["index"]) for row in corrected] == list(range(69, 4, -1))
    for row in corrected:
        label = int(labels[int(row["index"])])
        assert row["label"] == names[(label + 1) % 3] and (row["kind"], row["weight"]) == ("noisy", "1.0")
        assert row["path"] == data.path(int(row["index"])) and row["content"] == data.content(int(row["index"]))
    row = rows(Path("out/suspects.csv"))[0]
    last = int(labels[69])
    assert (row["label"], row["suggested"], row["quality"]) == (names[last], names[(last + 1) % 3], "0.25")
    _, images, captions, _ = seen[0]
    assert len(images) == 60 and captions[0].splitlines()[::2] == [
        f"given {names[last]}, looks like {names[(last + 1) % 3]}",
        f"69: {Path(data.path(69)).name}",
    ]
    assert np.array(images[0]).max() == int(Path(data.path(69)).stem)
    assert Path("out/suspects.png").read_bytes().startswith(b"\x89PNG")
    source = ImageFolder(train="images", image_size=8)
    visible = SemiSupervisedDataModule(source, val_size=0, label_file="out/labels.csv").visible_labels()
    assert visible.tolist() == [*labels[:5].tolist(), *((labels[5:] + 1) % 3).tolist()]


def test_teacher_that_knew_the_labels_is_named(out_of_fold, config, capsys):
    config["data"]["init_args"]["labeled"] = 20
    config["data"]["init_args"]["label_noise"] = make_config()["data"]["init_args"]["label_noise"]
    Path("config.yaml").write_text(yaml.safe_dump(config))
    main(["config.yaml"])
    assert "All folds read teacher.pt: if these weights were trained on the labels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--folds", "1"], "--folds must lie in 2 ... 200, the number of labels, got 1"),
        (["--folds", "201"], "--folds must lie in 2 ... 200, the number of labels, got 201"),
        (["--weight", "0.5"], "--weight needs --action downweight, got drop"),
        (["--data.label_file", "runs/tiny_clean/labels.csv"], "--out: .* would be overwritten; name another folder"),
        (["--action", "downweight", "--weight", "1"], r"--weight must lie in \[0, 1\), got 1.0"),
        (["--action", "downweight", "--weight", "nan"], r"--weight must lie in \[0, 1\), got nan"),
        (
            ["--data.labeled", "1", "--data.label_noise", "null"],
            "--folds needs 2 labels of each class, got 1 of 0, 1",
        ),
        (["--trainer.devices", "2"], "clean runs on one process, got 2; set --trainer.devices 1"),
        (["--model.task", "binary"], "clean: task: binary needs the classes 0 and 1, got class 9"),
        (["--model.task", "regression"], "clean needs samples of one class each, or several labels .*, got regression"),
        (
            ["--model.task", "multilabel"],
            "needs labels of zeros and ones .* for task: multilabel, got torch.int64",
        ),
        (
            ["--data", "lightning.pytorch.demos.boring_classes.BoringDataModule"],
            "clean needs data: SemiSup.*BoringData",
        ),
        (
            ["--model", "lightning.pytorch.demos.boring_classes.BoringModel"],
            "needs a model with a student, .*BoringModel",
        ),
        (["--data.label_file", "gone.csv"], "there is no file gone.csv"),
    ],
)
def test_refused(out_of_fold, change, message):
    with pytest.raises(InputError, match=message):
        main(["config.yaml", *change])
    assert not out_of_fold.calls and not Path("runs").exists()


def test_refused_without_data(out_of_fold):
    config = make_config()
    del config["data"]
    Path("config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match="clean needs data in the config"):
        main(["config.yaml"])


@pytest.mark.parametrize("shape", [(30, 3), (30,)])
def test_several_labels_are_refused(out_of_fold, shape):
    """Of many labels, and of floats."""
    data = SemiSupervisedDataModule(Digits())
    data.setup("")
    data.visible_labels = lambda: torch.zeros(shape)
    config = parse_config(["--config", "config.yaml"], "clean")
    with pytest.raises(InputError, match="needs samples of one class each"):
        command.review(config, data, 2, Path("a"), Path("b"))
    data.visible_labels = lambda: torch.tensor([-100, 3, 3, 3])
    with pytest.raises(InputError, match="needs labels of at least 2 classes, got 3"):
        command.review(config, data, 2, Path("a"), Path("b"))


def test_without_cleanlab(out_of_fold, monkeypatch):
    monkeypatch.setitem(sys.modules, "cleanlab.filter", None)
    with pytest.raises(InputError, match=r"clean needs cleanlab: pip install 'kd-lightning\[weak\]'"):
        main(["config.yaml"])
    assert not out_of_fold.calls


def test_classes_without_a_label(out_of_fold):
    """Those of the middle and of the end: cleanlab goes by number."""
    data = SemiSupervisedDataModule(Digits(), labeled=20)
    data.setup("")
    gone = [index for index in data.split.labeled if TRUTH[index] in (4, 9)]
    wrong = next(index for index in data.split.labeled if TRUTH[index] == 2)
    lines = ["index,label,kind", *(f"{index},,missing" for index in gone), f"{wrong},3,noisy", ""]
    Path("labels.csv").write_text("\n".join(lines))
    main(["config.yaml", "--data.label_noise", "null", "--data.label_file", "labels.csv"])
    assert [int(row["index"]) for row in rows(Path("runs/tiny_clean/suspects.csv"))] == [wrong]


# Outputs of a finished fit.


@pytest.fixture
def data():
    """Whose images are mirrored for evaluation."""
    found = SemiSupervisedDataModule(Digits(), labeled=5, batch_size=4, eval_transform=Flipped())
    found.setup("")
    return found


class Flipped(torch.nn.Module):
    def forward(self, x):
        return x.flip(-1)


def save(student, folder, **arguments):
    """A run with this student."""
    spec = {"class_path": "DigitsCNN", "init_args": {"width": 2} | arguments}
    config = {"model": {"class_path": "SupervisedModule", "init_args": {"student": spec}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    save_file(student.state_dict(), folder / "student.safetensors")
    return Run(folder)


def test_probabilities_are_of_evaluation(data, tmp_path):
    """Under evaluation transforms and in eval mode, in the order of the indices, in float64."""
    torch.manual_seed(0)
    student = DigitsCNN(2, dropout=0.5)
    run = save(student, tmp_path, dropout=0.5)
    index = [900, 3, 77, 5, 6]
    found = predict_fold(run, data, index, torch.device("cpu"), "clean")
    with torch.no_grad():
        logits = student.eval()(PART.images.tensors[0][index].flip(-1)).double()
    torch.testing.assert_close(found, logits.softmax(1), rtol=1e-5, atol=1e-9)
    assert found.dtype == torch.float64 and not found.requires_grad


class Caller(SupervisedModule):
    def call(self, network, x):
        return network(1 - x)


class Lit(LightningModule):
    """Of another project, and changes the inputs in its step."""

    def __init__(self, width: int = 2):
        super().__init__()
        self.net = DigitsCNN(width)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.net(1 - x), y)


TEACHER = {"class_path": "kd_lightning.load_weights"}
TEACHER["init_args"] = {"model": {"class_path": "DigitsCNN"}, "path": "gone.pt"}
TAUGHT = {"class_path": "kd_lightning.teach"}
TAUGHT["init_args"] = {"module": {"class_path": f"{__name__}.Lit"}, "teacher": TEACHER}


@pytest.mark.parametrize("module", ["Caller", "Lit"])
def test_the_student_gets_what_its_module_gives_it(data, tmp_path, module):
    torch.manual_seed(0)
    student = DigitsCNN(2)
    run = save(student, tmp_path)
    model = {**run.config["model"], "class_path": f"{__name__}.Caller"} if module == "Caller" else TAUGHT
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": model}))
    found = predict_fold(Run(tmp_path), data, [900, 3, 77, 5, 6], torch.device("cpu"), "clean")
    with torch.no_grad():
        logits = student.eval()(1 - PART.images.tensors[0][[900, 3, 77, 5, 6]].flip(-1)).double()
    torch.testing.assert_close(found, logits.softmax(1), rtol=1e-5, atol=1e-9)


class Forms(Dataset):
    """The digits as a mapping or a tuple."""

    def __init__(self, form):
        self.form = form

    def __len__(self):
        return len(TRUTH)

    def __getitem__(self, index):
        image, scale = PART.images.tensors[0][index], torch.tensor([0.5])
        return {"mapping": {"image": image, "scale": scale}, "tuple": (image, scale)}[self.form], int(TRUTH[index])


class Scaled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.network = DigitsCNN(2)

    def forward(self, image, scale):
        return self.network(image * scale[:, :, None, None])


class Doubled(SemiSupervisedDataModule):
    """Changes batches on the device."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x = {name: 2 * value for name, value in batch.x.items()} if isinstance(batch.x, dict) else batch.x
        return type(batch)(**{**vars(batch), "x": x})


@pytest.mark.parametrize(("form", "factor"), [("mapping", 4), ("tuple", 1)])
def test_inputs_of_other_forms(tmp_path, form, factor):
    """In the mapping, the hook of the data doubles both inputs."""
    data = Doubled(DatasetSource(Forms(form), Forms(form)), labeled=5, batch_size=4)
    data.setup("")
    torch.manual_seed(0)
    student = Scaled()
    model = {"class_path": "SupervisedModule", "init_args": {"student": {"class_path": f"{__name__}.Scaled"}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": model}))
    save_file(student.state_dict(), tmp_path / "student.safetensors")
    found = predict_fold(Run(tmp_path), data, [900, 3, 77, 5, 6], torch.device("cpu"), "clean")
    with torch.no_grad():
        x = PART.images.tensors[0][[900, 3, 77, 5, 6]] * 0.5 * factor
        expected = student.network.eval()(x).double().softmax(1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


def test_a_module_that_is_taught(out_of_fold, capsys):
    config = make_config(labeled=20)
    config["model"] = TAUGHT
    Path("gone.pt").touch()
    Path("config.yaml").write_text(yaml.safe_dump(config))
    main(["config.yaml"])
    assert "are suspects" in capsys.readouterr().out


def test_bad_students(data, tmp_path):
    student = DigitsCNN(2)
    student[-1].bias.data[3] = torch.nan
    run = save(student, tmp_path)
    with pytest.raises(InputError, match=f"the logits of the student of {tmp_path} are not finite"):
        predict_fold(run, data, [0, 1], torch.device("cpu"), "clean")
    for classes in (9, 11):
        run = save(DigitsCNN(2, num_classes=classes), tmp_path, num_classes=classes)
        data.class_names = [*"abcdefghij"]
        with pytest.raises(InputError, match=f"10 logits, one for each class, got .2, {classes}."):
            predict_fold(run, data, [0, 1], torch.device("cpu"), "clean")
    (tmp_path / "student.safetensors").unlink()
    with pytest.raises(InputError, match="has no student.safetensors"):
        predict_fold(run, data, [0], torch.device("cpu"), "clean")


def test_command_line(out_of_fold, fails):
    assert "clean runs on one process, got 2" in fails("clean", "config.yaml", "--trainer.devices", "2")
