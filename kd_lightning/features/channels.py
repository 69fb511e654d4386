"""Find which dimension of a layer's output holds the channels: by the operations that give and use it, not by shape."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kd_lightning.features.capture import capture, evaluating
from kd_lightning.inputs import Inputs, call, rows_of, take_rows, tensors_of

Layout = Literal["first", "last"]
"""Where the channels of an output are: "first" for maps (B, C, ...), "last" for tokens (B, N, C) and (B, ..., C)."""

_LOCAL = re.compile(r"(?:conv(?:_transpose)?|\w*pool)([123])d(?:_with_indices)?")  # (B, C) and that many sides
_FIRST = {"batch_norm", "channel_shuffle", "grid_sample", "group_norm", "instance_norm", "interpolate"}
_FIRST |= {"local_response_norm"}
_SHUFFLES = {"pixel_shuffle", "pixel_unshuffle"}  # (..., C, H, W)
_LAST = {"embedding", "multi_head_attention_forward", "lstm", "gru", "rnn_tanh", "rnn_relu"}
_NORMS = {"layer_norm", "rms_norm"}
_SAME = re.compile(
    r"abs|add|addcdiv|addcmul|alpha_dropout|bfloat16|cat|celu|chunk|clamp|clamp_max|clamp_min|clip|clone|concat|"
    r"concatenate|contiguous|copy|cpu|cuda|data|detach|div|double|dropout|dropout1d|dropout2d|dropout3d|elu|exp|"
    r"feature_alpha_dropout|feature_dropout|flip|float|gelu|glu|half|hardshrink|hardsigmoid|hardswish|hardtanh|"
    r"iadd|idiv|imul|isub|itruediv|leaky_relu|lerp|log|log_softmax|logsigmoid|masked_fill|maximum|minimum|mish|"
    r"mul|nan_to_num|narrow|neg|normalize|pad|pow|prelu|radd|relu|relu6|rmul|roll|rrelu|rsqrt|rsub|rtruediv|selu|"
    r"sigmoid|silu|softmax|softplus|softshrink|softsign|split|split_with_sizes|sqrt|square|sub|tanh|tanhshrink|"
    r"tensor_split|threshold|to|true_divide|truediv|type|type_as|where"
)
_ONE_INPUT = {"to", "type_as"} | _FIRST | _SHUFFLES | _NORMS  # the others are no features
_JOINED = {"cat", "concat", "concatenate", "pad"}
_PERMUTED = {"permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "adjoint", "T", "mT", "H", "mH"}
_RESHAPED = {"reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze", "reshape_as", "view_as"}
_PROBE = (2, 3, 5, 7, 11, 13)  # sizes that tell dimensions apart
_Dimension = tuple[int, int, int]  # id of a tensor; how often its shape has changed in place; number of the dimension


class ChannelTrace(TorchFunctionMode):
    """Traces the dimension of channels through all operations that run inside the ``with`` block.

    Convolutions, pooling and BatchNorm have their channels in dimension 1; linear layers, LayerNorm over one dimension,
    attention, embeddings and recurrent layers in the last one. Activations, dropout, sums, concatenations and slices
    leave dimensions in their places; linear layers do so for all but the last. Transposing and reshaping move them.
    Other operations end the trace, and so do those that change a tensor's shape in place. The block holds all tensors.

    >>> with ChannelTrace() as trace:
    ...     tokens = torch.nn.Conv1d(3, 4, 1)(torch.zeros(2, 3, 9)).relu().transpose(1, 2)
    >>> trace.layout_of(tokens)
    'last'
    """

    def __init__(self) -> None:
        super().__init__()
        self._tensors: list[Any] = []  # so that an id stays that of one tensor
        self._changes: Counter[int] = Counter()  # how often a tensor's shape has changed in place, by its id
        self._known: set[_Dimension] = set()  # dimensions of channels
        # A dimension to the same one of other tensors, and whether an operation that moves dimensions lies between.
        self._links: dict[_Dimension, list[tuple[_Dimension, bool]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs in place of each operation. Notes what the operation does to dimensions."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        first = output[0] if isinstance(output, tuple | list) and output else output
        if isinstance(first, Tensor) and first.ndim > 1:
            self._note(func, args, kwargs, output)
        return output

    def _note(self, func: Callable[..., Any], args: Any, kwargs: Any, output: Any) -> None:
        full_name = getattr(func, "__name__", "")
        if full_name == "__get__":  # of a property
            full_name = func.__self__.__name__  # type: ignore[attr-defined]
        name = full_name.strip("_")
        inputs = [tensor for tensor in tensors_of((args, kwargs)) if tensor.ndim > 1]
        outputs = [output] if isinstance(output, Tensor) else [part for part in output if isinstance(part, Tensor)]
        self._tensors += [inputs, outputs]
        result = outputs[0]
        is_first = inputs and args and inputs[0] is args[0]  # else the operation is called in an unusual way
        is_linear = name in ("linear", "addmm") or _is_product_with_weight(name, inputs)
        if local := _LOCAL.fullmatch(name):
            for tensor in [*inputs[:1], result]:
                if tensor.ndim == int(local[1]) + 2:
                    self._known.add(self._dimension(tensor, 1))
        elif name in _FIRST or name in _SHUFFLES:
            for tensor in [*inputs[:1], result]:
                self._known.add(self._dimension(tensor, 1 if name in _FIRST else tensor.ndim - 3))
        elif is_linear or name in _LAST or (name in _NORMS and _is_of_one_dimension(args, kwargs)):
            for tensor in [*inputs[: name != "embedding"], result]:
                self._known.add(self._dimension(tensor, tensor.ndim - 1))
        if is_linear and inputs:
            self._link(inputs[0], result, {d: d for d in range(result.ndim - 1)})
        elif _SAME.fullmatch(name) or name in _ONE_INPUT or (name == "getitem" and _is_slice(args[1])):
            for tensor in inputs[:1] if name in _ONE_INPUT else inputs:
                for part in outputs:
                    self._link(tensor, part, _equal_dimensions(tensor, part, name in _JOINED))
        elif name in _PERMUTED | _RESHAPED and full_name == f"{name}_":
            self._changes[id(result)] += 1
        elif name in _PERMUTED and is_first and result.ndim == args[0].ndim <= len(_PROBE):
            probe = func(torch.empty(_PROBE[: result.ndim]), *args[1:], **kwargs)
            self._link(args[0], result, {_PROBE.index(size): d for d, size in enumerate(probe.shape)}, moved=True)
        elif name in _RESHAPED and is_first:
            self._link(args[0], result, _same_dimensions(args[0], result), moved=True)

    def _dimension(self, tensor: Tensor, number: int) -> _Dimension:
        return id(tensor), self._changes[id(tensor)], number

    def _link(self, one: Tensor, other: Tensor, dimensions: dict[int, int], moved: bool = False) -> None:
        for here, there in dimensions.items() if one is not other else ():
            ends = self._dimension(one, here), self._dimension(other, there)
            for end, opposite in (ends, ends[::-1]):
                self._links.setdefault(end, []).append((opposite, moved))

    def layout_of(self, tensor: Tensor) -> Layout | None:
        """Return where a tensor's channels are; None if no operation shows it, or two show different dimensions.

        Operations that are nearer, by the number of transposing and reshaping operations between, count first.
        """
        level = [(self._dimension(tensor, d), d) for d in range(tensor.ndim)]  # each with its place in the tensor
        seen = {*level}
        while level:
            further: list[tuple[_Dimension, int]] = []
            for dimension, own in level:  # grows
                for other, moved in self._links.get(dimension, ()):
                    if moved:
                        further.append((other, own))
                    elif (other, own) not in seen:
                        seen.add((other, own))
                        level.append((other, own))
            if found := {own for dimension, own in level if dimension in self._known}:
                return _layout(found, tensor.ndim)
            level = [*dict.fromkeys(place for place in further if place not in seen)]
            seen.update(level)
        return None


def layout_of_layer(
    network: nn.Module, name: str, x: Inputs, run: Callable[[nn.Module, Inputs], Any] = call
) -> Layout | None:
    """Return where a layer's output has its channels, by a pass of two samples in eval mode; None if it is not known.

    Args:
        network: The network.
        name: Dotted path of the layer, which the network calls.
        x: Inputs: a tensor (B, ...), or a mapping or tuple of such tensors.
        run: Function that calls the network with inputs, such as ``call`` of a module.
    """
    with evaluating(network), torch.no_grad(), capture(network, [name]) as outputs, ChannelTrace() as trace:
        run(network, take_rows(x, slice(2), rows_of(x)))
    layout: Layout | None = trace.layout_of(outputs[name])
    return layout


def _layout(dimensions: set[int], ndim: int) -> Layout | None:
    if dimensions == {1}:
        return "first"
    return "last" if dimensions == {ndim - 1} else None


def _is_product_with_weight(name: str, inputs: list[Tensor]) -> bool:
    return name in ("matmul", "mm") and len(inputs) == 2 and inputs[1].ndim == 2  # features @ weight


def _is_of_one_dimension(args: Any, kwargs: Any) -> bool:
    shape = args[1] if len(args) > 1 else kwargs.get("normalized_shape")
    return isinstance(shape, int) or (shape is not None and len(shape) == 1)


def _is_slice(index: Any) -> bool:
    return all(part is ... or isinstance(part, slice) for part in (index if isinstance(index, tuple) else (index,)))


def _equal_dimensions(one: Tensor, other: Tensor, is_joined: bool) -> dict[int, int]:
    """Return the dimensions of an operation that leaves them in their places, without those that it broadcasts."""
    if one.ndim != other.ndim:
        return {}
    return {d: d for d in range(one.ndim) if is_joined or one.shape[d] > 1 or other.shape[d] == 1}


def _same_dimensions(one: Tensor, other: Tensor) -> dict[int, int]:
    """Return the dimensions that reshaping leaves whole: of one size, with as many entries before them."""
    places = {(other.shape[:d].numel(), size): d for d, size in reversed([*enumerate(other.shape)])}
    found = {d: places.get((one.shape[:d].numel(), size)) for d, size in enumerate(one.shape)}
    return {d: place for d, place in found.items() if place is not None}
