"""nnsight as the window on the untouched model. The one place that imports it: importing it patches torch, so it is done late."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from circuitgraph_torch._calls import forward_arguments
from circuitgraph_torch._modes import undisturbed

_LOCK = threading.Lock()  # nnsight cannot trace in two threads at once


def capture(model: nn.Module, paths: Sequence[str], ids: Tensor) -> list[Tensor]:
    """What the modules at `paths` (in the order in which the model calls them) say on these tokens, from one run of the original."""
    import nnsight

    with _LOCK, undisturbed(model):
        return [value.detach() for value in _outputs(nnsight, nnsight.NNsight(model), paths, ids, forward_arguments(model, ids))]


def _outputs(nnsight: Any, wrapped: Any, paths: Sequence[str], ids: Tensor, arguments: dict[str, Any]) -> list[Tensor]:
    modules = [wrapped.get(path) for path in paths]
    with wrapped.trace(ids, **arguments):
        outputs = nnsight.save([])
        for module in modules:
            value = module.output
            outputs.append((value if isinstance(value, Tensor) else value[0]).clone())
    return outputs  # type: ignore[no-any-return]


def unwrap(model: Any) -> Any:
    """The `nn.Module` inside an nnsight model, and its tokenizer if it has one; anything else as it is."""
    if any(cls.__module__.split(".")[0] == "nnsight" for cls in type(model).__mro__):
        return model._module
    return model
