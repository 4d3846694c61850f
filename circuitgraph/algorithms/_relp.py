"""Relevance patching."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from circuitgraph._engine import RELP, Engine, Outcome
from circuitgraph.algorithms._eap import attributed


@dataclass(frozen=True)
class RelP:
    """EAP with the gradient replaced by layer-wise relevance propagation (Jafari et al. 2025, arXiv:2508.21258).

        score[r, w] = s * mean over prompts of <R_r, live_w - source_w>

    `R_r` is `dF/dx_r` at `m = 1` by other rules on the way back: the scale of every norm and every attention pattern is a constant,
    act(x) / x stands for act'(x), and each of two multiplied branches of a gated MLP takes half. The forward run is the model's own. `s`
    is 1 for a metric where higher is better and -1 where lower is, so a positive score supports the behaviour. Where the model is linear,
    so is every rule, and RelP is EAP.

    Edges into queries and keys score 0, because the patterns are constants: RelP sees what moves along attention, not what steers it.

    Cost: that of EAP, one forward pass of the source, one forward and one backward of the clean prompts. Raises `DegenerateError` as EAP
    does.

    >>> from circuitgraph._pairs import PromptPairs
    >>> from circuitgraph.testing import ReferenceModel
    >>> pairs = PromptPairs(clean=[[5, 6, 7]], corrupted=[[5, 9, 7]], answers=[6], wrong_answers=[9])
    >>> engine = ReferenceModel.random(seed=0, n_layers=1).bind(pairs, "logit_diff")
    >>> float(RelP().run(engine).scores[engine.graph.edge_id("input->a0.h0<q>")])
    0.0
    """

    def run(self, engine: Engine) -> Outcome:
        return attributed(engine, engine.gradient(engine.graph.visible.astype(np.float32), rule=RELP))
