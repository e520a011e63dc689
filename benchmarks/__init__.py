"""Speed and memory of cerebras_jax beside optax, flax and torch: ``python -m benchmarks``."""
