"""Tells the browser about running trainings and samplers.

Imports `model`.
"""
