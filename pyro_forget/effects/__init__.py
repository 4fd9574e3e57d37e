"""The one place that touches Pyro's effect handlers and its parameter store: one convention a file."""
