"""The way from a picture to a network's input, as JSON that a program without this package can follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import transforms as v1
from torchvision.transforms import v2
from torchvision.transforms._presets import ImageClassification
from torchvision.transforms.v2 import functional

from kd_lightning.data.sources.dataset_source import DatasetSource
from kd_lightning.data.sources.image_loader import load_image
from kd_lightning.data.transforms.base import BatchTransform, Compose, Images
from kd_lightning.data.transforms.channels import RGB
from kd_lightning.data.transforms.draws import Draws
from kd_lightning.data.transforms.normalize import Normalize
from kd_lightning.data.transforms.resize import CenterCrop, Resize, ResizeToCover
from kd_lightning.errors import InputError

Description = dict[str, Any]
"""Preprocessing as JSON, in the order of its steps.

========= ==============================================================================================================
color     ``RGB`` (three channels in this order) or ``L`` (grey); names of Pillow's modes.
resize    null, or a mapping: ``size``, ``fit``, ``interpolation`` (``bilinear``, ``bicubic``, ``nearest``,
          ``nearest-exact``), ``antialias``, ``rounded`` (to whole numbers), ``library`` (``torch`` or ``pillow``, whose
          bytes differ by 1 at most). ``fit`` is ``shorter_side`` (of ``size`` pixels; the longer one is rounded down),
          ``stretch`` (to height and width) or ``cover`` (the smallest size of the same proportions that covers height
          and width).
crop      null, or height and width of the centre. A picture that is too small gets zeros around it.
scale     Number that bytes are multiplied by.
mean      null, or what is subtracted from each channel.
std       null, or what each channel is then divided by.
layout    ``NCHW``: samples, channels, height, width.
dtype     ``float32``.
size      Height and width of the network's input.
========= ==============================================================================================================
"""

_CHANNELS = {3: "RGB", 1: "L"}
_INTERPOLATIONS = ("bilinear", "bicubic", "nearest", "nearest-exact")
_ALLOWED = {"color": ("RGB", "L"), "scale": (1, 1 / 255), "layout": ("NCHW",), "dtype": ("float32",)}
_RESIZE = ("size", "fit", "interpolation", "antialias", "library")
_GREY = (19595, 38470, 7471)  # of 65536: Pillow's share of each channel


def describe_preprocessing(eval_transform: nn.Module | None, input_shape: Sequence[int]) -> Description | None:
    """Describe an evaluation transform as JSON.

    Args:
        eval_transform: The transform: a recipe of this package, or a chain of torchvision's ``Resize``, ``CenterCrop``,
            ``ToImage``, ``ToDtype``, ``ToTensor``, ``Normalize`` and ``RGB``, or that of torchvision's weights.
        input_shape: Shape of its output, (C, H, W).

    Returns:
        The description, see :data:`Description`. None if the input is no picture of 1 or 3 channels, or if the
        transform has other steps, or these in another order.
    """
    if eval_transform is None or len(input_shape) != 3 or input_shape[0] not in _CHANNELS:
        return None
    size = [int(side) for side in input_shape[1:]]
    found: Description = {"color": _CHANNELS[input_shape[0]], "resize": None, "crop": None, "scale": None}
    found |= {"mean": None, "std": None, "layout": "NCHW", "dtype": "float32", "size": size}
    state = {"tensor": False}
    for step in _steps(eval_transform):
        read = _READERS.get(type(step))
        if read is None or not read(step, found, state):
            return None
    resize = found["resize"]
    fixed = found["crop"] or (resize["size"] if resize is not None and resize["fit"] == "stretch" else size)
    if found["scale"] is None or fixed != size or len(found["mean"] or [0]) not in (1, input_shape[0]):
        return None
    return found


def describe_data(data: Any, input_shape: Any) -> Description | None:
    """Describe how a datamodule makes a network's input of an image file, see :func:`describe_preprocessing`.

    Args:
        data: Any datamodule.
        input_shape: Shape of the input of one sample, (C, H, W).

    Returns:
        None also if files are not read by :func:`~kd_lightning.data.sources.image_loader.load_image`, or if the source
        is a dataset with a transform of its own.
    """
    source = getattr(data, "source", None)
    while (inner := getattr(source, "source", None)) is not None:
        source = inner
    if isinstance(source, DatasetSource):
        source = source.train
    while (inner := getattr(source, "dataset", None)) is not None and not isinstance(inner, type):  # a Subset
        source = inner
    own = any(getattr(source, name, None) is not None for name in ("transform", "transforms"))
    shape = (
        input_shape if isinstance(input_shape, list | tuple) and all(isinstance(n, int) for n in input_shape) else ()
    )
    if own or getattr(source, "loader", load_image) is not load_image:
        return None
    return describe_preprocessing(getattr(data, "eval_transform", None), shape)


def transform_of(description: Mapping[str, Any]) -> BatchTransform:
    """Build the transform of a description.

    Args:
        description: What :func:`describe_preprocessing` returns.

    Returns:
        A transform from uint8 pictures of 1 to 4 channels to float32 inputs. Transparency is dropped. A grey picture
        gets three channels, or a coloured one becomes grey as by Pillow, as ``color`` demands.

    Raises:
        InputError: If the description lacks a key or has an unknown value.
    """
    try:
        color, resize, crop, mean = (description[key] for key in ("color", "resize", "crop", "mean"))
        for key, known in _ALLOWED.items():
            if description[key] not in known:
                raise ValueError(f"{key} {description[key]!r}")
        floats = _ToFloat(scale=description["scale"] != 1)
        resized: list[nn.Module] = [] if resize is None else [_Resize(**{key: resize[key] for key in _RESIZE})]
        if resized and not resize["rounded"]:
            resized = [floats, *resized]
        cropped = [] if crop is None else [CenterCrop(crop)]
        parts: list[nn.Module] = [_Channels(len(color)), *resized, *cropped]
        if mean is None or not floats.scale:
            parts.append(floats)
        if mean is not None:
            parts.append(Normalize(mean, description["std"]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"preprocessing must be as describe_preprocessing returns it, got {reason}") from error
    return Compose(parts)


def _steps(transform: Any) -> Iterator[Any]:
    """The steps of chains in chains. A subclass may do more, and is a step."""
    if isinstance(transform, BatchTransform):  # it takes tensors
        yield v2.ToImage()
    if type(transform) in (Compose, v2.Compose, v1.Compose, nn.Sequential):
        for part in transform if isinstance(transform, nn.Sequential) else transform.transforms:
            yield from _steps(part)
    else:
        yield transform


def _read_nothing(step: Any, found: Description, state: dict[str, bool]) -> bool:
    return True


def _read_tensor(step: Any, found: Description, state: dict[str, bool]) -> bool:
    state["tensor"] = True
    return True


def _read_rgb(step: Any, found: Description, state: dict[str, bool]) -> bool:
    return bool(found["color"] == "RGB")


def _read_resize(step: Any, found: Description, state: dict[str, bool]) -> bool:
    own = isinstance(step, Resize | ResizeToCover)
    size = [step.size] if isinstance(step.size, int) else [*(step.size or [])]
    interpolation = "bilinear" if own else getattr(step.interpolation, "value", step.interpolation)
    if isinstance(step, v1.Resize) and state["tensor"]:  # it rounds in another way than that of v2
        return False
    if found["resize"] or found["crop"] or found["mean"] or interpolation not in _INTERPOLATIONS:
        return False
    if len(size) not in (1, 2) or (not own and step.max_size is not None):
        return False
    fit = "cover" if isinstance(step, ResizeToCover) else "stretch" if len(size) == 2 else "shorter_side"
    in_torch = own or state["tensor"]
    found["resize"] = {
        "size": size if len(size) == 2 else size[0],
        "fit": fit,
        "interpolation": interpolation,
        "antialias": interpolation in _INTERPOLATIONS[:2] and (own or not in_torch or bool(step.antialias)),
        "rounded": found["scale"] is None,
        "library": "torch" if in_torch else "pillow",
    }
    return True


def _read_crop(step: Any, found: Description, state: dict[str, bool]) -> bool:
    size = [step.size] * 2 if isinstance(step.size, int) else [*step.size]
    if found["crop"] or found["mean"]:  # zeros around a picture are black before it is normalised alone
        return False
    found["crop"] = size * 2 if len(size) == 1 else size
    return True


def _read_type(step: Any, found: Description, state: dict[str, bool]) -> bool:
    if step.dtype == torch.uint8 and found["scale"] is None:  # bytes stay bytes
        return True
    if step.dtype != torch.float32 or found["mean"]:
        return False
    if found["scale"] is None:  # floats stay floats
        found["scale"] = 1 / 255 if step.scale else 1.0
    return True


def _read_to_tensor(step: Any, found: Description, state: dict[str, bool]) -> bool:
    state["tensor"] = True
    found["scale"] = found["scale"] or 1 / 255
    return True


def _read_normalize(step: Any, found: Description, state: dict[str, bool]) -> bool:
    if isinstance(step, Normalize):
        found["scale"] = found["scale"] or 1 / 255
    elif found["scale"] is None:
        return False
    if found["mean"]:
        return False
    found["mean"], found["std"] = ([float(value) for value in values] for values in (step.mean, step.std))
    return True


def _read_preset(step: Any, found: Description, state: dict[str, bool]) -> bool:
    parts = [
        v1.Resize(step.resize_size, step.interpolation, antialias=step.antialias),
        v2.CenterCrop(step.crop_size),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(step.mean, step.std),
    ]
    return all(_READERS[type(part)](part, found, state) for part in parts)


_READERS: dict[type, Callable[[Any, Description, dict[str, bool]], bool]] = {
    **dict.fromkeys((v2.Identity, nn.Identity, v2.ToPureTensor), _read_nothing),
    **dict.fromkeys((v2.ToImage, v2.PILToTensor, v1.PILToTensor), _read_tensor),
    **dict.fromkeys((RGB, v2.RGB), _read_rgb),
    **dict.fromkeys((Resize, ResizeToCover, v2.Resize, v1.Resize), _read_resize),
    **dict.fromkeys((CenterCrop, v2.CenterCrop, v1.CenterCrop), _read_crop),
    **dict.fromkeys((v2.ToTensor, v1.ToTensor), _read_to_tensor),
    **dict.fromkeys((Normalize, v2.Normalize, v1.Normalize), _read_normalize),
    v2.ToDtype: _read_type,
    ImageClassification: _read_preset,
}


class _OfEach(BatchTransform):
    """A transform of each picture alone, of a list or a batch."""

    takes_lists = True
    is_random = False

    def transform(self, images: Images, draws: Draws) -> Images:
        """Return a tensor for a tensor, and a list for a list."""
        return self.change(images) if isinstance(images, Tensor) else [self.change(image) for image in images]

    def change(self, image: Tensor) -> Tensor:
        """Return the changed picture (..., C, H, W)."""
        raise NotImplementedError


class _Channels(_OfEach):
    """Bring pictures of 1 to 4 channels to 1 or 3. Channels after grey or RGB are transparency, and are dropped."""

    moves_pixels = False

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def change(self, image: Tensor) -> Tensor:
        """Return the picture with the wanted channels."""
        have = image.shape[-3]
        if not 1 <= have <= 4:
            raise InputError(f"pictures must have 1 to 4 channels, got {have}")
        image = image if have in (1, 3) else image[..., : have - 1, :, :]
        if image.shape[-3] == self.channels:
            return image
        if self.channels == 3:
            return image.repeat_interleave(3, -3)
        shares = torch.tensor(_GREY, device=image.device).view(-1, 1, 1)
        if image.is_floating_point():
            return (image * (shares / 2**16).to(image.dtype)).sum(-3, keepdim=True)
        return ((image.long() * shares).sum(-3, keepdim=True) + 2**15).div(2**16, rounding_mode="floor").to(image.dtype)


class _ToFloat(_OfEach):
    """Convert pictures to float32. With ``scale``, whole numbers are divided by the largest of their type."""

    moves_pixels = False

    def __init__(self, scale: bool) -> None:
        super().__init__()
        self.scale = scale

    def change(self, image: Tensor) -> Tensor:
        """Return the picture as float32. Floats stay as they are."""
        converted: Tensor = functional.to_dtype(image, torch.float32, scale=self.scale)
        return converted


class _Resize(_OfEach):
    """Resize pictures as a description states."""

    def __init__(self, size: int | Sequence[int], fit: str, interpolation: str, antialias: bool, library: str) -> None:
        super().__init__()
        self.size = [size] if isinstance(size, int) else [int(side) for side in size]
        self.fit = fit
        self.interpolation = v2.InterpolationMode(interpolation)
        self.antialias = antialias
        self.library = library
        if fit not in ("shorter_side", "stretch", "cover") or len(self.size) != 1 + (fit != "shorter_side"):
            raise ValueError(f"fit {fit!r} of size {size}")
        if library not in ("torch", "pillow"):
            raise ValueError(f"library {library!r}")

    def change(self, image: Tensor) -> Tensor:
        """Return the resized picture."""
        size = self.size
        if self.fit == "cover":
            factor = max(side / now for side, now in zip(size, image.shape[-2:], strict=True))
            size = [max(side, round(now * factor)) for side, now in zip(size, image.shape[-2:], strict=True)]
        if self.library == "torch" or image.dtype != torch.uint8:
            resized: Tensor = functional.resize(image, size, self.interpolation, antialias=self.antialias)
            return resized
        if image.ndim == 4:
            return torch.stack([self.change(one) for one in image])
        picture = functional.resize(functional.to_pil_image(image), size, self.interpolation)
        pixels: Tensor = functional.pil_to_tensor(picture)
        return pixels
