"""Each backend without the other's framework, in processes that cannot import it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TORCH = ("torch", "nnsight", "accelerate")
JAX = ("jax", "jaxlib", "equinox")
START = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {blocked} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without     # as if they were not installed
import circuitgraph
from circuitgraph import EAP, CircuitGraphError

def refusal(backend):
    try:
        circuitgraph.trace("zoo:induction-2l", backend=backend)
    except CircuitGraphError as error:
        return str(error)
    return "traced"

def discovered(backend):
    circuit = circuitgraph.discover("zoo:induction-2l", "induction", EAP(), backend=backend, prompts=8)
    circuit.render("circuit.svg")
    assert circuitgraph.Circuit.load(circuit.save("circuit.json")).edges == circuit.edges
    assert circuit.provenance["model"]["backend"] == backend, circuit.provenance
"""
END = """
assert not [name for name in {blocked} if name in sys.modules]
"""


def run_without(blocked: tuple[str, ...], code: str, folder: Path) -> None:
    script = (START + code + END).replace("{blocked}", repr(blocked))
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", script], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("", "")  # no library talks about what it misses


def test_torch_without_jax(tmp_path: Path) -> None:
    code = """
discovered("torch")
assert refusal("jax").endswith("which is not installed; run: pip install 'circuitgraph[jax]'"), refusal("jax")
"""
    run_without(JAX, code, tmp_path)


def test_loading_without_torch(tmp_path: Path) -> None:
    """A bundled model with its tokenizer and witness, and a pytree, which is no PyTorch module."""
    code = """
import jax.numpy as jnp
from circuitgraph_jax._load import load
found = load("zoo:induction-2l")
assert found.config["num_hidden_layers"] == 2
assert len(found.tokenizer("ba be").input_ids) == 2
assert found.witness().weights == found.weights()
assert list(load({"a": jnp.zeros(2)}).tensors) == ["a"]
assert refusal("torch").endswith("needs torch, which is not installed; run: pip install 'circuitgraph[torch]'"), refusal("torch")
"""
    run_without(TORCH, code, tmp_path)


def test_jax_without_torch(tmp_path: Path) -> None:
    run_without(TORCH, 'discovered("jax")', tmp_path)
