"""Mutate the shipped configs at random, and check that each either runs or ends in one clear line.

Run: python benchmarks/mutations.py [--count 200] [--seed 0] [--show]      (about 6 minutes on two cores)

A mutation changes one key of one config: misspelt, dropped, doubled, of another type, or out of range. Then the config
fits for a few steps on small data, as in tests/contract. It is right if it runs. It is also right if it ends with exit
status 2, without a traceback, and with one last line that begins with "error: " and names the key or its value.
"""

import argparse
import contextlib
import io
import os
import random
import re
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
KINDS = ("misspelt", "dropped", "doubled", "of another type", "out of range")
TYPES = ["much", [1, 2], {"some": 1}, None, True, 3.7, -1]
SECOND = "__second__"
SECONDS = 300


def places(node, path=()):
    """The path of every key of a config."""
    for key, child in node.items() if isinstance(node, dict) else enumerate(node):
        if isinstance(node, dict):
            yield (*path, key)
        if isinstance(child, dict | list):
            yield from places(child, (*path, key))


def parent_of(config, path):
    """The mapping that holds the last key of a path; None if there is no such path."""
    for key in path[:-1]:
        try:
            config = config[key]
        except (KeyError, IndexError, TypeError):
            return None
    return config if isinstance(config, dict) and path[-1] in config else None


def misspell(word, rng):
    """Drop, double or swap letters."""
    at = rng.randrange(len(word))
    swapped = word[:at] + word[at + 1 : at + 2] + word[at] + word[at + 2 :]
    other = rng.choice([word[:at] + word[at + 1 :], word[:at] + word[at] + word[at:], swapped])
    return other if other not in ("", word) else word * 2


def out_of_range(value, rng):
    """A value of the same type that is far out of range."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return rng.choice([-value or -1, 0, value * 1000 + 1, -1e9, float("nan"), float("inf")])
    if isinstance(value, str):
        return rng.choice([f"{value}x", "nowhere", ""])
    return [] if isinstance(value, list) else {}


def mutate(config, path, kind, rng):
    """The mutated config as text."""
    config = deepcopy(config)
    parent, key = parent_of(config, path), path[-1]
    if kind == "misspelt":
        word = misspell(key, rng)
        items = [(word if name == key else name, value) for name, value in parent.items()]
        parent.clear()
        parent.update(items)
    elif kind == "dropped":
        del parent[key]
    elif kind == "doubled":
        parent[f"{key}{SECOND}"] = deepcopy(parent[key])
    else:
        before = parent[key]
        if kind == "of another type":
            parent[key] = rng.choice([other for other in TYPES if type(other) is not type(before)])
        else:
            parent[key] = out_of_range(before, rng)
    return yaml.safe_dump(config, sort_keys=False).replace(SECOND, "")


def run(number, text):
    """Fit a config given as text: ("runs" | "refused" | "FAULT", the message)."""
    from kd_lightning.__main__ import main

    Path(f"{number}.yaml").write_text(text)
    out, err = io.StringIO(), io.StringIO()

    def late(*_):
        raise TimeoutError(f"still running after {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # these two hold for any max_epochs, and for any number of processes
            main(["fit", "--config", f"{number}.yaml", "--trainer.max_steps", "3", "--trainer.accelerator", "cpu"])
    except SystemExit as end:
        lines = err.getvalue().strip().splitlines()
        last = lines[-1] if lines else ""
        clear = end.code == 2 and last.startswith("error: ") and "Traceback" not in err.getvalue()
        return ("refused" if clear else "FAULT"), last
    except BaseException:
        return "FAULT", traceback.format_exc()
    finally:
        signal.alarm(0)
    return "runs", ""


def try_one(number, seed):
    """Make mutation ``number``, and run it in a folder of its own."""
    sys.path.insert(0, str(ROOT / "tests" / "contract"))
    import torch
    from conftest import CONFIGS, quick

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30,) * 2)  # a run that needs more memory fails alone
    rng = random.Random(f"{seed} {number}")
    path = rng.choice(CONFIGS)
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            config = quick(path)
            shipped = yaml.safe_load(path.read_text())
            keys = [place for place in places(shipped) if parent_of(config, place) is not None]
            place, kind = rng.choice(keys), rng.choice(KINDS)
            text = mutate(config, place, kind, rng)
            verdict, message = run(number, text)
        finally:
            os.chdir(before)
    key = ".".join(map(str, place))
    if verdict == "refused" and not names(message, place, text):
        verdict = "FAULT"
        message = f"does not name the key: {message}"
    return number, path.stem, key, kind, verdict, message


def names(message, place, text):
    """Whether a message names the key, its parent, or a name that the mutation added."""
    words = {str(part) for part in place} - {"init_args", "class_path", "model", "data", "trainer"}
    if place[-1] in ("class_path", "init_args", "model", "data", "trainer"):
        words.add(str(place[-1]))
    spelt = re.findall(r"[\w.]+", message)
    return any(word in spelt or any(word in part.split(".") for part in spelt) for word in words) or any(
        len(part) > 3 and f"{part}:" in text for part in spelt
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="*", help="the numbers of the mutations to run")
    parser.add_argument("--show", action="store_true", help="print every mutation, not the faults alone")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    numbers = options.only or range(options.count)
    counts, faults = Counter(), 0
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        for number, stem, key, kind, verdict, message in pool.map(partial(try_one, seed=options.seed), numbers):
            counts[kind, verdict] += 1
            faults += verdict == "FAULT"
            if options.show or verdict == "FAULT":
                print(f"{number}: {stem} {key} {kind}: {verdict} {message}", flush=True)
    print("| mutation | runs | refused in one line | faults |\n|---|---|---|---|")
    for kind in KINDS:
        print(f"| {kind} | " + " | ".join(str(counts[kind, v]) for v in ("runs", "refused", "FAULT")) + " |")
    total = [sum(counts[kind, v] for kind in KINDS) for v in ("runs", "refused", "FAULT")]
    print("| all | " + " | ".join(map(str, total)) + " |")
    sys.exit(faults > 0)
