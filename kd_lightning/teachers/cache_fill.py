"""Fill the caches of teachers: compute their outputs for every view once, and read them from then on."""

from __future__ import annotations

import platform
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torchvision
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from rich.progress import track
from torch import Tensor, nn

from kd_lightning.batch import Batch
from kd_lightning.cache.codecs import Bytes, Codec, DenseCodec, TopKCodec
from kd_lightning.cache.content import fingerprint
from kd_lightning.cache.outputs import HASH_BYTES, OutputRows, StoredOutputs
from kd_lightning.cache.store import OutputCache, format_size
from kd_lightning.cache.tensors import hash_rows
from kd_lightning.errors import InputError
from kd_lightning.inputs import map_inputs
from kd_lightning.ranks import gather, on_all_ranks
from kd_lightning.teachers.teacher import Teacher

if TYPE_CHECKING:
    from filelock import FileLock

CHUNK = 1024  # rows that are written at a time, rounded to whole batches


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


def fill_caches(teachers: nn.Module, trainer: Trainer, views: str = "train_views") -> None:
    """Fill the caches of teachers, and hand them to the datamodule, whose batches hold the outputs from now on.

    Call it on every process at the start of a fit. All processes fill together. If another run fills the same cache,
    they wait for it. Outputs that are stored for other views than those of this fit are not used.

    Args:
        teachers: A teacher, or a module that contains teachers. Those without ``cache`` are skipped. Their outputs have
            the teacher's name in that module, such as ``teachers.0``; a single teacher's name is ``teacher``.
        trainer: Trainer with a datamodule.
        views: Name of the datamodule's method that returns the table of views, as in ``SemiSupervisedDataModule``.

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
    table: Views | None = method()
    if table is None:
        raise InputError(
            "cache needs a fixed number of views of each sample, but every epoch has new ones; set the datamodule's "
            "num_views (1 where nothing is random)"
        )
    stored: dict[str, StoredOutputs] = {}
    with isolate_rng():  # so that a run is the same whether a cache is filled or found
        parts = table.parts() | _environment(trainer)
        for name, teacher in named.items():
            stored[name] = _CacheFill(teacher, trainer, table, parts).run()
            teacher.cache_folders[views] = stored[name].folder
    table.outputs.set(stored)


def _environment(trainer: Trainer) -> dict[str, str]:
    """Everything but data and network that the outputs depend on, by name."""
    hooks = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
    owners = (type(trainer.lightning_module), type(trainer.datamodule))  # type: ignore[attr-defined]
    found = [getattr(owner, hook, None) for owner in owners for hook in hooks]
    own = [
        hook for hook in found if not str(getattr(hook, "__module__", "")).startswith(("lightning.", "kd_lightning."))
    ]
    return {
        "batch hooks": fingerprint(own),
        "precision": str(trainer.precision),
        "device": trainer.strategy.root_device.type,
        "matmul": torch.get_float32_matmul_precision(),
        "torch": f"{torch.__version__}, torchvision {torchvision.__version__}",
        "Python": platform.python_version(),
    }


def _layout(teacher: Teacher) -> str:
    """Hash of whether the network is compiled, and of its weights' memory layout."""
    modules = [*teacher.network.modules()]
    compiled = any(getattr(m, "_compiled_call_impl", None) is not None or hasattr(m, "_orig_mod") for m in modules)
    parameters = [p for module in modules for p in module.parameters(recurse=False)]
    plain = [p.layout == torch.strided and not p.is_nested for p in parameters]
    return fingerprint([compiled, [[*p.stride()] if ok else None for p, ok in zip(parameters, plain, strict=True)]])


@dataclass(frozen=True)
class _Sample:
    """Some rows as they are in this fit."""

    numbers: Bytes
    now: OutputRows


class _CacheFill:
    """Fills the cache of one teacher for one table of views. Every method is called on all processes."""

    def __init__(self, teacher: Teacher, trainer: Trainer, table: Views, parts: dict[str, str]) -> None:
        self.teacher = teacher
        self.trainer = trainer
        self.table = table
        self.parts = parts | {
            "teacher": teacher.weights(),
            "architecture": teacher.architecture(),
            "compilation": _layout(teacher),
        }
        self.batch_size = int(getattr(trainer.datamodule, "batch_size", 64))  # type: ignore[attr-defined]

    def run(self) -> StoredOutputs:
        """Find the outputs of these views, or compute and store them."""
        numbers = np.random.default_rng().integers(len(self.table), size=self.batch_size)  # other rows in each fit
        computed: list[_Sample] = []
        on_all_ranks(self.trainer, lambda: computed.append(self._compute_twice(numbers)), "cache")
        (sample,) = computed
        for dtype in dict.fromkeys((self.teacher.cache_dtype, "float32")):
            if stored := self._find(self._codec(sample.now.outputs.shape[1:], dtype), sample):
                return stored
            rank_zero_warn(f"cache: a logit is too large for {dtype}, so the outputs are stored in float32")
        raise InputError("cache: a logit of the teacher is too large for float32")

    def _find(self, codec: Codec, sample: _Sample) -> StoredOutputs | None:
        """Find the table of these views, and compute what is missing in it. If there is none, start one.

        Returns:
            The outputs, or None if a logit is too large for the codec.
        """
        why = ""  # a table is of other data
        for version in count():
            stored = self._open(codec, version, sample)
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
        """Compute the logits of some rows. Refuse data and teachers that are random."""
        passes = []
        for seed in (0, 1):
            torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
            (batch,) = self.table.read([numbers], seed)
            if self.teacher.has_preprocess and not seed:
                self._check_preprocess(batch)
            passes.append(self._outputs(batch))
        first, again = passes
        if (first.views != again.views).any() or (first.inputs != again.inputs).any():
            raise InputError(
                "cache: a view differs when it is read again: the dataset itself augments its images, or a transform "
                "has a random generator of its own. Use torch's, numpy's or Python's global generator in "
                "train_transform, or remove cache"
            )
        tolerance = self._noise * _largest(first.outputs)
        if not torch.allclose(first.outputs, again.outputs, rtol=0, atol=tolerance, equal_nan=True):
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
        """Tolerance for rounding, as a share of the largest logit, since kernels differ in the order of sums."""
        return 0.02 if "16" in str(self.trainer.precision) else 1e-4

    def _codec(self, shape: torch.Size, dtype: str) -> Codec:
        if self.teacher.cache_top_k is None:
            return DenseCodec(shape.numel(), dtype)
        if len(shape) != 1:
            raise InputError(f"cache_top_k needs logits (B, C), got {['B', *shape]}")
        classes = self.teacher.classes
        kept = None
        if classes is not None and None in classes:
            kept = [output for output, number in enumerate(classes) if number is not None]
        return TopKCodec(shape.numel(), dtype, self.teacher.cache_top_k, kept)

    def _open(self, codec: Codec, version: int, sample: _Sample) -> StoredOutputs:
        """Open a table, and drop its damaged parts. Tables of other data have other versions."""
        root = self.teacher.cache
        assert root is not None
        chunk = max(1, CHUNK // self.batch_size) * self.batch_size
        kind = type(self.teacher.network).__name__
        parts = self.parts | {"format": codec.name} | ({"version": str(version)} if version else {})
        opened: list[OutputCache] = []

        def prepare() -> None:
            cache = OutputCache(root, kind, parts, len(self.table), codec.row_bytes + HASH_BYTES, chunk=chunk)
            opened.append(cache)
            if damaged := cache.damaged(range(cache.chunks)[self.trainer.local_rank :: self.trainer.num_devices]):
                cache.drop(damaged)
                rank_zero_warn(
                    f"cache: {len(damaged)} of {cache.chunks} parts of {cache.folder} are damaged, and computed again"
                )

        on_all_ranks(self.trainer, prepare, "cache")
        return StoredOutputs(opened[0], codec, sample.now.outputs.shape[1:], sample.now.outputs.dtype)

    def _fill(self, stored: StoredOutputs, why: str) -> int | None:
        """Compute what is missing.

        Returns:
            Number of chunks that were missing; None if a logit is too large for the codec.
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
            parts = [next(outputs) for _ in self._batches(cache, number)]
            views, inputs = (np.concatenate([getattr(p, name) for p in parts]) for name in ("views", "inputs"))
            rows = stored.encode(OutputRows(views, inputs, torch.cat([part.outputs for part in parts])))
            if rows is None:
                cache.mark_too_large()
                return
            cache.write(number, rows[: len(cache.rows_of(number))])

    def _batches(self, cache: OutputCache, number: int) -> Iterator[Bytes]:
        """Yield a chunk's rows in batches of the training's size, since kernels depend on the batch size."""
        rows = cache.rows_of(number)
        for start in range(0, len(rows), self.batch_size):
            yield np.resize(np.array(rows[start : start + self.batch_size]), self.batch_size)

    @torch.no_grad()
    def _outputs(self, batch: Batch) -> OutputRows:
        """Compute the logits (B, ...) of a batch from the data loader, as a training step does."""
        trainer, views = self.trainer, hash_rows(batch.teacher_x)
        batch = move_batch(trainer, self.table.finish(batch))
        with trainer.precision_plugin.forward_context():
            logits = self.teacher.compute(batch).cpu()
        return OutputRows(views, hash_rows(batch.teacher_x), logits)

    def _differs(self, stored: StoredOutputs, sample: _Sample, chunks: Iterable[int]) -> str:
        """Compare the sample's rows in these chunks on all processes. Return what differs; empty if nothing does."""
        found: list[str] = []
        on_all_ranks(self.trainer, lambda: found.append(self._compare(stored, sample, [*chunks])), "cache")
        return next(filter(None, gather(self.trainer, found[0])), "")

    def _compare(self, stored: StoredOutputs, sample: _Sample, chunks: list[int]) -> str:
        rows = np.flatnonzero(np.isin(sample.numbers // stored.cache.chunk, chunks))
        if not len(rows):
            return ""
        then = stored.read(sample.numbers[rows])
        now = OutputRows(sample.now.views[rows], sample.now.inputs[rows], sample.now.outputs[torch.from_numpy(rows)])
        for name, text in ("views", "images"), ("inputs", "inputs of the teacher"):
            changed = int((getattr(then, name) != getattr(now, name)).sum())
            if changed:
                return f"{changed} of {len(rows)} compared {text}"
        return "" if self._near(then.outputs.float(), now.outputs.float(), stored.codec) else "the teacher's outputs"

    def _near(self, then: Tensor, live: Tensor, codec: Codec) -> bool:
        """Whether stored outputs (B, ...) are the teacher's present ones."""
        encoded = codec.encode(live.reshape(len(live), -1))
        if encoded is None:
            return False
        now = codec.decode(encoded).reshape(then.shape)
        halves = "float16" in codec.name
        noise = max(self._noise, 0.02 if halves else 0)
        near = torch.allclose(then, now, rtol=0, atol=noise * _largest(now), equal_nan=True)
        if halves and self._noise < noise and self.parts["device"] == "cpu":
            # rounding changes few float16 values; a small change of network or data changes most of them
            near = near and float(((then != now) & ~then.isnan()).float().mean()) < 0.2
        return near

    def _any_rank(self, condition: bool) -> bool:
        return any(gather(self.trainer, condition))


def _random_states() -> list[Any]:
    """Return the states of the global random generators."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    _, keys, *rest = np.random.get_state()
    states = [state.numpy().tobytes() for state in (torch.get_rng_state(), *devices)]
    return [*states, np.asarray(keys).tobytes(), rest, random.getstate()]


def _largest(logits: Tensor) -> float:
    """Largest absolute value of the finite logits."""
    return float(logits.abs().where(logits.isfinite(), 0).max())


def move_batch(trainer: Trainer, batch: Batch) -> Batch:
    """Do with a batch from a data loader what a training step of Lightning does: cast it, call its hooks, move it."""
    module: Any = trainer.lightning_module
    batch = trainer.precision_plugin.convert_input(batch)
    moved: Batch = trainer.strategy.batch_to_device(module._on_before_batch_transfer(batch))
    return moved
