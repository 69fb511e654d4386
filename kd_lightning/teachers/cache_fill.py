"""Fill the caches of teachers: compute their outputs for every view once, and read them from then on."""

from __future__ import annotations

import platform
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torchvision
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from rich.progress import track
from torch import Tensor

from kd_lightning.batch import Batch
from kd_lightning.cache.codecs import Bytes, Codec, DenseCodec, TopKCodec
from kd_lightning.cache.content import fingerprint
from kd_lightning.cache.store import OutputCache, format_size
from kd_lightning.errors import InputError
from kd_lightning.teachers.teacher import Teacher

if TYPE_CHECKING:
    from filelock import FileLock

CHUNK = 1024  # rows that are written at a time, rounded to whole batches


def fill_caches(teachers: Sequence[Teacher], trainer: Trainer, views: str = "train_views") -> None:
    """Fill the caches of teachers, and attach them, so that the teachers read their outputs from now on.

    Call it on every process at the start of a fit. All processes fill together. If another run fills the same cache,
    they wait for it.

    Args:
        teachers: Those without ``cache`` are skipped.
        trainer: Trainer with a datamodule.
        views: Name of the datamodule's method that returns the table of views, as in ``SemiSupervisedDataModule``.

    Raises:
        InputError: On all processes: if the data have no such views or an unlimited number of them, if the folder
            cannot be written or has no room, or if a teacher's outputs are not those in its cache.
    """
    teachers = [teacher for teacher in teachers if teacher.cache is not None]
    if not teachers:
        return
    method = getattr(getattr(trainer, "datamodule", None), views, None)
    if not callable(method):
        raise InputError(
            f"cache needs data whose augmentation can be replayed: a datamodule with {views}(), such as "
            "SemiSupervisedDataModule"
        )
    table: Any = method()
    if table is None:
        raise InputError(
            "cache needs a fixed number of views of each sample, but every epoch has new ones; set the datamodule's "
            "num_views (1 where nothing is random)"
        )
    with isolate_rng():  # so that a run is the same whether a cache is filled or found
        parts = table.parts() | _environment(trainer)
        for teacher in teachers:
            _CacheFill(teacher, trainer, table, parts).run(views)
    table.enable_rows(parts["transform"])


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
    return fingerprint([compiled, [list(p.stride()) for module in modules for p in module.parameters(recurse=False)]])


class _CacheFill:
    """Fills the cache of one teacher for one table of views. Every method is called on all processes."""

    def __init__(self, teacher: Teacher, trainer: Trainer, table: Any, parts: dict[str, str]) -> None:
        self.teacher = teacher
        self.trainer = trainer
        self.table = table
        self.parts = parts | {
            "teacher": teacher.weights(),
            "architecture": teacher.architecture(),
            "compilation": _layout(teacher),
        }
        self.batch_size = int(getattr(trainer.datamodule, "batch_size", 64))  # type: ignore[attr-defined]

    def run(self, name: str) -> None:
        """Compute the rows that are missing, compare some rows with the teacher's present outputs, attach the cache."""
        rows = np.random.default_rng().integers(len(self.table), size=self.batch_size)  # other rows in each fit
        computed: list[Tensor] = []
        self._on_all_ranks(lambda: computed.append(self._compute_twice(rows)))
        (live,) = computed
        shape = live.shape[1:]
        for dtype in dict.fromkeys((self.teacher.cache_dtype, "float32")):
            codec = self._codec(shape, dtype)
            cache = self._open(codec)
            if self._fill(cache, codec):
                break
            rank_zero_warn(f"cache: a logit is too large for {dtype}, so the outputs are stored in float32")
        else:
            raise InputError("cache: a logit of the teacher is too large for float32")

        def read(numbers: Bytes) -> Tensor:
            return codec.decode(cache.read(numbers)).reshape(len(numbers), *shape)

        self._on_all_ranks(lambda: self._compare(read(rows), live, codec, cache))
        self.teacher.attach_cache(name, self.table, read, cache.folder)

    def _compute_twice(self, rows: Bytes) -> Tensor:
        """Compute the logits of some rows. Refuse data and teachers that are random."""
        passes = []
        for seed in (0, 1):
            torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
            (batch,) = self._read_batches([rows], seed)
            passes.append((batch.x, self._logits(batch)))
        (x, logits), (x_again, logits_again) = passes
        if not torch.allclose(x, x_again, rtol=0, atol=0, equal_nan=True):
            raise InputError(
                "cache: a view differs when it is read again: the dataset itself augments its images, or a transform "
                "has a random generator of its own. Use torch's, numpy's or Python's global generator in "
                "train_transform, or remove cache"
            )
        if not torch.allclose(logits, logits_again, rtol=0, atol=self._noise * _largest(logits), equal_nan=True):
            raise InputError("cache: the teacher's outputs for the same batch differ in each pass; remove cache")
        return logits

    @property
    def _noise(self) -> float:
        """Tolerance for rounding, as a share of the largest logit, since kernels differ in the order of sums."""
        return 0.02 if "16" in str(self.trainer.precision) else 1e-4

    def _read_batches(self, batches: Iterable[Bytes], seed: int = 0) -> Iterator[Batch]:
        """Load batches of rows, on the device."""
        return map(self.trainer.strategy.batch_to_device, self.table.read(batches, seed))

    def _codec(self, shape: torch.Size, dtype: str) -> Codec:
        if self.teacher.cache_top_k is None:
            return DenseCodec(shape.numel(), dtype)
        if len(shape) != 1:
            raise InputError(f"cache_top_k needs logits (B, C), got {['B', *shape]}")
        return TopKCodec(shape.numel(), dtype, self.teacher.cache_top_k)

    def _open(self, codec: Codec) -> OutputCache:
        """Open the cache's folder, and drop its damaged parts."""
        root = self.teacher.cache
        assert root is not None
        chunk = max(1, CHUNK // self.batch_size) * self.batch_size
        kind = type(self.teacher.network).__name__
        opened: list[OutputCache] = []

        def prepare() -> None:
            parts = self.parts | {"format": codec.name}
            opened.append(cache := OutputCache(root, kind, parts, len(self.table), codec.row_bytes, chunk=chunk))
            if damaged := cache.damaged(range(cache.chunks)[self.trainer.local_rank :: self.trainer.num_devices]):
                cache.drop(damaged)
                rank_zero_warn(
                    f"cache: {len(damaged)} of {cache.chunks} parts of {cache.folder} are damaged, and computed again"
                )

        self._on_all_ranks(prepare)
        return opened[0]

    def _fill(self, cache: OutputCache, codec: Codec) -> bool:
        """Compute what is missing. Return False if a logit is too large for the codec."""
        trainer, marker, lock = self.trainer, cache.folder / "too_large", cache.lock()
        if trainer.is_global_zero and cache.absent():
            self._acquire(lock, cache)
        try:
            trainer.strategy.barrier("cache")
            absent = [] if self._any_rank(marker.is_file()) else cache.absent()
            self._on_all_ranks(lambda: cache.check_room(sum(len(cache.rows_of(n)) for n in absent)))
            if absent:
                self._announce(cache, len(absent))
            # without a common disk, the second round computes on each node what the first computed on the others
            for rank, ranks in (trainer.global_rank, trainer.world_size), (trainer.local_rank, trainer.num_devices):
                self._on_all_ranks(partial(self._compute, cache, codec, absent[rank::ranks], marker))
                absent = [] if self._any_rank(marker.is_file()) else cache.absent()
        finally:
            lock.release()
        return not self._any_rank(marker.is_file())

    def _acquire(self, lock: FileLock, cache: OutputCache) -> None:
        try:
            lock.acquire(timeout=0)
        except TimeoutError:
            rank_zero_info(f"cache: another run is filling {cache.folder}; waiting for it")
            lock.acquire()

    def _announce(self, cache: OutputCache, absent: int) -> None:
        changed = cache.difference() if absent == cache.chunks else ""
        part = "all" if absent == cache.chunks else f"{absent} of {cache.chunks} parts"
        why = f" (the most similar cache differs in: {changed})" if changed else ""
        rank_zero_info(
            f"cache: computing {part} of {format_size(cache.size)} of teacher outputs, {cache.rows} rows, into "
            f"{cache.folder}{why}"
        )

    def _compute(self, cache: OutputCache, codec: Codec, numbers: Sequence[int], marker: Path) -> None:
        """Compute and write chunks."""
        batches = (rows for number in numbers for rows in self._batches(cache, number))
        outputs = map(self._logits, self._read_batches(batches))
        shown = bool(numbers) and self.trainer.is_global_zero and self.trainer.progress_bar_callback is not None
        for number in track(numbers, "teacher outputs", disable=not shown):
            logits = torch.cat([next(outputs) for _ in self._batches(cache, number)])
            rows = codec.encode(logits.reshape(len(logits), -1))
            if rows is None:
                marker.touch()
                return
            cache.write(number, rows[: len(cache.rows_of(number))])

    def _batches(self, cache: OutputCache, number: int) -> Iterator[Bytes]:
        """Yield a chunk's rows in batches of the training's size, since kernels depend on the batch size."""
        rows = cache.rows_of(number)
        for start in range(0, len(rows), self.batch_size):
            yield np.resize(np.array(rows[start : start + self.batch_size]), self.batch_size)

    @torch.no_grad()
    def _logits(self, batch: Batch) -> Tensor:
        """Compute logits (B, ...) in the training's precision, and move them to the CPU."""
        plugin = self.trainer.precision_plugin
        with plugin.forward_context():
            return self.teacher.compute(replace(batch, x=plugin.convert_input(batch.x))).cpu()

    def _compare(self, stored: Tensor, live: Tensor, codec: Codec, cache: OutputCache) -> None:
        """Refuse a cache whose rows are not the teacher's present outputs: then some dependency is unknown."""
        encoded = codec.encode(live.reshape(len(live), -1))
        near = encoded is not None
        if encoded is not None:
            now = codec.decode(encoded).reshape(stored.shape)
            halves = "float16" in codec.name
            noise = max(self._noise, 0.02 if halves else 0)
            near = torch.allclose(stored, now, rtol=0, atol=noise * _largest(now), equal_nan=True)
            if halves and self._noise < noise and self.parts["device"] == "cpu":
                # rounding changes few float16 values; a small change of network or data changes most of them
                near = near and float(((stored != now) & ~stored.isnan()).float().mean()) < 0.2
        if not near:
            raise InputError(
                f"cache: the teacher's outputs are not those in {cache.folder}, though nothing that they are known to "
                "depend on has changed. Does the network, the dataset or a transform read other files? Delete the "
                "folder, or remove cache"
            )

    def _on_all_ranks(self, action: Callable[[], None]) -> None:
        """Run an action on every process. An error on one of them is raised on all."""
        message = ""
        try:
            action()
        except InputError as error:
            message = str(error)
        except OSError as error:
            message = f"cache: {error}"
        if first := next(filter(None, self._gather(message)), None):
            raise InputError(first)

    def _any_rank(self, condition: bool) -> bool:
        return any(self._gather(condition))

    def _gather(self, value: Any) -> list[Any]:
        """Return the value of every process."""
        if self.trainer.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(gathered, value)
        return gathered


def _largest(logits: Tensor) -> float:
    """Largest absolute value of the finite logits."""
    return float(logits.abs().where(logits.isfinite(), 0).max())
