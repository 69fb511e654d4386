"""Look up a teacher's stored outputs in a batch, and check that they are of its inputs."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from kd_lightning.batch import Batch
from kd_lightning.cache.tensors import hash_rows
from kd_lightning.teacher_outputs import TeacherOutputs

CHECK_EVERY = 500
"""Number of batches of which one is always compared with the inputs of its stored outputs."""


class StoredLookup:
    """Looks up what batches hold of one teacher."""

    def __init__(self) -> None:
        self._lookups = 0
        self._inputs_changed = False

    def start_fit(self) -> None:
        """Forget what was found in an earlier fit."""
        self._inputs_changed = False

    def find(self, batch: Batch, name: str | None, folders: Iterable[Path]) -> TeacherOutputs | None:
        """Return what a batch holds if a teacher's outputs are among it, and are of the batch's inputs.

        The tensor that the loader has made is the one that the outputs belong to, unless it was changed in place. The
        hashes of any other tensor are compared on a CPU; on other devices, which would have to wait, in one of
        ``CHECK_EVERY`` batches. So are those of the loader's tensor.

        Args:
            batch: The batch.
            name: Name of the teacher's outputs in batches; None if it has none.
            folders: Folders of its outputs.
        """
        held = batch.teacher
        if held is None or name is None or name not in held:
            return None
        source = held.sources.get(name, "")
        if source and all(source != str(folder) for folder in folders):
            return None  # outputs of another teacher of this name
        if held.inputs is not None:
            is_due = self._lookups % CHECK_EVERY == 0 or self._inputs_changed
            is_due = is_due or (not held.are_of(batch.teacher_x) and batch.device.type == "cpu")
            self._lookups += 1
            if is_due and not np.array_equal(hash_rows(batch.teacher_x), held.inputs.cpu().numpy().view(np.uint64)):
                self._warn_of_inputs()
                return None
        return held

    def _warn_of_inputs(self) -> None:
        if not self._inputs_changed:
            warnings.warn(
                "cache: the inputs of a batch are not those that its stored teacher outputs belong to, since something "
                "changes them after the data loader (a hook, a callback, training_step). The teacher computes such "
                "batches; remove cache, or make that change in the transform",
                stacklevel=2,
            )
        self._inputs_changed = True
