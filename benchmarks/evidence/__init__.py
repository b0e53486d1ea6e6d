"""The evidence benchmark: scorers, the cells of the study, running them, and the report."""
