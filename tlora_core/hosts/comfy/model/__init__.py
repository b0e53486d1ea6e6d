"""A model that ComfyUI has loaded: its layers, noise levels, family, and the names of its layers in files.

Imports no other part of `hosts.comfy`.
"""
