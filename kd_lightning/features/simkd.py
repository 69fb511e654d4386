"""A student that ends in its teacher's classifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from kd_lightning.errors import InputError
from kd_lightning.features.capture import evaluating
from kd_lightning.features.channels import ChannelTrace
from kd_lightning.features.cut import cut_above, cut_below
from kd_lightning.inputs import describe

_SIDE = 64  # of the pictures that show the channels of the maps; no values are computed


class SimKDStudent(nn.Module):
    """A student whose classifier is its teacher's (SimKD): a backbone, a projector, and what the teacher has above.

    The backbone is a network up to the last map. The projector, three convolutions 1x1, 3x3 and 1x1 with BatchNorm and
    ReLU, turns its map into the teacher's, and the teacher's pooling and classifier give the logits. All of it is one
    network: weights, costs and exported files hold the teacher's part. This part is a frozen copy, always in eval mode.

    ``SimKDModule`` trains it, on the distance between the projector's map and the teacher's alone.

    Layers are ``backbone.<as in the student>``, ``projector`` and ``head.<as in the teacher>``.

    Source: Chen et al., "Knowledge Distillation with the Reused Teacher Classifier" (CVPR 2022),
    https://arxiv.org/abs/2203.14001. The last ReLU is left out if the teacher's map does not come out of one.

    Args:
        student: Network whose part up to ``student_layer`` is the backbone. The rest of it is dropped.
        teacher: The trained network, not changed. The rebuilt network of a run needs its architecture alone, since the
            deployed weights hold its part.
        student_layer: Dotted path of the layer that gives the student's last map (B, C, H, W).
        teacher_layer: The same of the teacher. All that the teacher computes above it is its part.
        factor: The projector's middle layers have ``1 / factor`` of the channels of the teacher's map, at least 1.
        size: Height and width of the teacher's map, where the student's is larger: it is pooled to this size before the
            projector. Default: None, which means that it is as large or smaller.

    Shapes:
        Input (B, C, H, W). Output: the teacher's logits (B, K).

    Raises:
        InputError: If a network cannot be cut at its layer, see :func:`~kd_lightning.features.cut.cut_below`; if a
            layer gives no map; if the teacher's part is unusual: it needs more than the map, a map of one size, or does
            not return logits (B, K); for a ``factor`` below 1, or above the channels of the teacher's map.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        student_layer: str,
        teacher_layer: str,
        factor: int = 2,
        size: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise InputError(f"size must be a height and a width of at least 1, got {[*size]}")
        self.backbone = _cut("student", cut_below, student, student_layer)
        channels, _ = _map_of("student", self.backbone, student_layer)
        outputs, is_relu = _map_of("teacher", _cut("teacher", cut_below, teacher, teacher_layer), teacher_layer)
        if not 1 <= factor <= outputs:
            raise InputError(f"factor must lie in [1, {outputs}], the channels of the teacher's map, got {factor}")
        self.projector = _projector(channels, outputs // factor, outputs, is_relu)
        self.head = deepcopy(_cut("teacher", cut_above, teacher, teacher_layer)).requires_grad_(False).eval()
        _check_head(self.head, outputs, teacher_layer)
        self.teacher_layer = teacher_layer
        self.size = None if size is None else (size[0], size[1])

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, K)."""
        maps = self.backbone(x)
        if self.size is not None:
            (height, width), (rows, columns) = maps.shape[2:], self.size
            if height % rows or width % columns:
                maps = F.adaptive_avg_pool2d(maps, self.size)
            else:  # it has a deterministic gradient on a GPU
                maps = F.avg_pool2d(maps, (height // rows, width // columns))
        logits: Tensor = self.head(self.projector(maps))
        return logits

    def train(self, mode: bool = True) -> SimKDStudent:
        """Set the mode of the backbone and the projector. The teacher's part stays in eval mode."""
        super().train(mode)
        self.head.eval()
        return self


def _projector(inputs: int, width: int, outputs: int, is_relu: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for kernel, (one, other) in zip((1, 3, 1), ((inputs, width), (width, width), (width, outputs)), strict=True):
        layers += [nn.Conv2d(one, other, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(other), nn.ReLU()]
    return nn.Sequential(*(layers if is_relu else layers[:-1]))


def _cut(who: str, cut: Callable[[nn.Module, str], nn.Module], network: nn.Module, layer: str) -> nn.Module:
    try:
        return cut(network, layer)
    except InputError as error:
        raise InputError(f"{who}_layer: {error}") from error


def _map_of(who: str, part: nn.Module, layer: str) -> tuple[int, bool]:
    """Return the number of channels of a part's output, and whether it comes out of a ReLU."""
    stem = next((layer for layer in part.modules() if isinstance(layer, nn.Conv2d)), None)
    with ChannelTrace() as trace, _ReLUTrace() as last:
        output = _run(f"{who}_layer: the {who} up to {layer}", part, 3 if stem is None else stem.in_channels)
        if not isinstance(output, Tensor) or output.ndim != 4 or trace.layout_of(output) == "last":
            raise InputError(f"{who}_layer: {layer} must give a map (B, C, H, W), got {_describe(output)}")
    return output.shape[1], last.is_relu


def _check_head(head: nn.Module, channels: int, layer: str) -> None:
    what = f"teacher_layer: what the teacher has above {layer}"
    output = _run(what, head, channels)
    if not isinstance(output, Tensor) or output.ndim != 2:
        raise InputError(f"{what} must return logits (B, K), got {_describe(output)}")


def _run(what: str, part: nn.Module, channels: int) -> Any:
    """Run a part in eval mode on maps without values."""
    tensors = {name: tensor.to("meta") for name, tensor in [*part.named_parameters(), *part.named_buffers()]}
    dtype = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), None)
    shape = (2, channels, _SIDE, _SIDE)
    try:
        with evaluating(part), torch.no_grad():
            return functional_call(part, tensors, torch.zeros(shape, dtype=dtype, device="meta"))
    except Exception as error:  # the network's own code runs, and may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{what} must take maps of any size, but fails with {[*shape]}: {reason}") from error


def _describe(output: Any) -> str:
    return describe(output) if isinstance(output, Tensor) else type(output).__name__


class _ReLUTrace(TorchFunctionMode):
    """Whether the last operation inside the ``with`` block is a ReLU, pooling and dropout apart."""

    is_relu = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "").strip("_")
        if isinstance(output, Tensor) and not name.endswith(("dropout", "pool2d")):
            lowest = [*args[1:2], *(kwargs or {}).values()][:1]
            self.is_relu = name in ("relu", "relu6") or (name == "hardtanh" and lowest == [0])
        return output
