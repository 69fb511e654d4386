"""One datamodule for supervised, semi-supervised and distillation runs."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from kd_lightning.batch import IGNORE_INDEX, LabelKind
from kd_lightning.data.labels.build import build_labels
from kd_lightning.data.labels.coarse_labels import CoarseLabels
from kd_lightning.data.labels.label_file import LabelRow, read_label_file
from kd_lightning.data.labels.label_noise import LabelNoise
from kd_lightning.data.labels.table import LabelTable
from kd_lightning.data.sources.images import identity, path_of, read_image
from kd_lightning.data.sources.source import Parts, Source
from kd_lightning.data.splits import Split, make_split
from kd_lightning.data.views.dataset import ViewDataset
from kd_lightning.data.views.loader import ViewLoader
from kd_lightning.data.views.samplers import ShareSampler, TwoStreamSampler, ViewSampler
from kd_lightning.data.views.table import ViewTable
from kd_lightning.errors import InputError
from kd_lightning.pseudo_labels.table import PseudoLabels


class SemiSupervisedDataModule(LightningDataModule):
    """Split a source into labeled, unlabeled and validation images, and serve them as ``Batch``es.

    Training batches mix labeled and unlabeled images; a label that training may not see is -100 (NaN where floats).
    The truth of unlabeled images stays in here and never enters a training batch. The split is written beside the
    run as ``split.json`` and checked on every process and on resume. ``predict`` serves the test images.

    Labels may also be noisy or coarse, by simulation or from a file, in any mixture: ``kind`` in the batch tells each
    row's :class:`~kd_lightning.batch.LabelKind`. The validation and test labels are always the source's.

    Args:
        source: Where the images come from.
        labeled: How many training labels may be seen: an int per class (0 for none), a fraction of each class, the
            path of a saved ``split.json`` (which then decides validation too), or None for all.
        unlabeled: The unlabeled images to train on: the ``"rest"`` of the training part, ``"none"``, the unlabeled
            part of the ``"source"``, or the ``"test"`` images themselves. The last is the transductive setting: its
            test metrics carry the prefix ``transductive/``.
        val_size: Validation part of the training images: a fraction of each class, or an int per class; 0 for none.
        batch_size: Images in a batch, on each process.
        labeled_batch_size: How many of these are labeled: every batch then begins with so many labeled images, which
            come round as often as it takes, and an epoch is one pass over the unlabeled ones. None: labeled and
            unlabeled images are shuffled together.
        num_workers: Worker processes of each loader; augmentation does not depend on it.
        seed: Of the split, the order and the augmentation.
        num_views: Number of different augmentations of an image, which teachers can keep their outputs of; None: a new one
            each epoch.
        views_per_epoch: How many views of each image an epoch has.
        train_transform: In place of the source's augmentation.
        strong_transform: A stronger augmentation for a second view of each image, ``x_strong`` in the batch.
        eval_transform: In place of the source's evaluation transforms.
        noisy: The source's own labels may be wrong: their kind is noisy, which co-teaching and ``LabelKindLoss`` look at.
        label_noise: How the labels that training sees go wrong, for experiments: :class:`SymmetricNoise`,
            :class:`PairNoise` or :class:`TransitionNoise`. Their kind is noisy, also where they happen to be right.
        coarse: Superclasses, which are the labels of (a part of) the training images outside ``labeled``.
        label_file: A CSV or Parquet file of labels that replace or add to those of the source, for training images and
            those of its unlabeled part, see :func:`~kd_lightning.data.labels.label_file.read_label_file`. They are kept in
            ``split.json``, from which a later run goes on: ``labeled: RUN/split.json`` with a further file.

    Raises:
        InputError: For values out of range, and for a source without the part that is asked for.
    """

    def __init__(
        self,
        source: Source,
        *,
        labeled: int | float | str | Path | None = None,
        unlabeled: Literal["rest", "none", "source", "test"] = "rest",
        val_size: int | float = 0.1,
        batch_size: int = 64,
        labeled_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        num_views: int | None = None,
        views_per_epoch: int = 1,
        train_transform: nn.Module | None = None,
        strong_transform: nn.Module | None = None,
        eval_transform: nn.Module | None = None,
        noisy: bool = False,
        label_noise: LabelNoise | None = None,
        coarse: CoarseLabels | None = None,
        label_file: str | Path | None = None,
    ) -> None:
        super().__init__()
        for name, number in {
            "batch_size": batch_size,
            "num_views": num_views,
            "views_per_epoch": views_per_epoch,
        }.items():
            if number is not None and number < 1:
                raise InputError(f"{name} must be at least 1, got {number}")
        if num_workers < 0:
            raise InputError(f"num_workers must be at least 0, got {num_workers}")
        if unlabeled not in ("rest", "none", "source", "test"):
            raise InputError(f"unlabeled must be one of rest, none, source, test, got {unlabeled!r}")
        if labeled_batch_size is not None and not 1 <= labeled_batch_size < batch_size:
            raise InputError(
                f"labeled_batch_size must leave room for unlabeled images: at least 1 and below batch_size, "
                f"{batch_size}, got {labeled_batch_size}"
            )
        if coarse is not None and coarse.fraction > 0 and labeled is None:
            raise InputError(
                "coarse: every image has a fine label, since labeled is not set; set it, or coarse.fraction: 0 where "
                "only a label file has coarse ones"
            )
        self.source = source
        self.labeled = labeled
        self.unlabeled = unlabeled
        self.val_size = val_size
        self.batch_size = batch_size
        self.labeled_batch_size = labeled_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.num_views = num_views
        self.views_per_epoch = views_per_epoch
        self.train_transform = source.train_transform if train_transform is None else train_transform
        self.strong_transform = strong_transform
        self.eval_transform = source.eval_transform if eval_transform is None else eval_transform
        self.noisy = noisy
        self.label_noise = label_noise
        self.coarse = coarse
        self.label_file = label_file
        self.transductive = unlabeled == "test"
        self.class_names: list[str] | None = None
        self.split: Split | None = None
        self._parts: Parts | None = None
        self._labels: LabelTable | None = None
        self._tables: dict[str, ViewTable] = {}
        self._contents: list[str] = []  # of the pool, so that no checkpoint reads all of it again

    def prepare_data(self) -> None:
        """Download what is missing."""
        self.source.prepare()

    def setup(self, stage: str) -> None:
        """Open the source, split it, and check that every process has the same split."""
        if self._labels is None:
            self._parts = parts = self.source.load()
            self.class_names = parts.class_names
            _check_filled(parts, type(self.source).__name__)
            targets = parts.train.targets
            if isinstance(self.labeled, str | Path):
                self.split = Split.load(Path(self.labeled), targets)
            else:
                self.split = make_split(targets, self.labeled, self.val_size, self.seed, self.class_names)
            if self.label_file is not None:
                self.split = self.split.with_answers(self._answers(Path(self.label_file)))
            self._check_answers()
            self._labels = self._see()  # complains of a missing part before anything starts
            if not len(self._trained()):
                raise InputError("labeled: 0 leaves nothing to train on; allowed with coarse, label_file, or unlabeled")
        if self.trainer is None or stage != TrainerFn.FITTING:
            return
        assert self.split is not None
        self._labels = self._see()  # without an earlier fit's pseudo-labels
        self._tables.clear()
        first = self.trainer.strategy.broadcast(self.split.hash)
        if first != self.split.hash:
            raise InputError(f"rank {self.trainer.global_rank} drew another split than rank 0: is its data the same?")
        folder = self.trainer.log_dir or self.trainer.default_root_dir  # asks all processes
        if not self.trainer.loggers and not self.trainer.checkpoint_callbacks:
            return  # a run that leaves nothing behind
        if self.trainer.is_global_zero and not getattr(self.trainer, "fast_dev_run", False):
            self.split.save(Path(folder) / "split.json")

    def state_dict(self) -> dict[str, Any]:
        """Which split, pool and labels it was, for the checkpoint."""
        if self.split is None or self._labels is None:
            return {}
        return {"split": self.split.hash, "pool": self._pool_hash(), "labels": self._labels.hash}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to resume on another split, with other images in the pool, or with other labels."""
        if self.trainer is None or self.trainer.state.fn != TrainerFn.FITTING or self.split is None:
            return
        if state_dict.get("split", self.split.hash) != self.split.hash:
            raise InputError(
                "the checkpoint was trained on another split; resume with the same source, labeled, label_file, val_size and "
                "seed, or with labeled: the split.json of its run and no label_file, since the answers are in there"
            )
        if state_dict.get("pool", self._pool_hash()) != self._pool_hash():
            raise InputError(
                "the unlabeled pool has changed since the checkpoint (its hash differs), so that pseudo-labels would "
                "stand for other images; resume with the images of that run, or start anew"
            )
        if self._labels is not None and state_dict.get("labels", self._labels.hash) != self._labels.hash:
            raise InputError(
                "the checkpoint was trained on other labels (their hash differs); resume with the same label_noise "
                "and coarse, or start anew"
            )

    def _pool_hash(self) -> str:
        parts, _ = self._ready()
        self._contents = self._contents or [identity(images) for images in self._extra() or [parts.train.images]]
        return hashlib.sha256(repr((self._contents, self.unlabeled_indices())).encode()).hexdigest()

    def train_dataloader(self) -> ViewLoader:
        """Labeled and unlabeled images, shuffled together or in two streams."""
        _, split = self._ready()
        assert self._labels is not None
        indices = self._trained()
        pool = len(indices) - len(split.labeled)
        world, rank = self._processes()
        options: dict[str, Any] = {
            "views_per_epoch": self.views_per_epoch,
            "num_views": self.num_views,
            "seed": self.seed,
        }
        options |= {"num_replicas": world, "rank": rank}
        sampler = ViewSampler(len(indices), **options)
        if self.labeled_batch_size is not None:
            if not pool or not split.labeled:
                lacking = "unlabeled" if split.labeled else "labeled"
                raise InputError(f"labeled_batch_size: batches of labeled and unlabeled images, but none is {lacking}")
            sizes = {"labeled_batch": self.labeled_batch_size}
            sizes["unlabeled_batch"] = self.batch_size - self.labeled_batch_size
            sampler = TwoStreamSampler(len(split.labeled), pool, **sizes, **options)
        dataset = ViewDataset(self._images(), indices, self.train_transform, self.seed, self.strong_transform)
        return self._loader(dataset, self._labels, sampler=sampler, trainer=self.trainer, view_table=self.train_views())

    def val_dataloader(self) -> ViewLoader | list[Any]:
        """The validation images; an empty list where there are none."""
        parts, split = self._ready()
        if not split.val:
            return []
        return self._eval_loader([parts.train.images], torch.tensor(split.val), LabelTable(parts.train.targets))

    def test_dataloader(self) -> ViewLoader:
        """The test images."""
        parts, _ = self._ready()
        if parts.test is None:
            raise InputError(f"{type(self.source).__name__} has no test part")
        indices = torch.arange(len(parts.test.images))
        return self._eval_loader([parts.test.images], indices, LabelTable(parts.test.targets))

    def predict_dataloader(self) -> ViewLoader:
        """The test images."""
        return self.test_dataloader()

    def visible_labels(self) -> Tensor:
        """The label of each index that training may see; -100 or NaN elsewhere, and where it is coarse."""
        return self._see().visible

    # The pool, for pseudo-labels.

    def unlabeled_indices(self) -> list[int]:
        """Indices of the unlabeled images to train on."""
        parts, split = self._ready()
        start = len(parts.train.images)
        pool = range(start, start + sum(map(len, self._extra())))
        if self.unlabeled == "rest":
            return sorted({*(index for index in split.unlabeled if index < start), *split.held_out})
        return sorted({*pool} - {*split.labeled} | {*split.held_out})

    def pool_dataloader(self) -> ViewLoader:
        """Labeled and unlabeled training images under evaluation transforms, with the labels that can be seen."""
        return self._eval_loader(self._images(), self._pool(), self._see(), self.pool_views())

    # What teachers keep outputs of.

    def train_views(self) -> ViewTable | None:
        """All views of all training images; None where they are endless."""
        return (
            None
            if self.num_views is None
            else self._table("train", self._trained(), self.train_transform, self.num_views)
        )

    def pool_views(self) -> ViewTable:
        """The images of :meth:`pool_dataloader`."""
        return self._table("pool", self._pool(), self.eval_transform, 1)

    def _pool(self) -> Tensor:
        _, split = self._ready()
        return torch.tensor(split.labeled + self.unlabeled_indices(), dtype=torch.long)

    def _table(self, name: str, indices: Tensor, transform: Any, num_views: int) -> ViewTable:
        if name not in self._tables:
            dataset = ViewDataset(self._images(), indices, transform, self.seed)
            self._tables[name] = ViewTable(dataset, num_views, self.num_workers)
        return self._tables[name]

    def set_pseudo_labels(self, labels: PseudoLabels) -> None:
        """Fill accepted pseudo-labels into training batches from now on, in place of all earlier ones."""
        self._ready()
        assert self._labels is not None
        self._labels.set(labels)

    def hidden_truth(self, index: Tensor) -> Tensor:
        """The true labels of training images, (N,), for metrics alone; -100 where nobody knows them."""
        parts, _ = self._ready()
        known = [parts.train.targets]
        if self.unlabeled == "test" and parts.test is not None:
            known.append(parts.test.targets)
        known.append(torch.full((sum(map(len, self._images())), *parts.train.targets.shape[1:]), IGNORE_INDEX))
        return torch.cat(known)[index]

    def image(self, index: int) -> Any:
        """A training image as the source gives it, before any transform."""
        return read_image(self._images(), index)

    def path(self, index: int) -> str | None:
        """The path of a training image's file, where there is one."""
        return path_of(self._images(), index)

    def _images(self) -> list[Any]:
        """All images by index: the training part, then the pool's, else those that may have answers."""
        parts, _ = self._ready()
        return [parts.train.images, *(self._extra() or ([] if parts.unlabeled is None else [parts.unlabeled]))]

    def _ready(self) -> tuple[Parts, Split]:
        if self._parts is None or self.split is None:
            self.setup("")
        assert self._parts is not None
        assert self.split is not None
        return self._parts, self.split

    def _extra(self) -> list[Any]:
        """The images of a pool that lies outside the training part."""
        assert self._parts is not None
        if self.unlabeled == "source":
            if self._parts.unlabeled is None:
                raise InputError(f"unlabeled: source, but {type(self.source).__name__} has no unlabeled part")
            return [self._parts.unlabeled]
        if self.unlabeled == "test":
            if self._parts.test is None:
                raise InputError(f"unlabeled: test, but {type(self.source).__name__} has no test part")
            return [self._parts.test.images]
        return []

    def _see(self) -> LabelTable:
        """What training may see, without pseudo-labels."""
        parts, split = self._ready()
        size = sum(map(len, self._images()))
        weak: Any = {
            "noisy": self.noisy,
            "noise": self.label_noise,
            "coarse": self.coarse,
            "class_names": self.class_names,
        }
        return build_labels(parts.train.targets, split, size, **weak)

    def _trained(self) -> Tensor:
        """Indices of all training images: labeled ones, then those of the pool, and those with a coarse label."""
        _, split = self._ready()
        assert self._labels is not None
        kind = self._labels.kind
        coarse = [] if kind is None else (kind == LabelKind.COARSE).nonzero().flatten().tolist()
        return torch.tensor(split.labeled + sorted({*self.unlabeled_indices(), *coarse}))

    def _answers(self, path: Path) -> list[LabelRow]:
        parts, split = self._ready()
        return read_label_file(
            path,
            self._images()[:1] if self.unlabeled == "test" else self._images(),  # test images get no answer
            class_names=self.class_names or [str(c) for c in range(int(parts.train.targets.max()) + 1)],
            group_names=[] if self.coarse is None else self.coarse.names,
            kept=split.val,
        )

    def _check_answers(self) -> None:
        """Refuse answers for images of an unlabeled part that is not there, or is another."""
        parts, split = self._ready()
        size = len(parts.train.images)
        beyond = [answer[0] for answer in split.answers if answer[0] >= size]
        if not beyond:
            return
        what = f"labeled: there are answers for images of the source's unlabeled part (sample {beyond[0]})"
        if parts.unlabeled is None or self.unlabeled == "test":
            raise InputError(f"{what}, which {'is gone' if parts.unlabeled is None else 'unlabeled: test leaves out'}")
        digest = identity(parts.unlabeled)
        if split.pool not in ("", digest) or max(beyond) >= size + len(parts.unlabeled):
            raise InputError(f"{what}, which has changed since (its hash differs)")
        self.split = replace(split, pool=digest)

    def _eval_loader(
        self, images: list[Any], indices: Tensor, labels: LabelTable, view_table: ViewTable | None = None
    ) -> ViewLoader:
        world, rank = self._processes()
        dataset = ViewDataset(images, indices, self.eval_transform, self.seed)
        sampler = ShareSampler(len(indices), num_replicas=world, rank=rank)
        return self._loader(dataset, labels, sampler=sampler, view_table=view_table)

    def _loader(self, dataset: ViewDataset, labels: LabelTable, **kwargs: Any) -> ViewLoader:
        return ViewLoader(
            dataset,
            labels,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            **kwargs,
        )

    def _processes(self) -> tuple[int, int]:
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)


def _check_filled(parts: Parts, source: str) -> None:
    held = {"train": parts.train.images, "unlabeled": parts.unlabeled}
    held["test"] = None if parts.test is None else parts.test.images
    for name, images in held.items():
        if images is not None and len(images) == 0:
            raise InputError(f"{name}: the {name} part of {source} is empty; it must hold at least one image")
