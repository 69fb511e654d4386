"""What a batch holds of its teachers: their stored outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kd_lightning.inputs import Inputs, named_tensors_of


class TeacherOutputs:
    """Stored outputs of teachers for the rows of a batch: ``batch.teacher["teacher"]``.

    It is neither a mapping nor a dataclass: a precision plugin would cast the tensors in it, and stored outputs must
    stay what they are.

    Args:
        outputs: Outputs (B, M) by the teacher's name, as the network returned them.
        sources: Folder of the outputs by the teacher's name. A teacher uses only outputs from a folder of its own.
            Default: None, which means that none is known.
        inputs: (B,) hashes, as int64, of the inputs that the outputs belong to. Default: None, which means that they
            are not known.
        changed: Number of rows whose images are not those that outputs are stored for. Outputs are left out then.
        of_images: Whether ``inputs`` are the hashes of ``x`` as the loader makes it, which no hook changes afterwards.
    """

    def __init__(
        self,
        outputs: Mapping[str, Tensor],
        sources: Mapping[str, str] | None = None,
        inputs: Tensor | None = None,
        changed: int = 0,
        of_images: bool = False,
    ) -> None:
        self.outputs = {**outputs}
        self.sources = {**(sources or {})}
        self.inputs = inputs
        self.changed = changed
        self.of_images = of_images
        self._x: dict[str, tuple[Tensor, int]] | None = None  # the tensors that ``inputs`` are of, and their versions

    def __getitem__(self, name: str) -> Tensor:
        logits = self.logits(name)
        if logits is None:
            raise KeyError(name)
        return logits

    def __contains__(self, name: str) -> bool:
        return name in self.outputs

    def logits(self, name: str) -> Tensor | None:
        """Return the stored logits of a teacher; None if there are none."""
        return self.outputs.get(name)

    def features(self, name: str, layers: Mapping[str, Any]) -> dict[str, Tensor] | None:
        """Return stored features of a teacher; None unless all of these layers are stored. Here none is.

        Args:
            name: Name of the teacher.
            layers: How each layer is pooled, by its dotted path.
        """

    def is_on(self, device: torch.device) -> bool:
        """Whether all tensors are on a device."""
        parts = self.outputs.values() if self.inputs is None else (*self.outputs.values(), self.inputs)
        return all(part.device == device for part in parts)

    def map(self, change: Callable[[Tensor], Tensor]) -> TeacherOutputs:
        """Return a copy with all tensors changed."""
        outputs = {name: change(tensor) for name, tensor in self.outputs.items()}
        inputs = None if self.inputs is None else change(self.inputs)
        return TeacherOutputs(outputs, self.sources, inputs, self.changed, self.of_images)

    def note_inputs(self, x: Inputs) -> None:
        """Note that ``inputs`` are the hashes of ``x``. As long as it is unchanged, nothing has to be hashed again."""
        tensors = dict(named_tensors_of(x))
        inference = any(tensor.is_inference() for tensor in tensors.values())  # inference tensors have no version
        self._x = None if inference else {name: (tensor, tensor._version) for name, tensor in tensors.items()}

    def are_of(self, x: Inputs) -> bool:
        """Whether ``x`` has the noted tensors, and torch has not changed them in place. False if that is not known."""
        if self._x is None:
            return False
        noted, tensors = self._x, dict(named_tensors_of(x))
        return noted.keys() == tensors.keys() and all(
            tensors[name] is one and version == one._version for name, (one, version) in noted.items()
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_x": None}  # in a copy, the tensor is another one
