"""From scores to a circuit: one way of choosing a file."""
