"""Pictures with masks, composed of objects cut out by their alpha channel, for segmentation.py and its configs."""

import hashlib
import io
import json
import re
import subprocess
import tempfile
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

CLASSES = ("background", "animal", "plant", "town", "letter")
VOID = 255
"""Mask value of the soft edge of an object, where it blends with what lies below."""
SIZES = {"train": 2400, "val": 300, "test": 600}
SIDE = 64
_FOLDERS = {
    "animal": ("animals",),
    "plant": ("food", "plants"),
    "town": ("town", "vehicles"),
    "letter": tuple(f"symbols/alphabets/{language}/filled" for language in ("english", "german", "spanish")),
}
_PHOTOS = {
    "train": ("astronaut.png", "brick.png", "cell.png", "coins.png", "grass.png", "hubble_deep_field.jpg", "ihc.png"),
    "val": ("camera.png", "moon.png"),
    "test": ("coffee.png", "gravel.png", "retina.jpg"),
}
"""Photographs of scikit-image without animals, plants, buildings, vehicles and letters in the foreground."""


def prepare(packages: Path, folder: Path, sizes: dict[str, int] | None = None) -> dict[str, object]:
    """Compose pictures and masks of each part as ``images/0000.png`` and ``masks/0000.png``.

    No stamp and no photograph is in two parts.

    Args:
        packages: Folder of both packages.
        folder: Folder to write to.
        sizes: Number of pictures of each part. Default: None, which means ``SIZES``.

    Returns:
        The number of stamps of each class and part, and the share of pixels of each class.
    """
    report = {}
    with tempfile.TemporaryDirectory() as unpacked:
        subprocess.run(["dpkg-deb", "-x", _one(packages, "tuxpaint-stamps-default_*.deb"), unpacked], check=True)
        parts = split_stamps(Path(unpacked, "usr/share/tuxpaint/stamps"))
        photos = read_photos(_one(packages, "scikit_image-*.whl"))
        for number, (part, size) in enumerate((sizes or SIZES).items()):
            stamps = {kind: [_read_stamp(path) for path in paths] for kind, paths in parts[part].items()}
            rng = np.random.default_rng(number)
            shares = _write(folder / part, size, stamps, photos[part], rng)
            report[part] = {
                "pictures": size,
                "stamps": {kind: len(found) for kind, found in stamps.items()},
                "pixels in %": shares,
            }
    (folder / "report.json").write_text(json.dumps(report, indent=1))
    return report


def _one(packages, pattern):
    found = sorted(Path(packages).glob(pattern))
    if len(found) != 1:
        raise SystemExit(f"--packages must have one file {pattern}, got {[path.name for path in found]}")
    return found[0]


def split_stamps(root: Path) -> dict[str, dict[str, list[Path]]]:
    """Return the stamps of each part and class: about 20 % for test, 15 % for validation, the rest for training.

    Stamps whose names begin with the same word, such as ``apple_green`` and ``apple_red``, are in one part, since they
    look alike. Pictures without an alpha channel, or without a background in it, are left out.
    """
    parts = {part: {kind: [] for kind in CLASSES[1:]} for part in SIZES}
    for kind, folders in _FOLDERS.items():
        families = defaultdict(list)
        for path in sorted(path for name in folders for path in (root / name).rglob("*.png")):
            if _is_stamp(path):
                families[_family(path)].append(path)
        ordered = sorted(families.items(), key=lambda item: hashlib.sha256(item[0].encode()).digest())
        total = sum(map(len, families.values()))
        done = 0
        for _, paths in ordered:
            part = "test" if done < 0.2 * total else "val" if done < 0.35 * total else "train"
            parts[part][kind] += paths
            done += len(paths)
    return parts


def _family(path):
    word = re.match(r"[a-z]*", path.stem.lower())[0]
    return "flag" if word.endswith("flag") else word or path.stem


def _is_stamp(path):
    image = Image.open(path)
    if image.mode not in ("RGBA", "LA") and "transparency" not in image.info:
        return False
    share = (np.asarray(image.convert("RGBA"))[..., 3] > 127).mean()
    return bool(0.02 < share < 0.97)


def _read_stamp(path):
    image = Image.open(path).convert("RGBA")
    return image.crop(image.getchannel("A").getbbox())


def read_photos(wheel: Path) -> dict[str, list[Image.Image]]:
    """Read the photographs of each part from scikit-image's package."""
    with zipfile.ZipFile(wheel) as files:
        return {
            part: [Image.open(io.BytesIO(files.read(f"skimage/data/{name}"))).convert("RGB") for name in names]
            for part, names in _PHOTOS.items()
        }


def _write(folder, size, stamps, photos, rng):
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    counts = np.zeros(256, np.int64)
    for number in range(size):
        picture, mask = compose(stamps, photos, rng)
        picture.save(folder / f"images/{number:04}.png")
        mask.save(folder / f"masks/{number:04}.png")
        counts += np.bincount(np.asarray(mask).ravel(), minlength=256)
    names = dict(enumerate(CLASSES)) | {VOID: "void"}
    return {kind: round(100 * float(counts[number] / counts.sum()), 1) for number, kind in names.items()}


def compose(stamps, photos, rng, side=SIDE):
    """Paste 1 to 4 stamps on a background.

    Args:
        stamps: RGBA pictures of each class.
        photos: Photographs for backgrounds.
        rng: numpy's random generator.
        side: Height and width in pixels.

    Returns:
        An RGB picture, and a mask with a palette: class numbers, 255 at the soft edges of objects.
    """
    picture = _background(photos, rng, side)
    mask = np.zeros((side, side), np.uint8)
    for _ in range(rng.integers(1, 5)):
        kind = CLASSES[1 + rng.integers(len(CLASSES) - 1)]
        stamp = _change(stamps[kind][rng.integers(len(stamps[kind]))], kind, rng, side)
        centre = rng.integers(side // 8, side - side // 8, 2)
        left, top = (int(middle - length // 2) for middle, length in zip(centre, stamp.size, strict=True))
        alpha = Image.new("L", (side, side))
        alpha.paste(stamp.getchannel("A"), (left, top))
        picture.paste(stamp.convert("RGB"), (left, top), stamp.getchannel("A"))
        cover = np.asarray(alpha)
        mask[cover >= 64] = VOID
        mask[cover >= 192] = CLASSES.index(kind)
    masked = Image.fromarray(mask, "P")
    masked.putpalette([0, 0, 0, 230, 80, 60, 70, 170, 60, 60, 110, 220, 240, 190, 40] + [255] * 753)
    return picture, masked


def _change(stamp, kind, rng, side):
    """Scale, turn, mirror and light a stamp at random. Letters are black: they get a random colour, no mirror image."""
    if kind == "letter":
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        plain = Image.new("RGBA", stamp.size, colour)
        plain.putalpha(stamp.getchannel("A"))
        stamp = plain
    elif rng.random() < 0.5:
        stamp = stamp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    longest = side * rng.uniform(0.3, 0.75)
    factor = longest / max(stamp.size)
    stamp = stamp.resize([max(4, round(length * factor)) for length in stamp.size], Image.Resampling.BOX)
    stamp = stamp.rotate(rng.uniform(-20, 20), Image.Resampling.BILINEAR, expand=True)
    alpha = stamp.getchannel("A")
    lit = ImageEnhance.Brightness(stamp.convert("RGB")).enhance(rng.uniform(0.7, 1.3))
    lit.putalpha(alpha)
    return lit


def _background(photos, rng, side):
    """Make a crop of a photograph in half of the cases, else two colours that blend: in a direction, or as clouds."""
    if rng.random() < 0.5:
        photo = photos[rng.integers(len(photos))]
        length = int(rng.integers(side, min(photo.size) + 1))
        left, top = (int(rng.integers(0, whole - length + 1)) for whole in photo.size)
        return photo.resize((side, side), Image.Resampling.BOX, (left, top, left + length, top + length))
    if rng.random() < 0.5:
        across, down = np.cos(angle := rng.uniform(0, 2 * np.pi)), np.sin(angle)
        blend = np.add.outer(down * np.linspace(-1, 1, side), across * np.linspace(-1, 1, side)) / 2.9 + 0.5
    else:
        rough = rng.uniform(0, 255, (2, 2) if rng.random() < 0.3 else (int(rng.integers(3, 24)),) * 2)
        clouds = Image.fromarray(rough.astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
        blend = np.asarray(clouds) / 255
    colours = rng.uniform(0, 255, (2, 3))
    values = (
        colours[0] + blend[..., None] * (colours[1] - colours[0]) + rng.normal(0, rng.uniform(0, 12), (side, side, 3))
    )
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))
