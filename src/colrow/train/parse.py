"""Reading a :class:`TrainConfiguration` from a YAML file and the command line, and writing it back."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser  # type: ignore[attr-defined]

from colrow.train.configuration import TrainConfiguration


class ConfigurationError(ValueError):
    """The configuration cannot be used; the message is one line that names the field and the remedy."""


def parse(arguments: Sequence[str]) -> TrainConfiguration:
    """The configuration that ``CONFIG.yaml --field value ...`` describes, checked.

    Later arguments win. ``--help`` prints every field with its default and exits.

    Raises:
        ConfigurationError: for an unknown field, a value of the wrong type, or one that makes no sense.
    """
    parser = _parser()
    arguments = _normalise(list(arguments), parser)
    try:
        found = parser.parse_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigurationError(_one_line(str(error))) from error
    values = found.as_dict()
    files = values.pop("config", None) or []
    configuration = _build(TrainConfiguration, values)
    if configuration.run_dir is None:
        name = Path(str(files[-1])).stem if files else configuration.model.config or "fine-tuned"
        configuration.run_dir = str(Path("runs") / name)
    try:
        configuration.check()
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
    return configuration


def from_dictionary(values: dict[str, Any]) -> TrainConfiguration:
    """The configuration with these (nested) values, defaults elsewhere; not checked."""
    _check_keys(values, "")
    return _build(TrainConfiguration, values)


def to_yaml(configuration: TrainConfiguration) -> str:
    """YAML from which :func:`parse` makes the same configuration."""
    values = dataclasses.asdict(configuration)
    values["optimizer"]["betas"] = list(values["optimizer"]["betas"])
    return yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=100)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="colrow train",
        usage="colrow train CONFIG.yaml [--tp N] [--field value] [--group.field value] ...",
        description="Train a transformers language model on text, cut over tp ranks.",
        epilog="example: colrow train examples/bible.yaml --tp 2 --optimizer.learning_rate 5e-4",
        exit_on_error=False,
    )
    parser.add_argument("--config", action=ActionConfigFile, help=argparse.SUPPRESS)
    parser.add_class_arguments(TrainConfiguration, nested_key=None)
    return parser


def _normalise(arguments: list[str], parser: ArgumentParser) -> list[str]:
    """Positional files become --config, a bare switch becomes true, unknown names get a suggestion."""
    names = dict(_fields(TrainConfiguration))
    result = []
    takes_value = False
    for index, argument in enumerate(arguments):
        if takes_value:
            takes_value = False
        elif argument.startswith("-"):
            name, equals, _ = argument.lstrip("-").partition("=")
            known = name in names or name in ("help", "h", "config", "print_config")
            inside_dictionary = any(
                name.startswith(f"{one}.") for one, kind in names.items() if _is_open(kind)
            )
            if not argument.startswith("--") and name != "h":
                raise ConfigurationError(f"{argument!r}: options begin with two dashes, such as --tp 2")
            if not known and not inside_dictionary:
                raise ConfigurationError(f"there is no option --{name}{_nearest(name, names)}")
            takes_value = not equals and name not in ("help", "h", "print_config")
            follows = arguments[index + 1] if index + 1 < len(arguments) else None
            if takes_value and names.get(name) is bool and (follows is None or follows not in _SWITCHES):
                argument, takes_value = f"{argument}=true", False
            elif takes_value and follows is None:
                raise ConfigurationError(f"{argument} needs a value")
        else:
            _check_file(Path(argument))
            result.append("--config")
        result.append(argument)
    return result


_SWITCHES = ("true", "false", "yes", "no")


def _check_file(path: Path) -> None:
    if not path.is_file():
        beside = [str(one) for one in sorted(path.parent.glob("*.yaml"))] if path.parent.is_dir() else []
        raise ConfigurationError(f"there is no configuration file {path}{_nearest(str(path), beside)}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not YAML: {_one_line(str(error))}") from error
    if values is not None and not isinstance(values, dict):
        raise ConfigurationError(f"{path} must hold fields and values, such as 'tp: 2'")
    try:
        _check_keys(values or {}, "")
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from error


def _check_keys(values: dict[str, Any], group: str) -> None:
    """Every key names a field, or belongs to a free dictionary."""
    names = dict(_fields(TrainConfiguration))
    for key, value in values.items():
        name = f"{group}{key}"
        is_group = any(one.startswith(f"{name}.") for one in names)
        if not is_group and name not in names:
            groups = {one.rpartition(".")[0] for one in names} - {""}
            raise ConfigurationError(f"there is no field {name}{_nearest(name, [*groups, *names])}")
        if is_group:
            if not isinstance(value, dict):
                raise ConfigurationError(f"{name} is a group of fields, not {value!r}")
            _check_keys(value, f"{name}.")


def _fields(kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Full name and type of every field that is not a group."""
    types = typing.get_type_hints(kind)
    for one in dataclasses.fields(kind):
        if dataclasses.is_dataclass(types[one.name]):
            yield from _fields(types[one.name], f"{prefix}{one.name}.")
        else:
            yield f"{prefix}{one.name}", types[one.name]


def _is_open(kind: Any) -> bool:
    return typing.get_origin(kind) is dict


def _nearest(name: str, valid: Sequence[str] | dict[str, Any]) -> str:
    """``; did you mean x?`` with the valid names most like this one, by its last part too."""
    last = {one.rpartition(".")[2]: one for one in valid}
    own = name.rpartition(".")[2]
    initials = {"".join(word[:1] for word in one.split("_")): full for one, full in last.items()}
    found = [last[one] for one in difflib.get_close_matches(own, list(last), n=1, cutoff=0.7)]
    if not found and len(own) > 1 and own in initials:  # lr for learning_rate
        found = [initials[own]]
    found = found or difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    if not found:
        return "; colrow train --help lists them" if valid else ""
    return f": did you mean {found[0]}?"


def _build(kind: type, values: dict[str, Any]) -> Any:
    types = typing.get_type_hints(kind)
    built = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(types[name]):
            value = _build(types[name], value)
        elif name == "betas":
            value = tuple(value)
        built[name] = value
    return kind(**built)


def _one_line(message: str) -> str:
    """The parser's report without its line breaks and class syntax."""
    message = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", message)
    message = re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", message)
    message = re.sub(r"Expected an? ", "expected ", message)
    message = re.sub(r'Parser key "([\w.]+)":', r"\1:", message)
    return " ".join(message.split())
