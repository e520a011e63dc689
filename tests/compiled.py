"""Programs to look into are compiled as users get them, unlike those that tests only run."""

from importlib.metadata import version
from typing import Any

OLDER_EMITTER = "xla_cpu_use_fusion_emitters" if version("jaxlib").startswith("0.10.") else None
"""The flag that is off in tests, see conftest.py; None where XLA has no such choice."""


def as_shipped(lowered: Any) -> Any:
    """``lowered.compile()`` with XLA's own choice of the emitter."""
    return lowered.compile({OLDER_EMITTER: True} if OLDER_EMITTER else None)
