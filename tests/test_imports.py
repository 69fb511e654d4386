"""Imports go down only: by folder, in the order of the way of the data."""

import ast
import subprocess
import sys
from pathlib import Path

import kd_lightning

PACKAGE = Path(kd_lightning.__file__).parent
# from the top down; rooms of one line do not import each other
ORDER = [
    {"__main__"},
    {"cli"},
    {"deploy"},
    {"report"},
    {"active"},
    {"modules", "callbacks"},
    {"data"},
    {"teachers", "pseudo_labels"},
    {"runs"},
    {"cache", "quantization", "features", "losses", "models", "schedules"},
    {"batch", "ranks"},
    {"teacher_outputs"},
    {"inputs"},
    {"errors", "packages"},
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}


def room_of(module):
    return module.split(".")[1]


def imports():
    """Every (file, its module, imported module) within the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(["kd_lightning", *path.relative_to(PACKAGE).with_suffix("").parts])
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path} has a relative import"
                names = [node.module]
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            yield from ((path, module, name) for name in names if name.split(".")[0] == "kd_lightning")


def test_every_room_has_its_place():
    rooms = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()}
    assert rooms - {"__init__"} == LEVEL.keys()


def test_imports_go_down():
    found = [(path, module, name) for path, module, name in imports() if module != "kd_lightning.__init__"]
    assert len(found) > 50
    for path, module, name in found:
        assert name != "kd_lightning", f"{path} imports from the package's face"
        here, there = room_of(module), room_of(name)
        assert here == there or LEVEL[here] < LEVEL[there], f"{path} imports {name}, which does not lie below it"


def test_what_is_private_to_a_room_stays_there():
    for path, module, name in imports():
        parts = name.split(".")
        for depth, part in enumerate(parts):
            if part.startswith("_") and part != "__init__":
                owner = ".".join(parts[:depth])
                assert module.startswith(f"{owner}."), f"{path} imports {name}, which is private to {owner}"


def test_private_names_stay_in_their_file():
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "kd_lightning":
                private = [alias.name for alias in node.names if alias.name.startswith("_")]
                assert not private, f"{path} imports {private} from {node.module}"


def test_commands_do_not_import_one_another():
    for path, module, name in imports():
        start = "kd_lightning.cli.commands."
        if module.startswith(start):
            assert not f"{name}.".startswith(start), f"{path} imports {name}, another command"


def test_one_place_decides_where_a_run_lies():
    """``runs/folder.py``; ``trainer.log_dir`` is a folder that loggers of some packages share between runs."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr == "log_dir":
                owner = ast.unparse(node.value)
                assert not owner.endswith("trainer"), f"{path}, line {node.lineno}: use run_folder(trainer)"


def test_public_names_load_when_used():
    """An interrupt while the libraries load is caught, so ``__main__`` loads none of them."""
    code = "import sys, kd_lightning.__main__; print([m for m in ('torch', 'lightning', 'yaml') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names():
    assert kd_lightning._HOMES.keys() == {*kd_lightning.__all__}
    assert {*kd_lightning.__all__} <= {*dir(kd_lightning)}
    for name in kd_lightning.__all__:
        assert getattr(kd_lightning, name).__name__ == name
    assert kd_lightning.models.DigitsCNN.__name__ == "DigitsCNN"  # modules, too
    assert not hasattr(kd_lightning, "Nothing")
