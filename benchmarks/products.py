"""How many multiplications and additions of numbers the matrix products of a call make: what it costs at least, whatever else it does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


def operations(call: Callable[[], object]) -> int:
    """Those of PyTorch's matrix products, convolutions and fused attention, backward ones too."""
    counter: Any = _Counter()  # PyTorch does not type its modes
    with counter:
        call()
    return int(counter.total)


class _Counter(TorchDispatchMode):
    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.total += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out
