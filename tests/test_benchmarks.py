"""The contenders of the benchmarks do the same work."""

import functools

import numpy as np
import pytest

from benchmarks import runs
from cerebras_jax.train import gpt
from cerebras_jax.train.settings import TrainSettings

_SMALL = TrainSettings(batch_size=2, context=8, layers=1, width=8, heads=2)


@pytest.fixture(scope="module")
def losses_of():
    """Losses of a contender's first steps, from the same weights on the same batches."""
    model = gpt.model_of(_SMALL)
    rng = np.random.default_rng(0)
    batches = rng.integers(0, 256, (4, _SMALL.batch_size, _SMALL.context + 1), np.int32)

    @functools.cache
    def run(name):
        step = runs.MAKERS[name](model)
        return [float(step(tokens)) for tokens in batches]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "WARM_UP", 2)  # so that the fourth step is the cosine's
        yield run


@pytest.mark.parametrize("name", ["jit + optax", "nnx", "torch eager"])
def test_whole_runs_are_the_same_in_every_library(name, losses_of):
    if name.startswith("torch"):
        pytest.importorskip("torch")
    expected = losses_of("trace")
    np.testing.assert_allclose(losses_of(name), expected, rtol=1e-5)
