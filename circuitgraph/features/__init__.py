"""Dictionaries of features (sparse autoencoders, transcoders) and neurons as nodes of the same graph."""

from circuitgraph._dictionary import Dictionary as Dictionary
from circuitgraph._dictionary import Neurons as Neurons
from circuitgraph._refinement import Fold as Fold
from circuitgraph._refinement import Refinement as Refinement
from circuitgraph.features._load import load_dictionary as load_dictionary
from circuitgraph.features._load import load_transcoders as load_transcoders
from circuitgraph.features._merge import divided as divided
from circuitgraph.features._merge import merged as merged
from circuitgraph.features._refine import refine as refine
from circuitgraph.features._saelens import from_saelens as from_saelens
from circuitgraph.features._saelens import save_dictionary as save_dictionary
