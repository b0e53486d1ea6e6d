"""The embedded tiny base model: its picture world, tokenizer, autoencoder and weights. Plain torch and numpy."""
