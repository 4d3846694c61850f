"""Measures of a circuit: one measure a file."""

from circuitgraph.evaluation._curve import MIB_GRID as MIB_GRID
from circuitgraph.evaluation._curve import Area as Area
from circuitgraph.evaluation._curve import Curve as Curve
from circuitgraph.evaluation._curve import FaithfulnessCurve as FaithfulnessCurve
from circuitgraph.evaluation._curve import Point as Point
from circuitgraph.evaluation._faithfulness import Faithfulness as Faithfulness
from circuitgraph.evaluation._faithfulness import faithfulness as faithfulness
from circuitgraph.evaluation._measures import MEASURES as MEASURES
from circuitgraph.evaluation._measures import Finding as Finding
from circuitgraph.evaluation._measures import Measure as Measure
from circuitgraph.evaluation._protocol import Protocol as Protocol
from circuitgraph.evaluation._protocol import check_comparable as check_comparable
from circuitgraph.evaluation._question import CircuitGraphWarning as CircuitGraphWarning
from circuitgraph.evaluation._report import Report as Report
from circuitgraph.evaluation._report import evaluate as evaluate
from circuitgraph.evaluation._scale import Scale as Scale
