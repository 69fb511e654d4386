"""A run's folder: the one reader and writer of what a run leaves."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningDataModule
from safetensors.torch import load_file
from torch import Tensor, nn

from kd_lightning.errors import InputError
from kd_lightning.runs.build import build
from kd_lightning.runs.checkpoints import read_checkpoint
from kd_lightning.runs.config_identity import differing_keys, hash_files, identity_of, seeds_of
from kd_lightning.runs.csv_logger import read_metrics, validations
from kd_lightning.runs.predictions import Predictions
from kd_lightning.runs.results import Result, read_result
from kd_lightning.runs.student import build_student, has_student, student_prefix
from kd_lightning.runs.weights import class_names_of, load_weights, plain_key, read_metadata
from kd_lightning.runs.yaml_file import load_yaml

CONFIG, STATE, SPLIT, METRICS, WEIGHTS = "config.yaml", "run.json", "split.json", "metrics.csv", "student.safetensors"


class Run:
    """The folder of a run: its config, figures, checkpoints, deployed weights and data.

    Properties read the folder when they are used, and objects are built from the saved config.

    Args:
        folder: The folder.

    Raises:
        InputError: If it is no run's folder; the message names runs below it. Properties and methods raise it for a
            part that is missing or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / CONFIG).is_file():
            inner = sorted((path.parent for path in self.folder.glob(f"*/{CONFIG}")), key=_by_version)
            hint = f"; name one of its runs: {', '.join(path.name for path in inner[-3:])}" if inner else ""
            problem = f"has no {CONFIG}" if self.folder.is_dir() else "does not exist"
            raise InputError(f"{self.folder} is no run: it {problem}{hint}")

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    # What the run is.

    @cached_property
    def config(self) -> dict[str, Any]:
        """The config of ``fit``."""
        path = self.folder / CONFIG
        try:
            config = load_yaml(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
        if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
            raise InputError(f"{path} is not the config of a run: it has no model")
        return config

    @property
    def name(self) -> str:
        """The name of the run: runs of one name differ in seed, or were fitted with other settings."""
        return str(self.config.get("name") or self.folder.parent.name)

    @property
    def seed(self) -> int | None:
        """The seed of weights and training."""
        seed = seeds_of(self.config)[0]
        return seed if isinstance(seed, int) else None

    @property
    def seeds(self) -> tuple[Any, Any]:
        """The seed of weights and training, and that of split, order and augmentation."""
        return seeds_of(self.config)

    @property
    def identity(self) -> str:
        """A hash of the config without seeds and folders, and of the files that it names."""
        return identity_of(self.config, self.state.get("files") or {})

    def differing_keys(self, config: Mapping[str, Any], files: Mapping[str, str] | None = None) -> list[str]:
        """Return a text for each key in which another config is not this run's, seeds included.

        Args:
            config: The other config.
            files: Hashes of the files that it names, to compare with those of this run. Default: None, which means
                that the config is for an evaluation: files, and settings of the machine, are not compared.
        """
        before = self.state.get("files") or {}
        found = differing_keys(config, self.config, evaluation=files is None)
        if found and before:  # a file may have another path and the same content
            now = hash_files(config) if files is None else files
            same = {key for key, digest in before.items() if now.get(key) == digest}
            found = differing_keys(config, self.config, evaluation=files is None, same_files=same)
        for key, mine, theirs in zip(_SEEDS, seeds_of(config), self.seeds, strict=True):
            if mine != theirs:
                found.append(f"{key}: {json.dumps(mine)}, not {json.dumps(theirs)}")
        for key in sorted(before.keys() & (files or {}).keys()):
            if files is not None and files[key] != before[key]:
                found.append(f"{key}: the content of the file has changed since")
        return found

    # Whether it is finished.

    @property
    def state(self) -> dict[str, Any]:
        """The content of ``run.json``, empty if there is none."""
        try:
            state = json.loads((self.folder / STATE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise InputError(f"{self.folder / STATE} cannot be read: {error}") from error
        return state if isinstance(state, dict) else {}

    @property
    def started(self) -> float:
        """When its fit began, in seconds since 1970."""
        return float(self.state.get("started") or (self.folder / CONFIG).stat().st_mtime)

    @property
    def finished(self) -> bool:
        """Whether its fit has ended as planned."""
        return bool(self.state.get("finished", self.weights.is_file()))

    @staticmethod
    def write_state(folder: Path, **values: Any) -> None:
        """Add values to the ``run.json`` of a folder, which need not be a whole run yet."""
        path = folder / STATE
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            before = {"started": time.time()}
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{STATE}.part")
        part.write_text(json.dumps(before | values, indent=1) + "\n", encoding="utf-8")
        part.replace(path)

    # Figures.

    def rows(self) -> list[dict[str, float]]:
        """The rows of ``metrics.csv`` without their empty cells."""
        return read_metrics(self.folder / METRICS)

    def validations(self) -> list[dict[str, float]]:
        """The rows of ``metrics.csv`` that hold the validations of its fit."""
        return validations(self.rows())

    def result(self, part: str = "test") -> Result | None:
        """The figures of a part, measured on the deployed weights; None if there are none.

        Args:
            part: ``"test"``, ``"transductive/test"`` or ``"val"``.
        """
        result = read_result(self.folder, part)
        return None if result is None or result.weights != self.weights_hash else result

    @property
    def weights_hash(self) -> str | None:
        """SHA-256 of the deployed weights, None without any."""
        if not self.weights.is_file():
            return None
        return hashlib.sha256(self.weights.read_bytes()).hexdigest()

    # Data.

    @property
    def split_file(self) -> Path | None:
        """The file of its split, if it has one."""
        path = self.folder / SPLIT
        return path if path.is_file() else None

    def data_config(self) -> dict[str, Any]:
        """The config of its datamodule with the run's own split, which holds the labels of label files, too."""
        data = self.config.get("data")
        if not isinstance(data, dict):
            raise InputError(f"{self.folder / CONFIG} has no data, so the samples of {self.folder} cannot be found")
        if self.split_file is None:
            return data
        arguments = {**(data.get("init_args") or {}), "labeled": str(self.split_file)}
        if "label_file" in arguments:
            arguments["label_file"] = None  # it may have changed since
        return data | {"init_args": arguments}

    def datamodule(self) -> Any:
        """Build its datamodule with its split, and set it up for a fit."""
        config = self.data_config()
        try:
            data = build(LightningDataModule, config)
            data.prepare_data()
            data.setup("fit")
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(f"the data of {self.folder} cannot be read: {' '.join(str(error).split())}") from error
        return data

    # The network.

    @property
    def weights(self) -> Path:
        """The path of the deployed weights."""
        return self.folder / WEIGHTS

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of the deployed weights; empty without weights."""
        return read_metadata(self.weights) if self.weights.is_file() else {}

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes that it was trained on, by number; None if they are not known."""
        if self.weights.is_file():
            return class_names_of(self.weights)
        try:  # a run that is not finished
            names = json.loads((self.folder / SPLIT).read_text(encoding="utf-8")).get("class_names")
        except (OSError, ValueError, AttributeError):
            return None
        return names if isinstance(names, list) else None

    @property
    def model_arguments(self) -> dict[str, Any]:
        """The arguments of its module in the config."""
        return self.config["model"].get("init_args") or {}

    @property
    def has_student(self) -> bool:
        """Whether its module has a student in the config, or is taught."""
        return has_student(self.config["model"])

    def build_student(self) -> nn.Module:
        """Build its student with new weights. The files of ``load_weights`` in the config are not read."""
        if not self.has_student:
            raise InputError(f"{self.folder}: {self.config['model'].get('class_path')} has no student")
        try:
            return build_student(self.config["model"])
        except InputError as error:
            raise InputError(f"the student of {self.folder} cannot be built: {error}") from error

    def student(self) -> nn.Module:
        """Build its student with the deployed weights."""
        student = self.build_student()
        if not self.weights.is_file():
            text = "train it first" if not self.checkpoints() else "resume it with --ckpt_path last"
            raise InputError(f"{self.folder} has no {WEIGHTS}; {text}")
        return load_weights(student, self.weights)

    def predict(
        self, sources: str | Path | Sequence[str | Path], batch_size: int = 64, workers: int = 0
    ) -> Predictions:
        """Predict pictures with the deployed weights. The data of the run need not be there any more.

        Args:
            sources: Files, folders, patterns and tables, see :func:`kd_lightning.deploy.pictures.find_pictures`.
            batch_size: Pictures of a batch, at least 1.
            workers: Processes that read pictures, at least 0.
        """
        predictor = importlib.import_module("kd_lightning.deploy.predict").load_predictor(self.folder)
        found: Predictions = predictor.predict(sources, batch_size, workers)  # deploy/ lies above
        return found

    # Checkpoints.

    def checkpoints(self) -> list[Path]:
        """All its checkpoints, the newest first, whatever their names, also in folders that a name creates."""
        found = dict.fromkeys(path for folder in self.checkpoint_folders() for path in folder.rglob("*.ckpt"))
        return sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)

    def checkpoint_folders(self) -> list[Path]:
        """The folders of its checkpoints: the one in its own folder, and those that lie outside."""
        outside = self.state.get("checkpoints") or []
        return [self.folder / "checkpoints", *map(Path, [outside] if isinstance(outside, str) else outside)]

    def last_checkpoint(self) -> Path:
        """The checkpoint from which a resume continues."""
        found = self.checkpoints()
        if not found:
            raise InputError(f"ckpt_path: last, but {self.folder} has no checkpoint")
        return next((path for path in found if path.stem.startswith("last")), found[0])

    def best_checkpoint(self) -> Path:
        """The checkpoint with the best value of the monitored metric; without a monitor the last one."""
        found = self.checkpoints()
        others = [path for path in found if not path.stem.startswith("last")]
        callbacks = (read_checkpoint(found[0]).get("callbacks") or {}) if found else {}
        states = [state for state in callbacks.values() if isinstance(state, dict) and "monitor" in state]
        for state in states:
            if state["monitor"] and state.get("best_model_path"):
                return self._moved(Path(state["best_model_path"]), state.get("dirpath"), others)
        if not others and states and not any(state["monitor"] for state in states):
            return self.last_checkpoint()
        if not others:
            raise InputError(f"ckpt_path: best, but {self.folder} has no checkpoint of a best value")
        if callbacks or len(others) == 1:
            return others[0]
        deployed = self.deployed_checkpoint()  # checkpoints of weights alone do not hold the best value
        if deployed is None:
            raise InputError(f"ckpt_path: best, but the checkpoints of {self.folder} hold weights alone; name one")
        return deployed

    def selected_checkpoint(self) -> Path:
        """The checkpoint that stands for a run without a student: the best one, or the last if no other was saved."""
        only_last = all(path.stem.startswith("last") for path in self.checkpoints())
        return self.last_checkpoint() if only_last else self.best_checkpoint()

    def _moved(self, path: Path, folder: str | None, found: Sequence[Path]) -> Path:
        """Return the file that a checkpoint names, also if the run's folder was moved since."""
        inner = path.relative_to(folder) if folder is not None and path.is_relative_to(folder) else Path(path.name)
        here = [other for other in found if other.parts[-len(inner.parts) :] == inner.parts]
        here.sort(key=lambda other: other.resolve() != path.resolve())  # two folders may have a file of this name
        if not here and not path.is_file():
            raise InputError(f"ckpt_path: best, but {inner}, the best checkpoint of {self.folder}, is gone")
        return here[0] if here else path

    def deployed_checkpoint(self) -> Path | None:
        """The checkpoint that holds the deployed student, with all else that its module had; None if it is gone."""
        if not self.weights.is_file():
            return None
        deployed, origin = load_file(self.weights), self.metadata.get("weights", "")
        prefix = student_prefix(self.config["model"])
        for checkpoint in sorted(self.checkpoints(), key=lambda path: not str(path).endswith(origin)):
            try:
                state = read_checkpoint(checkpoint)["state_dict"]
            except InputError:
                continue
            if same_weights(deployed, {plain_key(key).removeprefix(prefix): v for key, v in state.items()}):
                return checkpoint
        return None


_POINTER = ".path"
_SEEDS = ("seed_everything", "data.init_args.seed")


def same_weights(deployed: Mapping[str, Tensor], state: Mapping[str, Any]) -> bool:
    """Return whether a state dict holds all deployed tensors with the same values."""
    plain = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
    return all(
        isinstance(other := plain.get(key), Tensor)
        and other.shape == value.shape
        and torch.equal(other.detach().cpu().to(value.dtype), value)
        for key, value in deployed.items()
    )


def find_runs(root: Path, name: str) -> list[Run]:
    """Return the runs of a name, the newest first.

    Args:
        root: The folder of all runs, ``trainer.default_root_dir``.
        name: The run's name.
    """
    home = root / name  # a name may have characters of patterns in it
    folders = [path.parent for path in home.glob(f"*/{CONFIG}")]
    for pointer in home.glob(f"*{_POINTER}"):
        folder = Path(os.path.normpath(pointer.parent / pointer.read_text(encoding="utf-8").strip()))
        folders += [folder] if (folder / CONFIG).is_file() else []
    runs = [Run(folder) for folder in dict.fromkeys(folders)]
    return sorted(runs, key=lambda run: (run.started, _by_version(run.folder)), reverse=True)


def register_run(folder: Path, root: Path, name: str) -> None:
    """Make a run that does not lie below the folder of its name known to :func:`find_runs`.

    Loggers of other packages have folders of their own. A small file in the folder of the name leads there.
    """
    home = root / name
    if folder.absolute().parent != home.absolute():
        home.mkdir(parents=True, exist_ok=True)
        target = os.path.relpath(folder, home)
        short = hashlib.sha256(target.encode()).hexdigest()[:8]  # folders of two loggers may have the same name
        (home / f"{folder.name}_{short}{_POINTER}").write_text(target + "\n", encoding="utf-8")


def run_of(path: Path) -> Run | None:
    """Return the run that a checkpoint or a file of weights belongs to, None if it lies outside of any run."""
    parents = path.parents if path.is_absolute() else [*path.parents, *Path.cwd().parents]
    for folder in parents:
        if (folder / CONFIG).is_file():
            run = Run(folder)
            holds = path.resolve() in {other.resolve() for other in [*run.checkpoints(), run.weights]}
            return run if holds else None
    return None


def _by_version(folder: Path) -> tuple[int, str]:
    return len(folder.name), folder.name
