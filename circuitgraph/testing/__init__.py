"""What tests need: a numpy reference model and engine, the oracle for every backend, and compiled programs whose circuits are known."""

from circuitgraph.testing._compiled import COMPILED as COMPILED
from circuitgraph.testing._compiled import CompiledModel as CompiledModel
from circuitgraph.testing._compiled import compiled_model as compiled_model
from circuitgraph.testing._outputs import OutputEngine as OutputEngine
from circuitgraph.testing._random_pairs import random_pairs as random_pairs
from circuitgraph.testing._reference_engine import ReferenceEngine as ReferenceEngine
from circuitgraph.testing._reference_engine import ReferenceValues as ReferenceValues
from circuitgraph.testing._reference_model import ReferenceModel as ReferenceModel
from circuitgraph.testing._reference_parts import ReferenceAttention as ReferenceAttention
from circuitgraph.testing._reference_parts import ReferenceLayer as ReferenceLayer
from circuitgraph.testing._reference_parts import ReferenceMLP as ReferenceMLP
from circuitgraph.testing._reference_parts import ReferenceNorm as ReferenceNorm
from circuitgraph.testing._reference_trace import ReferenceTrace as ReferenceTrace
