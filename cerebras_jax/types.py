"""The few type names that the whole package shares."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import numpy as np

Array: TypeAlias = jax.Array
"""A JAX array or a tracer of one."""

Scalar: TypeAlias = float | np.number | np.ndarray | jax.Array
"""A real number: a Python float, a NumPy or JAX scalar, or a tracer of one."""

Schedule: TypeAlias = Callable[[Any], Any]
"""A pure function from the step (0, 1, 2, ...) to a number."""

Number: TypeAlias = Scalar | Schedule
"""A hyper-parameter: a constant, or a schedule that is evaluated at every step."""

Params: TypeAlias = Any
"""A pytree of arrays."""
