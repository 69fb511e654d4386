"""push: the card as the Hub reads it, a folder that predicts alone, nothing private in it, the upload, bad input."""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import onnx
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from torch import nn

from kd_lightning.__main__ import main
from kd_lightning.deploy.model_card import TODO, student_packages
from kd_lightning.deploy.predict import predict
from kd_lightning.modules import DistillModule
from kd_lightning.runs.run import Run

LICENSES = ["--license", "apache-2.0", "--data-license", "cc0-1.0", "--teacher-license", "Acme | Terms"]
SECRET = "correct horse battery"


class Net(nn.Sequential):
    """A tiny network of pictures."""

    def __init__(self, width=2):
        super().__init__(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * width, 2))


class Turned(DistillModule):
    """Turns pictures where they come to the device."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return replace(batch, x=batch.x.flip(-1))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A finished experiment with its report and an ONNX file; the data are gone. Not to be changed."""
    home = tmp_path_factory.mktemp("ada")
    random = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 6)):
        for label, name in enumerate(("c<b>at", "d|og")):
            (home / "secret_photos" / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 128, (9, 9, 3), dtype=np.uint8) + np.uint8(120 * label)
                Image.fromarray(pixels).save(home / "secret_photos" / part / name / f"{number}.png")
    source = {part: str(home / "secret_photos" / part) for part in ("train", "test")}
    config = {
        "name": "teacher",
        "trainer": {
            "max_epochs": 2,
            "accelerator": "cpu",
            "default_root_dir": str(home / "runs"),
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "model": {
            "class_path": "SupervisedModule",
            "init_args": {"student": {"class_path": f"{__name__}.Net", "init_args": {"width": 8}}},
        },
        "data": {
            "class_path": "SemiSupervisedDataModule",
            "init_args": {
                "source": {"class_path": "ImageFolder", "init_args": {**source, "image_size": 8}},
                "batch_size": 8,
            },
        },
    }
    file = home / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(file)])
    main(["test", "--config", str(file)])
    weights = str(home / "runs/teacher/version_0/student.safetensors")
    loaded = {"model": {"class_path": f"{__name__}.Net", "init_args": {"width": 8}}, "path": weights}
    teacher = {"class_path": "kd_lightning.load_weights", "init_args": loaded}
    student = {"class_path": f"{__name__}.Net", "init_args": {"width": 2}}
    config["model"] = {"class_path": "DistillModule", "init_args": {"student": student, "teacher": teacher}}
    config["name"] = "small"
    file.write_text(yaml.safe_dump(config))
    main(["experiment", "--config", str(file), "--seeds", "1"])
    main(["export", str(home / "runs/small/version_0")])
    shutil.rmtree(home / "secret_photos")
    return home


@pytest.fixture(scope="module")
def run(project):
    return project / "runs/small/version_0"


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    """The folder that push writes. Not to be changed."""
    out = tmp_path_factory.mktemp("pushed") / "model"
    main(["push", str(run), "hf://ada/small-net", *LICENSES, "--out", str(out)])
    return out


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (11, 9, 3), dtype=np.uint8)).save(path)
    return path


# The folder.


def test_the_folder_has_all_files(folder):
    names = {"README.md", "config.yaml", "report.html", "student.onnx", "student.safetensors"}
    assert {path.name for path in folder.iterdir()} == names


def test_the_folder_alone_predicts_as_the_run(folder, run, photo, tmp_path, monkeypatch, capsys):
    alone = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    monkeypatch.chdir(alone)
    wanted = Run(run).predict(photo)
    torch.testing.assert_close(predict("student.safetensors", photo).values, wanted.values)
    torch.testing.assert_close(predict("student.onnx", photo).values, wanted.values)
    capsys.readouterr()
    main(["predict", "student.safetensors", str(photo), "--workers", "0"])
    assert wanted.names[int(wanted.values.argmax())] in capsys.readouterr().out


def test_other_data_of_the_same_name_change_nothing(folder, run, photo, tmp_path, monkeypatch):
    for part in ("train", "test"):  # as the config names them
        for place in (part, f"<{part}>"):
            (tmp_path / place / "x").mkdir(parents=True)
            Image.new("RGB", (30, 20)).save(tmp_path / place / "x/0.png")
    monkeypatch.chdir(tmp_path)
    found = predict(folder / "student.safetensors", photo)
    torch.testing.assert_close(found.values, Run(run).predict(photo).values)
    assert found.names == ["c<b>at", "d|og"]


def test_nothing_names_this_machine(folder, project):
    for path in folder.iterdir():
        content = path.read_bytes().replace(b"<wbr>", b"")
        for private in (str(project), project.name, str(Path.home()) + "/", "secret_photos/", str(Path.cwd())):
            assert private.encode() not in content, f"{path.name} has {private}"


def test_the_report_has_no_samples(folder, run):
    page = (folder / "report.html").read_text()
    before = (run.parents[1] / "small_comparison/report.html").read_text()
    assert '<section id="accuracy"' in page and '<section id="cost"' in page
    assert "data:image" not in page and 'class="card"' not in page and ".png" not in page
    sections = set(re.findall(r'<section id="([\w-]+)"', page))
    assert '<section id="soft_targets"' in before and "soft_targets" not in sections
    assert {*re.findall(r'href="#([\w-]+)"', re.search(r"(?s)<nav.*?</nav>", page)[0])} == sections - {"left-out"}
    assert re.search(r"(?s)<style>.*?</style>", page)[0] == re.search(r"(?s)<style>.*?</style>", before)[0]


# The card.


def test_the_hub_reads_the_card(folder, run):
    card = ModelCard.load(folder / "README.md")  # raises for a model-index that is not valid
    assert card.data.license == "apache-2.0"
    assert card.data.pipeline_tag == "image-classification" and card.data.library_name == "kd_lightning"
    assert {"knowledge-distillation", "onnx"} <= {*card.data.tags}
    result = Run(run).result("test")
    figures = {entry.metric_type: entry for entry in card.data.eval_results}
    assert figures["accuracy"].metric_value == pytest.approx(result.figures["accuracy"], abs=1e-6)
    assert result.samples == 12 and figures["accuracy"].metric_name == "accuracy (n = 12)"
    assert figures["accuracy"].dataset_args == {"samples": 12} and figures["accuracy"].dataset_split == "test"
    assert {*card.data.metrics} == {*figures}
    again = yaml.safe_load(card.data.to_yaml())  # as the Hub's own client writes it
    assert again["model-index"][0]["name"] == "small-net"


def test_the_card_has_what_the_report_has(folder, run):
    text = (folder / "README.md").read_text()
    table = text.partition("## Intended use")[0]
    rows = {line.split("|")[1].strip(): line.split("|") for line in table.splitlines() if line.startswith("| ")}
    runs = {"student alone": "small_alone", "**distilled** (this model)": "small", "teacher": "teacher"}
    for name, other in runs.items():
        figures = Run(run.parents[1] / other / "version_0").result("test").figures
        assert rows[name][2].strip() == f"{100 * figures['accuracy']:.2f}" and rows[name][3].strip() == "12"
    count = sum(p.numel() for p in Net().parameters())
    assert rows["**distilled** (this model)"][5].strip() == str(count) == rows["student alone"][5].strip()
    assert "a verdict needs 100" in text and text.count(TODO) == 2
    assert rows["teacher"][2] and "Acme \\| Terms" in text and "cc0-1.0" in text
    assert "`DistillModule`" in text and "max_epochs" not in text and "- epochs: 2" in text and "- seed: 0" in text
    blocks = re.findall(r"(?s)```json\n(.*?)```", text)
    assert json.loads(blocks[0]) == json.loads(Run(run).metadata["preprocessing"])
    assert json.loads(blocks[1]) == ["c<b>at", "d|og"]


def test_the_card_names_what_the_student_needs(folder, run):
    """timm is an extra, so it is named; what only the teacher needs is not."""
    assert (
        f"The student needs `{__name__.partition('.')[0]}`, which must be installed"
        in (folder / "README.md").read_text()
    )
    student = {"class_path": "timm.create_model", "dict_kwargs": {"model_name": "test_resnet"}}
    teacher = {"class_path": "transformers.ViTModel", "init_args": {"config": {"class_path": "transformers.ViTConfig"}}}
    model = {"class_path": "DistillModule", "init_args": {"student": student, "teacher": teacher}}
    assert student_packages(model) == ["timm"]
    model["init_args"]["student"] = {"class_path": "torchvision.models.resnet18"}
    assert student_packages(model) == []
    module = {"class_path": "mine.Module", "init_args": {"net": student}}
    taught = {"class_path": "kd_lightning.teach", "init_args": {"module": module, "teacher": teacher}}
    assert student_packages(taught) == ["mine", "timm"]


def test_the_examples_of_the_card_run(folder, photo, tmp_path, monkeypatch, capsys):
    python, numpy = re.findall(r"(?s)```python\n(.*?)```", (folder / "README.md").read_text())
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name: str(folder))
    shutil.copy(photo, tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    exec(python, {})
    monkeypatch.chdir(folder)
    exec(numpy, {})
    assert "photo.jpg" in capsys.readouterr().out


# What is left out.


def test_files_of_other_weights_are_left_out(run, tmp_path, capsys):
    other = Path(shutil.copytree(run, tmp_path / "runs/small/version_0"))
    file = onnx.load(other / "export/student.onnx")
    next(entry for entry in file.metadata_props if entry.key == "weights_sha256").value = "0" * 64
    onnx.save(file, other / "export/student.onnx")
    page = (run.parents[1] / "small_comparison/report.html").read_text()
    (other / "report.html").write_text(page.replace(Run(other).weights_hash[:12], "0" * 12))
    capsys.readouterr()
    main(["push", str(other), "hf://ada/x", *LICENSES, "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "student.onnx: it does not hold the deployed weights" in said
    assert "report.html: it is not about these weights" in said
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"README.md", "config.yaml", "student.safetensors"}


def test_the_card_warns_of_a_module_that_changes_inputs(run, folder, tmp_path):
    warning = "may change this input before its network gets it"
    other = Path(shutil.copytree(run, tmp_path / "run"))
    config = yaml.safe_load((other / "config.yaml").read_text())
    config["model"]["class_path"] = f"{__name__}.Turned"
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    main(["push", str(other), "hf://ada/x", *LICENSES, "--out", str(tmp_path / "out")])
    assert warning in (tmp_path / "out/README.md").read_text()
    assert warning not in (folder / "README.md").read_text()


def test_a_secret_of_the_environment_is_refused(run, tmp_path, monkeypatch, fails):
    other = Path(shutil.copytree(run, tmp_path / "run"))
    config = yaml.safe_load((other / "config.yaml").read_text()) | {"name": SECRET}
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("ACME_TOKEN", SECRET)
    message = fails("push", str(other), "hf://ada/x", *LICENSES, "--out", str(tmp_path / "out"))
    assert "value of the environment variable ACME_TOKEN" in message and SECRET not in message
    assert not (tmp_path / "out").exists()


# The upload.


@pytest.fixture
def hub(monkeypatch):
    """A Hub that records what comes."""
    found = SimpleNamespace(calls=[], files={}, error=None)

    class Api:
        def create_repo(self, repo_id, exist_ok):
            found.calls.append(("create", repo_id, exist_ok))
            return f"https://huggingface.co/{repo_id}"

        def upload_folder(self, repo_id, folder_path, commit_message, delete_patterns):
            if found.error is not None:
                raise found.error
            found.calls.append(("upload", repo_id, tuple(delete_patterns)))
            found.files |= {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    return found


def test_upload(run, folder, hub, capsys):
    main(["push", str(run), "hf://ada/small-net", *LICENSES])
    assert hub.calls == [("create", "ada/small-net", True), ("upload", "ada/small-net", ("*.onnx", "report.html"))]
    assert {*hub.files} == {path.name for path in folder.iterdir()}
    assert hub.files["student.safetensors"] == (run / "student.safetensors").read_bytes()
    assert "uploaded to https://huggingface.co/ada/small-net" in capsys.readouterr().out


def test_with_out_nothing_is_uploaded(run, hub, tmp_path, capsys):
    main(["push", str(run), "hf://ada/small-net", *LICENSES, "--out", str(tmp_path / "out")])
    assert not hub.calls
    assert f"hf upload ada/small-net {tmp_path / 'out'} ." in capsys.readouterr().out


def test_without_a_network_or_token(run, hub, monkeypatch, fails):
    hub.error = ConnectionError("no route to host\nmore")
    message = fails("push", str(run), "hf://ada/small-net", *LICENSES)
    assert "ConnectionError: no route to host; --out DIR writes the folder" in message
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "push needs a token" in fails("push", str(run), "hf://ada/small-net", *LICENSES)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'kd-lightning[hf]'" in fails("push", str(run), "hf://ada/small-net", *LICENSES)


# Bad input.


@pytest.mark.parametrize("place", ["ada/x", "hf://x", "hf://a/b/c", "hf://a/x--y", "hf://a/.x", "hf://datasets/a/x"])
def test_place(run, place, fails):
    assert "the place must be hf://OWNER/NAME" in fails("push", str(run), place, *LICENSES)


def test_licenses_are_required(run, project, fails, tmp_path):
    start = ["push", str(run), "hf://ada/x", "--out", str(tmp_path / "out")]
    assert "push needs --license and --data-license" in fails(*start)
    assert "push needs --data-license" in fails(*start, "--license", "mit")
    both = ["--license", "mit", "--data-license", "mit"]
    assert "push needs --teacher-license, the licence of the teacher's weights" in fails(*start, *both)
    assert "the Hub writes Apache 2.0 as apache-2.0" in fails(*start, *LICENSES, "--license", "Apache 2.0")
    start[1] = str(project / "runs/small_alone/version_0")
    assert "was trained without a teacher" in fails(*start, *LICENSES)


def test_out_must_be_empty(run, tmp_path, fails):
    (tmp_path / "README.md").write_text("mine")
    message = fails("push", str(run), "hf://ada/x", *LICENSES, "--out", str(tmp_path))
    assert "--out must be a new or an empty folder" in message
    assert (tmp_path / "README.md").read_text() == "mine"


def test_missing_licenses_are_asked_for_on_a_terminal(run, tmp_path, monkeypatch):
    answers = iter(["mit", "cc-by-4.0", "mit"])
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda text: next(answers))
    main(["push", str(run), "hf://ada/x", "--out", str(tmp_path / "out")])
    assert ModelCard.load(tmp_path / "out/README.md").data.license == "mit"
    assert "| data | cc-by-4.0 |" in (tmp_path / "out/README.md").read_text()
