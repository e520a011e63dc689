"""Transformations around an optimizer: optax pair to optax pair, each with its state."""
