"""Programs to look into are compiled as users get them, unlike those that tests only run."""

from typing import Any


def as_shipped(lowered: Any) -> Any:
    """``lowered.compile()`` with XLA's own choice of the emitter, see conftest.py."""
    return lowered.compile({"xla_cpu_use_fusion_emitters": True})
