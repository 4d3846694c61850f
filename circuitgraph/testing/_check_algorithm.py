"""`check_algorithm`: what every algorithm must pass, ours or a user's, as `check_estimator` is for scikit-learn."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from circuitgraph._engine import Algorithm, checked_algorithm
from circuitgraph._errors import CircuitGraphError, unknown_name
from circuitgraph.testing._checks import CHECKS, Failed, NotApplicable, Subject

Status = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class CheckResult:
    """How one check went. `why`: what a failed one saw, or why it was skipped."""

    id: str
    status: Status
    why: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.status:8}{self.id}{f': {self.why}' if self.why else ''}"


@dataclass(frozen=True)
class CheckReport:
    """All checks of one algorithm; prints as a list."""

    algorithm: str
    results: tuple[CheckResult, ...]

    @property
    def failed(self) -> tuple[CheckResult, ...]:
        return tuple(result for result in self.results if result.status == "failed")

    def __str__(self) -> str:
        return "\n".join([self.algorithm, *(f"  {result}" for result in self.results)])


class CheckError(CircuitGraphError, AssertionError):
    """Some checks failed; `report` has them all."""

    def __init__(self, report: CheckReport) -> None:
        super().__init__(f"{len(report.failed)} of {len(report.results)} checks failed:\n{report}")
        self.report = report


def check_algorithm(
    algorithm: Algorithm,
    *,
    backends: Sequence[str] = ("torch",),
    skip: Mapping[str, str] | None = None,
    only: Sequence[str] = (),
    least_auroc: float = 0.95,
) -> CheckReport:
    """Run every check of `CHECKS` on an algorithm, with models whose circuit is known.

    `backends`: the first one answers, all of them must agree ("reference" is the numpy one). `skip`: ids of checks with the reason why they
    do not count here; `only`: ids of those to run. `least_auroc`: how well an algorithm that scores must tell planted edges from others.
    Raises `CheckError`, an `AssertionError` that lists all checks, if one fails.

    >>> from circuitgraph import EAP
    >>> report = check_algorithm(EAP(), backends=["reference"], only=["outcome-is-well-formed"])
    >>> print(report)
    EAP()
      passed  outcome-is-well-formed
    """
    report = CheckReport(repr(algorithm), tuple(results(algorithm, backends=backends, skip=skip, only=only, least_auroc=least_auroc)))
    if report.failed:
        raise CheckError(report)
    return report


def results(
    algorithm: Algorithm,
    *,
    backends: Sequence[str] = ("torch",),
    skip: Mapping[str, str] | None = None,
    only: Sequence[str] = (),
    least_auroc: float = 0.95,
) -> Iterator[CheckResult]:
    """The results one by one, as they come."""
    checked_algorithm("check_algorithm", algorithm)
    reasons = dict(skip or {})
    for name in (*reasons, *only):
        if name not in CHECKS:
            raise unknown_name("check", name, CHECKS)
    if empty := [name for name, reason in reasons.items() if not reason.strip()]:
        raise CircuitGraphError(f"check {empty[0]} is skipped without a reason; say why")
    if not backends:
        raise CircuitGraphError("check_algorithm: no backend; give one at least, such as torch")
    subject = Subject(algorithm, tuple(backends), least_auroc)
    for name in only or CHECKS:
        yield CheckResult(name, "skipped", reasons[name]) if name in reasons else result_of(name, subject)


def result_of(name: str, subject: Subject) -> CheckResult:
    """One check. Whatever else the algorithm raises is a failure too."""
    started = time.perf_counter()

    def ended(status: Status, why: Any = "") -> CheckResult:
        return CheckResult(name, status, str(why), round(time.perf_counter() - started, 3))

    try:
        CHECKS[name](subject)
    except NotApplicable as reason:
        return ended("skipped", reason)
    except Failed as failure:
        return ended("failed", failure)
    except Exception as error:
        return ended("failed", f"it raised {type(error).__name__}: {error}")
    return ended("passed")
