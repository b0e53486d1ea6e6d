"""A model that ComfyUI has loaded: its layers, its noise levels, its family, and the names that files give its layers.

Imports no other part of `hosts.comfy`.
"""
