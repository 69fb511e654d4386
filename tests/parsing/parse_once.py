"""Parses the arguments of an object once.

A story starts one config a dozen times, and parsing takes half of each start.
"""

import os
from contextlib import contextmanager

import pytest
import torch
from jsonargparse import Namespace, _common, _typehints

from kd_lightning.runs.argument_types import ArgumentTypes

PLAIN = (str, int, float, bool, type(None))
NOT_READ = {"parent_parser", "class_instantiators", "scoped_class_instantiators"}  # by what parses arguments
CONTEXT = [variable for name, variable in _common.parser_context_vars.items() if name not in NOT_READ]
CONTEXT += [_typehints.sub_defaults, _typehints.allow_default_instance]


class NotPlainError(Exception):
    """A value that is not made of mappings, lists, numbers, texts and None: it may change."""


def frozen(value):
    """What two values have in common that are parsed alike, each number with its type."""
    kind = type(value)
    if kind in PLAIN:
        return kind, repr(value)
    if kind in (dict, Namespace):
        items = value if kind is dict else vars(value)
        return kind, tuple((key, frozen(part)) for key, part in items.items())
    if kind in (list, tuple):
        return kind, tuple(map(frozen, value))
    raise NotPlainError


def copied(value):
    """A copy that shares no mapping and no list."""
    kind = type(value)
    if kind is Namespace:
        copy = Namespace()
        vars(copy).update({key: copied(part) for key, part in vars(value).items()})
        return copy
    if kind is dict:
        return {key: copied(part) for key, part in value.items()}
    return kind(map(copied, value)) if kind in (list, tuple) else value


@contextmanager
def parse_once():
    """Within, arguments that the same parser got before, in the same folder and context, are not parsed again.

    What the parser refuses, and what holds objects, is parsed each time. Each caller gets a copy of its own.
    """
    parse, results = ArgumentTypes.parse_object, {}

    def parse_object(parser, *args, **kwargs):
        try:
            context = [variable.get() for variable in CONTEXT]
            key = id(parser), os.getcwd(), torch.get_default_dtype(), frozen([context, args, kwargs])  # noqa: PTH109
        except NotPlainError:
            return parse(parser, *args, **kwargs)
        if key not in results:
            parsed = parse(parser, *args, **kwargs)
            try:
                frozen(parsed)
            except NotPlainError:
                return parsed
            results[key] = parser, copied(parsed)  # the parser is held, so that no other one gets its id
            return parsed
        return copied(results[key][1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ArgumentTypes, "parse_object", parse_object)
        yield
