"""`Dictionary`: sparse features of an activation, as sparse autoencoders and transcoders have them; and neurons, which are the same thing.

    y    = norm(x) - decoder_bias if centred             what the encoder sees
    f    = gate(y) * (y @ encoder + encoder_bias)        the features, `[..., features]`
    x_hat = (f @ decoder + decoder_bias) / norm + skip @ x

Written once for every backend, over the array API: the fields are arrays of numpy, or of the framework that `on` puts them in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from circuitgraph._errors import CircuitGraphError, unknown_name
from circuitgraph._graph import Parts
from circuitgraph._names import ComponentKind

if TYPE_CHECKING:
    from numpy import ndarray

    Array = Any  # of numpy, torch or jax

Reads = Literal["mlp_out", "attn_out", "attn_z", "stream", "mlp_in", "mlp_normalized", "mlp_stream"]
Activation = Literal["relu", "jumprelu", "topk", "gated"]
InputNorm = Literal["constant_norm_rescale", "layer_norm"]

OF: dict[str, ComponentKind] = {"attn_out": "a", "attn_z": "a", "stream": "r"}  # what is refined; all others are of an MLP
TRANSCODED: tuple[Reads, ...] = ("mlp_in", "mlp_normalized", "mlp_stream")
_LAYER_NORM_EPS = 1e-5  # SAELens's


@dataclass(frozen=True, eq=False)
class Dictionary:
    """Features of what a component says, or (a transcoder's) of what an MLP reads.

    `encoder` `[d_in, features]`, `decoder` `[features, d_out]`, `encoder_bias` `[features]`, `decoder_bias` `[d_out]`.
    `activation`: "relu"; "jumprelu", 0 up to `threshold` `[features]` (Rajamanoharan et al. 2024; a BatchTopK dictionary after training is
    one, with the same threshold for all); "topk", the `k` largest (Gao et al. 2024); "gated", which takes `y @ encoder * magnitude_scale +
    magnitude_bias` where `y @ encoder + encoder_bias` is positive (Rajamanoharan et al. 2024).

    `reads`: "mlp_out", "attn_out" (after projection, biases included), "attn_z" (what the output projection reads), "stream"; a transcoder
    "mlp_in" (what the MLP's first weights read), "mlp_normalized" (the same before the norm's gain) or "mlp_stream" (before the norm).
    `is_centred`: the decoder's bias is taken off the input. `input_norm`: the input is brought to length `sqrt(d_in)`
    ("constant_norm_rescale") or standardised ("layer_norm"), as SAELens does, and the output of a dictionary that is no transcoder is
    brought back. `skip` `[d_out, d_in]`: of skip transcoders (Paulo et al. 2025). `later` `[layers, features, d_out]`: of a layer of a
    cross-layer transcoder (Lindsey et al. 2024; Ameisen et al. 2025), what the features add, beside `decoder`'s rows, to the MLPs of the
    layers after it, one by one. Such a transcoder is its layers, the last of which has no `later`.

    `layer`, `model`: where it was trained, as far as is known. Raises `CircuitGraphError` for arrays that do not fit together.
    """

    encoder: Array
    decoder: Array
    encoder_bias: Array
    decoder_bias: Array
    reads: Reads = "mlp_out"
    activation: Activation = "relu"
    threshold: Array | None = None
    k: int | None = None
    magnitude_scale: Array | None = None
    magnitude_bias: Array | None = None
    is_centred: bool = False
    input_norm: InputNorm | None = None
    skip: Array | None = None
    later: Array | None = None
    layer: int | None = None
    model: str | None = None
    name: str = "dictionary"

    def __post_init__(self) -> None:
        for what, value, known in (("reads", self.reads, get_args(Reads)), ("activation", self.activation, get_args(Activation))):
            if value not in known:
                raise unknown_name(f"{self.name}: {what}", str(value), known)
        d_in, n = _size(self.name, "encoder", self.encoder)
        d_out = _size(self.name, "decoder", self.decoder)[1]
        wanted = {
            "decoder": (n, d_out),
            "encoder_bias": (n,),
            "decoder_bias": (d_out,),
            "threshold": (n,) if self.activation == "jumprelu" else None,
            "magnitude_scale": (n,) if self.activation == "gated" else None,
            "magnitude_bias": (n,) if self.activation == "gated" else None,
            "skip": None if self.skip is None else (d_out, d_in),
            "later": None if self.later is None else (max(1, len(self.later)), n, d_out),
        }
        for field, shape in wanted.items():
            array = getattr(self, field)
            if (None if array is None else tuple(array.shape)) != shape:
                got = "none" if array is None else f"shape {tuple(array.shape)}"
                raise CircuitGraphError(
                    f"{self.name}: {field} has {got}; expected {'none' if shape is None else shape} for {self.activation}"
                )
        if (self.k is not None) != (self.activation == "topk") or (self.k is not None and not 0 < self.k <= n):
            raise CircuitGraphError(f"{self.name}: k is {self.k!r}; expected 1 to {n} for topk, and none for another activation")
        if not self.is_transcoder and (d_in != d_out or self.skip is not None):
            raise CircuitGraphError(
                f"{self.name}: {d_in} in, {d_out} out{', a skip' * (self.skip is not None)}: that is a transcoder's, which reads mlp_in"
            )
        if not self.is_transcoder and self.later is not None:
            raise CircuitGraphError(f"{self.name}: it reads {self.reads}; only features of a transcoder write to later MLPs")
        if self.is_centred and d_in != d_out:
            raise CircuitGraphError(f"{self.name}: a decoder bias of {d_out} numbers cannot be taken off an input of {d_in}")

    @property
    def n_features(self) -> int:
        return int(self.encoder.shape[1])

    @property
    def d_in(self) -> int:
        return int(self.encoder.shape[0])

    @property
    def is_transcoder(self) -> bool:
        return self.reads in TRANSCODED

    @property
    def n_later(self) -> int:
        """To how many MLPs after its own its features write."""
        return 0 if self.later is None else len(self.later)

    @property
    def component(self) -> ComponentKind:
        """Of which kind of component it makes parts."""
        return OF.get(self.reads, "m")

    @property
    def constant(self) -> Array | None:
        """What it always says, `[d_out]`; none where that depends on the input (see `affine`)."""
        return None if self._rescales else self.decoder_bias

    @property
    def _rescales(self) -> bool:
        return self.input_norm is not None and not self.is_transcoder

    def __repr__(self) -> str:
        return f"Dictionary({self.name}: {self.n_features:,} features of {self.reads}, {self.activation})"

    def parts(self, features: Sequence[int] | None = None) -> Parts:
        """Into what it divides a component. Raises `CircuitGraphError` for features that it does not have."""
        chosen = tuple(range(self.n_features)) if features is None else tuple(int(feature) for feature in features)
        if beyond := [feature for feature in chosen if not 0 <= feature < self.n_features]:
            raise CircuitGraphError(f"{self.name} has no feature {beyond[0]}; it has {self.n_features:,}, from 0")
        return Parts(chosen, has_skip=self.skip is not None or self._rescales, has_readers=self.is_transcoder)

    def prefix(self, n: int) -> Dictionary:
        """The first `n` features alone: a level of a Matryoshka dictionary (Bussmann et al. 2025). Raises `CircuitGraphError`."""
        if not 0 < n <= self.n_features or self.activation == "topk":
            raise CircuitGraphError(
                f"{self.name}: no prefix of {n} features; expected 1 to {self.n_features:,}, and another activation than topk"
            )
        cut = {field: getattr(self, field) for field in ("encoder_bias", "threshold", "magnitude_scale", "magnitude_bias")}
        cut = {field: None if values is None else values[:n] for field, values in cut.items()}
        cut["later"] = None if self.later is None else self.later[:, :n]
        return replace(self, encoder=self.encoder[:, :n], decoder=self.decoder[:n], name=f"{self.name}[:{n}]", **cut)

    def on(self, put: Callable[[ndarray], Array]) -> Dictionary:
        """The same with every array put where `put` puts it."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: put(value) for name, value in arrays.items() if isinstance(value, np.ndarray)})

    def sha256(self) -> str:
        """Over the arrays and how they are used, whatever the name."""
        digest = hashlib.sha256()
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                digest.update(f"{field.name} {value.shape} ".encode())
                for part in value if value.ndim > 2 else (value,):  # rows for later MLPs are many, and may be mapped from a file
                    digest.update(np.ascontiguousarray(part, dtype="<f8").tobytes())
            elif field.name not in ("name", "model", "layer"):
                digest.update(f"{field.name} {value!r} ".encode())
        return digest.hexdigest()

    def encode(self, x: Array, features: Any = slice(None)) -> Array:
        """What some features are at `x` `[..., d_in]`."""
        return self.gates(x, features) * self.magnitudes(x, features)

    def decode(self, x: Array, f: Array) -> Array:
        """The reconstruction of `x` by all features, of a cross-layer transcoder by those of its own layer alone."""
        scale, affine = self.output_scale(x), self.affine(x)
        said = f @ self.decoder if scale is None else (f @ self.decoder) * scale
        said = said if affine is None else said + affine
        return said if self.constant is None else said + self.constant

    def rows(self, features: Any = slice(None)) -> ndarray:
        """What some features add at activation 1 to everything that they write to, `[features, d_out]`."""
        rows: ndarray = self.decoder[features]
        for later in () if self.later is None else self.later:
            rows = rows + _wide(later[features])
        return rows

    @property
    def loudness(self) -> ndarray:
        """The sum of squares of what each feature says at activation 1, wherever it says it, `[features]`."""
        squares: ndarray = (self.decoder**2).sum(1)
        for later in () if self.later is None else self.later:
            squares = squares + (_wide(later) ** 2).sum(1)
        return squares

    def gates(self, x: Array, features: Any = slice(None)) -> Array:
        """1 where a feature is active, 0 where it is not."""
        xp = _namespace(x)
        y = self._seen(x)
        if self.activation == "topk":
            y = y @ self.encoder + self.encoder_bias
            least = xp.sort(y, axis=-1)[..., -self.k :][..., :1]  # type: ignore[operator]
            is_on = (y >= least) & (y > 0)
            return xp.astype(is_on, x.dtype)[..., features]
        y = y @ self.encoder[:, features] + self.encoder_bias[features]
        if self.activation == "jumprelu":
            assert self.threshold is not None
            threshold = self.threshold[features]
            return xp.astype((y > threshold) & (y > 0), x.dtype)
        return xp.astype(y > 0, x.dtype)

    def magnitudes(self, x: Array, features: Any = slice(None)) -> Array:
        """What features are where they are active."""
        xp, pre = _namespace(x), self._seen(x) @ self.encoder[:, features]
        if self.activation != "gated":
            return pre + self.encoder_bias[features]
        assert self.magnitude_scale is not None
        assert self.magnitude_bias is not None
        pre = pre * self.magnitude_scale[features] + self.magnitude_bias[features]
        return xp.maximum(pre, xp.zeros_like(pre))

    def output_scale(self, x: Array) -> Array | None:
        """By what the decoded features are multiplied, `[..., 1]`; none for 1."""
        return self._norm(x)[1] if self._rescales else None

    def affine(self, x: Array) -> Array | None:
        """What it says beside features and constant, `[..., d_out]`: a skip, or what undoing the norm adds; none if neither."""
        if self.skip is not None:
            return x @ self.skip.T
        if not self._rescales:
            return None
        _, scale, shift = self._norm(x)
        return self.decoder_bias * scale + shift

    def _seen(self, x: Array) -> Array:
        """What the encoder is multiplied with."""
        y = x if self.input_norm is None else self._norm(x)[0]
        return y - self.decoder_bias if self.is_centred else y

    def _norm(self, x: Array) -> tuple[Array, Array, Array | float]:
        """The normed input, and the scale and shift that undo it."""
        xp = _namespace(x)
        if self.input_norm == "constant_norm_rescale":
            scale = xp.sqrt(xp.sum(x * x, axis=-1, keepdims=True)) / self.d_in**0.5
            return x / scale, scale, 0.0
        mean = xp.mean(x, axis=-1, keepdims=True)
        centred = x - mean
        std = xp.sqrt(xp.sum(centred * centred, axis=-1, keepdims=True) / (self.d_in - 1))
        return centred / (std + _LAYER_NORM_EPS), std, mean


@dataclass(frozen=True)
class Neurons:
    """The neurons of an MLP as features: the identity in place of a dictionary. A neuron's activation is what the MLP's last weights read.

    `n_features`: how many the MLP has; where all of them become nodes, there is no error.
    """

    n_features: int | None = None
    name: str = "neurons"
    reads: Literal["neurons"] = "neurons"
    component: ComponentKind = "m"
    is_transcoder: bool = False
    layer: int | None = None
    model: str | None = None

    def parts(self, features: Sequence[int]) -> Parts:
        return Parts(tuple(int(feature) for feature in features), kind="neuron", has_error=len(features) != self.n_features)


def _wide(rows: ndarray) -> ndarray:
    """Rows for later MLPs, whatever their numbers are in the file."""
    return np.asarray(rows, dtype=np.float64)


def _size(name: str, field: str, array: Array) -> tuple[int, int]:
    if len(array.shape) != 2:
        raise CircuitGraphError(f"{name}: {field} has shape {tuple(array.shape)}; expected a matrix")
    return int(array.shape[0]), int(array.shape[1])


def _namespace(x: Array) -> Any:
    import array_api_compat

    return array_api_compat.array_namespace(x)
