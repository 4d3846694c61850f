"""`measured`: what a dictionary keeps of a place, and of the model's loss when it is spliced in."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from circuitgraph._dictionary import Dictionary
from circuitgraph._errors import CircuitGraphError
from circuitgraph._training import DictionaryMeasures
from circuitgraph_torch._calls import original_logits
from circuitgraph_torch._places import Spot, batches, changed, seen_at

if TYPE_CHECKING:
    from jaxtyping import Int
    from numpy import ndarray

_AT_ONCE = 1024  # positions; each has a row of logits


def measured(
    model: nn.Module,
    wanted: tuple[Spot, Spot],
    dictionary: Dictionary,
    prompts: Sequence[Int[ndarray, " position"]],
    *,
    first_position: int,
) -> DictionaryMeasures:
    """See `DictionaryMeasures`. Positions before `first_position` are left as the model has them."""
    device = next(model.parameters()).device
    on_device = dictionary.on(lambda array: torch.from_numpy(array).to(device, torch.float32))
    sums, losses, n_next = _Sums(dictionary), np.zeros(3), 0
    for rows in batches(prompts, _AT_ONCE):
        ids = torch.from_numpy(rows).to(device)
        with torch.no_grad():
            x, y = (value.float() for value in seen_at(model, wanted, ids))
            _check_widths(dictionary, x, y)
            f = on_device.encode(x)
            y_hat = on_device.decode(x, f)
        sums.add(*(value[:, first_position:].flatten(0, 1) for value in (y, y_hat, f)))
        runs = (None, y_hat, torch.zeros_like(y))
        losses += [_loss(model, ids, wanted[1], said, first_position) for said in runs]
        n_next += ids[:, 1:].numel()
    loss, spliced, zero = (losses / max(1, n_next)).tolist()
    return DictionaryMeasures(sums.positions, sums.live, sums.l0, sums.explained_variance, loss, spliced, zero)


def _check_widths(dictionary: Dictionary, x: Tensor, y: Tensor) -> None:
    got, wanted = (dictionary.d_in, int(dictionary.decoder.shape[1])), (x.shape[-1], y.shape[-1])
    if got != wanted:
        raise CircuitGraphError(
            f"measure: {dictionary.name} maps {got[0]} numbers to {got[1]}, and {dictionary.reads} has {wanted[0]}, of which it must make "
            f"{wanted[1]}; take a dictionary that was trained on this component of this model"
        )


class _Sums:
    """Of what is reconstructed, in float64."""

    def __init__(self, dictionary: Dictionary) -> None:
        d_out = dictionary.decoder.shape[1]
        self.positions, self._active, self._left = 0, 0, 0.0
        self._fired = np.zeros(dictionary.n_features, dtype=bool)
        self._sum, self._squares = np.zeros(d_out), 0.0

    def add(self, y: Tensor, y_hat: Tensor, f: Tensor) -> None:
        is_on = f > 0
        self.positions += len(y)
        self._active += int(is_on.sum())
        self._fired |= is_on.any(0).cpu().numpy()
        whole, left = y.cpu().double(), (y - y_hat).cpu().double()
        self._left += float(left.square().sum())
        self._sum += whole.sum(0).numpy()
        self._squares += float(whole.square().sum())

    @property
    def live(self) -> float:
        return float(self._fired.mean())

    @property
    def l0(self) -> float:
        return self._active / max(1, self.positions)

    @property
    def explained_variance(self) -> float:
        varied = self._squares - float((self._sum**2).sum()) / max(1, self.positions)
        return 1 - self._left / varied if varied > 0 else float("nan")


def _loss(model: nn.Module, ids: Tensor, spot: Spot, said: Tensor | None, first_position: int) -> float:
    """The summed cross-entropy of the next tokens, with what is `said` `[prompts, position, width]` at the place."""
    with _spliced(model, spot, said, first_position):
        logits = original_logits(model, ids)[:, :-1].float()
    return float(cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))


def _spliced(model: nn.Module, spot: Spot, said: Tensor | None, first_position: int) -> AbstractContextManager[None]:
    def change(value: Tensor) -> Tensor:
        assert said is not None
        new = value.reshape(*said.shape[:2], -1).clone()
        new[:, first_position:] = (said[:, first_position:] / spot.scale).to(value.dtype)
        return new.reshape(value.shape)

    return changed(model, [] if said is None else [(spot, change)])
