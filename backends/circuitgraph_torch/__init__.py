"""The PyTorch backend of circuitgraph."""

from circuitgraph_torch._find import find_architecture as find_architecture
from circuitgraph_torch._trace import TorchModel as TorchModel
from circuitgraph_torch._trace import trace as trace
from circuitgraph_torch._witness import write_witness as write_witness
