"""`benchmark`: algorithms x tasks x models, measured alike, into one table that can be interrupted and taken up again."""

from __future__ import annotations

import hashlib
import json
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuitgraph import _discover, _plugins
from circuitgraph._circuit import Circuit
from circuitgraph._engine import Algorithm, Source, SourceKind, TracedModel
from circuitgraph._errors import CircuitGraphError, FileError, whole_number
from circuitgraph._remembered import Answers, RememberedEngine
from circuitgraph.algorithms import Magnitude, Random
from circuitgraph.evaluation._agreement import matched
from circuitgraph.evaluation._curve import MIB_GRID, Curve, FaithfulnessCurve
from circuitgraph.evaluation._question import Question, digest, pose
from circuitgraph.evaluation._scale import Scale, scale_of
from circuitgraph.files import parse_json, read_bytes, write_bytes

if TYPE_CHECKING:
    from circuitgraph._task import Task

SCHEMA = 1
BASELINES: Mapping[str, Algorithm] = {"random": Random(), "magnitude": Magnitude()}
SHOWN = (0.01, 0.05, 0.2)
"""The fractions of the edges whose faithfulness is a column of the table; a result holds the whole grid of MIB."""

_PLAIN_RUNS = 3


@dataclass(frozen=True)
class Result:
    """One cell: what an algorithm's scores are worth on prompts that it has not seen.

    `faithfulness` is by fraction of the edges, for the ranking by |score|; `kept` the edges that the algorithm itself chose, if it did, and
    `kept_faithfulness` theirs. `cpr` and `cmd` as in `FaithfulnessCurve`. `auroc` of the edges against a reference circuit, where there is
    one. `seconds` is the algorithm alone, `forwards` the same in plain forward passes of the same prompts. `refused` says why there is no
    number: this algorithm has no answer to this question.
    """

    model: str
    task: str
    algorithm: str
    key: str
    edges: int
    refused: str | None = None
    kept: int | None = None
    kept_faithfulness: float | None = None
    faithfulness: Mapping[str, float] = field(default_factory=dict)
    cpr: float | None = None
    cmd: float | None = None
    cpr_log: float | None = None
    cmd_log: float | None = None
    auroc: float | None = None
    seconds: float | None = None
    forwards: float | None = None
    protocol: Mapping[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    def row(self) -> tuple[str, ...]:
        """The cells of a table."""
        name = (self.model, self.task, self.algorithm)
        if self.refused is not None:
            return (*name, *("-" for _ in _COLUMNS[3:]))
        shown = (_text(self.faithfulness.get(_fraction(x))) for x in SHOWN)
        own = "" if self.kept is None else f"{self.kept} ({_text(self.kept_faithfulness)})"
        areas = (_text(value) for value in (self.cpr, self.cmd, self.cpr_log, self.cmd_log, self.auroc))
        return (*name, *shown, own, *areas, _text(self.seconds, ".1f"), _text(self.forwards, ".1f"))


_COLUMNS = (
    *("model", "task", "algorithm", *(f"f at {x:.0%}" for x in SHOWN), "own edges (f)"),
    *("CPR", "CMD", "CPR log", "CMD log", "AUROC", "seconds", "forwards"),
)


@dataclass(frozen=True)
class Benchmark:
    """The results, by model, task and algorithm in the order asked for."""

    results: tuple[Result, ...]

    def to_markdown(self) -> str:
        """A table, and why some of its cells are empty."""
        rows = [_COLUMNS, ("---",) * len(_COLUMNS), *(result.row() for result in self.results)]
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        refused = [f"- {r.algorithm} on {r.model}, {r.task}: {r.refused}" for r in self.results if r.refused is not None]
        return table + ("\n\nNo answer:\n\n" + "\n".join(refused) if refused else "") + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {"schema": SCHEMA, "results": [asdict(result) for result in self.results]}

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def __str__(self) -> str:
        return self.to_markdown()


def benchmark(
    models: Sequence[Any],
    tasks: Sequence[Task | str | Path],
    algorithms: Mapping[str, Algorithm],
    *,
    folder: str | Path,
    prompts: int = 32,
    test_prompts: int | None = None,
    seed: int = 0,
    source: Source | SourceKind = "corrupted",
    references: Mapping[str, Circuit] | None = None,
    trace: Callable[[Any], TracedModel] = _plugins.traced,
    progress: Callable[[float, str], None] | None = None,
) -> Benchmark:
    """Run every algorithm on every task and model, and measure all in the same way.

    Discovery sees `prompts` of the task drawn by `seed`; the numbers are of `test_prompts` (default: as many) drawn by the next seed.
    Random and magnitude scores are always in it. `references`: published circuits by task; each counts for the models that have its
    graph. `trace` makes a traced model of what `models` holds.

    Every finished cell is a file in `folder`, and the table is `table.md` and `table.json` there; when it is run again, cells that were
    asked in exactly the same way are read, not repeated, and one that was interrupted after a minute or more goes on with the answers that
    its engine had given. What an algorithm refuses is a cell that says so.
    """
    whole_number("benchmark: prompts", prompts, 1)
    folder, chosen = Path(folder), {**BASELINES, **algorithms}
    asked = [(model, task, name) for model in models for task in tasks for name in chosen]
    if not asked:
        raise CircuitGraphError("benchmark: there is no model or no task; expected at least one of each")
    results: list[Result] = []
    tell = progress or (lambda fraction, text: None)
    for model in models:
        traced = trace(model)
        for task in tasks:
            train = pose(traced, task, prompts=prompts, seed=seed, source=source)
            test = pose(traced, task, prompts=test_prompts or prompts, seed=seed + 1, source=train.source)
            cells = _Cells(train, test, scale_of(test, traced.graph), _reference(references or {}, train), folder)
            for name, algorithm in chosen.items():
                tell(len(results) / len(asked), f"{name} on {traced.name}, {train.task_name}")
                results.append(cells.result(name, algorithm))
    table = Benchmark(tuple(results))
    write_bytes(folder / "table.md", table.to_markdown().encode())
    write_bytes(folder / "table.json", (table.to_json() + "\n").encode())
    return table


def known_results(folder: str | Path) -> Benchmark:
    """The cells that earlier runs left in a folder, by file name; none where there is no folder. Raises `FileError`."""
    files = sorted(path for path in Path(folder).glob("*.json") if path.name != "table.json")
    return Benchmark(tuple(result for path in files if (result := _read(path)) is not None))


def _reference(references: Mapping[str, Circuit], question: Question) -> Circuit | None:
    found = references.get(question.task_name)
    return found if found is not None and found.graph == question.traced.graph else None


@dataclass
class _Cells:
    """All algorithms on one task and model."""

    train: Question
    test: Question
    scale: Scale
    reference: Circuit | None
    folder: Path
    plain: float | None = None

    @property
    def traced(self) -> TracedModel:
        return self.train.traced

    def result(self, name: str, algorithm: Algorithm) -> Result:
        """From its file, or made and written."""
        key = self._key(algorithm)
        slug = "--".join(re.sub(r"[^A-Za-z0-9._-]+", "-", part).strip("-") for part in (self.traced.name, self.train.task_name, name))
        path = self.folder / f"{slug}.json"
        known = _read(path)
        if known is None or known.key != key or known.algorithm != name:
            answers = Answers(path.with_suffix(".safetensors"), key)
            known = self._made(name, algorithm, key, answers)
            self.folder.mkdir(parents=True, exist_ok=True)
            write_bytes(path, (json.dumps(asdict(known), indent=1, allow_nan=False) + "\n").encode())
            answers.forget()
        return known

    def _key(self, algorithm: Algorithm) -> str:
        """A hash of everything that the numbers depend on."""
        model = {name: value for name, value in self.traced.provenance.items() if name != "versions"}
        asked = [self.train.task_digest, digest(self.train.pairs), self.train.metric.name, self.scale.protocol.to_dict()]
        reference = None if self.reference is None else hashlib.sha256(self.reference.mask.tobytes()).hexdigest()
        parts = [SCHEMA, self.traced.name, model, asked, _discover.described(algorithm), reference]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()

    def _made(self, name: str, algorithm: Algorithm, key: str, answers: Answers) -> Result:
        cell: dict[str, Any] = {"model": self.traced.name, "task": self.train.task_name, "algorithm": name, "key": key}
        cell["edges"] = self.traced.graph.n_edges
        try:
            return Result(**cell, **self._measured(algorithm, answers))
        except CircuitGraphError as error:
            return Result(**cell, refused=str(error))

    def _measured(self, algorithm: Algorithm, answers: Answers) -> dict[str, Any]:
        metric = getattr(algorithm, "default_metric", None) or self.train.metric
        engine = self.traced.bind(self.train.pairs, metric, self.train.source)  # a fresh one: nothing is cached for the next algorithm
        answers.start(self._plain_forward())
        outcome = _discover.outcome_of(algorithm, RememberedEngine(engine, answers))
        spent = answers.spent
        if outcome.scores is None:
            raise CircuitGraphError(f"{type(algorithm).__name__} gives no scores, so its edges cannot be ranked")
        if outcome.graph is not None and outcome.graph != self.traced.graph:
            raise CircuitGraphError(f"{type(algorithm).__name__} splits its edges by position; its sizes are not those of the others")
        circuit = Circuit(self.traced.graph, outcome.mask, outcome.scores)
        curve = Curve().measure(self.scale, circuit)
        own = {} if circuit.n_edges == circuit.graph.n_edges else self._own(circuit)
        return {
            **own,
            "faithfulness": _by_fraction(curve, circuit.graph.n_edges),
            **{area: getattr(curve, area).value for area in ("cpr", "cmd", "cpr_log", "cmd_log")},
            "auroc": None if self.reference is None else matched(circuit, self.reference).edges.auroc,
            **asdict(spent),
            "protocol": self.scale.protocol.to_dict(),
        }

    def _own(self, circuit: Circuit) -> dict[str, Any]:
        return {"kept": circuit.n_edges, "kept_faithfulness": self.scale.faithfulness(circuit.mask).value}

    def _plain_forward(self) -> float:
        """Seconds of the untouched model on the prompts of discovery, warm."""
        if self.plain is None:
            times = []
            for _ in range(1 + _PLAIN_RUNS):
                started = time.perf_counter()
                self.traced.logits(self.train.pairs)
                times.append(time.perf_counter() - started)
            self.plain = statistics.median(times[1:])
        return self.plain


def _by_fraction(curve: FaithfulnessCurve, n_edges: int) -> dict[str, float]:
    """Faithfulness at each size of the grid that the graph has."""
    values = {point.edges: point.faithfulness.value for point in curve.absolute}
    return {_fraction(x): values[int(x * n_edges)] for x in MIB_GRID if int(x * n_edges)}


def _read(path: Path) -> Result | None:
    """A cell that an earlier run wrote. Raises `FileError` for a file that is none."""
    if not path.exists():
        return None
    from pydantic import TypeAdapter, ValidationError

    try:
        found: Result = TypeAdapter(Result).validate_python(parse_json(read_bytes(path, "benchmark result"), path))
    except ValidationError as error:
        raise FileError(f"{path} is not a result of circuitgraph benchmark; remove it, or choose another folder") from error
    return found


def _fraction(x: float) -> str:
    return f"{x:g}"


def _text(value: float | None, form: str = ".3f") -> str:
    return "" if value is None else f"{value:{form}}"
