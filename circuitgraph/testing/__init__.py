"""What tests need: a numpy reference model and engine, the oracle for every backend; models whose circuit is known; and
`check_algorithm`, the properties that every algorithm must have. Hypothesis strategies are in `circuitgraph.testing.strategies`."""

from circuitgraph.testing._check_algorithm import CheckError as CheckError
from circuitgraph.testing._check_algorithm import CheckReport as CheckReport
from circuitgraph.testing._check_algorithm import CheckResult as CheckResult
from circuitgraph.testing._check_algorithm import check_algorithm as check_algorithm
from circuitgraph.testing._checks import CHECKS as CHECKS
from circuitgraph.testing._compiled import COMPILED as COMPILED
from circuitgraph.testing._compiled import CompiledModel as CompiledModel
from circuitgraph.testing._compiled import compiled_model as compiled_model
from circuitgraph.testing._outputs import OutputEngine as OutputEngine
from circuitgraph.testing._planted import PlantedModel as PlantedModel
from circuitgraph.testing._planted import planted_model as planted_model
from circuitgraph.testing._random_dictionary import random_cross_layer_transcoder as random_cross_layer_transcoder
from circuitgraph.testing._random_dictionary import random_dictionary as random_dictionary
from circuitgraph.testing._random_pairs import random_pairs as random_pairs
from circuitgraph.testing._reference_engine import ReferenceEngine as ReferenceEngine
from circuitgraph.testing._reference_model import ReferenceModel as ReferenceModel
from circuitgraph.testing._reference_parts import ReferenceAttention as ReferenceAttention
from circuitgraph.testing._reference_parts import ReferenceLayer as ReferenceLayer
from circuitgraph.testing._reference_parts import ReferenceMLP as ReferenceMLP
from circuitgraph.testing._reference_parts import ReferenceNorm as ReferenceNorm
from circuitgraph.testing._reference_run import ReferenceValues as ReferenceValues
from circuitgraph.testing._reference_trace import ReferenceTrace as ReferenceTrace
from circuitgraph.testing._trained import TrainedModel as TrainedModel
from circuitgraph.testing._trained import trained_model as trained_model
