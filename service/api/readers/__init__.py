"""Readers of what models write when they think or call functions, one module a dialect."""
