"""Studies, one script each, run from a checkout: python -m experiments.NAME --help."""
