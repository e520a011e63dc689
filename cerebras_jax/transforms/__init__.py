"""Transformations of optimizers: functions from an optax pair to an optax pair, one file each."""
