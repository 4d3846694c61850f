"""The command line: what it prints, what it writes, how it refuses; with every backend where that could matter, else with the reference."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from engines import BACKENDS, every_backend, with_reference
from twins import small_model
from typer.testing import CliRunner

from circuitgraph import ACDC, Circuit, CircuitGraphError, _discover, _plugins, cli
from circuitgraph.evaluation._question import Question
from circuitgraph.files import save_mib
from circuitgraph.selection import default_size

Run = Callable[..., Result]
MODEL = "<the model>"  # stands for a folder that every backend can load
DISCOVER = ("discover", "induction", "--model", MODEL, "--metric", "kl", "--backend", "reference", "-n", "6")
FILES = {"circuit.json", "circuit.svg", "circuit.dot", "report.json"}


@pytest.fixture(autouse=True)
def _in_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with_reference(monkeypatch)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / "small-llama"
    small_model("llama", n_layers=1).save_pretrained(path)
    return str(path)


@pytest.fixture
def run(folder: str) -> Run:
    return lambda *arguments: CliRunner().invoke(cli.app, [folder if argument is MODEL else str(argument) for argument in arguments])


def discover_with(backend: str) -> tuple[str, ...]:
    return tuple(backend if word == "reference" else word for word in DISCOVER)


@every_backend
@pytest.mark.parametrize(
    "algorithm", [("acdc", "--threshold", "0.001"), ("acdc",), ("activation-patching", "--top", "12"), ("activation-patching",)]
)
def test_discover_writes_and_reports(run: Run, tmp_path: Path, folder: str, backend: str, algorithm: tuple[str, ...]) -> None:
    result = run(*discover_with(backend), "-o", "out", "--json", "--algorithm", *algorithm)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    wanted = {"task_accuracy", "edges_total", "edges_kept", "faithfulness", "metric_clean", "metric_corrupted", "metric_circuit", "seconds"}
    assert wanted <= set(found)
    assert {Path(name).name for name in found["files"]} == FILES == {path.name for path in (tmp_path / "out").iterdir()}
    circuit = Circuit.load("out/circuit.json")
    assert circuit.n_edges == found["edges_kept"]
    assert circuit.provenance["metric_circuit"] == found["metric_circuit"]
    assert circuit.provenance["model"]["backend"] == backend
    assert circuit.provenance["model"]["name"] == found["model"] == folder
    assert json.loads(Path("out/report.json").read_text())["faithfulness"] == found["faithfulness"]
    assert Path("out/circuit.svg").read_text().rstrip().endswith("</svg>")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("algorithm", "selector"),
    [
        (("activation-patching", "--select", "greedy"), {"class": "Greedy"}),
        (
            ("activation-patching", "--select", "integer-program", "--top", "9"),
            {"class": "IntegerProgram", "time_limit": 300.0, "gap": 0.0},
        ),
        (("information-flow", "--select", "sign-consistent", "--top", "9"), {"class": "SignConsistent"}),
        (("activation-patching", "--faithfulness", "0.5"), {"class": "TopN"}),
        (("activation-patching", "--faithfulness", "0.5", "--select", "signed-top"), {"class": "SignedTopN"}),
    ],
)
def test_how_to_choose(run: Run, algorithm: tuple[str, ...], selector: dict[str, Any]) -> None:
    result = run(*DISCOVER, "-o", "out", "--json", "--algorithm", *algorithm)
    assert result.exit_code == 0, result.output
    found, circuit = json.loads(result.stdout), Circuit.load("out/circuit.json")
    how = found["algorithm"]
    assert how["class"] == "Selected"
    assert how["selector"].items() >= selector.items()
    chosen = circuit.record["selection"]
    assert found["edges_kept"] == chosen["edges"] <= chosen["size"]
    if "--faithfulness" in algorithm:
        assert found["faithfulness"] == pytest.approx(chosen["faithfulness"], abs=1e-6)
        assert found["faithfulness"] >= 0.5
    else:
        assert how["size"] == chosen["size"] == (9 if "--top" in algorithm else default_size(found["edges_total"]))


def test_hyper_parameters_are_set_by_name(run: Run) -> None:
    result = run(*DISCOVER, "-o", "out", "--json", "-a", "activation-patching", "--set", "level=node", "--set", "max-lanes=3")
    assert result.exit_code == 0, result.output
    how = json.loads(result.stdout)["algorithm"]
    assert how == {"class": "ActivationPatching", "level": "node", "direction": "noising", "max_lanes": 3}
    decided = run(*DISCOVER, "-o", "decided", "--json", "-a", "acdc", "--set", "threshold=0.001", "--set", "group_first=no")
    assert json.loads(decided.stdout)["algorithm"]["group_first"] is False
    assert json.loads(decided.stdout)["derived"] is None


def test_every_algorithm_is_in_the_help(run: Run) -> None:
    text = run("discover", "--help").output
    assert all(name in text for name in ("acdc", "eap-ig", "information-flow", "integer-program"))


@every_backend
def test_what_discover_found_can_be_shown_and_evaluated(run: Run, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(*discover_with(backend), "-o", "out", "--algorithm", "activation-patching", "--top", "12").exit_code == 0
    circuit = Circuit.load("out/circuit.json")
    listing = run("show", "out", "-o", "again.svg")
    assert listing.exit_code == 0
    assert circuit.edges[0].name in listing.stdout
    assert "ActivationPatching" in listing.stdout
    assert Path("again.svg").is_file()
    shown = json.loads(run("show", "out/circuit.json", "--json").stdout)
    assert {row["edge"] for row in shown["edges"]} == {edge.name for edge in circuit.edges}
    sizes = [abs(row["score"]) for row in shown["edges"]]
    assert sizes == sorted(sizes, reverse=True)
    same = json.loads(run("evaluate", "out", "--json").stdout)
    assert same["faithfulness"] == pytest.approx(circuit.provenance["faithfulness"])
    assert same["seed"] == 0
    other = json.loads(run("evaluate", "out", "--seed", "1", "-n", "4", "--json").stdout)
    assert (other["seed"], other["prompts"]) == (1, 4)
    asked: list[str] = []
    monkeypatch.setattr(
        _discover, "trace", lambda name, *, backend, **rest: asked.append(backend) or _plugins.traced(name, backend=backend)
    )
    run("evaluate", "out", "--json")
    elsewhere = [run("evaluate", "out", "--json", "--backend", other) for other in BACKENDS]
    assert asked == [backend, *BACKENDS]
    for result in elsewhere:
        assert json.loads(result.stdout)["faithfulness"] == pytest.approx(circuit.provenance["faithfulness"], abs=1e-4)
        assert "the weights" not in result.stderr


def test_deeper_measures_are_printed_saved_and_drawn(run: Run, tmp_path: Path) -> None:
    assert run(*DISCOVER, "-o", "out", "--algorithm", "activation-patching", "--top", "12").exit_code == 0
    circuit = Circuit.load("out/circuit.json")
    save_mib(circuit, "reference.json")
    asked = ("--measure", "minimality", "--plot", "curve.svg", "--output", "report.json", "--reference", "reference.json", "--mib-compat")
    result = run("evaluate", "out", *asked)
    assert result.exit_code == 0, result.output
    for text in ("minimality, ", "CPR, linear axis, as MIB", "CMD, linear axis", "edges against the", "wrote report.json, curve.svg"):
        assert text in result.stdout
    saved = json.loads(Path("report.json").read_text())
    assert list(saved["findings"]) == ["minimality", "curve", "reference"]
    assert saved["findings"]["reference"]["edges"]["precision"] == 1.0
    assert saved["protocol"] == circuit.provenance["protocol"]
    assert saved["complement"] == pytest.approx(circuit.provenance["complement"])
    assert Path("curve.svg").read_text().rstrip().endswith("</svg>")
    before = {path.name for path in tmp_path.iterdir()}
    for options, message in (
        (("--measure", "minimallity"), "unknown measure 'minimallity'; did you mean 'minimality'?"),
        (("--measure", "tests"), "kl of the model itself is the same for every prompt"),
        (("--plot", "curve.jpg"), "ends in one of .svg, .pdf, .png"),
        (("--mib-compat",), "add one of them"),
        (("--reference", "missing.json"), "missing.json"),
        (("--output", "nowhere/report.json"), "there is no folder nowhere"),
    ):
        refused = run("evaluate", "out", *options)
        assert refused.exit_code == 2, options
        assert message in refused.stderr.splitlines()[-1]
    assert {path.name for path in tmp_path.iterdir()} == before


def test_model_that_fails_the_task_is_reported_on_stderr(run: Run, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Question, "task_accuracy", 0.25)
    result = run(*DISCOVER, "-o", "out", "--json", "--algorithm", "acdc")
    assert f"warning: {folder} fails the task induction: accuracy 25%" in result.stderr
    json.loads(result.stdout)


@every_backend
def test_trace_prints_size_and_proof(run: Run, backend: str) -> None:
    text = run("trace", MODEL, "--backend", backend).stdout
    assert "Graph(" in text
    assert "ok   F(1)" in text
    found = json.loads(run("trace", MODEL, "-b", backend, "--json", "--per-head-kv").stdout)
    assert [check["name"] for check in found["checks"][:2]] == ["F(1) is the model", "F(0) is the source run"]
    assert all(check["holds"] for check in found["checks"])
    assert json.loads(run("trace", MODEL, "-b", backend, "--architecture").stdout)["vocabulary"] == 30


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_where_and_in_what_numbers_to_compute(run: Run, backend: str) -> None:
    found = run("trace", MODEL, "-b", backend, "--device", "cpu", "--dtype", "float32", "--architecture")
    assert found.exit_code == 0, found.stderr
    refused = run("trace", MODEL, "-b", backend, "--device", "nowhere")
    assert refused.exit_code == 2
    assert "'nowhere' cannot be used here" in refused.stderr
    refused = run("trace", MODEL, "-b", backend, "--dtype", "float23")
    assert "unknown dtype 'float23'; did you mean" in refused.stderr


def test_lists(run: Run) -> None:
    assert "ioi" in run("tasks").stdout
    assert {"ioi", "induction", "greater-than"} <= {row["name"] for row in json.loads(run("tasks", "--json").stdout)}
    assert run("models").exit_code == 0
    json.loads(run("models", "--json").stdout)


@pytest.mark.parametrize("command", [(), ("discover",), ("show",), ("evaluate",), ("trace",), ("tasks",), ("models",)])
def test_every_command_has_help_with_an_example(run: Run, command: tuple[str, ...]) -> None:
    text = run(*command, "--help").output
    assert "Usage" in text
    assert ("--backend" in text) == (command in [("discover",), ("evaluate",), ("trace",)])
    if command:
        assert f"Example: circuitgraph {command[0]}" in text


REFUSED = [
    (("discover", "iio", "-m", MODEL), "unknown task 'iio'; did you mean 'ioi'"),
    (("discover", "ioi", "-m", "./nothing"), "model './nothing': there is no such folder"),
    (("discover", "ioi", "-m", MODEL, "-b", "jaxx"), "unknown backend 'jaxx'; did you mean 'jax'"),
    (("trace", MODEL, "--backend", "numpy"), "unknown backend 'numpy'; known: jax, reference, torch"),
    ((*DISCOVER, "-a", "acd"), "unknown algorithm 'acd'; did you mean 'acdc'"),
    ((*DISCOVER, "-a", "acdc", "--top", "5"), "takes --threshold and no --top"),
    ((*DISCOVER, "-a", "activation-patching", "--top", "5", "--threshold", "1"), "exclude each other"),
    ((*DISCOVER, "-a", "eap"), "zero gradient at the clean run"),
    ((*DISCOVER, "-a", "acdc", "--select", "greedy", "--faithfulness", "1"), "takes --threshold and no --select or --faithfulness"),
    ((*DISCOVER, "-a", "acdc", "--threshold", "1", "--set", "threshold=1"), "are one setting of acdc"),
    ((*DISCOVER, "-a", "eap", "--top", "5", "--faithfulness", "0.9"), "--top and --faithfulness exclude each other"),
    ((*DISCOVER, "-a", "eap", "--threshold", "1", "--select", "greedy"), "--threshold and --select exclude each other"),
    ((*DISCOVER, "-a", "eap", "--select", "gredy"), "unknown selector 'gredy'; did you mean 'greedy'"),
    ((*DISCOVER, "-a", "eap", "--faithfulness", "-1"), "faithfulness is -1.0; expected a number above 0"),
    ((*DISCOVER, "-a", "activation-patching", "--faithfulness", "99"), "no size reaches a faithfulness of 99"),
    ((*DISCOVER, "-a", "activation-patching", "--select", "sign-consistent"), "no scores of single prompts"),
    ((*DISCOVER, "-a", "activation-patching", "--select", "greedy", "--top", "9999"), "the graph has"),
    ((*DISCOVER, "-a", "activation-patching", "--set", "levl=node"), "unknown hyper-parameter of activation-patching 'levl'"),
    (
        (*DISCOVER, "-a", "activation-patching", "--set", "level=nodes"),
        "unknown value of activation-patching: level 'nodes'; did you mean 'node'",
    ),
    ((*DISCOVER, "-a", "activation-patching", "--set", "max_lanes=many"), "max_lanes is 'many'; expected a whole number"),
    ((*DISCOVER, "-a", "activation-patching", "--set", "max_lanes=0"), "max_lanes: 0; expected a whole number of at least 1"),
    ((*DISCOVER, "-a", "activation-patching", "--set", "level"), "setting 'level': expected name=value; activation-patching has level"),
    ((*DISCOVER, "-a", "acdc", "--set", "threshold=1", "--set", "threshold=2"), "threshold was given already"),
    ((*DISCOVER, "-a", "acdc", "--threshold", "-1"), "expected a number of at least 0"),
    ((*DISCOVER, "-a", "activation-patching", "--top", "999999"), "scored edges"),
    (("discover", "induction", "-m", MODEL, "--metric", "logitdif"), "did you mean 'logit_diff'"),
    ((*DISCOVER, "-a", "acdc", "--source", "corrupt"), "did you mean 'corrupted'"),
    (("discover", "missing.toml", "-m", MODEL), "missing.toml"),
    ((*DISCOVER, "-a", "activation-patching", "--top", "0"), "'--top'"),
    ((*DISCOVER[:-1], "0"), "'--prompts'"),
    ((*DISCOVER, "--seed", "-1"), "'--seed'"),
    ((*DISCOVER, "--sead", "1"), "--sead"),
    (("discover",), "TASK"),
    (("discoverr",), "discoverr"),
    (("--nothing",), "--nothing"),
    (("show", "missing.json"), "missing.json"),
    (("evaluate", "missing.json"), "missing.json"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("arguments", [(*DISCOVER, "-a", "eap"), (*DISCOVER, "-a", "activation-patching", "--top", "999999")])
def test_every_backend_refuses_the_same_questions_in_the_same_words(run: Run, backend: str, arguments: tuple[str, ...]) -> None:
    result, expected = (run(*(name if word == "reference" else word for word in arguments)) for name in (backend, "reference"))
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == expected.stderr.splitlines()[-1]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refused_on_one_line(run: Run, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    line = [line for line in result.stderr.splitlines() if not line.startswith("warning:")]
    assert len(line) == 1, result.stderr
    assert line[0].startswith("error: ")
    assert message in line[0]
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_truncated_and_newer_files_are_refused(run: Run) -> None:
    assert run(*DISCOVER, "-o", "out", "-a", "acdc").exit_code == 0
    text = Path("out/circuit.json").read_text()
    Path("cut.json").write_text(text[: len(text) // 2])
    Path("new.json").write_text(json.dumps({**json.loads(text), "schema": 99}))
    for name, message in (("cut.json", "truncated"), ("new.json", "schema")):
        result = run("show", name)
        assert result.exit_code == 2
        assert message in result.stderr


def change(text: str, **facts: Any) -> str:
    """A circuit file with other facts in its provenance."""
    values = json.loads(text)
    return json.dumps({**values, "provenance": {**values["provenance"], **facts}})


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"seed": None}, "seed: None; expected a whole number"),
        ({"seed": float("nan")}, "seed: None; expected a whole number"),
        ({"source": None}, "unknown source None"),
        ({"model": None}, "add --model"),
        ({"model": {"name": "x", "backend": 3}}, "unknown backend 3; known: jax, reference, torch"),
        ({"task": 3}, "add --task"),
        ({"task": {"name": "token ids"}}, "was found with token ids, which it does not hold; add --task"),
    ],
)
def test_files_that_were_tampered_with_are_refused_on_one_line(run: Run, facts: dict[str, Any], message: str) -> None:
    assert run(*DISCOVER, "-o", "out", "-a", "acdc").exit_code == 0
    Path("odd.json").write_text(change(Path("out/circuit.json").read_text(), **facts))
    result = run("evaluate", "odd.json")
    assert result.exit_code == 2, result.output
    assert message in result.stderr.splitlines()[-1]


def test_a_task_file_is_found_again(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[1] / "tasks" / "induction.toml").read_text()
    Path("mine.toml").write_text(text)
    assert run("discover", "mine.toml", *DISCOVER[2:], "-o", "out", "-a", "acdc").exit_code == 0
    assert Circuit.load("out/circuit.json").provenance["task"]["path"] == str(tmp_path / "mine.toml")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = run("evaluate", "../out")
    assert found.exit_code == 0, found.output
    assert "has changed" not in found.stderr
    (tmp_path / "mine.toml").write_text(text.replace("Random tokens", "Some tokens"))
    assert "warning: task induction has changed since the circuit was found with it" in run("evaluate", "../out").stderr
    (tmp_path / "mine.toml").unlink()
    gone = run("evaluate", "../out")
    assert gone.exit_code == 2
    assert "mine.toml" in gone.stderr


def test_existing_folder_is_replaced_only_when_told_to(run: Run, tmp_path: Path) -> None:
    assert run(*DISCOVER, "-o", "out", "-a", "acdc").exit_code == 0
    refused = run(*DISCOVER, "-o", "out", "-a", "acdc")
    assert refused.exit_code == 2
    assert "add --force" in refused.stderr
    before = Circuit.load("out/circuit.json")
    replaced = run(*DISCOVER, "-o", "out", "-a", "activation-patching", "--top", "3", "--force")
    assert replaced.exit_code == 0, replaced.output
    assert Circuit.load("out/circuit.json") != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("foreign", ["notes.txt", "circuit.svg/inside"])
def test_files_of_others_are_never_touched(run: Run, tmp_path: Path, foreign: str) -> None:
    path = tmp_path / "out" / foreign
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    result = run(*DISCOVER, "-o", "out", "-a", "acdc", "--force")
    assert result.exit_code == 2
    assert "did not write" in result.stderr
    assert path.read_text() == "mine"


@pytest.mark.parametrize(("failure", "code"), [(CircuitGraphError("full"), 2), (KeyboardInterrupt(), 130), (ZeroDivisionError(), 1)])
def test_nothing_is_half_written(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, code: int) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise failure

    monkeypatch.setattr(Circuit, "render", fail)
    result = run(*DISCOVER, "-o", "out", "-a", "acdc")
    assert result.exit_code == code
    assert list(tmp_path.iterdir()) == []
    if code == 1:
        assert isinstance(result.exception, ZeroDivisionError)  # a bug shows its traceback


def test_ctrl_c_while_discovering(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ACDC, "steps", lambda self, engine: (_ for _ in ()).throw(KeyboardInterrupt()))
    result = run(*DISCOVER, "-o", "out", "-a", "acdc")
    assert result.exit_code == 130
    assert "interrupted; nothing was written" in result.stderr
    assert list(tmp_path.iterdir()) == []


ZOO = ("induction", "--model", "zoo:induction-2l", "--algorithm", "eap", "--top", "40", "-n", "8")


def test_bundled_model_from_a_shell(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "circuitgraph.cli", "discover", *ZOO, "-o", "out", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["task_accuracy"] >= 0.9
    assert 0 < found["edges_kept"] <= 40
    assert "warning:" not in done.stderr


def test_ctrl_c_from_a_shell(tmp_path: Path) -> None:
    search = ["-a", "ugs", "--set", "n_steps=1000000", "-n", "8"]  # nothing that could be over before it is stopped
    command = [sys.executable, "-m", "circuitgraph.cli", "discover", *ZOO[:3], *search, "-o", "out"]
    # A shell that runs the tests in the background hands on an ignored SIGINT.
    listening = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    running = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listening)
    try:
        time.sleep(4.0)
        os.kill(running.pid, signal.SIGINT)
        _, stderr = running.communicate(timeout=60)
    finally:
        running.kill()
    # A slow machine is still importing: Python then ends by the signal itself, if that met an exec() of a text, as in making a dataclass,
    # however it was caught. A shell calls both 130.
    assert running.returncode in (130, -signal.SIGINT), stderr
    assert "interrupted; nothing was written" in stderr
    assert list(tmp_path.iterdir()) == []
