"""What the backward pass puts in place of a joint's own derivative, as `circuitgraph._engine.Rule` says. No value changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array, lax

from circuitgraph._engine import Rule
from circuitgraph_jax._decoder import Decoder
from circuitgraph_jax._joints import ACTIVATIONS, MLP, Attention, Norm

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class Way(eqx.Module):
    """A rule; the layer that it drops is a number beside it, so that layers are not compiled for one by one."""

    rule: Rule = eqx.field(static=True)
    dropped: Int[Array, ""] | None

    @classmethod
    def of(cls, rule: Rule) -> Way:
        dropped = None if rule.dropped_layer is None else jnp.asarray(rule.dropped_layer, jnp.int32)
        return cls(replace(rule, dropped_layer=None), dropped)

    def decoder(self, decoder: Decoder) -> Decoder:
        """The same model to run; its norms as the rule has them."""
        return _with_frozen_norms(decoder) if self.rule.norms == "frozen" else decoder

    def past(self, layer: Int[Array, ""], grads: Float[Array, ...]) -> Float[Array, ...]:
        """The gradients in a layer, which are nothing in one that is dropped."""
        return grads if self.dropped is None else jnp.where(layer == self.dropped, 0, grads)

    def mix(self, attention: Attention, projected: Float[Array, "readers position head_dim"]) -> Float[Array, "heads position head_dim"]:
        """`attention.mix`."""
        if self.rule.patterns == "frozen":
            askers = lax.stop_gradient(projected[: attention.n_askers])
            projected = jnp.concatenate([askers, projected[attention.n_askers :]])
        return attention.mix(projected)

    def contract(self, mlp: MLP, hidden: tuple[Float[Array, "position width"], ...]) -> Float[Array, "position d_model"]:
        """`mlp.contract`."""
        return mlp.finish(self.inner(mlp, hidden))

    def inner(self, mlp: MLP, hidden: tuple[Float[Array, "position width"], ...]) -> Float[Array, "position width"]:
        """`mlp.inner`."""
        own: Callable[[Array], Array] = ACTIVATIONS[mlp.activation]
        act = _by_ratio(own) if self.rule.activations == "ratio" else own
        if len(hidden) == 1:
            return act(hidden[0])
        product = act(hidden[1]) * hidden[0]
        return _halved(product) if self.rule.gates == "half" else product


class FrozenNorm(eqx.Module):
    """A norm whose scale is a constant; what centres `x` is still linear."""

    norm: Norm

    def __call__(self, x: Float[Array, ...]) -> Float[Array, ...]:
        return self.norm.scaled(x, lax.stop_gradient(self.norm.scale(x)))

    def split(
        self, parts: Float[Array, "heads position d_model"], total: Float[Array, "position d_model"]
    ) -> Float[Array, "heads position d_model"]:
        return self.norm.scaled_parts(parts, lax.stop_gradient(self.norm.scale(total)))

    def bare(self, x: Float[Array, ...]) -> Float[Array, ...]:
        return self.norm.bare_scaled(x, lax.stop_gradient(self.norm.scale(x)))


def _with_frozen_norms(decoder: Decoder) -> Decoder:
    def is_norm(node: Any) -> bool:
        return isinstance(node, Norm)

    frozen: Decoder = jax.tree.map(lambda node: FrozenNorm(node) if is_norm(node) else node, decoder, is_leaf=is_norm)
    return frozen


def _by_ratio(act: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """An activation that is `x` times a constant: `act(x) / x`, or its limit where `x` is too small to divide by."""

    def acted(x: Array) -> Array:
        is_small = jnp.abs(x) < float(jnp.finfo(x.dtype).tiny)  # type: ignore[no-untyped-call]
        limit = jax.grad(act)(jnp.zeros((), x.dtype))
        return x * lax.stop_gradient(jnp.where(is_small, limit, act(x) / jnp.where(is_small, 1, x)))

    return acted


def _halved(product: Array) -> Array:
    half = product / 2
    return half + lax.stop_gradient(half)
