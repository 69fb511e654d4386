"""What teachers say of every view, computed once and looked up ever after."""

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
from kd_lightning.cache.codecs import Bytes, DenseCodec, Format, TopKCodec
from kd_lightning.cache.content import fingerprint
from kd_lightning.cache.store import OutputCache, readable
from kd_lightning.errors import InputError
from kd_lightning.teachers.teacher import Teacher

if TYPE_CHECKING:
    from filelock import FileLock

CHUNK = 1024  # rows, about, that are written at a time


def keep_outputs(teachers: Sequence[Teacher], trainer: Trainer, views: str = "train_views") -> None:
    """Fill the caches of those teachers that have one, and have them looked up from now on.

    To be called on every process as a fit begins. All processes fill together; another run that fills the same cache
    is waited for.

    Args:
        teachers: Those with ``cache`` set are looked at.
        trainer: With a datamodule.
        views: The datamodule's method that gives the views, as ``SemiSupervisedDataModule`` has it.

    Raises:
        InputError: On all processes, for data without such views, or endless ones, for a folder that cannot be
            written or a disk without room, and where a teacher does not answer as its cache says.
    """
    teachers = [teacher for teacher in teachers if teacher.cache is not None]
    if not teachers:
        return
    method = getattr(getattr(trainer, "datamodule", None), views, None)
    if not callable(method):
        raise InputError(
            f"cache needs data whose augmentation can be replayed, that is, a datamodule with {views}(), as "
            "SemiSupervisedDataModule has it"
        )
    table: Any = method()
    if table is None:
        raise InputError(
            "cache: the data have a new augmentation of each image in every epoch, so that nothing can be looked up; "
            "set the datamodule's num_views to how many there shall be (1 where nothing is random)"
        )
    with isolate_rng():  # whether a cache is filled or found leaves no trace in a run
        about = table.parts() | _place(trainer)
        for teacher in teachers:
            _Keeping(teacher, trainer, table, about).keep(views)
    table.keep(about["transform"])


def _place(trainer: Trainer) -> dict[str, str]:
    """What decides how a network computes, and what becomes of a batch before it."""
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
    """How its networks are computed: compiled or not, with weights in which order."""
    modules = [*teacher.network.modules()]
    compiled = any(getattr(m, "_compiled_call_impl", None) is not None or hasattr(m, "_orig_mod") for m in modules)
    return fingerprint([compiled, [list(p.stride()) for module in modules for p in module.parameters(recurse=False)]])


class _Keeping:
    """One teacher, one table of views; every method is called on all processes."""

    def __init__(self, teacher: Teacher, trainer: Trainer, table: Any, about: dict[str, str]) -> None:
        self.teacher = teacher
        self.trainer = trainer
        self.table = table
        self.about = about | {
            "teacher": teacher.weights(),
            "architecture": teacher.architecture(),
            "compilation": _layout(teacher),
        }
        self.batch_size = int(getattr(trainer.datamodule, "batch_size", 64))  # type: ignore[attr-defined]

    def keep(self, name: str) -> None:
        """Fill what is absent, compare a few rows with what the teacher says now, and hand it the rest."""
        rows = np.random.default_rng().integers(len(self.table), size=self.batch_size)  # others in each fit
        looked: list[Tensor] = []
        self._together(lambda: looked.append(self._look(rows)))
        (live,) = looked
        shape = live.shape[1:]
        for dtype in dict.fromkeys((self.teacher.cache_dtype, "float32")):
            form = self._format(shape, dtype)
            cache = self._open(form)
            if self._fill(cache, form):
                break
            rank_zero_warn(f"cache: a logit is too large for {dtype}, so the outputs are kept in float32")
        else:
            raise InputError("cache: a logit of the teacher is too large for float32")

        def read(numbers: Bytes) -> Tensor:
            return form.decode(cache.read(numbers)).reshape(len(numbers), *shape)

        self._together(lambda: self._compare(read(rows), live, form, cache))
        self.teacher.keep(name, self.table, read, cache.folder)

    def _look(self, rows: Bytes) -> Tensor:
        """What the teacher says of some rows; asked twice, since what is random cannot be kept."""
        looks = []
        for seed in (0, 1):
            torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
            (batch,) = self._read([rows], seed)
            looks.append((batch.x, self._answer(batch)))
        (x, answer), (x_again, answer_again) = looks
        if not torch.allclose(x, x_again, rtol=0, atol=0, equal_nan=True):
            raise InputError(
                "cache: a view looks otherwise when it is read again: the dataset itself augments its images, or a "
                "transform is random by a generator of its own. Have a train_transform draw from torch's, numpy's or "
                "Python's own generator, or do without a cache"
            )
        if not torch.allclose(answer, answer_again, rtol=0, atol=self._noise * _size(answer), equal_nan=True):
            raise InputError("cache: the teacher answers the same batch otherwise each time; do without a cache")
        return answer

    @property
    def _noise(self) -> float:
        """Of rounding, as a share of the largest logit: kernels and machines sum up in another order."""
        return 0.02 if "16" in str(self.trainer.precision) else 1e-4

    def _read(self, batches: Iterable[Bytes], seed: int = 0) -> Iterator[Batch]:
        """Batches of rows, where the teacher computes."""
        return map(self.trainer.strategy.batch_to_device, self.table.read(batches, seed))

    def _format(self, shape: torch.Size, dtype: str) -> Format:
        if self.teacher.cache_top_k is None:
            return DenseCodec(shape.numel(), dtype)
        if len(shape) != 1:
            raise InputError(f"cache_top_k needs logits (B, C), got {['B', *shape]}")
        return TopKCodec(shape.numel(), dtype, self.teacher.cache_top_k)

    def _open(self, form: Format) -> OutputCache:
        """The cache's folder, without what is damaged in it."""
        root = self.teacher.cache
        assert root is not None
        chunk = max(1, CHUNK // self.batch_size) * self.batch_size
        kind = type(self.teacher.network).__name__
        opened: list[OutputCache] = []

        def prepare() -> None:
            parts = self.about | {"format": form.name}
            opened.append(cache := OutputCache(root, kind, parts, len(self.table), form.row_bytes, chunk=chunk))
            if damaged := cache.damaged(range(cache.chunks)[self.trainer.local_rank :: self.trainer.num_devices]):
                cache.drop(damaged)
                rank_zero_warn(
                    f"cache: {len(damaged)} of {cache.chunks} parts of {cache.folder} are damaged and computed again"
                )

        self._together(prepare)
        return opened[0]

    def _fill(self, cache: OutputCache, form: Format) -> bool:
        """Compute what is absent; False where a logit is too large for the format."""
        trainer, marker, lock = self.trainer, cache.folder / "too_large", cache.lock()
        if trainer.is_global_zero and cache.absent():
            self._wait(lock, cache)
        try:
            trainer.strategy.barrier("cache")
            absent = [] if self._any(marker.is_file()) else cache.absent()
            self._together(lambda: cache.check_room(sum(len(cache.rows_of(n)) for n in absent)))
            if absent:
                self._tell(cache, len(absent))
            # where nodes have no common disk, the second round fills here what the others have filled there
            for rank, ranks in (trainer.global_rank, trainer.world_size), (trainer.local_rank, trainer.num_devices):
                self._together(partial(self._compute, cache, form, absent[rank::ranks], marker))
                absent = [] if self._any(marker.is_file()) else cache.absent()
        finally:
            lock.release()
        return not self._any(marker.is_file())

    def _wait(self, lock: FileLock, cache: OutputCache) -> None:
        try:
            lock.acquire(timeout=0)
        except TimeoutError:
            rank_zero_info(f"cache: another run is filling {cache.folder}; waiting for it")
            lock.acquire()

    def _tell(self, cache: OutputCache, absent: int) -> None:
        changed = cache.difference() if absent == cache.chunks else ""
        part = "all" if absent == cache.chunks else f"{absent} of {cache.chunks} parts"
        why = f" (unlike the nearest one there: {changed})" if changed else ""
        rank_zero_info(
            f"cache: {part} of {readable(cache.size)} of teacher outputs, {cache.rows} rows, are computed now into "
            f"{cache.folder}{why}"
        )

    def _compute(self, cache: OutputCache, form: Format, numbers: Sequence[int], marker: Path) -> None:
        """Compute and write chunks."""
        batches = (rows for number in numbers for rows in self._batches(cache, number))
        answers = map(self._answer, self._read(batches))
        shown = bool(numbers) and self.trainer.is_global_zero and self.trainer.progress_bar_callback is not None
        for number in track(numbers, "teacher outputs", disable=not shown):
            logits = torch.cat([next(answers) for _ in self._batches(cache, number)])
            rows = form.encode(logits.reshape(len(logits), -1))
            if rows is None:
                marker.touch()
                return
            cache.write(number, rows[: len(cache.rows_of(number))])

    def _batches(self, cache: OutputCache, number: int) -> Iterator[Bytes]:
        """A chunk's rows in batches of the training's size, the last one filled up: kernels depend on the size."""
        rows = cache.rows_of(number)
        for start in range(0, len(rows), self.batch_size):
            yield np.resize(np.array(rows[start : start + self.batch_size]), self.batch_size)

    @torch.no_grad()
    def _answer(self, batch: Batch) -> Tensor:
        """Logits (B, ...) on the CPU, as the training would have them computed."""
        plugin = self.trainer.precision_plugin
        with plugin.forward_context():
            return self.teacher.compute(replace(batch, x=plugin.convert_input(batch.x))).cpu()

    def _compare(self, kept: Tensor, live: Tensor, form: Format, cache: OutputCache) -> None:
        """Refuse a cache that the teacher does not bear out: something changes that no key can see."""
        encoded = form.encode(live.reshape(len(live), -1))
        near = encoded is not None
        if encoded is not None:
            now = form.decode(encoded).reshape(kept.shape)
            halves = "float16" in form.name
            noise = max(self._noise, 0.02 if halves else 0)
            near = torch.allclose(kept, now, rtol=0, atol=noise * _size(now), equal_nan=True)
            if halves and self._noise < noise and self.about["device"] == "cpu":
                # rounding makes few halves their neighbours; a small change of what is computed, most
                near = near and float(((kept != now) & ~kept.isnan()).float().mean()) < 0.2
        if not near:
            raise InputError(
                f"cache: the teacher's answers are not those in {cache.folder}, though nothing that these are known to "
                "depend on has changed: does the network, the dataset or a transform read what is stored elsewhere? "
                "Delete the folder, or do without a cache"
            )

    # All processes.

    def _together(self, action: Callable[[], None]) -> None:
        """Do something on every process; what one cannot do ends all of them."""
        complaint = ""
        try:
            action()
        except InputError as error:
            complaint = str(error)
        except OSError as error:
            complaint = f"cache: {error}"
        if first := next(filter(None, self._gather(complaint)), None):
            raise InputError(first)

    def _any(self, here: bool) -> bool:
        return any(self._gather(here))

    def _gather(self, thing: Any) -> list[Any]:
        if self.trainer.world_size == 1:
            return [thing]
        gathered: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(gathered, thing)
        return gathered


def _size(logits: Tensor) -> float:
    """The largest finite one's size."""
    return float(logits.abs().where(logits.isfinite(), 0).max())
