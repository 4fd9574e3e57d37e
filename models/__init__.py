"""Pyro models to fit, forget from and compare with: `pyro_forget.models`."""
