"""One datamodule for supervised, semi-supervised and distillation runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from kd_lightning.batch import LabelKind
from kd_lightning.data.counts import count_parts
from kd_lightning.data.decoded import DecodedPictures
from kd_lightning.data.duplicates import DuplicatePolicy
from kd_lightning.data.groups import GroupOf, groups_of
from kd_lightning.data.labels.build import build_labels, check_coarse, check_label_options, val_labels
from kd_lightning.data.labels.coarse_labels import CoarseLabels
from kd_lightning.data.labels.label_noise import LabelNoise
from kd_lightning.data.labels.table import LabelTable, true_labels
from kd_lightning.data.resume_settings import batch_settings, check_resume
from kd_lightning.data.samples import Samples, check_pool_name
from kd_lightning.data.sources.source import Parts, Source, check_not_empty, check_parts, join_val
from kd_lightning.data.split_setup import check_duplicates, check_same_on_ranks, find_split
from kd_lightning.data.splits import Split, wrong_sample
from kd_lightning.data.transforms.mix import Mix, check_mix
from kd_lightning.data.view_datamodule import ViewDataModule
from kd_lightning.data.views.loader import ViewLoader
from kd_lightning.data.views.partners import Partners
from kd_lightning.data.views.samplers import EvenClasses, check_sizes, training_sampler
from kd_lightning.data.views.table import ViewTable
from kd_lightning.errors import InputError
from kd_lightning.pseudo_labels.table import PoolLabels
from kd_lightning.runs.folder import run_folder, writes_files


class SemiSupervisedDataModule(ViewDataModule):
    """Split a source into labeled, unlabeled and validation images, and load them as ``Batch`` objects.

    Training batches mix labeled and unlabeled images. A label that training may not see is -100 (NaN where labels are
    floats). The true labels of unlabeled images never enter a training batch. The split is written to the run's folder
    as ``split.json``, and checked on every process and on resume. ``predict`` uses the test images.

    Labels may also be noisy or coarse, simulated or from a file, in any mixture. ``kind`` in the batch holds the
    :class:`~kd_lightning.batch.LabelKind` of each row. Validation and test labels are those of the source,
    but for ``correct_val``.

    Labels may be dense: masks, or a label for each token. ``labeled`` and ``val_size`` then count samples of all
    classes, and transforms are those of :class:`~kd_lightning.data.views.dense_dataset.DenseViewDataset`.

    Args:
        source: Where the images come from.
        labeled: How many training labels may be seen: an int per class (0 for none), a fraction of each class, or the
            path of a saved ``split.json``, which then sets the validation part, too. Default: None, which means all.
        labeled_at_most: Whether a class with fewer training images than ``labeled`` asks for is labeled whole. Default:
            False, which means that it is an error.
        unlabeled: The unlabeled images to train on: ``"rest"`` (of the training part), ``"none"``, ``"source"`` (the
            source's unlabeled part) or ``"test"`` (the test images). The last is the transductive setting: its test
            metrics have the prefix ``transductive/``.
        val_size: Validation part of the training images: a fraction of each class, or an int per class; 0 for none.
            Default: None, which means the source's own validation part, or 0.1 if it has none. With an own one, a
            number is an error, also 0: a run without validation needs a source without that part.
        batch_size: Images per batch on each process, at least 1.
        labeled_batch_size: Labeled images per batch, at least 1 and below ``batch_size``. Every batch then begins with
            that many labeled images. The stream that needs more batches decides the length of an epoch; the images of
            the other one repeat. Default: None, which shuffles labeled and unlabeled images together.
        sampler: ``"shuffled"``, in which each image comes equally often, or ``"balanced"``: labeled images are drawn
            such that each class comes equally often, also as a partner of ``mix``. It needs one class a label. The
            number of rows stays the same.
        num_workers: Worker processes of each loader, at least 0. Augmentation does not depend on it.
        seed: Seed of the split, the order and the augmentation.
        num_views: Number of different augmentations of an image, at least 1. Teachers can cache their outputs only if
            it is set. Default: None, which means new augmentations in every epoch.
        views_per_epoch: Views of each image in an epoch, at least 1.
        train_transform: Augmentation. Default: None, which means the source's.
        strong_transform: Stronger augmentation for a second view of each image, ``x_strong`` in the batch. Of samples
            with an entry ``x_strong``, such as a second text, it gets that. Default: None, which means no second view,
            or this entry as it is.
        eval_transform: Transform for validation and test. Default: None, which means the source's.
        mix: Mixes each training image with another one, and their labels: ``MixUp``, ``CutMix`` or ``OneOf``, see
            :mod:`kd_lightning.data.transforms.mix`. Labeled images are mixed with labeled ones, and the others with
            others, each time the same for a view. Teachers get the mixed image. Labels of one class become
            probabilities (B, C), and refreshed pseudo-labels are mixed likewise. Default: None, which means none.
        noisy: Whether the source's own labels may be wrong. Their kind is then noisy, which co-teaching and
            ``LabelKindLoss`` use.
        label_noise: Simulated noise of the training labels: :class:`SymmetricNoise`, :class:`PairNoise` or
            :class:`TransitionNoise`. The kind of all of them is then noisy, also of those that stay right.
        coarse: Superclasses. They are the labels of all or a fraction of the training images outside ``labeled``.
        label_file: CSV or Parquet file of labels that replace or extend those of the source, for training images and
            those of the source's unlabeled part; see
            :func:`~kd_lightning.data.labels.label_file.read_label_file`. They are stored in ``split.json``. A later run
            continues from there: ``labeled: RUN/split.json`` with a further file.
        correct_val: Whether rows of ``label_file`` may correct labels of the validation part. Default: False, which
            means that a row with another label than the source's is an error there.
        group: Function from the path of an image to its group, such as the patient, scene or speaker; in YAML its
            import path. No group stands in two of training, validation and test: the validation part has whole groups,
            and samples of training whose group is in validation or test are left out. Default: None, which means the
            source's groups, if it has some.
        duplicates: Images of equal content in training, validation and test: ``"count"`` (a warning names them),
            ``"refuse"``, or ``"together"``, which leaves copies of test images out of training, and moves copies of
            training images from validation to training; with groups it leaves these out of training.
        decoded: Folder of decoded pictures: image files are decoded once, and read from there by all later epochs and
            fits. See :class:`~kd_lightning.data.decoded.DecodedPictures`. Default: None, which means that each epoch
            decodes the files.
        decoded_side: Short side in pixels that pictures are shrunk to before they are stored. Default: None, which
            means what the source's evaluation needs (8/7 of its ``image_size``), or the full size if a transform is
            your own.

    Raises:
        InputError: For values out of range, and for a source that lacks the part that ``unlabeled`` names.
    """

    def __init__(
        self,
        source: Source,
        *,
        labeled: int | float | str | Path | None = None,
        labeled_at_most: bool = False,
        unlabeled: Literal["rest", "none", "source", "test"] = "rest",
        val_size: int | float | None = None,
        batch_size: int = 64,
        labeled_batch_size: int | None = None,
        sampler: Literal["shuffled", "balanced"] = "shuffled",
        num_workers: int = 0,
        seed: int = 0,
        num_views: int | None = None,
        views_per_epoch: int = 1,
        train_transform: nn.Module | None = None,
        strong_transform: nn.Module | None = None,
        eval_transform: nn.Module | None = None,
        mix: Mix | None = None,
        noisy: bool = False,
        label_noise: LabelNoise | None = None,
        coarse: CoarseLabels | None = None,
        label_file: str | Path | None = None,
        correct_val: bool = False,
        group: GroupOf | None = None,
        duplicates: DuplicatePolicy = "count",
        decoded: str | Path | None = None,
        decoded_side: int | None = None,
    ) -> None:
        super().__init__()
        check_sizes(batch_size, labeled_batch_size, num_views, views_per_epoch, num_workers)
        check_pool_name(unlabeled)
        check_coarse(coarse, labeled)
        self.source = source
        self.labeled = labeled
        self.labeled_at_most = labeled_at_most
        self.unlabeled = unlabeled
        self.val_size = val_size
        self.batch_size = batch_size
        self.labeled_batch_size = labeled_batch_size
        if sampler not in ("shuffled", "balanced"):
            raise InputError(f"sampler must be shuffled or balanced, got {sampler!r}")
        self.sampler = sampler
        self.num_workers = num_workers
        self.seed = seed
        self.num_views = num_views
        self.views_per_epoch = views_per_epoch
        self.train_transform = source.train_transform if train_transform is None else train_transform
        self.strong_transform = strong_transform
        self.eval_transform = source.eval_transform if eval_transform is None else eval_transform
        self.mix = None if mix is None else check_mix(mix, "mix")
        if mix is not None and coarse is not None:
            raise InputError("mix: coarse labels cannot be mixed; leave out one of mix and coarse")
        self.noisy = noisy
        self.label_noise = label_noise
        self.coarse = coarse
        self.label_file = label_file
        if correct_val and label_file is None and not isinstance(labeled, str | Path):
            raise InputError("correct_val: true needs label_file, whose rows correct the labels")
        self.correct_val = correct_val
        self.group = group
        self.duplicates = duplicates
        if decoded is None and decoded_side is not None:
            raise InputError(f"decoded_side: {decoded_side} needs decoded, the folder of the pictures")
        own = (train_transform, strong_transform, eval_transform) != (None, None, None)
        self.decoded_side = source.stored_side if decoded_side is None and not own else decoded_side
        self.decoded = None if decoded is None else DecodedPictures(decoded, self.decoded_side)
        self.transductive = unlabeled == "test"
        self.class_names: list[str] | None = None
        self.split: Split | None = None
        self._parts: Parts | None = None
        self._labels: LabelTable | None = None
        self._view_tables: dict[str, ViewTable] = {}
        self._samples: Samples | None = None
        self._settings: dict[str, Any] = {}  # hashed once, not again for every checkpoint
        self._is_described = False

    def prepare_data(self) -> None:
        """Runs once per node before ``setup``: download missing files."""
        self.source.prepare()

    def setup(self, stage: str) -> None:
        """Runs on every process before each stage: load and split the source, and compare the samples with rank 0's.

        Test and predict read all test images, so they need no split.
        """
        self._load_parts()
        if self.decoded is not None:
            self.decoded.recall(self.samples.parts.images, self.trainer)
        ranks = None if self.trainer is None or self.trainer.world_size == 1 else self.trainer
        if stage in (TrainerFn.TESTING, TrainerFn.PREDICTING):
            if ranks is not None:
                check_same_on_ranks(ranks, [self.samples.test_hash])
            return
        if self._labels is None:
            check_label_options(self)
            keys = ["labeled", "labeled_at_most", "val_size", "seed", "duplicates", "label_file"]
            keys += ["correct_val", "group"]
            groups = [] if self.coarse is None else self.coarse.names
            self.split = find_split(self.samples, group_names=groups, **{key: getattr(self, key) for key in keys})
            self._labels = self._build_labels()  # raises InputError for a missing part before training starts
            if not len(self._train_indices()):
                raise InputError("labeled: 0 leaves nothing to train on; allowed with coarse, label_file, or unlabeled")
        elif stage == TrainerFn.FITTING:
            self._samples = None  # files may have changed since the earlier stage
        assert self.split is not None
        if stage != TrainerFn.FITTING:
            if ranks is not None:
                check_same_on_ranks(ranks, [self.split.hash, self.samples.images_hash])
            return
        self.split = self.samples.name_samples(self.split, self.class_names)
        if self.trainer is None:
            return
        if self.duplicates != "together":  # find_split has done that
            check_duplicates(self.duplicates, self.samples, self.split)
        self._labels = self._build_labels()  # without the pseudo-labels of an earlier fit
        self._settings = {}
        self._is_described = False
        self._view_tables.clear()
        if problem := wrong_sample(self.split, self.samples.training):
            raise InputError(f"split: {problem}")
        check_same_on_ranks(self.trainer, [self.split.hash, self.samples.images_hash])
        counts = count_parts(self.samples, self.split, self._labels, self._train_indices())
        rank_zero_info(f"data: number of samples\n{counts}")
        folder = run_folder(self.trainer)
        if writes_files(self.trainer):
            self.save_split(folder / "split.json")
            counts.save(folder / "samples.json")

    def teardown(self, stage: str) -> None:
        """Runs at the end of each stage. After a fit, no loader of it reads a teacher's stored outputs any more."""
        for table in self._view_tables.values() if stage == TrainerFn.FITTING else ():
            table.outputs.set({})

    def save_split(self, path: Path) -> None:
        """Write the split as a file for ``labeled``, with paths and contents of its samples."""
        _, split = self._parts_and_split()
        self.samples.name_samples(split, self.class_names).save(path)

    def state_dict(self) -> dict[str, Any]:
        """Runs when a checkpoint is saved: return hashes of split, samples and labels, and the batches' settings."""
        if self.split is None or self._labels is None:
            return {}
        self._settings = self._settings or batch_settings(self, self._world_size_and_rank()[0])
        hashes = {"split": self.split.hash, "samples": self.samples.images_hash, "labels": self._labels.hash}
        return {**hashes, "settings": self._settings}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Runs when a fit resumes: refuse another split, samples, labels or settings of the batches."""
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING and (now := self.state_dict()):
            check_resume(state_dict, now)

    def train_dataloader(self) -> ViewLoader:
        """Loader of labeled and unlabeled images, shuffled together or in two streams."""
        _, split = self._parts_and_split()
        assert self._labels is not None
        indices = self._train_indices()
        world, rank = self._world_size_and_rank()
        keys = ("batch_size", "labeled_batch_size", "views_per_epoch", "num_views", "seed")
        settings = {key: getattr(self, key) for key in keys} | {"num_replicas": world, "rank": rank}
        settings["even"] = self._even_classes() if self.sampler == "balanced" else None
        sampler = training_sampler(len(split.labeled), len(indices) - len(split.labeled), **settings)
        transforms = self.train_transform, self.strong_transform
        dataset = self._views(self.samples.images, indices, self._labels, *transforms, **self._mixing(indices))
        options = {"sampler": sampler, "trainer": self.trainer, "view_table": self.train_views()}
        loader = self._loader(dataset, self._labels, **options)
        if not self._is_described and self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self._is_described = True
            rank_zero_info(f"data: {loader.describe()}")
        return loader

    def val_dataloader(self) -> ViewLoader | list[Any]:
        """Loader of the validation images; an empty list if there are none."""
        parts, split = self._parts_and_split()
        if not split.val:
            return []
        return self._eval_loader([parts.train.images], torch.tensor(split.val), val_labels(parts.train, split))

    def test_dataloader(self) -> ViewLoader:
        """Loader of the test images."""
        parts = self._load_parts()
        if parts.test is None:
            raise InputError(f"{type(self.source).__name__} has no test part")
        indices = torch.arange(len(parts.test.images))
        return self._eval_loader([parts.test.images], indices, true_labels(parts.test))

    def predict_dataloader(self) -> ViewLoader:
        """Loader of the test images."""
        return self.test_dataloader()

    def visible_labels(self) -> Tensor:
        """The labels that training may see, by index; -100 or NaN for hidden, missing and coarse labels. None dense."""
        self.samples.check_one_label()
        return self._build_labels().visible

    def validation_labels(self) -> Tensor:
        """The labels that validation compares with, by index of the training images (N,). None dense."""
        self.samples.check_one_label()
        parts, split = self._parts_and_split()
        return val_labels(parts.train, split).visible

    def unlabeled_indices(self) -> list[int]:
        """Indices of the unlabeled images to train on, ascending."""
        _, split = self._parts_and_split()
        return self.samples.unlabeled_indices(split)

    def pool_dataloader(self, num_views: int | None = None) -> ViewLoader:
        """Loader of labeled and unlabeled training images, with the visible labels, under evaluation transforms.

        With ``num_views``, each image comes in so many views of training, without a mix, one behind another in a batch.
        """
        views = self.pool_views(num_views)
        return self._eval_loader(self.samples.images, self._pool_indices(), self._build_labels(), views, num_views)

    def train_views(self) -> ViewTable | None:
        """All views of all training images; None if ``num_views`` is None."""
        if self.num_views is None:
            return None
        return self._view_table("train", self._train_indices(), self.train_transform, self.num_views)

    def pool_views(self, num_views: int | None = None) -> ViewTable:
        """The images of :meth:`pool_dataloader`, one view each, or ``num_views`` ones."""
        transform = self.eval_transform if num_views is None else self.train_transform
        name = "pool" if num_views is None else f"pool {num_views}"
        return self._view_table(name, self._pool_indices(), transform, num_views or 1)

    def _view_table(self, name: str, indices: Tensor, transform: Any, num_views: int) -> ViewTable:
        if name not in self._view_tables:
            mixing = self._mixing(indices) if name == "train" else {}
            dataset = self._views(self.samples.images, indices, self._build_labels(), transform, **mixing)
            self._view_tables[name] = ViewTable(dataset, num_views, self.num_workers)
        return self._view_tables[name]

    def _mixing(self, indices: Tensor) -> dict[str, Any]:
        """Arguments of the training views at these indices."""
        if self.mix is None:
            return {}
        _, split = self._parts_and_split()
        classes = self._even_classes().members if self.sampler == "balanced" else None
        return {"mix": self.mix, "partners": Partners(self.seed, indices, len(split.labeled), classes)}

    def _pool_indices(self) -> Tensor:
        _, split = self._parts_and_split()
        return torch.tensor(split.labeled + self.unlabeled_indices(), dtype=torch.long)

    def set_pseudo_labels(self, labels: PoolLabels) -> None:
        """Replace all pseudo-labels; later training batches hold the accepted ones. Labels must not be dense."""
        self._parts_and_split()
        assert self._labels is not None
        self._labels.set_pseudo_labels(labels)

    def _load_parts(self) -> Parts:
        """Load the source, once."""
        if self._parts is None:
            parts = check_parts(self.source.load(), type(self.source).__name__)
            check_not_empty(parts, type(self.source).__name__)
            self._parts, self.class_names = join_val(parts), parts.class_names
        return self._parts

    def _parts_and_split(self) -> tuple[Parts, Split]:
        if self._parts is None or self.split is None:
            self.setup("")
        assert self._parts is not None
        assert self.split is not None
        return self._parts, self.split

    def _build_labels(self) -> LabelTable:
        """The labels that training may see, without pseudo-labels."""
        parts, split = self._parts_and_split()
        options: dict[str, Any] = {"noisy": self.noisy, "noise": self.label_noise, "coarse": self.coarse}
        options |= {"class_names": self.class_names, "dense": parts.train.dense, "weights": parts.train.weights}
        return build_labels(parts.train.targets, split, len(self.samples), **options)

    def sample_groups(self) -> list[str] | None:
        """The group of each image by index of training images and pool; None if there are none."""
        found = groups_of(self.samples, self.group)
        return None if found is None else found[: len(self.samples)]

    def _even_classes(self) -> EvenClasses:
        _, split = self._parts_and_split()
        labels = self.visible_labels()[split.labeled]
        if labels.ndim > 1 or labels.is_floating_point() or not len(labels):
            raise InputError(f"sampler: balanced needs labels of one class each, got {[*labels.shape]} {labels.dtype}")
        return EvenClasses(labels, self.seed)

    def _train_indices(self) -> Tensor:
        """Indices to train on: labeled ones, then ascending those of the pool and those with a coarse label."""
        _, split = self._parts_and_split()
        assert self._labels is not None
        kind = self._labels.kind
        coarse = [] if kind is None else (kind == LabelKind.COARSE).nonzero().flatten().tolist()
        return torch.tensor(split.labeled + sorted({*self.unlabeled_indices(), *coarse}))
