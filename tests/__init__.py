"""The tests of pyro-forget."""
