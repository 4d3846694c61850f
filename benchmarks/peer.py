"""EAP and ACDC beside auto-circuit, on the same weights and prompts: seconds, plain forward passes, and whether the answers agree.

auto-circuit runs in an environment of its own, whose Python `--peer-python` names. It needs the releases that it worked with:

    python3 -m venv peer
    peer/bin/pip install auto-circuit==1.0.1 'transformer-lens<3' 'transformers<5' 'numpy<2' 'datasets<4' 'pyarrow<21'

EAP: the random model of GPT-2-small size, logit difference, auto-circuit's parameters as they come and frozen (it computes gradients of the
parameters otherwise). Each side is counted in plain forward passes of the library that it stands on: transformers, TransformerLens.
ACDC: what auto-circuit takes per edge of the same model, on some edges spread evenly; and, on a small random model, whether both find the
same circuit. auto-circuit orders the edges of a layer by a Python set, so our order is given to it.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import subjects
from benchmarks.clock import Spread
from benchmarks.discovery_case import GPT2_SIZE, LENGTH
from benchmarks.machine import Watch
from benchmarks.processes import in_a_process
from benchmarks.tables import Table, options, publish
from circuitgraph import ACDC, EAP, Graph, PromptPairs, trace

TOLERANCE = 1e-3  # of any score, relative to the largest
SMALL = {"n_layers": 3, "n_heads": 4, "d_model": 64, "vocabulary": 500}
SMALL_THRESHOLD = 1e-4
PROMPTS = 8
_NEEDS = {"auto_circuit": "1.0.1", "transformer_lens": "below 3", "transformers": "below 5"}
_COLUMNS = (
    "what",
    "library",
    "parameters",
    "edges",
    "plain forward, ms",
    "seconds",
    "plain forwards",
    "peak RSS, GB",
    "circuitgraph is faster",
    "scores agree",
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--peer-python", required=True, metavar="PATH", help="the Python of an environment with auto-circuit")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="a round is three plain forward passes and one EAP")
    parser.add_argument("--acdc-edges", type=int, default=32, help="edges on which auto-circuit's ACDC is timed")
    chosen = parser.parse_args(arguments)
    versions = peer_versions(chosen.peer_python)
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        found = measured(chosen.peer_python, Path(folder), GPT2_SIZE, chosen.threads, chosen.rounds, chosen.acdc_edges)
        same = same_circuit(chosen.peer_python, Path(folder) / "small", chosen.threads)
    command = f"python -m benchmarks.peer --peer-python PEER --threads {chosen.threads} --rounds {chosen.rounds}"
    command += f" --acdc-edges {chosen.acdc_edges}"
    publish(table(found, same, versions), [{**found, "small": same}], command=command, watch=watch, file=chosen.json)


def peer_versions(python: str) -> dict[str, str]:
    """The versions of what the peer needs. Raises `SystemExit` for an environment in which auto-circuit cannot work."""
    asked = f"from importlib.metadata import version; print(*[version(name) for name in {[*_NEEDS]}])"
    done = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=False)
    found = dict(zip(_NEEDS, done.stdout.split(), strict=False))
    if done.returncode or int(found["transformer_lens"].split(".")[0]) >= 3:
        wanted = ", ".join(f"{name.replace('_', '-')} {release}" for name, release in _NEEDS.items())
        reason = done.stderr.strip().splitlines()[-1] if done.returncode else f"it has {found}"
        raise SystemExit(f"--peer-python {python}: expected an environment with {wanted}; {reason}")
    return found


def measured(python: str, folder: Path, size: dict[str, int], threads: int, rounds: int, acdc_edges: int) -> dict[str, Any]:
    """EAP of both libraries, the largest difference of a score relative to the largest score, and auto-circuit's ACDC on some edges."""
    graph, pairs, model = exported(folder, size)
    scores = EAP().run(model.bind(pairs, "logit_diff")).scores
    assert scores is not None
    own = {peer_name(graph, r, w): scores[r, w] for r, w in np.argwhere(graph.visible)}
    del model
    given = ["--threads", str(threads), "--rounds", str(rounds)]
    ours = in_a_process(["-m", "benchmarks.discovery_case", "eap", "gpt2-size" if size == GPT2_SIZE else "tiny", *given], threads)
    theirs = {}
    for frozen in (False, True):
        found = in_a_process(["-m", "benchmarks.peer_case", "eap", str(folder), *given, *["--frozen"] * frozen], threads, python)
        scores_found = found.pop("scores")
        theirs["frozen" if frozen else "as they come"] = {**found, "difference": difference(own, scores_found)}
    names = [*own]
    chosen = [names[i] for i in np.unique(np.linspace(0, len(names) - 1, acdc_edges).astype(int))]
    acdc = peer_acdc(python, folder, chosen, SMALL_THRESHOLD, threads)
    return {"edges": graph.n_edges, "circuitgraph": ours, "auto-circuit": theirs, "acdc": acdc}


def same_circuit(python: str, folder: Path, threads: int) -> dict[str, Any]:
    """ACDC of both on a small model, in our order: what each keeps, and how near to the threshold a decision of ours was."""
    graph, pairs, model = exported(folder, SMALL)
    outcome = ACDC(threshold=SMALL_THRESHOLD, group_first=False).run(model.bind(pairs, "kl"))
    kept = {peer_name(graph, r, w) for r, w in np.argwhere(outcome.mask)}
    found = peer_acdc(python, folder, acdc_order(graph, outcome.record["order"]), SMALL_THRESHOLD, threads)
    return {
        "edges": graph.n_edges,
        "kept": len(kept),
        "only_ours": sorted(kept - {*found["kept"]}),
        "only_theirs": sorted({*found["kept"]} - kept),
        "smallest_margin": outcome.record["smallest_margin"],
        "per_edge": found["per_edge"],
    }


def exported(folder: Path, size: dict[str, int]) -> tuple[Graph, PromptPairs, Any]:
    """A random GPT-2 and its prompts, left in the folder, and the same traced."""
    folder.mkdir(exist_ok=True)
    module = subjects.random_gpt2(**size)
    pairs = subjects.random_pairs(size["vocabulary"], prompts=PROMPTS, length=LENGTH)
    module.save_pretrained(folder)
    answers, wrong = np.concatenate(pairs.answers), np.concatenate(pairs.wrong_answers)
    np.savez(folder / "pairs.npz", clean=np.stack(pairs.clean), corrupted=np.stack(pairs.corrupted), answers=answers, wrong_answers=wrong)
    model = trace(module)
    return model.graph, pairs, model


def peer_acdc(python: str, folder: Path, names: Sequence[str], threshold: float, threads: int) -> dict[str, Any]:
    """auto-circuit's ACDC on these edges in this order."""
    (folder / "edges.json").write_text(json.dumps([*names]))
    case = ["-m", "benchmarks.peer_case", "acdc", str(folder), "--frozen", "--threshold", str(threshold), "--threads", str(threads)]
    return in_a_process(case, threads, python)


def acdc_order(graph: Graph, order: dict[str, list[str]]) -> list[str]:
    """All edges in the order in which our ACDC visits them, by auto-circuit's names."""
    pairs = ((graph.reader_id(reader), graph.writer_id(writer)) for reader in order["readers"] for writer in order["writers"])
    return [peer_name(graph, r, w) for r, w in pairs if graph.visible[r, w]]


def peer_name(graph: Graph, reader: int, writer: int) -> str:
    """auto-circuit's name of an edge: `A0.1->A1.2.Q` for our `a0.h1->a1.h2<q>`."""
    source, target = graph.writers[writer], graph.readers[reader]
    start = {"input": "Resid Start", "mlp": f"MLP {source.layer}"}.get(source.kind, f"A{source.layer}.{source.index}")
    ends = {"logits": "Resid End", "mlp": f"MLP {target.layer}"}
    return f"{start}->{ends.get(target.kind, f'A{target.layer}.{target.index}.{target.kind.upper()}')}"


def difference(ours: dict[str, float], theirs: dict[str, float]) -> float:
    """The largest difference of a score over the largest score. Raises `ValueError` if they are not of the same edges."""
    if ours.keys() != theirs.keys():
        raise ValueError(f"auto-circuit has other edges: {sorted(ours.keys() ^ theirs.keys())[:5]}")
    return max(abs(ours[name] - theirs[name]) for name in ours) / max(map(abs, ours.values()))


def table(found: dict[str, Any], same: dict[str, Any], versions: dict[str, str]) -> Table:
    ours, acdc, edges = found["circuitgraph"], found["acdc"], f"{found['edges']:,}"
    spread, base = Spread(**ours["spread"]), ours["base"]["median"]
    rows = [("EAP", "circuitgraph", "as they come", edges, _ms(base), f"{ours['seconds']:.2f}", str(spread), _gb(ours), "", "")]
    for parameters, theirs in found["auto-circuit"].items():
        seconds, forwards = Spread(**theirs["call"]), Spread(**theirs["wall_ratio"])
        ratio = f"{seconds.median / ours['seconds']:.1f} x in seconds, {forwards.median / spread.median:.1f} x in forwards"
        agreement = f"{'PASS' if theirs['difference'] <= TOLERANCE else 'FAIL'}: {theirs['difference']:.1e}"
        base = theirs["base"]["median"]
        rows.append(
            ("EAP", "auto-circuit", parameters, edges, _ms(base), f"{seconds.median:.2f}", str(forwards), _gb(theirs), ratio, agreement)
        )
    sampled = f"{acdc['seconds_per_edge'] * found['edges']:,.0f} (extrapolated from {acdc['measured_edges']} edges)"
    forwards_ = f"{acdc['per_edge'] * found['edges']:,.0f} ({acdc['per_edge']:.2f} an edge)"
    rows.append(("ACDC", "auto-circuit", "frozen", edges, _ms(acdc["base"]), sampled, forwards_, _gb(acdc), "", ""))
    return Table("Beside auto-circuit", _COLUMNS, rows, (_about(versions), _about_circuits(same)))


def _about(versions: dict[str, str]) -> str:
    named = ", ".join(f"{name.replace('_', '-')} {number}" for name, number in versions.items())
    return (
        f"{named}. GPT-2-small size, random weights, {PROMPTS} x {LENGTH} tokens, logit difference. A plain forward is that of the library "
        "below: transformers, TransformerLens. Agreement: the largest difference of a score over the largest score "
        f"(bar {TOLERANCE:g}). The whole ACDC of circuitgraph stands under Discovery."
    )


def _about_circuits(same: dict[str, Any]) -> str:
    apart = [*same["only_ours"], *same["only_theirs"]]
    verdict = f"FAIL: {len(apart)} edges are in one only, such as {apart[0]}" if apart else "PASS: both keep the same"
    return (
        f"ACDC on a small random model ({same['edges']} edges, KL divergence, threshold {SMALL_THRESHOLD:g}), edge by edge in one order: "
        f"{same['kept']} kept; {verdict}. The decision nearest to the threshold was {same['smallest_margin']:.1e} away from it."
    )


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.3g}"


def _gb(case: dict[str, Any]) -> str:
    return f"{case['peak'] / 1e9:.2f}"


if __name__ == "__main__":
    main()
