"""`python -m circuitgraph.cli`."""

from circuitgraph.cli import app

if __name__ == "__main__":
    app(prog_name="circuitgraph")
