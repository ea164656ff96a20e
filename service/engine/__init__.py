"""The engine: integers schedule, tensors begin at the runner. It imports nothing of the API."""
