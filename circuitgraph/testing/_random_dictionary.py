"""Random dictionaries for tests, and random cross-layer transcoders."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import numpy as np

from circuitgraph._dictionary import TRANSCODED, Activation, Dictionary, InputNorm, Reads


def random_dictionary(
    seed: int = 0,
    *,
    width: int = 8,
    n_features: int = 6,
    reads: Reads = "mlp_out",
    activation: Activation = "relu",
    input_norm: InputNorm | None = None,
    has_skip: bool = False,
    d_out: int | None = None,
) -> Dictionary:
    """A dictionary of random directions, of which about half are active anywhere; biases are large enough to matter.

    >>> random_dictionary(activation="topk")
    Dictionary(random-0: 6 features of mlp_out, topk)
    """
    rng = np.random.default_rng(seed)
    d_out = width if d_out is None else d_out
    is_transcoder = reads in TRANSCODED
    of: dict[str, Any] = {
        "relu": {},
        "jumprelu": {"threshold": np.abs(rng.normal(size=n_features)) / 4},
        "topk": {"k": max(1, n_features // 2)},
    }
    of["gated"] = {"magnitude_scale": np.exp(rng.normal(size=n_features) / 4), "magnitude_bias": rng.normal(size=n_features) / 4}
    assert activation in get_args(Activation)
    return Dictionary(
        encoder=rng.normal(scale=width**-0.5, size=(width, n_features)),
        decoder=rng.normal(scale=d_out**-0.5, size=(n_features, d_out)),
        encoder_bias=rng.normal(size=n_features) / 4,
        decoder_bias=rng.normal(size=d_out) / 4,
        reads=reads,
        activation=activation,
        is_centred=not is_transcoder and bool(rng.integers(2)),
        input_norm=input_norm,
        skip=rng.normal(scale=width**-0.5, size=(d_out, width)) if has_skip else None,
        name=f"random-{seed}",
        **of[activation],
    )


def random_cross_layer_transcoder(
    n_layers: int, seed: int = 0, *, first: int = 0, reads: Reads = "mlp_in", **options: Any
) -> dict[str, Dictionary]:
    """The layers of a cross-layer transcoder by component, from layer `first` on; `options` as of `random_dictionary`.

    >>> transcoder = random_cross_layer_transcoder(3)
    >>> [(component, dictionary.n_later) for component, dictionary in transcoder.items()]
    [('m0', 2), ('m1', 1), ('m2', 0)]
    """
    rng, layers = np.random.default_rng(seed), {}
    for number in range(n_layers):
        dictionary = random_dictionary(seed + number, reads=reads, **options)
        n, d_out = dictionary.decoder.shape
        later = rng.normal(scale=d_out**-0.5, size=(n_layers - 1 - number, n, d_out))
        layers[f"m{first + number}"] = replace(dictionary, later=later if len(later) else None)
    return layers
