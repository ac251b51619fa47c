"""Measures this library beside the reference, its peers, and what the machine could do: `python -m benchmarks`."""
