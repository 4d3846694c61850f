"""`OutputEngine`: `F` of a mask over all that a model puts out, at every position, where `ReferenceEngine` asks for the last one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np

from circuitgraph._engine import EXACT, Rule, WriterValues, check_gradient
from circuitgraph._errors import CircuitGraphError, unknown_name
from circuitgraph._graph import Graph
from circuitgraph._names import Edge, Reader
from circuitgraph.testing._reference_model import ReferenceModel
from circuitgraph.testing._reference_run import masked_run

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy import ndarray

    Tokens = Int[ndarray, "prompts position"]
    Values = Float[ndarray, "prompts writers position d_model"]
    Outputs = Float[ndarray, "prompts position outputs"]

Ablation = Literal["zero", "corrupted"]
STEP = 1e-4  # of central differences, in a mask


@dataclass(frozen=True)
class OutputDistance:
    """Mean squared difference of two runs' outputs, over positions and outputs: what Conmy et al. 2023 ask of Tracr models."""

    name: ClassVar[str] = "output_distance"
    higher_is_better: ClassVar[bool] = False
    full_vocabulary: ClassVar[bool] = True
    is_differentiable: ClassVar[bool] = True
    flat_at_clean: ClassVar[bool] = True
    needs_wrong_answers: ClassVar[bool] = False

    def __call__(self, logits: Any, target: Any) -> Any:
        """Both `[prompts, position, outputs]`; one number per prompt."""
        return ((logits - target) ** 2).mean(axis=(-2, -1))


@dataclass(frozen=True, eq=False)
class OutputEngine:
    """A model, prompts of one length, and what patched writers say: nothing ("zero"), or what they say in the corrupted prompts.

    The first position, that of BOS, is left out. `graph`: the model's, or less of it, and then no reader hears the rest. What asks for `F`
    or for its exact gradient can ask this engine: `ACDC`, `SubnetworkProbing`, `Scale`.
    Raises `UnknownNameError` for another ablation.
    """

    model: ReferenceModel
    graph: Graph
    clean: Tokens
    corrupted: Tokens
    ablation: Ablation
    metric: OutputDistance = OutputDistance()
    spans: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.ablation not in get_args(Ablation):
            raise unknown_name("ablation", self.ablation, get_args(Ablation))

    @property
    def n_prompts(self) -> int:
        return len(self.clean)

    def evaluate(
        self, masks: Float[ndarray, "lanes readers writers"], *, source: WriterValues | None = None
    ) -> Float[ndarray, "lanes prompts"]:
        """How far the outputs under each mask are from the model's own, by the metric."""
        values = self.source if source is None else np.stack([source[i] for i in range(self.n_prompts)])
        return np.stack([self.metric(self._outputs(self.said, mask, values), self.plain) for mask in np.asarray(masks, dtype=float)])

    def gradient(
        self,
        mask: Float[ndarray, "readers writers"],
        *,
        source: WriterValues | None = None,
        mix: float | Sequence[float] = 1.0,
        rule: Rule = EXACT,
    ) -> Float[ndarray, "prompts readers writers"]:
        """`dF/dm` by central differences, edge by edge. Raises `CircuitGraphError` for a mix or a rule."""
        if mix != 1.0 or rule != EXACT:
            raise CircuitGraphError("outputs: their gradient is that of the run itself, exactly; leave out mix and rule")
        check_gradient(self.metric, mask, self.graph)
        slopes = np.zeros((self.n_prompts, *self.graph.shape))
        for r, w in np.argwhere(self.graph.visible):
            moved = np.repeat(np.asarray(mask, dtype=float)[None], 2, axis=0)
            moved[:, r, w] += (STEP, -STEP)
            up, down = self.evaluate(moved, source=source)
            slopes[:, r, w] = (up - down) / (2 * STEP)
        return slopes

    def change_without(self, edge: Edge | str) -> float:
        """The largest change where this edge alone is patched."""
        mask = np.ones(self.graph.shape)
        mask[self.graph.edge_id(edge)] = 0
        return self.change(mask)

    def change(self, mask: Float[ndarray, "readers writers"]) -> float:
        """The largest change of any output, at any position of any prompt."""
        return float(np.abs(self._outputs(self.said, np.asarray(mask, dtype=float), self.source) - self.plain).max())

    @cached_property
    def said(self) -> Values:
        """What the inputs say: the embeddings."""
        return self.model.inputs(self.clean)

    @cached_property
    def plain(self) -> Outputs:
        """The model's own outputs."""
        return self.model.forward(self.clean)[:, 1:]

    @cached_property
    def source(self) -> Values:
        """What every writer says where it is patched."""
        said, ones = self.model.inputs(self.corrupted), np.ones(self.graph.shape)
        nothing = np.zeros((len(said), len(self.graph.writers), *said.shape[2:]))
        return nothing if self.ablation == "zero" else masked_run(self.model, self.graph, said, ones[None], nothing).values

    def _outputs(self, said: Values, mask: Float[ndarray, "readers writers"], source: Values) -> Outputs:
        run = masked_run(self.model, self.graph, said, mask[None], source)
        return self.model.unembed(run.heard[Reader("logits")])[:, 1:]
