"""An installation from a clone (``pip install --editable``)."""

import shutil
import subprocess
import sys
from pathlib import Path

CLONE = Path(__file__).parents[1]


def test_editable_install_is_found_beside_the_clone(tmp_path):
    """A script beside a clone that is named as the package imports the package, not the clone's folder."""
    clone, site = tmp_path / "kd_lightning", tmp_path / "site"
    clone.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CLONE / name, clone)
    (clone / "kd_lightning").mkdir()
    (clone / "kd_lightning" / "__init__.py").write_text("answer = 42\n")
    build = "from setuptools import build_meta; print(build_meta.build_editable('..'))"
    subprocess.run([sys.executable, "-c", build], cwd=clone, check=True, capture_output=True)
    shutil.unpack_archive(next(tmp_path.glob("*.whl")), site, "zip")

    script = f"import site; site.addsitedir({str(site)!r}); import kd_lightning; print(kd_lightning.answer)"
    ran = subprocess.run(  # -E, -S: without PYTHONPATH, and without the installation that runs the tests
        [sys.executable, "-ES", "-c", script], cwd=tmp_path, check=False, capture_output=True, text=True
    )
    assert ran.stdout == "42\n", ran.stderr
