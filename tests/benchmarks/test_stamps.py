"""Composed pictures for segmentation: no stamp is in two parts, and masks lie on what was pasted."""

import importlib
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

COLOURS = {"animals": (200, 0, 0), "food": (0, 200, 0), "town": (0, 0, 200)}
LETTERS = "symbols/alphabets/english/filled"


@pytest.fixture(scope="module")
def stamps(root):
    """The script, which lies in no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root / "benchmarks"))
        return importlib.import_module("stamps")


def save_stamp(path, colour, alpha=True):
    image = Image.new("RGBA" if alpha else "RGB", (200, 150), (*colour, 0)[: 4 if alpha else 3])
    ImageDraw.Draw(image).ellipse((40, 25, 160, 125), (*colour, 255)[: 4 if alpha else 3])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """20 stamps of each class, in families of two, and a picture without a hole."""
    root = tmp_path_factory.mktemp("stamps")
    for folder, colour in (COLOURS | {LETTERS: (0, 0, 0)}).items():
        for number in range(10):
            word = "abcdefghij"[number] * 3
            save_stamp(root / folder / f"{word}_one.png", colour)
            save_stamp(root / folder / "more" / f"{word}-2.png", colour)
    save_stamp(root / "animals/opaque.png", (1, 2, 3), alpha=False)
    return root


def test_no_stamp_or_family_is_in_two_parts(stamps, tree):
    parts = stamps.split_stamps(tree)
    assert parts == stamps.split_stamps(tree)
    for kind in stamps.CLASSES[1:]:
        paths = [path for part in parts.values() for path in part[kind]]
        assert len(paths) == len({*paths}) == 20  # the opaque one is left out
        families = [{path.stem[:3] for path in part[kind]} for part in parts.values()]
        assert sum(map(len, families)) == len(set.union(*families)) == 10
        assert [len(parts[part][kind]) for part in ("train", "val", "test")] == [12, 4, 4]
        assert len({path.relative_to(tree).parts[0] for path in paths}) == 1


def test_masks_lie_on_what_was_pasted(stamps, tree):
    parts = stamps.split_stamps(tree)["train"]
    found = {kind: [stamps._read_stamp(path) for path in paths] for kind, paths in parts.items()}
    grey = [Image.new("RGB", (80, 70), (128, 128, 128))]
    seen = set()
    for seed in range(60):
        picture, mask = stamps.compose(found, grey, np.random.default_rng(seed))
        pixels, labels = np.asarray(picture).astype(int), np.asarray(mask)
        assert pixels.shape == (64, 64, 3) and labels.shape == (64, 64) and mask.mode == "P"
        seen |= {*np.unique(labels).tolist()}
        for number, channel in ((1, 0), (2, 1), (3, 2)):  # one channel is above the others
            others = [c for c in range(3) if c != channel]
            inside = pixels[labels == number]
            assert (inside[:, channel] > inside[:, others].max(axis=1) + 20).all()
        again = stamps.compose(found, grey, np.random.default_rng(seed))
        assert (np.asarray(again[0]) == pixels).all() and (np.asarray(again[1]) == labels).all()
    assert seen == {0, 1, 2, 3, 4, stamps.VOID}


def test_files(stamps, tree, tmp_path, monkeypatch):
    def unpack(command, check):
        Path(command[-1], "usr/share/tuxpaint").mkdir(parents=True)
        Path(command[-1], "usr/share/tuxpaint/stamps").symlink_to(tree)

    monkeypatch.setattr(stamps.subprocess, "run", unpack)
    photo = io.BytesIO()
    Image.new("L", (70, 90), 99).save(photo, "PNG")
    with zipfile.ZipFile(tmp_path / "scikit_image-1.whl", "w") as wheel:
        for names in stamps._PHOTOS.values():
            for name in names:
                wheel.writestr(f"skimage/data/{name}", photo.getvalue())
    with pytest.raises(SystemExit, match="tuxpaint"):
        stamps.prepare(tmp_path, tmp_path / "data")
    (tmp_path / "tuxpaint-stamps-default_1_all.deb").touch()
    sizes = {"train": 5, "val": 2, "test": 3}
    report = stamps.prepare(tmp_path, tmp_path / "data", sizes)
    for part, size in sizes.items():
        names = [f"{number:04}.png" for number in range(size)]
        for folder in ("images", "masks"):
            assert sorted(path.name for path in (tmp_path / "data" / part / folder).iterdir()) == names
        assert report[part]["pictures"] == size
        assert sum(report[part]["pixels in %"].values()) == pytest.approx(100, abs=0.5)
    assert not {*stamps._PHOTOS["train"]} & {*stamps._PHOTOS["val"], *stamps._PHOTOS["test"]}
