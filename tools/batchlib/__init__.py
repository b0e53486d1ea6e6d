"""The command `batch` of tools/host.py: a table of jobs. All but `train_child` and `sheet` use the standard library
alone, and `on_ray` also Ray."""
