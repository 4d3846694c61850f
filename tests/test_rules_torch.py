"""PyTorch's backward rules, the QK fix and spans, by hand and with hooks on untouched models of every family.

The laws, and the comparison with the reference: `test_engine_laws_rules.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from families import tiny
from lifted import lifted
from oracle import oracle_logits
from torch import Tensor, nn
from torch.nn import functional
from twins import small_model

import circuitgraph_torch
from circuitgraph._engine import EXACT, QK_FIX, RELP, Rule, Source
from circuitgraph._errors import CircuitGraphError
from circuitgraph._memory import MemoryBudget
from circuitgraph._pairs import PromptPairs

MOE = ("mixtral", "qwen3_moe")
SPANS = ("S", "rest", "END")


def make_pairs(vocabulary: int, n: int = 2, length: int = 5) -> PromptPairs:
    rng = np.random.default_rng(0)
    clean = rng.integers(3, vocabulary, (n, length))
    corrupted = clean.copy()
    corrupted[:, 1:3] = 3 + (clean[:, 1:3] - 2) % (vocabulary - 3)
    spans = [[1, 0, 0, 1, 2], [0, 1, 0, 1, 2]][:n]
    return PromptPairs(clean, corrupted, [[3], [4]][:n], [[5], [6]][:n], spans=spans, span_names=SPANS)


@cache
def traced(family: str, dtype: torch.dtype = torch.float64, *, per_head_kv: bool = False) -> circuitgraph_torch.TorchModel:
    return circuitgraph_torch.trace(tiny(family, dtype=dtype), per_head_kv=per_head_kv)


def bound(family: str, **options: Any) -> Any:
    model = traced(family, **options)
    return model.bind(make_pairs(model.architecture.vocabulary), "logit_diff")


def ones(engine: Any) -> np.ndarray:
    return np.ones(engine.graph.shape)


def assert_close(got: np.ndarray, expected: np.ndarray, tolerance: float = 1e-9) -> None:
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.abs(expected).max())
    assert np.abs(expected).max() > 0


def differences(engine: Any) -> np.ndarray:
    """`live - source`, `[prompts, writers, position, d_model]`."""
    said, source = engine.activations(), engine.reversed().activations()
    return np.stack([said[i] - source[i] for i in range(len(said))])


# ------------------------------------------------------------------------------------------------------------------------ RelP, by hand


class ByHand:
    """A GPT-2 or Llama in plain torch, with every reader's input in hand: scales and patterns detached, activations `x * (act(x) / x)`, and
    each branch of a gate half detached."""

    def __init__(self, model: Any) -> None:
        self.model, self.config, self.inputs = model, model.config, []
        self.is_gpt2 = model.config.model_type == "gpt2"

    def read(self, stream: Tensor) -> Tensor:
        self.inputs.append(torch.zeros_like(stream, requires_grad=True))
        return stream + self.inputs[-1]

    def norm(self, module: Any, x: Tensor) -> Tensor:
        if self.is_gpt2:
            x = x - x.mean(-1, keepdim=True)
            scale = (x.pow(2).mean(-1, keepdim=True) + module.eps).sqrt().detach()
            return x / scale * module.weight + module.bias
        return x / (x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon).sqrt().detach() * module.weight

    def logits(self, ids: Tensor) -> Tensor:
        core = self.model.transformer if self.is_gpt2 else self.model.model
        stream = core.wte(ids) + core.wpe(torch.arange(ids.shape[1])) if self.is_gpt2 else core.embed_tokens(ids)
        for block in core.h if self.is_gpt2 else core.layers:
            stream = stream + self.attention(block, stream)
            stream = stream + self.mlp(block, self.read(stream))
        return self.model.lm_head(self.norm(core.ln_f if self.is_gpt2 else core.norm, self.read(stream)[:, -1]))

    def attention(self, block: Any, stream: Tensor) -> Tensor:
        inner = block.attn if self.is_gpt2 else block.self_attn
        n = self.config.num_attention_heads
        kv = n if self.is_gpt2 else self.config.num_key_value_heads
        size = stream.shape[-1] // n

        def heads(which: int, count: int) -> list[Tensor]:
            found = []
            for h in range(count):
                x = self.norm(block.ln_1 if self.is_gpt2 else block.input_layernorm, self.read(stream))
                if self.is_gpt2:
                    columns = slice(which * n * size + h * size, which * n * size + (h + 1) * size)
                    found.append(x @ inner.c_attn.weight[:, columns] + inner.c_attn.bias[columns])
                else:
                    module = (inner.q_proj, inner.k_proj, inner.v_proj)[which]
                    found.append(x @ module.weight[h * size : (h + 1) * size].T)
            return found

        q, k, v = heads(0, n), heads(1, kv), heads(2, kv)
        mixed = []
        for h in range(n):
            a, b = (q[h], k[h * kv // n]) if self.is_gpt2 else map(self.rotated, (q[h], k[h * kv // n]))
            scores = a @ b.transpose(1, 2) / size**0.5
            is_future = torch.ones_like(scores).triu(1).bool()
            mixed.append(scores.masked_fill(is_future, -torch.inf).softmax(-1).detach() @ v[h * kv // n])
        return (inner.c_proj if self.is_gpt2 else inner.o_proj)(torch.cat(mixed, -1))

    def rotated(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[1])[:, None] * self.model.model.rotary_emb.inv_freq.double()
        first, second = x.chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def mlp(self, block: Any, x: Tensor) -> Tensor:
        def ratio(act: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
            return x * (act(x) / x).detach()

        if self.is_gpt2:
            act = lambda x: functional.gelu(x, approximate="tanh")  # noqa: E731
            return block.mlp.c_proj(ratio(act, block.mlp.c_fc(self.norm(block.ln_2, x))))
        x = self.norm(block.post_attention_layernorm, x)
        a, b = ratio(functional.silu, block.mlp.gate_proj(x)), block.mlp.up_proj(x)
        return block.mlp.down_proj((a * b.detach() + a.detach() * b) / 2)


@pytest.mark.parametrize(("family", "tolerance"), [("gpt2", 1e-9), ("llama", 1e-5)])  # Hugging Face's RMSNorm computes in float32
def test_relp_is_that_by_hand(family: str, tolerance: float) -> None:
    model = small_model(family)
    pairs = make_pairs(30)
    engine = circuitgraph_torch.trace(model).bind(pairs, "logit_diff")
    by_hand = ByHand(model)
    logits = by_hand.logits(torch.from_numpy(np.stack(pairs.clean)))
    total = sum(logits[i, pairs.answers[i][0]] - logits[i, pairs.wrong_answers[i][0]] for i in range(2))
    grads = torch.autograd.grad(total, by_hand.inputs, allow_unused=True)
    looks = np.array([grad is None for grad in grads])
    assert [reader.kind in ("q", "k") for reader in engine.graph.readers] == looks.tolist()
    filled = np.stack([np.zeros((2, 5, 16)) if grad is None else grad.numpy() for grad in grads])
    expected = np.einsum("rnpd,nwpd->nrw", filled, differences(engine)) * engine.graph.visible
    assert_close(engine.gradient(ones(engine), rule=RELP), expected, tolerance)
    assert np.abs(engine.gradient(ones(engine)) - expected)[:, ~looks].max() > 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("family", MOE)
def test_experts_are_refused_by_name(family: str) -> None:
    engine = bound(family, dtype=torch.float32)
    with pytest.raises(CircuitGraphError, match=r"gradient: model.layers.0.mlp \(\w+\) computes softmax of what depends on its input"):
        engine.gradient(ones(engine), rule=RELP)
    assert np.isfinite(engine.gradient(ones(engine), rule=Rule(norms="frozen", patterns="frozen"))).all()


def test_norms_inside_an_attention_are_not_frozen_in_silence() -> None:
    engine = bound("qwen3")
    with pytest.raises(
        CircuitGraphError, match=r"self_attn.q_norm is a norm inside an attention.*norms 'exact', or with patterns frozen too"
    ):
        engine.gradient(ones(engine), rule=Rule(norms="frozen"))
    assert np.isfinite(engine.gradient(ones(engine), rule=RELP)).all()


# ---------------------------------------------------------------------------------------------------------- hooks on the untouched model


@contextmanager
def hooked(model: nn.Module, hooks: list[tuple[str, Any]]) -> Iterator[None]:
    """Each hook is given a module's input and may return another; of one that is named `path!`, its output."""
    handles = []
    for path, hook in hooks:
        module = model.get_submodule(path.removesuffix("!"))
        if path.endswith("!"):
            handles.append(module.register_forward_hook(lambda _m, _a, out, hook=hook: hook(out)))
        else:
            handles.append(module.register_forward_pre_hook(lambda _m, args, hook=hook: (hook(args[0]), *args[1:])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def metric_of(engine: Any, model: nn.Module) -> Tensor:
    pairs = engine._pairs
    logits = model(torch.from_numpy(np.stack(pairs.clean))).logits[:, -1]
    return torch.stack([logits[i, pairs.answers[i][0]] - logits[i, pairs.wrong_answers[i][0]] for i in range(len(pairs))])


QK_FAMILIES = [("gpt2", False), ("llama", False), ("llama", True), ("gemma2", False), ("olmo2", False), ("qwen3", False)]


@pytest.mark.parametrize(("family", "per_head_kv"), QK_FAMILIES)
def test_the_qk_fix_is_what_the_untouched_attention_says(family: str, per_head_kv: bool) -> None:
    engine = bound(family, per_head_kv=per_head_kv)
    model, blocks = engine._parts.model, engine._parts.architecture.blocks
    scores, by_span = engine.gradient(ones(engine), rule=QK_FIX), engine.gradient(np.ones((*engine.graph.shape, 3)), rule=QK_FIX)
    along, exact = torch.from_numpy(differences(engine)), engine.gradient(ones(engine))
    layer = 1
    attention = blocks[layer].attention
    kept: dict[str, Tensor] = {}

    def keep(name: str, *, leaf: bool = False) -> Callable[[Tensor], Tensor]:
        def look(x: Tensor) -> Tensor:
            kept[name] = x.detach().requires_grad_(leaf)
            return kept[name]

        return look

    stream = attention.norm.path if attention.norm else attention.q.path
    with hooked(model, [(stream, keep("x")), (attention.o, keep("mixed", leaf=True))]):
        (grad,) = torch.autograd.grad(metric_of(engine, model).sum(), kept["mixed"])
    mixed, n = kept["mixed"].detach(), attention.q.n_heads
    rows = [r for r, reader in enumerate(engine.graph.readers) if reader.layer == layer and reader.kind in ("q", "k")]
    spans = torch.from_numpy(np.stack(engine._pairs.spans))
    for r in rows[::2]:
        reader, w = engine.graph.readers[r], (3 * r) % int(engine.graph.visible[r].sum())
        projection = attention.q if reader.kind == "q" else attention.k
        features = [*projection.features(reader.index * projection.n_heads // n if per_head_kv else reader.index)]
        own = [*range(n)]
        if per_head_kv and reader.kind == "k":  # its head alone looks for this key
            own = [reader.index]
        for span in (None, r % 3):
            where = 1.0 if span is None else (spans == span)[..., None]
            with torch.no_grad():
                x = kept["x"] - along[:, w] * where
                normed = x if attention.norm is None else model.get_submodule(attention.norm.path)(x)
                patched = model.get_submodule(projection.path)(normed)[..., features]

            def patch(out: Tensor, patched: Tensor = patched, features: list[int] = features) -> Tensor:
                out = out.clone()
                out[..., features] = patched
                return out

            with hooked(model, [(projection.path + "!", patch), (attention.o, keep("after"))]), torch.no_grad():
                metric_of(engine, model)
            change = -((kept["after"] - mixed) * grad).unflatten(-1, (n, -1)).sum((1, 3))[:, own].sum(-1)
            got = scores[:, r, w] if span is None else by_span[:, r, w, span]
            np.testing.assert_allclose(got, change.numpy(), rtol=0, atol=1e-5 * np.abs(scores[:, rows]).max(), err_msg=reader.name)
    assert not np.allclose(scores[:, rows], exact[:, rows], rtol=1e-2, atol=0)
    others = [r for r, reader in enumerate(engine.graph.readers) if reader.kind not in ("q", "k")]
    assert_close(scores[:, others], exact[:, others])


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("family", ["gpt_neox", "gemma2", "olmo2"])
def test_a_dropped_layer_is_detached(family: str, layer: int) -> None:
    engine = bound(family)
    model, blocks = engine._parts.model, engine._parts.architecture.blocks
    dropped = blocks[layer]
    ends = [dropped.attention.norm.path if dropped.attention.norm else dropped.attention.q.path]
    ends += [] if dropped.attention.norm else [dropped.attention.k.path, dropped.attention.v.path]
    ends += [part for part in [dropped.mlp.norm.path] if dropped.mlp.norm] if dropped.mlp.norm else [*dropped.mlp.modules[:1]]
    shift = torch.zeros(len(engine._pairs), 5, engine._parts.architecture.d_model, dtype=torch.float64, requires_grad=True)
    first = blocks[0].mlp.norm.path if blocks[0].mlp.norm else blocks[0].mlp.modules[0]
    hooks = [(first, lambda x: x + shift), *((path, lambda x: x.detach()) for path in ends)]
    with hooked(model, hooks):
        (grad,) = torch.autograd.grad(metric_of(engine, model).sum(), shift)
    r = engine.graph.reader_id("m0")
    expected = np.einsum("npd,nwpd->nw", grad.numpy(), differences(engine)) * engine.graph.visible[r]
    found = engine.gradient(ones(engine), rule=Rule(dropped_layer=layer))
    assert_close(found[:, r], expected, 1e-5)
    assert not found[:, [reader.layer == layer for reader in engine.graph.readers]].any()
    assert not np.allclose(engine.gradient(ones(engine))[:, r], expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize("layer", [3, -1, "1"])
def test_a_layer_that_is_not_there_is_refused(layer: Any) -> None:
    engine = bound("gpt2")
    with pytest.raises(CircuitGraphError, match=rf"gradient without layer {layer!r}: the model has 3 layers, from 0"):
        engine.gradient(ones(engine), rule=Rule(dropped_layer=layer))


# ------------------------------------------------------------------------------------------------------- spans, mixes, sources, constants


@pytest.mark.parametrize("family", ["gpt_neox", "gemma2", "llama"])
def test_a_mask_with_spans_is_one_matrix_for_every_position(family: str) -> None:
    engine = bound(family)
    model, pairs = engine._parts.model, engine._pairs
    rng = np.random.default_rng(1)
    masks = np.stack([rng.uniform(size=(*engine.graph.shape, 3)), (rng.uniform(size=(*engine.graph.shape, 3)) > 0.3).astype(float)])
    masks[1, : engine.graph.shape[0] // 2] = 1  # starts from a cached run
    said = engine.reversed().activations()
    source = torch.from_numpy(np.stack([said[i] for i in range(len(said))], axis=1))
    spans = np.stack(pairs.spans)
    for got, mask in zip(engine.evaluate(masks), masks, strict=True):
        at_positions = mask[..., spans][..., None]  # [readers, writers, prompts, position, 1]
        logits = oracle_logits(model, engine._parts.architecture, torch.from_numpy(np.stack(pairs.clean)), at_positions, source)[:, -1]
        expected = [logits[i, pairs.answers[i][0]] - logits[i, pairs.wrong_answers[i][0]] for i in range(len(pairs))]
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    if family in ("gemma2", "llama"):
        return  # norms and softmax in float32: no finite differences
    step, gradient = 1e-5, engine.gradient(masks[0])
    for number, (r, w) in enumerate(np.argwhere(engine.graph.visible)[:: engine.graph.n_edges // 8]):
        lanes = np.stack([masks[0], masks[0]])
        lanes[:, r, w, number % 3] += [step, -step]
        up, down = engine.evaluate(lanes)
        np.testing.assert_allclose(gradient[:, r, w, number % 3], (up - down) / (2 * step), rtol=0, atol=1e-6 * np.abs(gradient).max())


@pytest.mark.parametrize("family", ["gemma2", "gpt_neox"])
def test_mixes_run_together_or_one_by_one(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, mixes = bound(family), (0.1, 0.5, 0.8)
    whole = {rule: engine.gradient(ones(engine), mix=mixes, rule=rule) for rule in (EXACT, QK_FIX, RELP)}
    spanned = engine.gradient(np.ones((*engine.graph.shape, 3)), mix=mixes, rule=QK_FIX)
    assert_close(spanned[:, -1].sum(-1), whole[QK_FIX][:, -1])
    (batch,) = engine.batches
    monkeypatch.setattr(batch, "_parts", replace(batch._parts, budget=MemoryBudget(total=1, host=1 << 30)))
    assert engine.batches[0]._mixes_at_once == 1
    nearly = ones(engine) + 1e-12  # not all ones: the way of other masks
    for rule, expected in whole.items():
        assert_close(engine.gradient(ones(engine), mix=mixes, rule=rule), expected)
        assert_close(np.mean([engine.gradient(ones(engine), mix=mix, rule=rule) for mix in mixes], axis=0), expected)
        if rule != QK_FIX:
            assert_close(engine.gradient(nearly, mix=mixes, rule=rule), expected, 1e-6)
    assert_close(engine.gradient(np.ones((*engine.graph.shape, 3)), mix=mixes, rule=QK_FIX), spanned)


@pytest.mark.parametrize("family", ["gpt_neox", "gemma2"])
def test_the_gradient_of_a_source_is_the_derivative(family: str) -> None:
    with lifted():  # finite differences need float64 throughout
        model = circuitgraph_torch.trace(tiny(family, dtype=torch.float64))
        source_gradient_is_the_derivative(model.bind(make_pairs(97), "logit_diff"))


def source_gradient_is_the_derivative(engine: Any) -> None:
    rng, step = np.random.default_rng(2), 1e-4
    said = engine.reversed().activations()
    source, width = [np.array(said[i]) for i in range(len(said))], engine._parts.architecture.d_model
    for mask in (rng.uniform(size=engine.graph.shape), rng.uniform(size=(*engine.graph.shape, 3))):
        gradient = engine.source_gradient(mask)
        direction = rng.normal(size=(len(engine.graph.writers), width))
        for w in (0, 2, len(direction) - 1):
            up, down = (
                [s + sign * step * (np.arange(len(direction)) == w)[:, None, None] * direction[:, None] for s in source] for sign in (1, -1)
            )
            slope = (engine.evaluate(mask[None], source=up)[0] - engine.evaluate(mask[None], source=down)[0]) / (2 * step)
            np.testing.assert_allclose(gradient[:, w] @ direction[w], slope, rtol=0, atol=1e-5 * np.abs(slope).max())


def test_an_optimal_source_is_checked_when_it_is_bound() -> None:
    model = traced("gpt2")
    pairs, wanted = make_pairs(97), (len(model.graph.writers), 64)
    with pytest.raises(CircuitGraphError, match="source 'optimal' without constants: fit them first"):
        model.bind(pairs, "logit_diff", "optimal")
    with pytest.raises(CircuitGraphError, match=r"constants of shape \(3, 64\); this model has \(16, 64\)"):
        model.bind(pairs, "logit_diff", Source("optimal", constants=np.zeros((3, 64))))
    zero, constant = (model.bind(pairs, "logit_diff", source) for source in ("zero", Source("optimal", constants=np.zeros(wanted))))
    mask = np.random.default_rng(3).uniform(size=(1, *model.graph.shape))
    assert np.array_equal(zero.evaluate(mask), constant.evaluate(mask))
    lone = replace(pairs, spans=(), span_names=())
    with pytest.raises(CircuitGraphError, match="a last axis of spans needs prompts with spans"):
        model.bind(lone, "logit_diff").gradient(np.ones((*model.graph.shape, 3)))
