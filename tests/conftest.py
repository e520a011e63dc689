"""Eight fake devices for the sharding tests, each program compiled once, and a count of them."""

import os

from compiled import OLDER_EMITTER

# XLA's older emitter of loops compiles these small programs in half the time, with the same passes
# over the program and the same optimization of its loops. jaxlib 0.10 has it; later ones abort on
# a flag that they do not know, and LLVM's level costs little beside their other emitter. At level 1
# LLVM contracts products and sums into FMAs as at its usual level 3, which tests of bits are about;
# at level 0 it does not. The caller's flags win: a run with all defaults is
# ``XLA_FLAGS="--xla_cpu_use_fusion_emitters=true --xla_backend_optimization_level=3" pytest``.
os.environ["XLA_FLAGS"] = " ".join(
    [
        f"--{OLDER_EMITTER}=false --xla_backend_optimization_level=1" if OLDER_EMITTER else "",
        "--xla_cpu_parallel_codegen_split_count=1",
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
    ]
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")

import atexit
import contextlib
import gc
import shutil
import tempfile

import jax
import pytest

# Many tests make the same programs: they are compiled once in a run, by one of its processes. The
# folder is empty at the start and goes at the end. An entry that another process is just writing
# cannot be read, and is compiled again; pyproject.toml ignores the warning.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="programs-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])


def pytest_collection_finish() -> None:
    """Keeps the collector from walking over all modules again and again: a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


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


@pytest.fixture(scope="module")
def one_device():
    """The training command on a machine with one device."""
    from cerebras_jax.train import devices

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "at_hand", lambda: jax.devices()[:1])
        yield


@pytest.fixture
def no_pictures():
    """The training command without its picture and its sample, which take seconds."""
    from cerebras_jax.train import gpt, report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw", lambda *args: None)
        patch.setattr(gpt, "generate", lambda *args: b"")
        yield
