"""The figures of circuitgraph, measured: `python -m benchmarks.discovery`, `.eap`, `.startup`, ...; `make bench` runs all of them.

Every script prints a table and, with `--json FILE`, writes the numbers behind it.
"""
