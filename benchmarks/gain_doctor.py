"""What doctor finds where teaching hurts, and what its cures are worth: a folder a class, default photo transforms.

Run: python benchmarks/gain.py --packages DIR --prepare data/gain                      (the stamps, see there)
     python benchmarks/gain_doctor.py [--data data/gain] [--folder data/gain_doctor]   (25 CPU minutes)

The commands are those of a user: MobileNetV2 with ImageNet weights is fine-tuned on 209 pictures of 6 classes, and
teaches a ResNet-8 at soft weight 0.9 and temperature 4, 15 epochs each. Doctor examines the config, ``experiment``
trains the student with the teacher and without it, and doctor examines the config again, with these runs. Then each of
its cures is followed: its lines of YAML are a second config. Lines with a name to fill in are left out.

If too few validation samples select the deployed weights, that cure goes first, since the others cannot be measured
without it. The student alone has the same lines, so that it is trained for as long. Finished fits are not repeated.
"""

import argparse
import os
import random
import re
import shutil
from pathlib import Path

import yaml
from training import interval, quiet, spread, versions

from kd_lightning.cli.commands.doctor import DoctorCLI, print_findings
from kd_lightning.cli.commands.experiment import run_experiment
from kd_lightning.cli.main import DistillCLI

CLASSES, TEST, EPOCHS = 6, 0.3, 15
FIRST = "selection"
_TO_FILL_IN = re.compile(r"\b(PICTURES|TEACHER)")


def write_photos(stamps: Path, folder: Path, split: int) -> None:
    """Copy the stamps to ``train`` and ``test``: 30 % of each class, at random, are for the test."""
    for source in sorted(stamps.iterdir()):
        files = sorted(source.glob("*.png"))
        random.Random(f"{split}{source.name}").shuffle(files)
        count = round(TEST * len(files))
        for part, chosen in (("test", files[:count]), ("train", files[count:])):
            (folder / part / source.name).mkdir(parents=True, exist_ok=True)
            for file in chosen:
                shutil.copy(file, folder / part / source.name / file.name)


def write_configs(weights: Path, epochs: int) -> None:
    """Write ``teacher.yaml`` and ``student.yaml`` to the working directory."""
    mobilenet = "torchvision.models.mobilenet_v2"
    pretrained = {"path": str(weights), "model": {"class_path": mobilenet}}
    network = {"class_path": "kd_lightning.load_weights", "init_args": pretrained}
    expert = {"network": network, "num_classes": CLASSES}
    loaded = {"class_path": mobilenet, "dict_kwargs": {"num_classes": CLASSES}}
    file = "runs/teacher/version_0/student.safetensors"
    small = {"depth": 8, "num_classes": CLASSES}
    loss = {"class_path": "kd_lightning.losses.KDLoss", "init_args": {"temperature": 4.0}}
    models = {
        "teacher": (
            "SupervisedModule",
            {"student": {"class_path": "kd_lightning.reset_classifier", "init_args": expert}},
        ),
        "student": (
            "DistillModule",
            {
                "student": {"class_path": "kd_lightning.models.CifarResNet", "init_args": small},
                "teacher": {"class_path": "kd_lightning.load_weights", "init_args": {"path": file, "model": loaded}},
                "soft_weight": 0.9,
                "soft_loss": loss,
            },
        ),
    }
    source = {"train": "photos/train", "test": "photos/test", "image_size": 64}
    for name, (class_path, arguments) in models.items():
        cosine = {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR", "init_args": {"T_max": epochs}}
        arguments |= {
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001}},
            "lr_scheduler": cosine,
        }
        data = {"source": {"class_path": "ImageFolder", "init_args": source}, "batch_size": 32}
        trainer = {"max_epochs": epochs, "accelerator": "cpu", "enable_progress_bar": False}
        config = {
            "name": name,
            "seed_everything": 0,
            "trainer": trainer,
            "model": {"class_path": class_path, "init_args": arguments},
            "data": {"class_path": "SemiSupervisedDataModule", "init_args": data},
        }
        Path(f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def doctor(args, title):
    """Print what doctor finds, and return the lines of each cure that needs nothing to be filled in."""
    print(f"\n## {title}\n")
    findings = DoctorCLI(["fit", *args]).findings
    print_findings(findings)
    return {one.name: one.lines for one in findings if one.lines and not _TO_FILL_IN.search(one.lines)}


def ways(before, cures):
    """Return the names of the cures that are followed, by the row of the table.

    Args:
        before: Cures that doctor has named before there were runs.
        cures: Those that it names with the runs.
    """
    first = [name for name in cures if name == FIRST]
    found = {"as it is": [], FIRST: first}
    found |= {" + ".join([*first, name]): [*first, name] for name in before | cures if name != FIRST}
    return found | {"all that runs leave": [*first, *(name for name in cures if name != FIRST)]}


def configs(lines, number):
    """Write the lines of cures to files. Return the arguments by the name of the cure."""
    arguments = {}
    for name, text in lines.items():
        file = Path(f"cure_{number}_{name.replace(' ', '_')}.yaml")
        file.write_text(text)
        arguments[name] = ["--config", str(file)]
    return arguments


def measure(name, args, seeds):
    """Run an experiment, and return the test accuracies in % of the student alone and with the teacher, by seed."""
    done = run_experiment(args, seeds, out=Path("runs", f"{name.replace(' ', '')}_comparison"))
    return [[100 * run.result("test").figures["accuracy"] for run in runs] for runs in (done.alone, done.method)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default="data/gain", help="folder that gain.py --prepare has written")
    parser.add_argument("--folder", type=Path, default="data/gain_doctor", help="folder of pictures, configs and runs")
    parser.add_argument("--split", type=int, default=0, help="number of the random split")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    options = parser.parse_args()
    quiet()
    data, folder = options.data.resolve(), options.folder / f"split_{options.split}, {options.epochs} epochs"
    write_photos(data / "stamps", folder / "photos", options.split)
    os.chdir(folder)
    write_configs(data / "mobilenet.pth", options.epochs)
    if not Path("runs/teacher/version_0/student.safetensors").is_file():
        DistillCLI(["fit", "--config", "teacher.yaml"])
    student = ["--config", "student.yaml"]
    before = configs(doctor(student, "doctor before any run"), 1)
    rows = {"as it is": measure("as it is", student, options.seeds)}
    cures = configs(doctor(student, "doctor after experiment"), 2)
    for way, names in ways(before, cures).items():
        args = student + [word for name in names for word in (before | cures)[name]]
        rows[way] = rows.get(way) or measure(way, args, options.seeds)
    again = configs(doctor(args, "doctor after all cures"), 3)
    if "following" in again:
        rows["and following again"] = measure("again", args + again["following"], options.seeds)
    print("\n| cures followed | alone % | with the teacher % | difference |\n|---|---|---|---|")
    for way, (alone, taught) in rows.items():
        print(f"| {way} | {spread(alone)} | {spread(taught)} | {interval(taught, alone)} |")
    print(f"\n{versions('scikit-learn')}")
