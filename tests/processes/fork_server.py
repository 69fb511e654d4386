"""Starts processes that import nothing: this one imports the package and fits a network once, and forks.

A process that is started afresh spends six seconds on imports, and half of its first fit on what later fits find: lazy
imports, type hints and docstrings that were read. A forked one is a process of its own all the same: it can be killed,
and several of them can be the ranks of one run.

Requests and replies are JSON objects, one a line:
    {"argv": [...], "env": {...}, "cwd": "...", "output": "..."} -> {"pid": 1}     runs ``python -m kd_lightning *argv``
                                                                                  (a name of a script: ``python *argv``)
    {"pid": 1, "timeout": 60} -> {"returncode": 0}                                null if the process still runs
"""

import atexit
import io
import json
import logging
import os
import random
import runpy
import signal
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest  # scripts import test files, too
import torch
from blank_figures import CONFUSION, OF_METHODS, SAMPLES, leave_blank

import kd_lightning.cli.main
from kd_lightning.__main__ import main

running = set()
returncodes = {}
blank = pytest.MonkeyPatch()
FIT = """
name: warm
seed_everything: 1
trainer:
  {accelerator: cpu, max_epochs: 1, limit_train_batches: 1, limit_val_batches: 1, enable_progress_bar: false}
model:
  class_path: DistillModule
  init_args:
    student: {class_path: DigitsCNN, init_args: {width: 4}}
    teacher: {class_path: DigitsCNN, init_args: {width: 4}}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.01}}
data:
  class_path: SemiSupervisedDataModule
  init_args: {source: {class_path: Digits}, labeled: 5, batch_size: 32}
"""


def warm_up():
    """Fit once, in a folder that is removed, and forget what was warned of."""
    before = Path.cwd()
    logging.disable()
    with (
        tempfile.TemporaryDirectory() as folder,
        redirect_stdout(io.StringIO()),
        warnings.catch_warnings(),
        torch.random.fork_rng(),
    ):
        os.chdir(folder)
        warnings.simplefilter("ignore")
        Path("config.yaml").write_text(FIT)
        kd_lightning.cli.main.DistillCLI(["fit", "--config", "config.yaml"])
        os.chdir(before)
    logging.disable(logging.NOTSET)


def start(argv, env, cwd, output):
    """Fork a process that runs a command; returns its id."""
    pid = os.fork()
    if pid:
        running.add(pid)
        return pid
    status = 1
    try:
        target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(target, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(env)
        if "DRAW_FIGURES" in env:
            blank.undo()
        sys.path[:0] = env.get("PYTHONPATH", "").split(os.pathsep)
        random.seed()
        np.random.seed()
        if argv[0].endswith(".py"):
            sys.path.insert(0, str(Path(argv[0]).resolve().parent))
            sys.argv = argv
            runpy.run_path(argv[0], run_name="__main__")
        else:
            sys.argv = ["kd_lightning", *argv]
            main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


def wait(pid, timeout):
    """The exit status of a process, as ``subprocess`` gives it; None if it still runs after ``timeout`` seconds."""
    end = time.monotonic() + timeout
    while pid not in returncodes and time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            running.discard(pid)
            returncodes[pid] = os.waitstatus_to_exitcode(status)
        else:
            time.sleep(0.01)
    return returncodes.get(pid)


def serve():
    """Serve requests until stdin is closed, then end all processes that still run."""
    leave_blank(blank, [*SAMPLES, *CONFUSION, *OF_METHODS])
    warm_up()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        reply = {"returncode": wait(**request)} if "pid" in request else {"pid": start(**request)}
        print(json.dumps(reply), flush=True)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    serve()
