"""Where a run lies, and who gets which folder."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from kd_lightning.errors import InputError
from kd_lightning.runs.folder import claim_folder, lock_folder, release_folder, run_folder, writes_files

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
CLAIM = """
import sys
from pathlib import Path
sys.modules["lightning.pytorch"] = type(sys)("stub")  # the claim needs none of it, and importing takes seconds
sys.modules["lightning.pytorch"].Trainer = object
source = Path(sys.argv[1]).read_text()
errors = type(sys)("kd_lightning.errors")
errors.InputError = ValueError
sys.modules["kd_lightning"] = type(sys)("kd_lightning")
sys.modules["kd_lightning.errors"] = errors
scope = {}
exec(source, scope)
for _ in range(20):
    print(scope["claim_folder"](Path(sys.argv[2])))
"""


def test_each_of_ten_processes_gets_folders_of_its_own(tmp_path):
    source = sys.modules["kd_lightning.runs.folder"].__file__
    command = [sys.executable, "-c", CLAIM, source, str(tmp_path / "runs")]
    with ThreadPoolExecutor(10) as pool:
        outputs = list(pool.map(lambda _: subprocess.check_output(command, text=True), range(10)))
    folders = [line for output in outputs for line in output.splitlines()]
    assert len(folders) == 200
    assert {Path(folder).name for folder in folders} == {f"version_{k}" for k in range(200)}


def test_the_next_version_is_above_all_others(tmp_path):
    for name in ("version_2", "version_10", "version_x", "other"):
        (tmp_path / name).mkdir()
    assert claim_folder(tmp_path).name == "version_11"


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"default_root_dir: cannot write to .*file"):
        claim_folder(tmp_path / "file" / "runs")


def test_release_leaves_other_runs(tmp_path):
    first, second = claim_folder(tmp_path / "a"), claim_folder(tmp_path / "a")
    (second / "x").mkdir()
    release_folder(second)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["version_0"]
    release_folder(first)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "loggers",
    [
        lambda path: False,
        lambda path: TensorBoardLogger(path, name="a", version=3),
        lambda path: TensorBoardLogger(path, name="a", version="b", sub_dir="c"),
        lambda path: CSVLogger(path, name="a/b"),
        lambda path: [CSVLogger(path, name="a"), TensorBoardLogger(path, name="other")],
    ],
)
def test_it_is_the_folder_of_the_checkpoints(loggers, tmp_path):
    trainer = Trainer(default_root_dir=tmp_path, logger=loggers(tmp_path), callbacks=[ModelCheckpoint()], **QUIET)
    checkpoint = trainer.checkpoint_callback
    checkpoint.setup(trainer, None, "fit")
    assert str(run_folder(trainer) / "checkpoints") == str(checkpoint.dirpath)
    assert writes_files(trainer)


def test_runs_without_files(tmp_path):
    bare = Trainer(default_root_dir=tmp_path, logger=False, enable_checkpointing=False, **QUIET)
    assert not writes_files(bare)
    assert not writes_files(Trainer(default_root_dir=tmp_path, fast_dev_run=True, **QUIET))


def test_a_folder_in_use(tmp_path):
    hold = "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(); time.sleep(60)"
    command = [sys.executable, "-uc", hold, str(tmp_path / ".lock")]
    other = subprocess.Popen(command, stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(InputError, match="in use"):
        lock_folder(tmp_path)
    other.kill()
    other.wait()
    lock_folder(tmp_path).close()
