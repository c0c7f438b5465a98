"""Measurements: each module is a command, `python -m benchmarks.NAME`. Run from the repository, not installed."""
