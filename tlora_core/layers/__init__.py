"""Adapters on the linear layers of a running model: while it samples, and in both passes of a training step.

Imports `method`. Knows no file, no training loop and no host.
"""
