"""Imports go down only."""

import ast
from pathlib import Path

import kd_lightning

PACKAGE = Path(kd_lightning.__file__).parent
LAYERS = [
    {"__main__"},
    {"commands"},
    {"cli"},
    {"modules", "callbacks", "data", "loggers", "complaints", "config_files", "checkpoints", "active_learning"},
    {
        "losses",
        "teachers",
        "teacher_cache",
        "output_cache",
        "fingerprints",
        "quantization",
        "ensembles",
        "layers",
        "hints",
        "preflight",
        "models",
        "batch",
        "pseudo_labels",
        "pseudo_label_report",
        "graph_labels",
        "contact_sheet",
        "heads",
        "acquisition",
        "outputs",
        "exporting",
        "errors",
    },
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
APART = {"modules", "callbacks", "data"}


def imports():
    for path in PACKAGE.rglob("*.py"):
        here = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if here == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            yield from ((path, here, name) for name in names if name and name.split(".")[0] == "kd_lightning")


def test_every_file_has_its_layer():
    for path in PACKAGE.iterdir():
        if path.suffix == ".py" or (path / "__init__.py").is_file():
            assert path.stem in LEVEL or path.stem == "__init__", path


def test_imports_go_down():
    found = list(imports())
    assert len(found) > 50
    for path, here, name in found:
        assert name != "kd_lightning", f"{path} imports from the package's face"
        there = name.split(".")[1]
        assert LEVEL[here] <= LEVEL[there], f"{path} imports {name}, which lies above it"
        if here in APART and there in APART:
            assert here == there, f"{path} imports {name}, which lies beside it"
