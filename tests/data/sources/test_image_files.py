"""Which files of a folder are samples, and of which class."""

import os
import unicodedata
from pathlib import Path

import pytest
import torchvision
from PIL import Image

from kd_lightning import InputError
from kd_lightning.data.sources.image_files import ClassFolders, FlatFolder

NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def write(root, *names):
    """Write small images; a name that ends with a slash is an empty folder."""
    for name in names:
        path = Path(root, name)
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            Image.new("RGB", (4, 4)).save(path, format="png")


def names_of(folder):
    """Relative paths of the images, with their classes if they have any."""
    items = folder.samples if isinstance(folder, ClassFolders) else [(path, None) for path in folder.paths]
    found = [(os.path.relpath(path, folder.root), number) for path, number in items]
    return {
        path if number is None else f"{path} of {folder.classes[number]}" for path, number in found
    }  # fmt: skip


@pytest.fixture
def report(monkeypatch):
    """The lines that were logged."""
    lines = []
    monkeypatch.setattr("kd_lightning.data.sources.report_once.rank_zero_info", lines.append)
    return lines


ORDINARY = [
    "b/1.png",
    "b/10.png",
    "b/2.JPG",
    "b/a/1.png",
    "b/a-b/1.png",
    "b/a/c/1.png",
    "a/x.webp",
    "a/ä.png",
    "C/0.tif",
]


class TestOrdinaryFolders:
    def test_samples_and_their_order_are_those_of_torchvision(self, tmp_path, report):
        write(tmp_path, *ORDINARY)
        for root in (str(tmp_path), f"{tmp_path}/"):
            ours, theirs = ClassFolders("train", root), torchvision.datasets.ImageFolder(root)
            assert ours.samples == theirs.samples
            assert ours.classes == theirs.classes == ["C", "a", "b"]
            assert ours.targets == theirs.targets
        assert len(ours) == 9 and ours.passed_over == 0 and not report

    def test_all_below_a_folder_are_sorted_by_path(self, tmp_path, report):
        write(tmp_path, *ORDINARY, "0.png")
        endings = torchvision.datasets.folder.IMG_EXTENSIONS
        found = FlatFolder("unlabeled", str(tmp_path))
        assert found.paths == sorted(str(path) for path in tmp_path.rglob("*") if path.suffix.lower() in endings)
        assert len(found) == 10 and found.passed_over == 0 and not report

    def test_items(self, tmp_path):
        write(tmp_path, "a/0.png", "b/0.png")
        image, target = ClassFolders("train", str(tmp_path))[1]
        assert (image.mode, target) == ("RGB", 1)
        assert FlatFolder("unlabeled", str(tmp_path))[1].size == (4, 4)
        assert ClassFolders("train", str(tmp_path), loader=str.upper)[0] == (f"{tmp_path}/a/0.png".upper(), 0)
        assert FlatFolder("unlabeled", str(tmp_path), str.upper)[0] == f"{tmp_path}/a/0.png".upper()


SYSTEM = [
    ".ipynb_checkpoints/0.png",
    "__MACOSX/a/0.png",
    ".thumbs/0.png",
    ".hidden.png",
    "lost+found/",
    "$RECYCLE.BIN/0.png",
    "System Volume Information/0.png",
    "a/._0.png",
    "a/.thumbs/0.png",
    "a/@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg",
    "a/deep/.ipynb_checkpoints/0-checkpoint.png",
    "a/Thumbs.db",
    "a/desktop.ini",
    "a/DESKTOP.INI",
    "a/.DS_Store",
    "__pycache__/",
]


@pytest.mark.parametrize("kind", [ClassFolders, FlatFolder])
class TestPassedOver:
    def test_system_files_and_folders(self, tmp_path, report, kind):
        write(tmp_path, *SYSTEM, "a/0.png", "b/deep/0.png")
        found = kind("train", str(tmp_path))
        wanted = {"a/0.png", "b/deep/0.png"}
        assert {name.partition(" of ")[0] for name in names_of(found)} == wanted
        assert found.passed_over == len(SYSTEM)
        (line,) = report
        assert line.startswith(f"train: {tmp_path}: passed over: {len(SYSTEM)} system files and folders (")

    @pytest.mark.parametrize("root", [".cache/train", "lost+found", "__MACOSX/.a/b"])
    def test_the_root_may_have_such_a_name(self, tmp_path, kind, root):
        write(tmp_path / root, "a/0.png")
        assert len(kind("train", str(tmp_path / root))) == 1

    def test_files_that_are_no_images(self, tmp_path, report, kind):
        write(tmp_path, "a/0.png", "a/notes.txt", "a/photo.jpg.lnk", "a/0.png~", "cats.lnk", "readme.md", "a/png")
        found = kind("train", str(tmp_path))
        assert len(found) == 1 and found.passed_over == 6
        assert "6 files whose ending is that of no image (" in report[0] and ", ...)" in report[0]

    def test_one_file_is_one(self, tmp_path, report, kind):
        write(tmp_path, "a/0.png", "a/notes.txt", "a/.DS_Store")
        kind("train", str(tmp_path))
        assert "1 file whose ending is that of no image (a/notes.txt)" in report[0]
        assert "1 system file or folder (a/.DS_Store)" in report[0]

    def test_reported_once(self, tmp_path, report, kind):
        write(tmp_path, "a/0.png", "a/notes.txt")
        for _ in range(3):
            kind("train", str(tmp_path))
        assert len(report) == 1
        write(tmp_path, "a/more.txt")
        kind("train", str(tmp_path))
        assert len(report) == 2

    def test_endings(self, tmp_path, kind):
        endings = ["jpg", "JPG", "Jpeg", "PNG", "ppm", "bmp", "pgm", "tif", "TIFF", "webp", "gif", "GIF", "jfif"]
        write(tmp_path, *(f"a/{number}.{ending}" for number, ending in enumerate(endings)))
        assert len(kind("train", str(tmp_path))) == len(endings)

    def test_names_that_are_no_text(self, tmp_path, report, kind):
        write(tmp_path, "a/0.png")
        try:
            Path(os.fsdecode(os.fsencode(tmp_path) + b"/a/\xff.txt")).write_text("")
        except OSError:
            pytest.skip("this disk takes no such name")
        kind("train", str(tmp_path))
        report[0].encode()


@pytest.mark.parametrize("kind", [ClassFolders, FlatFolder])
class TestLinks:
    @pytest.fixture
    def root(self, tmp_path):
        write(tmp_path, "root/a/0.png", "far/1.png", "far/deep/2.png", "one.png")
        return tmp_path / "root"

    def files(self, found):
        return {name.partition(" of ")[0] for name in names_of(found)}

    def test_are_followed(self, root, report, kind):
        (root / "b").symlink_to("../far")
        (root / "a" / "more").symlink_to(root.parent / "far" / "deep")
        (root / "a" / "one.png").symlink_to("../../one.png")
        found = kind("train", str(root))
        assert self.files(found) == {"a/0.png", "a/one.png", "a/more/2.png", "b/1.png", "b/deep/2.png"}
        assert found.passed_over == 0 and not report

    def test_cycles_end(self, root, report, kind):
        (root / "a" / "up").symlink_to("..")
        (root / "a" / "same").symlink_to(".")
        (root / "self").symlink_to(".")
        (root / "b").symlink_to("../far")
        (root.parent / "far" / "back").symlink_to("../root/b")
        found = kind("train", str(root))
        assert self.files(found) == {"a/0.png", "b/1.png", "b/deep/2.png"}
        assert "4 links to a folder that holds them (" in report[0]

    def test_two_that_hold_each_other_end(self, root, kind):
        (root / "a" / "far").symlink_to("../../far")
        (root.parent / "far" / "a").symlink_to("../root/a")
        assert self.files(kind("train", str(root))) == {"a/0.png", "a/far/1.png", "a/far/deep/2.png"}

    def test_broken_ones_are_passed_over(self, root, report, kind):
        (root / "a" / "gone.png").symlink_to("nowhere.png")
        (root / "a" / "gone").symlink_to("nowhere")
        (root / "dogs").symlink_to("nowhere")
        (root / "a" / "itself.png").symlink_to("itself.png")
        found = kind("train", str(root))
        assert self.files(found) == {"a/0.png"}
        assert "4 broken links (" in report[0]

    def test_special_files_are_passed_over(self, root, report, kind):
        os.mkfifo(root / "a" / "pipe.png")
        assert self.files(kind("train", str(root))) == {"a/0.png"}
        assert "1 special file (a/pipe.png)" in report[0]

    def test_the_root_may_be_one(self, root, kind, monkeypatch):
        (root.parent / "link").symlink_to("root")
        assert self.files(kind("train", str(root.parent / "link"))) == {"a/0.png"}
        monkeypatch.chdir(root.parent)
        for name in ("root", "root/", "./root", "link", "link/", "../" + root.parent.name + "/root"):
            assert self.files(kind("train", name)) == {"a/0.png"}, name
        monkeypatch.chdir(root)
        assert self.files(kind("train", ".")) == {"a/0.png"}
        monkeypatch.setenv("HOME", str(root.parent))
        assert self.files(kind("train", "~/root")) == {"a/0.png"}


class TestClasses:
    def test_images_in_no_class_folder_are_passed_over(self, tmp_path, report):
        write(tmp_path, "a/0.png", "1.png", "2.png")
        found = ClassFolders("train", str(tmp_path))
        assert names_of(found) == {"a/0.png of a"}
        assert found.passed_over == 2 and "2 images in no class folder (1.png, 2.png)" in report[0]

    def test_empty_ones_have_no_samples(self, tmp_path, report):
        write(tmp_path, "a/0.png", "b/", "c/0.png", "d/notes.txt")
        found = ClassFolders("train", str(tmp_path))
        assert found.classes == ["a", "b", "c", "d"]
        assert found.targets == [0, 2]
        assert report[-1] == f"train: 2 of 4 classes have no images in {tmp_path}: b, d"

    def test_names_in_two_forms_are_one_class(self, tmp_path, report):
        write(tmp_path, f"train/{NFD}/0.png", "train/cat/0.png", f"train/{NFC}/1.png", "train/cafz/0.png")
        write(tmp_path, f"test/{NFC}/0.png", "test/cat/0.png")
        train = ClassFolders("train", str(tmp_path / "train"))
        assert train.classes == ["cafz", NFC, "cat"]  # in the order of NFC
        assert sorted(train.targets) == [0, 1, 1, 2]
        test = ClassFolders("test", str(tmp_path / "test"), train.classes)
        assert names_of(test) == {f"{NFC}/0.png of {NFC}", "cat/0.png of cat"}

    def test_numbers_follow_names(self, tmp_path, report):
        write(tmp_path, "b/0.png", "d/0.png", "d/1.png")
        found = ClassFolders("test", str(tmp_path), ["d", "c", "b", "a"])
        assert names_of(found) == {"b/0.png of b", "d/0.png of d", "d/1.png of d"}
        assert found.targets == [0, 0, 2]
        assert report == [f"test: 2 of 4 classes have no images in {tmp_path}: c, a"]

    def test_case_matters(self, tmp_path):
        write(tmp_path, "Cat/0.png", "dog/0.png")
        with pytest.raises(InputError, match="test: classes must be those of train, cat, dog, got another class Cat"):
            ClassFolders("test", str(tmp_path), ["cat", "dog"])


class TestRefused:
    @pytest.mark.parametrize(
        ("names", "got"),
        [
            (["0.png"], "got no subfolder"),
            ([".hidden/0.png", "__MACOSX/0.png"], "got no subfolder"),
            (["a/", "b/notes.txt"], "got no image; allowed endings: .jpg"),
        ],
    )
    def test_no_class(self, tmp_path, names, got):
        write(tmp_path, *names)
        with pytest.raises(
            InputError, match=f"train: {tmp_path} must hold a subfolder of images for each class, {got}"
        ):
            ClassFolders("train", str(tmp_path))

    def test_no_image(self, tmp_path):
        write(tmp_path, "a/notes.txt", ".thumbs/0.png")
        with pytest.raises(InputError, match=f"unlabeled: no images in {tmp_path}; allowed endings: .jpg"):
            FlatFolder("unlabeled", str(tmp_path))

    @pytest.mark.parametrize("kind", [ClassFolders, FlatFolder])
    def test_no_folder(self, tmp_path, kind):
        write(tmp_path, "file.png")
        for name in ("gone", "file.png"):
            with pytest.raises(InputError, match=f"train: .*{name} must hold .*images") as error:
                kind("train", str(tmp_path / name))
            assert "\n" not in str(error.value)

    @pytest.mark.parametrize("kind", [ClassFolders, FlatFolder])
    def test_folders_that_cannot_be_read_do_not_vanish(self, tmp_path, monkeypatch, kind):
        write(tmp_path, "a/0.png", "a/closed/1.png")
        scandir = os.scandir

        def refuse(path):
            if str(path).endswith("closed"):
                raise PermissionError(13, "Permission denied", path)
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refuse)
        with pytest.raises(InputError, match="train: .*Permission denied: .*a/closed"):
            kind("train", str(tmp_path))
