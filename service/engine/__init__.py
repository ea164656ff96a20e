"""The engine: integers schedule, tensors begin at the runner. Imports nothing of ``service.api``."""
