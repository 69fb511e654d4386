"""What a step costs from the sample to the update, from files, and from the start: each part against a plain way.

Run: python benchmarks/pipeline.py                                     (about 10 minutes)
     python benchmarks/pipeline.py --base CHECKOUT --store FILE        (also against an earlier state; 20 minutes)
     python benchmarks/pipeline.py --only digits small --rounds 10

One thread runs on one core, and times are CPU time. Contenders take turns. A ratio is the median of the ratios of
single rounds (an epoch of training or loading, a batch of augmentation, a process). Its spread is the 10th and 90th
percentile of the same ratios. Exit status 1 means that a goal is missed.

- ``digits``, ``small``: from a plain loop over ready batches to our fit, with one part more in each row
- ``augmentation``: a batch of 64, whole against torchvision's v2 for one image at a time
- ``files``: batches of 224 x 224 pixels from JPEG files of 500 x 375, from the store of decoded pictures and from files
- ``start``: CPU seconds of help, version, imports, and of a fit up to its first step
- ``memory``: growth of memory over 50 epochs
- ``demo``: the commands of ``make demo`` against those of ``--base``
"""

import argparse
import sys
import time
from importlib import import_module
from importlib.metadata import version

from measuring import Table, log, set_environment, use_one_core

PARTS = {  # module, and the default number of rounds
    "digits": ("pipeline_training", 40),
    "small": ("pipeline_training", 15),
    "augmentation": ("pipeline_images", 40),
    "files": ("pipeline_images", 11),
    "start": ("pipeline_processes", 7),
    "memory": ("pipeline_processes", 2),
    "demo": ("pipeline_processes", 2),
}


def main():
    """Run the selected parts. Return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, nargs="*", default=[*PARTS], help="some of the parts")
    parser.add_argument("--rounds", type=int, help="rounds of each part")
    parser.add_argument("--pictures", type=int, default=512, help="number of JPEG pictures")
    parser.add_argument("--base", help="checkout of an earlier state, for files and demo")
    parser.add_argument("--store", help="file of finished parts: an interrupted run of the same code goes on")
    options = parser.parse_args()
    use_one_core()
    begin, table = time.time(), Table(options.store)
    for name in options.only:
        module, rounds = PARTS[name]
        settings = {"rounds": options.rounds or rounds}
        if name in ("files", "demo"):
            settings["base"] = options.base
        if name == "files":
            settings["pictures"] = options.pictures
        if name == "demo" and options.base is None:
            log("skipped: demo: it needs --base")
            continue
        log(name)
        table.run(name, settings, lambda table, m=module, n=name, s=settings: getattr(import_module(m), n)(table, **s))
    print(", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "lightning")))
    print(f"{(time.time() - begin) / 60:.0f} minutes")
    return int(table.missed > 0)


if __name__ == "__main__":
    set_environment()
    sys.exit(main())
