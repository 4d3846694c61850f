"""circuitgraph finds the part of a neural network that does a job, and proves it."""

from typing import TYPE_CHECKING

from circuitgraph._architecture import Architecture as Architecture
from circuitgraph._circuit import Circuit as Circuit
from circuitgraph._discover import check_trace as check_trace
from circuitgraph._discover import discover as discover
from circuitgraph._discover import trace as trace
from circuitgraph._engine import Algorithm as Algorithm
from circuitgraph._engine import Check as Check
from circuitgraph._engine import Engine as Engine
from circuitgraph._engine import Outcome as Outcome
from circuitgraph._engine import Rule as Rule
from circuitgraph._engine import Source as Source
from circuitgraph._engine import TracedModel as TracedModel
from circuitgraph._errors import CircuitGraphError as CircuitGraphError
from circuitgraph._errors import DegenerateError as DegenerateError
from circuitgraph._errors import FileError as FileError
from circuitgraph._errors import TaskError as TaskError
from circuitgraph._errors import TraceError as TraceError
from circuitgraph._errors import UnknownNameError as UnknownNameError
from circuitgraph._graph import Graph as Graph
from circuitgraph._metrics import NLL as NLL
from circuitgraph._metrics import Accuracy as Accuracy
from circuitgraph._metrics import KLDivergence as KLDivergence
from circuitgraph._metrics import LogitDiff as LogitDiff
from circuitgraph._metrics import Metric as Metric
from circuitgraph._metrics import ProbDiff as ProbDiff
from circuitgraph._names import Edge as Edge
from circuitgraph._names import Reader as Reader
from circuitgraph._names import Writer as Writer
from circuitgraph._pairs import PromptPairs as PromptPairs
from circuitgraph._published import reference_circuit as reference_circuit
from circuitgraph._published import reference_circuits as reference_circuits
from circuitgraph.algorithms import ACDC as ACDC
from circuitgraph.algorithms import EAP as EAP
from circuitgraph.algorithms import EAPIG as EAPIG
from circuitgraph.algorithms import HISP as HISP
from circuitgraph.algorithms import ActivationPatching as ActivationPatching
from circuitgraph.algorithms import AlongPaths as AlongPaths
from circuitgraph.algorithms import AttributionPatching as AttributionPatching
from circuitgraph.algorithms import EdgePruning as EdgePruning
from circuitgraph.algorithms import Ensemble as Ensemble
from circuitgraph.algorithms import InformationFlow as InformationFlow
from circuitgraph.algorithms import Magnitude as Magnitude
from circuitgraph.algorithms import OptimalAblation as OptimalAblation
from circuitgraph.algorithms import PathPatching as PathPatching
from circuitgraph.algorithms import PerPosition as PerPosition
from circuitgraph.algorithms import Random as Random
from circuitgraph.algorithms import RelP as RelP
from circuitgraph.algorithms import ScreenedBy as ScreenedBy
from circuitgraph.algorithms import Selected as Selected
from circuitgraph.algorithms import SparseFeatureCircuits as SparseFeatureCircuits
from circuitgraph.algorithms import SubnetworkProbing as SubnetworkProbing
from circuitgraph.algorithms import UniformGradientSampling as UniformGradientSampling
from circuitgraph.evaluation import Agreement as Agreement
from circuitgraph.evaluation import CircuitGraphWarning as CircuitGraphWarning
from circuitgraph.evaluation import Comparison as Comparison
from circuitgraph.evaluation import Completeness as Completeness
from circuitgraph.evaluation import Curve as Curve
from circuitgraph.evaluation import EdgeConfidence as EdgeConfidence
from circuitgraph.evaluation import FaithfulnessCurve as FaithfulnessCurve
from circuitgraph.evaluation import HypothesisTests as HypothesisTests
from circuitgraph.evaluation import Minimality as Minimality
from circuitgraph.evaluation import Protocol as Protocol
from circuitgraph.evaluation import Report as Report
from circuitgraph.evaluation import Stability as Stability
from circuitgraph.evaluation import check_comparable as check_comparable
from circuitgraph.evaluation import compare as compare
from circuitgraph.evaluation import confidence as confidence
from circuitgraph.evaluation import evaluate as evaluate
from circuitgraph.evaluation import optimal_source as optimal_source
from circuitgraph.evaluation import stability as stability
from circuitgraph.selection import Greedy as Greedy
from circuitgraph.selection import IntegerProgram as IntegerProgram
from circuitgraph.selection import Selector as Selector
from circuitgraph.selection import SignConsistent as SignConsistent
from circuitgraph.selection import SignedTopN as SignedTopN
from circuitgraph.selection import Threshold as Threshold
from circuitgraph.selection import TopN as TopN

if TYPE_CHECKING:
    from circuitgraph._benchmark import Benchmark as Benchmark
    from circuitgraph._benchmark import benchmark as benchmark
    from circuitgraph._task import Task as Task
    from circuitgraph._task import load_task as load_task

# What needs pydantic, which takes as long to import as all the rest, is loaded when asked for (PEP 562).
_LATER = {"Task": "_task", "load_task": "_task", "Benchmark": "_benchmark", "benchmark": "_benchmark"}

__all__ = sorted({*(name for name in globals() if not name.startswith("_")), *_LATER} - {"TYPE_CHECKING"})


def __getattr__(name: str) -> object:
    if name in _LATER:
        from importlib import import_module

        return getattr(import_module(f"circuitgraph.{_LATER[name]}"), name)
    raise AttributeError(f"module 'circuitgraph' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
