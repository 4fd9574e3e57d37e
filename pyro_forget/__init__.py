"""Make a fitted Bayesian model in Pyro forget data, with evidence of how close the result is to a refit."""

__version__ = "0.1.0"
