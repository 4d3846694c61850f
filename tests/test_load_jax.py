"""Checkpoints without PyTorch: the names and numbers of every kind of source, the witness of the original, and clear errors."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import nnsight
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from families import FAMILIES, tiny

import circuitgraph_torch
from circuitgraph import CircuitGraphError, TraceError, UnknownNameError, _tensors
from circuitgraph._checkpoint import conversion_folder, folder_or_name, is_converted
from circuitgraph._tensors import read_tensors, tensor, weights_hash
from circuitgraph._witness import FILE
from circuitgraph.zoo import zoo_models
from circuitgraph_jax import _load, _witness
from circuitgraph_jax._load import load, with_prefix
from circuitgraph_torch._calls import original_logits
from circuitgraph_torch._gguf import converted
from circuitgraph_torch._witness import original_witness


def assert_same(tensors: Mapping[str, np.ndarray], model: torch.nn.Module) -> None:
    """The tensors of the module by its own names; of those that two modules share, one name may be absent."""
    state = model.state_dict()
    assert set(tensors) <= set(state)
    shared = {state[name].data_ptr() for name in tensors}
    assert [name for name in state if name not in tensors and state[name].data_ptr() not in shared and state[name].numel()] == []
    for name, found in tensors.items():
        np.testing.assert_array_equal(found.astype(np.float64), state[name].double().numpy(), err_msg=name)


# ---------------------------------------------------------------------------------------------------------------- names and folders


@pytest.mark.parametrize("name", zoo_models())
def test_bundled_models_with_their_witness(name: str) -> None:
    found = load(name)
    original = circuitgraph_torch.trace(name).module
    assert_same(found.tensors, original)
    assert (found.name, found.config["model_type"], found.forward) == (name, "llama", None)
    assert found.tokenizer("a") is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        witness = found.witness()
    assert witness.weights == found.weights()
    said = original_logits(original, torch.from_numpy(witness.tokens))[:, witness.positions]
    np.testing.assert_allclose(witness.logits, said.numpy(), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_folders_of_one_file_or_many(tmp_path: Path, dtype: torch.dtype, size: str) -> None:
    model = tiny("gpt2", dtype=dtype)
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (size == "20KB")
    found = load(tmp_path)
    assert_same(found.tensors, model)
    assert {array.dtype for array in found.tensors.values()} == {jnp.dtype(str(dtype).removeprefix("torch."))}
    assert not any(array.flags.writeable for array in found.tensors.values())
    assert found.tokenizer is None
    assert load(tmp_path, tokenizer="mine").tokenizer == "mine"


def test_a_hash_needs_no_type_that_numpy_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no ml_dtypes, as with PyTorch alone, the hash of a bfloat16 checkpoint is the same."""
    tiny("attention_only", dtype=torch.bfloat16).save_pretrained(tmp_path)
    known = weights_hash(read_tensors(tmp_path))
    monkeypatch.delitem(_tensors._NUMPY, "BF16")
    raw = read_tensors(tmp_path)
    assert {array.dtype.type for array in raw.values()} == {np.void}
    assert weights_hash(raw) == known


def test_shared_tensors_have_both_names(tmp_path: Path) -> None:
    """As in converted GGUF files: safetensors keeps one name, and that may be the unembedding's."""
    model = tiny("gpt2")
    model.config.save_pretrained(tmp_path)
    safetensors.torch.save_model(model, str(tmp_path / "model.safetensors"), metadata={"format": "pt"})
    assert {"lm_head.weight", "transformer.wte.weight"} <= set(load(tmp_path).tensors)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", ["whole", "base"])
def test_files_are_read_by_the_names_of_the_module(tmp_path: Path, family: str, part: str) -> None:
    """Of every family, saved whole or without its unembedding, which takes a prefix from all names."""
    model = tiny(family)
    (model if part == "whole" else model.base_model).save_pretrained(tmp_path)
    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    found = with_prefix(load(tmp_path).tensors, embedding)
    if part == "base":
        found |= {name: value.numpy() for name, value in model.state_dict().items() if name.startswith("lm_head.")}
    if "mix" not in family and "moe" not in family:  # experts are stored one by one, and fused by transformers
        assert_same(found, model)


@pytest.mark.parametrize(
    ("files", "embedding", "names"),
    [
        (["wte.weight", "h.0.attn.bias"], "transformer.wte", ["transformer.wte.weight", "transformer.h.0.attn.bias"]),
        (["embed_in.weight", "lm_head.weight"], "gpt_neox.embed_in", ["gpt_neox.embed_in.weight", "lm_head.weight"]),
        (
            ["language_model.model.embed_tokens.weight", "language_model.lm_head.weight", "vision_tower.a.weight"],
            "model.language_model.embed_tokens",
            ["model.language_model.embed_tokens.weight", "lm_head.weight", "model.vision_tower.a.weight"],
        ),
        (["model.wte.weight", "model.h.0.weight"], "wte", ["wte.weight", "h.0.weight"]),
        (["a.b.weight"], "transformer.wte", ["a.b.weight"]),
    ],
)
def test_prefixes(files: list[str], embedding: str, names: list[str]) -> None:
    assert list(with_prefix(dict.fromkeys(files, np.zeros(1)), embedding)) == names


def test_pythia_files_are_read_by_the_names_of_the_module(tmp_path: Path) -> None:
    """GPT-NeoX's unembedding has another name in files than in transformers; the hash is over the files' names."""
    model = tiny("gpt_neox")
    model.save_pretrained(tmp_path)
    assert "embed_out.weight" in read_tensors(tmp_path)
    assert_same(load(tmp_path).tensors, model)
    circuitgraph_torch.write_witness(tmp_path)
    assert load(tmp_path).witness().weights == load(tmp_path).weights() == weights_hash(read_tensors(tmp_path))


def test_hub_models_are_downloaded_without_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    tiny("llama").save_pretrained(tmp_path)
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(_load, "configuration", lambda folder, name: transformers.AutoConfig.from_pretrained(tmp_path))
    assert load("somebody/llama").name == "somebody/llama"
    assert asked["name"] == "somebody/llama"
    wanted = list(huggingface_hub.utils.filter_repo_objects(
        ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "tokenizer.json",
         "onnx/model.onnx", "original/model.safetensors", "consolidated.safetensors"],
        allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"],
    ))  # fmt: skip
    assert wanted == ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"]


# ----------------------------------------------------------------------------------------------------------------------------- GGUF


@pytest.mark.smollm2
def test_smollm2_is_converted_with_a_witness(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the first test that asks for it, which takes half a minute."""
    found = load("smollm2-135m")
    file = folder_or_name("smollm2-135m")
    assert isinstance(file, Path)
    assert is_converted(conversion_folder(file))
    for module in ("_gguf", "_load", "_witness"):
        monkeypatch.setitem(sys.modules, f"circuitgraph_torch.{module}", None)  # not needed any more
    again = load("smollm2-135m")
    assert again.weights() == found.weights()
    assert len(again.tokenizer("Hello").input_ids) == 1
    witness = again.witness()
    assert (witness.logits.shape, witness.positions.tolist()) == ((2, 1, 49152), [11])


def test_a_gguf_file_needs_pytorch_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "circuitgraph_torch._gguf", None)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CircuitGraphError, match=r"PyTorch converts once: run pip install 'circuitgraph\[torch\]', or"):
        load(tmp_path / "model.gguf")
    folder = conversion_folder(tmp_path / "model.gguf")
    tiny("llama").save_pretrained(folder)
    assert load(tmp_path / "model.gguf").config["model_type"] == "llama"
    assert converted(tmp_path / "model.gguf") == folder


# --------------------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("name", ["zoo:induction-3l", "./no/such/folder", "nothing.gguf", "not a model!"])
def test_names_that_nothing_answers_to(name: str) -> None:
    """In the same words as by PyTorch."""
    with pytest.raises(UnknownNameError) as by_torch:
        circuitgraph_torch.trace(name)
    with pytest.raises(UnknownNameError) as by_jax:
        load(name)
    assert str(by_jax.value) == str(by_torch.value)


def replaced_by(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors").rename(folder / "a.safetensors").with_name(name).write_text(content)


def cut_short(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])


INDEX = "model.safetensors.index.json"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "config": (lambda folder: (folder / "config.json").write_text("{"), "cannot be loaded from"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "cannot be loaded from"),
    "type": (lambda folder: (folder / "config.json").write_text('{"model_type": "marvin"}'), "cannot be loaded from"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "there is no model.safetensors; write them as safetensors"),
    "pickle": (replaced_by("pytorch_model.bin", "cos\nsystem\n(S'false'\ntR."), r"only pytorch_model\.bin, a pickle"),
    "cut short": (cut_short, "cannot be loaded from"),
    "shard": (replaced_by(INDEX, '{"weight_map": {"x": "b.safetensors"}}'), "cannot be loaded from.*b.safetensors"),
    "elsewhere": (replaced_by(INDEX, '{"weight_map": {"x": "../a.safetensors"}}'), "expected names of files beside it"),
    "no map": (replaced_by(INDEX, "[]"), "has no weight_map"),
    "tensor": (
        replaced_by(INDEX, '{"weight_map": {"x": "a.safetensors"}}'),
        "does not hold the tensor x that model.safetensors.index.json",
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_files_are_one_clear_error(tmp_path: Path, broken: str) -> None:
    tiny("llama").save_pretrained(tmp_path)
    damage, match = BROKEN[broken]
    damage(tmp_path)
    with pytest.raises(TraceError, match=match):
        load(tmp_path)


def test_a_missing_tensor_is_named() -> None:
    tensors: dict[str, np.ndarray] = {"h.0.attn.weight": np.zeros(2), "odd": np.zeros(2, "V1")}
    assert tensor(tensors, "h.0.attn.weight") is tensors["h.0.attn.weight"]
    with pytest.raises(TraceError, match=r"no tensor 'h\.0\.atn\.weight'.*did you mean 'h\.0\.attn\.weight'"):
        tensor(tensors, "h.0.atn.weight")
    with pytest.raises(TraceError, match="odd: its numbers are of a type"):
        tensor(tensors, "odd")
    with pytest.raises(TraceError, match="there are 0, for example none"):
        tensor({}, "odd")


def test_what_is_no_model() -> None:
    t5 = transformers.T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=30)
    for thing in (42, [], len, jnp.zeros(3), torch.zeros(3), {"a": "text"}):
        with pytest.raises(TraceError, match=f"cannot trace a {type(thing).__name__}; expected"):
            load(thing)
    assert load(transformers.T5ForConditionalGeneration(t5)).config["is_encoder_decoder"]  # refused by its description


# --------------------------------------------------------------------------------------------------------- live modules and pytrees


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_live_modules_are_copied(dtype: torch.dtype) -> None:
    model = tiny("gpt2", dtype=dtype).train()
    found = load(model)
    assert_same(found.tensors, model)
    assert found.config == model.config.to_dict()
    witness = found.witness()
    assert (witness.dtype, witness.weights) == (str(dtype).removeprefix("torch."), "")
    assert model.training
    said = original_logits(model, torch.from_numpy(witness.tokens)).float().numpy()
    np.testing.assert_array_equal(witness.logits, said)
    before = found.weights()
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
    assert load(model).weights() != before == weights_hash(found.tensors)


def test_nnsight_models_and_modules_without_a_configuration() -> None:
    model = tiny("gpt2")
    assert_same(load(nnsight.NNsight(model)).tensors, model)
    assert load(torch.nn.Linear(2, 3)).config is None
    with pytest.raises(TraceError, match=r"weight: the module's weights are not loaded yet.*dispatch=True"):
        load(torch.nn.Linear(2, 3, device="meta"))


def test_pytrees_are_named_by_their_paths() -> None:
    class Model(eqx.Module):
        layers: list[eqx.nn.Linear]
        tables: dict[str, jax.Array]
        key: jax.Array
        name: str = eqx.field(static=True)

        def __call__(self, ids: jax.Array) -> jax.Array:
            return self.tables["wte"][ids]

    key = jax.random.key(0)
    table = jnp.arange(6, dtype=jnp.bfloat16).reshape(3, 2)
    model = Model([eqx.nn.Linear(2, 3, key=key), eqx.nn.Linear(3, 2, use_bias=False, key=key)], {"wte": table}, key, "mine")
    found = load(model)
    assert list(found.tensors) == ["layers.0.weight", "layers.0.bias", "layers.1.weight", "tables.wte"]
    assert all(type(array) is np.ndarray for array in found.tensors.values())
    assert (found.name, found.config, found.tokenizer, found.witness(), found.forward) == ("Model", None, None, None, model)
    np.testing.assert_array_equal(found.tensors["tables.wte"].astype(np.float32), np.arange(6).reshape(3, 2))
    named = load({"transformer.wte.weight": np.zeros((3, 2)), "h": [jnp.zeros(2)]})
    assert (sorted(named.tensors), named.forward) == (["h.0", "transformer.wte.weight"], None)


# -------------------------------------------------------------------------------------------------------------------------- witness


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny("llama", dtype=torch.bfloat16).save_pretrained(tmp_path)
    return tmp_path


def test_a_witness_is_kept_beside_the_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = load(folder).witness()
    assert (ran.dtype, ran.weights, ran.logits.shape, ran.logits.dtype) == ("float32", "", (2, 12, 97), np.float32)
    file = circuitgraph_torch.write_witness(folder, last_only=True)
    monkeypatch.setattr(_witness.importlib.util, "find_spec", lambda name: None)
    saved = load(str(folder)).witness()
    assert (file.name, saved.positions.tolist(), saved.weights) == (FILE, [11], load(folder).weights())
    np.testing.assert_array_equal(saved.tokens, ran.tokens)
    np.testing.assert_array_equal(saved.logits, ran.logits[:, -1:])
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []
    file.unlink()
    assert load(folder).witness() is None


@pytest.mark.parametrize("broken", ["of other weights", "truncated or no witness", "of schema 2", "do not fit together"])
def test_a_witness_that_does_not_fit_is_not_used(folder: Path, broken: str) -> None:
    file = circuitgraph_torch.write_witness(folder)
    if broken == "of other weights":
        tiny("llama", seed=1).save_pretrained(folder)
    elif broken == "truncated or no witness":
        file.write_bytes(file.read_bytes()[:-10])
    elif broken == "of schema 2":
        file.write_bytes(file.read_bytes().replace(b'schema\\": 1', b'schema\\": 2'))
    else:
        file.write_bytes(file.read_bytes().replace(b'"shape":[2,12,97]', b'"shape":[12,2,97]'))
    with pytest.warns(UserWarning, match=f"the witness is not used: .*{broken}"):
        assert load(folder).witness().weights == ""  # the original was run instead


def test_a_witness_of_models_that_are_short_or_broken(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=50, n_positions=9)
    model = transformers.GPT2LMHeadModel(config)
    assert original_witness(model).tokens.shape == (2, 9)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = float("nan")
    with pytest.raises(TraceError, match="logits are not finite"):
        original_witness(model)
    with pytest.raises(TraceError, match="there is no such folder"):
        circuitgraph_torch.write_witness(tmp_path / "nowhere")
