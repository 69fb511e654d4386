"""Quick runs of the shipped configs: the same method on small data for a few steps."""

import os
import re
import shutil
import sys
from contextlib import contextmanager
from copy import deepcopy
from functools import cache, reduce
from pathlib import Path

import pytest
import torch
import yaml
from blank_figures import OF_METHODS, leave_blank

from kd_lightning.cli.main import DistillCLI
from kd_lightning.runs.build import build
from kd_lightning.runs.csv_logger import read_metrics
from kd_lightning.teachers.teacher import Teacher

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # configs name classes of parts.py, in processes of their own too
from parts import save_masks  # noqa: E402

CONFIGS = sorted((HERE.parent.parent / "configs").glob("*.yaml"))
TEXTS = sorted(HERE.glob("*.yaml"))  # batches whose inputs are a mapping; and regression
MASKS = [path for path in CONFIGS if path.stem == "segmentation_distill"]  # a label for each pixel
EPOCHS, STEPS = 2, 4
TRAINER = {
    "max_epochs": EPOCHS,
    "max_steps": -1,
    "limit_train_batches": STEPS,
    "limit_val_batches": 2,
    "limit_test_batches": 2,
    "limit_predict_batches": 2,
    "log_every_n_steps": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "precision": "32-true",
    "sync_batchnorm": False,
    "benchmark": False,
}
CHECKPOINT = {"monitor": None, "every_n_train_steps": 2, "save_top_k": -1}
FAKE = {"class_path": "FakeData", "init_args": {"size": 64, "num_classes": 4}}
OUTPUTS = {"cifar100": 100, "imagenet": 1000}  # of the students, which stay as shipped
# a quarter of the real area or less: a convolution in bfloat16 is slow on a CPU
IMAGE_SIZE = {"TorchvisionDataset": [3, 16, 16], "ImageFolder": [3, 32, 32]}
# in place of files that a benchmark writes: training frames without labels, and test frames with labels
SOUNDS = {part: {"class_path": "parts.Sounds", "init_args": {"labels": part == "test"}} for part in ("train", "test")}


def nodes(node):
    """Every mapping in a config."""
    if isinstance(node, dict):
        yield node
        for child in node.values():
            yield from nodes(child)
    elif isinstance(node, list):
        for child in node:
            yield from nodes(child)


NEAR = {"class_path": "UncertaintyThreshold", "init_args": {"limit": 0.1}}
UNSURE = {"class_path": "LabelThresholds", "init_args": {"positive": 0.52, "negative": 0.48}}
MIX = {"class_path": "kd_lightning.data.transforms.MixUp", "init_args": {"alpha": 0.4}}
VARIANTS = {  # arguments of the model, or of the data, by dotted path, under which a config is another story
    "cached_digits": [
        {"data.mix": MIX},
        {"data.sampler": "balanced"},
        {"data.source": {"class_path": "parts.DigitsWithVal"}},
        {"data.source": {"class_path": "parts.TableOfDigits"}},
        {"data.source": {"class_path": "parts.SavedDigits"}},
    ],
    "student_digits": [{"class_weights": "balanced"}],
    "ensemble_digits": [{"strategy": "random"}, {"strategy": "random", "draw_per": "sample"}, {"strategy": "relabel"}],
    "fixmatch_digits": [
        {"selection": {"class_path": "FlexMatch", "init_args": {"threshold": 0.12}}, "ema_decay": 0.5},
        {"selection": {"class_path": "FreeMatch", "init_args": {"momentum": 0.5, "fairness_weight": 0.1}}},
        {"selection": {"class_path": "AdaMatch", "init_args": {"momentum": 0.5}}, "ema_decay": 0.5},
        {"data.mix": MIX},
    ],
    "refresh_digits": [{"data.mix": MIX}],
    "multilabel_digits": [{"pseudo_labels": "refreshed", "selection": None}, {"data.mix": MIX}],
}
TERNARY = [{"student.init_args.weight_bits": "ternary"}]
PRECISIONS = {f"apprentice_digits_{scheme}": TERNARY for scheme in ("joint", "fixed_teacher", "finetune")}


def cases(paths, variants):
    """Each config, and its variants, as pytest's parameters."""
    for path in paths:
        for arguments in [{}, *variants.get(path.stem, [])]:
            texts = [
                value["class_path"].split(".")[-1] if isinstance(value, dict) else str(value)
                for value in arguments.values()
            ]
            yield pytest.param((path, arguments), id="-".join([path.stem, *texts]))


def quick(path, **changes):
    """The config of a file as a quick run, in the current folder; the weights it loads lie there.

    Small data (the digits) and their batches are as shipped; the others are replaced by small ones.
    """
    config = yaml.safe_load(path.read_text())
    for place, value in changes.items():
        part = "data" if place.startswith("data.") else "model"
        *parents, name = place.removeprefix("data.").split(".")
        reduce(dict.__getitem__, parents, config[part]["init_args"])[name] = value
    config["name"] = "quick"
    config["trainer"] |= TRAINER
    config["checkpoint"] = config.get("checkpoint", {}) | CHECKPOINT
    data = config["data"]["init_args"]
    data["num_workers"] = 0
    kind = data["source"]["class_path"].rsplit(".", 1)[-1]
    if kind in IMAGE_SIZE:
        data["source"] = deepcopy(FAKE)
        data["source"]["init_args"]["image_size"] = IMAGE_SIZE[kind]
        data["batch_size"] = 4
        if (outputs := OUTPUTS.get(path.stem.split("_")[0])) is not None:
            config["model"]["init_args"]["num_classes"] = outputs
        if "labeled_batch_size" in data:
            data["labeled_batch_size"] = 1
        if "strong_transform" in data:
            data["strong_transform"]["init_args"]["size"] = IMAGE_SIZE[kind][-1]
    if kind == "ImageMaskFolder":
        for part, size in (("train", 112), ("test", 16)):  # enough for 4 batches of two processes
            data["source"]["init_args"][part] = f"masks/{part}"
            save_masks(f"masks/{part}", size)
        data["source"]["init_args"]["image_size"] = 16
        data |= {"batch_size": 8} | ({"labeled": 8, "labeled_batch_size": 2} if "labeled" in data else {})
    if path.stem.startswith("text"):
        small_texts(config)
    if path.stem.startswith("audio"):
        data["source"]["init_args"] |= deepcopy(SOUNDS)
        data["batch_size"] = 8
        small = {"kd_lightning.models.Crepe": {"capacity": 1}, "kd_lightning.models.HarmonicNet": {"width": 4}}
        for node in nodes(config["model"]):
            if node.get("class_path") in small:
                node["init_args"] = small[node["class_path"]]
    if path.stem.startswith("feature"):
        small_backbones(config)
    sooner(config)
    config["trainer"]["callbacks"] = [*config["trainer"].get("callbacks", []), {"class_path": "parts.Stop"}]
    if config["model"]["init_args"].get("strategy") == "relabel":
        data["views_per_epoch"] = len(config["model"]["init_args"]["teachers"])
    if "hint_epochs" in config["model"]["init_args"]:
        config["model"]["init_args"]["hint_epochs"] = 1  # both stages within two epochs
    for node in nodes(config["model"]):
        arguments = node.get("init_args") or {}
        if node.get("class_path") == "DigitsCNN" and node is float_student(config):
            arguments["dropout"] = 0.2
        if str(node.get("class_path")).endswith("CRDLoss"):
            node["init_args"] = arguments | {"negatives": 8, "dim": 4}
        if "weights" in arguments:  # pretrained ones would be downloaded
            arguments["weights"] = None
    save_teachers(config)
    return config


def small_backbones(config):
    """Transformers of two thin layers, without their weights, which would be downloaded."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    thin = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2}
    for node in nodes(config["model"]):
        arguments = node.get("init_args") or {}
        arguments |= {"pretrained": False} if "pretrained" in arguments else {}
        if str(arguments.get("model_name")).startswith("vit"):
            node["dict_kwargs"] |= thin
        if str(node.get("class_path")).endswith("from_pretrained"):
            dino = {"class_path": "transformers.Dinov2Config", "init_args": sizes}
            node |= {"class_path": arguments["model"], "init_args": {"config": dino}}


def small_texts(config):
    """Random texts, and small networks for them: the real ones are made of files that a benchmark writes."""
    is_causal = config["model"]["init_args"].get("causal", False)
    for part, arguments in (("train", {}), ("test", {"size": 160, "seed": 1})):
        kind = "parts.Letters" if is_causal else "parts.Texts"
        config["data"]["init_args"]["source"]["init_args"][part] = {"class_path": kind, "init_args": arguments}
    for node in nodes(config["model"]):
        kind = str(node.get("class_path"))
        if kind.endswith("SentenceClassifier"):
            node |= {"class_path": "parts.WordNetwork", "init_args": {"width": 16, "dropout": 0.1}}
        elif kind == "TextCNN":
            node["init_args"] |= {"num_classes": 4, "vocab_size": 40, "dim": 8, "channels": 8}
        elif kind.endswith("GPT2Config"):
            width = 8 if node["init_args"]["n_embd"] < 100 else 16
            node["init_args"] |= {"vocab_size": 24, "n_positions": 10, "n_embd": width, "n_layer": 2, "n_head": 2}


def sooner(config):
    """Pseudo-labels from the second epoch on, and some that are accepted: nobody is sure of anything by then."""
    task = config["model"]["init_args"].get("task")
    for callback in config["trainer"].get("callbacks", []):
        kind = callback["class_path"].rsplit(".", 1)[-1]
        arguments = callback.setdefault("init_args", {})
        if kind == "PseudoLabelRefresh":
            arguments |= {"every_n_epochs": 1, "warmup_epochs": 1}
            threshold = {"class_path": "FixedThreshold", "init_args": {"threshold": 0.12}}
            of_task = {"binary": UNSURE, "multilabel": UNSURE, "regression": NEAR}
            arguments["selection"] = deepcopy(of_task.get(task, threshold))
        if kind == "SoftWeightAnnealing":
            arguments.pop("end_epoch", None)
            arguments.pop("begin_epoch", None)
    arguments = config["model"]["init_args"]
    if "threshold" in (arguments.get("selection") or {}).get("init_args", {}):
        arguments["selection"]["init_args"]["threshold"] = 0.12
    if "threshold" in arguments:
        arguments["threshold"] = 0.12
    if "positive" in (arguments.get("selection") or {}).get("init_args", {}):
        arguments["selection"] = deepcopy(UNSURE)
    if module_name(config) == "PseudoLabelModule" and config["data"]["init_args"]["source"]["class_path"] == "FakeData":
        arguments["student"]["init_args"]["num_classes"] = FAKE["init_args"]["num_classes"]  # each has a label


def module_name(config):
    return config["model"]["class_path"].rsplit(".", 1)[-1]


def float_student(config):
    """What is quantised, where the student is."""
    student = config["model"]["init_args"]["student"]
    return student["init_args"]["model"] if student["class_path"].endswith(".quantize") else student


def save_teachers(config, seed=0):
    """Make the weights files that a config names, of untrained networks."""
    if config["model"]["init_args"].get("initial_weights"):
        config["model"]["init_args"]["initial_weights"] = "initial.pt"
        torch.manual_seed(77)
        torch.save(build(torch.nn.Module, float_student(config)).state_dict(), "initial.pt")
    for number, node in enumerate(nodes(config["model"])):
        if str(node.get("class_path")).endswith("load_weights"):
            torch.manual_seed(seed + number)
            node["init_args"]["path"] = f"teacher_{number}.pt"
            network = build(torch.nn.Module, node["init_args"]["model"])
            torch.save(network.state_dict(), node["init_args"]["path"])


TWO_HEADS = "create_model"  # timm's transformer, without batch statistics


def without_batch_statistics(config):
    """The same method on networks whose rows do not know one another, under plain SGD."""
    config = deepcopy(config)
    source = config["data"]["init_args"]["source"].get("init_args") or {}
    dense = config["model"]["init_args"].get("class_dim") == 1
    channels = 3 if dense else (source.get("image_size") or [1])[0]
    classes = len(source["class_names"]) if dense else source.get("num_classes", 10)
    classes = {"DigitProperties": 3, "DigitAngles": 1}.get(config["data"]["init_args"]["source"]["class_path"], classes)
    student = float_student(config)
    for node in nodes(config["model"]):
        for role in ("student", "peer", "teacher", "model", "network"):
            if isinstance(node.get(role), dict) and "class_path" in node[role]:
                width = {"width": 16 if node[role] is student else 24}
                plain = {"channels": channels, "num_classes": classes} | width
                if node[role]["class_path"].endswith(".quantize"):
                    node[role]["init_args"]["skip"] = ["last"]  # of two layers
                elif node[role]["class_path"] in ("parts.WordNetwork", "parts.ValueNetwork"):
                    node[role]["init_args"].pop("dropout", None)
                elif node[role]["class_path"].rsplit(".", 1)[-1] not in ("load_weights", "Teacher", TWO_HEADS):
                    node[role] = {"class_path": "parts.PlainMaps" if dense else "parts.Plain", "init_args": plain}
    for name in {"optimizer", "teacher_optimizer"} & config["model"]["init_args"].keys():
        config["model"]["init_args"][name] = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
    for term in config["model"]["init_args"].get("features", {}).values():
        plain_loss = {"class_path": "kd_lightning.losses.HintLoss"}  # of each row alone
        term["init_args"] |= {"layers": {"layers.3": "layers.3"}, "loss": plain_loss, "weight": 0.001}
    if "hints" in config["model"]["init_args"]:
        config["model"]["init_args"]["hints"] = {"layers.3": "layers.3"}
        config["model"]["init_args"]["hint_optimizer"] = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
    save_teachers(config)
    return config


def module_of(path):
    """Which module a config trains, by class name."""
    return module_name(yaml.safe_load(path.read_text()))


@cache
def one_of_each_module():
    """The digits config of each module, and of each way and task of pseudo-labels, for what is slow."""
    chosen = {}
    for path in sorted(CONFIGS, key=lambda p: ("digits" not in p.stem, "joint" not in p.stem, p.stem)):
        arguments = yaml.safe_load(path.read_text())["model"]["init_args"]
        labels = arguments.get("pseudo_labels")
        chosen.setdefault((module_of(path), labels, labels and arguments.get("task")), path)
    return sorted(chosen.values())


@contextmanager
def inside(folder):
    """Work in a folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)


def metrics(folder):
    """What callbacks monitor, by step."""
    names = ("train/loss", "val/loss", "val/accuracy", "val/hint")
    rows = read_metrics(Path(folder, "metrics.csv"))
    return [(row["step"], name, row[name]) for row in rows for name in names if name in row]


class Story:
    """A config's quick run, and the arguments that start it again."""

    def __init__(self, path, folder, **arguments):
        self.path = path
        self.folder = folder
        self.config = quick(path, **arguments)
        self.args = self.write(self.config, "config.yaml")
        self.whole = DistillCLI(["fit", *self.args])
        self.metrics = metrics("runs/quick/version_0")  # before other commands add theirs

    @staticmethod
    def write(config, name):
        Path(name).write_text(yaml.safe_dump(config))
        return ["--config", name]

    @property
    def teachers(self):
        return teachers_of(self.whole.model)


def teachers_of(model):
    """The frozen ones, by the name that complaints give them."""
    if isinstance(teacher := getattr(model, "teacher", None), Teacher):
        return {"teacher": teacher}
    if getattr(model, "task", None) == "features" and not model.features.several:
        return {"teachers": model.teachers[0]}
    several = getattr(model, "ensemble", None) or getattr(model, "teachers", None) or ()
    return {f"teachers[{number}]": teacher for number, teacher in enumerate(several)}


@pytest.fixture(scope="module", autouse=True)
def _short_starts(parsed_once):
    """Parses each config once, and leaves figures blank: drawing those of hints takes ten times as long as training."""
    with pytest.MonkeyPatch.context() as patch:
        leave_blank(patch, OF_METHODS)
        yield


@pytest.fixture(scope="module", params=cases([*CONFIGS, *TEXTS], VARIANTS | PRECISIONS))
def story(request, tmp_path_factory):
    """Each config, run once for all tests that only look at what it left."""
    path, arguments = request.param
    with inside(tmp_path_factory.mktemp(path.stem)) as folder:
        yield Story(path, folder, **arguments)
    shutil.rmtree(folder)  # up to 2 GB each


EACH_MODULE = [*one_of_each_module(), *MASKS, *TEXTS]


@pytest.fixture(params=cases(EACH_MODULE, VARIANTS))
def each_module(request):
    """One config of each module, and its arguments."""
    path, arguments = request.param
    return next(one for one in [*CONFIGS, *TEXTS] if one.stem == Path(path).stem), arguments


def environment():
    """For processes of their own."""
    return os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}


REPRESENTATIVES = {  # configs whose checks all run in "make test", and what each one stands for; the others are slow
    "student_digits": "SupervisedModule: labels alone",
    "distill_digits": "DistillModule: a live teacher",
    "cached_digits": "stored outputs of a teacher",
    "ensemble_digits": "EnsembleDistillModule: several teachers",
    "hint_digits": "HintModule: two stages, projectors",
    "apprentice_digits_fixed_teacher": "ApprenticeModule: a student of low precision",
    "coteaching_digits": "CoTeachingModule: a second network that is trained",
    "distillation_token_digits": "DistillationTokenModule: a student of two heads",
    "simkd_digits": "SimKDModule: the teacher's classifier in the student",
    "feature_digits": "FeatureDistillModule: features in place of classes",
    "fixmatch_digits": "PseudoLabelModule: online pseudo-labels, two streams",
    "abc_digits": "ABCModule: a classifier that is not deployed, and masks",
    "refresh_digits": "PseudoLabelModule: pseudo-labels of a callback",
    "multilabel_digits": "PseudoLabelModule: pseudo-labels of single labels",
    "regression_digits": "PseudoLabelModule: pseudo-labels of values, from several views",
    "transductive_digits": "the test part as pool",
    "segmentation_distill": "a label for each pixel, from files",
    "text_distill": "inputs that are a mapping",
    "text_causal_lm_teacher": "a label for each token",
    "values_distill": "regression",
    "audio_crepe": "several labels of a sample",
}


FEWER = {"cached_digits", "hint_digits", "feature_digits", "fixmatch_digits", "text_distill"}
"""Those whose longest checks run in "make test", too: a cache, stages, no classes, two streams, mappings."""


@pytest.fixture(params=[path for path in CONFIGS if path.stem not in REPRESENTATIVES], ids=lambda path: path.stem)
def other_config(request):
    """Each config whose story is slow."""
    return request.param


BIG = re.compile("cifar|imagenet|feature_dino|feature_siglip")  # their methods are those of the configs of the digits
SAME_METHOD = {f"cifar100_{name}" for name in ("resnet32x4_resnet8x4", "vgg13_vgg8", "wrn_40_2_wrn_16_2")}
OTHER_DATA = re.compile("cached_digits-(balanced|DigitsWithVal|TableOfDigits|SavedDigits)")


def is_covered(test, path, arguments, case):
    """Whether a test of a case repeats that of another case.

    - Other data say nothing of a precision, of averaged weights, or of a teacher's weights.
    - That another order is noticed is tested once for each module.
    - The module and the data decide which labels are hidden, not the size of the networks.
    - An argument of the module says nothing of averaged weights, unless it averages them itself, or of a signal.
    - What is killed for real twice needs no exceptions twice; averaged weights are stopped three times, too. Neither
      needs the story's stop in mid-epoch, but in "make test".
    - A signal is the same for all configs of a module; segmentation_distill, texts and values have their own data.
    - The configs of SAME_METHOD are cifar100_resnet56_resnet20 with other networks: their resume and their doctor are
      the same.
    """
    stem, of_data = Path(path).stem, any(key.startswith("data.") for key in arguments)
    only_raised = (bool(arguments) and not of_data) or path not in EACH_MODULE
    return {
        "test_in_mid_epoch": stem in SAME_METHOD or (path in EACH_MODULE and not arguments and case not in FEWER),
        "test_doctor_examines_it": stem in SAME_METHOD,
        "test_teacher_is_unchanged_and_another_is_refused": of_data,
        "test_mixed_precision_stays_close": bool(OTHER_DATA.search(case)),
        "test_another_order_is_noticed": bool(arguments) or stem not in {one.stem for one in one_of_each_module()},
        "test_hidden_truth_changes_nothing": bool(BIG.search(stem)) and stem != "cifar10_fixmatch",
        "test_killed_again_and_again": (
            bool(arguments) and "ema_decay" not in arguments if "averaged" in case else not only_raised
        ),
        "test_killed_for_real": only_raised,
    }.get(test, False)


def pytest_collection_modifyitems(config, items):
    """The stories of the representatives run in "make test"; those of other configs and of variants are ``slow``."""
    left_out = []
    for item in items:
        if HERE not in item.path.parents or not hasattr(item, "callspec"):
            continue
        parameters, case = item.callspec.params, item.callspec.id
        if "story" in parameters and case not in REPRESENTATIVES:
            item.add_marker("slow")
        elif item.originalname == "test_another_order_is_noticed" and case != "cached_digits":
            item.add_marker("slow")  # it tests the comparison of the test before it, not the module
        elif item.originalname in ("test_in_mid_epoch", "test_mixed_precision_stays_close") and case not in FEWER:
            item.add_marker("slow")  # the longest of a story
        path_and_arguments = parameters.get("story", parameters.get("each_module"))
        if path_and_arguments is not None and is_covered(item.originalname, *path_and_arguments, case):
            left_out.append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture
def contract():
    """The functions above, for tests that need them."""
    return sys.modules[__name__]
