"""The JAX backend of circuitgraph."""

from circuitgraph_jax._describe import describe as describe
from circuitgraph_jax._trace import JaxModel as JaxModel
from circuitgraph_jax._trace import trace as trace
