"""Where the time of a method goes, and its floor: every operation of PyTorch that it makes, timed, with what it computes and moves.

An operation takes at least its multiplications and additions at the speed of the machine's best matrix product, and at least its bytes at
the speed of a copy, whichever is longer. Both speeds are measured here, on large blocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks import discovery, discovery_case, subjects
from benchmarks.clock import timed
from benchmarks.discovery_case import Case
from benchmarks.eap_case import run_scoring
from benchmarks.machine import Watch
from benchmarks.tables import Table, options, publish
from circuitgraph import ACDC, EAP

CASES = ("eap", "acdc-logit-diff", "acdc-kl")
LEAST_SHARE = 0.03  # of the seconds: an operation with less is not shown by itself
_SHOWN = {"eap": "EAP", "acdc-logit-diff": "ACDC, logit_diff at 0.1", "acdc-kl": "ACDC, kl at 0.05"}


@dataclass
class Cost:
    """Of operations of one kind. `floor`: their shortest time at the machine's best speeds, one by one, in seconds."""

    seconds: float = 0.0
    operations: int = 0
    moved: int = 0
    floor: float = 0.0


@dataclass(frozen=True)
class Speeds:
    """Of the machine: operations a second in a matrix product, bytes a second in a copy."""

    product: float
    copy: float


@dataclass
class Profile:
    """What a call cost by kind, and in seconds all in all (what PyTorch did not do itself included)."""

    costs: dict[str, Cost] = field(default_factory=dict)
    wall: float = 0.0

    def shown(self) -> Iterator[tuple[str, Cost]]:
        """The longest first; what is short, together, last."""
        rest = Cost()
        for kind, cost in sorted(self.costs.items(), key=lambda item: -item[1].seconds):
            if cost.seconds >= LEAST_SHARE * self.wall:
                yield kind, cost
            else:
                rest = Cost(*(a + b for a, b in zip(astuple(rest), astuple(cost), strict=True)))
        yield "other operations", rest

    @property
    def floor(self) -> float:
        return sum(cost.floor for cost in self.costs.values())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(__doc__)
    parser.add_argument("--model", choices=discovery_case.MODELS, default=subjects.SMOLLM2)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[*CASES])
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    watch, at = Watch(), speeds()
    found = {name: measured(name, chosen.model, at) for name in chosen.cases}
    command = f"python -m benchmarks.floors --model {chosen.model} --cases {' '.join(chosen.cases)} --threads {chosen.threads}"
    numbers = [{"case": name, "plain": asdict(plain), "method": asdict(method)} for name, (plain, method) in found.items()]
    publish(table(found, at, chosen.model), numbers, command=command, watch=watch, file=chosen.json)


def speeds(size: int = 2048, rounds: int = 7) -> Speeds:
    """The best of some rounds."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    source, target = torch.randn(32, size, size // 2), torch.empty(32, size, size // 2)  # past every cache
    product = min(timed(lambda: a @ b).wall for _ in range(rounds))
    copy = min(timed(lambda: target.copy_(source)).wall for _ in range(rounds))
    return Speeds(2 * size**3 / product, 2 * source.numel() * source.element_size() / copy)


def measured(name: str, model: str, at: Speeds) -> tuple[Profile, Profile]:
    """A plain forward pass, and the whole method."""
    if name == "eap":
        case = Case(*discovery_case.subject(model, 16))
        method: Callable[[], object] = lambda: run_scoring(EAP(), case.traced, case.pairs)  # noqa: E731
        method()
    else:
        case = Case(*discovery_case.subject(model, 4), name.removeprefix("acdc-").replace("-", "_"), 0.1 if "logit" in name else 0.05)
        method = lambda: ACDC(threshold=case.threshold).run(case.bind())  # noqa: E731
        discovery_case.warm_up(case)
    forward = discovery_case.plain_forward(case)
    forward()
    return profiled(forward, case, at), profiled(method, case, at)


def profiled(call: Callable[[], object], case: Case, at: Speeds) -> Profile:
    meter: Any = _Meter(case, at)  # PyTorch does not type its modes
    started = time.perf_counter()
    with meter:
        call()
    meter.profile.wall = time.perf_counter() - started
    profile: Profile = meter.profile
    return profile


class _Meter(TorchDispatchMode):
    """Times every operation. On a CPU one ends before the next begins."""

    def __init__(self, case: Case, at: Speeds) -> None:
        super().__init__()
        module = case.traced.module  # type: ignore[attr-defined]  # the torch backend's own
        self.profile, self._at = Profile(), at
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
        self._unembedding = module.get_output_embeddings().weight.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        started = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        seconds = time.perf_counter() - started
        counted = flop_registry.get(func.overloadpacket)
        operations = int(counted(*args, **(kwargs or {}), out_val=out)) if counted else 0
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        made = [value for value in tree_leaves(out) if isinstance(value, Tensor)]
        moved = 0 if func.is_view else sum({value.data_ptr(): _bytes(value) for value in (*given, *made)}.values())
        cost = self.profile.costs.setdefault(self._kind(func, given, operations), Cost())
        cost.seconds += seconds
        cost.operations += operations
        cost.moved += moved
        cost.floor += max(operations / self._at.product, moved / self._at.copy)
        return out

    def _kind(self, func: Any, given: Sequence[Tensor], operations: int) -> str:
        if "attention" in str(func):
            return "attention"
        if not operations:
            return str(func.overloadpacket)
        storages = {value.untyped_storage().data_ptr() for value in given}
        if self._unembedding in storages:
            return "products with the unembedding"
        return "products with the model's weights" if storages & self._weights else "other products"


def _bytes(value: Tensor) -> int:
    """What it has in memory: an expanded tensor no more than its storage."""
    return min(value.numel() * value.element_size(), value.untyped_storage().nbytes())


def table(found: Mapping[str, tuple[Profile, Profile]], at: Speeds, model: str) -> Table:
    rows = []
    for name, (plain, method) in found.items():
        for what, profile in ((f"{_SHOWN[name]}: a plain forward", plain), (_SHOWN[name], method)):
            rows += [_row(what, kind, cost, profile, plain) for kind, cost in profile.shown()]
            rest = profile.wall - sum(cost.seconds for cost in profile.costs.values())
            rows.append((what, "Python and numpy, this meter's own included", f"{rest:.2f}", f"{rest / profile.wall:.0%}", "", "", "", ""))
            whole = f"{profile.wall:.2f}", "100%", "", "", f"{profile.floor:.2f}", f"{profile.floor / plain.floor:.2f}"
            rows.append((what, "together", *whole))
    columns = ("what", "operations", "seconds", "share", "GFLOP (a second)", "GB (a second)", "floor, s", "floor, plain forwards' floors")
    note = (
        f"This machine: {at.product / 1e9:.0f} GFLOP a second in a matrix product, {at.copy / 1e9:.1f} GB a second in a copy. Floor: every "
        "operation at the one or the other, whichever takes longer; what lies in a cache can be moved faster than that, so seconds may be "
        "below it. GB: what an operation reads and writes by its shapes. ACDC: the whole run, which the meter makes longer."
    )
    return Table(f"Floors: {discovery.title(model)}", columns, rows, (note,))


def _row(what: str, kind: str, cost: Cost, profile: Profile, plain: Profile) -> tuple[str, ...]:
    flops = f"{cost.operations / 1e9:,.1f} ({cost.operations / cost.seconds / 1e9:.0f})" if cost.operations else ""
    moved = f"{cost.moved / 1e9:,.2f} ({cost.moved / max(cost.seconds, 1e-9) / 1e9:.1f})"
    shares = f"{cost.seconds:.2f}", f"{cost.seconds / profile.wall:.0%}"
    return (what, kind, *shares, flops, moved, f"{cost.floor:.2f}", f"{cost.floor / plain.floor:.2f}")


if __name__ == "__main__":
    main()
