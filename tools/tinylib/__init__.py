"""How the tiny base model and its flow-matching sibling are trained."""
