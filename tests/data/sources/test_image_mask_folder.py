"""Pictures and masks as files: pairs, class numbers of any PNG, orientation, and what is refused."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from kd_lightning import ImageMaskFolder, InputError, SemiSupervisedDataModule
from kd_lightning.data.sources import mask_files
from kd_lightning.data.sources.dense_labels import LabelRules, read_labeled
from kd_lightning.data.sources.mask_files import MaskFiles, read_mask
from kd_lightning.data.transforms import Compose, RandomCrop, RandomHorizontalFlip

HEIGHT, WIDTH, CLASSES = 10, 14, 4


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(mask_files, "_warned", set())


def numbers(seed, height=HEIGHT, width=WIDTH):
    return np.random.default_rng(seed).integers(0, CLASSES, (height, width), dtype=np.uint8)


def write(folder, name, mask, *, ending=".png", orientation=None, masked=True):
    """Write a picture that shows a mask, and the mask."""
    picture = folder / "images" / f"{name}{ending}"
    picture.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    shown = Image.fromarray(np.stack([mask * 60] * 3, -1))
    shown.save(picture, **({"quality": 100, "subsampling": 0} if ending == ".jpg" else {}), exif=exif)
    path = folder / "masks" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    if masked:
        Image.fromarray(mask).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    for number in range(6):
        write(tmp_path / "train", f"{'ab'[number % 2]}/é {number}", numbers(number), masked=number not in (1, 4))
    for number in range(3):
        write(tmp_path / "test", str(number), numbers(10 + number))
    (tmp_path / "more" / "images").mkdir(parents=True)
    (tmp_path / "more" / "masks").mkdir()
    for number in range(2):
        Image.fromarray(numbers(20 + number)).save(tmp_path / "more" / "images" / f"{number}.png")
        Image.fromarray(numbers(20 + number)).save(tmp_path / "more" / "masks" / f"{number}.png")
    return tmp_path


def source(folder, **kwargs):
    parts = {name: str(folder / path) for name, path in (("train", "train"), ("test", "test"), ("unlabeled", "more"))}
    return ImageMaskFolder(**(parts | {"class_names": [*"abcd"], "image_size": (HEIGHT, WIDTH)} | kwargs))


def test_parts(folder, caplog):
    with caplog.at_level("INFO"):
        parts = source(folder).load()
    assert "train: 2 of 6 pictures" in caplog.text and "have no mask: unlabeled" in caplog.text
    assert parts.train.dense and parts.test.dense
    paths = [path.rpartition("/")[2] for path in parts.train.images.paths]
    assert paths == ["é 0.png", "é 2.png", "é 4.png", "é 1.png", "é 3.png", "é 5.png"]
    assert parts.train.targets.tolist() == [0, 0, -100, -100, 0, 0]
    assert parts.test.targets.tolist() == [0, 0, 0]
    assert len(parts.unlabeled) == 2  # its masks are no pictures
    assert (parts.void, parts.class_names) == (255, [*"abcd"])
    picture, mask = parts.train.images[1]
    assert np.array_equal(np.asarray(picture)[:, :, 0], numbers(2) * 60)
    assert torch.equal(mask, torch.from_numpy(numbers(2)).long())
    assert parts.train.images[2][1] is None


@pytest.mark.parametrize("workers", [0, 2])
def test_batches(folder, workers):
    transform = Compose([RandomCrop((8, 8), padding=2, fill=7), RandomHorizontalFlip()])
    data = SemiSupervisedDataModule(
        source(folder),
        train_transform=transform,
        eval_transform=Compose([]),
        labeled=2,
        val_size=1,
        batch_size=3,
        unlabeled="source",
        num_workers=workers,
    )
    count = 0
    for batch in data.train_dataloader():
        for x, y, number in zip(batch.x, batch.y, batch.index.tolist(), strict=True):
            if number in data.split.labeled:
                assert torch.equal(y == -100, x[0] == 7)
                assert torch.equal(y[y != -100], x[0][y != -100].long() // 60)
            else:
                assert (y == -100).all()
            count += 1
    assert count == 4
    for loader, seeds in ((data.val_dataloader(), None), (data.test_dataloader(), [10, 11, 12])):
        for batch in loader:
            assert torch.equal(batch.y, batch.x[:, 0].long() // 60)
            if seeds:
                assert batch.y.tolist() == [numbers(seed).tolist() for seed in seeds]


def test_the_default_transforms(folder):
    data = SemiSupervisedDataModule(source(folder, image_size=8), val_size=0, batch_size=2)
    batch = next(iter(data.train_dataloader()))
    assert batch.x.shape == (2, 3, 8, 8) and batch.y.shape == (2, 8, 8)
    assert {*batch.y.unique().tolist()} <= {-100, *range(CLASSES)}
    assert next(iter(data.test_dataloader())).y.shape == (2, 8, 8)


# Files.


def png(bits, kind, rows, palette=()):
    """A PNG of any number of bits, of packed rows."""

    def chunk(name, content):
        content = name + content
        return struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))

    width = len(rows[0]) * 8 // bits
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), bits, kind, 0, 0, 0))
    colors = chunk(b"PLTE", bytes(palette)) if palette else b""
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + colors
        + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + r for r in rows)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("bits", "kind", "row", "expected"),
    [
        (1, 0, bytes([0b01010011]), [0, 1, 0, 1, 0, 0, 1, 1]),
        (2, 0, bytes([0b00011011]), [0, 1, 2, 3]),  # which Pillow opens as 0, 85, 170, 255
        (4, 0, bytes([0x01, 0x2F]), [0, 1, 2, 15]),  # as 0, 17, 34, 255
        (8, 0, bytes([0, 1, 2, 255]), [0, 1, 2, 255]),
        (16, 0, struct.pack(">4H", 0, 1, 300, 65535), [0, 1, 300, 65535]),
        (1, 3, bytes([0b01010011]), [0, 1, 0, 1, 0, 0, 1, 1]),
        (2, 3, bytes([0b00011011]), [0, 1, 2, 3]),
        (4, 3, bytes([0x01, 0x2F]), [0, 1, 2, 15]),
        (8, 3, bytes([0, 1, 2, 15]), [0, 1, 2, 15]),
    ],
)
def test_class_numbers_of_any_png(tmp_path, bits, kind, row, expected):
    palette = [200, 3, 7] * 16 if kind == 3 else ()
    (tmp_path / "a.png").write_bytes(png(bits, kind, [row, row], palette[: 3 * 2**bits]))
    assert read_mask(str(tmp_path / "a.png")).tolist() == [expected] * 2


def test_void_and_classes_beyond_the_names(folder):
    path = folder / "train" / "masks" / "a" / "é 0.png"
    mask = numbers(0)
    mask[0, 0], mask[1, 1] = 255, 3

    def labels(**kwargs):
        Image.fromarray(mask).save(path)
        data = SemiSupervisedDataModule(
            source(folder, **kwargs), eval_transform=Compose([]), train_transform=Compose([]), val_size=0
        )
        batch = next(iter(data.train_dataloader()))
        return batch.y[batch.index == 0][0]

    found = labels()
    assert found[0, 0] == -100 and int((found == -100).sum()) == 1
    assert torch.equal(found[1:], torch.from_numpy(mask[1:]).long())
    assert (labels(void=3) == -100).sum() == (mask == 3).sum() if mask.max() < 4 else True
    message = r"^class_names must name all classes, but there are 4 names, and mask .*a/é 0.png has class 255"
    with pytest.raises(InputError, match=message) as caught:
        labels(void=None)
    assert "\n" not in str(caught.value) and str(caught.value).endswith("void: 255 leaves out positions of 255")
    mask[0, 0] = 4
    with pytest.raises(InputError, match=r"é 0.png has class 4 \(classes count from 0\)$"):
        labels()
    assert labels(class_names=None)[0, 0] == 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(HEIGHT, WIDTH), (12, 12)])
@pytest.mark.parametrize("ending", [".png", ".jpg"])
def test_orientation(tmp_path, orientation, size, ending, recwarn):
    """A mask fits the picture as it is seen; where its size fits only the pixels of the file, it turns with them."""
    mask = numbers(3, *size)
    turned = np.array(_turn(Image.fromarray(mask), orientation))
    for name, drawn in (("seen", turned), ("file", mask)):
        path = write(tmp_path / name, "a", mask, ending=ending, orientation=orientation)
        Image.fromarray(np.ascontiguousarray(drawn)).save(path)
    for name in ("seen", "file"):
        files = MaskFiles("train", str(tmp_path / name))
        undecided = orientation in (2, 3, 4) or (orientation > 4 and size[0] == size[1])
        picture, found = files[0]
        pixels, label = read_labeled([files], 0, LabelRules(CLASSES), visible=True, as_pixels=True)
        assert torch.equal(label, found)
        assert found.shape == pixels.shape[1:] == (picture.height, picture.width)
        if name == "seen" or not undecided:
            assert np.array_equal(found.numpy(), turned)
            assert (pixels[0].float() / 60 - found).abs().max() < 0.3
        warned = ["turned by its EXIF orientation" in str(one.message) for one in recwarn]
        assert sum(warned) == undecided  # once


def _turn(image, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, "png", exif=exif)
    from PIL import ImageOps

    return ImageOps.exif_transpose(Image.open(file))


def break_color(folder):
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "masks" / "x.png")
    return r"x\.png must be a picture of class numbers, grey or with a palette, got a colour picture of mode RGB"


def break_alpha(folder):
    Image.new("LA", (WIDTH, HEIGHT)).save(folder / "masks" / "x.png")
    return r"x\.png must be a picture of class numbers, .* of mode LA"


def break_size(folder):
    Image.new("L", (WIDTH - 1, HEIGHT)).save(folder / "masks" / "x.png")
    return r"x\.png must have the size of its picture, 14 x 10, got 13 x 10"


def break_turned(folder):
    Image.new("L", (HEIGHT, WIDTH)).save(folder / "masks" / "x.png")
    return r"x\.png must have the size of its picture, 14 x 10, got 10 x 14"


def break_file(folder):
    (folder / "masks" / "x.png").write_bytes((folder / "masks" / "x.png").read_bytes()[:60])
    return r"mask .*x\.png cannot be read"


def break_ending(folder):
    Image.new("L", (WIDTH, HEIGHT)).save(folder / "masks" / "x.png", format="jpeg")
    return r"x\.png must be PNG, which keeps class numbers exact, got JPEG"


def break_jpeg(folder):
    Image.new("L", (WIDTH, HEIGHT)).save(folder / "masks" / "y.jpg")
    return r"train: masks must be PNG, .* got .*y\.jpg"


def break_orphan(folder):
    Image.new("L", (WIDTH, HEIGHT)).save(folder / "masks" / "x_mask.png")
    return r"train: mask .*x_mask\.png has no picture; images/ must have a file of the same name but for the ending"


def break_twice(folder):
    Image.new("L", (WIDTH, HEIGHT)).save(folder / "images" / "x.jpg")
    return r"train: .*x\.(jpg|png) and .*x\.(jpg|png) have one name but for the ending"


def break_mask_twice(folder):
    Image.new("L", (WIDTH, HEIGHT)).save(folder / "masks" / "x.bmp")
    return r"train: .*x\.(bmp|png) and .*x\.(bmp|png) have one name but for the ending"


def break_masks(folder):
    (folder / "masks").rename(folder / "labels")
    return r"train: .*masks must hold images"


def break_images(folder):
    (folder / "images").rename(folder / "pictures")
    return r"train: .*images must hold images"


BREAKS = [value for name, value in sorted(globals().items()) if name.startswith("break_")]


@pytest.mark.parametrize("change", BREAKS)
@pytest.mark.parametrize("whole", [True, False])
def test_what_is_refused(tmp_path, change, whole):
    """In one line, with the name of the file."""
    write(tmp_path, "x", numbers(0))
    message = change(tmp_path)
    transform = None if whole else _identity
    data = SemiSupervisedDataModule(ImageMaskFolder(str(tmp_path)), val_size=0, train_transform=transform)
    with pytest.raises(InputError, match=message) as caught:
        [*data.train_dataloader()]
    assert "\n" not in str(caught.value)


def _identity(entries):
    return entries


@pytest.mark.parametrize("void", [-1, True, 2.0])
def test_values_out_of_range(void):
    with pytest.raises(InputError, match="void must be a class number"):
        ImageMaskFolder("x", void=void)
    with pytest.raises(InputError, match="image_size"):
        ImageMaskFolder("x", image_size=0)


def test_a_mask_that_is_not_seen_is_not_read(tmp_path):
    for name in "ab":
        write(tmp_path, name, numbers(0))
    data = SemiSupervisedDataModule(ImageMaskFolder(str(tmp_path)), labeled=1, val_size=0, batch_size=2)
    data.setup("")
    hidden = data.split.unlabeled[0]
    (tmp_path / "masks" / f"{'ab'[hidden]}.png").write_bytes(b"broken")
    for transform in (None, _identity):
        data.train_transform = transform or data.train_transform
        batch = next(iter(data.train_dataloader()))
        assert (batch.y[batch.index == hidden] == -100).all()
        assert (batch.y[batch.index != hidden] != -100).any()


@pytest.mark.parametrize("side", [None, 5])
def test_decoded_pictures(folder, side):
    """The pictures of a store, with their masks, of the size of the store."""
    options = {"eval_transform": Compose([]), "train_transform": Compose([]), "val_size": 0, "batch_size": 2}
    plain = SemiSupervisedDataModule(source(folder), **options)
    stored = SemiSupervisedDataModule(source(folder), decoded=folder / "store", decoded_side=side, **options)
    for kind in ("train", "test"):
        for one, other in zip(
            getattr(plain, f"{kind}_dataloader")(), getattr(stored, f"{kind}_dataloader")(), strict=True
        ):
            assert torch.equal(one.index, other.index)
            if side is None:
                assert torch.equal(one.x, other.x) and torch.equal(one.y, other.y)
                continue
            assert other.x.shape[2:] == other.y.shape[1:] == (5, 7)
            assert torch.equal(other.y, one.y[:, 1::2, 1::2])  # the nearest of the centres
