"""Files: the T-LoRA file, its exports for other programs, and the readers of other programs' files.

Imports `method`. `untrusted` reads files from unknown sources; `atomic` does all the writing.
"""
