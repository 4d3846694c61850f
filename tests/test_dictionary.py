"""Dictionaries: every architecture and convention, beside a plain computation of each, and their files."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from circuitgraph import CircuitGraphError, FileError, UnknownNameError
from circuitgraph._dictionary import Dictionary
from circuitgraph.evaluation import CircuitGraphWarning
from circuitgraph.features import from_saelens, load_dictionary, load_transcoders, save_dictionary
from circuitgraph.features._saelens import place_of_hook
from circuitgraph.testing import random_dictionary

WIDTH, N = 8, 6
X = np.random.default_rng(0).normal(size=(3, 5, WIDTH))
ARCHITECTURES = st.sampled_from(["relu", "jumprelu", "topk", "gated"])
NORMS = st.sampled_from([None, "layer_norm", "constant_norm_rescale"])


def by_hand(d: Dictionary, x: np.ndarray) -> np.ndarray:
    """One vector at a time, feature by feature."""
    if d.input_norm == "constant_norm_rescale":
        x = x * len(x) ** 0.5 / np.sqrt((x**2).sum())
    elif d.input_norm == "layer_norm":
        x = (x - x.mean()) / (x.std(ddof=1) + 1e-5)
    y = x - d.decoder_bias if d.is_centred else x
    pre = np.array([y @ d.encoder[:, f] for f in range(d.n_features)]) + d.encoder_bias
    if d.activation == "relu":
        return np.maximum(pre, 0)
    if d.activation == "jumprelu":
        return np.array([p if p > max(t, 0) else 0.0 for p, t in zip(pre, d.threshold, strict=True)])
    if d.activation == "topk":
        best = sorted(range(d.n_features), key=lambda f: -pre[f])[: d.k]
        return np.array([max(p, 0) if f in best else 0.0 for f, p in enumerate(pre)])
    magnitude = (pre - d.encoder_bias) * d.magnitude_scale + d.magnitude_bias
    return np.where(pre > 0, np.maximum(magnitude, 0), 0)


@given(seed=st.integers(0, 99), activation=ARCHITECTURES, input_norm=NORMS)
def test_features_are_what_they_are_by_hand(seed: int, activation: Any, input_norm: Any) -> None:
    d = random_dictionary(seed, width=WIDTH, n_features=N, activation=activation, input_norm=input_norm)
    wanted = np.array([[by_hand(d, x) for x in row] for row in X])
    np.testing.assert_allclose(d.encode(X), wanted, atol=1e-12)
    np.testing.assert_allclose(d.encode(X, [4, 1]), wanted[..., [4, 1]], atol=1e-12)
    on_torch = d.on(torch.from_numpy)
    np.testing.assert_allclose(on_torch.encode(torch.from_numpy(X)).numpy(), wanted, atol=1e-12)


@given(seed=st.integers(0, 99), input_norm=NORMS)
def test_what_is_decoded_is_brought_back(seed: int, input_norm: Any) -> None:
    """A dictionary of the unit vectors and their opposites reconstructs exactly, whatever norm its input has gone through."""
    both = np.concatenate([np.eye(WIDTH), -np.eye(WIDTH)])
    bias = np.random.default_rng(seed).normal(size=WIDTH)
    d = Dictionary(both.T, both, np.zeros(2 * WIDTH), bias, is_centred=True, input_norm=input_norm)
    np.testing.assert_allclose(d.decode(X, d.encode(X)), X, atol=1e-4 if input_norm == "layer_norm" else 1e-12)


def test_a_prefix_has_the_first_features() -> None:
    d = random_dictionary(1, activation="jumprelu")
    np.testing.assert_allclose(d.prefix(2).encode(X), d.encode(X)[..., :2])
    with pytest.raises(CircuitGraphError, match="no prefix of 9 features"):
        d.prefix(9)


def test_arrays_that_do_not_fit_are_refused() -> None:
    d = random_dictionary(1)
    for changes, message in (
        ({"encoder_bias": np.zeros(5)}, r"encoder_bias has shape \(5,\); expected \(6,\)"),
        ({"activation": "jumprelu"}, "threshold has none"),
        ({"k": 3}, "k is 3; expected 1 to 6 for topk, and none"),
        ({"decoder": np.zeros((6, 4)), "decoder_bias": np.zeros(4)}, "8 in, 4 out: that is a transcoder's"),
        ({"encoder": np.zeros(6)}, "expected a matrix"),
    ):
        with pytest.raises(CircuitGraphError, match=message):
            replace(d, **changes)
    with pytest.raises(UnknownNameError, match="did you mean 'mlp_out'"):
        replace(d, reads="mlp_oot")  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------------------------- files


@given(
    seed=st.integers(0, 99),
    activation=ARCHITECTURES,
    reads=st.sampled_from(["mlp_out", "attn_out", "attn_z", "stream"]),
    input_norm=NORMS,
)
def test_saved_as_saelens_does_it_is_the_same(
    seed: int, activation: Any, reads: Any, input_norm: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    d = replace(random_dictionary(seed, activation=activation, reads=reads, input_norm=input_norm), layer=3, model="gpt2")
    read = load_dictionary(save_dictionary(d, tmp_path_factory.mktemp("sae")))
    assert (read.reads, read.layer, read.model, read.input_norm, read.is_centred) == (reads, 3, "gpt2", input_norm, d.is_centred)
    np.testing.assert_allclose(read.encode(X), d.encode(X), atol=1e-5)
    np.testing.assert_allclose(read.decode(X, read.encode(X)), d.decode(X, d.encode(X)), atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
@pytest.mark.parametrize("has_skip", [False, True])
def test_a_saved_transcoder_is_the_same(activation: Any, has_skip: bool, tmp_path: Path) -> None:
    d = replace(random_dictionary(2, activation=activation, reads="mlp_in", has_skip=has_skip, d_out=5), layer=1)
    read = load_dictionary(save_dictionary(d, tmp_path / "transcoder"))
    np.testing.assert_allclose(read.decode(X, read.encode(X)), d.decode(X, d.encode(X)), atol=1e-5)
    assert (read.reads, read.skip is not None) == ("mlp_in", has_skip)


def test_saelens_top_k_ranks_by_decoder_norms() -> None:
    """`rescale_acts_by_decoder_norm`: what is ranked, and what a feature is, is multiplied by the norm of its direction."""
    d = random_dictionary(3, activation="topk")
    config = {"architecture": "topk", "k": 3, "hook_name": "blocks.0.hook_mlp_out", "apply_b_dec_to_input": False}
    tensors = {"W_enc": d.encoder, "W_dec": 3 * d.decoder, "b_enc": d.encoder_bias, "b_dec": d.decoder_bias}
    read = from_saelens({**config, "rescale_acts_by_decoder_norm": True}, tensors)
    norms = np.linalg.norm(3 * d.decoder, axis=1)
    pre = (X @ d.encoder + d.encoder_bias) * norms
    least = np.sort(pre, axis=-1)[..., -3:-2]
    wanted = np.where(pre >= least, np.maximum(pre, 0), 0)
    np.testing.assert_allclose(read.encode(X), wanted, atol=1e-12)
    np.testing.assert_allclose(read.decode(X, wanted), (wanted / norms) @ (3 * d.decoder) + d.decoder_bias, atol=1e-12)


def test_configurations_before_version_6() -> None:
    d = random_dictionary(4)
    tensors = {"W_enc": d.encoder, "W_dec": d.decoder, "b_enc": d.encoder_bias, "b_dec": d.decoder_bias}
    tensors["scaling_factor"] = np.full(N, 2.0)
    old = {"hook_point": "blocks.8.hook_resid_pre", "model_name": "gpt2-small", "activation_fn_str": "relu"}
    read = from_saelens(old, tensors)
    assert (read.reads, read.layer, read.is_centred) == ("stream", 8, True)
    np.testing.assert_allclose(read.decoder, 2 * d.decoder)
    topk = from_saelens({**old, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2}}, tensors)
    assert (topk.activation, topk.k) == ("topk", 2)
    with pytest.warns(CircuitGraphWarning, match="scaled to an average norm"):
        from_saelens({**old, "normalize_activations": True}, tensors)


@pytest.mark.parametrize(
    ("hook", "place"),
    [
        ("blocks.8.hook_resid_post", ("stream", 9)),
        ("blocks.0.attn.hook_z", ("attn_z", 0)),
        ("blocks.3.ln2.hook_normalized", ("mlp_normalized", 3)),
        ("model.layers.3", ("stream", 4)),
    ],
)
def test_places_of_hooks(hook: str, place: tuple[str, int]) -> None:
    assert place_of_hook(hook) == place


def test_other_hooks_and_architectures_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CircuitGraphError, match="hook 'hook_embed' is not a place"):
        place_of_hook("hook_embed")
    with pytest.raises(CircuitGraphError, match="architecture 'jumpreluu' is not known; did you mean 'jumprelu'"):
        from_saelens({"architecture": "jumpreluu", "hook_name": "blocks.0.hook_mlp_out"}, {})
    with pytest.raises(CircuitGraphError, match="there is no tensor 'W_enc' among its weights; there are W_dec"):
        from_saelens({"architecture": "standard", "hook_name": "blocks.0.hook_mlp_out"}, {"W_dec": np.eye(2)})
    with pytest.raises(FileError, match="has neither cfg.json nor ae.pt"):
        load_dictionary(tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps({"hook_name": "blocks.0.hook_mlp_out"}))
    with pytest.raises(FileError, match="cannot read .*sae_weights.safetensors"):
        load_dictionary(tmp_path)
    with pytest.raises(FileError, match="there is no folder 'nowhere'"):
        load_dictionary("nowhere")


class AutoEncoderOfDictionaryLearning(torch.nn.Module):
    """What dictionary_learning saves, by what it is called: parameters as they are, of each class."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.kind = kind
        if kind == "MatryoshkaBatchTopKSAE":
            for name, shape in (("W_enc", (WIDTH, N)), ("W_dec", (N, WIDTH)), ("b_enc", (N,)), ("b_dec", (WIDTH,))):
                setattr(self, name, torch.nn.Parameter(torch.randn(*shape)))
            self.register_buffer("threshold", torch.tensor(0.2))
            return
        if kind == "JumpReluAutoEncoder":
            for name, shape in (("W_enc", (WIDTH, N)), ("W_dec", (N, WIDTH)), ("b_enc", (N,)), ("b_dec", (WIDTH,)), ("threshold", (N,))):
                setattr(self, name, torch.nn.Parameter(torch.randn(*shape)))
            return
        self.encoder = torch.nn.Linear(WIDTH, N, bias=kind != "GatedAutoEncoder")
        self.decoder = torch.nn.Linear(N, WIDTH, bias=kind == "AutoEncoderNew")
        bias = {"AutoEncoder": "bias", "GatedAutoEncoder": "decoder_bias"}.get(kind, "b_dec")
        if kind != "AutoEncoderNew":
            setattr(self, bias, torch.nn.Parameter(torch.randn(WIDTH)))
        if kind == "GatedAutoEncoder":
            for name in ("r_mag", "gate_bias", "mag_bias"):
                setattr(self, name, torch.nn.Parameter(torch.randn(N)))
        if "TopK" in kind:
            self.register_buffer("k", torch.tensor(2))
            self.register_buffer("threshold", torch.tensor(0.2))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "JumpReluAutoEncoder":
            pre = x @ self.W_enc + self.b_enc
            return torch.relu(pre * (pre > self.threshold))
        if self.kind == "MatryoshkaBatchTopKSAE":
            f = torch.relu((x - self.b_dec) @ self.W_enc + self.b_enc)
            return f * (f > 0.2)
        if self.kind == "AutoEncoderNew":
            return torch.relu(self.encoder(x))
        if self.kind == "GatedAutoEncoder":
            y = self.encoder(x - self.decoder_bias)
            return (y + self.gate_bias > 0) * torch.relu(self.r_mag.exp() * y + self.mag_bias)
        f = torch.relu(self.encoder(x - (self.bias if self.kind == "AutoEncoder" else self.b_dec)))
        if self.kind == "AutoEncoderTopK":
            best = f.topk(2, dim=-1)
            return torch.zeros_like(f).scatter(-1, best.indices, best.values)
        return f if self.kind == "AutoEncoder" else f * (f > 0.2)

    def decode(self, f: torch.Tensor) -> torch.Tensor:
        if self.kind in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
            return f @ self.W_dec + self.b_dec
        if self.kind == "GatedAutoEncoder":
            return self.decoder(f) + self.decoder_bias
        bias = {"AutoEncoder": "bias", "AutoEncoderNew": ""}.get(self.kind, "b_dec")
        return self.decoder(f) + (getattr(self, bias) if bias else 0)


KINDS = (
    "AutoEncoder",
    "AutoEncoderNew",
    "GatedAutoEncoder",
    "JumpReluAutoEncoder",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
)


@pytest.mark.parametrize("kind", KINDS)
def test_dictionaries_of_dictionary_learning(kind: str, tmp_path: Path) -> None:
    module = AutoEncoderOfDictionaryLearning(kind).double()
    torch.save(module.state_dict(), tmp_path / "ae.pt")
    trainer = {"dict_class": kind, "layer": 4, "lm_name": "gpt2", "submodule_name": "resid_post_layer_4"}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
    read = load_dictionary(tmp_path)
    assert (read.reads, read.layer, read.model) == ("stream", 5, "gpt2")
    with torch.no_grad():
        f = module.encode(torch.from_numpy(X))
        decoded = module.decode(f)
    np.testing.assert_allclose(read.encode(X), f.numpy(), atol=1e-12)
    np.testing.assert_allclose(read.decode(X, read.encode(X)), decoded.numpy(), atol=1e-12)


def test_a_pickle_is_never_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoder", "submodule_name": "mlp_out_0"}}))
    (tmp_path / "ae.pt").write_bytes(pickle.dumps({"weights": Path("x")}))
    with pytest.raises(FileError, match="no file of tensors alone, so it is not read"):
        load_dictionary(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "Strange"}}))
    with pytest.raises(CircuitGraphError, match="dict_class is 'Strange'; expected one of AutoEncoder"):
        load_dictionary(tmp_path)


def test_transcoders_of_circuit_tracer(tmp_path: Path) -> None:
    """`W_enc` lies `[features, d_model]`; the hook of their input says whether they read the stream or its norm."""
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump(
            {"model_kind": "transcoder_set", "model_name": "m", "feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
        )
    )
    made = [random_dictionary(layer, activation="jumprelu" if layer else "relu", reads="mlp_in", has_skip=not layer) for layer in range(2)]
    for layer, d in enumerate(made):
        tensors = {"W_enc": d.encoder.T, "W_dec": d.decoder, "b_enc": d.encoder_bias, "b_dec": d.decoder_bias}
        tensors |= {} if d.skip is None else {"W_skip": d.skip}
        tensors |= {} if d.threshold is None else {"activation_function.threshold": d.threshold}
        save_file({key: np.ascontiguousarray(values) for key, values in tensors.items()}, tmp_path / f"layer_{layer}.safetensors")
    read = load_transcoders(tmp_path)
    assert [*read] == ["m0", "m1"]
    for d, found in zip(made, read.values(), strict=True):
        np.testing.assert_allclose(found.decode(X, found.encode(X)), d.decode(X, d.encode(X)), atol=1e-12)
        assert found.reads == "mlp_in"
    with pytest.raises(CircuitGraphError, match="read them with load_transcoders"):
        load_dictionary(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model_kind": "crosscoder"}))
    with pytest.raises(CircuitGraphError, match="model_kind is 'crosscoder'; expected transcoder_set or cross_layer_transcoder"):
        load_transcoders(tmp_path)


def test_beside_saelens_itself(tmp_path: Path) -> None:
    """What SAELens saves is read, and encodes and decodes alike; what we save is read by it."""
    sae_lens = pytest.importorskip("sae_lens")
    for activation in ("relu", "jumprelu", "topk", "gated"):
        for input_norm in (None, "layer_norm", "constant_norm_rescale"):
            d = replace(random_dictionary(7, activation=activation, input_norm=input_norm), layer=0)  # type: ignore[arg-type]
            theirs = sae_lens.SAE.load_from_disk(str(save_dictionary(d, tmp_path / f"{activation}-{input_norm}")), device="cpu")
            x = torch.from_numpy(X).float()
            with torch.no_grad():
                f = theirs.encode(x)
                np.testing.assert_allclose(f.numpy(), d.encode(X), atol=1e-5)
                np.testing.assert_allclose(theirs.decode(f).numpy(), d.decode(X, d.encode(X)), atol=1e-5)
            theirs.save_model(str(tmp_path / "theirs"))
            np.testing.assert_allclose(load_dictionary(tmp_path / "theirs").encode(X), d.encode(X), atol=1e-5)


def test_transcoders_beside_saelens_itself(tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    for activation in ("relu", "jumprelu"):
        for has_skip in (False, True):
            d = replace(random_dictionary(8, activation=activation, reads="mlp_in", has_skip=has_skip, d_out=5), layer=0)  # type: ignore[arg-type]
            folder = save_dictionary(d, tmp_path / f"{activation}-{has_skip}")
            kind = json.loads((folder / "cfg.json").read_text())["architecture"]
            theirs = sae_lens.registry.get_sae_class(kind)[0].load_from_disk(str(folder), device="cpu")
            x = torch.from_numpy(X).float()
            with torch.no_grad():
                np.testing.assert_allclose(theirs.encode(x).numpy(), d.encode(X), atol=1e-5)
                np.testing.assert_allclose(theirs(x).numpy(), d.decode(X, d.encode(X)), atol=1e-5)
