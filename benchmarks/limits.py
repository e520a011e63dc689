"""What the memory allows: in-place triads, copies, and plain loops in C."""

import concurrent.futures
import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import Contender

_SOURCE = """
#include <math.h>
#define LOOP(name, body) \\
    void name(long n, const float *restrict g, float *restrict p, float *restrict m, \\
              float *restrict v, float c1, float c2) { \\
        for (long i = 0; i < n; i++) { body } \\
    }
LOOP(triad, p[i] = g[i] + c1 * p[i];)
LOOP(sgd, m[i] = 0.9f * m[i] + g[i]; p[i] -= 1e-3f * m[i];)
LOOP(rmsprop, m[i] = 0.99f * m[i] + 0.01f * g[i] * g[i]; p[i] -= 1e-3f * g[i] / (sqrtf(m[i]) + c2);)
LOOP(lion, float x = 0.9f * m[i] + 0.1f * g[i];
     p[i] -= 1e-3f * ((x > 0) - (x < 0) + 1e-2f * p[i]); m[i] = 0.99f * m[i] + 0.01f * g[i];)
LOOP(adamw, m[i] = 0.9f * m[i] + 0.1f * g[i]; v[i] = 0.999f * v[i] + 0.001f * g[i] * g[i];
     p[i] -= 1e-3f * (c1 * m[i] / (sqrtf(v[i]) + c2) + 1e-2f * p[i]);)
LOOP(adam, m[i] = 0.9f * m[i] + 0.1f * g[i]; v[i] = 0.999f * v[i] + 0.001f * g[i] * g[i];
     p[i] -= 1e-3f * c1 * m[i] / (sqrtf(v[i]) + c2);)
"""
_IN_C = ("sgd", "rmsprop", "lion", "adamw", "adam")


def triad(size: int) -> Contender:
    """``a = b + s * a`` on float32 vectors, in place: 12 bytes per element."""
    compiled = jax.jit(lambda a, b: b + 0.5 * a, donate_argnums=0)
    a, b = jnp.ones(size, jnp.float32), jnp.ones(size, jnp.float32)

    def step() -> None:
        nonlocal a
        a = jax.block_until_ready(compiled(a, b))

    return Contender("triad", step)


def copy(size: int) -> Contender:
    """A copy of a float32 vector on the device: 8 bytes per element."""
    compiled = jax.jit(jnp.copy)
    a = jnp.ones(size, jnp.float32)
    return Contender("copy", lambda: jax.block_until_ready(compiled(a)))


def products(shapes: Iterable[tuple[int, int]], steps: int) -> Contender:
    """The matrix products of Newton-Schulz iterations, and nothing else, in float32."""

    def chain(x: jax.Array) -> jax.Array:
        for _ in range(steps):
            square = x @ x.T
            x = (square @ square) @ x
        return x

    compiled = jax.jit(lambda xs: [chain(x) for x in xs])
    # Of orthogonal matrices the products stay orthogonal: no number grows or vanishes.
    rng = np.random.default_rng(0)
    wide = [np.linalg.qr(rng.normal(size=(max(s), min(s))))[0].T for s in shapes]
    own = [jnp.asarray(x, jnp.float32) for x in wide]
    return Contender("products", lambda: jax.block_until_ready(compiled(own)))


class Loops:
    """Plain C loops on all cores; `available` is False where there is no compiler."""

    def __init__(self) -> None:
        self.available = False
        compiler = shutil.which("gcc") or shutil.which("cc")
        if compiler is None:
            return
        self.folder = tempfile.TemporaryDirectory()
        source, library = (Path(self.folder.name) / f"loops.{x}" for x in ("c", "so"))
        source.write_text(_SOURCE)
        flags = ["-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC"]
        done = subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=False)
        if done.returncode == 0:
            self.library = ctypes.CDLL(str(library))
            self.threads = len(os.sched_getaffinity(0))
            self.pool = concurrent.futures.ThreadPoolExecutor(self.threads)
            self.available = True

    def contenders(self, optimizer: str, params: Any, grads: Any) -> Iterator[Contender]:
        """The loop that makes this optimizer's update, and a triad."""
        (p,), (g,) = jax.tree.leaves(params), jax.tree.leaves(grads)
        for name in ("triad", optimizer):
            if self.available and (name == "triad" or name in _IN_C):
                needs = {"triad": 1, "sgd": 2, "rmsprop": 2, "lion": 2}.get(name, 3)
                arrays = [g, np.array(p), *[np.ones_like(p) for _ in range(needs - 1)]]
                yield Contender("C triad" if name == "triad" else "C", self._step(name, arrays))

    def _step(self, name: str, arrays: list[np.ndarray]) -> Any:
        function = getattr(self.library, name)
        flat = [x.reshape(-1) for x in arrays]
        bounds = [len(flat[0]) * i // self.threads for i in range(self.threads + 1)]

        def part(i: int) -> None:
            a, b = bounds[i], bounds[i + 1]
            pointers = [ctypes.c_void_p(x[a:b].ctypes.data) for x in flat]
            pointers += [ctypes.c_void_p(None)] * (4 - len(pointers))
            constants = ctypes.c_float(0.5), ctypes.c_float(1e-8)
            function(ctypes.c_long(b - a), *pointers, *constants)

        return lambda: list(self.pool.map(part, range(self.threads)))
