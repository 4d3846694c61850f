"""One training of a dictionary: its weights, Adam, and the losses of a step.

With `x` what is read and `y` what is reconstructed, both scaled to variance 1 per dimension,

    z     = (x - decoder_bias) @ encoder + encoder_bias          a transcoder does not subtract the bias
    f     = the k largest of relu(z), or jump_relu(z, threshold)
    y_hat = f @ decoder + decoder_bias                           decoder rows have norm 1
    loss  = mean (y - y_hat)^2 + auxiliary * A                   JumpReLU: + sparsity * (L0 / k - 1)^2

`A` (Gao et al. 2024, section 2.4 and appendix A.2): what `y - y_hat` leaves when it is reconstructed by the `d / 2` dead features of
largest `relu(z)`, as a share of its mean square. The gradient of `y - y_hat` is not taken there: the living ones are left alone.

What is left is small beside a JumpReLU feature's threshold, so that it would not come back by `A` alone. While it is dead its threshold
falls, by a hundredth a step; this is ours, from no paper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from circuitgraph._dictionary import Dictionary
from circuitgraph._errors import CircuitGraphError
from circuitgraph._training import Place, SAETraining, StepNumbers
from circuitgraph_torch._activations import Activations
from circuitgraph_torch._jump import jump_relu, step

if TYPE_CHECKING:
    from numpy import ndarray

_RISE, _FALL = 1 / 20, 1 / 5  # shares of the steps in which the learning rate rises from 0, and falls to 0
_BETAS, _EPS = (0.9, 0.999), 6.25e-10  # of Adam, as Gao et al.
_LARGEST_GRADIENT = 1.0  # its norm over all weights
_SINKING = 0.01  # of the threshold of a dead JumpReLU feature, in a step
_SAMPLED = 1 << 21  # pre-activations of which a quantile is taken
_NOTHING = 1e-12  # a variance that is rounding


@dataclass(frozen=True)
class Scales:
    """By what inputs and outputs are multiplied in training, and their means before that, `[d_in]` and `[d_out]`."""

    x: Tensor
    y: Tensor
    x_mean: Tensor
    y_mean: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> Scales:
        return cls(_scale(x), _scale(y), x.mean(0), y.mean(0))


class Training:
    """Of a dictionary at a place. What it holds comes from `begin` or `restore`."""

    def __init__(self, place: Place, activations: Activations, settings: SAETraining, *, name: str, model: str) -> None:
        self.step = 0
        self._place, self._activations, self._settings = place, activations, settings
        self._name, self._model = name, model
        self._weights: dict[str, nn.Parameter]
        self._adam: torch.optim.Adam
        self._scales: Scales
        self._idle: Tensor  # how many positions ago each feature was active last, `[features]`

    def begin(self) -> None:
        """Decoder rows in directions that the seed draws; an autoencoder's encoder is the decoder, a transcoder's is drawn apart. Scales
        and biases are those of the first chunk of activations."""
        x, y = self._activations.first()
        self._scales = Scales.of(x, y)
        n, random = self._settings.n_features, torch.Generator().manual_seed(self._settings.seed)
        decoder = _unit(torch.randn(n, y.shape[1], generator=random)).to(y)
        encoder = _unit(torch.randn(n, x.shape[1], generator=random)).to(x) if self._place.is_transcoder else decoder
        x_mean = self._scales.x_mean * self._scales.x
        weights = {
            "encoder": encoder.T.contiguous(),
            "encoder_bias": -(encoder @ x_mean) if self._place.is_transcoder else x.new_zeros(n),
            "decoder": decoder.clone(),
            "decoder_bias": self._scales.y_mean * self._scales.y,
        }
        if self._settings.activation == "jumprelu":
            rows = x[:: max(1, len(x) // max(1, _SAMPLED // n))] * self._scales.x - x_mean
            weights["log_threshold"] = x.new_full((n,), math.log(self._first_threshold(rows @ weights["encoder"])))
        self._put(weights)
        self._idle = torch.zeros(n, dtype=torch.int64, device=x.device)

    def _first_threshold(self, z: Tensor) -> float:
        """The threshold, the same for all, with which `k` features are active in the mean: training starts at the L0 that it aims at."""
        share = self._settings.k / self._settings.n_features
        return max(1e-3, float(np.quantile(z.cpu().numpy(), 1 - share)))

    def advance(self) -> StepNumbers:
        x, y = self._activations.batch(self.step)
        x, y = x * self._scales.x, y * self._scales.y
        z = self._pre_activations(x)
        f, penalty = self._active(z)
        left = y - (f @ self._weights["decoder"] + self._weights["decoder_bias"])
        unexplained = left.square().mean()
        loss = unexplained + penalty + self._auxiliary(z, left.detach())
        if not math.isfinite(loss.item()):
            raise CircuitGraphError(
                f"train {self._place}: the loss of step {self.step + 1:,} is {loss.item()}; take a smaller learning_rate"
            )
        self._descend(loss)
        is_on = f.detach() > 0
        self._idle = torch.where(is_on.any(0), 0, self._idle + len(x))
        self.step += 1
        return StepNumbers(unexplained.item(), float(is_on.sum(-1, dtype=torch.float32).mean()), 1 - float(self._dead.float().mean()))

    @property
    def _dead(self) -> Tensor:
        return self._idle >= self._settings.dead_after

    def _put(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = {key: nn.Parameter(value) for key, value in weights.items()}
        self._adam = torch.optim.Adam(self._weights.values(), lr=self._settings.learning_rate, betas=_BETAS, eps=_EPS, foreach=False)

    def _pre_activations(self, x: Tensor) -> Tensor:
        w = self._weights
        return (x if self._place.is_transcoder else x - w["decoder_bias"]) @ w["encoder"] + w["encoder_bias"]

    def _active(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The features, and what the loss has for their number."""
        settings = self._settings
        if settings.activation == "topk":
            return _largest(z, settings.k), z.new_zeros(())
        threshold = self._weights["log_threshold"].exp()
        f = jump_relu(z, threshold, settings.bandwidth)
        l0 = step(z, threshold, settings.bandwidth).sum(-1).mean()
        return f, settings.sparsity * (l0 / settings.k - 1).square()

    def _auxiliary(self, z: Tensor, left: Tensor) -> Tensor:
        dead = self._dead
        n_dead = int(dead.sum())
        if self._settings.auxiliary == 0 or n_dead == 0:
            return z.new_zeros(())
        f = _largest(z.masked_fill(~dead, -math.inf), min(n_dead, max(1, left.shape[1] // 2)))
        rest = (left - f @ self._weights["decoder"]).square().mean() / left.square().mean().clamp_min(_NOTHING)
        return self._settings.auxiliary * rest

    def _descend(self, loss: Tensor) -> None:
        self._adam.zero_grad()
        loss.backward()
        decoder = self._weights["decoder"]
        assert decoder.grad is not None
        with torch.no_grad():  # along a row only its norm would change, which is 1: Adam would remember that in vain
            decoder.grad -= (decoder.grad * decoder).sum(-1, keepdim=True) * decoder
        nn.utils.clip_grad_norm_([*self._weights.values()], _LARGEST_GRADIENT, foreach=False)
        for group in self._adam.param_groups:
            group["lr"] = self._settings.learning_rate * _of_rate(self.step, self._settings.steps)
        self._adam.step()
        with torch.no_grad():
            decoder.copy_(_unit(decoder))
            if "log_threshold" in self._weights and self._settings.auxiliary > 0:
                self._weights["log_threshold"].sub_(_SINKING * self._dead)

    def state(self) -> dict[str, ndarray]:
        kept: dict[str, Tensor] = {f"weight.{key}": weight.detach() for key, weight in self._weights.items()}
        for key, weight in self._weights.items():
            moments = self._adam.state.get(weight) or {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
            kept |= {f"mean.{key}": moments["exp_avg"], f"square.{key}": moments["exp_avg_sq"]}
        kept |= {f"scale.{key}": value for key, value in vars(self._scales).items()}
        return {key: value.cpu().numpy().copy() for key, value in (kept | {"idle": self._idle}).items()}

    def restore(self, step: int, state: Mapping[str, ndarray]) -> None:
        device = self._activations.device
        kept = {key: torch.from_numpy(np.array(value)).to(device) for key, value in state.items()}
        self._scales = Scales(**{key.partition(".")[2]: value for key, value in kept.items() if key.startswith("scale.")})
        self._put({key.partition(".")[2]: value for key, value in kept.items() if key.startswith("weight.")})
        for key, weight in self._weights.items():
            if step > 0:
                done = torch.tensor(float(step))
                self._adam.state[weight] = {"step": done, "exp_avg": kept[f"mean.{key}"], "exp_avg_sq": kept[f"square.{key}"]}
        self._idle, self.step = kept["idle"], step

    def dictionary(self) -> Dictionary:
        """In the model's units: the scales are worked into the weights, but for the decoder, whose rows keep norm 1."""
        w = {key: weight.detach() for key, weight in self._weights.items()}
        x, y = self._scales.x, self._scales.y
        is_jump = self._settings.activation == "jumprelu"
        return Dictionary(
            encoder=_array(w["encoder"] * (x / y)),
            decoder=_array(w["decoder"]),
            encoder_bias=_array(w["encoder_bias"] / y),
            decoder_bias=_array(w["decoder_bias"] / y),
            threshold=_array(w["log_threshold"].exp() / y) if is_jump else None,
            k=None if is_jump else self._settings.k,
            activation=self._settings.activation,
            reads=self._place.reads,
            is_centred=not self._place.is_transcoder,
            layer=self._place.component.layer,
            model=self._model,
            name=self._name,
        )


def _largest(z: Tensor, k: int) -> Tensor:
    """`relu(z)` where it is among the `k` largest of its row, else 0."""
    values, at = z.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(z).scatter(-1, at, values.relu())


def _of_rate(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / max(1.0, steps * _RISE), (steps - step) / max(1.0, steps * _FALL))


def _unit(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / norms.clamp_min(_NOTHING)


def _scale(x: Tensor) -> Tensor:
    variance = (x - x.mean(0)).square().mean()
    if not float(variance) > _NOTHING:
        raise CircuitGraphError(f"train: what is there to be reconstructed, or read, has variance {float(variance):.3g} on these prompts")
    return variance.rsqrt()


def _array(weight: Tensor) -> ndarray:
    return weight.cpu().numpy().astype(np.float64)
