"""Fill the caches of teachers: compute their outputs for every view once, and read them from then on."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from rich.progress import track
from torch import Tensor, nn

from kd_lightning.batch import Batch
from kd_lightning.cache.codecs import Bytes
from kd_lightning.cache.outputs import OutputRows, StoredOutputs
from kd_lightning.cache.row_format import RowFormat
from kd_lightning.cache.store import OutputCache, format_size
from kd_lightning.cache.tensors import hash_rows, token_lengths, token_mask
from kd_lightning.errors import InputError
from kd_lightning.inputs import map_inputs
from kd_lightning.ranks import gather, on_all_ranks
from kd_lightning.teachers.cache_key import environment, key_of
from kd_lightning.teachers.output_layout import Distances, format_of
from kd_lightning.teachers.teacher import Teacher

if TYPE_CHECKING:
    from filelock import FileLock

CHUNK = 1024  # rows that are written at a time, rounded to whole batches
CHUNK_BYTES = 2**28  # most bytes of them, or of one batch


class Views(Protocol):
    """A table of views, as ``train_views()`` and ``pool_views()`` of a datamodule return it."""

    @property
    def outputs(self) -> Any:
        """What the loaders fill into batches; ``set({name: StoredOutputs})`` replaces it."""

    def __len__(self) -> int: ...

    def parts(self) -> dict[str, str]:
        """What decides which view a row is, by name."""

    def read(self, batches: Iterable[Iterable[int]], seed: int = 0) -> Iterator[Batch]:
        """Load batches of these rows."""

    def finish(self, batch: Batch) -> Batch:
        """Complete a batch that was read: run transforms that run on another device."""


def fill_caches(
    teachers: nn.Module, trainer: Trainer, views: str = "train_views", num_views: int | None = None
) -> None:
    """Fill the caches of teachers, and hand them to the datamodule, whose batches hold the outputs from now on.

    Call it on every process at the start of a fit. All processes fill together. If another run fills the same cache,
    they wait for it. Outputs that are stored for other views than those of this fit are not used.

    The features of the teacher's ``layers`` lie beside its logits, for training views alone. With the module's
    ``class_dim``, ``cache_top_k`` counts for each position, and logits of token sequences with an ``attention_mask``
    are stored in their own lengths.

    Args:
        teachers: A teacher, or a module that contains teachers. Those without ``cache`` are skipped. Their outputs have
            the teacher's name in that module, such as ``teachers.0``; a single teacher's name is ``teacher``.
        trainer: Trainer with a datamodule.
        views: Name of the datamodule's method that returns the table of views, as in ``SemiSupervisedDataModule``.
        num_views: Number of views that the method gets. Default: None, which means that it has no argument.

    Raises:
        InputError: On all processes: if the data have no such views or an unlimited number of them, if the folder
            cannot be written or has no room, or if data or teacher are random.
    """
    named = {name or "teacher": part for name, part in teachers.named_modules() if isinstance(part, Teacher)}
    for name, teacher in named.items():
        teacher.start_fit(name, views)
    named = {name: teacher for name, teacher in named.items() if teacher.cache is not None}
    if not named:
        return
    method = getattr(getattr(trainer, "datamodule", None), views, None)
    if not callable(method):
        raise InputError(
            f"cache needs data whose augmentation can be replayed: a datamodule with {views}(), such as "
            "SemiSupervisedDataModule"
        )
    table: Views | None = method() if num_views is None else method(num_views)
    if table is None:
        raise InputError(
            "cache needs a fixed number of views of each sample, but every epoch has new ones; set the datamodule's "
            "num_views (1 where nothing is random)"
        )
    stored: dict[str, StoredOutputs] = {}
    with isolate_rng():  # so that a run is the same whether a cache is filled or found
        parts = table.parts() | environment(trainer)
        for name, teacher in named.items():
            stored[name] = _CacheFill(teacher, trainer, table, parts, views == "train_views").run()
            teacher.cache_folders[views] = stored[name].folder
    table.outputs.set(stored)


@dataclass(frozen=True)
class _Sample:
    """Some rows as they are in this fit."""

    numbers: Bytes
    now: OutputRows


class _CacheFill:
    """Fills the cache of one teacher for one table of views. Every method is called on all processes."""

    def __init__(
        self, teacher: Teacher, trainer: Trainer, table: Views, parts: dict[str, str], is_training: bool
    ) -> None:
        self.teacher = teacher
        self.has_features = is_training and bool(teacher.layers)
        self.has_logits = teacher.needs_logits or not self.has_features
        self.trainer = trainer
        self.table = table
        self.parts = parts | key_of(teacher)
        self.batch_size = int(getattr(trainer.datamodule, "batch_size", 64))  # type: ignore[attr-defined]
        owner = getattr(trainer.lightning_module, "teaching", trainer.lightning_module)
        self.class_dim: int | None = getattr(owner, "class_dim", None)
        # teach counts padding, too, unless it has a mask
        self.cuts_padding = self.class_dim is not None and getattr(owner, "mask", "attention_mask") == "attention_mask"

    def run(self) -> StoredOutputs:
        """Find the outputs of these views, or compute and store them."""
        numbers = np.random.default_rng().integers(len(self.table), size=self.batch_size)  # other rows in each fit
        computed: list[_Sample] = []
        on_all_ranks(self.trainer, lambda: computed.append(self._compute_twice(numbers)), "cache")
        (sample,) = computed
        for dtype in dict.fromkeys((self.teacher.cache_dtype, "float32")):
            if stored := self._find(format_of(self.teacher, sample.now, dtype, self.class_dim), sample):
                return stored
            rank_zero_warn(f"cache: an output is too large for {dtype}, so the outputs are stored in float32")
        raise InputError("cache: an output of the teacher is too large for float32")

    def _find(self, format: RowFormat, sample: _Sample) -> StoredOutputs | None:
        """Find the table of these views, and compute what is missing in it. If there is none, start one.

        Returns:
            The outputs, or None if one is too large for the format.
        """
        why = ""  # a table is of other data
        for version in count():
            stored = self._open(format, version, sample)
            written = [*{*range(stored.cache.chunks)} - {*stored.cache.absent()}]
            if found := self._differs(stored, sample, written):
                why = f"{found} are not those in {stored.folder}"
                continue
            computed = self._fill(stored, why)
            if computed is None:
                return None
            if not (found := self._differs(stored, sample, range(stored.cache.chunks))):
                return stored
            if not self._any_rank(computed < stored.cache.chunks):  # all of it is of this fit
                raise InputError(
                    f"cache: {found} differ between two passes over the same views: the dataset, a transform, a batch "
                    "hook or the teacher is random, or depends on the other images of a batch; remove cache"
                )
            why = f"{found} are not those in {stored.folder}"
        raise AssertionError

    def _compute_twice(self, numbers: Bytes) -> _Sample:
        """Compute the outputs of some rows. Refuse data and teachers that are random."""
        passes = []
        for seed in (0, 1):
            torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
            (batch,) = self.table.read([numbers], seed)
            if self.teacher.has_preprocess and not seed:
                self._check_preprocess(batch)
            passes.append(self._outputs(batch).cpu())
        first, again = passes
        if (first.views != again.views).any() or (first.inputs != again.inputs).any():
            raise InputError(
                "cache: a view differs when it is read again: the dataset itself augments its images, or a transform "
                "has a random generator of its own. Use torch's, numpy's or Python's global generator in "
                "train_transform, or remove cache"
            )
        distances = Distances()
        distances.add(first, again)
        if not distances.within(self._noise):
            raise InputError("cache: the teacher's outputs for the same batch differ in each pass; remove cache")
        return _Sample(numbers, first)

    def _check_preprocess(self, batch: Batch) -> None:
        """Raise InputError if the preprocessing draws random numbers, which few passes may not show."""
        x = map_inputs(torch.clone, move_batch(self.trainer, self.table.finish(batch)).teacher_x)
        before = _random_states()
        with torch.no_grad(), self.teacher.evaluating():
            self.teacher.prepare(x)
        if before != _random_states():
            raise InputError(
                "cache: the teacher's preprocess draws random numbers, so that its stored outputs would belong to one "
                "draw; remove it, or remove cache"
            )

    @property
    def _noise(self) -> float:
        """Tolerance for rounding, as a share of the largest output, since kernels differ in the order of sums."""
        return 0.02 if "16" in str(self.trainer.precision) else 1e-4

    def _open(self, format: RowFormat, version: int, sample: _Sample) -> StoredOutputs:
        """Open a table, and drop its damaged parts. Tables of other data have other versions."""
        root = self.teacher.cache
        assert root is not None
        kind = type(self.teacher.network).__name__
        keys = gather(self.trainer, format.key)  # of other samples in each process
        if any(key != keys[0] for key in keys):
            raise InputError(f"cache: outputs of the teacher must have one shape for all samples, got {keys}")
        parts = self.parts | format.key | ({"version": str(version)} if version else {})
        size = format.row_bytes
        if format.ragged and format.logits is not None and sample.now.lengths is not None:
            size = format.fixed_bytes + math.ceil(float(sample.now.lengths.mean()) * format.logits.codec.row_bytes)
        size = gather(self.trainer, size)[0]  # ragged samples differ
        chunk = max(1, min(CHUNK, CHUNK_BYTES // size) // self.batch_size) * self.batch_size
        opened: list[OutputCache] = []

        def prepare() -> None:
            cache = OutputCache(root, kind, parts, len(self.table), size, chunk=chunk, ragged=format.ragged)
            opened.append(cache)
            if damaged := cache.damaged(range(cache.chunks)[self.trainer.local_rank :: self.trainer.num_devices]):
                cache.drop(damaged)
                rank_zero_warn(
                    f"cache: {len(damaged)} of {cache.chunks} parts of {cache.folder} are damaged, and computed again"
                )

        on_all_ranks(self.trainer, prepare, "cache")
        return StoredOutputs(opened[0], format)

    def _fill(self, stored: StoredOutputs, why: str) -> int | None:
        """Compute what is missing.

        Returns:
            Number of chunks that were missing; None if an output is too large for the format.
        """
        trainer, cache, lock = self.trainer, stored.cache, None
        try:
            if trainer.is_global_zero and cache.absent():
                lock = self._acquire(cache)
            trainer.strategy.barrier("cache")
            absent = [] if self._any_rank(cache.too_large) else cache.absent()
            computed = len(absent)
            on_all_ranks(self.trainer, lambda: cache.check_room(sum(len(cache.rows_of(n)) for n in absent)), "cache")
            if absent:
                self._announce(cache, computed, why)
            # without a common disk, the second round computes on each node what the first computed on the others
            for rank, ranks in (trainer.global_rank, trainer.world_size), (trainer.local_rank, trainer.num_devices):
                on_all_ranks(self.trainer, partial(self._compute, stored, absent[rank::ranks]), "cache")
                absent = [] if self._any_rank(cache.too_large) else cache.absent()
        finally:
            if lock is not None:
                lock.release()
        return None if self._any_rank(cache.too_large) else computed

    def _acquire(self, cache: OutputCache) -> FileLock:
        lock = cache.lock()
        try:
            lock.acquire(timeout=0)
        except TimeoutError:
            rank_zero_info(f"cache: another run is filling {cache.folder}; waiting for it")
            lock.acquire()
        return lock

    def _announce(self, cache: OutputCache, absent: int, why: str) -> None:
        changed = cache.difference() if absent == cache.chunks and not why else ""
        part = "all" if absent == cache.chunks else f"{absent} of {cache.chunks} parts"
        why = why or (f"the most similar cache differs in: {changed}" if changed else "")
        rank_zero_info(
            f"cache: computing {part} of {format_size(cache.size)} of teacher outputs, {cache.rows} rows, into "
            f"{cache.folder}{f' ({why})' if why else ''}"
        )

    def _compute(self, stored: StoredOutputs, numbers: Sequence[int]) -> None:
        """Compute and write chunks."""
        cache = stored.cache
        batches = (rows for number in numbers for rows in self._batches(cache, number))
        outputs = map(self._outputs, self.table.read(batches))
        shown = bool(numbers) and self.trainer.is_global_zero and self.trainer.progress_bar_callback is not None
        for number in track(numbers, "teacher outputs", disable=not shown):
            rows: list[Bytes] = []
            for _ in self._batches(cache, number):
                encoded = stored.encode(self._fitted(next(outputs), stored))  # at once: whole outputs may be large
                if encoded is None:
                    cache.mark_too_large()
                    return
                rows += [*encoded]
            rows = rows[: len(cache.rows_of(number))]
            cache.write(number, rows if cache.ragged else np.stack(rows))

    def _batches(self, cache: OutputCache, number: int) -> Iterator[Bytes]:
        """Yield a chunk's rows in batches of the training's size, since kernels depend on the batch size."""
        rows = cache.rows_of(number)
        for start in range(0, len(rows), self.batch_size):
            yield np.resize(np.array(rows[start : start + self.batch_size]), self.batch_size)

    @torch.no_grad()
    def _outputs(self, batch: Batch) -> OutputRows:
        """Compute logits and features (B, ...) of a batch from the data loader, as a training step does.

        They have lengths if each position of the logits is a token of the inputs.
        """
        trainer, views = self.trainer, hash_rows(batch.teacher_x)
        batch = move_batch(trainer, self.table.finish(batch))
        logits: Tensor | None = None
        features: dict[str, Tensor] = {}
        with trainer.precision_plugin.forward_context():
            if not self.has_logits:
                features = self.teacher.features(batch)
            elif not self.has_features:
                logits = self.teacher.compute(batch)
            else:
                with self.teacher.capturing(batch) as features:
                    logits = self.teacher.compute(batch)
        mask, lengths = token_mask(batch.teacher_x), None
        if mask is not None and logits is not None and logits.ndim == 3 and self.cuts_padding:
            tokens = logits.shape[2 if self.class_dim is not None and self.class_dim % 3 == 1 else 1]
            lengths = token_lengths(mask) if tokens == mask.shape[1] else None
        count = None if mask is None else mask.shape[1]
        return OutputRows(views, hash_rows(batch.teacher_x), logits, features, lengths, count)

    @staticmethod
    def _fitted(rows: OutputRows, stored: StoredOutputs) -> OutputRows:
        """Return rows with lengths if the table's rows have some, else without."""
        if not stored.cache.ragged:
            return replace(rows, lengths=None)
        if rows.lengths is None and rows.logits is not None:
            raise InputError(
                f"cache: the teacher's outputs {[*rows.logits.shape]} of a batch have no output for each token"
            )
        return rows

    def _differs(self, stored: StoredOutputs, sample: _Sample, chunks: Iterable[int]) -> str:
        """Compare the sample's rows in these chunks on all processes. Return what differs; empty if nothing does."""
        found: list[str] = []
        on_all_ranks(self.trainer, lambda: found.append(self._compare(stored, sample, [*chunks])), "cache")
        return next(filter(None, gather(self.trainer, found[0])), "")

    def _compare(self, stored: StoredOutputs, sample: _Sample, chunks: list[int]) -> str:
        rows = np.flatnonzero(np.isin(sample.numbers // stored.cache.chunk, chunks))
        changed = {"images": 0, "inputs of the teacher": 0}
        distances = Distances()
        for number in rows.tolist():  # one by one, since outputs may be large
            now = self._fitted(sample.now.row(number), stored)
            length = None if now.lengths is None else int(now.lengths[0])
            then = stored.read(sample.numbers[[number]], length)
            changed["images"] += int(then.views[0] != now.views[0])
            changed["inputs of the teacher"] += int(then.inputs[0] != now.inputs[0])
            if not any(changed.values()):
                rounded = stored.rounded(now)
                if rounded is None:
                    return "the teacher's outputs"
                distances.add(then, rounded)
        for text, others in changed.items():
            if others:
                return f"{others} of {len(rows)} compared {text}"
        return "" if self._near(distances, stored.format.is_half) else "the teacher's outputs"

    def _near(self, distances: Distances, halves: bool) -> bool:
        """Whether stored outputs are the teacher's present ones."""
        noise = max(self._noise, 0.02 if halves else 0)
        near = distances.within(noise)
        if halves and self._noise < noise and self.parts["device"] == "cpu":
            # rounding changes few float16 values; a small change of network or data changes most of them
            near = near and not distances.changes(0.2)
        return near

    def _any_rank(self, condition: bool) -> bool:
        return any(gather(self.trainer, condition))


def _random_states() -> list[Any]:
    """Return the states of the global random generators."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    _, keys, *rest = np.random.get_state()
    states = [state.numpy().tobytes() for state in (torch.get_rng_state(), *devices)]
    return [*states, np.asarray(keys).tobytes(), rest, random.getstate()]


def move_batch(trainer: Trainer, batch: Batch) -> Batch:
    """Do with a batch from a data loader what a training step of Lightning does: cast it, call its hooks, move it."""
    module: Any = trainer.lightning_module
    batch = trainer.precision_plugin.convert_input(batch)
    moved: Batch = trainer.strategy.batch_to_device(module._on_before_batch_transfer(batch))
    return moved
