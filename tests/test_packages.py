import sys

import pytest

from kd_lightning.cli.arguments._parsing import check_package
from kd_lightning.deploy.export import check_packages
from kd_lightning.errors import InputError
from kd_lightning.packages import is_installed


def test_a_folder_is_no_package(tmp_path, monkeypatch):
    """The working directory is on the path: a folder of results there must not pass for the package."""
    (tmp_path / "optuna").mkdir()
    (tmp_path / "onnx").mkdir()
    for name in [name for name in sys.modules if name.split(".")[0] in ("onnx", "optuna")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    __import__("onnx")  # Python takes it for one
    monkeypatch.delitem(sys.modules, "onnx")
    assert not is_installed("onnx")
    with pytest.raises(InputError, match=r"--tune needs optuna: pip install 'kd-lightning\[tune\]'"):
        check_package("optuna", "--tune", "tune")
    with pytest.raises(InputError, match=r"onnx needs the extra export: .* \(No module named 'onnx'\)"):
        check_packages("onnx", quantized=False)


def test_parts_of_packages():
    assert is_installed("torch.nn")
    assert not is_installed("no_such_package.part")
    assert not is_installed("torch.no_such_part")
