"""Checkpoints: runs that go on where they were, whatever happened in between."""

from cerebras_jax.checkpoint.files import Contents, inspect, restore, save
from cerebras_jax.checkpoint.fingerprint import fingerprint
from cerebras_jax.checkpoint.leaves import CheckpointError, DamagedError
from cerebras_jax.checkpoint.reading import Restored
from cerebras_jax.checkpoint.series import Checkpoints
