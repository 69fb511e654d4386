"""A datamodule of datasets that are read in order, such as Hugging Face's and litdata's streams."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.utils.data import IterableDataset

from kd_lightning.data.resume_settings import check_resume, describe_transforms
from kd_lightning.data.streams.batches import StreamBatches
from kd_lightning.data.streams.loader import StreamLoader
from kd_lightning.data.streams.readers import Reader, make_reader
from kd_lightning.data.streams.views import StreamViews
from kd_lightning.data.transforms.recipes import photo_transforms
from kd_lightning.errors import InputError


class StreamDataModule(LightningDataModule):
    """Load streams: iterable datasets, read in order. Training needs no random access, and no known length.

    Streams are PyTorch's ``IterableDataset``, ``datasets.IterableDataset`` of Hugging Face (in YAML
    :class:`~kd_lightning.data.streams.hugging_face.HuggingFaceStream`), litdata's ``StreamingDataset``, and any object
    whose ``__iter__`` begins anew. Items are those of
    :class:`~kd_lightning.data.sources.dataset_source.DatasetSource`, with one label or one row of labels each. A label
    of None, -1 or -100 is missing (NaN among floats): the soft terms and pseudo-labels use the sample. Whole numbers
    are values if the module's ``task`` is regression.

    - **Processes and workers**: each sample is read once in an epoch, in the same batches on one process as on several
      with smaller batches. Streams of Hugging Face and litdata are shared out by their shards instead: the order then
      depends on the number of processes and workers.
    - **Epochs** end when a process has no more batch. Other samples that are left over are not trained on.
      Evaluation counts each sample once. ``set_epoch`` of a stream is called before each epoch.
    - **Resume**: within an epoch, by the stream's own ``state_dict`` where one is enough for all processes, else by
      reading up to that place. Either is checked by the samples' content. A stream that gives other samples is refused.
    - **Augmentation** depends on (seed, number of the sample in the stream, epoch) alone.

    Splits, caches, refreshed pseudo-labels, queries and ``class_weights: balanced`` need random access:
    :class:`~kd_lightning.data.datamodule.SemiSupervisedDataModule`.

    Args:
        train: Stream of training samples.
        val: Stream of validation samples. Default: None, which means no validation.
        test: Stream of test samples, also for ``predict``. Default: None, which means none.
        labeled: Whether training samples have labels. If not, items need none, and all of them are unlabeled.
        input: Name of the inputs in items that are mappings. Default: None, which means the usual names.
        label: Name of the label in them. Default: None, which means the usual names.
        class_names: Names of the classes, by number. Needed if labels are texts. Default: None, which means those of a
            ``ClassLabel`` of Hugging Face, if there is one.
        shared: Whether streams themselves give each process and worker samples of its own (as webdataset's do). Those
            of Hugging Face and litdata are known. A list names the parts for which it holds, such as ``[train]``.
            Default: False, which means that each of them gives all samples.
        batch_size: Samples per batch on each process, at least 1.
        num_workers: Worker processes of each loader, at least 0.
        seed: Seed of the augmentation. Streams shuffle by themselves.
        pad_token: Number that pads ``input_ids`` of texts of different lengths.
        image_size: Height and width in pixels of the default transforms, which are those of photographs. Default: None,
            which means that samples are tensors, unless a transform is given.
        train_transform: Augmentation of training samples. Default: None, which means the one of ``image_size``.
        strong_transform: Stronger augmentation for a second view, ``x_strong`` in the batch. Of samples with an entry
            ``x_strong``, such as a second text, it gets that. Default: None, which means no second view, or this entry
            as it is.
        eval_transform: Transform for validation and test. Default: None, which means the one of ``image_size``.

    Raises:
        InputError: For values out of range; for a stream that can be read once only, or has no samples; for litdata's
            dataset of one part that is that of another part, too.
    """

    def __init__(
        self,
        train: IterableDataset,  # type: ignore[type-arg]  # jsonargparse finds names of its subclasses only so
        val: IterableDataset | None = None,  # type: ignore[type-arg]
        test: IterableDataset | None = None,  # type: ignore[type-arg]
        *,
        labeled: bool = True,
        input: str | None = None,
        label: str | None = None,
        class_names: list[str] | None = None,
        shared: bool | list[str] = False,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        pad_token: int = 0,
        image_size: int | tuple[int, int] | None = None,
        train_transform: nn.Module | None = None,
        strong_transform: nn.Module | None = None,
        eval_transform: nn.Module | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if value < least:
                raise InputError(f"{name} must be at least {least}, got {value}")
        self.streams = {"train": train, "val": val, "test": test}
        self.labeled = labeled
        self.columns = (input, label)
        parts = [*self.streams] if shared is True else shared or []
        if {*parts} - {*self.streams}:
            raise InputError(f"shared must be a boolean, or some of {', '.join(self.streams)}, got {shared}")
        self.shared = parts
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.pad_token = pad_token
        defaults = (None, None) if image_size is None else photo_transforms(image_size)
        self.train_transform = defaults[0] if train_transform is None else train_transform
        self.strong_transform = strong_transform
        self.eval_transform = defaults[1] if eval_transform is None else eval_transform
        self.class_names = class_names
        self._readers: dict[str, Reader] = {}

    def setup(self, stage: str) -> None:
        """Runs on every process before each stage: open the streams."""
        for part, stream in self.streams.items():
            if stream is None or part in self._readers:
                continue
            self._readers[part] = reader = make_reader(stream, part, shared=part in self.shared)
            same = [name for name in self._readers if name != part and self._readers[name].dataset is reader.dataset]
            if same and reader.has_own_pass:
                raise InputError(f"{part}: it is the {type(reader.dataset).__name__} of {same[0]}; give each its own")
        if self.class_names is None:
            self.class_names = _class_names(self._readers["train"].dataset, self.columns[1])

    def state_dict(self) -> dict[str, Any]:
        """Runs when a checkpoint is saved: return the settings of the training batches."""
        self.setup("")
        world, _ = self._world_size_and_rank()
        deals = self._readers["train"].deals
        settings: dict[str, Any] = {"batch_size": self.batch_size * world, "seed": self.seed, "labeled": self.labeled}
        if not deals:
            settings |= {"processes": world, "num_workers": self.num_workers}
        settings |= dict(zip(("input", "label"), self.columns, strict=True))
        names = ("train_transform", "strong_transform")
        return {"settings": settings | describe_transforms({name: getattr(self, name) for name in names})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Runs when a fit resumes: refuse other settings of the training batches."""
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            check_resume(state_dict, self.state_dict())

    def train_dataloader(self) -> StreamLoader:
        """Loader of the training stream."""
        return self._loader("train", (self.train_transform, self.strong_transform))

    def val_dataloader(self) -> StreamLoader | list[Any]:
        """Loader of the validation stream; an empty list if there is none."""
        return [] if self.streams["val"] is None else self._loader("val", (self.eval_transform, None))

    def test_dataloader(self) -> StreamLoader:
        """Loader of the test stream."""
        if self.streams["test"] is None:
            raise InputError("test: the StreamDataModule has no test stream")
        return self._loader("test", (self.eval_transform, None))

    def predict_dataloader(self) -> StreamLoader:
        """Loader of the test stream."""
        return self.test_dataloader()

    def _loader(self, part: str, transforms: tuple[Any, Any]) -> StreamLoader:
        self.setup("")
        world, rank = self._world_size_and_rank()
        reader, training = self._readers[part], part == "train"
        device = None if self.trainer is None else self.trainer.strategy.root_device
        device = device if device is not None and device.type == "cuda" else None
        labeled = self.labeled or not training
        names = self.class_names, self.columns
        task = getattr(None if self.trainer is None else self.trainer.lightning_module, "task", None)
        views = StreamViews(part, transforms, self.seed, device, *names, labeled, self.pad_token, task)
        compares = reader.checks and (world > 1 or self.num_workers > 1)
        batches = StreamBatches(reader, views, self.batch_size, rank, world, compares)
        options = {"num_workers": self.num_workers, "pin_memory": torch.cuda.is_available()}
        return StreamLoader(batches, self.trainer, training, **options)

    def _world_size_and_rank(self) -> tuple[int, int]:
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)


def _class_names(dataset: Any, label: str | None) -> list[str] | None:
    """Return the class names of a Hugging Face dataset; None if there are none."""
    features = getattr(dataset, "features", None)
    if not isinstance(features, dict):
        return None
    found = [features[name] for name in (("label", "labels") if label is None else (label,)) if name in features]
    names = getattr(getattr(found[0], "feature", found[0]), "names", None) if found else None
    return None if names is None else [*map(str, names)]
