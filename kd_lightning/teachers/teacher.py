"""Frozen teachers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from copy import copy
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from kd_lightning.batch import Batch
from kd_lightning.cache.content import fingerprint
from kd_lightning.errors import InputError
from kd_lightning.features.outputs import logits_of
from kd_lightning.runs.weights import plain_key

ReadRows = Callable[[np.ndarray[Any, Any]], Tensor]  # from numbers of rows to logits


class Teacher(nn.Module):
    """A frozen network that teaches.

    The network is always in eval mode and under ``no_grad``. It is hidden from the module tree: no optimiser, no
    checkpoint and no DDP reducer contains it, and ``.train()`` of another module does not reach it. It moves with
    ``.to(...)``.

    Args:
        network: Network that returns logits (B, C), or (B,) for the binary task. Its parameters are frozen in place.
        preprocess: Applied to the student's inputs before the network, if the teacher was trained on inputs of another
            normalisation or size.
        classes: For each output of the network, the student's class, each class at most once. A teacher may know only
            some of the classes; ``EnsembleDistillModule`` combines such teachers. Default: None, which means the
            student's class order.
        device: Device that the teacher computes on, such as ``"cpu"`` or ``"cuda:1"``. Its logits are moved to the
            device of the inputs. Default: None, which means the student's device.
        cache: Folder that stores the teacher's outputs for every training view. They are computed once, at the start of
            a fit; later fits read them. Needs a datamodule with ``num_views``. Teachers and runs may share the folder.
            Default: None, which means that the outputs are computed in each step.
        cache_dtype: Type of the stored logits, ``"float16"`` (default) or ``"float32"``. Logits too large for float16
            are stored as float32. With float32, a run with a cache equals a run without it to the bit, provided that
            the network computes in at most 32 bits and its logits of a sample do not depend on the batch.
        cache_top_k: Number of largest logits to store, at least 1. The other classes share the rest of the probability
            evenly. For losses that compare only probabilities: ``KDLoss`` and ``DKDLoss``. Default: None, which means
            all logits.

    Shapes:
        Input: a ``Batch`` with x (B, ...). Output: logits (B, C) in the student's class order. With ``classes``, C is
        the largest of them plus 1, and logits of classes that the teacher does not know are minus infinity.

    Raises:
        InputError: If ``classes`` repeats a class, has a negative one, or does not fit the network's outputs, and for
            values of ``cache``, ``cache_dtype`` and ``cache_top_k`` that are not allowed.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        preprocess: nn.Module | None = None,
        classes: list[int] | None = None,
        device: str | None = None,
        cache: str | Path | None = None,
        cache_dtype: Literal["float16", "float32"] = "float16",
        cache_top_k: int | None = None,
    ) -> None:
        super().__init__()
        if cache_dtype not in ("float16", "float32"):
            raise InputError(f"cache_dtype must be float16 or float32, got {cache_dtype!r}")
        if cache_top_k is not None and cache_top_k < 1:
            raise InputError(f"cache_top_k must be at least 1, got {cache_top_k}")
        if cache is not None and not str(cache).strip():
            raise InputError("cache must name a folder, got an empty name")
        if classes is not None and (len(set(classes)) < len(classes) or min(classes, default=-1) < 0):
            raise InputError(f"classes must name at least one class, from 0 on, and none twice, got {classes}")
        # in a tuple, so that nn.Module does not register them
        self._hidden = tuple(module for module in (preprocess, network) if module is not None)
        self.classes = classes
        self.device = device
        self.cache = None if cache is None else Path(cache)
        self.cache_dtype = cache_dtype
        self.cache_top_k = cache_top_k
        self._caches: dict[str, tuple[Hashable, ReadRows, Path]] = {}  # by name of the table of views
        self._fingerprint: str | None = None
        self._architecture: str | None = None
        self._weights = ""  # hash of the weights that the fingerprint is of
        for module in self._hidden:
            module.eval()
            for parameter in module.parameters():  # nn.Module.requires_grad_ does not work for TorchScript
                parameter.requires_grad_(False)
            if device is not None:
                module.to(device)

    @property
    def network(self) -> nn.Module:
        """The frozen network."""
        return self._hidden[-1]

    def prepare(self, x: Tensor) -> Tensor:
        """Preprocess the student's inputs (B, ...) for the network, on the teacher's device."""
        for module in self._hidden:
            if any(part.training for part in module.modules()):  # another module may hold it and call .train()
                module.eval()  # slower than the check above
        x = x if self.device is None else x.to(self.device)
        for preprocess in self._hidden[:-1]:
            x = preprocess(x)
        return x

    @torch.no_grad()
    def forward(self, batch: Batch) -> Tensor:
        """Return logits (B, C) in the student's class order, from the cache if it has them, else computed."""
        read = self._reader(batch)
        if read is not None and batch.rows is not None:
            return self.arrange(read(batch.rows.numbers).to(batch.x.device, non_blocking=True))
        return self.arrange(self.compute(batch))

    @torch.no_grad()
    def compute(self, batch: Batch) -> Tensor:
        """Compute the network's logits (B, M), without the cache."""
        return logits_of(self.network(self.prepare(batch.x)), "the teacher").to(batch.x.device)

    def attach_cache(self, name: str, table: Hashable, read: ReadRows, folder: Path) -> None:
        """Read the logits of a table's rows from a cache. Replaces an earlier table of that name.

        Args:
            name: Name of the table of views.
            table: The table, to which ``batch.rows`` refers.
            read: Returns the logits (B, M) of rows, by their numbers.
            folder: The cache's folder.
        """
        self._caches[name] = table, read, folder

    @property
    def cache_folders(self) -> list[Path]:
        """Folders of the attached caches."""
        return [folder for _, _, folder in self._caches.values()]

    def has_cached(self, batch: Batch) -> bool:
        """Whether an attached cache has the outputs for a batch."""
        return self._reader(batch) is not None

    def _reader(self, batch: Batch) -> ReadRows | None:
        if batch.rows is None:
            return None
        return next((read for table, read, _ in self._caches.values() if table is batch.rows.table), None)

    def arrange(self, logits: Tensor) -> Tensor:
        """Bring the network's logits (B, M) into the student's class order (B, C)."""
        if self.classes is None:
            return logits
        if logits.ndim != 2 or logits.shape[1] != len(self.classes):
            raise InputError(f"classes has {len(self.classes)} entries, but the teacher's output is {[*logits.shape]}")
        ordered = logits.new_full((len(logits), max(self.classes) + 1), -torch.inf)
        ordered[:, self.classes] = logits
        return ordered

    @property
    def missing_classes(self) -> list[int]:
        """Classes below the largest of ``classes`` that the teacher does not know."""
        classes = self.classes or []
        return sorted(set(range(max(classes, default=0))) - set(classes))

    def fingerprint(self, *, anew: bool = False) -> str:
        """Return the SHA-256 of weights, buffers, preprocessing and class map, which identifies the teacher.

        The result is stored. A cast or move of the teacher, as by a precision plugin, does not change it.

        Args:
            anew: Compute it again if the weights have changed since. With a cache, also hash the architecture again.
        """
        if anew and self.cache is not None:  # now, since a forward pass may change the network's attributes
            self._architecture = None
            self.architecture()
        if self._fingerprint is None or (anew and self._weights != self.weights()):
            self._weights = self.weights()
            about = (self.classes, *map(repr, self._hidden[:-1]), self._weights)
            self._fingerprint = hashlib.sha256(repr(about).encode()).hexdigest()
        return self._fingerprint

    def weights(self) -> str:
        """Return the SHA-256 of the present weights and buffers."""
        digest = hashlib.sha256()
        for module in self._hidden:
            for name, tensor in module.state_dict().items():
                if not isinstance(tensor, Tensor):  # extra state of a module
                    continue
                digest.update(f"{plain_key(name)} {tensor.dtype} {[*tensor.shape]}".encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def architecture(self) -> str:
        """Return the SHA-256 of the networks' classes, their source code, and all attributes except ``weights``."""
        if self._architecture is None:
            weights = [w for module in self._hidden for w in module.state_dict(keep_vars=True).values()]
            self._architecture = fingerprint([*self._hidden], weights)
        return self._architecture

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Teacher:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

        def dtype_alone(tensor: Tensor) -> Tensor:
            return tensor.to(fn(tensor.new_empty(0)).dtype)

        casts = any(fn(tensor.new_empty(0)).dtype != tensor.dtype for tensor in self.network.parameters())
        renew = casts and self._fingerprint is not None and self._weights == self.weights()
        for module in self._hidden:  # with a device of its own it does not move
            module._apply(fn if self.device is None else dtype_alone, recurse)  # type: ignore[no-untyped-call]
        if renew:
            self._weights = self.weights()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the attached caches, which belong to a fit."""
        return self.__dict__ | {"_caches": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        copied = copy(self)  # copies of a module, as of weight averaging, share the frozen network
        copied._caches = self._caches
        memo[id(self)] = copied
        return copied


def check_outputs(student: Tensor, teacher: Tensor | None) -> None:
    """Raise InputError unless the teacher's logits have as many rows and outputs as the student's."""
    if teacher is not None and (len(teacher), teacher.numel()) != (len(student), student.numel()):
        raise InputError(
            f"teacher and student must have the same number of outputs, got {[*teacher.shape][1:]} from the teacher "
            f"and {[*student.shape][1:]} from the student; Teacher(classes=...) maps another class order"
        )
