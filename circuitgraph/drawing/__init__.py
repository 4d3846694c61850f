"""Pictures of circuits: DOT, SVG, HTML, PDF and PNG."""

from circuitgraph.drawing._curve import plot_curve as plot_curve
from circuitgraph.drawing._curve import plot_format as plot_format
from circuitgraph.drawing._dot import to_dot as to_dot
from circuitgraph.drawing._plan import Detail as Detail
from circuitgraph.drawing._render import FORMATS as FORMATS
from circuitgraph.drawing._render import render as render
from circuitgraph.drawing._render import render_dot as render_dot
from circuitgraph.drawing._render import render_joint as render_joint
