"""The loader of all sources: from an image file to a picture in RGB, or to its pixels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision  # noqa: F401  (it registers torch.ops.image)
from lightning.pytorch.utilities import rank_zero_warn
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import get_worker_info

from kd_lightning.data.sources.images import printable
from kd_lightning.errors import InputError

Loader = Callable[[str], Any]
"""From the path of a file to a picture: a PIL image or a tensor (C, H, W)."""

_Range = tuple[float, float]
_UNSIGNED: list[_Range] = [(0, 2**8 - 1), (0, 2**16 - 1), (0, 2**32 - 1)]
_SIGNED: list[_Range] = [(0, 2**8 - 1), (0, 2**16 - 1), (-(2**15), 2**15 - 1), (0, 2**31 - 1), (-(2**31), 2**31 - 1)]
_FLOAT: list[_Range] = [(0, 1), (-1, 1), (0, 2**8 - 1), (0, 2**16 - 1)]
_OVERSHOOT = 0.1  # of a float range up to 255: resampled pictures exceed theirs by a little

_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
_SIGNED_FORMAT = 2
_TURNS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_RGB = 3  # torchvision.io.ImageReadMode.RGB
_warned: set[str] = set()
_ranges: dict[str, tuple[_Range, str | Path]] = {}
"""By PIL's mode: the range of the first picture whose range was found by its values, and its file."""


def load_image(path: str | Path) -> Image.Image:
    """Load an image file as a picture of three channels with 8 bits each, as its viewer is meant to see it.

    The picture is turned and mirrored as the EXIF orientation of the file states. A file of several pictures gives the
    first one. Palettes, transparency, CMYK and greys of up to 8 bits are converted as PIL converts them to RGB:
    transparency is dropped.

    Greys of more than 8 bits are scaled from a range to 0 ... 255:

    ========================================  ======================================================================
    values in the file                        range
    ========================================  ======================================================================
    unsigned, 16 bits (12 bits in TIFF)       0 ... 65535 (0 ... 4095); the upper 8 bits remain
    signed, 8 bits and 16 bits                -128 ... 127, -32768 ... 32767
    integer, 32 bits                          The first that holds all values: 0 ... 255, 0 ... 65535,
                                              -32768 ... 32767, 0 ... 2^31 - 1, the range of the type.
    float                                     The first that holds all values: 0 ... 1, -1 ... 1, 0 ... 255,
                                              0 ... 65535, lowest ... highest of the picture. Values may exceed the
                                              first three by a tenth, and are clipped.
    ========================================  ======================================================================

    NaN and negative infinity become the lowest value, infinity the highest. A TIFF in which 0 is white is inverted. A
    warning comes once if the values of a picture fill less than a sixteenth of the range, if no range holds them, or if
    two pictures of one type have different ranges: a dark picture may then look as bright as others. PIL refuses
    pictures of more than 178 million pixels, unless a loader of your own raises ``PIL.Image.MAX_IMAGE_PIXELS``.

    Args:
        path: File of the image.

    Returns:
        Image of mode ``RGB``. The file is closed.

    Raises:
        InputError: If the file is missing, damaged or no image. The message names the file.
    """
    try:
        with Path(path).open("rb") as file, Image.open(file) as image:
            return _to_picture(image, path)
    except Exception as error:  # decoders raise errors of any class
        raise _unreadable(path, error) from error


def decode_image(path: str | Path) -> Tensor:
    """Load the pixels of an image file: those of :func:`load_image`.

    torchvision decodes JPEG of one and three channels, which takes 0.6 to 0.9 of PIL's time. PIL reads the header of
    each file. It also decodes all other files, and those that torchvision refuses, so that both functions raise the
    same errors. PNG is not faster, and a damaged one can crash torchvision 0.29, with the process.

    Args:
        path: File of the image.

    Returns:
        (3, H, W), uint8. The three channels of a pixel lie side by side in memory. Pixels of JPEG differ from those of
        :func:`load_image` only if PIL and torchvision have libraries of JPEG that round differently.

    Raises:
        InputError: If the file is missing, damaged or no image. The message names the file.
    """
    try:
        with Path(path).open("rb") as file, Image.open(file) as image:
            if image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB") and _orientation(image) not in _TURNS:
                file.seek(0)  # PIL turns faster than torch
                pixels = _decode_jpeg(bytearray(file.read()), image)
                if pixels is not None:
                    return pixels
            return torch.from_numpy(np.array(_to_picture(image, path))).permute(2, 0, 1)
    except Exception as error:  # decoders raise errors of any class
        raise _unreadable(path, error) from error


def size_and_turn(path: str | Path) -> tuple[tuple[int, int], Image.Transpose | None]:
    """Return height and width of a picture as its file stores it, and the turn by which :func:`load_image` turns it.

    Args:
        path: File of the image, whose header alone is read where that is enough.

    Raises:
        InputError: If the file is missing, damaged or no image. The message names the file.
    """
    try:
        with Path(path).open("rb") as file, Image.open(file) as image:
            size = (image.height, image.width)
            if image.format not in ("JPEG", "MPO"):  # the orientation of others may follow the pixels
                image.load()
            return size, _TURNS.get(_orientation(image))
    except Exception as error:  # decoders raise errors of any class
        raise _unreadable(path, error) from error


def _decode_jpeg(content: bytearray, image: Image.Image) -> Tensor | None:
    """Pixels (3, H, W) of an open JPEG; None if torchvision refuses it, as it does if the end is missing."""
    try:
        # torchvision.io.decode_jpeg warns at each call that a later torchvision lacks it
        pixels: Tensor = torch.ops.image.decode_jpeg(torch.frombuffer(content, dtype=torch.uint8), _RGB, False)
    except (RuntimeError, AttributeError):  # AttributeError: a torchvision without it
        return None
    return pixels if pixels.shape == (3, image.height, image.width) else None


def _to_picture(image: Image.Image, path: str | Path) -> Image.Image:
    """Decode an open image to RGB, see :func:`load_image`."""
    image.load()
    image.info.pop("transparency", None)  # which PIL would warn of
    wide = image.mode == "F" or image.mode.startswith("I") or _is_signed_byte(image)
    picture = Image.fromarray(_to_bytes(image, path)).convert("RGB") if wide else image.convert("RGB")
    turn = _TURNS.get(_orientation(image))
    picture = picture if turn is None else picture.transpose(turn)
    picture.info.clear()  # else the orientation stays in it, and a second reader turns the picture again
    return picture


def _unreadable(path: str | Path, error: Exception) -> InputError:
    reason = "it has no format of pictures that Pillow reads"  # the error itself names a Python object
    if not isinstance(error, UnidentifiedImageError):
        reason = f"{type(error).__name__}: {error}"
    return InputError(f"image {printable(path)} cannot be read: {reason}")


def why_unreadable(error: Exception, path: str | Path) -> str:
    """Return in one line, without the path, why a file of a picture cannot be read.

    Args:
        error: What :func:`load_image`, a loader of the user's own, or a transform has raised.
        path: The file.
    """
    cause = error.__cause__ or error
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    text = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
    return " ".join(text.removeprefix(f"image {printable(path)} cannot be read: ").split())


def _orientation(image: Image.Image) -> Any:
    """EXIF orientation of a picture that is loaded, or of a JPEG that is open; 1 if it has none."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF data; the picture is not damaged
        return 1


def _to_bytes(image: Image.Image, path: str | Path) -> np.ndarray[Any, Any]:
    """Scale a grey picture of more than 8 bits to bytes (H, W)."""
    values = np.asarray(image)
    if image.mode == "L":
        return values ^ 128  # PIL reads signed bytes as unsigned ones
    if image.mode == "F":
        grey = _scale_floats(values.astype(np.float64), path)
    else:
        values = (values.view(np.uint32) if _is_unsigned(image) else values).astype(np.int64)
        low, high = _integer_range(image, values, path)
        _check_contrast(values.min(), values.max(), (low, high), path)
        grey = (values - int(low)) * 256 // (int(high - low) + 1)
    grey = grey.astype(np.uint8)
    return 255 - grey if _tag(image, _PHOTOMETRIC) == 0 else grey  # PIL inverts 8 bits alone


def _integer_range(image: Image.Image, values: np.ndarray[Any, Any], path: str | Path) -> _Range:
    """The range of integers: that of their type, or for 32 bits the first that holds all values."""
    if image.mode.startswith("I;"):
        return 0, 2 ** int(_tag(image, _BITS) or 16) - 1
    if image.format in ("PNG", "PPM"):  # these have 16 bits at most; PIL opens them with 32
        return 0, 2**16 - 1
    if _tag(image, _BITS) == 16:
        return -(2**15), 2**15 - 1
    low, high = values.min(), values.max()
    ranges = _UNSIGNED if _is_unsigned(image) else _SIGNED
    found = next((bottom, top) for bottom, top in ranges if bottom <= low and high <= top)
    _check_equal_range("I", low, high, found, path)
    return found


def _is_signed_byte(image: Image.Image) -> bool:
    return image.mode == "L" and _tag(image, _BITS) == 8 and _tag(image, _SAMPLE_FORMAT) == _SIGNED_FORMAT


def _is_unsigned(image: Image.Image) -> bool:
    """Whether a TIFF has unsigned integers of 32 bits, which PIL reads as signed ones."""
    return image.mode == "I" and _tag(image, _BITS) == 32 and _tag(image, _SAMPLE_FORMAT) != _SIGNED_FORMAT


def _scale_floats(values: np.ndarray[Any, Any], path: str | Path) -> np.ndarray[Any, Any]:
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    for bottom, top in _FLOAT:
        above = _OVERSHOOT * top if top < 2**16 - 1 else 0
        if bottom - min(above, _OVERSHOOT * max(high, 1)) <= low and high <= top + above:
            _check_contrast(low, high, (bottom, top), path)
            _check_equal_range("F", low, high, (bottom, top), path)
            break
    else:
        bottom, top = low, max(high, np.nextafter(low, np.inf))
        _warn("range", f"image {path}: its values {low:g} ... {high:g} have no usual range, so that the lowest becomes "
              "black and the highest white in each such picture; a loader of your own (the source's argument loader) "
              "can scale all alike")  # fmt: skip
    values = np.nan_to_num(values, nan=bottom, neginf=bottom, posinf=top)
    return np.rint(np.clip((values - bottom) / (top - bottom), 0, 1) * 255)


def _check_contrast(low: float, high: float, bounds: _Range, path: str | Path) -> None:
    """Warn if the values of a picture fill little of their range, as 12 bits stored in 16 do."""
    if 0 < high - low < (bounds[1] - bounds[0]) / 16:
        _warn("contrast", f"image {path}: its values {low:g} ... {high:g} fill less than 1/16 of the range "
              f"{bounds[0]:g} ... {bounds[1]:g}, so that its contrast is low; if all pictures are so, a loader of your "
              "own (the source's argument loader) can scale them")  # fmt: skip


def _check_equal_range(mode: str, low: float, high: float, bounds: _Range, path: str | Path) -> None:
    """Warn if a picture has another range than the first one of its mode; one of zeros alone looks alike in each."""
    if low == high == 0:
        return
    first, other = _ranges.setdefault(mode, (bounds, path))
    if first != bounds:
        _warn("ranges", f"image {path} is scaled from {bounds[0]:g} ... {bounds[1]:g}, the first range that holds its "
              f"values {low:g} ... {high:g}, but image {other} from {first[0]:g} ... {first[1]:g}; if all pictures "
              "have one range, a loader of your own (the source's argument loader) can scale them alike")  # fmt: skip


def _warn(kind: str, text: str) -> None:
    """Warn once in a process, and in one of the loader's workers."""
    worker = get_worker_info()
    if kind not in _warned and (worker is None or worker.id == 0):
        _warned.add(kind)
        rank_zero_warn(text)


def _tag(image: Image.Image, number: int) -> Any:
    """First value of a tag of a TIFF; None for other formats and without the tag."""
    value = getattr(image, "tag_v2", {}).get(number)
    return value[0] if isinstance(value, tuple) else value
