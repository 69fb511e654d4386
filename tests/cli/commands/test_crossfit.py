"""crossfit: what each teacher has not seen, the out-of-fold accuracy, and a student that learns from the teachers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.data import Dataset

import kd_lightning.cli.commands.crossfit as command
from kd_lightning.batch import Batch
from kd_lightning.cli.arguments import parse
from kd_lightning.cli.commands.doctor import DoctorCLI
from kd_lightning.cli.commands.experiment import run_experiment
from kd_lightning.cli.parse import parse_config
from kd_lightning.data import Digits
from kd_lightning.errors import InputError
from kd_lightning.runs.build import build
from kd_lightning.runs.run import Run
from kd_lightning.teachers.cross_fit import CrossFit
from kd_lightning.teachers.cross_fitted import CrossFittedTeacher

IMAGES = Digits().load().train


class Twice(Dataset):
    """60 digits, and then the first 20 of them once more."""

    def __len__(self):
        return 80

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError
        index = index % 60
        return IMAGES.images.tensors[0][index], int(IMAGES.targets[index])


class Random(Twice):
    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image + torch.rand(1), label


def make_config(name="teacher", model="SupervisedModule", **data):
    student = {"class_path": "DigitsCNN", "init_args": {"width": 2}}
    arguments = {"source": {"class_path": "Digits"}, "labeled": 4, "unlabeled": "none", "val_size": 2, "batch_size": 32}
    return {
        "name": name,
        "seed_everything": 1,
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False},
        "model": {"class_path": model, "init_args": {"student": student}},
        "data": {"class_path": "SemiSupervisedDataModule", "init_args": arguments | data},
    }


def of_dataset(kind, **kwargs):
    dataset = {"class_path": f"{__name__}.{kind.__name__}"}
    return make_config(source={"class_path": "DatasetSource", "init_args": {"train": dataset}}, **kwargs)


def crossfit(config, *args):
    Path("config.yaml").write_text(yaml.safe_dump(config))
    command.main(parse("crossfit", ["config.yaml", *args]))


@pytest.fixture
def made_up(monkeypatch, tmp_path, request):
    """Replaces fits by what a fit leaves of its split, and predictions by a constant class; has the folds."""
    monkeypatch.chdir(tmp_path)
    folds, leaky = [], getattr(request, "param", None)

    def fits(config, split, held_out, folder, samples=None):
        folds[:] = held_out
        for number, fold in enumerate(held_out):
            run = folder / f"fold_{number}" / "version_0"
            seen = [*split.labeled] if leaky == number else sorted({*split.labeled} - {*fold})
            hidden = sorted({*split.labeled} - {*seen})
            replace(split, labeled=seen, held_out=hidden).save(run / "split.json")
            (run / "config.yaml").write_text(yaml.safe_dump(config))
            (run / "student.safetensors").write_bytes(bytes([number]))
            yield Run(run)

    monkeypatch.setattr(command, "fit_folds", fits)
    monkeypatch.setattr(command, "predict_fold", lambda run, data, fold, *_: torch.eye(10)[[3] * len(fold)].double())
    monkeypatch.setattr(Run, "class_names", property(lambda run: None))
    return folds


def read(name="teacher"):
    return CrossFit.load(Path(f"runs/{name}_crossfit/crossfit.json"))


def test_each_label_is_held_out_once(made_up, capsys):
    crossfit(make_config(), "--folds", "4")
    found = read()
    data = build_data()
    labeled = data.split.labeled
    names = data.identities("train")
    assert len(found.folds) == 4 and sorted(index for fold in made_up for index in fold) == labeled
    for number, (fold, held_out) in enumerate(zip(found.folds, made_up, strict=True)):
        assert fold.run == f"4_folds/fold_{number}/version_0"
        assert fold.contents == [names.contents[index] for index in held_out]
        assert fold.paths == [""] * len(held_out)
        labels = data.visible_labels()[held_out]
        assert torch.bincount(labels, minlength=10).tolist() == [1] * 10  # stratified
    out = capsys.readouterr().out
    assert found.right == 4 and "out-of-fold accuracy 10.0% of 40 labels (95% interval 2.8% to 23.7%)" in out
    lines = yaml.safe_load(out[out.index("  teacher:") :])
    assert lines["teacher"]["class_path"] == "kd_lightning.CrossFittedTeacher"
    assert Path(lines["teacher"]["init_args"]["path"]).is_file()


def build_data(**data):
    config = make_config(**data)
    return command.build_data(parse_config([f"--config={write(config)}"], "crossfit"), "crossfit")


def write(config):
    Path("data.yaml").write_text(yaml.safe_dump(config))
    return "data.yaml"


def test_copies_of_one_content_are_in_one_fold(made_up):
    """Else the teacher of a copy's fold has seen it."""
    crossfit(of_dataset(Twice, labeled=None, val_size=0), "--folds", "3")
    found = read()
    every = [content for fold in found.folds for content in fold.contents]
    assert len(every) > len({*every})  # there are copies among the labeled samples
    assert sum(len({*fold.contents}) for fold in found.folds) == len({*every})


class TestBadInput:
    def test_random_items(self, made_up):
        with pytest.raises(InputError, match="the dataset returns another item each time"):
            crossfit(of_dataset(Random, labeled=None, val_size=0))

    def test_coarse_labels(self, made_up):
        coarse = {
            "class_path": "CoarseLabels",
            "init_args": {"groups": {"low": [0, 1, 2, 3, 4], "high": [5, 6, 7, 8, 9]}},
        }
        with pytest.raises(InputError, match="all teachers would see coarse labels"):
            crossfit(make_config(coarse=coarse))

    @pytest.mark.parametrize("folds", [1, 41])
    def test_folds(self, made_up, folds):
        with pytest.raises(InputError, match=rf"--folds must lie in 2 ... 40, the number of labels, got {folds}"):
            crossfit(make_config(), "--folds", str(folds))

    def test_one_label_of_a_class(self, made_up):
        with pytest.raises(InputError, match="--folds needs 2 labels of each class"):
            crossfit(make_config(labeled=1))

    def test_first_weights_that_have_seen_the_labels(self, made_up):
        crossfit(make_config(), "--folds", "4")
        network = {"class_path": "DigitsCNN", "init_args": {"width": 2}}
        loaded = {"class_path": "kd_lightning.load_weights", "init_args": {"model": network}}
        loaded["init_args"]["path"] = "runs/teacher_crossfit/4_folds/fold_0/version_0/student.safetensors"
        config = make_config("finetuned")
        config["model"]["init_args"]["student"] = loaded
        with pytest.raises(InputError, match=r"student.safetensors was trained on 30 of the 40 labels"):
            crossfit(config)

    @pytest.mark.parametrize("made_up", [1], indirect=True)
    def test_a_run_that_has_seen_its_fold(self, made_up):
        with pytest.raises(InputError, match="fold_1/version_0 was trained on labels of its fold"):
            crossfit(make_config())
        assert not Path("runs/teacher_crossfit/crossfit.json").exists()


@pytest.mark.slow
def test_from_the_teachers_to_a_students_experiment(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    crossfit(make_config(), "--folds", "2")
    first = read()
    assert "out-of-fold accuracy" in capsys.readouterr().out
    crossfit(make_config(), "--folds", "2")
    assert capsys.readouterr().out.count("is done: ") == 2 and read() == first
    for fold in first.folds:
        seen = Run(Path("runs/teacher_crossfit") / fold.run).datamodule()
        contents = {seen.content(index) for index in seen.split.labeled}
        assert len(contents) == 20 and not contents & {*fold.contents}

    student = make_config("student", "DistillModule", unlabeled="rest", num_views=1)
    path = "runs/teacher_crossfit/crossfit.json"
    teacher = {"class_path": "kd_lightning.CrossFittedTeacher", "init_args": {"path": path, "cache": "cache"}}
    student["model"]["init_args"]["teacher"] = teacher
    student["trainer"]["limit_train_batches"] = 3
    Path("student.yaml").write_text(yaml.safe_dump(student))
    done = run_experiment(["--config=student.yaml"], 1)
    assert "teacher 2 networks, each DigitsCNN" in " ".join(capsys.readouterr().out.split())
    assert done.method[0].result().figures["accuracy"] >= 0
    assert build(torch.nn.Module, teacher).fingerprint() == CrossFittedTeacher(path).fingerprint()
    found = {finding.name: finding for finding in DoctorCLI(["fit", "--config=student.yaml"]).findings}
    assert "40 of 1197 samples have a network of their own" in found["cross-fitting"].text
    Path(path).unlink()  # a trained student needs no teacher
    done.method[0].student()


def test_memorised_labels_do_not_teach(monkeypatch, tmp_path):
    """Labels are random, and networks learn them by heart: who has seen a label gives it, and who has not cannot."""
    monkeypatch.chdir(tmp_path)
    noise = {"class_path": "SymmetricNoise", "init_args": {"rate": 0.9}}
    plain = {"class_path": "torch.nn.Identity"}
    config = make_config(label_noise=noise, train_transform=plain, val_size=0)
    config["trainer"] |= {"max_epochs": 90, "enable_model_summary": False}
    config["model"]["init_args"]["student"]["init_args"]["width"] = 8
    config["model"]["init_args"]["optimizer"] = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}
    crossfit(config, "--folds", "2")
    data = command.build_data(parse_config(["--config=config.yaml"], "crossfit"), "crossfit")
    index = torch.tensor(data.split.labeled)
    x, labels = IMAGES.images.tensors[0][index], data.visible_labels()[index]
    teacher = CrossFittedTeacher("runs/teacher_crossfit/crossfit.json")
    teacher.find_samples(data, "train")
    folds = teacher.folds_of(Batch(x, index=index))
    for number, network in enumerate(teacher.network):
        assert (network(x).argmax(dim=1) == labels)[folds != number].double().mean() > 0.9
    taught = (teacher(Batch(x, index=index)).argmax(dim=1) == labels).double().mean().item()
    assert taught < 0.3 and taught == pytest.approx(read().right / 40)
