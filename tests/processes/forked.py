"""Starts commands and scripts in processes of their own that need no imports, several at once."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path


class Processes:
    """A server that forks processes (see fork_server.py). They import what the calling test can import."""

    def __init__(self):
        self.server = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "fork_server.py")],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert json.loads(self.server.stdout.readline()) == {"ready": True}

    def _request(self, **request):
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def run(self, *commands, timeout=150):
        """Run commands at the same time.

        Args:
            commands: Each a tuple of arguments and variables of the environment. The arguments are those of
                ``python -m kd_lightning``, or a script, whose name ends in ``.py``, and its arguments.
            timeout: Seconds that each may take.

        Returns:
            The exit status of each, None where one ran longer than ``timeout`` seconds, and what each printed.
        """
        outputs = [Path.cwd() / f"output_{number}.txt" for number in range(len(commands))]
        shared = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        pids = [
            self._request(argv=argv, env=shared | extra, cwd=str(Path.cwd()), output=str(output))["pid"]
            for (argv, extra), output in zip(commands, outputs, strict=True)
        ]
        codes = [self._request(pid=pid, timeout=timeout)["returncode"] for pid in pids]
        for pid, code in zip(pids, codes, strict=True):
            if code is None:
                os.kill(pid, signal.SIGKILL)
                self._request(pid=pid, timeout=30)
        return codes, [output.read_text() for output in outputs]

    def run_ranks(self, argv, nodes=1, end=0, world=2, **environment):
        """Run the processes of one fit, which find each other as ``torchrun``'s do.

        They are started once more, on another port, where they do not find each other.

        Args:
            argv: Arguments of each, see :meth:`run`.
            nodes: Number of machines that they believe to run on.
            end: The exit status that all must have.
            world: Number of processes.
            environment: Variables of the environment.
        """
        for last in (False, True):
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
            shared |= {"LOCAL_WORLD_SIZE": str(world // nodes), "TORCHELASTIC_RUN_ID": "none"} | environment
            ranks = [
                {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank % (world // nodes)),
                    "GROUP_RANK": str(rank * nodes // world),
                }
                for rank in range(world)
            ]
            codes, outputs = self.run(*((argv, shared | rank) for rank in ranks))
            if None not in codes or last:
                assert codes == [end] * world, "\n\n".join(output[-3000:] for output in outputs)
                return

    def close(self):
        """End the server, and all processes that still run."""
        self.server.stdin.close()
        self.server.wait(timeout=60)


def free_port():
    """Below those that the system gives to outgoing connections, one of which might take it in the meantime."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)  # others may have been seeded alike
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
