"""The evidence benchmark: scorers, cells of the study, their run, and what is made of the results."""
