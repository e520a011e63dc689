"""``python -m cerebras_jax`` is the command ``cerebras-jax``."""

from cerebras_jax.train.cli import main

main(prog_name="cerebras-jax")
