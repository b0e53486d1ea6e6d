"""Files: the T-LoRA file, what is made of it for other programs, and reading what other programs write.

Imports `method`. `untrusted` reads files from strangers; `atomic` does all the writing.
"""
