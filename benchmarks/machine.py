"""The machine and the versions, in words."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import jax


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe() -> dict[str, Any]:
    """Cores, memory, device, versions, flags."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    )
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cpu, device = _cpu_model(), jax.devices()[0]
    packages = ("cerebras_jax", "jax", "jaxlib", "optax", "flax", "torch", "numpy")
    words = f"{cores} cores of {cpu}, {gib:.0f} GiB"
    if device.platform != "cpu":
        words = f"{device.device_kind}; {words}"
    return {
        "machine": words,
        "cores": cores,
        "cpu": cpu,
        "device": device.device_kind if device.platform != "cpu" else "cpu",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "load_average": round(os.getloadavg()[0], 2),
    }
