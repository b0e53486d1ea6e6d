"""Inspection of results: reports, plots, sheets, sweeps, and scores of generated pictures.

Imports `method`, `files` and `training`. Nothing here trains or samples.
"""
