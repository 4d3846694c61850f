"""A transformer as one writes it in Equinox; it knows nothing of circuitgraph. `own_jax_model.py` traces it."""

from functools import partial, reduce

import equinox as eqx
import jax
import jax.numpy as jnp

LAYERS, HEADS, SIZE, D_MODEL, D_MLP, VOCABULARY, EPS, THETA = 3, 4, 32, 128, 256, 335, 1e-6, 1000.0
linear = partial(eqx.nn.Linear, use_bias=False)


class Attention(eqx.Module):
    query: eqx.nn.Linear
    key: eqx.nn.Linear
    value: eqx.nn.Linear
    out: eqx.nn.Linear

    def __init__(self, key: jax.Array) -> None:
        self.query, self.key, self.value, self.out = (linear(D_MODEL, D_MODEL, key=one) for one in jax.random.split(key, 4))

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = (jax.vmap(part)(x).reshape(-1, HEADS, SIZE).swapaxes(0, 1) for part in (self.query, self.key, self.value))
        turn = jax.vmap(eqx.nn.RotaryPositionalEmbedding(SIZE, THETA))
        scores = jnp.where(jnp.tri(len(x), dtype=bool), turn(q) @ turn(k).mT / SIZE**0.5, -jnp.inf)
        return jax.vmap(self.out)((jax.nn.softmax(scores) @ v).swapaxes(0, 1).reshape(len(x), -1))


class Block(eqx.Module):
    norms: list[eqx.nn.RMSNorm]
    attention: Attention
    mlp: dict[str, eqx.nn.Linear]

    def __init__(self, key: jax.Array) -> None:
        self.norms = [eqx.nn.RMSNorm(D_MODEL, EPS, use_bias=False) for _ in range(2)]
        self.attention = Attention(key)
        self.mlp = {part: linear(D_MODEL, D_MLP, key=key) for part in ("up", "gate")} | {"down": linear(D_MLP, D_MODEL, key=key)}

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(jax.vmap(self.norms[0])(x))
        y = jax.vmap(self.norms[1])(x)
        up, gate = jax.vmap(self.mlp["up"])(y), jax.vmap(self.mlp["gate"])(y)
        return x + jax.vmap(self.mlp["down"])(jax.nn.silu(gate) * up)


class Transformer(eqx.Module):
    embedding: eqx.nn.Embedding
    blocks: list[Block]
    norm: eqx.nn.RMSNorm

    def __init__(self, key: jax.Array) -> None:
        self.embedding = eqx.nn.Embedding(VOCABULARY, D_MODEL, key=key)
        self.blocks = [Block(one) for one in jax.random.split(key, LAYERS)]
        self.norm = eqx.nn.RMSNorm(D_MODEL, EPS, use_bias=False)

    @eqx.filter_jit
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = reduce(lambda x, block: block(x), self.blocks, jax.vmap(self.embedding)(tokens))
        return jax.vmap(self.norm)(x) @ self.embedding.weight.T
