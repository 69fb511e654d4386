"""Kernels that are forked (see tests/processes/fork_server.py): what a notebook imports is there already.

Run as a script, it is such a kernel. Processes of this Python, which the notebook runs to its end, are forked from it.
"""

import contextlib
import io
import os
import subprocess
import sys
import traceback
from pathlib import Path

from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.provisioning import LocalProvisioner


class Provisioner(LocalProvisioner):
    """Forks the kernel."""

    async def launch_kernel(self, cmd, env, cwd, **kwargs):
        with contextlib.chdir(cwd):
            self.process = self.parent.processes.start(cmd, self.parent.output, DRAW_FIGURES="1")
        return self.connection_info


class ForkedKernel(AsyncKernelManager):
    """A kernel of the interpreter that runs the tests, whatever kernels the user has installed.

    Attributes:
        processes: The fixture, which forks it.
        output: File of what is printed outside of cells.
    """

    kernel_spec = KernelSpec(argv=[__file__, "-f", "{connection_file}"])
    processes = output = None

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.provisioner = Provisioner(parent=self, kernel_id=self.kernel_id, kernel_spec=self.kernel_spec)


RUN = subprocess.run


def run(command, **kwargs):
    """``subprocess.run`` of a command; ``[sys.executable, "-c", program, ...]`` runs in a fork of this process."""
    if command[:2] != [sys.executable, "-c"] or kwargs != {"capture_output": True, "text": True}:
        return RUN(command, **kwargs)
    pipes = [os.memfd_create(name) for name in ("stdout", "stderr")]
    if pid := os.fork():
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return subprocess.CompletedProcess(command, status, *(_read(pipe) for pipe in pipes))
    status = 1
    try:
        for stream, pipe in zip((1, 2), pipes, strict=True):
            os.dup2(pipe, stream)
        sys.stdout, sys.stderr = (io.TextIOWrapper(os.fdopen(stream, "wb")) for stream in (1, 2))
        sys.argv = command[1:2] + command[3:]
        exec(command[2], {"__name__": "__main__"})
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _read(pipe):
    with os.fdopen(pipe, "rb") as file:
        file.seek(0)
        return file.read().decode()


if __name__ == "__main__":
    from ipykernel.kernelapp import IPKernelApp

    sys.path.remove(str(Path(__file__).parent))
    subprocess.run = run
    IPKernelApp.launch_instance(argv=sys.argv[1:], exec_lines=["%matplotlib inline"])
