"""Interleaved timing: contenders take turns, and are compared within the same round."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

Samples = dict[int, float]
"""Seconds of one step, by the number of the round."""

_SAMPLE_S = 0.02  # a shorter step is repeated within a sample
_SLOW = 4.0  # a contender so many times slower than the fastest takes part in few rounds


class Contender(NamedTuple):
    """A name, and a function that makes one step and waits for its result."""

    name: str
    step: Callable[[], Any]


class Spread(NamedTuple):
    """A median and its quartiles."""

    median: float
    q1: float
    q3: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of a list of numbers."""
    q1, median, q3 = np.percentile(np.asarray(values), [25, 50, 75])
    return Spread(float(median), float(q1), float(q3))


def ratio(a: Samples, b: Samples) -> Spread:
    """How long ``a`` takes as a multiple of ``b``, over the rounds that both were in."""
    return spread([a[i] / b[i] for i in a if i in b])


def interleave(
    contenders: Sequence[Contender], budget_s: float, least: int = 3, most: int = 200
) -> dict[str, Samples]:
    """Times the contenders in turn, round after round, until the budget is spent.

    Every contender makes two steps before the first round, so that compilation is not counted.
    Slow contenders leave after ``least`` rounds, so that they do not use up everyone's time.
    """
    estimate = {}
    for name, step in contenders:
        step()
        estimate[name] = _seconds(step, 1)
    calls = {name: math.ceil(_SAMPLE_S / max(s, 1e-6)) for name, s in estimate.items()}
    fastest = min(estimate.values())
    samples: dict[str, Samples] = {name: {} for name in estimate}
    order = np.random.default_rng(0)
    end = time.perf_counter() + budget_s
    for i in range(most):
        if i >= least and time.perf_counter() > end:
            break
        # Another order every time: what runs before a contender may slow it down.
        for k in order.permutation(len(contenders)):
            name, step = contenders[k]
            if i < least or estimate[name] <= _SLOW * fastest:
                time.sleep(0.002)  # threads of the one before may still spin
                samples[name][i] = _seconds(step, calls[name])
    return samples


def _seconds(step: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) / calls
