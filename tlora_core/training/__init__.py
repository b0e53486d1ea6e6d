"""Training without knowing the model: settings, pictures, optimizers, the loop, and the folder of a run.

Imports `method` and `files`. A host gives the loop a denoiser.
"""
