"""Predict pictures of any files: with a run's deployed weights, or with an exported file alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import Subset

from kd_lightning.batch import Batch
from kd_lightning.data.batch_transfer import transfer
from kd_lightning.data.preprocessing import transform_of
from kd_lightning.data.sources.dataset_source import DatasetSource
from kd_lightning.data.sources.image_files import IMAGE_ENDINGS
from kd_lightning.data.sources.image_loader import load_image
from kd_lightning.data.sources.images import path_of
from kd_lightning.data.sources.pixels import read_pixels
from kd_lightning.data.transforms.base import to_tensor
from kd_lightning.deploy.export import FORMATS, format_of, load_exported, read_file_metadata
from kd_lightning.deploy.picture_inputs import PictureInputs, load_grey
from kd_lightning.deploy.pictures import find_pictures
from kd_lightning.errors import InputError
from kd_lightning.losses.base import Task, to_probabilities
from kd_lightning.modules.seams import Seams
from kd_lightning.runs.build import build
from kd_lightning.runs.predictions import Predictions
from kd_lightning.runs.run import Run
from kd_lightning.runs.weights import load_weights, read_metadata

BATCH_SIZE = 64


class Predictor:
    """A network with all that it needs to predict files of pictures. :func:`load_predictor` makes one.

    Args:
        network: Function from inputs (B, C, H, W) to logits.
        inputs: How files become inputs.
        task: The task; None for one that follows from logits and class names.
        class_dim: The dimension of dense logits that holds classes; None if logits are (B, C).
        class_names: Names of the classes; None if they are not known.
        origin: The run or file, for messages.
    """

    def __init__(
        self,
        network: Callable[[Tensor], Tensor],
        inputs: PictureInputs,
        task: Task | None,
        class_dim: int | None,
        class_names: list[str] | None,
        origin: Path,
    ) -> None:
        self.network = network
        self.inputs = inputs
        self.task = task
        self.class_dim = class_dim
        self.class_names = class_names
        self.origin = origin

    def predict(
        self, sources: str | Path | Sequence[str | Path], batch_size: int = BATCH_SIZE, workers: int = 0
    ) -> Predictions:
        """Predict pictures, see :func:`predict`."""
        several = [sources] if isinstance(sources, str | Path) else sources
        return Predictions.join([*self.batches(find_pictures(several, self.inputs.endings), batch_size, workers)])

    @torch.no_grad()
    def batches(self, paths: Sequence[str], batch_size: int = BATCH_SIZE, workers: int = 0) -> Iterator[Predictions]:
        """Predict files batch by batch.

        Args:
            paths: The files, at least one.
            batch_size: Pictures of a batch, at least 1.
            workers: Processes that read pictures, at least 0.

        Yields:
            The predictions of each batch, in the order of the files.

        Raises:
            InputError: For a number out of range, and for a network whose outputs are no predictions of its task.
        """
        for name, value, least in (("batch_size", batch_size, 1), ("workers", workers, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name} must be a whole number of at least {least}, got {value!r}")
        waiting: list[tuple[list[str], dict[int, str]]] = []  # batches before the first picture that can be read
        names: list[str] | None = None
        for loaded in self.inputs.load(paths, batch_size, workers):
            listed = [paths[row] for row in loaded.rows]
            errors = {number: loaded.errors[row] for number, row in enumerate(loaded.rows) if row in loaded.errors}
            if names is None and not loaded.groups:
                waiting.append((listed, errors))
                continue
            place = {row: number for number, row in enumerate(loaded.rows)}
            outputs = [([place[row] for row in rows], self._logits(x)) for rows, x in loaded.groups]
            if names is None:
                names = self._names(outputs[0][1])
                yield from (self._unread(*batch, names) for batch in waiting)
                waiting.clear()
            found = self._unread(listed, errors, names)
            for rows, logits in outputs:
                if self.class_dim is None:
                    found.values[rows] = self._values(logits)
                else:
                    for row, mask in zip(rows, self._masks(logits), strict=True):
                        found.masks[row] = mask
            yield found
        yield from (self._unread(*batch, self.class_names or []) for batch in waiting)

    def _unread(self, paths: list[str], errors: dict[int, str], names: list[str]) -> Predictions:
        dense = self.class_dim is not None
        values = torch.full((len(paths), 0 if dense else len(names)), torch.nan)
        return Predictions(
            self.task or "multiclass", paths, names, values, errors, [None] * len(paths) if dense else []
        )

    @property
    def _task(self) -> Task:
        assert self.task is not None  # since the first logits
        return self.task

    def _logits(self, x: Tensor) -> Tensor:
        try:
            return self.network(x).float().cpu()
        except InputError:
            raise
        except Exception as error:  # networks and runtimes raise errors of any class
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise InputError(f"the network of {self.origin} fails on inputs {[*x.shape]}: {reason}") from error

    def _names(self, logits: Tensor) -> list[str]:
        """Return the names of the columns of predictions, and settle the task."""
        shape, dense = [*logits.shape], self.class_dim is not None
        if (logits.ndim < 3) if dense else (logits.ndim > 2 or not logits.ndim):
            what = f"dense logits with classes in dimension {self.class_dim}" if dense else "logits (B, C)"
            raise InputError(f"{self.origin} must return {what}, got {shape}")
        classes = shape[self.class_dim] if self.class_dim is not None else 1 if logits.ndim == 1 else shape[1]
        known = self.class_names or []
        if self.task is None and len(known) != classes:
            raise InputError(
                f"{self.origin}: the task of its module is not known, and it has {classes} outputs for {len(known)} "
                "class names, so that no output is a class"
            )
        self.task = self.task or "multiclass"
        if dense and self.task in ("multilabel", "regression"):
            raise InputError(f"{self.origin}: predictions of a {self.task} task for each pixel are no masks of classes")
        if self.task == "regression":
            kinds = known if len(known) == classes else [str(number) for number in range(classes)]
            return ["value"] if classes == 1 else [f"value_{kind}" for kind in kinds]
        count = 2 if self.task == "binary" else classes
        return known if len(known) == count else [str(number) for number in range(count)]

    def _values(self, logits: Tensor) -> Tensor:
        found = to_probabilities(logits, self._task)
        if self.task == "binary":
            return torch.stack([1 - found, found], dim=1)
        return found.reshape(len(found), -1)

    def _masks(self, logits: Tensor) -> Tensor:
        """Return the class of each pixel (B, H, W)."""
        assert self.class_dim is not None
        moved = logits.movedim(self.class_dim, -1)
        masks = (moved[..., 0].sigmoid() > 0.5).long() if self.task == "binary" else moved.argmax(dim=-1)
        if masks.ndim != 3:
            raise InputError(f"{self.origin} must return one class for each pixel, got logits {[*logits.shape]}")
        return masks


def predict(
    model: str | Path, sources: str | Path | Sequence[str | Path], batch_size: int = BATCH_SIZE, workers: int = 0
) -> Predictions:
    """Predict pictures.

    Args:
        model: Folder of a run, or an exported file, see :func:`load_predictor`.
        sources: A source or several ones, see :func:`~kd_lightning.deploy.pictures.find_pictures`.
        batch_size: Pictures of a batch, at least 1.
        workers: Processes that read pictures, at least 0.

    Returns:
        The predictions, in the order of the sources. Files that cannot be read have an error there.

    Raises:
        InputError: If model or sources are none, or do not fit each other.
    """
    return load_predictor(model).predict(sources, batch_size, workers)


def load_predictor(model: str | Path) -> Predictor:
    """Load a network and its preprocessing.

    Args:
        model: One of these:

            - the folder of a run: its deployed weights, and the evaluation transform of its data, which need not be
              there any more;
            - ``.safetensors``, with the run's ``config.yaml`` beside it;
            - ``.onnx``, ``.pt2`` or ``.pte`` from ``export``, whose metadata describe the preprocessing.

    Raises:
        InputError: If it is none of these, or if the network takes no pictures.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return _of_run(Run(path))
    if not path.is_file():
        raise InputError(f"{path} is no run and no exported file: it does not exist")
    kind = format_of(path)
    if kind is None:
        raise InputError(f"{path} must be the folder of a run, or end in {', '.join(FORMATS.values())}")
    if kind == "safetensors":
        return _of_run(Run(path.parent), path)
    return _of_file(path, kind)


def _of_run(run: Run, weights: Path | None = None) -> Predictor:
    """Load a run with its deployed weights, or with those of another file."""
    arguments = run.model_arguments
    student = run.student() if weights is None else load_weights(run.build_student(), weights)
    metadata = run.metadata if weights is None else read_metadata(weights)
    class_dim = arguments.get("class_dim")
    inputs, data = _inputs_of_run(run, run.metadata or metadata, dense=class_dim is not None)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student.to(device).eval()
    seams = Seams.of_run(run, device)
    source = seams.read(data)

    def network(x: Tensor) -> Tensor:
        batch = seams.unpack(transfer(source, Batch(x, torch.zeros(len(x), dtype=torch.long)), device))
        return seams.logits(student, batch.x)

    task = _read_task(arguments.get("task") or metadata.get("task"))
    names = _read_json(metadata, "classes") or run.class_names
    return Predictor(network, inputs, task, class_dim, names, weights or run.folder)


def _inputs_of_run(run: Run, metadata: Mapping[str, str], *, dense: bool) -> tuple[PictureInputs, LightningDataModule]:
    """Return how files become inputs, and the data, whose hooks change batches; plain data if they cannot be built."""
    shape = _read_shape(run.folder, metadata)
    try:
        data: Any = build(LightningDataModule, run.data_config())
    except InputError as error:
        described = _read_json(metadata, "preprocessing")  # without the data, a dataset of the user cannot be built
        if not isinstance(described, dict):
            raise InputError(f"the data of {run.folder}, whose transform pictures need, fail: {error}") from error
        return PictureInputs(transform_of(described), shape, dense), LightningDataModule()
    transform = getattr(data, "eval_transform", None)
    if transform is None:
        raise InputError(
            f"{run.folder} has no eval_transform from pictures to inputs: its data, {type(data).__name__}, load tensors"
        )
    source = getattr(data, "source", None)
    while (inner := getattr(source, "source", None)) is not None:
        source = inner
    loader, endings = getattr(source, "loader", load_image), getattr(source, "endings", IMAGE_ENDINGS)
    if isinstance(source, DatasetSource):
        loader = _loader_of(source.train, run)
    return PictureInputs(transform, shape, dense, loader, endings, with_mask=dense), data


def _loader_of(dataset: Any, run: Run) -> Any:
    """Return the function by which a dataset of the user reads its files, such as torchvision's ``ImageFolder``."""
    whole = dataset
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    if getattr(dataset, "transforms", None) is not None or getattr(dataset, "transform", None) is not None:
        raise InputError(
            f"{run.folder}: {type(dataset).__name__} has a transform of its own, which may be that of training alone; "
            "data.eval_transform can have all steps"
        )
    loader = getattr(dataset, "loader", None)
    if callable(loader):
        return loader
    path = path_of([whole], 0) if len(whole) else None
    if path is not None and Path(path).is_file() and not _is_decoded_alike(read_pixels([whole], 0), path):
        raise InputError(
            f"{run.folder}: {type(dataset).__name__} decodes {path} in another way than load_image, and has no "
            "attribute loader, which predict would use"
        )
    return load_image


def _is_decoded_alike(pixels: Tensor, path: str) -> bool:
    """Return whether pixels (C, H, W) are those of a file, in grey if they have one channel."""
    return torch.equal(pixels, to_tensor(load_image(path) if len(pixels) != 1 else load_grey(path)))


def _of_file(path: Path, kind: str) -> Predictor:
    metadata = read_file_metadata(path)
    shape, described = _read_shape(path, metadata), _read_json(metadata, "preprocessing")
    if not isinstance(described, dict):
        raise InputError(f"{path} does not describe the way from a picture to its inputs; name the run's folder")
    names, class_dim = _read_json(metadata, "classes"), _read_json(metadata, "class_dim")
    run = load_exported(path, kind, _no_network)
    inputs = PictureInputs(transform_of(described), shape, class_dim is not None)
    return Predictor(run, inputs, _read_task(metadata.get("task")), class_dim, names, path)


def _no_network() -> Any:
    raise AssertionError("only weights need a network")


def _read_json(metadata: Mapping[str, str], key: str) -> Any:
    try:
        return json.loads(metadata.get(key, "null"))
    except ValueError:  # of an older version
        return None


def _read_shape(origin: Path, metadata: Mapping[str, str]) -> tuple[int, ...] | None:
    """Return the shape of a network's inputs, None if it is not known; refuse inputs that are no pictures."""
    shape = _read_json(metadata, "input_shape")
    if shape is None:
        return None
    if not isinstance(shape, list) or [*map(type, shape)] != [int] * 3:
        raise InputError(f"predict takes pictures (C, H, W), but the inputs of {origin} are {shape}")
    return tuple(shape)


def _read_task(text: Any) -> Task | None:
    tasks: dict[str, Task] = {name: name for name in get_args(Task)} | {"features": "regression"}
    return tasks.get(text)
