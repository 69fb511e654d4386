"""Near duplicates: pictures whose perceptual hashes differ in few bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement, islice
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kd_lightning.data.sources.images import Images, read_image
from kd_lightning.data.sources.items import picture_of
from kd_lightning.errors import InputError

SIZE = 32
"""Height and width of the grey picture that is hashed, in pixels."""
_BLANK = 4  # largest difference between the grey levels of a blank picture of that size, of 255
_BLOCK = (256, 4096)  # hashes that are compared at once: 8 MB
_REPEATS = 10  # pairs of one content or hash, before other pairs have precedence


@dataclass(frozen=True)
class Hashes:
    """Perceptual hashes of N samples.

    Attributes:
        bits: The hashes, (N,) uint64; 0 without a hash.
        known: Whether a sample has a hash, (N,) booleans.
        blank: Whether a sample is a picture of one colour, which has no hash, (N,) booleans.
    """

    bits: npt.NDArray[np.uint64]
    known: npt.NDArray[np.bool_]
    blank: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Pair:
    """Two samples that are equal or alike.

    Attributes:
        a: Position of a sample.
        b: Position of the other sample.
        distance: Number of bits, of 64, in which their hashes differ; 0 for equal contents.
        exact: Whether their contents are equal.
        repeat: Number of earlier pairs of the same two contents or hashes.
    """

    a: int
    b: int
    distance: int
    exact: bool
    repeat: int


@dataclass(frozen=True)
class Pairs:
    """The closest pairs, and how many there are in all.

    Attributes:
        rows: The pairs by distance, those of equal contents first.
        total: Number of pairs that were found, those beyond the limit included.
        same_content: Largest number of samples of one content, and the position of one of them; (0, -1) without any.
        same_hash: The same for pictures of different content and one hash.
    """

    rows: list[Pair]
    total: int
    same_content: tuple[int, int]
    same_hash: tuple[int, int]


def hash_pictures(images: Sequence[Images], numbers: Sequence[int], workers: int = 0) -> Hashes:
    """Read samples, and hash those that are pictures.

    The hash is the 64-bit pHash of the package ``imagehash``: signs of the lowest frequencies of the grey picture of
    32 x 32 pixels. It stays nearly the same if a picture is resized, recompressed, brightened, or turned back by its
    EXIF orientation. It does not if a picture is mirrored or cropped by more than about 3 %. It means little for small
    pictures: of 1,797 digits of 8 x 8 pixels, 475 pairs of different ones are within 6 bits.

    Args:
        images: Parts of the source. Indices count through all of them.
        numbers: Indices of the samples to read, N of them.
        workers: Number of processes that read. 0 means that this one reads.

    Raises:
        InputError: If ``imagehash`` is not installed, and if a sample cannot be read.
    """
    require_imagehash()
    loader = DataLoader(_HashDataset(images, numbers), 64, num_workers=workers, collate_fn=list)
    found: list[int | None] = []
    for batch in loader:
        for item in batch:
            if isinstance(item, str):
                raise InputError(item)
            found.append(item)
    known = np.array([item is not None and item >= 0 for item in found], dtype=bool)
    blank = np.array([item == -1 for item in found], dtype=bool)
    bits = np.array([item if item is not None and item >= 0 else 0 for item in found], dtype=np.uint64)
    return Hashes(bits, known, blank)


class _HashDataset(Dataset[int | str | None]):
    """Hash of each sample: -1 for a blank picture, None for a sample that is no picture, a text for an error."""

    def __init__(self, images: Sequence[Images], numbers: Sequence[int]) -> None:
        self.images = images
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, position: int) -> int | str | None:
        try:
            picture = to_grey(picture_of(read_image(self.images, self.numbers[position])))
        except InputError as error:  # an error of a worker would have several lines
            return str(error)
        return None if picture is None else perceptual_hash(picture)


def perceptual_hash(picture: Image.Image) -> int:
    """Return the 64-bit pHash of a grey picture, or -1 if it has one grey level only."""
    small = picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    low, high = small.getextrema()
    if high - low <= _BLANK:  # type: ignore[operator]
        return -1
    bits = require_imagehash().phash(small).hash
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def to_grey(item: Any) -> Image.Image | None:
    """Turn an item into a grey picture of 8 bits; None if it is no picture.

    Args:
        item: A PIL image, or a tensor or array of numbers: (H, W), (C, H, W), or (H, W, C) with 1, 3 or 4 channels.
            Values other than uint8 are scaled to their own range, so that normalised pictures are pictures, too.
    """
    if isinstance(item, Image.Image):
        picture: Image.Image = ImageOps.exif_transpose(item)
        if picture.mode in ("RGB", "L", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"):
            return picture.convert("L")
        if not picture.mode.startswith(("I", "F")):  # one bit, a palette, or transparency, which has no colour
            layer = picture.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", layer.size), layer).convert("RGB").convert("L")
        item = np.asarray(picture)
    if isinstance(item, Tensor):
        item = item.detach().cpu()
        item = item.float().numpy() if item.is_floating_point() else item.numpy()  # NumPy has no bfloat16
    if not isinstance(item, np.ndarray) or item.dtype.kind not in "biuf" or item.ndim not in (2, 3) or 0 in item.shape:
        return None
    if item.ndim == 3:
        last = item.shape[2] in (1, 3, 4) and item.shape[0] not in (1, 3, 4)
        item = np.moveaxis(item, 2, 0) if last else item
        colours = item[:3] if len(item) == 4 else item
        if colours.dtype == np.uint8 and len(colours) == 3:
            return Image.fromarray(np.ascontiguousarray(np.moveaxis(colours, 0, 2))).convert("L")
        item = colours[0] if len(colours) == 1 else colours.astype(np.float64).mean(axis=0)
        if colours.dtype == np.uint8:
            item = item.astype(np.uint8)
    if 1 in item.shape:  # a row of numbers
        return None
    if item.dtype != np.uint8:
        values = np.nan_to_num(item.astype(np.float64), posinf=0.0, neginf=0.0)
        low, high = values.min(), values.max()
        item = ((values - low) * (255 / (high - low or 1.0))).round().astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(item))


def find_pairs(
    sides: Sequence[int],
    contents: Sequence[str],
    hashes: Hashes,
    distance: int,
    limit: int,
    *,
    within: bool = False,
) -> Pairs:
    """Find equal and similar samples on different sides.

    Many samples of one content, or many pictures of one hash, give one pair for each sample, not all pairs. Time is
    quadratic in the number of different hashes (2e9 comparisons a second), memory is linear.

    Args:
        sides: Side of each of N samples, from 0 to 7.
        contents: Content of each sample, without a number; empty if it is unknown.
        hashes: Their perceptual hashes.
        distance: Largest number of differing bits, from 0 to 64.
        limit: Most pairs to return.
        within: Whether pairs of one side count, too.
    """
    side = np.asarray(sides, dtype=np.int64)
    _, content = np.unique([text or f"#{n}" for n, text in enumerate(contents)], return_inverse=True)
    equal = _Groups(content, side, within)
    exact = [Pair(a, b, 0, True, n) for group in equal.repeated() for n, (a, b) in enumerate(equal.pairs(group, group))]
    # one picture for each content and side
    pictures = np.sort(np.unique(content * 8 + side, return_index=True)[1])
    pictures = pictures[hashes.known[pictures]]
    distinct, number = np.unique(hashes.bits[pictures], return_inverse=True)
    alike = _Groups(number, side[pictures], within)
    near: list[Pair] = []

    def add(first: int, second: int, bits: int, most: int | None = None) -> None:
        pairs = ((int(pictures[a]), int(pictures[b])) for a, b in alike.pairs(first, second))
        different = (pair for pair in pairs if content[pair[0]] != content[pair[1]])
        near.extend(Pair(a, b, bits, False, n) for n, (a, b) in enumerate(islice(different, most)))

    same_hash = (0, -1)
    for group in alike.repeated():
        members = pictures[alike.members(group)]
        same_hash = max(same_hash, (len({*content[members].tolist()}), int(members[0])))
        add(group, group, 0)
    total, found = _search(distinct, alike.masks(len(distinct)), distance, limit, within=within)
    enough = len(near) + limit
    for first, second, bits in found:
        add(first, second, bits, None if len(near) < enough else _REPEATS)
    total += len(exact) + len(near) - len(found)
    rows = sorted([*exact, *near], key=lambda pair: (pair.repeat >= _REPEATS, *_order(pair)))[:limit]
    return Pairs(sorted(rows, key=_order), total, equal.largest(), same_hash)


def _order(pair: Pair) -> tuple[int, bool, int, int]:
    return pair.distance, not pair.exact, pair.a, pair.b


class _Groups:
    """Positions by group and side."""

    def __init__(self, group: npt.NDArray[np.int64], side: npt.NDArray[np.int64], within: bool) -> None:
        self.within = within
        self.key = group * 8 + side
        self.order = np.argsort(self.key, kind="stable")
        self.sorted = self.key[self.order]

    def members(self, group: int, side: int | None = None) -> npt.NDArray[np.int64]:
        """Positions of a group, or of one side of it, ascending by side and position."""
        first, last = (group * 8, group * 8 + 8) if side is None else (group * 8 + side, group * 8 + side + 1)
        return self.order[np.searchsorted(self.sorted, first) : np.searchsorted(self.sorted, last)]

    def repeated(self) -> list[int]:
        """Groups of several positions."""
        groups, counts = np.unique(self.sorted // 8, return_counts=True)
        repeated: list[int] = groups[counts > 1].tolist()
        return repeated

    def largest(self) -> tuple[int, int]:
        """Size of the largest group, and one of its positions; (0, -1) without any."""
        groups, counts = np.unique(self.sorted // 8, return_counts=True)
        if not len(groups):
            return 0, -1
        return int(counts.max()), int(self.members(int(groups[counts.argmax()]))[0])

    def masks(self, groups: int) -> npt.NDArray[np.uint8]:
        """The sides of each group, one bit for each."""
        masks = np.zeros(groups, dtype=np.uint8)
        np.bitwise_or.at(masks, self.key // 8, (1 << (self.key % 8)).astype(np.uint8))
        return masks

    def pairs(self, first: int, second: int) -> Iterator[tuple[int, int]]:
        """Pairs across sides; with ``within``, of one side, too. Each position stands in one pair for each other side.

        The n-th position is paired with the n-th of the other side, where the shorter list repeats.
        """
        sides = sorted({*(self.key[[*self.members(first), *self.members(second)]] % 8).tolist()})
        for s, t in combinations_with_replacement(sides, 2) if self.within else combinations(sides, 2):
            lists = [(self.members(first, s), self.members(second, t))]
            if first == second and s == t:
                members = lists[0][0]
                lists = [(members[:1], members[1:])]
            elif first != second and s != t:
                lists.append((self.members(second, s), self.members(first, t)))
            for a, b in lists:
                count = max(len(a), len(b)) if len(a) and len(b) else 0
                yield from zip(np.resize(a, count).tolist(), np.resize(b, count).tolist(), strict=True)


def _search(
    bits: npt.NDArray[np.uint64], masks: npt.NDArray[np.uint8], distance: int, limit: int, *, within: bool
) -> tuple[int, list[tuple[int, int, int]]]:
    """Find pairs of different hashes within a distance.

    Args:
        bits: Different hashes, (M,).
        masks: The sides on which each occurs, one bit for each, (M,).
        distance: Largest distance.
        limit: Most pairs to return.
        within: Whether both may be on one side only.

    Returns:
        The number of pairs, and the closest of them: (number, number, distance).
    """
    # every pair across sides has a member that is not on the most frequent side alone
    common = 0 if within or not len(masks) else np.bincount(masks).argmax()
    rare = masks != common
    order = np.concatenate([np.flatnonzero(rare), np.flatnonzero(~rare)])
    bits, masks, rows = bits[order], masks[order], int(rare.sum())
    if masks.size and np.bitwise_count(common) > 1:  # a hash on several sides has partners on each
        rows = len(bits)
    total, found = 0, np.empty((0, 3), dtype=np.int64)
    for top in range(0, rows, _BLOCK[0]):
        for left in range(top, len(bits), _BLOCK[1]):
            a, b = slice(top, min(top + _BLOCK[0], rows)), slice(left, left + _BLOCK[1])
            apart = np.bitwise_count(bits[a, None] ^ bits[None, b])
            places = np.flatnonzero(apart <= distance)
            if not len(places):
                continue
            i, j = np.divmod(places, apart.shape[1])
            between = apart[i, j]
            i, j = i + top, j + left
            keep = (i < j) & (within | (np.bitwise_count(masks[i] | masks[j]) > 1))
            total += int(keep.sum())
            found = np.concatenate([found, np.stack([order[i], order[j], between], axis=1)[keep]])
            if len(found) > 4 * limit:
                found = _closest(found, limit)
    return total, [(a, b, d) for a, b, d in _closest(found, limit).tolist()]


def _closest(found: npt.NDArray[np.int64], limit: int) -> npt.NDArray[np.int64]:
    return found[np.lexsort((found[:, 1], found[:, 0], found[:, 2]))[:limit]]


def require_imagehash() -> Any:
    """Return the package ``imagehash``; InputError if it is not installed."""
    try:
        import imagehash
    except ImportError as error:
        raise InputError("duplicates needs imagehash: pip install 'kd-lightning[weak]'") from error
    return imagehash
