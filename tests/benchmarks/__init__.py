"""Benchmarks print times; they are never tests. Run one: ``python -m tests.benchmarks.NAME``."""
