"""The parts of tools/host.py: they set ComfyUI up, start it, and run workflows on it. Standard library only."""
