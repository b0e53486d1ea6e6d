"""What tools/host.py is made of: setting ComfyUI up, starting it, and running workflows on it. Standard library
only."""
