"""The scripts that train the models of `circuitgraph/zoo`."""
