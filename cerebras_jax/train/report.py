"""What a training run shows and leaves behind: progress, metrics, a picture."""

import json
import math
import os
import textwrap
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from cerebras_jax.optim import Optimizer
from cerebras_jax.optim.sparse_optimizer import SparseOptimizer
from cerebras_jax.schedules import span
from cerebras_jax.train.folder import METRICS, cut_metrics
from cerebras_jax.train.tensorboard import Events


def printable(text: str, keep: str = "") -> str:
    r"""The text with every character that a terminal may act upon, or cannot show, escaped.

    >>> print(printable("café \x1b[31m"))
    café \x1b[31m
    """
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )


def plain_console(quiet: bool = False) -> Console:
    """A console that shows text as it is: paths and samples are no markup."""
    return Console(markup=False, emoji=False, highlight=False, soft_wrap=True, quiet=quiet)


class Reporter:
    """A progress bar in a terminal, plain lines elsewhere, and ``metrics.jsonl`` always.

    Args:
      folder: of the run; None: another process writes.
      steps: how many there will be.
      console: to show progress on.
      start: the step that a resumed run goes on with; what was written of it before is replaced.
      events: where else to write the metrics.
    """

    def __init__(
        self,
        folder: Path | None,
        steps: int,
        console: Console,
        start: int = 0,
        events: Events | None = None,
    ):
        self.console = console
        self.events = events
        self.steps = steps
        self.steps_done = start
        self.records: list[dict[str, Any]] = [] if folder is None else cut_metrics(folder, start)
        path = Path(os.devnull) if folder is None else folder / METRICS
        self.file = path.open("a", encoding="utf-8")
        self.progress = None
        if console.is_terminal:
            columns = [
                TextColumn("{task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("{task.description}", markup=False),
                TimeRemainingColumn(),
            ]
            self.progress = Progress(*columns, console=console, transient=True)
            self.task = self.progress.add_task("compiling", total=steps)
        before = self.records[-1]["seconds"] if self.records else 0.0
        self.start = time.perf_counter() - before
        self.first: tuple[float, int] | None = None  # when which step was done; it was compiled

    def __enter__(self) -> "Reporter":
        if self.progress:
            self.progress.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.progress:
            self.progress.stop()
        self.file.close()
        if self.events:
            self.events.close()

    def record(self, show: bool, at: float | None = None, **values: Any) -> None:
        """Writes one line of metrics.

        Args:
          show: also on the screen.
          at: when it was, of `time.perf_counter`; by default now.
          **values: the line.
        """
        now = time.perf_counter() if at is None else at
        values["seconds"] = round(now - self.start, 3)
        self.records.append(values)
        self.steps_done += "loss" in values
        if self.first is None and "loss" in values:
            self.first = values["seconds"], values["step"]
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self.file.write(json.dumps(finite) + "\n")
        self.file.flush()
        if self.events:
            self.events.write(values)
        text = "  ".join(f"{k} {_format(k, v)}" for k, v in values.items() if k != "weight_decay")
        if self.progress:
            if "loss" in values:
                self.progress.update(self.task, completed=values["step"] + 1, description=text)
            else:
                self.progress.console.print(text)
        elif show:
            self.console.print(f"{text}{self._time_left(values)}")

    def _time_left(self, values: dict[str, Any]) -> str:
        if self.first is None or "loss" not in values:
            return ""
        since, done = values["seconds"] - self.first[0], values["step"] - self.first[1]
        left = self.steps - values["step"] - 1
        return f"  left {since / done * left:.0f} s" if done and left else ""


def density(opt: Optimizer) -> dict[str, float]:
    """What of the sparse weights is on, in all; nothing, if there are none."""
    found = opt.density() if isinstance(opt, SparseOptimizer) else {}
    sizes = {name: p.size for name, p in opt.named_parameters() if name in found}
    if not sum(sizes.values()):
        return {}
    return {"density": sum(float(found[k]) * n for k, n in sizes.items()) / sum(sizes.values())}


def _format(name: str, value: Any) -> str:
    if name == "lr":
        return f"{value:.2e}"
    if name == "seconds":
        return f"{value:.0f} s"
    if name == "tokens_per_s":
        return f"{value:,.0f}"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def draw(records: list[dict[str, Any]], title: str, path: Path) -> None:
    """The training run as a picture: losses above, learning rate below, against the step."""
    from matplotlib.figure import Figure

    title = textwrap.fill(printable(title), 90)
    train = [r for r in records if "loss" in r]
    norms = [r for r in train if "gradient_norm" in r]
    figure = Figure(figsize=(8, 6.5 if norms else 5.5), layout="constrained", dpi=120)
    loss, rate, *others = figure.subplots(
        2 + bool(norms), 1, sharex=True, height_ratios=[3, 1, *[1] * bool(norms)]
    )
    for norm in others:
        norm.plot([r["step"] for r in norms], [r["gradient_norm"] for r in norms], color="tab:gray")
        norm.set(ylabel="gradient norm", yscale="log")
    held_out = [r for r in records if "held_out_loss" in r]
    loss.plot([r["step"] for r in train], [r["loss"] for r in train], lw=1, label="training")
    loss.plot(
        [r["step"] for r in held_out],
        [r["held_out_loss"] for r in held_out],
        "o-",
        label="held-out",
    )
    loss.set_ylabel("loss (nats per byte)")
    loss.legend(frameon=False)
    loss.set_title(title, loc="left", parse_math=False)
    rate.plot([r["step"] for r in train], [r["lr"] for r in train], color="tab:green")
    rate.set_ylabel("learning rate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    figure.axes[-1].set_xlabel("step")
    for axes in figure.axes:
        axes.margins(x=0.01)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a title may have letters that the font has not
        figure.savefig(path)


def milestones(schedule: Callable[[Any], Any], steps: int) -> list[int]:
    """Steps worth a line: powers of ten, where schedules change, and the end."""
    found = {0, 1, steps}
    found |= {10**k for k in range(1, 10) if 10**k < steps}
    found |= {round(steps * k / 10) for k in range(1, 10)}
    start, inner = 0, schedule
    while inner is not None:
        changes = [start + int(m) for m in getattr(inner, "milestones", ())]
        found |= {m + d for m in changes for d in (-1, 0)}
        children = getattr(inner, "schedules", None)
        start = changes[-1] if changes and children else start
        inner = children[-1] if children else getattr(inner, "schedule", None)
    return sorted(m for m in found if 0 <= m <= steps)


def _length(schedules: Mapping[str, Any], steps: int | None) -> int:
    return steps or max((span(s) or 0 for s in schedules.values()), default=0) or 1000


def schedule_table(schedules: Mapping[str, Any], steps: int | None, title: str) -> Table:
    """The values of schedules at their milestones."""
    steps = _length(schedules, steps)
    table = Table("step", *schedules, title=title)
    for column in table.columns:
        column.justify = "right"
    for t in sorted({m for s in schedules.values() for m in milestones(s, steps)}):
        table.add_row(f"{t:,}", *(f"{s(t):.6g}" for s in schedules.values()))
    return table


def draw_schedules(schedules: Mapping[str, Any], steps: int | None, path: Path) -> None:
    """The curves of schedules, one below the other."""
    from matplotlib.figure import Figure

    steps = _length(schedules, steps)
    figure = Figure(figsize=(8, 2.4 * len(schedules)), layout="constrained", dpi=120)
    axes = figure.subplots(len(schedules), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (key, schedule) in zip(axes, schedules.items(), strict=True):
        schedule.plot(steps, ax=ax)
        ax.set(ylabel=key, xlabel="step" if ax is axes[-1] else "")
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path)
    except OSError as error:
        raise type(error)(f"{path} cannot be written: {error.strerror or error}") from None
