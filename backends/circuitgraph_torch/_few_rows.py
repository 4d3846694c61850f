"""A linear map of few rows to very many numbers, on a CPU: the unembedding of last positions.

MKL is slow where a product has a few rows on the left and transposed weights on the right. The same product with the weights on the left is
up to three times as fast (`benchmarks/few_rows.py`), with its result the other way round; piece by piece it is turned in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_MOST_ROWS = 128
_PIECE = 4096  # outputs


def linear_of_few(module: nn.Linear, x: Tensor) -> Tensor:
    """`module(x)` up to rounding, `[..., out]` of `[..., in]`; where a gradient may be asked for, or by a subclass, `module(x)` itself."""
    rows = x.reshape(-1, x.shape[-1])
    is_plain = type(module) is nn.Linear and x.device.type == "cpu" and x.dtype == torch.float32
    if not is_plain or torch.is_grad_enabled() or len(rows) > _MOST_ROWS:
        said: Tensor = module(x)
        return said
    out = x.new_empty(len(rows), module.out_features)
    for start, weights in enumerate(module.weight.split(_PIECE)):
        out[:, start * _PIECE : start * _PIECE + len(weights)] = (weights @ rows.T).T
    out = out.view(*x.shape[:-1], -1)
    return out if module.bias is None else out + module.bias
