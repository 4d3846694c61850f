"""A decoder as an Equinox module, in joints: norm, attention, MLP. Everything here is for one prompt; `vmap` does the rest.

Numbers in which layers differ (a window, a scale, rotary frequencies) are arrays, so that layers of one shape can be stacked and scanned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

if TYPE_CHECKING:
    from jaxtyping import Float, Int

EVERYTHING = slice(None)

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
    "identity": lambda x: x,
}


class Norm(eqx.Module):
    """`gain * x / rms(x) + bias` over `axes`; a layer norm subtracts the mean first. Computed in float32 at least, as the originals do."""

    gain: Float[Array, ...] | None
    bias: Float[Array, ...] | None
    eps: Float[Array, ""]
    is_centred: bool = eqx.field(static=True)
    axes: tuple[int, ...] = eqx.field(static=True, default=(-1,))

    def __call__(self, x: Float[Array, ...]) -> Float[Array, ...]:
        return self.scaled(x, self.scale(x))

    def split(
        self, parts: Float[Array, "heads position d_model"], total: Float[Array, "position d_model"]
    ) -> Float[Array, "heads position d_model"]:
        """The norm of `total`, shared out to the parts that add up to it: all get the scale of the total, none the bias."""
        return self.scaled_parts(parts, self.scale(total))

    def of_heads(self, heads: Int[Array, " some"]) -> Norm:
        """Of a norm of queries or keys `[groups, members, position, head_dim]`, that of some heads, as members of one group."""

        def chosen(array: Array | None) -> Array | None:
            if array is None or array.shape[0] * array.shape[1] == 1:
                return array
            return array.reshape(1, -1, 1, array.shape[-1])[:, heads]

        return replace(self, gain=chosen(self.gain), bias=chosen(self.bias))

    def scale(self, x: Float[Array, ...]) -> Float[Array, ...]:
        """What `x` is multiplied by, once it is centred."""
        return jax.lax.rsqrt(jnp.square(self._centred(x)).mean(self.axes, keepdims=True) + self.eps)

    def scaled(self, x: Float[Array, ...], scale: Float[Array, ...]) -> Float[Array, ...]:
        """The norm of `x`, given its scale."""
        y = self._gained(x, scale)
        return (y if self.bias is None else y + self.bias).astype(x.dtype)

    def unscaled(self, x: Float[Array, ...]) -> Float[Array, ...]:
        """What is linear in the norm: with its scale at 1, and without the bias."""
        return self._gained(x, jnp.ones((), x.dtype)).astype(x.dtype)

    def bare(self, x: Float[Array, ...]) -> Float[Array, ...]:
        """The norm without gain and bias."""
        return self.bare_scaled(x, self.scale(x))

    def bare_scaled(self, x: Float[Array, ...], scale: Float[Array, ...]) -> Float[Array, ...]:
        """`bare`, given the scale of `x`."""
        return (self._centred(x) * scale).astype(x.dtype)

    def scaled_parts(
        self, parts: Float[Array, "heads position d_model"], scale: Float[Array, ...]
    ) -> Float[Array, "heads position d_model"]:
        """`split`, given the scale of the total."""
        return self._gained(parts, scale).astype(parts.dtype)

    def _centred(self, x: Float[Array, ...]) -> Float[Array, ...]:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return wide - wide.mean(self.axes, keepdims=True) if self.is_centred else wide

    def _gained(self, x: Float[Array, ...], scale: Float[Array, ...]) -> Float[Array, ...]:
        y = self._centred(x) * scale
        return y if self.gain is None else y * self.gain


class Rotation(eqx.Module):
    """Rotary position embedding; see `circuitgraph._architecture.Rotary`. A layer without one has frequencies of 0."""

    frequencies: Float[Array, " pairs"]
    scale: Float[Array, ""]
    is_interleaved: bool = eqx.field(static=True)

    def __call__(self, x: Float[Array, "... some head_dim"], positions: Int[Array, " some"]) -> Float[Array, "... some head_dim"]:
        n = len(self.frequencies)
        angles = positions.astype(self.frequencies.dtype)[:, None] * self.frequencies
        cos, sin = jnp.cos(angles) * self.scale, jnp.sin(angles) * self.scale
        turned, rest = x[..., : 2 * n], x[..., 2 * n :]
        a, b = (turned[..., ::2], turned[..., 1::2]) if self.is_interleaved else (turned[..., :n], turned[..., n:])
        a, b = a * cos - b * sin, b * cos + a * sin
        turned = jnp.stack([a, b], -1).reshape(turned.shape) if self.is_interleaved else jnp.concatenate([a, b], -1)
        return jnp.concatenate([turned.astype(x.dtype), rest], -1)


class Attention(eqx.Module):
    """One layer's attention between its readers (`q` heads, `k` inputs, `v` inputs) and its heads.

    With grouped keys and values, head `h` is member `h % members` of group `h // members`; `kv_readers` is 1 per group, or `members` if
    every head has a `k` and `v` reader of its own.
    """

    norm: Norm | None
    weights: Float[Array, "readers head_dim d_model"]
    biases: Float[Array, "readers head_dim"] | None
    q_norm: Norm | None
    k_norm: Norm | None
    rotation: Rotation | None
    pattern_scale: Float[Array, ""]
    softcap: Float[Array, ""] | None
    window: Int[Array, ""]
    out_weights: Float[Array, "heads head_dim d_model"]
    out_bias: Float[Array, " d_model"] | None
    post_norm: Norm | None
    scale: Float[Array, ""]
    n_groups: int = eqx.field(static=True)
    members: int = eqx.field(static=True)
    kv_readers: int = eqx.field(static=True)

    @property
    def n_heads(self) -> int:
        return self.n_groups * self.members

    @property
    def n_askers(self) -> int:
        """How many of the readers make patterns: those of queries and keys, which come first."""
        return self.n_heads + self.n_groups * self.kv_readers

    @property
    def n_readers(self) -> int:
        return self.n_askers + self.n_groups * self.kv_readers

    @property
    def couples_heads(self) -> bool:
        """Whether a norm runs over the queries or keys of all heads."""
        return any(norm is not None and len(norm.axes) > 1 for norm in (self.q_norm, self.k_norm))

    @property
    def bundle_size(self) -> int:
        """How many heads have to be computed together: those that share keys and values, or all where a norm runs over them."""
        if self.couples_heads or self.post_norm is not None:
            return self.n_heads
        return 1 if self.kv_readers == self.members else self.members

    def bundle(self, number: Int[Array, ""]) -> tuple[Int[Array, " some"], Attention]:
        """The readers of one such bundle, and the attention that has no other heads."""
        n = self.bundle_size
        if n == self.n_heads:
            return jnp.arange(self.n_readers), self
        heads = number * n + jnp.arange(n)
        readers = jnp.append(heads, jnp.array([self.n_heads, self.n_askers]) + number)
        alone = replace(
            self,
            weights=self.weights[readers],
            biases=None if self.biases is None else self.biases[readers],
            q_norm=None if self.q_norm is None else self.q_norm.of_heads(heads),
            k_norm=None if self.k_norm is None else self.k_norm.of_heads(number[None]),
            out_weights=self.out_weights[heads],
            n_groups=1,
            members=n,
            kv_readers=1,
        )
        return readers, alone

    def __call__(self, x: Float[Array, "position d_model"]) -> Float[Array, "position d_model"]:
        """The module as its model has it: what all heads and the output bias add to the stream."""
        return self.write(self.mix(self.project(x[None])))

    def project(self, x: Float[Array, "some position d_model"]) -> Float[Array, "readers position head_dim"]:
        """From the readers' inputs, or the one that all of them share, to queries, keys and values."""
        return self._project(x, EVERYTHING)

    def mix(self, projected: Float[Array, "readers position head_dim"]) -> Float[Array, "heads position head_dim"]:
        """The heads' mixed values."""
        return self._mix(projected[: self.n_heads], projected[self.n_heads :], EVERYTHING)

    def mix_at(self, where: slice, x: Float[Array, "readers position d_model"]) -> Float[Array, "heads positions head_dim"]:
        """The heads' mixed values at some positions, from the readers' inputs, or the one that all of them share: nothing is asked at other
        positions."""
        asking, asked = slice(self.n_heads), slice(self.n_heads, None)
        askers, others = (x, x) if len(x) == 1 else (x[asking], x[asked])
        return self._mix(self._project(askers[:, where], asking), self._project(others, asked), where)

    def _project(self, x: Float[Array, "some positions d_model"], readers: slice) -> Float[Array, "readers positions head_dim"]:
        y, weights = x if self.norm is None else self.norm(x), self.weights[readers]
        projected = jnp.einsum("sd,red->rse", y[0], weights) if len(x) == 1 else jnp.einsum("rsd,red->rse", y, weights)
        return projected if self.biases is None else projected + self.biases[readers, None]

    def _mix(
        self, queries: Float[Array, "heads positions head_dim"], asked: Float[Array, "kv position head_dim"], where: slice
    ) -> Float[Array, "heads positions head_dim"]:
        everywhere = jnp.arange(asked.shape[1])
        q = queries.reshape(self.n_groups, self.members, *queries.shape[1:])
        k, v = asked.reshape(2, self.n_groups, self.kv_readers, *asked.shape[1:])
        q = q if self.q_norm is None else self.q_norm(q)
        k = k if self.k_norm is None else self.k_norm(k)
        if self.rotation is not None:
            q, k = self.rotation(q, everywhere[where]), self.rotation(k, everywhere)
        pattern = self._pattern(q, k, everywhere[where, None] - everywhere).astype(v.dtype)
        mixed: Array = (pattern @ v).reshape(queries.shape)
        return mixed

    def _pattern(
        self,
        q: Float[Array, "groups members positions head_dim"],
        k: Float[Array, "groups kv position head_dim"],
        distance: Int[Array, "positions position"],
    ) -> Float[Array, "groups members positions position"]:
        scores = (q @ k.swapaxes(-1, -2)).astype(jnp.promote_types(q.dtype, jnp.float32)) * self.pattern_scale
        scores = scores if self.softcap is None else jnp.tanh(scores / self.softcap) * self.softcap
        return jax.nn.softmax(jnp.where((distance >= 0) & (distance < self.window), scores, -jnp.inf), axis=-1)

    def write(self, mixed: Float[Array, "heads position head_dim"]) -> Float[Array, "position d_model"]:
        """What all heads and the output bias add to the stream."""
        y = self._sum(mixed)
        y = y if self.out_bias is None else y + self.out_bias
        return (y if self.post_norm is None else self.post_norm(y)) * self.scale

    def write_each(self, mixed: Float[Array, "heads position head_dim"]) -> Float[Array, "heads position d_model"]:
        """What each head adds to the stream; `constant` is the rest."""
        written = jnp.einsum("hse,hed->hsd", mixed, self.out_weights)
        return (written if self.post_norm is None else self.post_norm.split(written, self._sum(mixed))) * self.scale

    def _sum(self, mixed: Float[Array, "heads position head_dim"]) -> Float[Array, "position d_model"]:
        return jnp.einsum("hse,hed->sd", mixed, self.out_weights)

    @property
    def constant(self) -> Float[Array, " d_model"] | None:
        """What this layer's attention adds to the stream that belongs to no head."""
        bias = self.out_bias if self.post_norm is None else self.post_norm.bias
        return None if bias is None else bias * self.scale


class MLP(eqx.Module):
    """One layer's MLP; see `circuitgraph._architecture.FeedForward`. `expand` and `contract` are its two halves."""

    norm: Norm | None
    up: Float[Array, "width d_model"]
    up_bias: Float[Array, " width"] | None
    gate: Float[Array, "width d_model"] | None
    gate_bias: Float[Array, " width"] | None
    down: Float[Array, "d_model width"]
    down_bias: Float[Array, " d_model"] | None
    post_norm: Norm | None
    scale: Float[Array, ""]
    activation: str = eqx.field(static=True)

    def __call__(self, x: Float[Array, "position d_model"]) -> Float[Array, "position d_model"]:
        return self.contract(self.expand(x))

    def expand(self, x: Float[Array, "position d_model"]) -> tuple[Float[Array, "position width"], ...]:
        """Up to the non-linearity: `(up,)` or `(up, gate)`."""
        y = x if self.norm is None else self.norm(x)
        up = _affine(y, self.up, self.up_bias)
        return (up,) if self.gate is None else (up, _affine(y, self.gate, self.gate_bias))

    def contract(self, hidden: tuple[Float[Array, "position width"], ...]) -> Float[Array, "position d_model"]:
        """From there to what the MLP adds to the stream."""
        return self.finish(self.inner(hidden))

    def inner(self, hidden: tuple[Float[Array, "position width"], ...]) -> Float[Array, "position width"]:
        """What the last weights read: the neurons."""
        act = ACTIVATIONS[self.activation]
        return act(hidden[0]) if len(hidden) == 1 else act(hidden[1]) * hidden[0]

    def finish(self, inner: Float[Array, "position width"]) -> Float[Array, "position d_model"]:
        """The second half of `contract`, behind the non-linearity."""
        y = _affine(inner, self.down, self.down_bias)
        return (y if self.post_norm is None else self.post_norm(y)) * self.scale


def _affine(x: Float[Array, "position d_in"], weight: Float[Array, "d_out d_in"], bias: Array | None) -> Float[Array, "position d_out"]:
    y = x @ weight.T
    return y if bias is None else y + bias
