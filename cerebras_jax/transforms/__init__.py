"""Transformations around an optimizer, and averages beside it: one file each, with its state."""
