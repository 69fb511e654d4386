"""One-line messages for what the parser refuses: which key, what is allowed, and the most similar right name."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from kd_lightning.errors import InputError
from kd_lightning.runs.argument_types import WRITTEN_AS
from kd_lightning.runs.class_paths import (
    SPEC_KEYS,
    arguments_of,
    class_names,
    did_you_mean,
    find_class,
    missing_package,
    name_of,
    network_reader,
    walk_config,
)
from kd_lightning.runs.key_hints import hint_for_key, no_such_key, right_key

Keys = tuple[str, ...]
Config = Mapping[str, Any]
Describe = Callable[[Keys, Config], str]


class ParserError(InputError):
    """A value that the parser refuses. Each parser on the way out puts the key of its argument in front.

    Args:
        keys: The keys that lead to the value, one for each nested parser, the outermost first.
        describe: Makes the message from the keys and the config.
        config: The content of the config files, in which the message's place is looked up.
    """

    def __init__(self, keys: Keys, describe: Describe, config: Config) -> None:
        super().__init__(" ".join(describe(keys, config).split()))
        self.keys = keys
        self.describe = describe


def explain_parser_error(
    message: str,
    error: BaseException | None = None,
    config: Config | None = None,
    known: Iterable[str] = (),
    root: str | None = None,
    option: str = "",
    given: Sequence[str] = (),
) -> ParserError:
    """Turn what jsonargparse gives to ``ArgumentParser.error`` into an error of one line.

    Args:
        message: The message.
        error: The exception behind it. If a nested parser raised it, that parser's message counts.
        config: The content of the config files.
        known: All keys of the parser.
        root: A key that the user has not given, left out of the message.
        option: The option that the parser was given, such as ``features.hint.weight``. In a dict of objects, it has
            the name of the one that is meant.
        given: All options of the command line.
    """
    missing = (_no_such_entry(one, given, config or {}) for one in (option, *given))
    if text := next(filter(None, missing), ""):
        return ParserError((), lambda keys, config: text, config or {})
    found = re.match(r'Parser key "([^"]+)"', message)
    keys: Keys = (found[1],) if found and found[1] != root else ()
    if keys and option.startswith(f"{keys[0]}.") and "Subtypes: [dict[str, " in message:
        keys = (".".join(option.split(".")[: keys[0].count(".") + 2]),)
    causes = [*_causes(error)]
    inner = next((cause for cause in causes if isinstance(cause, ParserError)), None)
    if inner is not None:
        return ParserError(keys + inner.keys, inner.describe, config or {})
    return ParserError(keys, _describe(message, causes, list(known)), config or {})


def explain_error(error: BaseException, config: Config | None = None) -> str:
    """Return in one line what a constructor has refused, with the place of its argument in the config."""
    config = config or {}
    while raising_module(error).startswith("jsonargparse.") and error.__cause__ is not None:
        if str(error.__cause__).startswith("Expected a "):  # of a union the first type alone; the text has all
            break
        error = error.__cause__
    if isinstance(error, IndexError) and raising_module(error).startswith("jsonargparse."):
        error = _without_text(error)
    message = str(error) or type(error).__name__
    if raising_module(error).startswith("jsonargparse."):
        message = str(explain_parser_error(message, None, config))
    if found := re.search(r"negative dimension (-\d+)", message):  # torch's message has the number alone
        for path, _, value, _ in walk_config(config):
            if not isinstance(value, bool) and value == int(found[1]):
                return f"{path}: it makes a tensor of {found[0]}"
    if text := _unknown_network(error, message, config):
        return text
    if found := re.match(r"(\w+)(?=: | must )(?:.*, got (.*))?", message, re.DOTALL):  # an argument's name
        message = _place_of_name(found[1], config, found[2]) + message[found.end(1) :]
    elif place := _place_of_builder(error, config):
        message = f"{place}: {message}"
    return " ".join(message.split())


def _without_text(error: BaseException) -> BaseException:
    """Return the exception without a text on which the parser itself failed."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        for value in frame.f_locals.get("exceptions", ()):
            if isinstance(value, BaseException) and not str(value):
                return value
    return error


def _unknown_network(error: BaseException, message: str, config: Config) -> str:
    """Return what is wrong with the name of a network or of its weights, empty for any other error."""
    models: Any = getattr(sys.modules.get(raising_module(error).partition(".")[0]), "models", None)
    known: list[str] = models.list_models() if hasattr(models, "list_models") else []
    found = re.search(r"Unknown model \(?([^\s()]+)\)?|Invalid pretrained tag \(([^)]+)\) for ([^\s]+)\.$", message)
    if found is None or not known:
        if not isinstance(error, KeyError):
            return ""
        name, text = str(error.args[0]), "no such name"
    elif found[1]:
        name, similar = found[1], difflib.get_close_matches(found[1], known, n=3, cutoff=0)
        text = f"no such network; the closest names: {', '.join(similar)}"
    else:
        name, tags = f"{found[3]}.{found[2]}", models.list_pretrained(f"{found[3]}.*")
        text = f"no such weights; allowed: {', '.join(tags)}"
    place = next((path for path, _, value, _ in walk_config(config) if value == name), "")
    return f"{place or _place_of_builder(error, config) or 'the network'}: {text}, got {name!r}"


def _place_of_builder(error: BaseException, config: Config) -> str:
    """Return the place of the object whose package raised an error, empty if several objects are of this package."""
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    packages = [module.partition(".")[0] for module in modules]
    while "jsonargparse" in packages:
        packages = packages[packages.index("jsonargparse") + 1 :]
    objects = [(path, find_class(spec["class_path"])) for path, spec in _specs("", config)]
    places = [path for path, owner in objects if [str(owner.__module__).partition(".")[0]] == packages[:1]]
    return places[0] if len(places) == 1 else ""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def raising_module(error: BaseException) -> str:
    """Return the name of the module in which an exception was raised, empty if it has no traceback."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return "" if traceback is None else str(traceback.tb_frame.f_globals.get("__name__"))


def _describe(message: str, causes: list[BaseException], known: list[str]) -> Describe:
    """Find out what is wrong; jsonargparse's text is read where its exceptions have no attribute for it."""
    for cause in causes:
        if isinstance(cause, UnicodeDecodeError) and (file := _file_of(cause)):
            return partial(_no_text, file)
        if not isinstance(cause, AttributeError) or not inspect.ismodule(cause.obj):
            continue
        if f"{cause.obj.__name__}.{cause.name}" in message:
            return partial(_no_such_attribute, cause.obj, str(cause.name))
    if found := re.search(r"^[Uu]nrecognized arguments: (\S+)", message):
        return partial(_unrecognized, found[1], known)
    option = r"Option '([^']+)' is not accepted|(?:Group '([^']+)'|Subcommand '[^']+') does not accept option '([^']+)'"
    if found := re.search(option, message):
        return partial(_unknown_key, ".".join(filter(None, found.groups())), known)
    if found := re.search(r"following arguments are required: (.+)", message):
        return partial(_missing, found[1].split(", "))
    values = re.findall(r"(?:Given|Got) value: (.*?)(?:\s+Subclass types|\n|$)", message)
    got = values[-1] if values and len(values[-1]) < 80 else None
    text = re.sub(r'^Parser key "[^"]+"(?: element \d+)?:\s*', "", message)
    if "Errors:" in text:  # of a union, whose first type is the one that was meant
        text = re.split(r"Errors:\s*-?\s*", text)[-1]
        is_object = re.search(r"Given value: Namespace\(class_path=", text)
        text = re.split(r"\n\s*(?:- Expected a <class 'NoneType'>|- Not of type Path|Given value)", text)[0]
        if is_object:  # its constructor's message counts
            refused = [entry for entry in re.split(r"\n\s*- ", text) if not entry.startswith("Expected a ")]
            text = refused[0] if refused else text
        if text.startswith(WRITTEN_AS):  # a list for a tensor, unless it is an object that returns one
            entries = re.split(r"\n\s*- ", text)
            text = entries["Given value: {'class_path'" in message]
    text = re.sub(r"\n\s*- Expected a ", " or a ", text)
    if found := re.search(r"(?:Expected|or) a dot import path string: (\S+)", text):
        return partial(_wrong_class, found[1])
    found = re.search(r"Problem with given class_path '([^']+)'", text)
    if found and missing_package(found[1]):
        return partial(_wrong_class, found[1])
    if found and network_reader(found[1]):
        return partial(_no_text, found[1])
    text = re.sub(r"<class '([\w.]+)'>", r"\1", text).replace("typing.", "")
    text = re.sub(r"Type Callable\[.*\] expects a function or a callable class: ", "", text)
    text = re.sub(r"\.+\s+Got value: .*|\s+Subclass types expect one of:.*", "", text, flags=re.DOTALL)
    return partial(_wrong_value, text, got)


def _file_of(error: UnicodeDecodeError) -> str:
    """Return the file that the parser has read as a config, as the user wrote it; empty for any other error."""
    paths = [frame.f_locals.get("cfg_path") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next((str(path) for path in paths if path is not None), "")


def _no_text(file: str, keys: Keys, config: Config) -> str:
    """What is wrong with a file that stands where a config file or a class path can."""
    text = f"must be a mapping with a class_path, got the file {file}{network_reader(file)}"
    return f"{_place(keys, config, file) or 'an argument'} {text}"


def _wrong_value(text: str, got: str | None, keys: Keys, config: Config) -> str:
    if not keys:
        return text
    return f"{_place(keys, config, got)}: {text}" + (f", got {got}" if got is not None else "")


def _wrong_class(name: str, keys: Keys, config: Config) -> str:
    found = find_class(name)
    if missing := missing_package(name):
        return f"{_class_place(name, keys, config)}: {missing}"
    if found is None:
        return f"{_class_place(name, keys, config)}: no class {name!r}{did_you_mean(name, class_names())}"
    place = _place(keys, config) or name
    if inspect.isfunction(found):
        return f"{place}: a function needs its full path, {found.__module__}.{found.__qualname__}"
    return f"{place}: {name} is not what can stand here"


def _no_such_attribute(module: Any, name: str, keys: Keys, config: Config) -> str:
    place = _class_place(f"{module.__name__}.{name}", keys, config)
    return f"{place}: {module.__name__} has no {name!r}{did_you_mean(name, vars(module))}"


def _unknown_key(name: str, known: list[str], keys: Keys, config: Config) -> str:
    argument, place = name.partition(".")[0], _place(keys, config)
    specs = [*_specs(place, config)]
    found = [(path, spec) for path, spec in specs if argument in (spec.get("init_args") or {})]
    for path, spec in found or [(path, spec) for path, spec in specs if path == place]:
        owner = find_class(spec["class_path"])
        if (allowed := arguments_of(owner)) and argument not in allowed:
            return f"{path}.init_args.{argument}: {no_such_key(owner, argument, allowed, config)}"
    siblings = [key for key in known if key.rpartition(".")[0] == name.rpartition(".")[0]]
    return f"{_join((*keys, name))}: no such key{hint_for_key(name, siblings, config, known)}"


def _unrecognized(argument: str, known: list[str], keys: Keys, config: Config) -> str:
    """What is wrong with an argument that no parser takes."""
    name = argument.partition("=")[0]
    if not name.startswith("-"):
        return f"{argument} belongs to no option"
    meant = right_key(name.lstrip("-"), config, known)
    if meant and "[" in meant:
        return f"{name}: no such option; {meant} can be set in a config file alone"
    return f"{name}: no such option" + (f"; did you mean --{meant}?" if meant else "; 'fit --help' lists them")


def _no_such_entry(option: str, given: Sequence[str], config: Config) -> str:
    """Return what is wrong with an option of an entry that a dict of objects lacks, such as ``features.at.weight``.

    Args:
        option: The option, empty if there is none.
        given: All options. One that gives a whole entry, or its class path, adds it.
        config: The content of the config files.
    """
    parts, added = _parts(option), [*map(_parts, given)]
    for path, _, value, _ in walk_config(config):
        is_argument = path.rpartition(".")[0].endswith(SPEC_KEYS[1:])
        if not is_argument or not isinstance(value, Mapping) or not value or "class_path" in value:
            continue
        found = [entry[-1] if isinstance(entry, list) and entry else entry for entry in value.values()]
        if not all(isinstance(entry, Mapping) and "class_path" in entry for entry in found):
            continue
        for end in range(1, len(parts) - 1):
            is_new = parts[end] not in map(str, value) and parts[: end + 1] not in added
            if is_new and _parts(path)[-end:] == parts[:end]:
                hint = did_you_mean(parts[end], map(str, value))
                return f"{path} has no {parts[end]}{hint}; allowed: {', '.join(map(str, value))}"
    return ""


def _missing(names: list[str], keys: Keys, config: Config) -> str:
    place = _place(keys, config)
    for path, spec in _specs(place, config):
        owner, given = find_class(spec["class_path"]), spec.get("init_args") or {}
        if all(name in arguments_of(owner) and given.get(name) is None for name in names):
            missing = ", ".join(f"{path}.init_args.{name}" for name in names)
            return f"{missing}: missing, but {name_of(owner)} needs {'it' if len(names) == 1 else 'them'}"
    for path, key, value, _ in walk_config(config):
        # for an empty mapping the parser takes the base class, such as Optimizer
        if value == {} and key not in SPEC_KEYS and _lies_in(path, place or "model"):
            return f"{path}.class_path is missing: it names what to build"
    return ", ".join(_join((*keys, name.rpartition(".")[2])) for name in names) + ": missing, but needed"


def _specs(place: str, config: Config) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (path, mapping) of each object at a place or below it, the outer ones first."""
    for path, _, value, _ in walk_config(config):
        items = [(f"{path}[{n}]", item) for n, item in enumerate(value)] if isinstance(value, list) else [(path, value)]
        for item_path, item in items:
            named = isinstance(item, Mapping) and find_class(item.get("class_path")) is not None
            if named and _lies_in(item_path, place):
                yield item_path, item


def _lies_in(path: str, place: str) -> bool:
    return path.startswith(place) and (not place or path[len(place) :][:1] in ("", ".", "["))


def _class_place(class_path: str, keys: Keys, config: Config) -> str:
    """Return the path at which a class path stands, below the place of the keys if possible."""
    found = [path for path, _, value, _ in walk_config(config) if value == class_path]
    place = _place(keys, config)
    inside = [path for path in found if _lies_in(path, place)]
    return next(iter(inside or found), ".".join([*filter(None, [place]), "class_path"]))


def _place(keys: Keys, config: Config, got: str | None = None) -> str:
    """Return the path in the config that the keys lead to; of several the one that holds the value ``got``.

    The keys of lists, of ``init_args`` and of mappings lie between those of the parsers.
    """
    wanted = [part for key in keys for part in _parts(key)]
    candidates: list[tuple[int, bool, int, str]] = []
    for path, key, value, _ in walk_config(config):
        parts = _parts(path)
        if wanted and key not in SPEC_KEYS and parts[-1] == wanted[-1] and _is_subsequence(wanted, parts):
            candidates.append((len(parts), got is not None and str(value) != got, len(candidates), path))
    return min(candidates)[-1] if candidates else _join(keys)


def _place_of_name(name: str, config: Config, got: str | None) -> str:
    """Return the path of an argument of which only the name is known; of several the one that holds ``got``."""
    found = [(path, value) for path, key, value, _ in walk_config(config) if key == name and key not in SPEC_KEYS]
    holding = [path for path, value in found if got in (str(value), repr(value))]
    return next(iter(holding or [path for path, _ in found]), name)


def _parts(path: str) -> list[str]:
    return [part for part in re.sub(r"\[\d+\]", "", path).split(".") if part not in SPEC_KEYS]


def _is_subsequence(few: list[str], many: list[str]) -> bool:
    rest = iter(many)
    return all(part in rest for part in few)


def _join(keys: Keys) -> str:
    return ".init_args.".join(keys)
