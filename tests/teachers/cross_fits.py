"""Cross-fittings for tests, without any training."""

import hashlib
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from kd_lightning.models import DigitsCNN
from kd_lightning.teachers.cross_fit import CrossFit, Fold

MODEL = {"class_path": "SupervisedModule", "init_args": {"student": {"class_path": "DigitsCNN", "init_args": {}}}}


def constant(number):
    """A network that outputs one class, whatever comes in."""
    network = DigitsCNN(width=2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        [*network.parameters()][-1][number] = 20.0
    return network


def random(seed):
    torch.manual_seed(seed)
    return DigitsCNN(width=2)


def save_run(folder, network):
    """Write what a finished run leaves of its student, and return the hash of the weights."""
    folder.mkdir(parents=True)
    model = yaml.safe_load(yaml.safe_dump(MODEL))
    model["init_args"]["student"]["init_args"]["width"] = 2
    (folder / "config.yaml").write_text(yaml.safe_dump({"name": folder.name, "model": model}))
    save_file(network.state_dict(), folder / "student.safetensors")
    return hashlib.sha256((folder / "student.safetensors").read_bytes()).hexdigest()


def write_cross_fit(folder, data, networks, folds=None):
    """Write a cross-fitting of the data's labeled samples, and return its file and the indices of each fold.

    Args:
        folder: The folder.
        data: The datamodule.
        networks: A network for each fold.
        folds: Indices of each fold. By default, labeled samples are dealt in turn.
    """
    data.setup("fit")
    labeled, names = data.split.labeled, data.identities("train")
    folds = [labeled[number :: len(networks)] for number in range(len(networks))] if folds is None else folds
    found = []
    for number, (network, fold) in enumerate(zip(networks, folds, strict=True)):
        weights = save_run(Path(folder) / f"fold_{number}", network)
        contents = [names.contents[index].partition("#")[0] for index in fold]
        found.append(Fold(f"fold_{number}", weights, [names.paths[index] for index in fold], contents))
    file = Path(folder) / "crossfit.json"
    CrossFit("multiclass", found).save(file)
    return file, folds
