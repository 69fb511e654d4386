"""docs/examples: each file runs as it stands there, and is shown on a page."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from forked import free_port
from safetensors.torch import load_file, save_file

from kd_lightning import Run
from kd_lightning.__main__ import main
from kd_lightning.models import DigitsCNN
from kd_lightning.runs.csv_logger import read_metrics

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs/examples"
SHORT = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.accelerator", "cpu"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with the repository's configs and a teacher's weights, and the commands of this package."""
    monkeypatch.chdir(tmp_path)
    for name in ("configs", "docs"):
        Path(name).symlink_to(ROOT / name)
    teacher = Path("runs/teacher_digits/version_0/student.safetensors")
    teacher.parent.mkdir(parents=True)
    torch.manual_seed(0)
    save_file(DigitsCNN(width=32).state_dict(), teacher)
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, module in (("kd-lightning", "kd_lightning"), ("torchrun", "torch.distributed.run")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {module} "$@"\n')
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


@pytest.fixture
def script(folder, monkeypatch):
    """Runs a script of the examples as ``python NAME ARGUMENTS`` would."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        return runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    return run


def lines_of(text):
    """The commands of a text, in one form: ``kd-lightning NAME ARGUMENTS``."""
    text = text.replace("$(BIN)/python -m kd_lightning", "kd-lightning").replace(
        "python -m kd_lightning", "kd-lightning"
    )
    found = re.findall(r"kd-lightning [^\n\\&]+", text.replace("--config ", ""))
    return [line.strip() for line in found]


def test_each_file_is_shown_on_a_page():
    pages = "\n".join(page.read_text() for page in (ROOT / "docs").rglob("*.md"))
    shown = {Path(name).name for name in re.findall(r"literalinclude\} (\S+)", pages)}
    files = {path.name for path in EXAMPLES.rglob("*") if path.suffix not in (".md", ".pyc") and path.is_file()}
    assert files <= shown


def test_demo_is_the_same_in_the_makefile_without_make_and_in_docker():
    make = (ROOT / "Makefile").read_text()
    teacher = lines_of(make.partition("\nteacher:")[2].partition("\n\n")[0])
    demo = teacher + lines_of(make.partition("\ndemo:")[2].partition("\n\n")[0])
    assert len(demo) == 3
    systems = (EXAMPLES / "systems.md").read_text()
    assert lines_of(systems.partition("`make demo`:")[2].partition("`make docs`")[0]) == demo
    assert lines_of((EXAMPLES / "Dockerfile").read_text()) == demo
    assert lines_of((ROOT / "docs/start/five_minutes.md").read_text().partition("## What")[0]) == demo


def test_targets_without_make_are_those_of_the_makefile():
    make = (
        (ROOT / "Makefile")
        .read_text()
        .replace("$(BIN)/", "")
        .replace("$(PYTEST)", "python -m pytest --numprocesses 2 --dist worksteal")
    )
    for line in re.findall(
        r"^(?:python -m sphinx|ruff|mypy|codespell|python -m pytest).*$", (EXAMPLES / "systems.md").read_text(), re.M
    ):
        assert f"\t{line}\n" in make, line


def test_dockerfile_copies_what_the_package_is_built_from():
    text = (EXAMPLES / "Dockerfile").read_text()
    copied = [name for line in re.findall(r"^COPY (.*) \S+$", text, re.M) for name in line.split()]
    assert all((ROOT / name).exists() for name in copied)
    assert {"pyproject.toml", "README.md", "LICENSE", "kd_lightning", "configs"} == {*copied}
    assert text.index("COPY kd_lightning") < text.index("RUN pip install")


@pytest.mark.parametrize("name", ["fit.sbatch", "tune.sbatch", "two_nodes.sh"])
def test_shell_scripts_can_be_read(name):
    subprocess.run(["bash", "-n", EXAMPLES / name], check=True)


@pytest.mark.slow
def test_plain_trainer(script):
    found = script("plain_trainer.py", "3")["found"]
    assert found["teacher"] > 0.8
    assert {path.parts[1] for path in Path("runs").rglob("*.safetensors")} > {"teacher", "alone", "distilled"}


def test_fabric(script):
    names = script("fabric_loop.py", "2")
    assert names["of_teacher"] > 0.8
    assert not any(parameter.requires_grad for parameter in names["network"].parameters())
    assert names["of_student"] > 0.2  # of ten classes, after 38 steps


def test_own_cli(script):
    script("own_cli.py", "fit", "--config", str(EXAMPLES / "own_cli.yaml"), *SHORT)
    (weights,) = Path("runs/own_cli").rglob("student.safetensors")
    assert weights.is_file()
    saved = yaml.safe_load(next(Path("runs/own_cli").rglob("config.yaml")).read_text())
    assert "top_k" not in saved["model"]


def test_own_module_in_our_command_line(folder, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    main(["fit", str(EXAMPLES / "own_module.yaml"), *SHORT])
    metrics = read_metrics(Path("runs/own_module/version_0/metrics.csv"))
    (row,) = [row for row in metrics if "val/top_two" in row]
    assert 0 <= row["val/accuracy"] <= row["val/top_two"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [(), ("--multirun", "model=alone,distill")], ids=["job", "sweep"])
def test_hydra(script, arguments):
    pytest.importorskip("hydra")
    script("hydra/train.py", *arguments, "trainer.max_epochs=1", "+trainer.limit_train_batches=2")
    found = [*Path().glob("outputs/*/*/student.safetensors"), *Path().glob("multirun/*/*/*/student.safetensors")]
    assert len(found) == 1 + len(arguments) // 2
    assert all((path.parent / "split.json").is_file() and (path.parent / ".hydra").is_dir() for path in found)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_loggers(folder, monkeypatch, name):
    pytest.importorskip(name)
    for key in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK", "WANDB_SILENT"):
        monkeypatch.setenv(key, "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    main(["fit", "--config", "configs/student_digits.yaml", "--config", str(EXAMPLES / f"{name}.yaml"), *SHORT])
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()
    (run,) = [path.parent for path in Path("runs").rglob("run.json")]
    assert Run(run).finished
    pictures = {
        "wandb": "runs/wandb/*/files/media/images/samples/*.png",
        "mlflow": "runs/mlflow/*/artifacts/samples/*.png",
    }
    assert [*Path().glob(pictures[name])]


@pytest.mark.slow
def test_tuning(folder):
    short = ["--trainer.max_epochs", "2", "--trainer.limit_train_batches", "2", "--trainer.accelerator", "cpu"]
    space = ["--space", str(EXAMPLES / "space.yaml")]
    main(["experiment", "configs/distill_digits.yaml", "--seeds", "1", "--tune", "2", *space, *short])
    out = Path("runs/distill_digits_tuned_comparison")
    wanted = yaml.safe_load((EXAMPLES / "space.yaml").read_text())
    tuned = yaml.safe_load((out / "tuned_distill_digits.yaml").read_text())
    assert tuned["data"]["init_args"]["batch_size"] in wanted["data.init_args.batch_size"]
    assert (out / "comparison.json").is_file()


@pytest.fixture
def cluster(folder, monkeypatch):
    """Stand-ins for ``srun`` and ``scontrol``: a requeue ends the job's fit, as SLURM does."""
    step = "SLURM_NTASKS=1 SLURM_NTASKS_PER_NODE=1 SLURM_NNODES=1 SLURM_NODELIST=localhost SLURM_PROCID=0"
    step += " SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_JOB_NAME=kd_lightning"
    stubs = {
        "srun": f'echo $$ > step.pid\nexec env {step} "$@"',
        "scontrol": 'echo "$@" >> requeued.txt\nkill -TERM "$(cat step.pid)"',
    }
    for name, text in stubs.items():
        path = folder / "programs" / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    monkeypatch.setenv("SLURM_JOB_ID", "7")


@pytest.mark.slow
def test_slurm(cluster, monkeypatch):
    """A job that is requeued in the middle of its fit ends with the bits of one that is not."""
    options = [*SHORT, "--trainer.max_epochs", "40", "--trainer.limit_train_batches", "4"]
    command = ["bash", str(EXAMPLES / "fit.sbatch"), "configs/student_digits.yaml", *options]
    with Path("log.txt").open("w") as log:
        job = subprocess.Popen(command, stdout=log, stderr=log)
        until = time.monotonic() + 300
        while not [*Path("runs").rglob("last.ckpt")] and job.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR1)
        job.wait(timeout=300)
        (folder,) = Path("runs/student_digits_7").iterdir()
        assert Path("requeued.txt").read_text() == "requeue 7\n"
        assert not (folder / "student.safetensors").exists(), "it was not stopped in its middle"
        subprocess.run(command, stdout=log, stderr=log, check=True, timeout=300)  # SLURM starts the job again
    assert [*Path("runs/student_digits_7").iterdir()] == [folder]
    assert Path("requeued.txt").read_text() == "requeue 7\n"
    main(["fit", "configs/student_digits.yaml", "--name", "unbroken", *options])
    resumed, unbroken = (load_file(path / "student.safetensors") for path in (folder, Path("runs/unbroken/version_0")))
    assert all(torch.equal(resumed[key], value) for key, value in unbroken.items())


@pytest.mark.slow
@pytest.mark.dist
def test_two_nodes(folder, monkeypatch):
    for last in (False, True):  # once more where another process has taken the port
        monkeypatch.setenv("PORT", str(free_port()))
        shutil.rmtree("runs/student_digits", ignore_errors=True)
        options = [
            "--trainer.max_epochs",
            "1",
            "--trainer.limit_train_batches",
            "2",
            "--data.init_args.batch_size",
            "32",
        ]
        command = ["sh", str(EXAMPLES / "two_nodes.sh"), "configs/student_digits.yaml", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if [*Path("runs/student_digits").rglob("student.safetensors")] or last:
            break
    (run,) = Path("runs/student_digits").iterdir()
    assert Run(run).finished, done.stderr[-3000:]
    assert json.loads((run / "run.json").read_text())


@pytest.mark.slow
def test_package_imports_without_modules_of_unix():
    """As on Windows; what asks for them there has another way."""
    text = "import sys; sys.modules.update(fcntl=None, resource=None, termios=None, pwd=None, grp=None)\n"
    text += "import kd_lightning as k; [getattr(k, name) for name in k.__all__]; import kd_lightning.cli.main\n"
    text += "from kd_lightning.__main__ import main; main(['--help'])"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "distill" in done.stdout
