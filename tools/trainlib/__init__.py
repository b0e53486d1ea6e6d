"""The command `train` of tools/host.py. All but `job` uses the standard library alone."""
