"""The HTTP routes for plans, trainings and files.

Imports all other parts of `hosts.comfy`; only `nodes/` imports it.
"""
