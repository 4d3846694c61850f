"""`check_algorithm`: every algorithm of ours passes, what is broken on purpose is caught by name, and the pytest plugin says the same."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import own_process
import pytest
import yaml

from benchmarks import leaderboard
from circuitgraph import (
    ACDC,
    EAP,
    EAPIG,
    HISP,
    ActivationPatching,
    AlongPaths,
    AttributionPatching,
    CircuitGraphError,
    EdgePruning,
    Engine,
    Ensemble,
    InformationFlow,
    Magnitude,
    Outcome,
    PathPatching,
    Random,
    RelP,
    ScreenedBy,
    Selected,
    SparseFeatureCircuits,
    SubnetworkProbing,
    UniformGradientSampling,
    UnknownNameError,
)
from circuitgraph._plugins import ALGORITHMS, algorithm_named, names
from circuitgraph.testing import CHECKS, CheckError, ReferenceModel, check_algorithm
from circuitgraph.testing._check_algorithm import results
from circuitgraph.testing._checks import PLANTED
from circuitgraph.testing._traces import kept_trace

ROOT = Path(__file__).parent.parent
BY_WRITER = "gives all edges of a writer one score"
FOUND = ("planted-circuits-are-found", "drawn-circuits-are-found")
NODES = dict.fromkeys(("linear-models-are-scored-exactly", "silent-edges-score-nothing", *FOUND), BY_WRITER)
BLIND = "knows nothing of the task: a baseline"
BASELINE = {**dict.fromkeys(NODES, BLIND)}
SAMPLES = {
    "order-of-heads-does-not-matter": "draws its masks in the order of the graph",
    "silent-edges-score-nothing": "a mask that moves nothing drifts only as far as the penalty goes in its few steps",
    **dict.fromkeys(FOUND, "converges in hundreds of steps; test_planted and the leaderboard look at what it finds"),
    "clean-source-scores-nothing": "says how open a gate is, and one that moves nothing stays nearly as it was",
}


@dataclass(frozen=True)
class Case:
    """An algorithm, which checks do not count for it and why, and how well it must rank."""

    algorithm: Any
    skip: Mapping[str, str] = field(default_factory=dict)
    least_auroc: float = 0.95


CASES = {
    "acdc": Case(ACDC(1e-5)),
    "acdc, edge by edge": Case(ACDC(1e-5, group_first=False)),
    "activation-patching": Case(ActivationPatching(), least_auroc=1.0),
    "activation-patching, nodes": Case(ActivationPatching(level="node"), NODES),
    "along-paths": Case(
        AlongPaths("input -> * -> logits"),
        dict.fromkeys(
            (*FOUND, "linear-models-are-scored-exactly", "order-of-heads-does-not-matter"),
            "scores the paths it is told to, of two edges here",
        ),
    ),
    "attribution-patching": Case(AttributionPatching(), NODES),
    "eap": Case(EAP()),
    "eap-ig": Case(EAPIG()),
    "eap-ig, activations": Case(EAPIG("activations", points=2)),
    "eap-ig, mask": Case(EAPIG("mask", points=3), {"linear-models-are-scored-exactly": "shares a path's effect out among its edges"}),
    "edge-pruning": Case(EdgePruning(target=10, n_steps=10), SAMPLES),
    "ensemble": Case(
        Ensemble((EAP(), ActivationPatching())),
        {
            "linear-models-are-scored-exactly": "its scores have no unit: members are divided by their size",
            "lengths-do-not-mix": "divides by the size of scores over all prompts",
        },
    ),
    "hisp": Case(
        HISP(),
        {
            **NODES,
            "axes-of-the-stream-do-not-matter": "gives every layer a norm of 1, also one whose importance is rounding",
            "lengths-do-not-mix": "divides by the norm of a layer over all prompts",
        },
    ),
    "information-flow": Case(
        InformationFlow(),
        {
            **BASELINE,
            "axes-of-the-stream-do-not-matter": "measures what is said by the L1 norm, as its paper does",
            "clean-source-scores-nothing": "looks at the clean run only",
            "padding-changes-nothing": "measures what is said at every position, padding too",
        },
    ),
    "magnitude": Case(Magnitude(), {**BASELINE, "padding-changes-nothing": "measures what is said at every position, padding too"}),
    "path-patching": Case(PathPatching(), dict.fromkeys(FOUND, "asks of the edges into the receivers it is told")),
    "random": Case(
        Random(),
        {
            **BASELINE,
            "order-of-heads-does-not-matter": BLIND,
            "clean-source-scores-nothing": BLIND,
        },
    ),
    "relp": Case(RelP(), least_auroc=0.5),  # sees no query and no key
    "screened": Case(ScreenedBy(EAP(), keep=0.1, then=ActivationPatching()), dict.fromkeys(FOUND, "keeps what passed the screen")),
    "selected": Case(Selected(EAP(), size=6), dict.fromkeys(FOUND, "keeps as many as it is told")),
    "sparse-feature-circuits": Case(
        SparseFeatureCircuits(estimator=EAPIG("activations", points=2)),
        dict.fromkeys(FOUND, "keeps what is above thresholds in the metric's units"),
    ),
    "subnetwork-probing": Case(SubnetworkProbing(n_steps=10), SAMPLES),
    "ugs": Case(UniformGradientSampling(n_steps=6), SAMPLES),
}


@pytest.mark.parametrize("name", CASES)
def test_every_algorithm_of_ours_passes(name: str) -> None:
    case = CASES[name]
    report = check_algorithm(case.algorithm, backends=("torch", "reference"), skip=case.skip, least_auroc=case.least_auroc)
    assert [result.id for result in report.results] == [*CHECKS]


def test_every_registered_algorithm_is_among_them() -> None:
    assert {algorithm_named(name) for name in names(ALGORITHMS)} <= {type(case.algorithm) for case in CASES.values()}


@pytest.mark.parametrize("algorithm", [EAP(), ACDC(1e-5)], ids=repr)
def test_jax_agrees(algorithm: Any) -> None:
    check_algorithm(algorithm, backends=("torch", "jax"), only=["backends-agree"])


# What is broken on purpose.


@dataclass(frozen=True)
class WrongSign:
    """EAP, which says minus."""

    def run(self, engine: Engine) -> Outcome:
        outcome = EAP().run(engine)
        assert outcome.scores is not None
        return replace(outcome, scores=-outcome.scores)


@dataclass(frozen=True)
class NoValues:
    """EAP that forgets the edges into values."""

    def run(self, engine: Engine) -> Outcome:
        outcome = EAP().run(engine)
        assert outcome.scores is not None
        is_value = np.array([reader.kind == "v" for reader in engine.graph.readers])
        return replace(outcome, scores=np.where(is_value[:, None], 0.0, outcome.scores))


@dataclass(frozen=True)
class Leaks:
    """EAP in which some of what the corrupted run says gets into the scores."""

    def run(self, engine: Engine) -> Outcome:
        outcome, said = EAP().run(engine), engine.source_values()
        assert outcome.scores is not None
        loud = np.mean([np.abs(np.asarray(said[i])).mean(axis=(1, 2)) for i in range(len(said))], axis=0)
        return replace(outcome, scores=outcome.scores + 0.1 * loud * engine.graph.visible)


@dataclass(frozen=True)
class Unseeded:
    def run(self, engine: Engine) -> Outcome:
        return Outcome(engine.graph.visible.copy(), np.where(engine.graph.visible, np.random.default_rng().random(engine.graph.shape), 0))


@dataclass(frozen=True)
class FirstPromptOnly:
    def run(self, engine: Engine) -> Outcome:
        outcome = EAP().run(engine)
        assert outcome.prompt_scores is not None
        return Outcome(outcome.mask, np.asarray(outcome.prompt_scores[0], dtype=float))


@dataclass(frozen=True)
class Breaks:
    def run(self, engine: Engine) -> Outcome:
        raise IndexError("list index out of range")


@dataclass(frozen=True)
class SilentZeros:
    """Says 0 where there is no gradient."""

    def run(self, engine: Engine) -> Outcome:
        try:
            return EAP().run(engine)
        except CircuitGraphError:
            return Outcome(engine.graph.visible.copy(), np.zeros(engine.graph.shape))


BROKEN: dict[Any, tuple[str, ...]] = {
    WrongSign(): ("linear-models-are-scored-exactly",),
    NoValues(): ("linear-models-are-scored-exactly", "planted-circuits-are-found"),
    Leaks(): ("clean-source-scores-nothing", "silent-edges-score-nothing", "axes-of-the-stream-do-not-matter"),
    Unseeded(): ("same-seed-same-result",),
    FirstPromptOnly(): ("prompt-order-changes-nothing", "lengths-do-not-mix"),
    SilentZeros(): ("what-has-no-answer-is-refused",),
    Breaks(): ("outcome-is-well-formed",),
}


@pytest.mark.parametrize("algorithm", BROKEN, ids=lambda algorithm: type(algorithm).__name__)
def test_what_is_broken_is_caught_by_name(algorithm: Any) -> None:
    with pytest.raises(CheckError) as caught:
        check_algorithm(algorithm, only=BROKEN[algorithm])
    assert [result.id for result in caught.value.report.failed] == [*BROKEN[algorithm]]
    assert all(result.why for result in caught.value.report.failed)


# How it is asked.


def test_a_skipped_check_says_why_and_unknown_ones_are_refused() -> None:
    report = check_algorithm(EAP(), backends=["reference"], only=["backends-agree"], skip={"backends-agree": "no other backend here"})
    assert str(report).endswith("skipped backends-agree: no other backend here")
    with pytest.raises(UnknownNameError, match="did you mean 'backends-agree'"):
        check_algorithm(EAP(), skip={"backend-agree": "typo"})
    with pytest.raises(CircuitGraphError, match="without a reason"):
        check_algorithm(EAP(), skip={"backends-agree": " "})
    with pytest.raises(CircuitGraphError, match="an instance with a run method"):
        check_algorithm(EAP)  # type: ignore[arg-type]
    with pytest.raises(CircuitGraphError, match="no backend"):
        next(results(EAP(), backends=()))


def test_planted_models_of_the_checks_are_of_several_kinds() -> None:
    assert {options.get("norm") for options in PLANTED} == {None, "rms", "layer"}


def test_models_of_the_same_numbers_are_traced_once() -> None:
    one, same, other = (ReferenceModel.random(seed, n_layers=1) for seed in (0, 0, 1))
    assert kept_trace(one, "reference") is kept_trace(same, "reference")
    attention = one.layers[0].attention
    assert attention is not None
    moved = replace(one, layers=(replace(one.layers[0], attention=replace(attention, n_padding=1)),))
    for changed in (other, moved, replace(one, logit_scale=2.0)):
        assert kept_trace(changed, "reference").graph == one.graph()
        assert kept_trace(changed, "reference") is not kept_trace(one, "reference")


PLUGIN = """
from dataclasses import dataclass
from circuitgraph import EAP, Engine, Outcome

@dataclass(frozen=True)
class Negated:
    def run(self, engine: Engine) -> Outcome:
        outcome = EAP().run(engine)
        return Outcome(outcome.mask, -outcome.scores)

good = EAP()
"""


def plugin_arguments(folder: Path, *arguments: str) -> list[str]:
    (folder / "mine.py").write_text(PLUGIN)
    return ["-p", "circuitgraph.testing.pytest_plugin", "-p", "no:cacheprovider", "-q", "-rsf", "--rootdir", str(folder), *arguments]


def run_pytest(folder: Path, *arguments: str) -> tuple[int | None, str]:
    """The exit code, and all that was printed. Without the plugins of others, some of which cannot be loaded after what they are for."""
    script = folder / "run_pytest.py"
    script.write_text("import os, sys, pytest\nos.environ['PYTEST_DISABLE_PLUGIN_AUTOLOAD'] = '1'\nsys.exit(pytest.main(sys.argv[1:]))")
    return own_process.run(script, folder, *plugin_arguments(folder, *arguments))


def test_the_plugin_makes_a_test_of_every_check(tmp_path: Path) -> None:
    code, printed = run_pytest(tmp_path, "--circuitgraph-check", "mine:Negated", "--circuitgraph-skip", "same-seed-same-result=we know")
    assert code == 1, printed
    assert "linear-models-are-scored-exactly: the scores are not the effects of the edges" in printed
    assert "we know" in printed
    assert f"1 failed, {len(CHECKS) - 4} passed, 3 skipped" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--circuitgraph-check", "mine:Nothing"], "has no attribute 'Nothing'"),
        (["--circuitgraph-check", "nowhere:EAP"], "No module named 'nowhere'"),
        (["--circuitgraph-check", "mine:good", "--circuitgraph-skip", "backends-agree"], "expected CHECK=REASON"),
        (["--circuitgraph-check", "mine:good", "--circuitgraph-skip", "backend-agree=x"], "did you mean 'backends-agree'"),
    ],
)
def test_the_plugin_says_what_it_cannot_find(tmp_path: Path, arguments: list[str], message: str) -> None:
    code, printed = run_pytest(tmp_path, *arguments)
    assert code == 4
    assert message in printed


def test_the_workflow_of_the_documentation_checks_the_example(tmp_path: Path) -> None:
    """The whole story: an algorithm of twenty lines, tested in CI by a file of ten; in a new interpreter, as there."""
    page = (ROOT / "docs" / "how-to" / "test-an-algorithm.md").read_text()
    (text,) = re.findall(r"^```yaml\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    (job,) = yaml.safe_load(text)["jobs"].values()
    install, check = (step["run"] for step in job["steps"] if "run" in step)
    assert install.startswith("pip install")
    source = (ROOT / "examples" / "tested_algorithm.py").read_text()
    (tmp_path / "tested_algorithm.py").write_text(source)
    body = source[source.index("@dataclass") : source.index("if __name__")]
    assert len(body.strip().splitlines()) <= 20
    command = [sys.executable, "-m", "pytest", *plugin_arguments(tmp_path, *shlex.split(check)[1:])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(CHECKS) - 2} passed, 2 skipped" in done.stdout


def test_the_leaderboard_tells_algorithms_apart() -> None:
    models = [known for known in leaderboard.known_models(1) if known.kind in ("planted, no norms", "Tracr, hist")]
    names = ("random", "activation-patching", "acdc, 1e-5", "eap")
    found = {name: [leaderboard.scored(leaderboard.ALGORITHMS[name], known) for known in models] for name in names}
    assert [score.is_exact for name in names for score in found[name] if score] == [False] * 2 + [True] * 4 + [True, False]
    assert [score.forwards for score in found["eap"] if score] == [3, 3]
    table = leaderboard.tabled(models, found)
    assert table.columns[1:] == ("planted, no norms", "Tracr", "forwards")
    page = leaderboard.with_table(f"a\n{leaderboard.START}\nold\n{leaderboard.END}\nb", table)
    assert "old" not in page
    assert page.startswith("a\n")
    with pytest.raises(ValueError, match="the page has no"):
        leaderboard.with_table("a page", table)


def test_the_leaderboard_page_has_every_algorithm() -> None:
    page = leaderboard.PAGE.read_text()
    assert [name for name in leaderboard.ALGORITHMS if f"| {name} |" not in page] == []
