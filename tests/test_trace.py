"""`trace`: what it accepts, how it proves itself, what it refuses."""

from __future__ import annotations

import dataclasses
import json
from itertools import islice
from pathlib import Path

import families
import nnsight
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from families import FAMILIES, tiny

import circuitgraph
import circuitgraph_torch
from circuitgraph._architecture import Architecture
from circuitgraph._errors import CircuitGraphError, TraceError, UnknownNameError
from circuitgraph._pairs import PromptPairs
from circuitgraph._task import load_task

PAIRS = PromptPairs(
    clean=[[5, 6, 7, 8], [9, 10, 11, 12], [4, 5, 6, 7, 8]],
    corrupted=[[5, 60, 7, 8], [9, 50, 11, 12], [4, 50, 6, 7, 8]],
    answers=[6, 10, 5],
    wrong_answers=[60, 50, 50],
)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "bloom"])
def test_every_family_is_proved(family: str) -> None:
    traced = families.traced(family)
    assert traced.proof.logits_error <= 1e-5
    assert traced.proof.residual_error <= 1e-5
    assert Architecture.from_json(traced.architecture.to_json()) == traced.architecture


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "gemma2", "attention_only"])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_other_dtypes(family: str, dtype: str) -> None:
    traced = circuitgraph_torch.trace(tiny(family), dtype=dtype)
    assert traced.provenance["dtype"] == dtype
    engine = traced.bind(PAIRS, "logit_diff")
    assert np.isfinite(engine.gradient(np.ones(engine.graph.shape))).all()
    assert np.isfinite(engine.activations()[0]).all()


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "bloom"])
def test_all_checks_hold(family: str) -> None:
    checks = [*families.traced(family).checks(PAIRS)]
    assert [check.name for check in checks] == [
        "F(1) is the model",
        "F(0) is the source run",
        "readers are the sum of their writers",
        "padding changes nothing",
        "readers move the output",
    ]
    assert all(check.holds for check in checks), "\n".join(map(str, checks))


def test_a_dead_reader_is_reported() -> None:
    model = tiny("gpt2")
    with torch.no_grad():
        model.transformer.h[1].attn.c_proj.weight[:16] = 0  # head 0 of layer 1 says nothing
    *_, last = circuitgraph_torch.trace(model).checks(PAIRS)
    assert last.error == 3
    assert all(reader in last.what for reader in ("a1.h0<q>", "a1.h0<k>", "a1.h0<v>"))


def test_gpt2_small_has_the_published_number_of_edges() -> None:
    config = transformers.GPT2Config(n_embd=24, n_layer=12, n_head=12, vocab_size=50)
    graph = circuitgraph_torch.trace(transformers.GPT2LMHeadModel(config)).graph
    assert (graph.n_edges, len(graph.nodes)) == (32491, 158)


def test_a_folder_and_an_nnsight_model_are_the_same_model(tmp_path: Path) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    live = circuitgraph_torch.trace(model)
    from_folder = circuitgraph_torch.trace(str(tmp_path))
    from_nnsight = circuitgraph_torch.trace(nnsight.NNsight(model))
    assert live.architecture == from_folder.architecture == from_nnsight.architecture
    assert live.provenance["weights_sha256"] == from_folder.provenance["weights_sha256"] == from_nnsight.provenance["weights_sha256"]
    assert from_folder.tokenizer is None
    assert np.allclose(live.logits(PAIRS), from_folder.logits(PAIRS))


def test_a_description_can_be_handed_over_and_is_proved_too() -> None:
    model = tiny("gpt2")
    found = circuitgraph_torch.find_architecture(model)
    by_hand = Architecture.from_json(found.to_json())
    assert circuitgraph_torch.trace(model, architecture=by_hand).proof.logits_error <= 1e-5


def _wrong(found: Architecture, **changes: object) -> Architecture:
    return dataclasses.replace(found, **changes)  # type: ignore[arg-type]


def test_a_wrong_description_is_refused_with_the_first_module_that_differs() -> None:
    model = tiny("llama")
    found = circuitgraph_torch.find_architecture(model)
    attention = found.blocks[1].attention
    assert attention is not None
    swapped = dataclasses.replace(attention, q=dataclasses.replace(attention.q, starts=attention.q.starts[::-1]))
    blocks = (found.blocks[0], dataclasses.replace(found.blocks[1], attention=swapped), *found.blocks[2:])
    with pytest.raises(TraceError, match=r"layers\.1\.self_attn: what the description calls a1\.h0<q> moves heads \[3\] as a q"):
        circuitgraph_torch.trace(model, architecture=_wrong(found, blocks=blocks))
    mixed_up = dataclasses.replace(attention, k=attention.v, v=attention.k)
    blocks = (found.blocks[0], dataclasses.replace(found.blocks[1], attention=mixed_up), *found.blocks[2:])
    with pytest.raises(TraceError, match=r"a1\.g0<k> moves heads \[0, 1\] as a v input does"):
        circuitgraph_torch.trace(model, architecture=_wrong(found, blocks=blocks))
    shifted = dataclasses.replace(found.blocks[1], parallel=True)
    with pytest.raises(TraceError, match=r"differs from the model at model\.layers\.1\.mlp"):
        circuitgraph_torch.trace(model, architecture=_wrong(found, blocks=(found.blocks[0], shifted, *found.blocks[2:])))
    with pytest.raises(TraceError, match="final norm"):
        circuitgraph_torch.trace(model, architecture=_wrong(found, logit_scale=2.0))
    with pytest.raises(TraceError, match="does not fit the model"):
        circuitgraph_torch.trace(model, architecture=_wrong(found, unembedding="nowhere"))


def test_a_bad_description_file_names_the_field() -> None:
    text = json.loads(circuitgraph_torch.find_architecture(tiny("gpt2")).to_json())
    text["blocks"][1]["attention"]["norm"]["kind"] = "batch"
    with pytest.raises(TraceError, match=r"blocks\.1\.attention\.norm\.kind"):
        Architecture.from_json(json.dumps(text))
    with pytest.raises(TraceError, match="architecture description"):
        Architecture.from_json("{")


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("smollm2-135", "did you mean 'smollm2-135m'"),
        ("zoo:induction-3l", "induction-2l"),
        ("./no/such/folder", "there is no such folder"),
        ("nothing.gguf", "no such GGUF file"),
        ("not a model!", "unknown model 'not a model!'"),
    ],
)
def test_names_that_nothing_answers_to(name: str, match: str) -> None:
    with pytest.raises(UnknownNameError, match=match):
        circuitgraph_torch.trace(name)


def test_models_of_another_kind_are_refused(tmp_path: Path) -> None:
    t5 = transformers.T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=30)
    transformers.T5ForConditionalGeneration(t5).save_pretrained(tmp_path)
    with pytest.raises(TraceError, match="encoder-decoder"):
        circuitgraph_torch.trace(str(tmp_path))
    with pytest.raises(TraceError):
        circuitgraph_torch.trace(torch.nn.Linear(3, 3))
    with pytest.raises(TraceError, match="expected a torch.nn.Module"):
        circuitgraph_torch.trace(42)
    with pytest.raises(UnknownNameError, match="unknown dtype 'float23'"):
        circuitgraph_torch.trace(tiny("gpt2"), dtype="float23")


@pytest.mark.parametrize("backend", ["torch", "jax"])
@pytest.mark.parametrize(
    ("stored", "wanted", "expected"), [("bfloat16", None, "float32"), ("float64", None, "float64"), ("float32", "bfloat16", "bfloat16")]
)
def test_files_are_computed_in_float32_unless_something_else_is_wanted(
    tmp_path: Path, backend: str, stored: str, wanted: str | None, expected: str
) -> None:
    tiny("attention_only", dtype=getattr(torch, stored)).save_pretrained(tmp_path)
    assert circuitgraph.trace(tmp_path, backend=backend, dtype=wanted).provenance["dtype"] == expected


def test_a_live_module_stays_in_half_precision() -> None:
    model = tiny("attention_only", dtype=torch.bfloat16)
    assert circuitgraph_torch.trace(model).provenance["dtype"] == "bfloat16"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("device", ["cuda", "nowhere"])
def test_a_device_that_is_not_there(device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(CircuitGraphError, match=f"device '{device}' cannot be used here"):
        circuitgraph_torch.trace(tiny("gpt2"), device=device)


def test_a_model_that_only_replays_in_its_own_batch_size_is_refused() -> None:
    with pytest.raises(TraceError, match="BloomForCausalLM cannot be replayed"):
        circuitgraph_torch.trace(tiny("bloom"))


def test_a_checkpoint_with_missing_tensors_is_refused(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TraceError, match=r"do not hold 1 of its tensors, such as model\.layers\.1\.mlp\.up_proj\.weight"):
        circuitgraph_torch.trace(tmp_path)


@pytest.mark.parametrize("broken", ["empty folder", "bad config", "unknown type", "no weights", "truncated weights", "bad gguf"])
def test_broken_model_files_are_one_clear_error(tmp_path: Path, broken: str) -> None:
    target = tmp_path
    if broken not in ("empty folder", "bad gguf"):
        tiny("llama").save_pretrained(tmp_path)
    if broken == "bad config":
        (tmp_path / "config.json").write_text("{")
    if broken == "unknown type":
        (tmp_path / "config.json").write_text('{"model_type": "marvin"}')
    if broken == "no weights":
        (tmp_path / "model.safetensors").unlink()
    if broken == "truncated weights":
        (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-100])
    if broken == "bad gguf":
        target = tmp_path / "model.gguf"
        target.write_bytes(b"not a model")
    with pytest.raises(TraceError, match="cannot be loaded from"):
        circuitgraph_torch.trace(target)


@pytest.mark.parametrize("n_positions", [9, 11])
def test_models_with_few_positions_are_proved_on_short_prompts(n_positions: int) -> None:
    config = transformers.GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=50, n_positions=n_positions)
    traced = circuitgraph_torch.trace(transformers.GPT2LMHeadModel(config))
    pairs = PromptPairs(clean=[[5] * n_positions], corrupted=[[6] * n_positions], answers=[7])
    assert all(check.holds for check in traced.checks(pairs))


def test_a_nan_in_the_model_is_refused() -> None:
    model = tiny("gpt2")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = float("nan")
    with pytest.raises(TraceError, match=r"transformer\.h\.1"):
        circuitgraph_torch.trace(model)


@pytest.mark.smollm2
def test_smollm2_is_proved() -> None:
    traced = circuitgraph_torch.trace("smollm2-135m")
    assert traced.graph.n_edges == 70651
    assert traced.proof.logits_error <= 1e-5
    assert traced.tokenizer is not None
    pairs = load_task("ioi").pairs(traced.tokenizer, 2, seed=0)
    checks = [*islice(traced.checks(pairs), 4)]  # the last one runs every reader by itself
    assert all(check.holds for check in checks), "\n".join(map(str, checks))
