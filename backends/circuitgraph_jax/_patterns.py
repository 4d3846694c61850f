"""What many families ask of a configuration: norms, biases, and the attention pattern of every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from circuitgraph._architecture import AttentionPattern, Norm, Rotary
from circuitgraph._errors import TraceError
from circuitgraph_jax._family import Bias, Pairs, Settings
from circuitgraph_jax._rotary import WAY_OUT, rotary

Patterns = tuple[AttentionPattern, ...]

ROTARY = "model.rotary_emb"


def rms(config: Settings) -> Norm:
    """Zhang and Sennrich 2019, arXiv:1910.07467."""
    return Norm("", "rms", config["rms_norm_eps"])


def layer_norm(config: Settings, key: str = "layer_norm_eps") -> Norm:
    """Ba et al. 2016, arXiv:1607.06450."""
    return Norm("", "layer", config[key])


def biases_if(condition: Any, *biases: Bias) -> tuple[Bias, ...]:
    return biases if condition else ()


def patterns_of(
    config: Settings,
    rotaries: Sequence[Rotary | None] | None = None,
    windows: Sequence[int | None] | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Patterns:
    """One a layer: `rotaries` and `windows` may differ between layers. The usual scale is `1 / sqrt(head_dim)`."""
    scale = config.head_dim**-0.5 if scale is None else float(scale)
    nothing = [None] * config.n_layers
    return tuple(
        AttentionPattern(scale, rotary=turn, window=window, softcap=softcap)
        for turn, window in zip(rotaries or nothing, windows or nothing, strict=True)
    )


def rope(config: Settings, joint: str = ROTARY, *, is_partial: bool = False, pairs: Pairs = "halves") -> list[Rotary | None]:
    """The same rotary embedding in every layer."""
    return [turn_of(config, config.get("rope_parameters") or {}, joint, is_partial=is_partial, pairs=pairs)] * config.n_layers


def turn_of(config: Settings, parameters: Mapping[str, Any], joint: str, *, is_partial: bool = False, pairs: Pairs = "halves") -> Rotary:
    """One rotary embedding. `is_partial`: the family's code can leave a part of each head as it is."""
    part = parameters.get("partial_rotary_factor") or 1.0
    if part != 1 and not is_partial:
        raise TraceError(f"{joint}: partial_rotary_factor is {part!r}; a {config.model_type} model turns whole heads (1.0); {WAY_OUT}")
    return rotary(parameters, int(config.head_dim * part), pairs=pairs, joint=joint)


def windows_everywhere(config: Settings) -> list[int | None]:
    """The same window in every layer, or none."""
    return [config.get("sliding_window")] * config.n_layers


def windows_by_type(config: Settings) -> list[int | None]:
    """A window in the layers of type "sliding_attention". One of `n` shows the last `n` positions, the own one included."""
    return [_window(config, kind, layer) for layer, kind in enumerate(config.of_layers("layer_types"))]


def _window(config: Settings, kind: str, layer: int) -> int | None:
    window = config.get("sliding_window")
    if kind == "full_attention":
        return None
    if kind != "sliding_attention" or window is None:
        raise TraceError(
            f"model.layers.{layer}.self_attn: attention of type {kind!r} with sliding_window={window!r}; expected 'full_attention', or "
            f"'sliding_attention' with a window; {WAY_OUT}"
        )
    return int(window)
