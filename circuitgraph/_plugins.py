"""Backends and algorithms by name, from entry points: a package of anyone's adds its own, and nothing is registered by import.

[project.entry-points."circuitgraph.backends"]
torch = "circuitgraph_torch"
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from inspect import Parameter
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, get_type_hints

from circuitgraph._engine import Algorithm, Backend, TracedModel
from circuitgraph._errors import CircuitGraphError, unknown_name
from circuitgraph._settings import parsed

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint, EntryPoints

BACKENDS = "circuitgraph.backends"
ALGORITHMS = "circuitgraph.algorithms"


def names(group: str) -> tuple[str, ...]:
    """The names registered in an entry-point group, sorted."""
    return tuple(sorted({entry.name for entry in _registered(group)}))


def algorithm_named(name: str) -> type[Algorithm]:
    """An algorithm's class; `activation_patching` and `activation-patching` are the same. Raises `UnknownNameError`."""
    found: type[Algorithm] = _entry(ALGORITHMS, "algorithm", name.strip().lower().replace("_", "-")).load()
    return found


def new_algorithm(name: str, **hyper: Any) -> Algorithm:
    """An algorithm with some of its hyper-parameters set. Raises `UnknownNameError` for one that it does not have."""
    cls = algorithm_named(name)
    known = hyper_parameters(name)
    for key in hyper:
        if key not in known:
            raise unknown_name(f"hyper-parameter of {name}", key, known)
    if missing := [key for key in required(name) if key not in hyper]:
        raise CircuitGraphError(f"{name} needs {', '.join(missing)}, which has no default; give it in Python, or as --set {missing[0]}=...")
    return cls(**hyper)


def hyper_parameters(name: str) -> tuple[str, ...]:
    """What a named algorithm can be told."""
    cls: Any = algorithm_named(name)
    return tuple(field.name for field in dataclasses.fields(cls)) if dataclasses.is_dataclass(cls) else ()


def required(name: str) -> tuple[str, ...]:
    """What a named algorithm must be told."""
    return tuple(key for key, parameter in inspect.signature(algorithm_named(name)).parameters.items() if _is_required(parameter))


def settings(name: str, texts: Sequence[str]) -> dict[str, Any]:
    """Hyper-parameters of a named algorithm from texts such as `threshold=0.02`, each as its field's type says."""
    known, read = hyper_parameters(name), dict[str, Any]()
    for text in texts:
        key, sign, value = text.partition("=")
        key = key.strip().replace("-", "_")
        if not sign or not key:
            raise CircuitGraphError(f"setting {text!r}: expected name=value; {name} has {', '.join(known) or 'no hyper-parameters'}")
        if key not in known:
            raise unknown_name(f"hyper-parameter of {name}", key, known)
        if key in read:
            raise CircuitGraphError(f"setting {text!r}: {key} was given already; give it once")
        read[key] = parsed(f"{name}: {key}", value.strip(), _type_of(algorithm_named(name), key))
    return read


def traced(model: Any, *, backend: str = "torch", **options: Any) -> TracedModel:
    """`model` traced by a backend, or `model` itself if it is traced already. Raises `UnknownNameError`, `TraceError`."""
    if all(callable(getattr(type(model), name, None)) for name in ("bind", "checks", "logits")):
        if options:
            raise CircuitGraphError(f"the model is traced already, so {', '.join(sorted(options))} cannot change; pass options to trace()")
        already: TracedModel = model
        return already
    entry = _entry(BACKENDS, "backend", backend)
    with _frameworks_of(entry):
        module: Backend = entry.load()
        known = inspect.signature(module.trace).parameters
        for option in options:
            if option not in known and not any(parameter.kind is Parameter.VAR_KEYWORD for parameter in known.values()):
                raise unknown_name(f"option of backend {backend}", option, [name for name in known if name != "model"])
        return module.trace(model, **options)


def _type_of(cls: Any, key: str) -> Any:
    """The type of one field; of a class whose annotations name what is imported for type checkers only, the others are left alone."""
    annotation = next(field.type for field in dataclasses.fields(cls) if field.name == key)
    owner = next(c for c in cls.__mro__ if key in inspect.get_annotations(c))
    try:
        return get_type_hints(SimpleNamespace(__annotations__={key: annotation}), vars(sys.modules[owner.__module__]))[key]
    except NameError:
        return Any


def _is_required(parameter: Parameter) -> bool:
    return parameter.default is Parameter.empty and parameter.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


def _registered(group: str) -> EntryPoints:
    return _scanned(group, tuple((folder, _changed(folder)) for folder in sys.path))


@lru_cache(maxsize=8)
def _scanned(group: str, folders: tuple[tuple[str, float], ...]) -> EntryPoints:
    """Every installed package is read for it, so once for the folders as they are."""
    from importlib.metadata import entry_points  # a tenth of the time that `import circuitgraph` takes, so only when asked

    return entry_points(group=group)


def _changed(folder: str) -> float:
    """When packages came into a folder of `sys.path`, or went."""
    try:
        return Path(folder).stat().st_mtime
    except OSError:
        return 0.0  # no folder


def _entry(group: str, kind: str, name: str) -> EntryPoint:
    known = names(group)
    if not known:
        raise CircuitGraphError(
            f"no {kind} is installed: circuitgraph runs from a folder that pip does not know; install it with 'pip install -e .'"
        )
    if name not in known:
        raise unknown_name(kind, name, known)
    return next(entry for entry in _registered(group) if entry.name == name)


@contextmanager
def _frameworks_of(entry: EntryPoint) -> Iterator[None]:
    """Turns the import error of a framework that is not there into the command that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if not missing or importlib.util.find_spec(missing) is not None:
            raise  # a module of an installed package: somebody's bug, not a missing framework
        package = entry.dist.name if entry.dist else "circuitgraph"
        raise CircuitGraphError(
            f"backend {entry.name!r} needs {missing}, which is not installed; run: pip install '{package}[{entry.name}]'"
        ) from error
