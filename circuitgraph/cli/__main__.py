"""`python -m circuitgraph.cli`."""

from circuitgraph.cli import app

app(prog_name="circuitgraph")
