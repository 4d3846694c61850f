"""Traces of small models, kept by what the models hold: each check asks for the same few, and so do the checks of the next algorithm."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from circuitgraph._engine import TracedModel
from circuitgraph.testing._planted import traced
from circuitgraph.testing._reference_model import ReferenceModel


def kept_trace(model: ReferenceModel, backend: str, **options: Any) -> TracedModel:
    """`traced`, which is done once for models of the same numbers. Engines bound to it know nothing of each other."""
    digest = hashlib.sha256()
    for part in _parts(model):
        digest.update(part)
    return _kept(_Same(digest.hexdigest(), model), backend, tuple(sorted(options.items())))


@dataclass(frozen=True)
class _Same:
    """A model, equal to every other one that holds the same."""

    digest: str
    model: ReferenceModel = field(compare=False)


@lru_cache(maxsize=64)
def _kept(same: _Same, backend: str, options: tuple[tuple[str, Any], ...]) -> TracedModel:
    return traced(same.model, backend, **dict(options))


def _parts(value: Any) -> Iterator[bytes]:
    """All that a model holds, each part with its kind and its length before it."""
    if dataclasses.is_dataclass(value):
        yield type(value).__name__.encode()
        for one in dataclasses.fields(value):
            yield from _parts(getattr(value, one.name))
    elif isinstance(value, tuple):
        yield f"{len(value)}".encode()
        for item in value:
            yield from _parts(item)
    elif isinstance(value, np.ndarray):
        yield f"{value.dtype}{value.shape}".encode()
        yield value.tobytes()
    else:
        yield f"{type(value).__name__} {value!r}\n".encode()
