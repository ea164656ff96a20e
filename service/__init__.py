"""Requests to tokens: the engine that schedules them and the HTTP service in front of it."""

__version__ = "0.1.0"
