"""From a folder to a student, its files and its report; label and clean on a folder."""

import csv
import importlib
import json

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule

import kd_lightning
from kd_lightning.__main__ import main
from kd_lightning.cli.commands import experiment
from kd_lightning.cli.parse import parse_config
from kd_lightning.cli.short.clean import write_clean_config
from kd_lightning.cli.short.distill import plan_distillation
from kd_lightning.cli.short.label import plan_labeling
from kd_lightning.errors import InputError
from kd_lightning.runs.build import build
from kd_lightning.runs.run import Run


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A distillation of made-up photos, and where it lies: folder of pictures, folder of all files."""
    root = tmp_path_factory.mktemp("short")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(kd_lightning.__path__[0] + "/../benchmarks"))
        photos = importlib.import_module("photos").make_photos(root / "photos", 8)
    main(line(photos, root))
    return photos, root / "runs/photos"


def line(photos, root, *more, student="resnet8"):
    names = ["--student", student, "--teacher", "resnet14", "--out", str(root / "runs")]
    return ["distill", str(photos), *names, "--epochs", "1", "--image-size", "32", *more]


def rows_of(path):
    with path.open() as file:
        return [*csv.DictReader(file)]


def versions(root):
    return sorted(str(path.relative_to(root)) for path in root.glob("*/version_*"))


def test_files(done):
    _, root = done
    assert versions(root) == ["resnet8/version_0", "resnet8_alone/version_0", "teacher_resnet14/version_0"]
    names = {path.name for path in root.iterdir() if path.is_file()}
    assert names == {"split.csv", "teacher_resnet14.yaml", "resnet8.yaml", "student.onnx", "report.html"}
    run = Run(root / "resnet8/version_0")
    assert run.finished and run.result("test").samples == 6
    assert (run.folder / "recipe.yaml").read_text() == (root / "resnet8.yaml").read_text()
    assert run.class_names == ["circle", "square", "triangle"]
    assert "resnet8" in (root / "report.html").read_text()
    comparison = json.loads((root / "resnet8_comparison/comparison.json").read_text())
    assert [group["name"] for group in comparison["groups"]] == ["resnet8_alone", "resnet8", "teacher_resnet14"]


def test_the_yaml_is_that_of_a_fit_and_has_comments(done):
    _, root = done
    for name in ("teacher_resnet14", "resnet8"):
        text = (root / f"{name}.yaml").read_text()
        assert text.startswith("# ") and f"kd-lightning fit --config {root / name}.yaml" in text
        config = parse_config(["--config", str(root / f"{name}.yaml")], "test")
        saved = Run(root / name / "version_0").config
        assert config["model"] == saved["model"] and config["data"] == saved["data"]
        assert yaml.safe_load(text)["trainer"]["max_epochs"] == 1


def test_the_test_part_trains_nowhere(done):
    _, root = done
    with (root / "split.csv").open() as file:
        test = {row["path"] for row in csv.DictReader(file) if row["split"] == "test"}
    assert len(test) == 6
    for run in map(Run, root.glob("*/version_0")):
        split = json.loads((run.folder / "split.json").read_text())
        assert split["val"] == json.loads((root / "teacher_resnet14/version_0/split.json").read_text())["val"]
        assert len(split["samples"]["paths"]) == 18 and not test & {*split["samples"]["paths"]}
        assert {row.path for row in run.result("test").predictions()} == test


def test_the_onnx_file_predicts_as_the_student(done):
    _, root = done
    student = Run(root / "resnet8/version_0").student().eval()
    x = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(root / "student.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(logits, student(x).detach().numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_second_time_nothing_is_trained(done, capsys):
    photos, root = done
    before = {path: path.read_bytes() for path in root.glob("*.yaml")}
    run = kd_lightning.distill(photos, "resnet8", "resnet14", epochs=1, image_size=32, out=root.parent)
    assert run.folder == root / "resnet8/version_0"
    out = capsys.readouterr().out
    assert len(versions(root)) == 3 and out.count("is done:") == 3
    assert "does the teacher help? 6 test pictures cannot tell: a verdict needs 100" in out  # nor could more seeds
    assert {path: path.read_bytes() for path in root.glob("*.yaml")} == before


@pytest.mark.slow
def test_other_options_get_a_new_version_and_edits_are_not_lost(done, capsys):
    photos, root = done
    edited = (root / "resnet8.yaml").read_text() + "# mine\n"
    (root / "resnet8.yaml").write_text(edited)
    main([*line(photos, root.parent.parent), "--pretrained", str(root / "teacher_resnet14/version_0"), "--seeds", "2"])
    out = capsys.readouterr().out
    assert f"{root / 'resnet8.yaml'} had other settings; they are in {root / 'resnet8.1.yaml'}" in out
    assert "resnet14 has the weights of" in out and "and is not trained" in out
    assert (root / "resnet8.1.yaml").read_text() == edited
    assert len(versions(root)) == 3 + 2 * 2  # the teacher is not trained again, and its split is no setting now
    for name in ("resnet8", "resnet8_alone"):
        assert [Run(root / name / f"version_{k}").seed for k in (0, 1, 2)] == [0, 0, 1]


@pytest.mark.slow
def test_what_was_interrupted_goes_on(done, tmp_path, monkeypatch, capsys):
    photos, _ = done

    def stop(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "compare_runs", stop)
        with pytest.raises(KeyboardInterrupt):
            kd_lightning.distill(photos, "resnet8", "resnet14", epochs=1, image_size=32, out=tmp_path)
    capsys.readouterr()
    kd_lightning.distill(photos, "resnet8", "resnet14", epochs=1, image_size=32, out=tmp_path)
    assert capsys.readouterr().out.count("is done:") == 3
    assert len(versions(tmp_path / "photos")) == 3


def test_dry_run_writes_nothing_and_prints_what_would_be_written(done, tmp_path, capsys):
    photos, root = done
    main([*line(photos, tmp_path), "--dry-run"])
    teacher, student = yaml.safe_load_all(capsys.readouterr().out)
    assert not [*tmp_path.iterdir()]
    weights = student["model"]["init_args"]["teacher"]["init_args"]["path"]
    assert weights == str(tmp_path / "runs/photos/teacher_resnet14/version_0/student.safetensors")
    written = yaml.safe_load((root / "teacher_resnet14.yaml").read_text())
    assert teacher["model"] == written["model"] and teacher["trainer"].keys() == written["trainer"].keys()


@pytest.mark.slow
def test_several_students(done, tmp_path, capsys):
    photos, root = done
    teacher = ["--pretrained", str(root / "teacher_resnet14/version_0")]
    main(
        [
            *line(photos, tmp_path)[:2],
            "--students",
            "resnet8,resnet20,resnet14",
            *line(photos, tmp_path)[4:],
            *teacher,
            "--max-size",
            "1",
        ]
    )
    out = capsys.readouterr().out
    assert "warning: the student resnet14 is not smaller than the teacher resnet14" in out
    assert "above the limit, and not trained: resnet20" in out
    runs = tmp_path / "runs/photos"
    with (runs / "students.csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert [row["student"] for row in rows] == ["resnet8", "resnet14"]
    assert sum(int(row["chosen"]) for row in rows) == 1
    assert (runs / "students.png").is_file() and (runs / "student.onnx").is_file()
    for row in rows:
        accuracy = Run(runs / row["student"] / "version_0").result("test").figures["accuracy"]
        assert float(row["accuracy_percent"]) == pytest.approx(100 * accuracy, abs=0.06)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--teacher", "resnet14"], "--student is missing: name one, several by --students, or a limit"),
        (["--teacher", "resnet14", "--student", "resnet8", "--max-size", "0.1"], "no student is within 0.1 MB"),
        (
            ["--teacher", "resnet14", "--student", "resnet8", "--max-size", "5", "--max-latency", "1e-6"],
            "--max-size, --max-latency: no student is within 5 MB and 1e-06 ms",
        ),
        (["--teacher", "resnet8", "--max-latency", "9"], "--max-latency: no known student is smaller than the teacher"),
        (["--teacher", "resnet14", "--student", "resnet8", "--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--teacher", "resnet14", "--student", "a", "--students", "b"], "--student and --students: give one of them"),
        (["--teacher", "resnet14", "--students", "a,,b"], "--students must be names with commas"),
        (["--teacher", "resnt14", "--student", "resnet8"], "--teacher: this package and torchvision have no network"),
    ],
)
def test_wrong_options(done, tmp_path, fails, monkeypatch, more, text):
    monkeypatch.chdir(tmp_path)
    assert text in fails("distill", str(done[0]), *more)
    assert not [*tmp_path.iterdir()]


def test_folders_that_are_none(done, tmp_path, fails):
    names = ["--student", "resnet8", "--teacher", "resnet14"]
    assert "FOLDER: nowhere does not exist" in fails("distill", "nowhere", *names)
    assert "is a run, and a folder of pictures is needed" in fails(
        "distill", str(done[1] / "resnet8/version_0"), *names
    )
    assert "is a config; kd-lightning experiment" in fails("distill", str(done[1] / "resnet8.yaml"), *names)


@pytest.mark.slow
def test_label(class_folders, tmp_path, capsys):
    folder = class_folders({"cat": 6, "dog": 6, "unlabeled": 10})
    run = kd_lightning.label(folder, "resnet8", epochs=1, image_size=32, out=tmp_path / "runs")
    root = tmp_path / "runs/photos"
    assert run.folder == root / "label_resnet8/version_0" and run.finished
    with (root / "pseudo_labels.csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert {row["path"] for row in rows} == {str(path) for path in (folder / "unlabeled").iterdir()}
    sure = [float(row["probability"]) for row in rows]
    assert sure == sorted(sure) and {row["label"] for row in rows} <= {"cat", "dog"}
    assert (root / "student.onnx").is_file()
    out = capsys.readouterr().out
    assert "no test part" in out and f"kd-lightning fit --config {root / 'checked_resnet8.yaml'}\n" in out
    checked = root / "checked_resnet8.yaml"
    config = parse_config(["--config", str(checked)], "t")
    data = build(LightningDataModule, config["data"])
    data.prepare_data()
    data.setup("fit")
    assert (data.visible_labels() >= 0).sum() == 10 + 10  # 2 of the 12 labels validate; the file has the others
    main(["fit", "--config", str(checked)])
    assert Run(root / "checked_resnet8/version_0").finished


def test_label_needs_pictures_without_a_label(class_folders, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "has no pictures without a label: put them into its folder unlabeled, or hide labels by --labels-per-class"
    assert text in fails("label", str(class_folders({"cat": 6, "dog": 6})))


@pytest.mark.slow
def test_clean_on_a_folder(class_folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    class_folders({"cat": 6, "dog": 6})
    main(["clean", "photos", "--student", "resnet8", "--epochs", "1", "--image-size", "32", "--folds", "2"])
    out = capsys.readouterr().out
    assert "config: runs/photos/all_resnet8.yaml" in out and "labels (" in out
    assert (tmp_path / "runs/photos/all_resnet8_clean/suspects.csv").is_file()


def test_clean_and_distill_on_one_folder(class_folders, tmp_path, monkeypatch):
    """Clean judges all labels, and distill has a test part, whichever comes first; no config replaces another one."""
    monkeypatch.chdir(tmp_path)
    folder = class_folders({"cat": 10, "dog": 10})
    for _ in range(2):
        path = write_clean_config(folder, "resnet8", 1, 32)
        assert {row["split"] for row in rows_of(path.with_name("all.csv"))} == {"train"}
        found = plan_distillation(folder, "resnet14", ["resnet8"], epochs=1, image_size=32)
        assert found.plan.pictures.counts("test") == {"cat": 2, "dog": 2}
        found.plan.write()
        assert path.stem not in found.configs()


def test_distill_after_label_refuses_a_table_without_a_test_part(class_folders, tmp_path, monkeypatch):
    """A test part of pictures that have trained would be none."""
    monkeypatch.chdir(tmp_path)
    folder = class_folders({"cat": 6, "dog": 6, "unlabeled": 10})
    plan_labeling(folder, "resnet8", epochs=1, image_size=32).plan.write()
    text = r"runs/photos/split.csv has no picture of split test, and a test part is needed: .* by --name"
    with pytest.raises(InputError, match=text):
        plan_distillation(folder, "resnet14", ["resnet8"], epochs=1, image_size=32)
    assert plan_distillation(folder, "resnet14", ["resnet8"], epochs=1, image_size=32, name="b").students


def test_clean_on_a_config_takes_no_student(done, fails):
    text = "--student is for a FOLDER of pictures, and a config has its own, got resnet8"
    assert text in fails("clean", str(done[1] / "resnet8.yaml"), "--student", "resnet8")
