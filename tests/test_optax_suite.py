"""The short tests of optax's own suite, on our optimizers; `run_optax_suite` has the long ones."""

import os
import re
import subprocess
import sys

import pytest
import run_optax_suite


@pytest.mark.parametrize(("module", "least"), [("alias", 150), ("common", 75), ("sharding", 120)])
def test_optax_suite(module, least):
    if run_optax_suite.path_of(module) is None:
        pytest.skip("the installed optax comes without its tests")
    # A process of its own: the tests change jax's log and make modules that others must not see.
    # All of them compare within tolerances, so LLVM is at its quickest level.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    done = subprocess.run(
        [sys.executable, run_optax_suite.__file__, module, "--fast"],
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": flags},
    )
    counts = re.search(r"^total: (\d+) passed, (\d+) failed", done.stdout, re.MULTILINE)
    assert counts, done.stdout + done.stderr
    assert int(counts[2]) == 0, done.stdout
    assert int(counts[1]) >= least
    assert done.returncode == 0
