"""The commands of LightningCLI: how they are called, and their short help."""

from __future__ import annotations

from collections.abc import Sequence

from kd_lightning.cli.arguments._parsing import configs_of, expand_configs, is_config
from kd_lightning.errors import InputError

VERBS = {
    "fit": "Train from YAML.",
    "validate": "Evaluate a run's deployed weights on the validation part.",
    "test": "Evaluate a run's deployed weights on the test part.",
    "predict": "Write the predictions of a run's deployed weights to a file.",
}
"""The commands of LightningCLI, and what each does."""

_EVALUATED = "The newest run of the config counts; --ckpt_path names other weights."
_OPTIONS = {
    "CONFIG": "YAML, also as --config CONFIG; later ones win",
    "--KEY VALUE": "another value for a key of the config, by its path",
    "--name NAME": "name of the run's folder (default run)",
    "--seed_everything N": "seed of weights, order and augmentation",
    "--ckpt_path PATH": "",
    "--print_config": "print the whole config, and stop",
    "--verbose": "also print what Lightning and other libraries print",
}
_OF_FIT = {
    "--fast true": "pick what makes training faster on this device",
    "--early_stopping N": "stop after N validations without a better value",
}
_CHECKPOINTS = {
    "fit": "last, or a checkpoint: resumes its run exactly",
    "validate": "best, last, a checkpoint, or a student.safetensors",
}
VERB_OPTIONS = {
    verb: {
        name.split()[0]: text
        for name, text in {**_OPTIONS, **(_OF_FIT if verb == "fit" else {}), "--ckpt_path": _CHECKPOINTS[kind]}.items()
        if name.startswith("--") and name.split()[0] not in ("--KEY", "--verbose")
    }
    for verb, kind in (("fit", "fit"), ("test", "validate"))
}
"""The options of the commands of LightningCLI that need no path of a key, and what each does."""


def verb_help(verb: str) -> str:
    """Return the help of a command of LightningCLI, which fits a screen."""
    options = dict(_OPTIONS)
    options["--ckpt_path PATH"] = _CHECKPOINTS["fit" if verb == "fit" else "validate"]
    if verb == "fit":
        options = {**options, **_OF_FIT, "--verbose": options.pop("--verbose")}
    lines = "\n".join(f"  {name:<21}{text}" for name, text in options.items())
    more = "" if verb == "fit" else f"{_EVALUATED}\n"
    return f"""usage: kd-lightning {verb} CONFIG ... [--KEY VALUE ...]

{VERBS[verb]}
{more}
{lines}

keys, such as --trainer.max_epochs 5 or --model.init_args.soft_weight 0.5:
  {verb} --trainer.help     the trainer: epochs, devices, precision
  {verb} --model.help       methods; --model.help DistillModule: its keys
  {verb} --data.help        data; --data.help ImageFolder: its keys
  {verb} --checkpoint.help  which weights are kept
  {verb} --help --verbose   all keys at length"""


def parse_verb(verb: str, args: Sequence[str]) -> list[str]:
    """Return the command line of LightningCLI: each config as ``--config=FILE``.

    Raises:
        InputError: If a config does not exist, or is a run.
    """
    expanded = expand_configs(args)
    if not expanded:
        raise InputError(f"{verb} needs a config: kd-lightning {verb} CONFIG.yaml")
    return [verb, *expanded]


def is_for_verb(name: str, args: Sequence[str]) -> bool:
    """Return whether a command line is one of LightningCLI, also where a command of this package has the same name."""
    configs = [*configs_of(args), *args[:1]]
    return name in VERBS and any(map(is_config, configs))
