"""The method in plain torch: the rank schedule, the mask, the orthogonal starts, and trainable adapters in banks.

Of this package, imports only `errors`.
"""
