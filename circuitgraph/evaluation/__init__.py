"""Measures of a circuit: one measure a file."""

from circuitgraph.evaluation._faithfulness import Faithfulness as Faithfulness
from circuitgraph.evaluation._faithfulness import faithfulness as faithfulness
from circuitgraph.evaluation._question import CircuitGraphWarning as CircuitGraphWarning
from circuitgraph.evaluation._report import Report as Report
from circuitgraph.evaluation._report import evaluate as evaluate
