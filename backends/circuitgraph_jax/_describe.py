"""`describe`: from a Hugging Face configuration and the shapes of the tensors to a complete `Architecture`, without torch.

The model's family says what its modules are called and what they compute. From that, every tensor of the model is predicted; one that is
missing, has another shape or is left over means that the model is not what its family says, and is an error that names it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from circuitgraph._architecture import MLP, Architecture, Attention, AttentionPattern, Block, FeedForward, Norm, Projection
from circuitgraph._errors import TraceError, near_names
from circuitgraph_jax._families import FAMILIES, LACKING
from circuitgraph_jax._family import ACTIVATIONS, Activation, Bias, Family, Layout, Settings
from circuitgraph_jax._rotary import WAY_OUT

Shape = tuple[int, ...]

_BUFFERS = re.compile(r"\.(inv_freq|masked_bias|attn\.bias|attention\.bias)$")
"""Masks and rotary frequencies that old checkpoints carry along; they follow from the configuration."""

_ROUTER = re.compile(r"^(.*\.(?:gate|router))\.(?:\w+\.)*weight$")


def describe(config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> Architecture:
    """The whole description of a decoder: its wiring, attention patterns and feed-forwards.

    `config` is what `transformers.AutoConfig.from_pretrained(...).to_dict()` gives; `shapes` has the shape of every tensor by its name in
    the module's `state_dict()`. An unembedding that is tied to the embedding may be left out of `shapes`.
    Raises `TraceError` that names the joint for anything the table of families does not know.
    """
    _refuse(config, shapes)
    settings, family = _family(config)
    return _Describer(settings, family, _Tensors(shapes, family)).architecture()


def embedding_path(config: Mapping[str, Any]) -> str:
    """Where the description of such a model will have its token embedding. Raises `TraceError` for a family that is not known."""
    _refuse(config, {})
    _, family = _family(config)
    return f"{family.root}.{family.embedding}"


def _family(config: Mapping[str, Any]) -> tuple[Settings, Family]:
    kind = str(config.get("model_type"))
    if kind in LACKING:
        joint, what = LACKING[kind]
        raise TraceError(f"{joint}: {what} is a joint that the JAX backend does not have yet; {WAY_OUT}")
    if kind not in FAMILIES:
        raise _unknown_family(kind)
    settings = Settings(config.get("text_config") or config)
    settings.refuse("use_bidirectional_attention", "an attention that looks ahead", "model.layers.0.self_attn")
    settings.refuse("clip_qkv", "a clipping of queries, keys and values", "model.layers.0.self_attn")
    return settings, FAMILIES[kind](settings)


def _refuse(config: Mapping[str, Any], shapes: Mapping[str, Shape]) -> None:
    """What no family can be, whatever its name."""
    kind = config.get("model_type")
    if config.get("is_encoder_decoder"):
        raise TraceError(f"{kind} is an encoder-decoder, with two streams; circuitgraph traces decoder-only models")
    if config.get("quantization_config"):
        raise TraceError(
            f"the weights of this {kind} model are quantised; the JAX backend reads plain floats; load it unquantised, or "
            f"use backend='torch'"
        )
    has_experts = any("experts" in name for name in shapes)
    for name in shapes if has_experts else ():
        if router := _ROUTER.match(name):
            raise TraceError(
                f"{router[1]}: a mixture-of-experts router is a joint that the JAX backend does not have yet; use backend='torch'"
            )


def _unknown_family(kind: str) -> TraceError:
    hint = near_names(kind, FAMILIES)
    question = f"{hint} If not, " if hint else ""
    known = ", ".join(FAMILIES)
    return TraceError(f"model_type {kind!r} is not among the families that the JAX backend knows ({known}); {question}{WAY_OUT}")


_CHECK = f"check that config and tensors are of one model, or {WAY_OUT}"


class _Tensors:
    """The tensors of a model, against those that its description predicts."""

    def __init__(self, shapes: Mapping[str, Shape], family: Family) -> None:
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.family = family
        self._predicted: set[str] = set()

    def expect(self, module: str, tensor: str, shape: Shape) -> None:
        """Raises `TraceError` if the module has no such tensor, or one of another shape."""
        found = self._shape(module, tensor)
        if found != shape:
            raise TraceError(f"{module}: its {tensor} has the shape {list(found)}; by the config it is {list(shape)}; {_CHECK}")
        self._predicted.add(f"{module}.{tensor}")

    def size(self, module: str, axis: int) -> int:
        """How large an axis of a module's weight is, where the config leaves that open."""
        return (*self._shape(module, "weight"), 0, 0)[axis]

    def _shape(self, module: str, tensor: str) -> Shape:
        if (shape := self.shapes.get(f"{module}.{tensor}")) is None:
            raise TraceError(f"{module}: there is no tensor '{module}.{tensor}'; {_CHECK}")
        return shape

    def linear(self, module: str, outputs: int, inputs: int, kind: Bias) -> str:
        """Expect a linear module; its path."""
        self.expect(module, "weight", (inputs, outputs) if self.family.is_transposed else (outputs, inputs))
        if kind in self.family.biases:
            self.expect(module, "bias", (outputs,))
        return module

    def settle(self) -> None:
        """Raises `TraceError` for the first tensor that nothing in the description uses."""
        for name in self.shapes:
            if name not in self._predicted and not name.startswith(self.family.others) and not _BUFFERS.search(name):
                module = name.rpartition(".")[0]
                raise TraceError(
                    f"{module}: the tensor {name!r}, of shape {list(self.shapes[name])}, belongs to no joint that the JAX backend knows in "
                    f"such a model; {_CHECK}"
                )


class _Describer:
    """Puts the description together, block by block."""

    def __init__(self, config: Settings, family: Family, tensors: _Tensors) -> None:
        self.config, self.family, self.tensors = config, family, tensors

    def architecture(self) -> Architecture:
        config, family = self.config, self.family
        blocks = tuple(self._block(f"{family.root}.{family.blocks}.{layer}", family.patterns[layer]) for layer in range(config.n_layers))
        architecture = Architecture(
            family=config.model_type,
            d_model=config.d_model,
            vocabulary=config["vocab_size"],
            embedding=self._embedding(),
            blocks=blocks,
            final_norm=self._norm(family.root, family.final_norm),
            unembedding=self._unembedding(),
            embedding_scale=family.embedding_scale,
            positions=self._positions(),
            logit_scale=family.logit_scale,
            logit_softcap=family.logit_softcap,
            first_position=family.first_position,
            is_transposed=family.is_transposed,
        )
        self.tensors.settle()
        return architecture

    def _embedding(self) -> str:
        path = f"{self.family.root}.{self.family.embedding}"
        self.tensors.expect(path, "weight", (self.config["vocab_size"], self.config.d_model))
        return path

    def _positions(self) -> str | None:
        if self.family.positions is None:
            return None
        path = f"{self.family.root}.{self.family.positions}"
        self.tensors.expect(path, "weight", (self.tensors.size(path, 0), self.config.d_model))
        return path

    def _unembedding(self) -> str:
        """Its weight may be the embedding's; then the checkpoint may have it once."""
        has_own = "lm_head.weight" in self.tensors.shapes or not self.config.get("tie_word_embeddings")
        if has_own:
            self.tensors.expect("lm_head", "weight", (self.config["vocab_size"], self.config.d_model))
        if "unembedding" in self.family.biases:
            self.tensors.expect("lm_head", "bias", (self.config["vocab_size"],))
        return "lm_head"

    def _norm(self, parent: str, name: str | None) -> Norm | None:
        if name is None:
            return None
        path = f"{parent}.{name}"
        for tensor in self.family.parameters_of_norms:
            self.tensors.expect(path, tensor, (self.config.d_model,))
        return replace(self.family.norm, path=path)

    def _block(self, path: str, pattern: AttentionPattern) -> Block:
        return Block(path, self._attention(path, pattern), self._mlp(path), self.family.is_parallel)

    def _attention(self, block: str, pattern: AttentionPattern) -> Attention:
        family, heads = self.family, self.config.n_heads
        q, k, v = self._projections(block)
        pattern, couples_heads = self._with_qk_norms(block, pattern, q, k)
        return Attention(
            path=f"{block}.{family.attention}",
            q=q,
            k=k,
            v=v,
            o=self.tensors.linear(f"{block}.{family.o}", self.config.d_model, heads * self.config.head_dim, "o"),
            norm=self._norm(block, family.attention_norm),
            post_norm=self._norm(block, family.attention_post_norm),
            scale=family.residual_scale,
            couples_heads=couples_heads,
            pattern=pattern,
        )

    def _projections(self, block: str) -> tuple[Projection, Projection, Projection]:
        heads, size = self.config.n_heads, self.config.head_dim
        groups = self.family.n_groups or heads
        if heads % groups:
            raise TraceError(f"{block}.{self.family.attention}: {groups} key heads cannot be shared evenly by {heads} heads; {_CHECK}")
        places = head_places(self.family.layout, heads, groups)
        paths = [f"{block}.{name}" for name in self.family.qkv]
        widths = [heads, groups, groups] if len(paths) == 3 else [heads + 2 * groups]
        for path, width in zip(paths, widths, strict=True):
            self.tensors.linear(path, width * size, self.config.d_model, "qkv")
        each = paths if len(paths) == 3 else paths * 3
        q, k, v = (Projection(path, size, tuple(size * place for place in part)) for path, part in zip(each, places, strict=True))
        return q, k, v

    def _with_qk_norms(self, block: str, pattern: AttentionPattern, q: Projection, k: Projection) -> tuple[AttentionPattern, bool]:
        """The pattern with its norms, and whether one of them is over all heads at once, which the shape of its weight tells."""
        if self.family.qk_norms is None:
            return pattern, False
        norms, couples_heads = [], False
        for name, part in zip(self.family.qk_norms, (q, k), strict=True):
            path, size, heads = f"{block}.{name}", part.head_dim, part.n_heads
            found = self.tensors.shapes.get(f"{path}.weight")
            shape = found if found in ((heads, size), (heads * size,)) else (size,)
            for tensor in self.family.parameters_of_norms:
                self.tensors.expect(path, tensor, shape)
            couples_heads |= heads > 1 and shape == (heads * size,)
            norms.append(replace(self.family.norm, path=path))
        return replace(pattern, q_norm=norms[0], k_norm=norms[1]), couples_heads

    def _mlp(self, block: str) -> MLP | None:
        """None for an MLP of width 0 without biases, which says nothing; so attention-only models are made."""
        family, d_model = self.family, self.config.d_model
        up, down = f"{block}.{family.up}", f"{block}.{family.down}"
        width = self.tensors.size(down, 0 if family.is_transposed else 1)
        norm, post_norm = self._norm(block, family.mlp_norm), self._norm(block, family.mlp_post_norm)
        self.tensors.linear(down, d_model, width, "mlp")
        is_fused = family.gate == family.up
        self.tensors.linear(up, 2 * width if is_fused else width, d_model, "mlp")
        gate = None
        if family.gate is not None:
            path = up if is_fused else self.tensors.linear(f"{block}.{family.gate}", width, d_model, "mlp")
            gate = Projection(path, width, (0,))
        forward = FeedForward(Projection(up, width, (width if is_fused else 0,)), down, self._activation(block), gate)
        modules = tuple(f"{block}.{name}" for name in family.mlp)
        return MLP(modules, norm, post_norm, family.residual_scale, forward) if width or "mlp" in family.biases else None

    def _activation(self, block: str) -> Activation:
        name = self.family.activation
        if name not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise TraceError(f"{block}.{self.family.mlp[0]}: the activation is {name!r}; expected one of {known}; {WAY_OUT}")
        return ACTIVATIONS[name]


def head_places(layout: Layout, heads: int, groups: int) -> tuple[list[int], list[int], list[int]]:
    """Where the queries, keys and values begin in the rows of their projections, counted in heads.

    >>> head_places("grouped", 4, 2)
    ([0, 1, 4, 5], [2, 6], [3, 7])
    """
    if layout == "separate":
        return list(range(heads)), list(range(groups)), list(range(groups))
    if layout == "concatenated":
        return list(range(heads)), list(range(heads, heads + groups)), list(range(heads + groups, heads + 2 * groups))
    share = heads // groups
    firsts = range(0, groups * (share + 2), share + 2)
    return [first + head for first in firsts for head in range(share)], [f + share for f in firsts], [f + share + 1 for f in firsts]
