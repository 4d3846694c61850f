"""`--refine` on the command line: a model in parts is searched, and the circuit measured again as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from safetensors.numpy import save_file
from typer.testing import CliRunner

from circuitgraph import EAP, Circuit, cli, discover
from circuitgraph.features import Neurons, refine, save_dictionary
from circuitgraph.testing import random_cross_layer_transcoder, random_dictionary

Run = Callable[..., Result]
ASKED = ("subject-verb-agreement", "--model", "zoo:tiny-english", "-n", "8")
DICTIONARY = "zoo:tiny-english/m1"


@pytest.fixture(autouse=True)
def _in_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def circuit_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "out"
    parts = ("--refine", f"m1={DICTIONARY}", "--refine", "m0=neurons", "--features", "6")
    done = run("discover", *ASKED, *parts, "--top", "30", "-o", out, "--json")
    assert done.exit_code == 0, done.output
    return out / "circuit.json"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [*map(str, arguments)])


def test_features_and_neurons_are_nodes_of_what_is_found(circuit_file: Path) -> None:
    circuit = Circuit.load(circuit_file)
    kinds = [writer.kind for writer in circuit.graph.writers if writer.component is not None]
    assert kinds.count("feature") == 6
    assert kinds.count("neuron") == 6
    assert circuit.provenance["refine"] == [f"m1={DICTIONARY}", "m0=neurons"]
    assert [one["component"] for one in circuit.provenance["model"]["refined"]] == ["m1", "m0"]


def test_it_is_measured_again_on_the_same_parts(circuit_file: Path) -> None:
    again = run("evaluate", circuit_file, "--json")
    assert again.exit_code == 0, again.output
    before = json.loads((circuit_file.parent / "report.json").read_text())
    assert json.loads(again.stdout)["faithfulness"] == before["faithfulness"]
    assert run("show", circuit_file).exit_code == 0


def test_another_dictionary_is_refused(circuit_file: Path, tmp_path: Path) -> None:
    other = save_dictionary(random_dictionary(1, width=64), tmp_path / "other")
    refused = run("evaluate", circuit_file, "--refine", f"m1={other}", "--refine", "m0=neurons")
    assert refused.exit_code == 2
    assert "is not the dictionary that the circuit was found with" in refused.stderr
    refused = run("evaluate", circuit_file, "--refine", "m0=neurons")
    assert "was found on a model with m1 in parts too; add --refine m1=DICTIONARY" in refused.stderr


def test_a_circuit_of_python_does_not_say_where_its_dictionary_is(tmp_path: Path) -> None:
    model = refine("zoo:tiny-english", {"m1": Neurons()}, ASKED[0], top=4, prompts=8)
    file = discover(model, ASKED[0], EAP(), prompts=8).top(20).save(tmp_path / "circuit.json")
    refused = run("evaluate", file)
    assert refused.exit_code == 2
    assert "was found on a model with m1 in parts; add --refine for each of them" in refused.stderr
    assert run("evaluate", file, "--refine", "m1=neurons").exit_code == 0


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["m1"], "--refine m1: expected a component and a dictionary, such as m1=neurons"),
        (["q1=neurons"], "'q1' is not the name of a component"),
        (["m1=nowhere"], "there is no folder 'nowhere'"),
        (["m1=neurons", f"m1={DICTIONARY}"], "m1 is in parts already; give one dictionary for each component"),
    ],
)
def test_what_is_no_refinement_is_refused(asked: list[str], message: str) -> None:
    refused = run("discover", *ASKED, *(word for one in asked for word in ("--refine", one)), "-o", "out")
    assert refused.exit_code == 2
    assert message in refused.stderr
    assert not Path("out").exists()


def test_a_folder_of_a_cross_layer_transcoder(tmp_path: Path) -> None:
    """Layers of which no feature was chosen are whole or in parts in both runs alike."""
    (tmp_path / "clt").mkdir()
    (tmp_path / "clt" / "config.yaml").write_text("model_kind: cross_layer_transcoder\nfeature_input_hook: mlp.hook_in\n")
    for name, layer in random_cross_layer_transcoder(3, width=128).items():
        n = name[1:]
        rows = layer.decoder[:, None] if layer.later is None else np.concatenate([layer.decoder[None], layer.later]).swapaxes(0, 1)
        weights = {f"W_enc_{n}": layer.encoder.T, f"b_enc_{n}": layer.encoder_bias, f"b_dec_{n}": layer.decoder_bias}
        save_file({key: np.ascontiguousarray(values) for key, values in weights.items()}, tmp_path / "clt" / f"W_enc_{n}.safetensors")
        save_file({f"W_dec_{n}": np.ascontiguousarray(rows)}, tmp_path / "clt" / f"W_dec_{n}.safetensors")
    done = run("discover", *ASKED, "--refine", tmp_path / "clt", "--features", "2", "--top", "30", "-o", "out", "--json")
    assert done.exit_code == 0, done.output
    assert any(writer.origin == 0 for writer in Circuit.load(Path("out/circuit.json")).graph.writers)
    again = run("evaluate", "out", "--json")
    assert json.loads(again.stdout)["faithfulness"] == json.loads(done.stdout)["faithfulness"]
