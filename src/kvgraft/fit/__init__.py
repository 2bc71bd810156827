"""Fitting a projector alone between two frozen models: from stored KV to adapters, and what they are worth."""
