"""Run the tests marked ``gpu`` and the throughput benchmark on one GPU, in at most 8 minutes; installs nothing.

Run: make gpu PYTHON=python3 OUT=runs/gpu      (that is: python3 tests/gpu/run.py --out runs/gpu)

The interpreter must have the packages of pyproject.toml's ``dependencies``, and pytest. Writes ``tests.txt``,
``throughput.md`` and ``throughput.log`` into OUT. What an optional package would be needed for is skipped, by name.
Without a GPU it prints one line, and its exit status is 0, so that it can be called anywhere. Otherwise the exit status
is 0 if all tests pass and the benchmark ends, 1 if not, and 2 if a package is missing. A ratio that the benchmark
misses is in its table, and changes no exit status.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SECONDS = 465  # of all; leaves some for the start and the end
TESTS = 200  # of them for the tests, at most
REQUIRED = {  # name of the module: name of the package
    "torch": "torch",
    "torchvision": "torchvision",
    "lightning": "lightning",
    "torchmetrics": "torchmetrics",
    "jsonargparse": "jsonargparse[signatures]",
    "tensorboard": "tensorboard",
    "rich": "rich",
    "filelock": "filelock",
    "safetensors": "safetensors",
    "sklearn": "scikit-learn",
    "scipy": "scipy",
    "matplotlib": "matplotlib",
    "numpy": "numpy",
    "yaml": "PyYAML",
    "pytest": "pytest",
}


def run(command, seconds, out, log=None):
    """Run a command of this interpreter, and write what it prints; returns its exit status, or None after a timeout."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    with out.open("w") as stdout, (log or out).open("a") as stderr:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environment, stdout=stdout, stderr=stderr, start_new_session=True
        )
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # with its loaders' workers
            process.wait()
            return None


def main():
    """Run both; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the tables (default: runs/gpu)")
    out = parser.parse_args().out.absolute()
    missing = [package for module, package in REQUIRED.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(f"make gpu: {sys.executable} lacks {', '.join(missing)}")
        return 2
    import torch

    if not torch.cuda.is_available():
        print(f"make gpu: torch {torch.__version__} finds no GPU; nothing to run")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    end = time.monotonic() + SECONDS

    pytest = ["-m", "pytest", "tests/gpu", "-m", "gpu", "-rs", "-p", "no:cacheprovider", "--durations=20"]
    status = run(pytest, TESTS, out / "tests.txt")
    print((out / "tests.txt").read_text()[-6000:])
    print(f"tests: {'longer than ' + str(TESTS) + ' s' if status is None else 'exit status ' + str(status)}")
    failed = status != 0
    print(flush=True)

    seconds = int(end - time.monotonic())
    script = ["benchmarks/throughput.py", "--device", "cuda", "--quick"]
    status = run(script, seconds, out / "throughput.md", out / "throughput.log")
    table = (out / "throughput.md").read_text()
    print(table, (out / "throughput.log").read_text()[-2000:], sep="\n")
    ended = status is not None and f"torch {torch.__version__}" in table.rpartition("\n| ")[2]  # its last line
    print(f"throughput: {'ended' if ended else 'longer than ' + str(seconds) + ' s' if status is None else 'failed'}")
    return int(failed or not ended)


if __name__ == "__main__":
    sys.exit(main())
