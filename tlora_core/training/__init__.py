"""Model-independent training: settings, pictures, optimizers, the loop, and run folders.

Imports `method` and `files`. A host provides the denoiser.
"""
