"""Frozen teachers, and loading weights from files."""

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

Read = Callable[[np.ndarray[Any, Any]], Tensor]


class Teacher(nn.Module):
    """A frozen network that teaches.

    Always in eval mode and under ``no_grad``. Its network is hidden from the module tree: it is in no optimiser, no
    checkpoint and no DDP reducer, and nobody's ``.train()`` reaches it, but it moves with ``.to(...)``.

    Args:
        network: Gives logits (B, C), or (B,) for the binary task. Its parameters are frozen in place.
        preprocess: Applied to the student's inputs first, where the teacher was trained on other ones
            (normalisation, size).
        classes: For each output of the network, the student's class that it stands for, no class twice. None: the
            same order. Of a teacher that does not know all classes they name those that it knows; several such
            teachers, which know all together, serve ``EnsembleDistillModule``.
        device: Where the teacher computes, if not beside the student: ``"cpu"``, ``"cuda:1"``. Its logits come back
            to the inputs' device.
        cache: A folder in which its outputs for every training view are kept: computed once, as a fit begins, and
            looked up ever after, by later fits, too. Needs a datamodule with a number of views, ``num_views``. Any number of
            teachers and runs may share it.
        cache_dtype: Of what is kept, ``"float16"`` or ``"float32"``. Logits too large for the one take the other. With
            float32 a run is the same, bit for bit, as without a cache, where the network answers for a sample the
            same in any batch, in 32 bits or fewer.
        cache_top_k: Keep only so many of the largest logits; the rest share what probability they have together.
            For losses that compare probabilities alone, ``KDLoss`` and ``DKDLoss``.

    Shapes:
        Input: a ``Batch`` with x (B, ...). Output: logits (B, C) in the student's class order; with ``classes`` C is
        the last of these plus 1, and the logits of those left out are minus infinity.

    Raises:
        InputError: If ``classes`` repeats one, has a negative one, or does not fit the network's outputs.
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
        # A tuple, since nn.Module registers modules and nothing must walk into these.
        self._hidden = tuple(module for module in (preprocess, network) if module is not None)
        self.classes = classes
        self.device = device
        self.cache = None if cache is None else Path(cache)
        self.cache_dtype = cache_dtype
        self.cache_top_k = cache_top_k
        self._kept: dict[str, tuple[Hashable, Read, Path]] = {}  # by what the views are called
        self._fingerprint: str | None = None
        self._architecture: str | None = None
        self._weights = ""  # what the weights' hash was when the fingerprint was taken
        for module in self._hidden:
            module.eval()
            for parameter in module.parameters():  # requires_grad_ is not for TorchScript
                parameter.requires_grad_(False)
            if device is not None:
                module.to(device)

    @property
    def network(self) -> nn.Module:
        """The frozen network."""
        return self._hidden[-1]

    def prepare(self, x: Tensor) -> Tensor:
        """The student's inputs (B, ...) as the network takes them: preprocessed, where it computes."""
        for module in self._hidden:
            if any(part.training for part in module.modules()):  # somebody else may hold it, and call .train() on it
                module.eval()  # takes longer than to look
        x = x if self.device is None else x.to(self.device)
        for preprocess in self._hidden[:-1]:
            x = preprocess(x)
        return x

    @torch.no_grad()
    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, C) of the batch's views, in the student's class order: looked up where they are kept."""
        read = self._reader(batch)
        if read is not None and batch.rows is not None:
            return self.arrange(read(batch.rows.numbers).to(batch.x.device, non_blocking=True))
        return self.arrange(self.compute(batch))

    @torch.no_grad()
    def compute(self, batch: Batch) -> Tensor:
        """The network's own logits (B, M), never looked up."""
        return logits_of(self.network(self.prepare(batch.x)), "the teacher").to(batch.x.device)

    def keep(self, name: str, table: Hashable, read: Read, folder: Path) -> None:
        """Look up what the network says of the rows of a table, in place of an earlier table of that name."""
        self._kept[name] = table, read, folder

    @property
    def kept_in(self) -> list[Path]:
        """The folders of what is looked up."""
        return [folder for _, _, folder in self._kept.values()]

    def keeps(self, batch: Batch) -> bool:
        """Whether the outputs for a batch are looked up."""
        return self._reader(batch) is not None

    def _reader(self, batch: Batch) -> Read | None:
        if batch.rows is None:
            return None
        return next((read for table, read, _ in self._kept.values() if table is batch.rows.table), None)

    def arrange(self, logits: Tensor) -> Tensor:
        """The network's logits (B, M) in the student's class order (B, C)."""
        if self.classes is None:
            return logits
        if logits.ndim != 2 or logits.shape[1] != len(self.classes):
            raise InputError(f"classes has {len(self.classes)} entries, but the teacher's output is {[*logits.shape]}")
        ordered = logits.new_full((len(logits), max(self.classes) + 1), -torch.inf)
        ordered[:, self.classes] = logits
        return ordered

    @property
    def missing_classes(self) -> list[int]:
        """Those below the last of ``classes`` that the teacher does not know."""
        classes = self.classes or []
        return sorted(set(range(max(classes, default=0))) - set(classes))

    def fingerprint(self, *, anew: bool = False) -> str:
        """SHA-256 of weights, buffers, preprocessing and class map: what makes this teacher this teacher.

        Args:
            anew: Look whether somebody changed the weights since it was first asked for (and the architecture, where
                there is a cache). That the teacher itself was moved or cast does not count: a precision plugin does
                that.
        """
        if anew and self.cache is not None:  # before anybody uses the network, which may change what it holds
            self._architecture = None
            self.architecture()
        if self._fingerprint is None or (anew and self._weights != self.weights()):
            self._weights = self.weights()
            about = (self.classes, *map(repr, self._hidden[:-1]), self._weights)
            self._fingerprint = hashlib.sha256(repr(about).encode()).hexdigest()
        return self._fingerprint

    def weights(self) -> str:
        """SHA-256 of weights and buffers as they are now."""
        digest = hashlib.sha256()
        for module in self._hidden:
            for name, tensor in module.state_dict().items():
                if not isinstance(tensor, Tensor):  # a module's extra state
                    continue
                digest.update(f"{name} {tensor.dtype} {[*tensor.shape]}".encode())
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def architecture(self) -> str:
        """SHA-256 of the networks' classes, their source, and all that they hold beside ``weights``."""
        if self._architecture is None:
            weights = [w for module in self._hidden for w in module.state_dict(keep_vars=True).values()]
            # as they are without torch.compile
            bare = [getattr(module, "_orig_mod", module) for module in self._hidden]
            self._architecture = fingerprint(bare, weights)
        return self._architecture

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Teacher:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

        def dtype_alone(tensor: Tensor) -> Tensor:
            return tensor.to(fn(tensor.new_empty(0)).dtype)

        casts = any(fn(tensor.new_empty(0)).dtype != tensor.dtype for tensor in self.network.parameters())
        known = casts and self._fingerprint is not None and self._weights == self.weights()
        for module in self._hidden:  # with a device of its own it stays there
            module._apply(fn if self.device is None else dtype_alone, recurse)  # type: ignore[no-untyped-call]
        if known:
            self._weights = self.weights()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without what is looked up, which belongs to a fit."""
        return self.__dict__ | {"_kept": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        twin = copy(self)  # frozen, so copies of a module (weight averaging) share it
        twin._kept = self._kept
        memo[id(self)] = twin
        return twin


def check_outputs(student: Tensor, teacher: Tensor | None) -> None:
    """Refuse a teacher whose logits cannot be set beside the student's."""
    if teacher is not None and (len(teacher), teacher.numel()) != (len(student), student.numel()):
        raise InputError(
            f"teacher and student must have the same number of outputs, got {[*teacher.shape][1:]} from the teacher "
            f"and {[*student.shape][1:]} from the student; Teacher(classes=...) maps another class order"
        )
