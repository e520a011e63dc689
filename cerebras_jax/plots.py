"""Curves of schedules, with matplotlib."""

import html
import io
from collections.abc import Callable
from typing import Any

import numpy as np


def curve(
    schedule: Callable[[Any], Any], steps: int, ax: Any = None, label: str | None = None
) -> Any:
    """Draws ``schedule`` over ``range(steps)`` and returns the matplotlib axes."""
    from matplotlib import pyplot as plt

    if ax is None:
        _, ax = plt.subplots(figsize=(6, 2.5), layout="constrained")
    t = np.unique(np.linspace(0, steps, 2001).astype(int))
    ax.plot(t, schedule(t), label=label or repr(schedule))
    ax.set_xlabel("step")
    ax.margins(x=0)
    return ax


def as_html(schedule: Callable[[Any], Any], steps: int) -> str:
    """The schedule's text and a small curve; without matplotlib the text."""
    text = f"<code>{html.escape(repr(schedule))}</code>"
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return text
    figure = Figure(figsize=(4, 1.5), layout="constrained")
    curve(schedule, steps, figure.subplots())
    svg = io.StringIO()
    figure.savefig(svg, format="svg")
    return f"<div>{text}</div>{svg.getvalue()[svg.getvalue().index('<svg') :]}"
