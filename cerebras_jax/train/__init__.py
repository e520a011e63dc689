"""The training command: a small byte-level GPT on real text, with the optimizer of a recipe."""
