"""Eight fake devices for the sharding tests, and a count of compilations."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")

import contextlib

import jax
import pytest

_compiled = [0]


def _count(event: str, duration: float, **kwargs: object) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled[0] += 1


jax.monitoring.register_event_duration_secs_listener(_count)


@pytest.fixture
def compilations():
    """``with compilations(n): ...`` asserts that the block compiles exactly n programs."""

    @contextlib.contextmanager
    def expect(count: int):
        before = _compiled[0]
        yield
        assert _compiled[0] - before == count

    return expect
