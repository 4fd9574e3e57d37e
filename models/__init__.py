"""Bayesian models in Pyro: settings in, `model(x, y)` out, data in the plate "data", observations at the site "y"."""

from pyro_forget.models.gaussian_mixture import GaussianMixture
from pyro_forget.models.hierarchical_regression import HierarchicalRegression
from pyro_forget.models.lenet import LeNet
from pyro_forget.models.linear_regression import LinearRegression
from pyro_forget.models.logistic_regression import LogisticRegression
from pyro_forget.models.mlp import MLP
from pyro_forget.models.poisson_regression import PoissonRegression
from pyro_forget.models.softmax_regression import SoftmaxRegression

__all__ = [
    "MLP",
    "GaussianMixture",
    "HierarchicalRegression",
    "LeNet",
    "LinearRegression",
    "LogisticRegression",
    "PoissonRegression",
    "SoftmaxRegression",
]
