"""A trained model with a known circuit: dense weights, which strict interchange-intervention training (Gupta et al. 2024) made do three
steps in three components. The weights are a data file, made by `scripts/train_siit.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from circuitgraph._circuit import Circuit
from circuitgraph._engine import TracedModel
from circuitgraph._graph import Graph
from circuitgraph._pairs import PromptPairs
from circuitgraph._tensors import read_tensors
from circuitgraph.algorithms import ActivationPatching
from circuitgraph.testing._reference_model import ReferenceModel
from circuitgraph.testing._reference_parts import ReferenceAttention, ReferenceLayer, ReferenceMLP, ReferenceNorm
from circuitgraph.testing._tagged_values import TaggedValues

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy import ndarray

FOLDER = Path(__file__).parent / "trained" / "tagged_values"
ABOUT = "about.json"

FLOOR = 0.4
"""The least effect of an edge that the high-level model names, as a share of `F(1) - F(0)`."""

CEILING = 0.005
"""The most effect of an edge into or out of an unmapped component."""

UNNAMED_CEILING = 0.02
"""The most effect of an edge between mapped components that the high-level model does not name."""


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """A Llama of 3 layers with 4 heads, and the three components that do its task.

    `model`: the weights, in numpy. `mapped`: the component that each step of `task` was trained into. `measured`: what the
    training script measured on fresh prompts.

    >>> trained = trained_model()
    >>> trained.mapped
    {'tag': 'a0.h1', 'value': 'a1.h2', 'answer': 'm2'}
    >>> [edge.name for edge in trained.circuit.edges]
    ['input->a0.h1<v>', 'input->a1.h2<q>', 'a0.h1->a1.h2<k>', 'input->a1.h2<v>', 'a1.h2->m2', 'm2->logits']
    """

    model: ReferenceModel
    task: TaggedValues
    mapped: Mapping[str, str]
    measured: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """The model in Hugging Face format, for `trace`."""
        return FOLDER

    @property
    def graph(self) -> Graph:
        return self.model.graph()

    @cached_property
    def module(self) -> Any:
        """The same as a Hugging Face module of PyTorch, a `LlamaForCausalLM` in float32."""
        from circuitgraph.testing._module import module_in

        return module_in(self.folder)

    def pairs(self, prompts: int = 32, seed: int = 0) -> PromptPairs:
        """Fresh prompts, each with a corrupted one in which another token of its kind stands everywhere."""
        return self.task.pairs(prompts, seed)

    def traced(self, backend: str = "torch", **options: Any) -> TracedModel:
        """Traced by a backend, or as the numpy reference: "reference"."""
        if backend == "reference":
            return self.model.traced(**options)
        from circuitgraph._plugins import traced

        return traced(str(self.folder), backend=backend, **options)

    @property
    def named(self) -> frozenset[str]:
        """The edges along which the high-level model's steps hear of each other, and of what differs from prompt to prompt.

        Where `tag` looks is a matter of place, which all prompts share: no edge for its query and key.
        """
        tag, value, answer = (self.mapped[step] for step in ("tag", "value", "answer"))
        into_value = (f"input->{value}<q>", f"{tag}->{value}<k>", f"input->{value}<v>")
        return frozenset({f"input->{tag}<v>", *into_value, f"{value}->{answer}", f"{answer}->logits"})

    @property
    def unnamed(self) -> frozenset[str]:
        """The other edges between the input, mapped components and the logits. Interchange of whole components speaks of none of them by
        itself: the training could let two of them make up for each other."""
        parts = {"input", "logits", *self.mapped.values()}
        between = {edge.name for edge in self.graph.edges if edge.writer.node in parts and edge.reader.name.partition("<")[0] in parts}
        return frozenset(between - self.named)

    @property
    def circuit(self) -> Circuit:
        """The named edges."""
        mask = np.zeros(self.graph.shape, dtype=bool)
        for name in self.named:
            mask[self.graph.edge_id(name)] = True
        return Circuit(self.graph, mask, provenance={"trained": self.model.name})

    def effects(self, prompts: int = 32, seed: int = 0, *, backend: str = "torch") -> Float[ndarray, "readers writers"]:
        """What patching each edge alone takes from the logit difference, as a share of `F(1) - F(0)`."""
        engine = self.traced(backend).bind(self.pairs(prompts, seed), "logit_diff")
        ends = np.asarray(engine.evaluate(np.stack([np.ones(self.graph.shape), np.zeros(self.graph.shape)]).astype(np.float32)))
        full, empty = ends.mean(axis=1)
        scores = ActivationPatching().run(engine).scores
        return np.asarray(scores) / float(full - empty)


@cache
def trained_model() -> TrainedModel:
    """The trained model of the package."""
    about = json.loads((FOLDER / ABOUT).read_text(encoding="utf-8"))
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    weights = {name: values.astype(np.float64) for name, values in read_tensors(FOLDER).items()}
    return TrainedModel(_model(weights, config), TaggedValues(), about["mapped"], about.get("measured", {}))


def _model(weights: Mapping[str, ndarray], config: Mapping[str, Any]) -> ReferenceModel:
    """The arrays of a Llama without grouped keys and values, as `ReferenceModel` wants them."""
    n_heads, base = config["num_attention_heads"], float(config["rope_parameters"]["rope_theta"])

    def norm(at: str) -> ReferenceNorm:
        return ReferenceNorm(weights[f"{at}.weight"], kind="rms", eps=config["rms_norm_eps"])

    def layer(at: str) -> ReferenceLayer:
        q, k, v = (weights[f"{at}.self_attn.{part}_proj.weight"].reshape(n_heads, -1, config["hidden_size"]) for part in "qkv")
        o = weights[f"{at}.self_attn.o_proj.weight"].reshape(config["hidden_size"], n_heads, -1).swapaxes(0, 1)
        up, down, gate = (weights[f"{at}.mlp.{part}_proj.weight"] for part in ("up", "down", "gate"))
        return ReferenceLayer(
            ReferenceAttention(q, k, v, o, norm=norm(f"{at}.input_layernorm"), rotary_base=base),
            ReferenceMLP(up, down, "silu", gate, norm=norm(f"{at}.post_attention_layernorm")),
        )

    layers = tuple(layer(f"model.layers.{i}") for i in range(config["num_hidden_layers"]))
    return ReferenceModel(
        weights["model.embed_tokens.weight"], layers, weights["lm_head.weight"], final_norm=norm("model.norm"), name=FOLDER.name
    )
