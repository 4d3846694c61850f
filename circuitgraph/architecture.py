"""What a description of a model is made of, for those who write one by hand."""

from circuitgraph._architecture import MLP as MLP
from circuitgraph._architecture import Architecture as Architecture
from circuitgraph._architecture import Attention as Attention
from circuitgraph._architecture import AttentionPattern as AttentionPattern
from circuitgraph._architecture import Block as Block
from circuitgraph._architecture import FeedForward as FeedForward
from circuitgraph._architecture import Norm as Norm
from circuitgraph._architecture import Projection as Projection
from circuitgraph._architecture import Rotary as Rotary
