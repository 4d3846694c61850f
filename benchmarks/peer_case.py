"""auto-circuit on a GPT-2 of given weights: prints one line of JSON. `benchmarks.peer` starts it with the Python of another environment.

It needs auto-circuit 1.0.1 with transformer-lens<3, transformers<5 and numpy<2, and imports nothing of circuitgraph. A plain forward pass
is `model(ids)` of the same TransformerLens model with default settings, before auto-circuit has wrapped anything.

`eap` is auto-circuit's mask gradient at a mask of 0. There 1 patches an edge, and the loss is minus the logit difference, so its gradient
has our sign. `acdc` is its ACDC on the edges of `edges.json`, in that order: it sorts them by layer only, and a sort keeps the order of
equals.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from auto_circuit.data import PromptDataLoader, PromptDataset
from auto_circuit.prune_algos.ACDC import acdc_prune_scores
from auto_circuit.prune_algos.mask_gradient import mask_gradient_prune_scores
from auto_circuit.utils.graph_utils import patchable_model
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
from transformers import GPT2LMHeadModel

from benchmarks.clock import compared, timed
from benchmarks.machine import peak_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("method", choices=("eap", "acdc"))
    parser.add_argument("folder", type=Path, help="holds a Hugging Face model and pairs.npz; ACDC's edges in edges.json")
    parser.add_argument("--frozen", action="store_true", help="parameters require no gradient")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threshold", type=float, default=0.0, help="of ACDC")
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    peer = Peer.of(chosen.folder, frozen=chosen.frozen)
    peer.plain()
    found = eap(peer, chosen.rounds) if chosen.method == "eap" else acdc(peer, edge_names(chosen.folder), chosen.threshold)
    print(json.dumps({**found, "peak": peak_memory()}))


@dataclass(frozen=True, eq=False)
class Peer:
    """A model wrapped by auto-circuit, its prompts, and a plain forward pass of it unwrapped."""

    model: Any
    loader: Any
    plain: Callable[[], object]

    @classmethod
    def of(cls, folder: Path, *, frozen: bool) -> Peer:
        wrapped = hooked(folder).requires_grad_(not frozen)
        unwrapped = HookedTransformer(copy.deepcopy(wrapped.cfg))  # its own: the switches below are kept in it
        unwrapped.load_state_dict(wrapped.state_dict(), assign=True)  # the same memory, so that the peak is that of one model
        unwrapped.requires_grad_(not frozen)
        for split in (wrapped.set_use_attn_result, wrapped.set_use_split_qkv_input, wrapped.set_use_hook_mlp_in):
            split(True)
        pairs = {name: torch.from_numpy(values) for name, values in np.load(folder / "pairs.npz").items()}
        rows = PromptDataset(pairs["clean"], pairs["corrupted"], [*pairs["answers"][:, None]], [*pairs["wrong_answers"][:, None]])
        loader = PromptDataLoader(rows, seq_len=None, diverge_idx=0, batch_size=len(pairs["clean"]), shuffle=False)

        def plain() -> None:
            with torch.no_grad():
                unwrapped(pairs["clean"])

        return cls(patchable_model(wrapped, factorized=True, slice_output="last_seq", separate_qkv=True), loader, plain)


def hooked(folder: Path) -> Any:
    """A TransformerLens model with the weights of a Hugging Face GPT-2, none of them folded or centred."""
    original = GPT2LMHeadModel.from_pretrained(folder)
    given = original.config
    config = HookedTransformerConfig(
        n_layers=given.n_layer,
        n_heads=given.n_head,
        d_model=given.n_embd,
        d_head=given.n_embd // given.n_head,
        d_mlp=4 * given.n_embd,
        n_ctx=given.n_positions,
        d_vocab=given.vocab_size,
        eps=given.layer_norm_epsilon,
        act_fn=given.activation_function,
        normalization_type="LN",
        device="cpu",
    )
    model = HookedTransformer(config)
    model.load_and_process_state_dict(
        convert_gpt2_weights(original, config), fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    return model


def eap(peer: Peer, rounds: int) -> dict[str, Any]:
    """All scores by edge, and times as those of `benchmarks.clock.compared`; the first run is a warm-up."""

    def run() -> Any:
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars
            return mask_gradient_prune_scores(
                peer.model, peer.loader, None, grad_function="logit", answer_function="avg_diff", mask_val=0.0
            )

    scores = run()
    by_name = {edge.name: edge.prune_score(scores).item() for edge in peer.model.edges}
    return {"scores": by_name, **asdict(compared(run, peer.plain, rounds=rounds))}


def acdc(peer: Peer, names: Sequence[str], threshold: float) -> dict[str, Any]:
    """The edges that it keeps of those named, seconds and plain forwards per edge. What it does before its first edge is taken off."""
    by_name = {edge.name: edge for edge in peer.model.edges}
    exponent = math.floor(math.log10(threshold))
    kept: list[str] = []

    def run(chosen: Sequence[str]) -> None:
        peer.model.edges = [by_name[name] for name in chosen]
        with contextlib.redirect_stderr(io.StringIO()):
            scores = acdc_prune_scores(peer.model, peer.loader, None, tao_exps=[exponent], tao_bases=[threshold / 10.0**exponent])
        kept[:] = [edge.name for edge in peer.model.edges if math.isinf(edge.prune_score(scores))]

    run(names[:1])
    one, base = timed(lambda: run(names[:1])), statistics.median(timed(peer.plain).wall for _ in range(3))
    seconds = (timed(lambda: run(names)).wall - one.wall) / max(1, len(names) - 1)
    return {"kept": kept, "measured_edges": len(names), "seconds_per_edge": seconds, "base": base, "per_edge": seconds / base}


def edge_names(folder: Path) -> list[str]:
    names: list[str] = json.loads((folder / "edges.json").read_text())
    return names


if __name__ == "__main__":
    main()
