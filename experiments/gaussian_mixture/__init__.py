"""A mixture of four Gaussians forgets 800 of its 2,000 points: the first study of Bayesian inference forgetting.

References:
    S. Fu, F. He and D. Tao (2021), Bayesian inference forgetting, arXiv:2101.06417, section 5.1.
"""
