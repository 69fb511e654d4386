"""Runs to report about: made by hand, and trained."""

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from kd_lightning.__main__ import main
from kd_lightning.models import DigitsCNN
from kd_lightning.runs.results import Prediction, Result, write_result
from kd_lightning.runs.run import Run
from kd_lightning.runs.weights import save_weights

NAMES = ["<script>alert(1)<", "a \"b\" 'c' & {{ 7 * 7 }}", "plain $x_1$"]  # a folder's name has no slash
NETWORK = {"class_path": "kd_lightning.models.DigitsCNN", "init_args": {"width": 8}}


@pytest.fixture
def make(tmp_path):
    """Makes a finished run below ``runs``, whose data are gone, with predictions of its test part."""

    def make(name, seed, correct, module="DistillModule", names=NAMES, **arguments):
        folder = tmp_path / "runs" / name / f"version_{seed}"
        folder.mkdir(parents=True)
        arguments = {"student": NETWORK, **arguments}
        config = {"name": name, "seed_everything": seed, "model": {"class_path": module, "init_args": arguments}}
        config["data"] = {"class_path": "X", "init_args": {"source": {"class_path": "Gone"}}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        Run.write_state(folder, finished=True)
        torch.manual_seed(seed)
        save_weights(DigitsCNN(8).state_dict(), folder / "student.safetensors", {"input_shape": [1, 8, 8]})
        result = Result("test", len(correct), {"accuracy": float(np.mean(correct))}, Run(folder).weights_hash, folder)
        labels = [names[k % len(names)] for k in range(len(correct))]
        rows = zip(labels, correct, strict=True)
        write_result(result, [Prediction(k, y, y if one else "other", float(one)) for k, (y, one) in enumerate(rows)])
        return folder

    return make


@pytest.fixture(scope="session")
def experiment(tmp_path_factory):
    """The folder of the comparison of an experiment of two seeds on pictures whose classes have hostile names."""
    root = tmp_path_factory.mktemp("report")
    random = np.random.default_rng(0)
    for part, count in (("train", 20), ("test", 36)):
        for number, name in enumerate(NAMES):
            folder = root / part / name
            folder.mkdir(parents=True)
            for k in range(count):
                pixels = random.normal(90 + 40 * number, 45, (12, 12, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{k} <b>.png")
    source = {"class_path": "ImageFolder", "init_args": {"train": str(root / "train"), "test": str(root / "test")}}
    source["init_args"]["image_size"] = 12
    network = {"class_path": "kd_lightning.models.resnet8", "init_args": {"num_classes": 3}}
    config = {
        "name": "teacher",
        "seed_everything": 0,
        "trainer": {"max_epochs": 4, "accelerator": "cpu", "enable_progress_bar": False},
        "model": {"class_path": "SupervisedModule", "init_args": {"student": network}},
        "data": {"class_path": "SemiSupervisedDataModule", "init_args": {"source": source, "batch_size": 16}},
    }
    config["trainer"]["default_root_dir"] = str(root / "runs")
    teacher = root / "teacher.yaml"
    teacher.write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(teacher)])
    main(["test", "--config", str(teacher)])
    path = str(root / "runs/teacher/version_0/student.safetensors")
    loaded = {"class_path": "kd_lightning.load_weights", "init_args": {"model": network, "path": path}}
    config["name"] = "distil & <i>"
    config["trainer"]["max_epochs"] = 2
    arguments = {"student": network, "teacher": loaded, "soft_weight": 0.5}
    config["model"] = {"class_path": "DistillModule", "init_args": arguments}
    config["data"]["init_args"]["labeled"] = 5
    (root / "distill.yaml").write_text(yaml.safe_dump(config))
    out = root / "runs" / "comparison"
    main(["experiment", str(root / "distill.yaml"), "--seeds", "2", "--out", str(out)])
    return out
