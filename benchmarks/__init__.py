"""Speed, memory and closeness, always beside a rival in the same run: python -m benchmarks."""
