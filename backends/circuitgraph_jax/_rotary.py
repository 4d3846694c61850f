"""From a configuration's `rope_parameters` to a `Rotary`: frequencies in float64, for the four kinds that do not depend on the prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from circuitgraph._architecture import Rotary
from circuitgraph._errors import TraceError

Parameters = Mapping[str, Any]
Frequencies = tuple[float, ...]

WAY_OUT = "use backend='torch', which runs the model's own code, or hand over architecture=..."

_MOVING = ("dynamic", "longrope")


def rotary(parameters: Parameters, size: int, *, pairs: Literal["halves", "interleaved"] = "halves", joint: str) -> Rotary:
    """The rotary embedding that `rope_parameters` describe, of the first `size` features of a head.

    Frequency `i` is `rope_theta ** (-2i / d)` for `d = size` (Su et al. 2021, arXiv:2104.09864), then changed as `rope_type` says.
    Raises `TraceError` that begins with `joint` for another `rope_type` or a parameter that is missing.
    """
    parameters = _Named(parameters, joint)
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in _KINDS:
        raise TraceError(f"{joint}: rope_type {kind!r} is a joint that the JAX backend does not have; {_reason(kind)}; {WAY_OUT}")
    plain = tuple(float(parameters["rope_theta"]) ** (-i / size) for i in range(0, size, 2))
    frequencies, scale = _KINDS[kind](plain, parameters)
    return Rotary(frequencies, pairs, scale)


class _Named(dict[str, Any]):
    """Parameters whose missing key is an error with the joint's name."""

    def __init__(self, parameters: Parameters, joint: str) -> None:
        super().__init__({key: value for key, value in parameters.items() if value is not None})
        self.joint = joint

    def __missing__(self, key: str) -> Any:
        found = ", ".join(self) or "nothing"
        raise TraceError(f"{self.joint}: rope_parameters have {found}; expected {key!r} too; add it to the config, or {WAY_OUT}")


def _reason(kind: Any) -> str:
    if kind in _MOVING:
        return "its frequencies change with the length of the prompt"
    return f"expected one of {', '.join(_KINDS)}"


def _default(plain: Frequencies, parameters: Parameters) -> tuple[Frequencies, float]:
    return plain, 1.0


def _linear(plain: Frequencies, parameters: Parameters) -> tuple[Frequencies, float]:
    """Position interpolation (Chen et al. 2023, arXiv:2306.15595)."""
    return tuple(f / parameters["factor"] for f in plain), 1.0


def _llama3(plain: Frequencies, parameters: Parameters) -> tuple[Frequencies, float]:
    """Llama 3.1 (arXiv:2407.21783): waves longer than the old context are slowed by `factor`, short ones kept, those between blended."""
    slowest, fastest = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    old_length = float(parameters["original_max_position_embeddings"])

    def stretched(frequency: float) -> float:
        turns = old_length * frequency / (2 * math.pi)
        kept = min(max((turns - slowest) / (fastest - slowest), 0.0), 1.0)
        return frequency * (kept + (1 - kept) / float(parameters["factor"]))

    return tuple(stretched(f) for f in plain), 1.0


def _yarn(plain: Frequencies, parameters: Parameters) -> tuple[Frequencies, float]:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): slow dimensions interpolated, fast ones kept, a ramp over the dimensions between."""
    factor, old_length = parameters["factor"], parameters["original_max_position_embeddings"]
    size, theta = 2 * len(plain), parameters["rope_theta"]

    def dimension(turns: float) -> float:
        """The dimension, possibly between two, that makes so many turns in the old context."""
        return size * math.log(old_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(parameters.get("beta_fast") or 32), dimension(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    width = high - low or 0.001  # a ramp of no width is a step; transformers divides by the same small number
    ramp = [min(max((i - low) / width, 0.0), 1.0) for i in range(len(plain))]
    return tuple(f * (1 - r) + f / factor * r for f, r in zip(plain, ramp, strict=True)), _yarn_scale(factor, parameters)


def _yarn_scale(factor: float, parameters: Parameters) -> float:
    """By how much queries and keys grow, which sharpens the attention over a longer context."""
    given = parameters.get("attention_factor")
    if given is not None:
        return float(given)

    def growth(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    above, below = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return growth(above) / growth(below) if above and below else growth(1.0)


_KINDS: dict[str, Callable[[Frequencies, Parameters], tuple[Frequencies, float]]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
