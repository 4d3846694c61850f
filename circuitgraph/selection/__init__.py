"""From scores to a circuit: one way of choosing a file. Frozen dataclasses with one method, `choose(graph, outcome, size) -> Choice`."""

from circuitgraph.selection._greedy import Greedy as Greedy
from circuitgraph.selection._integer_program import IntegerProgram as IntegerProgram
from circuitgraph.selection._selector import Choice as Choice
from circuitgraph.selection._selector import Selector as Selector
from circuitgraph.selection._selector import default_size as default_size
from circuitgraph.selection._sign_consistent import SignConsistent as SignConsistent
from circuitgraph.selection._threshold import Threshold as Threshold
from circuitgraph.selection._top import SignedTopN as SignedTopN
from circuitgraph.selection._top import TopN as TopN
