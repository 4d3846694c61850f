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
from circuitgraph.algorithms import ACDC as ACDC
from circuitgraph.algorithms import EAP as EAP
from circuitgraph.algorithms import ActivationPatching as ActivationPatching
from circuitgraph.evaluation import CircuitGraphWarning as CircuitGraphWarning
from circuitgraph.evaluation import Report as Report
from circuitgraph.evaluation import evaluate as evaluate

if TYPE_CHECKING:
    from circuitgraph._task import Task as Task
    from circuitgraph._task import load_task as load_task

__all__ = sorted({*(name for name in globals() if not name.startswith("_")), "Task", "load_task"} - {"TYPE_CHECKING"})


def __getattr__(name: str) -> object:
    """Tasks are pydantic models, which take as long to import as all the rest: they are loaded when asked for (PEP 562)."""
    if name in ("Task", "load_task"):
        from circuitgraph import _task

        return getattr(_task, name)
    raise AttributeError(f"module 'circuitgraph' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), "Task", "load_task"})
