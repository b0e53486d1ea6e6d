"""The parts of tools/gpu_check.py: what is tried on a card, in which order, and how it is run and reported."""
