"""What the JAX backend puts in place of a joint's derivative, against `jax.grad` of the joint written by hand with `stop_gradient`.

That whole gradients by rules, spans and sources are right is for `test_engine_laws_rules.py` to say, against the numpy reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import SHORT, Row
from jax.lax import stop_gradient
from test_jax_engine import compilations

from circuitgraph._engine import EXACT, QK_FIX, RELP, Rule
from circuitgraph_jax._devices import precisely
from circuitgraph_jax._joints import ACTIVATIONS, MLP, Attention, Norm
from circuitgraph_jax._recomputed import Heads, recomputed
from circuitgraph_jax._rules import FrozenNorm, Way
from circuitgraph_jax._spans import Spans

D_MODEL, HEAD_DIM, LENGTH = 6, 3, 4
MIXES = (0.1, 0.3, 0.5, 0.7, 0.9)  # four together and one alone


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with precisely("float64"):
        yield


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def close(got: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=1e-10, atol=1e-12)


def pulled(function: Any, *at: Any) -> tuple[Any, ...]:
    """The gradients of a random weighting of what a function says."""
    value, pull = jax.vjp(function, *at)
    return pull(normal(99, *value.shape))


@pytest.mark.parametrize("is_centred", [True, False])
def test_a_frozen_norm_is_linear_but_for_its_scale(is_centred: bool) -> None:
    norm = Norm(normal(0, D_MODEL), normal(1, D_MODEL), jnp.asarray(1e-5), is_centred)
    x, parts = normal(2, LENGTH, D_MODEL), normal(3, 2, LENGTH, D_MODEL)

    def centred(x: Any) -> Any:
        return x - x.mean(-1, keepdims=True) if is_centred else x

    def scale(x: Any) -> Any:
        return stop_gradient((jnp.square(centred(x)).mean(-1, keepdims=True) + 1e-5) ** -0.5)

    def shared(parts: Any) -> Any:
        return centred(parts) * scale(parts.sum(0)) * norm.gain

    frozen = FrozenNorm(norm)
    close(frozen(x), norm(x))
    close(pulled(frozen, x)[0], pulled(lambda x: centred(x) * scale(x) * norm.gain + norm.bias, x)[0])
    close(frozen.split(parts, parts.sum(0)), norm.split(parts, parts.sum(0)))
    close(pulled(lambda parts: frozen.split(parts, parts.sum(0)), parts)[0], pulled(shared, parts)[0])
    assert not np.allclose(pulled(frozen, x)[0], pulled(norm, x)[0], rtol=1e-3)


def mlp(activation: str, *, is_gated: bool) -> MLP:
    up, gate, down = normal(4, 5, D_MODEL), normal(5, 5, D_MODEL) if is_gated else None, normal(6, D_MODEL, 5)
    return MLP(None, up, None, gate, None, down, normal(7, D_MODEL), None, jnp.asarray(0.7), activation)


@pytest.mark.parametrize(("activation", "dtype"), [*((name, "float32") for name in ACTIVATIONS), ("gelu", "bfloat16")])
def test_the_ratio_is_finite_everywhere(activation: str, dtype: str) -> None:
    act, small = ACTIVATIONS[activation], float(jnp.finfo(dtype).tiny)
    x = jnp.asarray([0.0, -0.0, small / 4, -small / 4, small, 1e-3, -1e-3, 0.5, -2.0, 30.0, -30.0], dtype)
    joint = replace(mlp(activation, is_gated=False), down=jnp.eye(len(x), dtype=dtype), down_bias=None, scale=jnp.ones((), dtype))
    value, pull = jax.vjp(lambda x: Way.of(RELP).contract(joint, (x[None],))[0], x)
    (slope,) = pull(jnp.ones_like(x))
    assert value.dtype == slope.dtype == x.dtype
    rounding = 4 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(value, float), np.asarray(act(x), float), rtol=rounding, atol=small)
    assert (slope[:4] == jax.grad(act)(jnp.zeros((), dtype))).all()
    np.testing.assert_allclose(np.asarray(slope[5:], float), np.asarray(act(x[5:]) / x[5:], float), rtol=rounding)


def test_gates_give_each_branch_half_and_activations_their_ratio() -> None:
    joint, hidden = mlp("silu", is_gated=True), (normal(8, LENGTH, 5), normal(9, LENGTH, 5))

    def by_hand(up: Any, gate: Any, *, ratio: bool, half: bool) -> Any:
        acted = gate * stop_gradient(jax.nn.sigmoid(gate)) if ratio else jax.nn.silu(gate)
        inner = 0.5 * stop_gradient(acted) * up + 0.5 * acted * stop_gradient(up) if half else acted * up
        return (inner @ joint.down.T + joint.down_bias) * joint.scale

    for rule in (EXACT, Rule(activations="ratio"), Rule(gates="half"), RELP):
        asked = {"ratio": rule.activations == "ratio", "half": rule.gates == "half"}
        contract = partial(Way.of(rule).contract, joint)
        close(contract(hidden), joint.contract(hidden))
        for got, expected in zip(pulled(contract, hidden)[0], pulled(partial(by_hand, **asked), *hidden), strict=True):
            close(got, expected)


def attention(*, is_coupled: bool = False, kv_readers: int = 1) -> Attention:
    """Two groups of two heads."""
    n_readers = 4 + 2 * 2 * kv_readers
    parts: dict[str, Any] = dict.fromkeys(("q_norm", "k_norm", "rotation", "softcap", "out_bias", "post_norm"))
    if is_coupled:
        parts["q_norm"] = Norm(normal(10, 2, 2, 1, HEAD_DIM), None, jnp.asarray(1e-5), False, (0, 1, 3))
        parts["k_norm"] = Norm(normal(11, 2, kv_readers, 1, HEAD_DIM), None, jnp.asarray(1e-5), False, (0, 1, 3))
    return Attention(
        norm=Norm(normal(12, D_MODEL), None, jnp.asarray(1e-5), True),
        weights=normal(13, n_readers, HEAD_DIM, D_MODEL),
        biases=normal(14, n_readers, HEAD_DIM),
        pattern_scale=jnp.asarray(0.6),
        window=jnp.asarray(3),
        out_weights=normal(15, 4, HEAD_DIM, D_MODEL),
        scale=jnp.asarray(1.0),
        n_groups=2,
        members=2,
        kv_readers=kv_readers,
        **parts,
    )


def test_frozen_patterns_move_values_only() -> None:
    joint = attention()
    projected = normal(16, joint.n_readers, LENGTH, HEAD_DIM)
    askers, values = projected[: joint.n_askers], projected[joint.n_askers :]
    (got,) = pulled(partial(Way.of(RELP).mix, joint), projected)
    (expected,) = pulled(lambda values: joint.mix(jnp.concatenate([askers, values])), values)
    assert not got[: joint.n_askers].any()
    close(got[joint.n_askers :], expected)
    for rule in (EXACT, QK_FIX):
        close(pulled(partial(Way.of(rule).mix, joint), projected)[0], pulled(joint.mix, projected)[0])


@pytest.mark.parametrize(
    ("is_coupled", "kv_readers", "has_spans"), [(False, 1, True), (False, 2, True), (False, 1, False), (True, 1, True)]
)
def test_recomputed_scores_are_those_of_one_edge_patched_alone(is_coupled: bool, kv_readers: int, has_spans: bool) -> None:
    """One asker, one writer, one span at a time; a norm over all heads lets each of them move every head."""
    joint = attention(is_coupled=is_coupled, kv_readers=kv_readers)
    x, differences = normal(17, LENGTH, D_MODEL), normal(18, 9, LENGTH, D_MODEL)  # more writers than are recomputed together
    projected, grad = joint.project(x[None]), normal(19, 4, LENGTH, HEAD_DIM)
    spans = Spans(jnp.asarray([1, 0, 1, 0]), 2) if has_spans else None
    got = recomputed(Heads(joint, x, projected, grad), differences, spans)
    assert got.shape == (9, joint.n_askers, *((2,) if has_spans else ()))

    @jax.jit
    def by_hand(writer: Any, asker: Any, where: Any) -> Any:
        patched = joint.project((x - jnp.where(where[:, None], differences[writer], 0))[None])[asker]
        change = joint.mix(projected.at[asker].set(patched)) - joint.mix(projected)
        return -(grad * change).sum()

    parts = spans.parts if spans else jnp.ones((1, LENGTH), bool)
    for writer in (0, 8):
        expected = [[by_hand(writer, asker, where) for where in parts] for asker in range(joint.n_askers)]
        close(got[writer], expected if spans else np.ravel(expected))


def test_other_layers_spans_and_numbers_of_steps_compile_nothing() -> None:
    model = Row("jax", "gpt2").traced
    spans, others = [[0, 0, 1, 1, 2], [1, 0, 0, 0, 2]], [[2, 1, 1, 0, 0], [0, 0, 0, 1, 1]]
    engine, other = (
        model.bind(replace(SHORT, spans=rows, span_names=("S1", "S2", "END")), "logit_diff", "zero") for rows in (spans, others)
    )
    full = np.ones(engine.graph.shape)
    by_span = np.random.default_rng(0).uniform(size=(*full.shape, 3))
    first, second = Rule(dropped_layer=0), Rule(dropped_layer=1)
    steps = engine.gradient(full, mix=MIXES, rule=first)
    engine.evaluate(by_span[None])
    with compilations() as again:
        alone = [engine.gradient(full, mix=mix, rule=first) for mix in MIXES]
        engine.gradient(full, mix=np.arange(1, 10) / 10, rule=second)
        assert np.ptp([engine.evaluate(by_span[None]), other.evaluate(by_span[None])], axis=0).max() > 1e-3
    assert not again
    close(steps, np.mean(alone, axis=0))
