"""Models by name: a configuration of transformers, a folder, or a function of the user's."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from colrow.checkpoint.meta import parameters_on_meta
from colrow.model.fields import role_of
from colrow.trace import Example

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class LoadedModel:
    """A model with calls of it.

    Attributes:
        model: in evaluation mode.
        examples: by mode: ``training``, with labels where the model takes them, and ``evaluation``, without.
            Integers are real tensors even where the model is on the meta device.
        name: of the model's class.
    """

    model: nn.Module
    examples: dict[str, Example]
    name: str


def load(
    specification: str,
    settings: Mapping[str, Any] | None = None,
    *,
    device: str = "meta",
    shrink: bool = False,
    seed: int = 0,
) -> LoadedModel:
    """Build a model, with random weights, and make example inputs for it.

    Args:
        specification: one of

            - ``transformers:DeepseekV3Config``: a configuration with its defaults;
            - a local folder with a ``config.json`` of transformers;
            - ``package.module:factory``: a function that returns a model, or a model and the keywords of a
              call of it; or a class of modules.
        settings: fields of the configuration by name, those of nested ones as ``text_config.hidden_size``; or
            arguments of the factory. Strings are read as YAML: ``4``, ``true``, ``[1, 2]``.
        device: where to build; on ``meta`` a model of any size takes no memory.
        shrink: build a small model of the same architecture instead, which runs in milliseconds.
        seed: of the weights and inputs.

    Raises:
        ValueError: if the specification or a setting names nothing that exists, the model cannot be built, or
            no inputs for it are known.
        FileNotFoundError: if a folder has no ``config.json``.
    """
    given = {name: _value(value) for name, value in (settings or {}).items()}
    head, colon, rest = specification.partition(":")
    if colon and head == "transformers":
        return _load_config(_default_config(rest, given), device, shrink, seed)
    if Path(specification).is_dir():
        return _load_config(_config_of_folder(Path(specification), given), device, shrink, seed)
    if colon and rest.isidentifier():
        if shrink:
            raise ValueError(
                f"only configurations of transformers can be shrunk: let {specification} build a small model"
            )
        return _load_factory(_find_factory(head, rest), specification, given, device, seed)
    if not colon and _is_module(specification):
        raise ValueError(
            f"{specification} is a module: name the function in it that returns the model, as in "
            f"{specification}:build"
        )
    raise ValueError(
        f"{specification!r} is neither transformers:SomeConfig, nor a folder with a config.json, nor "
        "package.module:function"
    )


def _value(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    import yaml

    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def _default_config(name: str, settings: Mapping[str, Any]) -> PreTrainedConfig:
    import transformers

    config_class = getattr(transformers, name, None)
    if not (isinstance(config_class, type) and issubclass(config_class, transformers.PreTrainedConfig)):
        known = [one for one in dir(transformers) if one.endswith("Config")]
        near = difflib.get_close_matches(name, known, 3)
        hint = f": did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"transformers has no configuration {name!r}{hint}")
    default = config_class()
    _check_names(default, settings)
    given = _nested(settings)
    for part, changes in given.items():
        inner = getattr(default, part)
        if isinstance(inner, transformers.PreTrainedConfig) and isinstance(changes, dict):
            # a part may have other defaults than its class
            given[part] = _merged(inner.to_diff_dict(), changes)
    return _checked(lambda: config_class(**given))


def _config_of_folder(folder: Path, settings: Mapping[str, Any]) -> PreTrainedConfig:
    from transformers import AutoConfig

    file = folder / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"the folder {folder} has no config.json")
    whole = AutoConfig.from_pretrained(folder, local_files_only=True)
    if not settings:
        return whole
    _check_names(whole, settings)
    data = _merged(json.loads(file.read_text(encoding="utf-8")), _nested(settings))
    return _checked(lambda: type(whole).from_dict(data))


def _checked(build: Callable[[], PreTrainedConfig]) -> PreTrainedConfig:
    """What ``build`` returns; what transformers refuses is a mistake of the user's."""
    try:
        return build()
    except ImportError:
        raise
    except Exception as error:  # its validation has error classes of its own
        raise ValueError(f"transformers refuses this configuration: {error}") from error


def _check_names(config: PreTrainedConfig, settings: Mapping[str, Any]) -> None:
    for path in settings:
        part: Any = config
        for name in path.split("."):
            known = part if isinstance(part, dict) else {**vars(part), **type(part).attribute_map}
            if name not in known:
                near = difflib.get_close_matches(name, [one for one in known if one[0] != "_"], 1)
                hint = f", did you mean {near[0]}?" if near else ""
                raise ValueError(f"{type(config).__name__} has no field {path!r}{hint}")
            part = part[name] if isinstance(part, dict) else getattr(part, name)


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """``{"a.b": 1}`` as ``{"a": {"b": 1}}``."""
    found: dict[str, Any] = {}
    for path, value in settings.items():
        *parents, name = path.split(".")
        inner = found
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = value
    return found


def _merged(data: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The same nested fields with some of them changed.

    Lists with an entry for each layer are left out where the number of layers changes: they follow from it.
    """
    found = dict(data)
    for name, value in changes.items():
        before = data.get(name)
        if isinstance(before, dict) and isinstance(value, dict):
            found[name] = _merged(before, value)
            continue
        found[name] = value
        if role_of(name, {}) == "layers" and isinstance(before, int) and before != value:
            for other, one in data.items():
                if isinstance(one, list) and len(one) == before and other not in changes:
                    found.pop(other, None)
    return found


def _load_config(config: PreTrainedConfig, device: str, shrink: bool, seed: int) -> LoadedModel:
    from colrow.model.examples import examples_of
    from colrow.model.trying import build, known_calls

    calls = known_calls(config)
    chosen = calls.small if shrink and calls.small is not None else config
    model = _checked_build(lambda: build(calls.model_class, chosen, device, seed), type(config).__name__)
    return LoadedModel(model, examples_of(model, calls, seed), type(model).__name__)


def _checked_build(build: Callable[[], nn.Module], name: str) -> nn.Module:
    try:
        return build()
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(f"the model of {name} cannot be built: {type(error).__name__}: {error}") from error


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # a parent that does not exist, or no name of a module
        return False


def _find_factory(module: str, name: str) -> Callable[..., Any]:
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise
        raise ValueError(f"there is no module {module!r} that could be imported") from error
    if not callable(found):
        raise ValueError(f"the module {module} has no function or class {name!r}")
    factory: Callable[..., Any] = found
    return factory


def _load_factory(
    factory: Callable[..., Any], name: str, settings: Mapping[str, Any], device: str, seed: int
) -> LoadedModel:
    try:
        inspect.signature(factory).bind(**settings)
    except TypeError as error:
        raise ValueError(f"{name} cannot be called with these settings: {error}") from error
    with torch.random.fork_rng(devices=[]), _placed(device):
        torch.manual_seed(seed)
        made = factory(**settings)
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name} returned a {type(model).__name__}, not a module or a module and a dict")
    model.eval()
    if inputs is None:
        return LoadedModel(model, _examples_of_module(model, name, seed), type(model).__name__)
    if not isinstance(inputs, Mapping):
        raise ValueError(
            f"{name} returned inputs of type {type(inputs).__name__}, not the keywords of a call"
        )
    return LoadedModel(model, _with_and_without_labels(model, inputs), type(model).__name__)


def _placed(device: str) -> AbstractContextManager[Any]:
    """Parameters made in this context lie there; on meta, only they do, so that inputs keep their data."""
    return parameters_on_meta() if device == "meta" else torch.device(device)


def _examples_of_module(model: Any, name: str, seed: int) -> dict[str, Example]:
    from colrow.model.examples import examples_of
    from colrow.model.trying import calls_of

    if not hasattr(model, "main_input_name"):
        raise ValueError(
            f"how to call the model of {name} is not known: return (model, inputs), the inputs being the "
            "keywords of a call"
        )
    return examples_of(model, calls_of(model), seed)


def _with_and_without_labels(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Example]:
    """Two modes; labels belong to training, if the forward can do without."""
    parameters = inspect.signature(model.forward).parameters
    labels = parameters.get("labels")
    optional = labels is not None and labels.default is not labels.empty
    bare = {name: value for name, value in inputs.items() if name != "labels" or not optional}
    return {"training": Example((), dict(inputs)), "evaluation": Example((), bare)}
