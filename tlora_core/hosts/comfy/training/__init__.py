"""Trains on a model that ComfyUI has loaded, from the picture to the saved file.

Imports all parts of `hosts.comfy` but `routes`.
"""
