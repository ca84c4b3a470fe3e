"""Benchmarks: figures beside figures of the same run, never a timed assertion. See ``docs/benchmarks.md``."""
