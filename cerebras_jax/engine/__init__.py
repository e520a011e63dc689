"""From an algorithm for one parameter to an optax pair for a whole tree."""
