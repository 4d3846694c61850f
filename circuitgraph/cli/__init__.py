"""The command line: parses and prints. What it computes stands in the library under the same names."""

from circuitgraph.cli import _discover, _show, _evaluate, _compare, _repeat, _benchmark  # noqa: F401, I001  (registered in this order)
from circuitgraph.cli._app import app as app
