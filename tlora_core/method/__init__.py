"""The method in plain torch: the rank schedule, the mask, the orthogonal starts, and trainable adapters in banks.

Imports nothing of this package but `errors`.
"""
