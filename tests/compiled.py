"""Programs to look into are compiled as users get them, unlike those that tests only run."""

from importlib.metadata import version
from typing import Any

OLDER_EMITTER = "xla_cpu_use_fusion_emitters" if version("jaxlib").startswith("0.10.") else None
"""The flag that is off in tests, see conftest.py; None where XLA has no such choice."""


def as_shipped(lowered: Any) -> Any:
    """``lowered.compile()`` with XLA's own choice of the emitter.

    What is looked at is XLA's program: LLVM, which comes after it, is at its quickest level.
    """
    options: dict[str, Any] = {"xla_backend_optimization_level": 0}
    return lowered.compile(options | ({OLDER_EMITTER: True} if OLDER_EMITTER else {}))
