"""Headrace: serve language models on one's own machines, as a stream of events."""

__version__ = "0.1.0"
