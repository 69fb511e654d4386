"""A folder of pictures with every oddity of real ones. Pictures of a class share a colour."""

import unicodedata

import numpy as np
from PIL import Image

COLORS = {"birds": (200, 40, 40), "café": (40, 200, 40), "cats": (40, 40, 200), "dogs": (200, 200, 40)}
NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def picture(kind, number, size=(18, 14)):
    """A noisy picture in the colour of its class."""
    random = np.random.default_rng([number, *kind.encode()])
    noise = random.integers(-30, 30, (size[1], size[0], 3))
    return Image.fromarray((np.array(COLORS[kind]) + noise).clip(0, 255).astype(np.uint8))


def make_odd_folder(root):
    """Write ``train``, ``test`` and ``unlabeled``; 40 training pictures, 12 of the test, 9 unlabeled ones."""
    train, test, unlabeled = root / "train", root / "test", root / "unlabeled"
    folders = {"birds": train / "birds", "café": train / NFD, "cats": train / "cats", "dogs": root / "far" / "dogs"}
    for kind, folder in folders.items():
        folder.mkdir(parents=True)
        for number in range(3 if kind == "birds" else 8):  # a class with few pictures
            picture(kind, number).save(folder / f"{number:02}.png")
    (train / "dogs").symlink_to(root / "far" / "dogs", target_is_directory=True)
    (train / "empty").mkdir()

    # other formats, thirteen in all
    cats, cafe, dogs = folders["cats"], folders["café"], folders["dogs"]
    turned = Image.Exif()
    turned[274] = 6
    picture("cats", 20, (14, 18)).save(cats / "20 turned.JPG", exif=turned, quality=95)
    picture("cats", 21).convert("P").save(cats / "21 palette.gif")
    picture("cats", 22).convert("RGBA").save(cats / "22 alpha.png")
    picture("cats", 23).convert("CMYK").save(cats / "23.jpeg", quality=95)
    picture("cats", 24).save(cats / "24.TIFF", compression="tiff_lzw")
    grey = np.array(picture("dogs", 20).convert("L"))
    Image.fromarray(grey).save(dogs / "20 grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(dogs / "21 of 16 bits.png")
    Image.fromarray(grey.astype(np.float32) / 255).save(dogs / "22 float.tiff")
    Image.fromarray(grey.astype(np.int32) * 257).save(dogs / "23 of 32 bits.TIF")
    picture("café", 20).save(cafe / unicodedata.normalize("NFD", "20 é.png"))
    picture("café", 21).save(cafe / "21.bmp")
    picture("café", 22).save(cafe / "22.webp", lossless=True)
    picture("café", 23).save(cafe / "23.PNG")

    # what is no sample
    for folder in (".ipynb_checkpoints", "__MACOSX", "cats/.thumbs"):
        (train / folder).mkdir()
        picture("cats", 50).save(train / folder / "00.png")
    (cats / "._00.png").write_bytes(b"\0\5\26\7 no picture")
    (cats / "Thumbs.db").write_bytes(b"no picture")
    (cats / "notes.txt").write_text("no picture")
    (cats / ".DS_Store").write_bytes(b"no picture")
    (cats / "broken.png").symlink_to("nowhere.png")

    # the test part lacks birds, and one picture is a copy of a training picture
    for kind, folder in (("café", NFC), ("cats", "cats"), ("dogs", "dogs")):
        (test / folder).mkdir(parents=True)
        for number in range(100, 104 if kind != "cats" else 103):
            picture(kind, number).save(test / folder / f"{number}.png")
    (test / "cats" / "copy.png").write_bytes((cats / "00.png").read_bytes())

    (unlabeled / "deep" / "er").mkdir(parents=True)
    for number, kind in enumerate(["cats", "dogs", "café"] * 3):
        place = (unlabeled, unlabeled / "deep" / "er", root / "far" / "more")[number % 3]
        place.mkdir(exist_ok=True)
        picture(kind, 200 + number).save(place / f"{number}.png")
    (unlabeled / "linked").symlink_to(root / "far" / "more", target_is_directory=True)
    (unlabeled / ".thumbs").mkdir()
    picture("cats", 51).save(unlabeled / ".thumbs" / "0.png")
    return root
