"""The arguments of this package's commands, one file each; ``cli/commands/`` has the work of each command.

Nothing here loads torch or Lightning, so that help and refusals are quick.
"""

from kd_lightning.cli.arguments import (  # noqa: F401  (each enters itself into COMMANDS, in the order of the help)
    cache,
    clean,
    compare,
    completion,
    crossfit,
    distill,
    doctor,
    duplicates,
    experiment,
    export,
    label,
    labels,
    layers,
    predict,
    push,
    query,
    report,
)
from kd_lightning.cli.arguments._parsing import COMMANDS, check_configs_exist, configs_of, parse
from kd_lightning.cli.arguments.verbs import VERBS, is_for_verb, parse_verb, verb_help

__all__ = ["COMMANDS", "VERBS", "check_configs_exist", "configs_of", "is_for_verb", "parse", "parse_verb", "verb_help"]
