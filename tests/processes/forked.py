"""Starts commands and scripts in processes of their own that need no imports, several at once."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path


class Server:
    """Forks processes (see fork_server.py)."""

    def __init__(self, hash_seed):
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "fork_server.py")],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": hash_seed},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def read(self):
        return json.loads(self.process.stdout.readline())

    def request(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.read()

    def close(self):
        """End it, and all processes that still run."""
        self.process.stdin.close()
        self.process.wait(timeout=60)


class Forked:
    """A process that a server has forked, as ``subprocess.Popen`` describes one."""

    stdin = stdout = stderr = None

    def __init__(self, server, argv, env, output):
        self.server = server
        self.pid = server.request(argv=argv, env=env, cwd=str(Path.cwd()), output=str(output))["pid"]

    def poll(self):
        return self.wait(0.02)

    def wait(self, timeout=60):
        return self.server.request(pid=self.pid, timeout=timeout)["returncode"]

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def terminate(self):
        self.send_signal(signal.SIGTERM)


class Processes:
    """Starts processes that import what the calling test can import.

    There are two servers: sets are in another order in the first process than in the second, as in two processes that
    are started afresh.
    """

    def __init__(self):
        self.servers = [Server(hash_seed) for hash_seed in "12"]
        assert [server.read() for server in self.servers] == [{"ready": True}] * 2

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
        started = [
            self.start(argv, output, number % 2, **extra)
            for number, ((argv, extra), output) in enumerate(zip(commands, outputs, strict=True))
        ]
        codes = [process.wait(timeout) for process in started]
        for process, code in zip(started, codes, strict=True):
            if code is None:
                process.kill()
                process.wait(30)
        return codes, [output.read_text() for output in outputs]

    def start(self, argv, output, server=0, **environment):
        """Start a command in the current folder.

        Args:
            argv: Its arguments, see :meth:`run`.
            output: File of what it prints.
            server: Number of the server.
            environment: Variables of the environment.

        Returns:
            The process.
        """
        shared = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        return Forked(self.servers[server], argv, shared | environment, output)

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
        """End the servers."""
        for server in self.servers:
            server.close()


def free_port():
    """Below those that the system gives to outgoing connections, one of which might take it in the meantime."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)  # others may have been seeded alike
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
