"""A pytest plugin that runs the checks of `check_algorithm`, each as a test of its own.

    pytest -p circuitgraph.testing.pytest_plugin --circuitgraph-check my_package:MyAlgorithm

It is asked for by name: a plugin that comes by itself would import numpy before the conftest of anybody else could say how many threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from circuitgraph.testing._checks import Subject


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("circuitgraph", "checks of algorithms for circuit discovery")
    group.addoption(
        "--circuitgraph-check",
        action="append",
        default=[],
        metavar="MODULE:ALGORITHM",
        help="check an algorithm: an instance, or a class or function that makes one without arguments; may be given several times",
    )
    group.addoption("--circuitgraph-backends", default="torch", metavar="NAMES", help="with commas; the first one answers, all must agree")
    group.addoption(
        "--circuitgraph-skip", action="append", default=[], metavar="CHECK=REASON", help="a check that does not count, and why not"
    )


def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Adds a test for every check of every algorithm asked for."""
    if config.getoption("--circuitgraph-check"):
        items.extend(_items(session, config))


def _items(session: pytest.Session, config: pytest.Config) -> list[pytest.Item]:
    from circuitgraph._errors import unknown_name
    from circuitgraph.testing._checks import CHECKS, Subject

    reasons = dict(map(_reason, config.getoption("--circuitgraph-skip")))
    for check in reasons:
        if check not in CHECKS:
            raise pytest.UsageError(str(unknown_name("check", check, CHECKS)))
    backends = tuple(name.strip() for name in config.getoption("--circuitgraph-backends").split(","))
    found: list[pytest.Item] = []
    for spec in config.getoption("--circuitgraph-check"):
        subject = Subject(_algorithm(spec), backends)
        found += [
            CheckItem.from_parent(session, name=f"{spec}[{check}]", subject=subject, check=check, reason=reasons.get(check))
            for check in CHECKS
        ]
    return found


def _reason(text: str) -> tuple[str, str]:
    check, _, reason = text.partition("=")
    if not reason.strip():
        raise pytest.UsageError(f"--circuitgraph-skip {text}: expected CHECK=REASON")
    return check.strip(), reason.strip()


def _algorithm(spec: str) -> Any:
    import importlib

    from circuitgraph._engine import checked_algorithm
    from circuitgraph._errors import CircuitGraphError

    module, _, name = spec.partition(":")
    try:
        value = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise pytest.UsageError(f"--circuitgraph-check {spec}: {error}; expected MODULE:ALGORITHM") from None
    try:
        return checked_algorithm(f"--circuitgraph-check {spec}", value() if callable(value) else value)
    except (CircuitGraphError, TypeError) as error:
        raise pytest.UsageError(f"--circuitgraph-check {spec}: {error}; give an instance, or what makes one without arguments") from None


class CheckItem(pytest.Item):
    """One check of one algorithm."""

    def __init__(self, *, subject: Subject, check: str, reason: str | None, **more: Any) -> None:
        super().__init__(**more)
        self.subject, self.check, self.reason = subject, check, reason

    def runtest(self) -> None:
        from circuitgraph.testing._check_algorithm import result_of

        if self.reason is not None:
            pytest.skip(self.reason)
        result = result_of(self.check, self.subject)
        if result.status == "skipped":
            pytest.skip(result.why)
        if result.status == "failed":
            pytest.fail(f"{self.check}: {result.why}", pytrace=False)

    def reportinfo(self) -> tuple[str, None, str]:
        return "circuitgraph", None, self.name
