"""Guide families and sampling effects for variational posteriors: `pyro_forget.guides`."""
