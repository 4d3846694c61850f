"""Subnetwork probing of compiled models as it was run for the ACDC paper: for `benchmarks.tracr_paper`.

Conmy et al. 2023 (arXiv:2304.14997) put the masks of Cao, Sanh & Rush (2021, arXiv:2104.03514) on the `q`, `k` and `v` of every head and
on what every MLP says, where `circuitgraph.algorithms.SubnetworkProbing` has one mask a writer:

    m[r, w] = (z[r] if r is a q, k or v else 1) * (z[w] if w is an MLP else 1)
    minimise over the log alphas   mean squared change of the outputs under m  +  penalty * mean over masks of P(z > 0)

The numbers are those of their code (`subnetwork_probing/train.py` and `launch_grid_fill.py` of ArthurConmy/Automatic-Circuit-Discovery).
`OutputEngine` has gradients by differences, edge by edge; ten thousand steps need one by reverse mode, so here is its `F` in JAX.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from circuitgraph._names import Reader
from circuitgraph.algorithms import _hard_concrete as hc
from circuitgraph.algorithms._adam import Adam
from circuitgraph.testing._outputs import OutputEngine

if TYPE_CHECKING:
    from jaxtyping import Array, Float
    from numpy import ndarray

PENALTIES = np.geomspace(1e-3, 1, 11)
N_STEPS = 10_000
LEARNING_RATE = 1e-3
INITIAL = hc.log_alpha_of(0.9)
MARGIN = 1e-4  # of the uniform number that a sample is made of, from 0 and 1


@dataclass(frozen=True)
class Probe:
    """The masks of one model, on some prompts. Models without norms and biases, as Tracr's."""

    engine: OutputEngine

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of the masks, as readers and writers are named: `a0.h0<q>`, `m0`."""
        graph = self.engine.graph
        inputs = [reader.name for reader in graph.readers if reader.kind in {"q", "k", "v"}]
        return (*inputs, *(writer.name for writer in graph.writers if writer.kind == "mlp"))

    def edges(self, z: Float[Array, " masks"]) -> Float[Array, "readers writers"]:
        """The mask over edges that these masks over nodes make together."""
        graph, at = self.engine.graph, {name: i for i, name in enumerate(self.names)}
        unmasked = len(at)  # where the 1 stands that is appended
        of_readers = [unmasked if reader.kind == "mlp" else at.get(reader.name, unmasked) for reader in graph.readers]
        of_writers = [at.get(writer.name, unmasked) for writer in graph.writers]
        with_one = jnp.append(jnp.asarray(z), 1.0)
        return with_one[np.array(of_readers)][:, None] * with_one[np.array(of_writers)]

    def loss(self, z: Float[Array, " masks"]) -> Float[Array, ""]:
        """The engine's metric under these masks, mean over prompts."""
        return jnp.mean((self._outputs(self.edges(z)) - self.engine.plain) ** 2)

    def train(self, seed: int, n_steps: int = N_STEPS) -> Float[ndarray, "penalties masks"]:
        """The log alphas after training, for each of `PENALTIES`. A sample of all masks a step, the same for every prompt."""
        rng, adam = np.random.default_rng(seed), Adam(LEARNING_RATE, b2=0.999, epsilon=1e-8)
        log_alpha = np.full((len(PENALTIES), len(self.names)), INITIAL)
        price = PENALTIES[:, None] / len(self.names)
        slope: Callable[..., Array] = jax.jit(jax.vmap(jax.grad(self.loss)))
        for _ in range(n_steps):
            z, z_slope = hc.sample(log_alpha, _uniform(rng, log_alpha.shape))
            down = np.asarray(slope(z), dtype=float) * z_slope + price * hc.expected_l0(log_alpha)[1]
            log_alpha = log_alpha + adam.step(down)
        return log_alpha

    def masked(self, log_alpha: Float[ndarray, "penalties masks"], seed: int) -> list[list[str]]:
        """For each of `PENALTIES` what is off. As in their code one sample after the training decides: off is a mask below 1/2."""
        z, _ = hc.sample(log_alpha, _uniform(np.random.default_rng([seed, 1]), log_alpha.shape))
        return [[name for name, one in zip(self.names, of_penalty, strict=True) if one < 0.5] for of_penalty in z]

    def _outputs(self, mask: Float[Array, "readers writers"]) -> Float[Array, "prompts position outputs"]:
        """The model's outputs under a mask over edges, BOS's position left out: `OutputEngine`'s run, to be differentiated."""
        engine, graph = self.engine, self.engine.graph
        source = jnp.asarray(engine.source).swapaxes(0, 1)  # writers first
        live = [*jnp.asarray(engine.said).swapaxes(0, 1)]

        def heard(reader: Reader) -> Float[Array, "prompts position d_model"]:
            r = graph.reader_id(reader)
            seen = np.flatnonzero(graph.visible[r])
            x = source[seen].sum(axis=0)
            return x + jnp.tensordot(mask[r, seen], jnp.stack([live[w] - source[w] for w in seen]), 1) if len(seen) else x

        for number, layer in enumerate(engine.model.layers):
            attention, mlp = layer.attention, layer.mlp
            assert attention is not None  # a compiled model has both
            assert mlp is not None
            for h in range(attention.n_heads):
                q, k, v = (heard(Reader(kind, number, h)) @ getattr(attention, kind)[h].T for kind in ("q", "k", "v"))
                scores = (q[:, :, None] * k[:, None]).sum(axis=-1)  # as sums: XLA is slow at many products of tiny matrices
                pattern = jax.nn.softmax(scores / math.sqrt(q.shape[-1]))
                live.append((pattern[..., None] * v[:, None]).sum(axis=2) @ attention.o[h].T)
            live.append(jax.nn.relu(heard(Reader("mlp", number)) @ mlp.up.T) @ mlp.down.T)
        return (heard(Reader("logits")) @ engine.model.unembedding.T)[:, 1:]


def _uniform(rng: np.random.Generator, shape: tuple[int, ...]) -> Float[ndarray, ...]:
    return np.clip(rng.uniform(size=shape), MARGIN, 1 - MARGIN)
