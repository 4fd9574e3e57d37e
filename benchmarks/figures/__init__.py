"""Figures of the benchmarks, drawn from the values that a run leaves, into docs/figures/."""
