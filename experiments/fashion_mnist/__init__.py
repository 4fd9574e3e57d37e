"""A Bayesian network forgets images of one class: the second study of Bayesian inference forgetting.

References:
    S. Fu, F. He and D. Tao (2021), Bayesian inference forgetting, arXiv:2101.06417, section 5.2.
"""
