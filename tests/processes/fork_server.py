"""Starts processes that import nothing: this one imports the package once, and forks.

A process that is started afresh spends six seconds on imports. A forked one is a process of its own all the same: it
can be killed, and several of them can be the ranks of one run.

Requests and replies are JSON objects, one a line:
    {"argv": [...], "env": {...}, "cwd": "...", "output": "..."} -> {"pid": 1}     runs ``python -m kd_lightning *argv``
                                                                                  (a name of a script: ``python *argv``)
    {"pid": 1, "timeout": 60} -> {"returncode": 0}                                null if the process still runs
"""

import atexit
import json
import os
import random
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest  # scripts import test files, too
from blank_figures import CONFUSION, OF_METHODS, SAMPLES, leave_blank

import kd_lightning.cli.main
from kd_lightning.__main__ import main

running = set()
returncodes = {}


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
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
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
    assert kd_lightning.cli.main.DistillCLI
    leave_blank(pytest.MonkeyPatch(), [*SAMPLES, *CONFUSION, *OF_METHODS])
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        reply = {"returncode": wait(**request)} if "pid" in request else {"pid": start(**request)}
        print(json.dumps(reply), flush=True)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    serve()
