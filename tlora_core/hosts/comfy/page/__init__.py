"""What the browser is told while a training or a sampler runs.

Imports `model`.
"""
