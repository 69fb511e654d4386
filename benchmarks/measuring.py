"""What the benchmarks of cost share: the environment, paired ratios with spread and goal, and results on disk."""

import hashlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

# only the environment sets these for all threads of this process
ENVIRONMENT = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "MALLOC_ARENA_MAX"), "1")
# one memory arena that returns nothing to the system: three identical contenders then take 2.26 to 2.30 seconds. With
# an arena for each thread, which returns memory and requests it again, they take 2.57 to 2.82 seconds
ENVIRONMENT |= dict.fromkeys(("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"), str(2**32))


def set_environment():
    """Start this process anew if the environment is another one. Call it before torch is imported."""
    if os.environ | ENVIRONMENT != {**os.environ}:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ENVIRONMENT)


def use_one_core():
    """Run this process and its children on one core."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def log(text):
    """Print progress to stderr; stdout has the tables alone."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def middle_and_spread(values):
    """Median, 10th and 90th percentile of the same numbers."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, *_, high = statistics.quantiles(values, n=10, method="inclusive")
    return statistics.median(values), low, high


def code_hash(scripts=None):
    """Hash of the sources: what was measured with other code does not count.

    Args:
        scripts: Files beside the package's. Default: None, which means all benchmarks.
    """
    package = Path(importlib.util.find_spec("kd_lightning").origin).parent
    files = sorted([*package.rglob("*.py"), *(scripts or Path(__file__).parent.glob("*.py"))])
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


class Table:
    """Rows with median, spread and goal, and the number of goals missed.

    A ratio is the median of the ratios of paired measurements; its spread is the 10th and 90th percentile of the same
    ratios.

    Args:
        file: File of JSON lines, to which each finished part is appended. Default: None, which means none.
    """

    def __init__(self, file=None):
        self.missed = 0
        self.file = None if file is None else Path(file)
        self._rows = []
        print("| ratio | medians | measured | 10 % to 90 % | to reach | |\n|---|---|---|---|---|---|", flush=True)

    def add(self, name, numerators, denominators=None, most=None, least=None, unit=(1, "s")):
        """Add one row.

        Args:
            name: Name of the ratio.
            numerators: Measurements.
            denominators: Measurements that were taken at the same time. Default: None, which means that the row is no
                ratio but a figure of its own.
            most: Highest value that reaches the goal.
            least: Lowest value that reaches the goal. A lower bound of 1 is reached if the spread reaches it.
            unit: Factor and name of the unit of the medians.
        """
        row = {"name": name, "numerators": numerators, "denominators": denominators}
        self._add(row | {"most": most, "least": least, "unit": unit})

    def _add(self, row):
        self._rows.append(row)
        (factor, unit), over = row["unit"], row["denominators"]
        own = [factor * value for value in row["numerators"]]
        medians = unit
        if over is not None:
            medians = f"{statistics.median(own):.3g} / {factor * statistics.median(over):.3g} {unit}"
            own = [a / b for a, b in zip(row["numerators"], over, strict=True)]
        middle, low, high = middle_and_spread(own)
        reached, goal = True, ""
        if row["most"] is not None:
            reached, goal = middle <= row["most"], f"≤ {row['most']}"
        elif row["least"] is not None:
            within = row["least"] == 1.0
            goal = f"≥ {row['least']}{' within the spread' if within else ''}"
            reached = (high if within else middle) >= row["least"]
        self.missed += not reached
        spread = f"{low:.3f} to {high:.3f}" if len(own) > 1 else "one value"
        miss = "" if reached else "missed"
        print(f"| {row['name']} | {medians} | {middle:.3f} | {spread} | {goal} | {miss} |", flush=True)

    def run(self, part, settings, measure):
        """Run a part, or print its rows from the file if it has them under the same settings, of the same code."""
        settings = settings | {"code": code_hash()}
        lines = [] if self.file is None or not self.file.exists() else self.file.read_text().splitlines()
        known = [found for found in map(json.loads, lines) if (found["part"], found["settings"]) == (part, settings)]
        if known:
            for row in known[-1]["rows"]:
                self._add(row)
            return
        self._rows = []
        measure(self)
        if self.file is not None:
            with self.file.open("a") as file:
                file.write(json.dumps({"part": part, "settings": settings, "rows": self._rows}) + "\n")


class Child:
    """A process of Python that takes turns with this one: it computes nothing until its turn, then prints one number.

    Args:
        code: Its code. It calls ``turn()`` at the end of each turn, with the number, and waits for the next one.
        arguments: Its ``sys.argv[1:]``.
        package: Folder of the package. Default: None, which means the installed one.
    """

    _HEAD = """
import sys, kd_lightning
assert kd_lightning.__file__.startswith(sys.argv.pop(1)), kd_lightning.__file__
def turn(number=0.0):
    print("turn", number, flush=True)
    if not sys.stdin.readline():
        sys.exit()
"""

    def __init__(self, code, *arguments, package=None):
        package = None if package is None else Path(package).resolve()
        paths = [*([] if package is None else [str(package)]), str(Path(__file__).parent)]
        known = os.environ.get("PYTHONPATH")
        environment = os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([*paths, *([known] if known else [])])}
        command = [
            sys.executable,
            "-P",
            "-W",
            "ignore",
            "-c",
            self._HEAD + code,
            str(package or ""),
            *map(str, arguments),
        ]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
        self.process = subprocess.Popen(command, **pipes)
        self._read()

    def turn(self):
        """Let it work for one turn. Return the number that it prints."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._read()

    def close(self):
        """End it."""
        self.process.stdin.close()
        self.process.wait()

    def _read(self):
        for line in self.process.stdout:  # libraries may print other lines
            if line.startswith("turn "):
                return float(line.split()[1])
        raise RuntimeError(f"a process of the benchmark ended early, with exit status {self.process.wait()}")


def cpu_seconds(command, status=0, **options):
    """CPU seconds of a process and of those that it waits for. Its output is not shown.

    Args:
        command: The command.
        status: Its exit status; any other is an error.
        options: Arguments of ``subprocess.run``.
    """
    start = sum(os.times()[2:4])
    found = subprocess.run(command, capture_output=True, text=True, **options)
    seconds = sum(os.times()[2:4]) - start
    if found.returncode != status:
        raise RuntimeError(f"{command} ended with status {found.returncode}: {found.stderr}")
    return seconds


def anonymous_memory():
    """Anonymous memory of this process in MiB (memory without mapped files)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024
