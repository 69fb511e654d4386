"""Label files: CSV and Parquet, samples by index and by path, and what is refused by line."""

import os
import time
from pathlib import Path

import pyarrow
import pytest
import torch
from pyarrow import parquet
from torch.utils.data import Subset, TensorDataset

from kd_lightning import InputError
from kd_lightning.data.identity import Identities
from kd_lightning.data.labels.label_file import LabelRow, read_label_file

NAMES = ["cat", "dog", "car"]
GROUPS = ["animal", "vehicle"]
IMAGES = [TensorDataset(torch.zeros(8, 1)), TensorDataset(torch.zeros(4, 1))]


class Files:
    """Images with paths."""

    def __init__(self, paths):
        self.paths = [str(path) for path in paths]

    def __len__(self):
        return len(self.paths)


@pytest.fixture
def read(tmp_path):
    def run(text, images=IMAGES, name="labels.csv", names=NAMES, **kwargs):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return read_label_file(path, images, class_names=names, **{"group_names": GROUPS} | kwargs)

    return run


def test_all_kinds(read):
    rows = "5,dog,,\n3,1,noisy,0.5\n0,vehicle,coarse,\n11,,missing,\n1,2.0,clean,0\n7,1,coarse,2\n"
    assert read("index,label,kind,weight\n" + rows) == [
        LabelRow(0, "vehicle", "coarse", 1.0),
        LabelRow(1, 2, "clean", 0.0),
        LabelRow(3, 1, "noisy", 0.5),
        LabelRow(5, 1, "clean", 1.0),
        LabelRow(7, "vehicle", "coarse", 2.0),
        LabelRow(11, -1, "missing", 1.0),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "index,label\n5,dog\n",
        "\ufeffindex,label\n5,dog\n",  # as Excel writes it
        "index,label\r\n5,dog\r\n\r\n",
        "index;label\r\n5;dog\r\n",  # as Excel writes it where the decimal sign is a comma
        "index\tlabel\n5\tdog\n",
        '"index";"path";"label"\n"5";"a, b";"dog"\n',
        "label , index\n dog , 5 \n",
        "index,score,label,note\n5,0.3,dog,\n6,0.2,,later\n",
        "index,path,label\n5.0,elsewhere/x.png,dog\n",  # a path of images that have none
        'index,label,note\n5,dog,"two\nlines"\n',
    ],
)
def test_ways_to_write_it(read, text):
    assert read(text) == [LabelRow(5, 1, "clean", 1.0)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("5,bird,,", "line 2: 'bird' is no class; there are cat, dog, car, 0, 1, 2"),
        ("4,cat,,\n5,3,,", "line 3: '3' is no class"),
        ("5,-1,,", "line 2: '-1' is no class"),
        ("5,1.5,,", "line 2: '1.5' is no class"),
        ("5,,clean,", "line 2: '' is no class"),
        ("5,cat,coarse,", "line 2: 'cat' is no superclass; there are animal, vehicle"),
        ("5,cat,doubtful,", "line 2: kind must be one of clean, noisy, coarse, missing, got 'doubtful'"),
        ("12,cat,,", "line 2: there is no sample 12; the data have 0 ... 11"),
        ("-1,cat,,", "line 2: there is no sample -1"),
        ("1.5,cat,,", "line 2: index must be an integer, got '1.5'"),
        ("1_0,cat,,", "line 2: index must be an integer, got '1_0'"),
        ("inf,cat,,", "line 2: index must be an integer, got 'inf'"),
        ("five,cat,,", "line 2: index must be an integer, got 'five'"),
        (",cat,,", "line 2: there is neither an index nor a path"),
        ("5,cat,,\n6,cat,,\n5,dog,,", "line 4: sample 5 comes twice"),
        ("5,cat,,\n5.0,,missing,", "line 3: sample 5 comes twice"),
        ("5,cat,,-1", "line 2: weight must be a number of at least 0, below 1e38, got '-1'"),
        ("5,cat,,nan", "line 2: weight must be a number of at least 0, below 1e38, got 'nan'"),
        ("5,cat,,inf", "line 2: weight must be a number of at least 0, below 1e38, got 'inf'"),
        ("5,cat,,much", "line 2: weight must be a number of at least 0, below 1e38, got 'much'"),
        ("5,cat,,1e39", "line 2: weight must be a number of at least 0, below 1e38, got '1e39'"),
        ("4,dog,,\n7,cat,,", "line 3: sample 7 is in the validation part"),
        ('\n\n5,"bi\nrd",,', "line 5: 'bi\\nrd' is no class"),  # where an editor shows it
        ("5,,,", "has no row with a label or a kind"),
        ("", "has no row with a label or a kind"),
    ],
)
def test_refused_by_line(read, rows, message):
    with pytest.raises(InputError, match=r"label_file: .*labels.csv") as error:
        read(f"index,label,kind,weight\n{rows}\n", val_indices=[7])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must have the columns index or path, and label or kind, got none"),
        ("sample,label\n5,cat\n", "must have the columns index or path, and label or kind, got sample, label"),
        ("index,score\n5,1\n", "got index, score"),
        ("index,label\n4,cat\n5,dog,more\n", "line 3: there are more cells than columns"),
        ('index,label\n4,cat\n"5,dog\n6,dog\n', "cannot be read as CSV: unexpected end of data"),
        ("index,label,label\n5,cat,dog\n", "has the column label twice"),
        ("path,label\na.png,cat\n", "line 2: these images have no paths; give the index of 'a.png'"),
    ],
)
def test_invalid_files(read, text, message):
    with pytest.raises(InputError) as error:
        read(text)
    assert message in str(error.value)


def test_file_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="label_file: there is no file .*gone.csv"):
        read_label_file(tmp_path / "gone.csv", IMAGES, class_names=NAMES)
    for name, message in (("a.csv", "cannot be read as CSV"), ("a.parquet", "cannot be read as Parquet")):
        (tmp_path / name).write_bytes(b"\xff\x00index")
        with pytest.raises(InputError, match=message):
            read_label_file(tmp_path / name, IMAGES, class_names=NAMES)


def test_superclasses_without_names(read):
    with pytest.raises(InputError, match="line 2: 'animal' is no superclass; there are none: data.coarse names them"):
        read("index,label,kind\n5,animal,coarse\n", group_names=[])


@pytest.mark.parametrize(
    ("names", "label", "expected"),
    [
        (["5", "6", "7"], "6", 1),
        (["5", "6", "7"], "6.0", 1),
        (["5", "6", "7"], "1", None),  # class names are numbers
        (["10", "2", "x"], "2", 1),
        (["crane", "crane", "owl"], "crane", None),
        (["crane", "crane", "owl"], "1", 1),
        (["crane", "crane", "owl"], "owl", 2),
    ],
)
def test_names_before_numbers(read, names, label, expected):
    text = f"index,label\n5,{label}\n"
    if expected is None:
        with pytest.raises(InputError, match=f"{label!r} is no class"):
            read(text, names=names)
    else:
        assert read(text, names=names) == [LabelRow(5, expected, "clean", 1.0)]


class TestParquet:
    @staticmethod
    def read(tmp_path, columns):
        parquet.write_table(pyarrow.table(columns), tmp_path / "labels.parquet")
        return read_label_file(tmp_path / "labels.parquet", IMAGES, class_names=NAMES, group_names=GROUPS)

    @pytest.mark.parametrize(
        "columns",
        [
            {"index": [5, 3, 1], "label": ["dog", "car", None]},
            {"index": [5, 3, 1], "label": [1, 2, None]},
            {"index": [5.0, 3.0, 1.0], "label": [1.0, 2.0, float("nan")]},
            {"index": [5, 3, 1], "label": pyarrow.array(["dog", "car", None]).dictionary_encode()},
            {"index": [5, 3, 1], "label": ["dog", "car", ""], "kind": [None] * 3, "image": [b"\xff"] * 3},
        ],
    )
    def test_types_of_columns(self, tmp_path, columns):
        assert self.read(tmp_path, columns) == [LabelRow(3, 2, "clean", 1.0), LabelRow(5, 1, "clean", 1.0)]

    def test_kinds_and_weights(self, tmp_path):
        kinds = {"index": [5, 3], "label": ["dog", "animal"], "kind": ["noisy", "coarse"], "weight": [0.25, None]}
        assert self.read(tmp_path, kinds) == [LabelRow(3, "animal", "coarse", 1.0), LabelRow(5, 1, "noisy", 0.25)]

    def test_refused_by_row(self, tmp_path):
        with pytest.raises(InputError, match="labels.parquet, row 2: 'bird' is no class"):
            self.read(tmp_path, {"index": [5, 3], "label": ["dog", "bird"]})
        with pytest.raises(InputError, match="must have the columns index or path, and label or kind, got a"):
            self.read(tmp_path, {"a": [5]})

    def test_without_the_extra(self, tmp_path, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
        monkeypatch.delattr(pyarrow, "parquet", raising=False)
        (tmp_path / "labels.parquet").write_bytes(b"")
        with pytest.raises(InputError, match=r"needs pyarrow: pip install 'kd-lightning\[weak\]'"):
            read_label_file(tmp_path / "labels.parquet", IMAGES, class_names=NAMES)


class TestPaths:
    TRAIN = ["train/a/1.png", "train/a/2.png", "train/b/1.png"]
    POOL = ["pool/a/1.png", "pool/a/9.png", "pool/3.png"]

    @pytest.fixture
    def images(self, tmp_path):
        return [Files(tmp_path / "data" / name for name in names) for names in (self.TRAIN, self.POOL)]

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("{folder}/data/train/b/1.png", 2),
            ("{folder}/data/train/../train/b/1.png", 2),
            ("../data/train/a/2.png", 1),  # from the file's folder
            ("train/b/1.png", 2),  # from the folder of all images
            ("pool/a/1.png", 3),
            ("b/1.png", 2),  # from the folder of a part
            ("./a/9.png", 4),
            ("3.png", 5),
        ],
    )
    def test_ways_to_name_an_image(self, read, images, tmp_path, name, expected):
        (row,) = read(f"path,label\n{name.format(folder=tmp_path)},dog\n", images, "labels/labels.csv")
        assert row == LabelRow(expected, 1, "clean", 1.0)

    def test_from_the_current_folder(self, read, images, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        relative = [Files(os.path.relpath(path) for path in part.paths) for part in images]
        for part in (images, relative):
            (row,) = read("path,label\ndata/train/b/1.png,dog\n", part, "labels/labels.csv")
            assert row.sample == 2

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ("a/1.png,dog", "line 2: 'a/1.png' fits several images; give the whole path"),  # of both parts
            ("1.png,dog", "line 2: the data have no image '1.png'"),
            ("train/b/7.png,dog", "line 2: the data have no image 'train/b/7.png'"),
            (",dog", "line 2: there is neither an index nor a path"),
            ("b/1.png,dog\ntrain/b/1.png,cat", "line 3: sample train/b/1.png comes twice"),
        ],
    )
    def test_refused(self, read, images, rows, message):
        with pytest.raises(InputError) as error:
            read(f"path,label\n{rows}\n", images, "labels/labels.csv")
        assert message in str(error.value)

    def test_image_that_is_listed_twice(self, read, images):
        """A row can name it by its index alone."""
        twice = [Subset(images[0], [0, 2, 0])]
        with pytest.raises(InputError, match="'a/1.png' fits several images"):
            read("path,label\na/1.png,dog\n", twice)
        assert [row.sample for row in read("path,label\nb/1.png,dog\n", twice)] == [1]
        assert [row.sample for row in read("index,path,label\n2,a/1.png,dog\n", twice)] == [2]

    def test_beside_an_index(self, read, images):
        """The path decides; with the index, the folders above the data may be others."""
        (row,) = read("index,path,label\n4,/moved/a/9.png,dog\n", images)
        assert row.sample == 4
        (row,) = read("index,path,label\n3,pool/a/9.png,dog\n", images)
        assert row.sample == 4
        with pytest.raises(InputError, match=r"line 2: the data have no image 'train/c/1.png'"):
            read("index,path,label\n2,train/c/1.png,dog\n", images)  # sample 2 is train/b/1.png

    def test_some_images_without_a_path(self, read, images):
        mixed = [IMAGES[0], images[0]]
        assert [row.sample for row in read("path,label\nb/1.png,dog\n", mixed)] == [10]


class TestChangedData:
    """What a file that a command wrote means after images came and went."""

    COLUMNS = "index,path,content,label\n"

    @staticmethod
    def content(letter):
        return letter * 16

    def parts(self, tmp_path, **letters):
        images = [Files(tmp_path / f"{name}.png" for name in letters)]
        return images, [Identities([f"{name}.png" for name in letters], [*map(self.content, letters.values())])]

    def row(self, index, name, letter, label):
        return f"{index},{name}.png,{self.content(letter)},{label}\n"

    def test_deleted_and_renamed(self, read, tmp_path, recwarn, caplog):
        images, identities = self.parts(tmp_path, c="c", d="b")
        rows = self.row(0, "a", "a", "cat") + self.row(1, "b", "b", "dog") + self.row(2, "c", "c", "car")
        caplog.set_level("INFO")
        found = read(self.COLUMNS + rows, images, identities=identities)
        assert [(row.sample, row.label) for row in found] == [(0, 2), (1, 1)]
        (warning,) = [str(one.message) for one in recwarn]
        assert "1 of 3 rows" in warning and "line 2: 'a.png'" in warning
        (line,) = [record.message for record in caplog.records]
        assert "2 of 3 rows" in line and "line 3: 'b.png'" in line

    def test_all_gone(self, read, tmp_path):
        images, identities = self.parts(tmp_path, x="e", y="f")
        rows = self.row(0, "a", "a", "cat") + self.row(1, "b", "b", "bird")
        with pytest.raises(InputError, match="line 2: the data have no image 'a.png', nor any other of the 2 rows"):
            read(self.COLUMNS + rows, images, identities=identities)

    def test_class_that_is_gone_with_its_images(self, read, tmp_path):
        images, identities = self.parts(tmp_path, a="a")
        rows = self.row(0, "a", "a", "cat") + self.row(1, "b", "b", "bird")
        assert read(self.COLUMNS + rows, images, identities=identities) == [LabelRow(0, 0, "clean", 1.0)]

    def test_saved_anew(self, read, tmp_path, recwarn):
        images, identities = self.parts(tmp_path, a="d", b="e")
        rows = self.row(0, "a", "a", "cat") + self.row(1, "b", "b", "dog")
        assert [row.label for row in read(self.COLUMNS + rows, images, identities=identities)] == [0, 1]
        (warning,) = [str(one.message) for one in recwarn]
        assert "2 of 2 rows name files whose content has changed" in warning and "line 2: 'a.png'" in warning

    def test_other_columns_of_this_name(self, read):
        """A column of texts is no column of hashes."""
        assert read("index,content,label\n5,a text,dog\n") == [LabelRow(5, 1, "clean", 1.0)]

    def test_content_alone(self, read, tmp_path):
        images, identities = self.parts(tmp_path, a="a", b="b")
        text = f"content,label\n{self.content('b')},dog\n"
        assert read(text, images, identities=identities) == [LabelRow(1, 1, "clean", 1.0)]


class TestRowsThatAgree:
    TARGETS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])

    def test_in_the_validation_part(self, read):
        """With the label of the source they are passed over; another label is refused."""
        rows = "index,label,kind\n3,cat,clean\n4,dog,\n4,1,noisy\n0,dog,clean\n"
        assert read(rows, val_indices=[3, 4], targets=self.TARGETS) == [LabelRow(0, 1, "clean", 1.0)]
        assert read("index,label\n3,cat\n", val_indices=[3], targets=self.TARGETS) == []
        for row in ("3,dog,clean", "3,cat,missing", "3,animal,coarse"):
            with pytest.raises(InputError, match="line 2: sample 3 is in the validation part"):
                read(f"index,label,kind\n{row}\n", val_indices=[3], targets=self.TARGETS)

    def test_repeated(self, read):
        rows = "index,label,kind\n3,cat,clean\n3,0,\n5,cat,missing\n5,dog,missing\n3.0,cat,clean\n"
        assert read(rows) == [LabelRow(3, 0, "clean", 1.0), LabelRow(5, -1, "missing", 1.0)]
        for row in ("3,dog,clean", "3,cat,noisy", "3,,missing"):
            with pytest.raises(InputError, match="line 3: sample 3 comes twice"):
                read(f"index,label,kind\n3,cat,clean\n{row}\n")


class TestNumbers:
    def test_that_count_from_1(self, read):
        for rows in ("5,1\n6,3\n", "5,3\n", "5,2.0\n6,3.0\n"):
            with pytest.raises(
                InputError, match=r"classes have the numbers 0 ... 2 \(0 = cat\), got . ... 3, which seem"
            ):
                read(f"index,label\n{rows}")
        with pytest.raises(InputError, match=r"superclasses have the numbers 0 ... 1 \(0 = animal\)"):
            read("index,label,kind\n5,1,coarse\n6,2,coarse\n")

    def test_their_meaning_is_printed_once(self, read, caplog):
        caplog.set_level("INFO")
        read("index,label,kind\n5,1,\n6,2,noisy\n7,2,\n1,0,coarse\n2,cat,\n")
        lines = [record.message.partition("labels.csv: ")[2] for record in caplog.records]
        assert lines == ["numbers mean classes: 1 = dog, 2 = car", "numbers mean superclasses: 0 = animal"]
        caplog.clear()
        read("index,label\n5,1\n", names=["0", "1"])
        read("index,label\n5,dog\n")
        assert not caplog.records


def test_unicode(read, tmp_path):
    """Names made on macOS are decomposed."""
    one, other = "caf\u00e9", "cafe\u0301"
    for cell, name in ((one, other), (other, one)):
        images = [Files([tmp_path / f"{name}/1.png", tmp_path / "x/1.png"])]
        text = f"path,label,kind\n{cell}/1.png,{cell},\nx/1.png,{cell},coarse\n"
        found = read(text, images, names=["tea", name], group_names=["x", name])
        assert found == [LabelRow(0, 1, "clean", 1.0), LabelRow(1, name, "coarse", 1.0)]
    assert [row.sample for row in read("path,label\nx\\1.png,dog\n", images)] == [1]  # made on Windows


def test_many_rows(tmp_path):
    paths = [f"data/{number % 1000}/{number}.png" for number in range(20_000)]
    names = [f"class {number}" for number in range(1000)]
    lines = (f"{path.removeprefix('data/')},class {number % 1000}" for number, path in enumerate(paths))
    (tmp_path / "labels.csv").write_text("\n".join(["path,label", *lines]))
    start = time.process_time()
    rows = read_label_file(Path(tmp_path / "labels.csv"), [Files(paths)], class_names=names)
    assert time.process_time() - start < 15  # about 1 s
    assert [row.label for row in rows] == [number % 1000 for number in range(20_000)]


def test_utf_16(tmp_path):
    """A spreadsheet's Unicode text."""
    (tmp_path / "labels.txt").write_text("index\tlabel\n5\tdog\n", encoding="utf-16")
    assert read_label_file(tmp_path / "labels.txt", IMAGES, class_names=NAMES) == [LabelRow(5, 1, "clean", 1.0)]
    (tmp_path / "labels.txt").write_bytes(b"\xff\xfea")
    with pytest.raises(InputError, match="cannot be read as CSV"):
        read_label_file(tmp_path / "labels.txt", IMAGES, class_names=NAMES)
