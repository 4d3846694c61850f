"""Dictionaries of features (sparse autoencoders, transcoders) and neurons as nodes of the same graph."""

from circuitgraph._dictionary import Dictionary as Dictionary
from circuitgraph._dictionary import Neurons as Neurons
from circuitgraph._refinement import Fold as Fold
from circuitgraph._refinement import Refinement as Refinement
from circuitgraph.features._attribution import AttributionGraph as AttributionGraph
from circuitgraph.features._attribution import AttributionNode as AttributionNode
from circuitgraph.features._attribution import attribution_graph as attribution_graph
from circuitgraph.features._load import load_dictionary as load_dictionary
from circuitgraph.features._load import load_transcoders as load_transcoders
from circuitgraph.features._meaning import Example as Example
from circuitgraph.features._meaning import FeatureCard as FeatureCard
from circuitgraph.features._meaning import feature_cards as feature_cards
from circuitgraph.features._meaning import read_labels as read_labels
from circuitgraph.features._meaning import save_cards as save_cards
from circuitgraph.features._merge import divided as divided
from circuitgraph.features._merge import merged as merged
from circuitgraph.features._neuronpedia import from_neuronpedia as from_neuronpedia
from circuitgraph.features._neuronpedia import save_neuronpedia as save_neuronpedia
from circuitgraph.features._neuronpedia import to_neuronpedia as to_neuronpedia
from circuitgraph.features._picture import render_attribution as render_attribution
from circuitgraph.features._refine import refine as refine
from circuitgraph.features._saelens import from_saelens as from_saelens
from circuitgraph.features._saelens import save_dictionary as save_dictionary
