"""Near duplicates: the hash of pictures, and the search for pairs."""

import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from kd_lightning.data import near_duplicates
from kd_lightning.data.near_duplicates import Hashes, find_pairs, hash_pictures, perceptual_hash, to_grey
from kd_lightning.errors import InputError


def scene(seed, size=96):
    """A picture whose frequencies are those of photographs."""
    draw = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None])
    frequency[0, 0] = 1
    planes = []
    base = np.fft.fft2(draw.normal(size=(size, size)))
    for _ in range(3):
        plane = np.fft.ifft2((base + 0.2 * np.fft.fft2(draw.normal(size=(size, size)))) / frequency**1.3).real
        planes.append((plane - plane.min()) / np.ptp(plane) * 255)
    return Image.fromarray(np.stack(planes, axis=2).astype(np.uint8))


def distance(a, b):
    return (perceptual_hash(to_grey(a)) ^ perceptual_hash(to_grey(b))).bit_count()


def jpeg(picture, path, quality, **more):
    picture.save(path, quality=quality, **more)
    return Image.open(path)


# The hash.


@pytest.mark.parametrize("seed", range(8))
def test_changed_copies_are_near(tmp_path, seed):
    picture = scene(seed)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was on its side
    turned = jpeg(picture.transpose(Image.Transpose.ROTATE_90), tmp_path / "turned.jpg", 90, exif=exif)
    assert turned.getexif()[0x0112] == 6
    tensor = torch.tensor(np.asarray(picture)).permute(2, 0, 1)
    copies = {
        "recompressed": jpeg(picture, tmp_path / "low.jpg", 30),
        "smaller": picture.resize((48, 48)),
        "larger": picture.resize((200, 160)),
        "turned by EXIF": turned,
        "grey": picture.convert("L"),
        "transparent": picture.convert("RGBA"),
        "CMYK": picture.convert("CMYK"),
        "palette": picture.quantize(64),
        "16 bits": Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257),
        "uint8": tensor,
        "float": tensor / 255,
        "normalised": (tensor / 255 - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / 0.2,
        "half": (tensor / 255).bfloat16(),
        "array": np.asarray(picture),
        "grey tensor": tensor.float().mean(dim=0),
        "one channel": tensor.float().mean(dim=0, keepdim=True),
    }
    found = {name: distance(picture, copy) for name, copy in copies.items()}
    assert max(found.values()) <= 6, found


def test_unrelated_pictures_are_far():
    hashes = [perceptual_hash(to_grey(scene(seed, 48))) for seed in range(60)]
    assert min((a ^ b).bit_count() for n, a in enumerate(hashes) for b in hashes[:n]) > 8


def test_a_turned_picture_without_exif_is_another():
    picture = scene(0)
    assert distance(picture, picture.transpose(Image.Transpose.ROTATE_90)) > 8


@pytest.mark.parametrize(
    "blank",
    [
        Image.new("RGB", (50, 40), "red"),
        Image.new("L", (50, 40), 3),
        Image.new("RGBA", (9, 9), (9, 200, 30, 0)),
        torch.zeros(3, 20, 20),
        torch.full((1, 20, 20), 7, dtype=torch.uint8),
        torch.full((20, 20), float("nan")),
    ],
)
def test_blank_pictures_have_no_hash(blank):
    assert perceptual_hash(to_grey(blank)) == -1


@pytest.mark.parametrize("item", [torch.rand(5), torch.rand(1, 30), 3, "text", None, torch.rand(2, 3, 4, 5), {"x": 1}])
def test_what_is_no_picture(item):
    assert to_grey(item) is None


class Items(Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        if self.items[index] == "broken":
            raise OSError("truncated")
        return self.items[index], 0


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_dataset_of_all_kinds(workers):
    parts = [Items([scene(0), Image.new("L", (40, 40))]), Items([torch.rand(4), scene(1)])]
    hashes = hash_pictures(parts, [3, 0, 1, 2], workers)
    assert hashes.known.tolist() == [True, True, False, False]
    assert hashes.blank.tolist() == [False, False, True, False]
    assert hashes.bits.tolist() == [perceptual_hash(to_grey(scene(1))), perceptual_hash(to_grey(scene(0))), 0, 0]
    with pytest.raises(InputError, match="item 1 of Items cannot be read: OSError: truncated") as error:
        hash_pictures([Items([scene(0), "broken"])], [0, 1], workers)
    assert "\n" not in str(error.value)


def test_a_picture_among_several_inputs():
    items = [{"image": scene(0), "tokens": torch.ones(3)}, (torch.rand(3, 8, 8), torch.rand(3, 8, 8))]
    hashes = hash_pictures([Items(items)], [0, 1])
    assert hashes.known.tolist() == [True, False]
    assert hashes.bits.tolist() == [perceptual_hash(to_grey(scene(0))), 0]


def test_no_samples():
    hashes = hash_pictures([], [])
    assert find_pairs([], [], hashes, 6, 10).rows == []


@pytest.mark.parametrize("size", [7, 2000])
def test_two_hashes_of_many_pictures_each(size):
    """Every picture stands in a row if there are few; if there are many, other pairs have their place."""
    bits = [0xFFFF] * size + [0xFFFC] * size + [1 << 60, 3 << 60, 0xFF << 40, 0x1FF << 40]
    sides = [0] * size + [2] * size + [0, 1, 1, 2]
    found = find_pairs(sides, [str(n) for n in range(2 * size + 4)], of_bits(bits), 2, 20)
    shown = {n for pair in found.rows for n in (pair.a, pair.b)}
    assert {2 * size, 2 * size + 1, 2 * size + 2, 2 * size + 3} <= shown
    assert found.total == size + 2
    assert size > 20 or shown == {*range(2 * size + 4)}


def test_without_imagehash(monkeypatch):
    monkeypatch.setitem(sys.modules, "imagehash", None)
    with pytest.raises(InputError, match=r"imagehash: pip install 'kd-lightning\[weak\]'"):
        hash_pictures([], [])


# The search.


def of_bits(bits, known=None):
    known = np.ones(len(bits), dtype=bool) if known is None else np.array(known)
    return Hashes(np.where(known, np.array(bits, dtype=np.uint64), 0).astype(np.uint64), known, ~known)


def all_pairs(sides, contents, hashes, limit, within):
    """The slow way."""
    found = {}
    for j in range(len(sides)):
        for i in range(j):
            bits = (int(hashes.bits[i]) ^ int(hashes.bits[j])).bit_count()
            alike = bool(hashes.known[i] and hashes.known[j] and bits <= limit)
            if (sides[i] != sides[j] or within) and (contents[i] == contents[j] or alike):
                found[i, j] = (0 if contents[i] == contents[j] else bits, contents[i] == contents[j])
    return found


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_pairs_are_those_of_the_slow_way(monkeypatch, seed, within):
    draw = np.random.default_rng(seed)
    monkeypatch.setattr(near_duplicates, "_BLOCK", (int(draw.integers(1, 9)), int(draw.integers(1, 9))))
    size = int(draw.integers(2, 40))
    base = draw.integers(0, 2**64, int(draw.integers(1, 20)), dtype=np.uint64)
    content = draw.integers(0, size, size)
    hashes = of_bits([base[c % len(base)] ^ np.uint64(c % 5) for c in content], [c % 7 != 0 for c in content])
    sides = draw.integers(0, 3, size).tolist()
    expected = all_pairs(sides, content.tolist(), hashes, 6, within)
    found = find_pairs(sides, [str(c) for c in content], hashes, 6, 10**6, within=within)
    rows = {(min(pair.a, pair.b), max(pair.a, pair.b)): (pair.distance, pair.exact) for pair in found.rows}
    assert len(rows) == len(found.rows) == found.total
    assert rows.items() <= expected.items()
    assert within or all(sides[pair.a] < sides[pair.b] for pair in found.rows)
    assert [pair.distance for pair in found.rows] == sorted(pair.distance for pair in found.rows)
    # every sample with a partner stands in a row, or a copy of it on its side does
    shown = {(content[n], sides[n]) for pair in rows for n in pair}
    assert {(content[n], sides[n]) for pair in expected for n in pair} == shown


def test_the_closest_pairs_are_returned_where_there_are_too_many():
    """Neither pictures of one hash nor equal ones push the others out."""
    size = 3000
    bits = [7] * size + [1 << 60, (1 << 60) + 1, 1 << 50, (1 << 50) + 3]
    contents = [*(f"{n}" for n in range(size // 2)), *["blank"] * (size // 2), "a", "b", "c", "d"]
    found = find_pairs([n % 2 for n in range(size + 4)], contents, of_bits(bits), 2, 100)
    assert len(found.rows) == 100
    assert found.total > 1400
    assert {1, 2} <= {pair.distance for pair in found.rows}
    assert any(pair.exact for pair in found.rows)
    assert found.same_content[0] == size // 2
    assert found.same_hash[0] == size // 2 + 1


def test_twenty_thousand_pictures_take_less_than_a_few_seconds():
    draw = np.random.default_rng(0)
    size = 20_000
    hashes = of_bits(draw.integers(0, 2**64, size, dtype=np.uint64))
    hashes.bits[[5, 19_000]] = 12345, 12345 ^ 0b111
    start = time.process_time()
    found = find_pairs(
        [2 if n < 15_000 else 0 for n in range(size)], [str(n) for n in range(size)], hashes, 6, 100, within=True
    )
    assert time.process_time() - start < 10
    assert [(pair.a, pair.b, pair.distance) for pair in found.rows] == [(19_000, 5, 3)]
