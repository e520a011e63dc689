"""Peak memory of a step, in a process of its own: ``python -m benchmarks.memory``.

It prints one line of JSON: bytes per parameter that a step needs beyond parameters, state and
gradients, in the first step (which may copy what the caller still holds) and in a later one.
"""

import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CONTENDERS = ("pure", "class", "trace", "optax", "nnx", "torch foreach", "torch fused")


def measure(contender: str, optimizer: str, shape: tuple[int, int]) -> dict[str, Any]:
    """Runs the measurement in a new process."""
    command = [sys.executable, "-m", "benchmarks.memory", contender, optimizer, *map(str, shape)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{contender}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _reset_peak() -> None:
    """Forgets the highest resident size so far (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def _lines(status: str) -> list[str]:
    return [line for line in status.splitlines() if line.startswith(("VmRSS", "VmHWM"))]


def used_and_peak() -> tuple[int, int]:
    """Bytes in use and the most that were: of the device, on a CPU of the process."""
    import jax

    device = jax.devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return stats["bytes_in_use"], stats["peak_bytes_in_use"]
    status = Path("/proc/self/status").read_text()  # ru_maxrss starts at the parent's size
    kib = {key: value.split()[0] for key, _, value in (x.partition(":") for x in _lines(status))}
    return int(kib["VmRSS"]) * 1024, int(kib["VmHWM"]) * 1024


def settled() -> tuple[int, int]:
    """As `used_and_peak`, once nothing runs and the peak is forgotten, where it can be (CPU)."""
    import jax

    gc.collect()
    time.sleep(1.0)  # what runs still, and what is freed in the background
    if jax.default_backend() == "cpu":
        _reset_peak()
    return used_and_peak()


def _extra(step: Any) -> int:
    """Bytes by which the peak of a step is above what was in use before it."""
    before, _ = settled()
    step()
    return max(0, used_and_peak()[1] - before)


def main(contender: str, optimizer: str, *shape: str) -> None:
    """Measures one contender on one leaf, and prints the result."""
    import jax
    import numpy as np

    from benchmarks import contenders

    spec = contenders.SPECS[optimizer]
    rows, columns = map(int, shape)
    grads = {"kernel": np.full((rows, columns), 1e-2, np.float32)}
    params = {"kernel": np.full((rows, columns), 1e-1, np.float32)}
    if not contender.startswith("torch"):
        grads = contenders.own(grads)
    if contender == "pure":
        made = contenders.jitted("pure", spec.pure(), params, grads)
    elif contender == "class":
        made = contenders.class_form(spec, params, grads)
    elif contender == "trace":
        made = contenders.traced(spec, params, grads)
    elif contender in ("optax", "nnx") and spec.optax is not None:
        tx = spec.optax()
        if contender == "nnx":
            made = contenders.nnx_optimizer(tx, params, grads)
        else:
            made = contenders.jitted("optax", tx, params, grads)
    else:
        forms = contenders.torch_forms(spec, params, grads)
        made = next(x for x in forms if x.name == contender)
    del params
    first = _extra(made.step)
    made.step()
    later = _extra(made.step)
    size = rows * columns
    states = jax.eval_shape(spec.pure().init, jax.ShapeDtypeStruct((rows, columns), np.float32))
    state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(states)) / size
    result = {
        "first_step_extra_bytes_per_parameter": first / size,
        "extra_bytes_per_parameter": later / size,
        "extra_fraction": later / size / (8 + state),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
