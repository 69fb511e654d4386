"""The files that sources name: in their order, by the rules of the package's folders, and what is refused."""

import io
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from kd_lightning.deploy.pictures import find_pictures
from kd_lightning.errors import InputError

FILES = ["b.jpg", "a.PNG", "deep/c.jpg", "deep/er/d.webp", "__MACOSX/e.jpg", ".hidden/f.jpg", "._a.png", "notes.txt"]


@pytest.fixture(autouse=True)
def photos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in FILES:
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    return tmp_path


def names(*sources, **options):
    return [path.removeprefix("photos/") for path in find_pictures(sources, **options)]


def test_a_folder():
    assert names("photos") == ["a.PNG", "b.jpg", "deep/c.jpg", "deep/er/d.webp"]
    assert names(Path("photos/")) == names("photos/")
    assert names("photos", endings=(".txt",)) == ["notes.txt"]


def test_sources_follow_one_another_and_repeat():
    assert names("photos/deep", "photos/b.jpg", "photos/deep/c.jpg", "photos/notes.txt", "photos/b.jpg") == [
        "deep/c.jpg", "deep/er/d.webp", "b.jpg", "deep/c.jpg", "notes.txt", "b.jpg"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("photos/*.jpg", ["b.jpg"]),
        ("photos/*", ["a.PNG", "b.jpg", "deep/c.jpg", "deep/er/d.webp"]),
        ("photos/**", ["a.PNG", "b.jpg", "deep/c.jpg", "deep/er/d.webp"]),
        ("photos/**/*.jpg", ["b.jpg", "deep/c.jpg"]),
        ("photos/**/er", ["deep/er/d.webp"]),
        ("photos/[ab].*", ["a.PNG", "b.jpg"]),
        ("phot?s/deep/*.jpg", ["deep/c.jpg"]),
    ],
)
def test_patterns(pattern, expected):
    assert names(pattern) == expected
    assert find_pictures([str(Path.cwd() / pattern)]) == [str(Path.cwd() / "photos" / name) for name in expected]


def test_a_file_whose_name_looks_like_a_pattern():
    Path("photos/[1].jpg").write_text("")
    assert names("photos/[1].jpg") == ["[1].jpg"]


@pytest.mark.parametrize("separator", [",", ";"])
def test_a_table(separator):
    rows = ["filename,label", "b.jpg,1", "deep/c.jpg,2", "gone.jpg,1", "b.jpg,1"]
    Path("photos/list.csv").write_text("\n".join(rows).replace(",", separator))
    assert names("photos/list.csv") == ["b.jpg", "deep/c.jpg", "gone.jpg", "b.jpg"]


def test_a_table_of_paths_from_the_working_directory():
    Path("lists").mkdir()
    Path("lists/list.csv").write_text(f"path\nphotos/b.jpg\n{Path.cwd()}/photos/a.PNG\n")
    assert find_pictures(["lists/list.csv"]) == ["photos/b.jpg", f"{Path.cwd()}/photos/a.PNG"]
    Path("lists/photos").mkdir()
    Path("lists/photos/b.jpg").write_text("another")
    with pytest.raises(
        InputError, match=r"line 2: photos/b\.jpg is in the table's folder and in the working directory"
    ):
        find_pictures(["lists/list.csv"])


def test_a_parquet_table():
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.table({"image": ["deep/c.jpg", "'=x.jpg"]}), "photos/list.parquet")
    assert names("photos/list.parquet") == ["deep/c.jpg", "'=x.jpg"]  # only CSV files have escapes


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\0"])
def test_standard_input(monkeypatch, end):
    paths = [b"b.jpg", b"with space.jpg", b"\xff.jpg"]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(end.join([*paths, b""]))))
    found = find_pictures(["photos/a.PNG", "-", "photos/b.jpg"])
    assert [os.fsencode(path) for path in found] == [b"photos/a.PNG", *paths, b"photos/b.jpg"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("empty", "no images in empty"),
        ("photos/*.gif", r"no picture fits photos/\*\.gif"),
        ("nothing.csv", "there is no file nothing.csv"),
        ("other.csv", "other.csv must have a column path, filename, .*, got name, label"),
        ("rows.csv", "rows.csv has no rows"),
        ("cell.csv", "cell.csv, line 2: the cell of path is empty"),
    ],
)
def test_what_names_no_pictures(source, message):
    Path("empty").mkdir()
    for name, text in {"other": "name,label\na,b\n", "rows": "path\n", "cell": "path,label\n,b\n"}.items():
        Path(f"{name}.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        find_pictures([source])


def test_no_source():
    with pytest.raises(InputError, match="no picture in an empty list"):
        find_pictures([])
