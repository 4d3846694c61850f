"""The PyTorch backend on a GPU. A pretended one (`pretended_gpu.py`) shows that no devices are mixed, and that what is computed in other
ways than on a CPU is right; its own kernels and how fast they are, `python -m benchmarks.discovery --device cuda` shows on a real one."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engines
import families
import numpy as np
import pytest
import test_engine_laws
import test_engine_laws_rules
import torch
from engines import IN_PARTS, PAIRS, SHORT, traced
from pretended_gpu import GPU, MEMORY, OnGPU, pretended_gpu
from test_linear import TOKENS, WANTED, transcoders
from twins import small_model

import circuitgraph
from benchmarks import __main__ as everything
from benchmarks import discovery, discovery_case, machine, tables
from circuitgraph import ACDC, EAP, EAPIG, Algorithm, CircuitGraphError, check_trace, discover, load_task
from circuitgraph.features import Dictionary, SAETraining, measure, train
from circuitgraph.testing import random_pairs
from circuitgraph_torch import TorchModel

TOLERANCE = {"gpt2": 1e-9, "llama": 2e-5}  # as in `engines`: Hugging Face's RMSNorm computes in float32


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch, english: Any) -> Iterator[None]:
    with pretended_gpu(monkeypatch):
        yield


@pytest.fixture(scope="module")
def english() -> Any:
    """On the CPU, before there is a GPU."""
    return circuitgraph.trace("zoo:tiny-english")


@cache
def on_gpu(family: str) -> TorchModel:
    """A model of `engines`, with the same weights."""
    if family in IN_PARTS:
        whole, refinements = IN_PARTS[family]
        return on_gpu(whole).refined(refinements)
    return circuitgraph.trace(small_model(**engines._DEEPER.get(family, {"family": family})), device="cuda")


# ---------------------------------------------------------------------------------------------------------------------- what is pretended


def test_what_is_there_says_so_and_counts() -> None:
    x = torch.arange(6.0, device="cuda").view(2, 3)
    assert x.device == GPU
    assert x.is_cuda
    assert (x + 1).sum().cpu().item() == 21
    x[1, [0, 2]] = 7
    assert x.tolist() == [[0, 1, 2], [7, 4, 7]]
    assert torch.ones(3).to(x).device == GPU
    assert x[torch.tensor([1])].cpu().tolist() == [[7, 4, 7]]  # CUDA takes indices of the CPU too


MIXED = {
    "a sum": lambda x, y: x + y,
    "a product": lambda x, y: x @ y.T,
    "values put in": lambda x, y: x.index_put((torch.tensor([0]),), y[:1]),
    "rows of the CPU": lambda x, y: y[x[:, 0].long()],
    "in place": lambda x, y: y.add_(x),
    "put side by side": lambda x, y: torch.cat([x, y]),
}


@pytest.mark.parametrize("mixed", MIXED.values(), ids=MIXED)
def test_devices_do_not_mix(mixed: Any) -> None:
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        mixed(torch.zeros(2, 3, device="cuda"), torch.zeros(2, 3))


def test_nor_does_numpy() -> None:
    with pytest.raises((RuntimeError, TypeError)):
        torch.zeros(2, device="cuda").numpy()


# --------------------------------------------------------------------------------------------------------------------------- what is traced


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "gptj", "gemma2", "qwen3", "cohere", "falcon_grouped", "olmo2", "opt"])
def test_models_are_traced_there(family: str) -> None:
    model: TorchModel = circuitgraph.trace(families.tiny(family), device="cuda")
    assert {type(parameter.data) for parameter in model.module.parameters()} == {OnGPU}
    assert model.provenance["device"] == "cuda"
    assert model.provenance["weights_sha256"] == families.traced(family).provenance["weights_sha256"]
    assert model.graph == families.traced(family).graph
    assert model._parts.budget.total == MEMORY // 2
    assert model._parts.looks_back
    pairs = random_pairs(5, vocabulary=families.VOCABULARY)
    assert all(check.holds for check in check_trace(model, pairs))
    scores, expected = (EAP().run(traced.bind(pairs, "logit_diff")).scores for traced in (model, families.traced(family)))
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("knows_wide_sums", [True, False])
def test_half_precision_stays_half_and_its_scores_are_wide(monkeypatch: pytest.MonkeyPatch, dtype: str, knows_wide_sums: bool) -> None:
    if not knows_wide_sums:  # as on AMD's
        monkeypatch.setattr(torch.version, "hip", "7.0")
    halves = families.tiny("llama", dtype=getattr(torch, dtype))
    model: TorchModel = circuitgraph.trace(deepcopy(halves), device="cuda")
    pairs = random_pairs(5, vocabulary=families.VOCABULARY)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)  # not widened on the CPU either
    monkeypatch.setattr(torch.cpu, "_is_amx_fp16_supported", lambda: True)
    scores, expected = (EAP().run(one.bind(pairs, "logit_diff")).scores for one in (model, circuitgraph.trace(halves)))
    np.testing.assert_allclose(scores, expected, rtol=0, atol=0.03 * np.abs(expected).max())
    masks = np.ones((3, *model.graph.shape))
    masks[1:, -1, 1], masks[2:, 5, 0] = 0, 0
    values, expected = (one.bind(pairs, "logit_diff").evaluate(masks) for one in (model, circuitgraph.trace(halves)))
    np.testing.assert_allclose(values, expected, rtol=0, atol=0.03 * np.abs(expected).max())
    digits = torch.from_numpy(model.bind(pairs, "logit_diff").gradient(np.ones(model.graph.shape))[0])
    assert (digits != digits.to(getattr(torch, dtype))).any()
    assert next(model.module.parameters()).dtype == getattr(torch, dtype)


# ----------------------------------------------------------------------------------------------------------------------- what is computed


@pytest.mark.parametrize("family", TOLERANCE)
@pytest.mark.parametrize("law", test_engine_laws.LAWS, ids=lambda law: law.__name__)
def test_every_law_of_engines_holds(law: Any, family: str) -> None:
    law(on_gpu(family), PAIRS, TOLERANCE[family])


@pytest.mark.parametrize("family", IN_PARTS)
@pytest.mark.parametrize("law", test_engine_laws.LIGHT, ids=lambda law: law.__name__)
def test_light_laws_hold_in_parts(law: Any, family: str) -> None:
    law(on_gpu(family), PAIRS, 2e-5 if "llama" in family else 1e-9)


@pytest.mark.parametrize("family", TOLERANCE)
@pytest.mark.parametrize("law", test_engine_laws_rules.LAWS, ids=lambda law: law.__name__)
def test_every_law_of_rules_and_spans_holds(law: Any, family: str) -> None:
    law(on_gpu(family), TOLERANCE[family])


@pytest.mark.parametrize(("algorithm", "metric"), [(ACDC(0.02), "kl"), (ACDC(0.3), "logit_diff"), (EAPIG(), "logit_diff")], ids=str)
def test_a_search_finds_what_it_finds_on_a_cpu(english: Any, algorithm: Algorithm, metric: str) -> None:
    pairs = load_task("ioi").pairs(english.tokenizer, 6, seed=0)
    model = circuitgraph.trace(deepcopy(english.module), device="cuda", tokenizer=english.tokenizer)
    here, there = (discover(traced, pairs, algorithm, metric=metric) for traced in (english, model))
    assert there.edges == here.edges


def test_what_does_not_fit_there_is_asked_by_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = on_gpu("gpt2").bind(SHORT, "logit_diff")
    expected = traced("torch").bind(SHORT, "logit_diff").evaluate(np.ones((1, *engine.graph.shape)))
    batch = type(engine.batches[0])
    evaluate = batch.evaluate

    def cramped(self: Any, *asked: Any) -> Any:
        if len(self) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return evaluate(self, *asked)

    monkeypatch.setattr(batch, "evaluate", cramped)
    np.testing.assert_allclose(engine.evaluate(np.ones((1, *engine.graph.shape))), expected)
    assert [len(one) for one in engine.batches] == [1, 1]


def test_weights_that_do_not_fit_there_are_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = families.tiny("llama")

    def cramped(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(torch.nn.Module, "to", cramped)
    with pytest.raises(CircuitGraphError, match="device 'cuda' has no room for the weights; ask for a narrower dtype"):
        circuitgraph.trace(model, device="cuda")


def test_runs_that_are_linear_but_for_their_mlps() -> None:
    here, there = (model.refined(transcoders("mlp_in", has_skip=True)).linear_run(TOKENS) for model in (traced("torch"), on_gpu("gpt2")))
    np.testing.assert_allclose(there.attributions(WANTED), here.attributions(WANTED), atol=1e-10)
    np.testing.assert_allclose(there.features(0), here.features(0), atol=1e-10)


def test_features_are_seen_and_read_there() -> None:
    here, there = (traced("torch", "gpt2 in parts"), on_gpu("gpt2 in parts"))
    for one, other in zip(here.refinements, there.refinements, strict=True):
        for seen, expected in zip(there.seen_by(other, SHORT), here.seen_by(one, SHORT), strict=True):
            np.testing.assert_allclose(seen, expected, atol=1e-9)
        np.testing.assert_allclose(there.logit_weights(other, [0, 1]), here.logit_weights(one, [0, 1]), atol=1e-9)


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_dictionaries_are_trained_and_measured_there(english: Any, activation: Any) -> None:
    pairs = load_task("ioi").pairs(english.tokenizer, 40, seed=0)
    model = circuitgraph.trace(deepcopy(english.module), device="cuda", tokenizer=english.tokenizer)
    settings = SAETraining(n_features=32, k=4, steps=10, batch=64, activation=activation)
    found: list[Dictionary] = [train(one, "m1", pairs, settings).dictionary for one in (english, model)]
    assert found[1].n_features == 32
    kept = [measure(one, found[1], pairs, component="m1") for one in (english, model)]
    assert kept[0].explained_variance == pytest.approx(kept[1].explained_variance, abs=1e-4)


# ----------------------------------------------------------------------------------------------------------------------- what is measured


@pytest.mark.parametrize("model", ["tiny", "tiny-llama"])
def test_discovery_can_be_timed_there(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    asked = list[str]()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: asked.append("done?"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="Pretended", total_memory=MEMORY))
    case = discovery_case.Case(*discovery_case.subject(model, prompts=2, device="cuda"), "kl", threshold=0.01, rounds=2, chunks=3)
    rows = [row for row in discovery.ROWS["tiny"] if row.method in ("naive", "acdc", "sweep")]
    found = [discovery_case.measured(row.method, case) | {"model": "tiny", "row": discovery.ROWS["tiny"].index(row)} for row in rows]
    assert len(asked) > len(rows)  # a plain forward pass ends when the GPU has done it
    shown = discovery.table(found, "cuda")
    assert shown.columns[-1] == "peak memory of Pretended, GB"
    assert {row[-1] for row in shown.rows} == {"7.00"}
    assert {len(row) for row in shown.rows} == {len(shown.columns)}


def test_results_name_the_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="Pretended", total_memory=MEMORY))
    given: dict[str, Any] = {"command": "python -m nothing", "watch": machine.Watch()}
    tables.publish(tables.Table("Nothing", ["a"], []), [], **given, gpu=discovery.gpu("cuda"), file=tmp_path / "report.json")
    report = tables.Report.from_json((tmp_path / "report.json").read_text())
    everything.write_results(tmp_path / "RESULTS.md", [report])
    assert "| GPU | Pretended |\n| GPU memory | 9 GB |\n" in (tmp_path / "RESULTS.md").read_text()
    assert discovery.gpu("cpu") == {}
