"""Kill runs of every method at random, resume them, and compare their ends with those of unbroken runs.

Run: python benchmarks/kills.py [--count 100] [--seed 0] [--out runs/kills.jsonl]      (about 20 minutes on two cores)

A case is one digits config of a module and of a way of labeling (as in tests/contract), with random settings: when
checkpoints are written, averaged weights, accumulated batches, worker processes. It runs unbroken. Then it runs again
and gets one to four SIGKILLs in a row, each before a random step or at a random moment after its start. Each time it
goes on with ``--ckpt_path last``; a run that is killed before its first checkpoint starts anew. At the end all
checkpoints (weights, averaged weights, optimiser, scheduler, monitored metrics) and the deployed weights must be equal,
bit for bit.

Each finished case is a line of the output file. The command goes on where an earlier one ended.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "contract"))
EPOCHS, BATCHES = 3, 5
CHECKPOINTS = {
    "best and last": None,
    **{f"every {n} steps": {"monitor": None, "every_n_train_steps": n, "save_top_k": -1} for n in (1, 2, 3)},
}
EMA = {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": {"decay": 0.5}}
COMPARED = ("global_step", "epoch", "state_dict", "current_model_state", "averaging_state", "optimizer_states")
COMPARED += ("lr_schedulers", "exact_resume", "epoch_means")


def methods():
    """Each config to try, with the changes that make it another method."""
    from conftest import VARIANTS, one_of_each_module

    return [(path, changes) for path in one_of_each_module() for changes in ({}, *VARIANTS.get(path.stem, ()))]


def draw(number, seed):
    """The method and the settings of a case."""
    rng = random.Random(f"{seed} {number}")
    found = methods()
    path, changes = found[number % len(found)]
    settings = {
        "checkpoint": rng.choice([*CHECKPOINTS]),
        "ema": rng.random() < 0.3,
        "accumulate": rng.choice([1, 1, 2, 3]),
        "workers": rng.choice([0, 0, 2]),
    }
    return path, changes, settings, rng


def write_config(path, changes, settings):
    """Write the config of a case."""
    from conftest import quick

    config = quick(path, **changes)
    config["trainer"] |= {
        "max_epochs": EPOCHS,
        "limit_train_batches": BATCHES,
        "accumulate_grad_batches": settings["accumulate"],
    }
    config["trainer"]["callbacks"] += [EMA] * settings["ema"]
    config["data"]["init_args"]["num_workers"] = settings["workers"]
    config["checkpoint"] = CHECKPOINTS[settings["checkpoint"]] or {}
    Path("config.yaml").write_text(yaml.safe_dump(config))


@cache
def processes():
    """The server that forks this process's runs."""
    from conftest import Processes

    return Processes()


def fit(name, *arguments, **environment):
    """Fit in a process of its own; gives its exit status and what it printed."""
    command = ["fit", "--config", "config.yaml", "--name", name, *arguments]
    (code,), (output,) = processes().run((command, environment))
    return code, output


def checkpoints(name):
    """The checkpoints of all attempts at a run, the newest last."""
    return sorted(Path("runs", name).glob("version_*/checkpoints/*.ckpt"), key=lambda path: path.stat().st_mtime_ns)


def kill(rng, steps):
    """When to kill a run that has done some of its steps, as KILL_AT of tests/contract/parts.py."""
    done = torch.load(checkpoints("killed")[-1], weights_only=True)["global_step"] if checkpoints("killed") else 0
    moment = "" if rng.random() < 0.5 else f"+{rng.uniform(0, 0.1):.3f}"
    return f"{rng.randrange(min(done, steps - 1), steps)}{moment}"


def run(number, seed):
    """Run a case: gives its line."""
    path, changes, settings, rng = draw(number, seed)
    method = "-".join([path.stem, *map(str, changes.values())])
    line = {"number": number, "seed": seed, "method": method, **settings, "kills": [], "restarts": 0, "fault": None}
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            write_config(path, changes, settings)
            code, output = fit("whole")
            if code:
                return line | {"fault": f"the unbroken run failed with {code}: {output[-2000:]}"}
            steps = EPOCHS * -(-BATCHES // settings["accumulate"])
            for _ in range(rng.randint(1, 4)):
                moment = kill(rng, steps)
                code, output = fit("killed", *resume(line), KILL_AT=moment)
                line["kills"] += [moment] * (code == -signal.SIGKILL)
                if code not in (0, -signal.SIGKILL):
                    return line | {"fault": f"an attempt ended with {code}: {output[-2000:]}"}
                if not code:  # it has ended before the moment
                    break
            code, output = fit("killed", *resume(line))
            if code:
                return line | {"fault": f"the last attempt ended with {code}: {output[-2000:]}"}
            found = compare()
            return line | {"fault": f"other ends: {found[:5]}" if found else None}
        finally:
            os.chdir(before)


def resume(line):
    """The arguments that resume the killed run, if it has a checkpoint."""
    if checkpoints("killed"):
        return ["--ckpt_path", "last"]
    line["restarts"] += bool(line["kills"])
    return []


def compare():
    """Where the ends of both runs differ."""
    (whole,), attempts = Path("runs/whole").iterdir(), [*Path("runs/killed").iterdir()]
    killed = max(attempts, key=lambda run: (run / "student.safetensors").is_file())
    names = [path.name for path in (whole / "checkpoints").iterdir()]
    found = []
    for name in sorted(names):
        if not (killed / "checkpoints" / name).is_file():
            found.append(f"{name} is missing")
            continue
        one, other = (read(run / "checkpoints" / name) for run in (whole, killed))
        for key in COMPARED:
            found += differences(one.get(key), other.get(key), f"{name}/{key}")
    one, other = (load_file(run / "student.safetensors") for run in (whole, killed))
    return found + differences(one, other, "student.safetensors")


def read(path):
    """A checkpoint, with the sums of metrics by name: a resumed run may log the same in another hook."""
    checkpoint = torch.load(path, weights_only=True)
    sums = checkpoint["exact_resume"]["sums"]
    checkpoint["exact_resume"]["sums"] = {key.partition(".")[2]: (s["value"], s["count"]) for key, s in sums.items()}
    return checkpoint


def differences(one, other, place):
    """Where two values differ, bit for bit."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [found for key in one for found in differences(one[key], other[key], f"{place}/{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return [found for n in range(len(one)) for found in differences(one[n], other[n], f"{place}/{n}")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        equal = one.dtype == other.dtype and torch.equal(one.nan_to_num(), other.nan_to_num())
    else:
        equal = type(one) is type(other) and (one == other or one != one)
    return [] if equal else [place]


def print_table(lines):
    """One row a method."""
    columns = ("cases", "kills", "starts anew", "bit-equal")
    counts = {method: Counter() for method in sorted({line["method"] for line in lines})} | {"all": Counter()}
    for line in lines:
        for name in (line["method"], "all"):
            new = (1, len(line["kills"]), line["restarts"], int(line["fault"] is None))
            counts[name].update(dict(zip(columns, new, strict=True)))
    print(f"| method | {' | '.join(columns)} |\n|---|---|---|---|---|")
    for name, count in counts.items():
        print(f"| {name} | " + " | ".join(str(count[column]) for column in columns) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", type=int, nargs="*", help="the numbers of the cases to run")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "kills.jsonl")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(text) for text in options.out.read_text().splitlines()] if options.out.is_file() else []
    done = {line["number"] for line in lines if line["seed"] == options.seed}
    numbers = [number for number in options.only or range(options.count) if number not in done]
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool, options.out.open("a") as file:
        for case in as_completed([pool.submit(run, number, options.seed) for number in numbers]):
            lines.append(case.result())
            print(json.dumps(lines[-1]), file=file, flush=True)
            if lines[-1]["fault"]:
                print(lines[-1], flush=True)
    print_table([line for line in lines if line["seed"] == options.seed])
    sys.exit(any(line["fault"] for line in lines))
