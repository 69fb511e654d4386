"""Whole processes, for benchmarks/pipeline.py: the start, the demo against an earlier state, and memory over epochs."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from measuring import cpu_seconds, log

HERE = Path(__file__).parent
COMMAND = [sys.executable, "-W", "ignore", "-m", "kd_lightning"]
LIBRARIES = "import lightning.pytorch, torchvision, torchmetrics"
REPORT = "import os, time; print('CPU seconds', time.process_time(), flush=True); os._exit(0)"
FIT = ["fit", "--config", "configs/teacher_digits.yaml"]
DEMO = {  # as in the Makefile
    "teacher": FIT,
    "test of the teacher": ["test", "--config", "configs/teacher_digits.yaml"],
    "experiment": ["experiment", "configs/distill_digits.yaml", "--seeds", "3"],
}
MEMORY = """
import sys, tempfile, torch
from lightning.pytorch import Callback, Trainer
from measuring import anonymous_memory
from pipeline_images import folder_loader, write_pictures
from torch import nn
from kd_lightning import Digits, ImageFolder, SemiSupervisedDataModule, SupervisedModule
from kd_lightning.models import DigitsCNN

class Watch(Callback):
    def on_train_epoch_end(self, trainer, module):
        if trainer.current_epoch + 1 in (5, 25, 50):
            print("memory", anonymous_memory(), flush=True)

folder = tempfile.mkdtemp()
if sys.argv[1] == "digits":
    network, data = DigitsCNN(8), SemiSupervisedDataModule(Digits())
else:
    write_pictures(folder + "/pictures", 128)
    network = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 2))
    data = SemiSupervisedDataModule(ImageFolder(folder + "/pictures"), decoded=folder + "/decoded")
quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
Trainer(max_epochs=50, accelerator="cpu", callbacks=[Watch()], **quiet).fit(SupervisedModule(network), datamodule=data)
"""


def start(table, rounds):
    """Measure CPU seconds until the command line and the package are of use."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(HERE.parent / "configs", Path(folder) / "configs")
        options = {"cwd": folder}
        commands = {
            "--help": [*COMMAND, "--help"],
            "compare --help": [*COMMAND, "compare", "--help"],
            "--version": [*COMMAND, "--version"],
            "a typo (comparee)": [*COMMAND, "comparee"],
        }
        fit = [*COMMAND, *FIT, "--trainer.callbacks+=first_step.FirstStep", f"--trainer.default_root_dir={folder}"]
        loaded = {
            "libraries": [sys.executable, "-c", f"{LIBRARIES}; {REPORT}"],
            "module": [sys.executable, "-c", f"from kd_lightning import DistillModule; {REPORT}"],
            "lightning": [sys.executable, "-c", f"import lightning; {REPORT}"],
            "first step": fit,
        }
        ways = {name: lambda command=command: cpu_seconds(command, **options) for name, command in commands.items()}
        ways["a typo (comparee)"] = lambda: cpu_seconds(commands["a typo (comparee)"], status=2, **options)
        ways["first line"] = lambda: _first_line([*COMMAND, *FIT], folder)
        ways |= {name: lambda command=command: _reported(command, folder) for name, command in loaded.items()}
        seconds = {name: [] for name in ways}
        for number in range(rounds + 1):
            for name, way in ways.items():
                taken = way()
                if number:  # the first one reads the files from disk
                    seconds[name].append(taken)
    for name in commands:
        table.add(f"start: {name}", seconds[name], most=0.5, unit=(1, "CPU s"))
    table.add("start: fit, first line", seconds["first line"], most=1.0, unit=(1, "CPU s"))
    pairs = [("fit, first step / import lightning", "first step", "lightning", 1.3)]
    pairs.append((f"from kd_lightning import DistillModule / {LIBRARIES}", "module", "libraries", 1.05))
    for row, of, over, most in pairs:
        table.add(f"start: {row}", seconds[of], seconds[over], most, unit=(1, "CPU s"))


def _first_line(command, folder):
    """CPU seconds of a process when it prints its first line."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=folder, **pipes) as process:
        line = process.stdout.readline()
        assert line.strip(), "a fit prints nothing"
        fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(") ", 1)[1].split()
        process.kill()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _reported(command, folder):
    """CPU seconds that a process reports about itself."""
    paths = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    options = {"capture_output": True, "text": True, "env": os.environ | {"PYTHONPATH": paths}}
    found = subprocess.run(command, cwd=folder, **options)
    lines = [line for line in found.stdout.splitlines() if line.startswith("CPU seconds")]
    if not lines:
        raise RuntimeError(f"{command} failed: {found.stderr}")
    return float(lines[0].split()[-1])


def demo(table, rounds, base):
    """Measure the commands of ``make demo`` after the install, against those of an earlier state."""
    seconds = {name: {"now": [], "before": []} for name in DEMO}
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as root:
            for command, arguments in DEMO.items():
                for name, checkout in {"now": HERE.parent, "before": Path(base).resolve()}.items():
                    folder = Path(root) / name
                    if not folder.exists():
                        shutil.copytree(checkout / "configs", folder / "configs")
                    environment = os.environ | {"PYTHONPATH": str(checkout)}
                    check = f"import kd_lightning as k; assert k.__file__.startswith({str(checkout)!r})"
                    subprocess.run([sys.executable, "-P", "-c", check], check=True, cwd=folder, env=environment)
                    taken = cpu_seconds([*COMMAND, *arguments], cwd=folder, env=environment)
                    seconds[command][name].append(taken)
                    log(f"demo, round {number + 1}: {command}, {name}: {taken:.1f} CPU s")
    for command, found in seconds.items():
        table.add(f"make demo, {command}: now / before", found["now"], found["before"], unit=(1, "CPU s"))
    now, before = (
        [sum(parts) for parts in zip(*(f[n] for f in seconds.values()), strict=True)] for n in ("now", "before")
    )
    table.add("make demo, all: now / before", now, before, 0.5, unit=(1, "CPU s"))


def memory(table, rounds):
    """Measure whether anonymous memory is flat over 50 epochs.

    Crops have random sizes, so that the memory that the C library holds grows for some epochs, and then stays.
    """
    for name in ("digits", "JPEG files, from the store"):
        found = []
        for _ in range(rounds):
            command = [sys.executable, "-W", "ignore", "-c", MEMORY, name]
            process = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
            found.append([float(line.split()[1]) for line in process.stdout.splitlines() if line.startswith("memory")])
            if process.returncode:
                raise RuntimeError(process.stderr)
        log(f"memory, {name}, after 5, 25 and 50 epochs: {found} MiB")
        early, middle, late = zip(*found, strict=True)
        table.add(f"anonymous memory after 50 epochs / after 5: {name}", [*late], [*early], 1.03, unit=(1, "MiB"))
        growth = [end - start for end, start in zip(late, middle, strict=True)]
        row = f"anonymous memory, growth from epoch 25 to 50: {name}"
        table.add(row, growth, most=4.0, unit=(1, "MiB"))  # the allocator alone: 0 to 3
