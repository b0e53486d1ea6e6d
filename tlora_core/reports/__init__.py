"""Looking at results: reports, plots, sheets, sweeps and the scores of generated pictures.

Imports `method`, `files` and `training`. Nothing here trains or samples.
"""
