"""What a training run shows and leaves behind: progress, metrics, a picture."""

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class Reporter:
    """A progress bar in a terminal, plain lines elsewhere, and ``metrics.jsonl`` always."""

    def __init__(self, folder: Path, steps: int, console: Console):
        self.console = console
        self.steps = steps
        self.records: list[dict[str, Any]] = []
        self.file = (folder / "metrics.jsonl").open("w", encoding="utf-8")
        self.progress = None
        if console.is_terminal:
            columns = [
                TextColumn("{task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
            ]
            self.progress = Progress(*columns, console=console, transient=True)
            self.task = self.progress.add_task("compiling", total=steps)
        self.start = time.perf_counter()

    def __enter__(self) -> "Reporter":
        if self.progress:
            self.progress.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.progress:
            self.progress.stop()
        self.file.close()

    def record(self, show: bool, **values: Any) -> None:
        """Writes one line of metrics; ``show``: also on the screen."""
        values["seconds"] = round(time.perf_counter() - self.start, 3)
        self.records.append(values)
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()
        text = "  ".join(
            f"{name} {_format(name, v)}" for name, v in values.items() if v is not None
        )
        if self.progress:
            if "loss" in values:
                self.progress.update(self.task, completed=values["step"] + 1, description=text)
            else:
                self.progress.console.print(text, highlight=False)
        elif show:
            self.console.print(f"{text}{self._time_left(values)}", highlight=False, soft_wrap=True)

    def _time_left(self, values: dict[str, Any]) -> str:
        done = values["step"] + 1
        left = values["seconds"] / done * (self.steps - done)
        return f"  left {left:.0f} s" if "loss" in values and left > 0 else ""


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

    figure = Figure(figsize=(8, 5.5), layout="constrained", dpi=120)
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    train = [r for r in records if "loss" in r]
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
    loss.set_title(title, loc="left")
    rate.plot([r["step"] for r in train], [r["lr"] for r in train], color="tab:green")
    rate.set_ylabel("learning rate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rate.set_xlabel("step")
    for axes in (loss, rate):
        axes.margins(x=0.01)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.savefig(path)
