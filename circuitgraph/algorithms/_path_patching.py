"""Path patching from senders to a set of receivers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from circuitgraph._engine import Engine, Outcome, last_outcome
from circuitgraph._errors import CircuitGraphError, UnknownNameError
from circuitgraph._graph import Graph
from circuitgraph.algorithms._activation_patching import Direction
from circuitgraph.algorithms._lanes import Lane, Spliced, asked_of, check_runs, evaluate_lanes
from circuitgraph.algorithms._paths import patterns_of

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from numpy import ndarray

Mediator = Literal["head", "mlp"]


@dataclass(frozen=True)
class PathPatching:
    """What the behaviour owes to what each sender tells a set of receivers (Wang et al. 2023, arXiv:2211.00593, appendix B).

        run 1:  the sender says what it says in the source run; all others what they say in the clean run, except that components of the
                kinds in `through` are computed anew from what they now hear. The receivers' inputs are recorded.
        run 2:  the clean run with the receivers' inputs replaced by the recorded ones, and everything after them computed from these.

        score = s * (F(1) - F(run 2))

    `s` is 1 for a metric where higher is better and -1 where lower is, so a positive score supports the behaviour. With `direction=
    "denoising"`, clean and corrupted prompts change places, and the score is `s * (F'(run 2) - F'(1))`: what telling the receivers alone
    restores.

    `receivers`, `senders`: names or patterns of names, such as `a9.h*<q>`, `a0-3.h*`, or `a9.h6` for every input of that head. By default
    every writer that some receiver sees is a sender. `through`: () for the direct path only, ("mlp",) as in the paper, ("head", "mlp")
    for every path. A sender's score stands on each of its edges into the receivers, which are the outcome's mask, and
    `record["senders"]` has it by name. To one receiver directly it is that of the edge in `ActivationPatching`.

    Cost: one forward pass per sender and one more, up to `max_lanes` of them together. `through` anything: two per sender.

    >>> from circuitgraph._pairs import PromptPairs
    >>> from circuitgraph.testing import ReferenceModel
    >>> pairs = PromptPairs(clean=[[5, 6, 7]], corrupted=[[5, 9, 7]], answers=[6], wrong_answers=[9])
    >>> engine = ReferenceModel.random(seed=0, n_layers=2).bind(pairs, "logit_diff")
    >>> list(PathPatching(receivers=("a1.h0<q>", "a1.h1<q>")).run(engine).record["senders"])
    ['input', 'a0.h0', 'a0.h1', 'm0']
    """

    receivers: str | Sequence[str] = "logits"
    senders: str | Sequence[str] = "*"
    through: Sequence[Mediator] = ()
    direction: Direction = "noising"
    max_lanes: int = 64

    def __post_init__(self) -> None:
        patterns_of("path patching: receivers", self.receivers)
        patterns_of("path patching: senders", self.senders)
        if not isinstance(self.through, (tuple, list)) or any(kind not in get_args(Mediator) for kind in self.through):
            raise CircuitGraphError(f"path patching: through is {self.through!r}; expected 'head' or 'mlp' or both, in a tuple")
        check_runs("path patching", self.direction, self.max_lanes)

    def run(self, engine: Engine) -> Outcome:
        return last_outcome(self.steps(engine))

    def steps(self, engine: Engine) -> Iterator[Outcome]:
        """An outcome after every batch of senders; those not yet tried have score 0."""
        graph = engine.graph
        readers = self._receivers_in(graph)
        senders = self._senders_in(graph, readers)
        asked, sign = asked_of(engine, self.direction)
        baseline = np.asarray(asked.evaluate(graph.visible[None].astype(np.float32)), dtype=np.float64)[0]
        edges = graph.visible & readers[:, None] & np.isin(np.arange(len(graph.writers)), senders)
        effects = np.zeros((engine.n_prompts, len(graph.writers)))
        done = 0
        for values in self._patched(asked, readers, senders):
            effects[:, senders[done : done + len(values)]] = sign * (values - baseline).T
            done += len(values)
            scores = np.where(edges, effects.mean(axis=0), 0.0)
            if done < len(senders):
                yield Outcome(edges, scores, done=done / len(senders))
        record = {
            "baseline": float(baseline.mean()),
            "senders": {graph.writers[w].name: float(effects[:, w].mean()) for w in senders},
            "receivers": [graph.readers[r].name for r in np.flatnonzero(readers)],
        }
        yield Outcome(edges, scores, record, prompt_scores=np.where(edges, effects[:, None], 0.0).astype(np.float32))

    def _receivers_in(self, graph: Graph) -> Bool[ndarray, " readers"]:
        readers = np.zeros(len(graph.readers), dtype=bool)
        for pattern in patterns_of("receivers", self.receivers):
            readers[pattern.readers(graph)] = True
        return readers

    def _senders_in(self, graph: Graph, readers: Bool[ndarray, " readers"]) -> list[int]:
        """The senders that a receiver sees. Raises `UnknownNameError` for a name or a pattern that has none."""
        seen = graph.visible[readers].any(axis=0)
        senders: set[int] = set()
        for pattern in patterns_of("senders", self.senders):
            fit = [w for w in pattern.writers(graph) if seen[w]]
            if not fit:
                names = [graph.readers[r].name for r in np.flatnonzero(readers)]
                shown = ", ".join(names if len(names) < 5 else [*names[:4], "..."])
                raise UnknownNameError(f"path patching: no receiver ({shown}) comes after {pattern.text}")
            senders.update(fit)
        return sorted(senders)

    def _patched(
        self, engine: Engine, readers: Bool[ndarray, " readers"], senders: Sequence[int]
    ) -> Iterator[Float[ndarray, "lanes prompts"]]:
        """`F` after run 2 for each sender in turn."""
        graph = engine.graph
        mediators = np.array([writer.kind in self.through for writer in graph.writers])
        moved = _moved_by(graph, readers) & graph.visible[readers].any(axis=0)
        if not mediators.any():
            lanes = (Lane(_recorded(graph, readers, w, moved), w, _without(moved, w)) for w in senders)
            yield from evaluate_lanes(engine, lanes, self.max_lanes)
            return
        clean, source = engine.activations(), engine.source_values()
        for w in senders:
            others = _without(mediators, w)
            run_1 = Spliced(clean, source, np.arange(len(graph.writers)) == w)
            said = engine.activations(_mediated(graph, others, w), source=run_1)
            mask = _recorded(graph, readers, w, others | moved)
            yield np.asarray(engine.evaluate(mask[None], source=Spliced(run_1, said, others)), dtype=np.float64)


def _recorded(
    graph: Graph, readers: Bool[ndarray, " readers"], sender: int, known: Bool[ndarray, " writers"]
) -> Float[ndarray, "readers writers"]:
    """Run 2: the receivers hear the sender, and the writers of which it is `known`, as the source has them. All others say in this run
    what they say in the clean one."""
    mask = graph.visible.astype(np.float32)
    mask[np.ix_(readers, known)] = 0
    mask[readers, sender] = 0
    return mask


def _mediated(graph: Graph, mediators: Bool[ndarray, " writers"], sender: int) -> Float[ndarray, "readers writers"]:
    """Run 1: mediators hear the sender as the source has it and each other live; all others hear the mediators as the source has them."""
    mask = graph.visible.astype(np.float32)
    hearing = (graph.feeds & mediators).any(axis=1)
    mask[np.ix_(~hearing, mediators)] = 0
    mask[hearing, sender] = 0
    return mask


def _moved_by(graph: Graph, readers: Bool[ndarray, " readers"]) -> Bool[ndarray, " writers"]:
    """The writers that change when the inputs of these readers do."""
    moved = np.zeros(len(graph.writers), dtype=bool)
    for r in range(len(graph.readers)):
        if readers[r] or (graph.visible[r] & moved).any():
            moved |= graph.feeds[r]
    return moved


def _without(writers: Bool[ndarray, " writers"], one: int) -> Bool[ndarray, " writers"]:
    rest = writers.copy()
    rest[one] = False
    return rest
