"""What a release is made of: content and metadata of both distributions; version and public names agree with them."""

import ast
import importlib
import importlib.metadata
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser

import pytest
import yaml

import kd_lightning

MARK = "FILL-IN"
ABOUT = {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "MANIFEST.in"}


@pytest.fixture(scope="module")
def project(root):
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def built(root, tmp_path_factory):
    """The folder of an archive of the files as they are and of a wheel of this archive, built in a copy."""
    copy, out = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("dist")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=root, capture_output=True, text=True)
    names = listed.stdout.splitlines() if not listed.returncode else []
    if not names:
        pytest.skip("not in a clone")
    for name in names:
        if (root / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((root / name).read_bytes())
    for name in ("runs/demo/version_0/student.safetensors", "data/x.png", "split.json"):  # what users leave in a clone
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).touch()
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out)],
        cwd=copy,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def package_files(root):
    there = {path.relative_to(root).as_posix() for path in (root / "kd_lightning").rglob("*") if path.is_file()}
    return {name for name in there if "__pycache__" not in name}


@pytest.mark.slow
def test_source_distribution_holds_the_package_and_what_describes_it(built, root, project):
    (path,) = built.glob("*.tar.gz")
    top = f"kd_lightning-{project['version']}/"
    assert path.name == f"{top[:-1]}.tar.gz"
    with tarfile.open(path) as archive:
        names = {one.name.removeprefix(top) for one in archive if one.isfile()}
    made = {name for name in names if name.startswith("kd_lightning.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert names - made == package_files(root) | ABOUT
    assert path.stat().st_size < 1_500_000


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(built, root, project):
    (path,) = built.glob("*.whl")
    assert path.name == f"kd_lightning-{project['version']}-py3-none-any.whl"
    with zipfile.ZipFile(path) as wheel:
        contents = {name: wheel.read(name) for name in wheel.namelist()}
    package = {name for name in contents if name.startswith("kd_lightning/")}
    info = f"kd_lightning-{project['version']}.dist-info/"
    assert all(name.startswith(info) for name in contents.keys() - package)
    assert package == package_files(root)
    assert {"kd_lightning/py.typed", "kd_lightning/report/templates/report.html.j2"} <= package
    assert contents[f"{info}licenses/LICENSE"] == (root / "LICENSE").read_bytes()
    for name, content in contents.items():
        assert str(root).encode() not in content, name

    metadata = Parser().parsestr(contents[f"{info}METADATA"].decode())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Author"] == "the kd_lightning contributors"
    assert metadata["Author-email"] is None
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert MARK not in str(metadata)


def test_version_stands_in_the_changelog_and_in_the_citation(root, project):
    version = project["version"]
    assert re.search(r"^## (\d+\.\d+\.\d+)", (root / "CHANGELOG.md").read_text(), re.M)[1] == version
    citation = yaml.safe_load((root / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (version, project["license"])
    assert citation["authors"] == project["authors"]


def test_placeholders_are_listed(root):
    """Each file with a mark stands in the list of CONTRIBUTING, and no other does."""
    text = (root / "CONTRIBUTING.md").read_text().partition("## Before the first release")[2].partition("\n## ")[0]
    listed = {name for row in re.findall(r"^\| (`.*?) \|", text, re.M) for name in re.findall(r"`([^`]+)`", row)}
    folders = (root, root / ".github", root / "docs")
    texts = {
        path.relative_to(root).as_posix(): path.read_text()
        for folder in folders
        for path in (folder.glob("*") if folder == root else folder.rglob("*"))
        if path.suffix in (".md", ".toml", ".cff", ".yml", ".py", ".ipynb", ".sh", "") and path.is_file()
    }
    marked = {name for name, one in texts.items() if MARK in one and not name.startswith("docs/_build")}
    assert marked - {"CONTRIBUTING.md"} == listed


def test_checkers_see_every_public_name(root):
    """What ``from kd_lightning import *`` gives is what a type checker reads in the block of imports."""
    tree = ast.parse((root / "kd_lightning/__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imported = [alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(imported) == sorted(kd_lightning.__all__)


def test_reference_has_every_public_name(root):
    documented = set()
    for page in (root / "docs/reference/api").glob("*.md"):
        for name in re.findall(r"automodule:: (\S+)", page.read_text()):
            module = importlib.import_module(name)
            own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == name]
            documented |= {id(getattr(module, key)) for key in getattr(module, "__all__", own)}
        for name in re.findall(r"auto(?:function|class):: (\S+)", page.read_text()):
            home, _, last = name.rpartition(".")
            documented.add(id(getattr(importlib.import_module(home), last)))
    missing = [name for name in kd_lightning.__all__ if id(getattr(kd_lightning, name)) not in documented]
    assert not missing


def test_version_in_python():
    assert kd_lightning.__version__ == importlib.metadata.version("kd-lightning")
