import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset
from torchvision import datasets
from torchvision.transforms import v2

from kd_lightning.cache import pictures
from kd_lightning.data import decoded, file_hashes
from kd_lightning.data.decoded import DecodedPictures
from kd_lightning.data.sources import ImageFolder, RotatedClasses
from kd_lightning.data.sources.image_files import ClassFolders, FlatFolder
from kd_lightning.data.sources.images import path_of, read_image
from kd_lightning.data.sources.pixels import read_pixels
from kd_lightning.errors import InputError

SIZES = [(40, 30), (30, 40), (24, 24), (8, 9), (1, 1), (1, 5000), (300, 1), (100, 17)]


@pytest.fixture(autouse=True)
def no_memory(monkeypatch):
    """As in a new process; files of this second are noted, too."""
    monkeypatch.setattr(file_hashes, "_hashes", {})
    monkeypatch.setattr(file_hashes, "_SETTLED", -3600.0)


def save(path, size=(40, 30), seed=0, mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    values = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(values).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    """Pictures of two classes, of odd sizes, in colour and grey, one turned by its EXIF data."""
    root = tmp_path / "data"
    for number, size in enumerate(SIZES):
        save(root / f"class{number % 2}" / f"{number}.jpg", size, number)
    save(root / "class0" / "grey.jpg", (33, 44), 20, "L")
    save(root / "class1" / "grey.png", (33, 44), 21, "L")
    exif = Image.Exif()
    exif[0x0112] = 6
    save(root / "class1" / "turned.jpg", (60, 20), 22, exif=exif)
    return root


def images_of(root):
    return ClassFolders("train", str(root))


def fill(root, part, side=16, **options):
    (stored,) = DecodedPictures(root, side).fill([part], **options)
    return stored


def count_decoded(monkeypatch):
    """Paths of the files that are decoded from now on."""
    found = []
    plain = decoded.read_pixels
    monkeypatch.setattr(
        decoded, "read_pixels", lambda parts, index: found.append(path_of(parts, index)) or plain(parts, index)
    )
    return found


def names(paths):
    return sorted(Path(path).name for path in paths)


def check(stored, part, side=16):
    assert len(stored) == len(part)
    for index in range(len(part)):
        pixels = read_pixels([part], index)
        if side is not None and min(pixels.shape[1:]) > side:
            pixels = v2.Resize(side)(pixels)
        assert torch.equal(stored.pixels(index), pixels)


@pytest.mark.parametrize("side", [16, 1, None])
def test_pixels_are_those_of_a_resize(folder, tmp_path, side):
    part = images_of(folder)
    stored = fill(tmp_path / "s", part, side)
    check(stored, part, side)
    check(fill(tmp_path / "s", part, side), part, side)


def test_memory_of_a_picture(folder, tmp_path):
    stored = fill(tmp_path / "s", images_of(folder))
    pixels = read_pixels([stored], 0)
    assert (pixels.dtype, pixels.shape[0], pixels.stride()[0], pixels.stride()[2]) == (torch.uint8, 3, 1, 3)
    pixels.zero_()  # a copy
    assert read_pixels([stored], 0).any()


def test_items_are_pil_images_as_before(folder, tmp_path):
    part = images_of(folder)
    stored = fill(tmp_path / "s", part, None)
    for index in range(len(part)):
        item, before = read_image([stored], index), read_image([part], index)
        assert (item.mode, item.size) == (before.mode, before.size) == ("RGB", before.size)
        assert torch.equal(v2.functional.pil_to_tensor(item), stored.pixels(index))
        assert path_of([stored], index) == path_of([part], index)


def test_full_size_is_bit_equal_for_lossless_files(tmp_path):
    save(tmp_path / "d" / "a" / "0.png", (31, 17))
    part = images_of(tmp_path / "d")
    item = read_image([fill(tmp_path / "s", part, None)], 0)
    assert item.tobytes() == read_image([part], 0).tobytes()


def test_resize_to_the_same_side_changes_nothing_more(folder, tmp_path):
    """So evaluation with ``Resize(side)`` is the same to the bit."""
    part = images_of(folder)
    stored = fill(tmp_path / "s", part)
    index = [Path(path).name for path, _ in part.samples].index("turned.jpg")
    assert tuple(stored.pixels(index).shape) == (3, 48, 16)
    assert torch.equal(v2.Resize(16)(stored.pixels(index)), v2.Resize(16)(read_pixels([part], index)))


def test_the_size_is_announced_before_anything_is_written(folder, tmp_path, monkeypatch):
    part = images_of(folder)
    texts = []
    monkeypatch.setattr(decoded, "rank_zero_info", lambda text: texts.append((text, [*tmp_path.rglob("*.pixels")])))
    stored = fill(tmp_path / "s", part)
    ((text, written),) = texts
    assert written == []
    size = sum(stored.pixels(n).numel() for n in range(len(part)))
    assert size == sum(file.stat().st_size for file in tmp_path.rglob("*.pixels"))
    assert text.startswith(f"decoded: decoding 11 pictures, {size / 1024:.1f} KiB, into {tmp_path / 's'}/pictures-")
    assert text.endswith("are free")
    fill(tmp_path / "s", part)
    assert len(texts) == 1  # nothing more to decode
    monkeypatch.setattr(decoded, "_HEADERS", 5)
    fill(tmp_path / "other", part)
    assert "pictures, about " in texts[1][0]


def test_no_room(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("", (), {"free": 100}))
    with pytest.raises(InputError, match=r"decoded: .* KiB of pictures do not fit into .*, where 100 bytes are free"):
        fill(tmp_path / "s", images_of(folder))
    assert [*tmp_path.rglob("*.pixels")] == []


def test_files_that_are_renamed_changed_added_and_removed(folder, tmp_path, monkeypatch):
    fill(tmp_path / "s", images_of(folder))
    found = count_decoded(monkeypatch)
    (folder / "class0" / "0.jpg").rename(folder / "class1" / "renamed.jpg")
    (folder / "class1" / "1.jpg").unlink()
    save(folder / "class0" / "2.jpg", (24, 24), 99)
    save(folder / "class0" / "added.jpg", (24, 24), 100)
    shutil.copy(folder / "class1" / "5.jpg", folder / "class0" / "copy.jpg")
    part = images_of(folder)
    stored = fill(tmp_path / "s", part)
    assert names(found) == ["2.jpg", "added.jpg"]
    check(stored, part)


def test_a_file_that_changes_with_size_and_time_kept(folder, tmp_path, monkeypatch):
    path = folder / "class0" / "0.jpg"
    save(path.with_suffix(".bmp"), (24, 24), 1)
    path.with_suffix(".bmp").rename(path)  # uncompressed: the size is that of any other
    part = images_of(folder)
    store = DecodedPictures(tmp_path / "s", 16)
    store.recall([part])
    store.fill([part])
    state = path.stat()
    save(path.with_suffix(".bmp"), (24, 24), 2)
    path.with_suffix(".bmp").rename(path)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (state.st_size, state.st_mtime_ns)
    monkeypatch.setattr(file_hashes, "_hashes", {})
    monkeypatch.setattr(file_hashes, "_SAMPLE", (0, 0, 0))
    again = DecodedPictures(tmp_path / "s", 16)
    again.recall([part])
    (stored,) = again.fill([part])
    check(stored, part)


def test_a_start_reads_no_file_but_the_sample(folder, tmp_path, monkeypatch):
    part = images_of(folder)
    store = DecodedPictures(tmp_path / "s", 16)
    store.recall([part])
    store.fill([part])
    monkeypatch.setattr(file_hashes, "_hashes", {})
    monkeypatch.setattr(file_hashes, "_SAMPLE", (0, 2, 2))
    read = []
    plain = file_hashes._read_and_hash
    monkeypatch.setattr(file_hashes, "_read_and_hash", lambda path: read.append(path) or plain(path))
    found = count_decoded(monkeypatch)
    again = DecodedPictures(tmp_path / "s", 16)
    again.recall([part])
    (stored,) = again.fill([part])
    assert (len(read), found) == (2, [])
    shutil.rmtree(folder)  # an epoch needs no image file
    assert [stored.pixels(n).shape[0] for n in range(len(part))] == [3] * 11


def test_equal_files_are_stored_once_and_data_sets_share(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "copy")
    found = count_decoded(monkeypatch)
    both = ConcatDataset([images_of(folder), FlatFolder("unlabeled", str(tmp_path / "copy"))])
    check(fill(tmp_path / "s", both), both)
    assert len(found) == 11
    found.clear()
    fill(tmp_path / "s", FlatFolder("unlabeled", str(tmp_path / "copy")))
    assert found == []


def test_another_side_or_rule_decodes_again(folder, tmp_path, monkeypatch):
    part = images_of(folder)
    fill(tmp_path / "s", part)
    found = count_decoded(monkeypatch)
    check(fill(tmp_path / "s", part, 8), part, 8)
    assert len(found) == 11
    monkeypatch.setattr(decoded, "RULES", 2)
    fill(tmp_path / "s", part)
    assert len(found) == 22


def test_subsets_joined_and_rotated_parts(folder, tmp_path):
    part = images_of(folder)
    joined = ConcatDataset([Subset(part, [5, 0, 0]), FlatFolder("unlabeled", str(folder))])
    nested = Subset(joined, [4, 2, 0, 13])
    check(fill(tmp_path / "s", nested), nested)
    rotated = RotatedClasses(ImageFolder(str(folder))).load().train.images
    stored = fill(tmp_path / "s", rotated, None)
    assert len(stored) == 44
    for index in range(44):
        assert torch.equal(stored.pixels(index), torch.rot90(read_pixels([part], index % 11), index // 11, (1, 2)))
        expected = read_image([part], index % 11).rotate(90 * (index // 11), expand=True)
        assert read_image([stored], index).size == expected.size
    again = fill(tmp_path / "s", RotatedClasses(RotatedSource(folder)).load().train.images, None)
    assert torch.equal(again.pixels(11 + 44), torch.rot90(read_pixels([part], 0), 2, (1, 2)))


class RotatedSource(RotatedClasses):
    """Rotated pictures as a source, to rotate them once more."""

    def __init__(self, folder):
        super().__init__(ImageFolder(str(folder)))


def test_workers_read_the_same(folder, tmp_path):
    stored = fill(tmp_path / "s", images_of(folder))
    stored.pixels(0)  # the files are mapped
    options = {"batch_size": 4, "collate_fn": lambda batch: [v2.functional.pil_to_tensor(one) for one in batch]}
    for workers in (0, 2):
        found = [one for batch in DataLoader(stored, num_workers=workers, **options) for one in batch]
        assert all(torch.equal(one, stored.pixels(n)) for n, one in enumerate(found))
    again = pickle.loads(pickle.dumps(stored))  # as a worker process that starts anew
    assert torch.equal(again.pixels(3), stored.pixels(3))
    assert len(pickle.dumps(stored)) < 5000  # no pictures


def test_a_damaged_store_ends_a_worker_in_one_line(folder, tmp_path):
    stored = fill(tmp_path / "s", images_of(folder))
    (file,) = tmp_path.rglob("*.pixels")
    data = bytearray(file.read_bytes())
    file.write_bytes(bytes(value ^ 1 for value in data))
    with pytest.raises(InputError, match=r"decoded: .*\.pixels is damaged: a picture does not match its checksum"):
        stored.pixels(0)
    file.unlink()
    check(fill(tmp_path / "s", images_of(folder)), images_of(folder))


def test_a_truncated_store_is_completed(folder, tmp_path, monkeypatch):
    fill(tmp_path / "s", images_of(folder))
    (file,) = tmp_path.rglob("*.pixels")
    os.truncate(file, file.stat().st_size - 1)
    found = count_decoded(monkeypatch)
    check(fill(tmp_path / "s", images_of(folder)), images_of(folder))
    assert len(found) == 1


def test_a_complete_store_is_only_read(folder, tmp_path, monkeypatch):
    part = images_of(folder)
    store = DecodedPictures(tmp_path / "s", 16)
    store.recall([part])
    store.fill([part])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s", *(tmp_path / "s").rglob("*"))}
    monkeypatch.setattr(file_hashes, "_hashes", {})
    again = DecodedPictures(tmp_path / "s", 16)
    again.recall([part])
    check(again.fill([part])[0], part)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "s", *(tmp_path / "s").rglob("*"))} == before


def test_a_damaged_image_is_named_and_the_others_are_stored(folder, tmp_path, monkeypatch):
    path = folder / "class0" / "2.jpg"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(InputError, match=r"image .*2\.jpg cannot be read"):
        fill(tmp_path / "s", images_of(folder))
    path.unlink()
    check(fill(tmp_path / "s", images_of(folder), threads=2), images_of(folder))


def test_a_header_without_a_size(folder, tmp_path):
    """What PIL cannot open is decoded to learn its size, and then named if that fails, too."""
    (folder / "class0" / "2.jpg").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"image .*2\.jpg cannot be read"):
        fill(tmp_path / "s", images_of(folder))


def test_an_image_that_changes_while_it_is_decoded(folder, tmp_path, monkeypatch):
    plain = decoded.read_pixels

    def read(parts, index):
        pixels = plain(parts, index)
        save(folder / "class0" / "0.jpg", (40, 30), 77)
        return pixels

    part = Subset(images_of(folder), [0])
    with monkeypatch.context() as patch:
        patch.setattr(decoded, "read_pixels", read)
        with pytest.raises(InputError, match=r"decoded: image .*0\.jpg changes while it is read; start again"):
            fill(tmp_path / "s", part)
    check(fill(tmp_path / "s", part), part)


class Loader:
    """A user's loader; its text decides what it returns."""

    def __init__(self, kind):
        self.kind = kind

    def __call__(self, path):
        image = Image.open(path).convert("RGB")
        tensor = v2.functional.pil_to_tensor(image)
        return {
            "pil": lambda: image,
            "grey": lambda: image.convert("L"),
            "tensor": lambda: tensor,
            "red": lambda: tensor[:1],
            "random": lambda: torch.randint_like(tensor, 256),
            "path": lambda: tensor // (1 + len(Path(path).name) % 7),
            "float": lambda: tensor / 255,
            "wide": lambda: tensor.to(torch.int16),
            "alpha": lambda: image.convert("RGBA"),
            "flat": lambda: tensor[0],
            "empty": lambda: tensor[:, :0],
        }[self.kind]()


@pytest.mark.parametrize("kind", ["pil", "grey", "tensor", "red"])
def test_a_users_loader(folder, tmp_path, kind):
    fill(tmp_path / "s", images_of(folder))
    part = ClassFolders("train", str(folder), loader=Loader(kind))
    stored = fill(tmp_path / "s", part)
    check(stored, part)
    assert len([*(tmp_path / "s").glob("pictures-*")]) == 2
    assert type(read_image([stored], 0)) is type(read_image([part], 0))
    if kind in ("pil", "grey"):
        assert read_image([stored], 0).mode == read_image([part], 0).mode


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("float", r"must be uint8 \(C, H, W\) with 1 or 3 channels, got float32 \[3, 30, 40\] for .*0\.jpg; remove"),
        ("wide", r"got int16 \[3, 30, 40\]"),
        ("alpha", r"got uint8 \[4, 30, 40\]"),
        ("flat", r"got uint8 \[30, 40\]"),
        ("empty", r"got uint8 \[3, 0, 40\]"),
        ("random", r"loader must return one picture for equal files, got different ones for .*0\.jpg and .*0\.jpg"),
    ],
)
def test_pictures_that_cannot_be_stored(tmp_path, kind, message):
    save(tmp_path / "d" / "a" / "0.jpg")
    with pytest.raises(InputError, match=f"decoded: .*{message}") as caught:
        fill(tmp_path / "s", ClassFolders("train", str(tmp_path / "d"), loader=Loader(kind)))
    assert "\n" not in str(caught.value)


def test_a_loader_that_reads_more_than_the_file(tmp_path):
    save(tmp_path / "d" / "a" / "0.jpg")
    shutil.copy(tmp_path / "d" / "a" / "0.jpg", tmp_path / "d" / "a" / "other.jpg")
    with pytest.raises(
        InputError, match=r"one picture for equal files, got different ones for .*0\.jpg and .*other\.jpg"
    ):
        fill(tmp_path / "s", ClassFolders("train", str(tmp_path / "d"), loader=Loader("path")))


class Own(Dataset):
    paths = ["a.png"]

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return torch.zeros(3, 4, 4, dtype=torch.uint8)


class OwnFolder(ClassFolders):
    """A subclass may return anything."""


def test_images_that_no_loader_reads_are_refused(folder, tmp_path):
    parts = [
        TensorDataset(torch.zeros(3, 3, 4, 4)),
        Own(),
        OwnFolder("train", str(folder)),
        datasets.ImageFolder(str(folder), transform=v2.ColorJitter(0.5)),
        ConcatDataset([images_of(folder), TensorDataset(torch.zeros(3, 3, 4, 4))]),
    ]
    for part in parts:
        store = DecodedPictures(tmp_path / "s")
        for action in (store.recall, store.fill):
            with pytest.raises(InputError, match="decoded: images must be read from files by a loader"):
                action([part])
    mixed = ConcatDataset([images_of(folder), ClassFolders("train", str(folder), loader=Loader("pil"))])
    with pytest.raises(InputError, match="decoded: all images of a part must have one loader"):
        fill(tmp_path / "s", mixed)
    assert not (tmp_path / "s").exists()


def test_a_folder_of_torchvision(folder, tmp_path):
    part = datasets.ImageFolder(str(folder))
    check(fill(tmp_path / "s", part), part)


@pytest.mark.parametrize("side", [0, -1, True, 2.5, "8"])
def test_side_out_of_range(tmp_path, side):
    with pytest.raises(InputError, match="decoded_side must be .*at least 1, got"):
        DecodedPictures(tmp_path, side)


def test_random_generators_stay_as_they_are(folder, tmp_path):
    torch.manual_seed(0), np.random.seed(0)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(0), np.random.seed(0)
    store = DecodedPictures(tmp_path / "s", 16)
    store.recall([images_of(folder)])
    store.fill([images_of(folder)])
    assert (torch.rand(1), np.random.rand()) == expected


class Rank:
    """A trainer of two processes, whose other one has this error."""

    world_size, local_rank, is_global_zero, progress_bar_callback = 2, 1, False, None

    def __init__(self, monkeypatch, error):
        def gather(gathered, value):
            gathered[:] = [error, value]

        monkeypatch.setattr(torch.distributed, "all_gather_object", gather)


def test_an_error_on_one_process_is_raised_on_all(folder, tmp_path, monkeypatch):
    part = images_of(folder)
    store = DecodedPictures(tmp_path / "s", 16)
    trainer = Rank(monkeypatch, "image x.jpg cannot be read")
    for action in (store.recall, store.fill):
        with pytest.raises(InputError, match=r"^image x\.jpg cannot be read$"):
            action([part], trainer)
    trainer = Rank(monkeypatch, "")
    store.recall([part], trainer)
    assert not (tmp_path / "s" / "files").exists()  # local rank 0 writes the notes
    check(store.fill([part], trainer)[0], part)


def test_a_hidden_change_that_one_process_finds_makes_all_read_the_files(folder, tmp_path, monkeypatch):
    part = images_of(folder)
    DecodedPictures(tmp_path / "s").recall([part])
    monkeypatch.setattr(file_hashes, "_SAMPLE", (0, 0, 0))
    read = []
    plain = file_hashes._read_and_hash
    monkeypatch.setattr(file_hashes, "_read_and_hash", lambda path: read.append(path) or plain(path))

    def gather(gathered, value):
        gathered[:] = [True if value is False else value, value]

    trainer = Rank(monkeypatch, "")
    for other, expected in ((lambda gathered, value: gathered.__setitem__(0, value), 0), (gather, 11)):
        monkeypatch.setattr(torch.distributed, "all_gather_object", other)
        DecodedPictures(tmp_path / "s").recall([part], trainer)
        assert len(read) == expected


def test_lock_files_are_free_after_a_fit(folder, tmp_path):
    fill(tmp_path / "s", images_of(folder))
    (place,) = (tmp_path / "s").glob("pictures-*")
    locks = [*(place / "locks").iterdir()]
    assert 0 < len(locks) <= 11
    store = pictures.PictureStore(tmp_path / "s", {})
    store.folder = place
    for lock in locks:
        with store._lock(int(lock.name)).acquire(timeout=0):
            pass
