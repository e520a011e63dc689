"""A training run against what else one would run: ``python -m benchmarks.whole_run``.

The embedded GPT on its default text, AdamW with clipping, warm-up and a cosine, from the same
weights on the same batches; with the default settings of XLA, and with multi-output fusion. Both
need processes of their own, as do memory and the time to the first loss:

* alone: a process for each contender: seconds from the model to the first loss, programs compiled
  anew, and the most memory above what the process had before;
* together: one process in which all take turns, some steps each, without waiting between them.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory too

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import cases, machine, memory, report, runs
from benchmarks.results_file import write
from benchmarks.timing import Contender, interleave, spread
from cerebras_jax import enable_multi_output_fusion
from cerebras_jax.train import data, gpt
from cerebras_jax.train.settings import TrainSettings

CASE = "whole run"
DEFAULT, FUSED = "default", "multi-output fusion"
_STRETCH = 4  # steps of a contender's turn
_LATER = 16  # steps after the first one, of a process alone


class Batches:
    """The windows of text of every step, as the training command draws them."""

    def __init__(self, settings: TrainSettings):
        self.settings = settings
        self.text = data.load_text().train

    def __getitem__(self, step: int) -> np.ndarray:
        rng = np.random.default_rng((self.settings.seed, step))
        size, window = self.settings.batch_size, self.settings.context + 1
        return data.sample_batch(self.text, size, window, rng)


def alone(name: str, settings: TrainSettings) -> dict[str, Any]:
    """Time to the first loss and memory of one contender; nothing else has run here."""
    model, batches = gpt.model_of(settings), Batches(settings)
    first_batch = batches[0]
    jax.block_until_ready(jax.tree.leaves(model))
    before, _ = memory.settled()
    start = time.perf_counter()
    step = runs.MAKERS[name](model)
    float(step(first_batch))
    first_loss_s = time.perf_counter() - start
    _, first = memory.used_and_peak()
    memory.settled()
    loss = [float(step(batches[i])) for i in range(1, _LATER + 1)][-1]
    _, later = memory.used_and_peak()
    return {
        "first_loss_s": first_loss_s,
        "first_step_bytes": first - before,
        "later_steps_bytes": later - before,
        "loss": loss,
    }


def together(names: Sequence[str], settings: TrainSettings, budget_s: float) -> list[cases.Row]:
    """Seconds of a step, in rounds that alternate between the contenders."""
    model, batches = gpt.model_of(settings), Batches(settings)

    def turns(name: str) -> Contender:
        step, number = runs.MAKERS[name](model), itertools.count()

        def turn() -> None:
            losses = [step(batches[next(number)]) for _ in range(_STRETCH)]
            float(losses[-1])

        return Contender(name, turn)

    samples = interleave([turns(name) for name in names], budget_s, least=4)
    per_step = {
        name: {i: seconds / _STRETCH for i, seconds in own.items()} for name, own in samples.items()
    }
    tokens = settings.batch_size * settings.context
    rows = list(cases.rows_of(per_step, case=CASE, optimizer="adamw"))
    for row in rows:
        own = per_step[row["contender"]]
        row["tokens_per_s"] = spread([tokens / s for s in own.values()])._asdict()
    return rows


def _in_process(part: str, names: Sequence[str], fused: bool, options: Sequence[str]) -> Any:
    """What `alone` or `together` gives in a new process that finds nothing compiled."""
    fusion = ["--fused"] if fused else []
    command = [sys.executable, "-m", "benchmarks.whole_run", "part", part, *options, *fusion]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        done = subprocess.run(
            [*command, *names], env=environment, capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise RuntimeError(f"{part} {', '.join(names)}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(
    names: Sequence[str], repeats: int, options: Sequence[str], console: Console
) -> Iterator[cases.Row]:
    """Rows of both settings of XLA; on other devices than CPUs, of the default one."""
    for setting in (DEFAULT, FUSED) if jax.default_backend() == "cpu" else (DEFAULT,):
        fused = setting == FUSED
        found: dict[str, list[Any]] = {name: [] for name in names}
        for _ in range(repeats):
            for name in names:
                if not (fused and name.startswith("torch")):  # it does not know of XLA's flags
                    found[name].append(_in_process("alone", [name], fused, options))
                    first_s = found[name][-1]["first_loss_s"]
                    console.print(f"{setting}, {name}: {first_s:.1f} s to the first loss")
        # torch is there as the common measure; compiling it takes a minute.
        field = [name for name in names if not (fused and name == "torch.compile")]
        rows = _in_process("together", field, fused, options)
        for row in rows:
            row["tree"] = setting
            own = found[row["contender"]]
            if own:
                row["first_loss_s"] = spread([x["first_loss_s"] for x in own])._asdict()
                for key in ("first_step_bytes", "later_steps_bytes", "loss"):
                    row[key] = float(np.median([x[key] for x in own]))
        show(rows, console)
        yield from rows


def show(rows: Sequence[cases.Row], console: Console) -> None:
    """Prints the rows of one setting as a table."""
    table = Table(title=f"{CASE}, {rows[0]['tree']} settings of XLA", title_justify="left")
    table.add_column("contender")
    for name in report.WHOLE_RUN_COLUMNS:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(row["contender"], *report.whole_run_cells(row))
    console.print(table)


def draw(header: dict[str, Any], rows: Sequence[cases.Row], path: Path) -> None:
    """Bars: tokens per second, and seconds to the first loss, of every contender."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["contender"] for row in rows))
    colors = {DEFAULT: "tab:blue", FUSED: "tab:orange"}
    figure, axes = plt.subplots(1, 2, figsize=(10, 1.4 + 0.5 * len(names)), layout="constrained")
    for panel, key, title in (
        (axes[0], "tokens_per_s", "tokens per second (longer is faster)"),
        (axes[1], "first_loss_s", "seconds to the first loss (shorter is faster)"),
    ):
        for k, (setting, color) in enumerate(colors.items()):
            own = {
                row["contender"]: row[key]
                for row in rows
                if row["tree"] == setting
                and key in row
                and not (setting == FUSED and row["contender"].startswith("torch"))
            }
            if own:
                median = np.array([x["median"] for x in own.values()])
                low = median - [x["q1"] for x in own.values()]
                high = np.array([x["q3"] for x in own.values()]) - median
                aside = [0 if name.startswith("torch") else (k - 0.5) * 0.4 for name in own]
                y = np.array([names.index(name) for name in own]) + aside
                label = "default" if setting == DEFAULT else f"with {setting}"
                panel.barh(y, median, 0.4, xerr=[low, high], color=color, label=label)
        panel.set_yticks(range(len(names)), names)
        panel.invert_yaxis()
        panel.set_xlabel(title)
    axes[1].set_yticklabels([])
    axes[1].legend(loc="best", title="XLA's settings")
    figure.suptitle(f"training a GPT of {header['parameters']:,} parameters; {header['machine']}")
    figure.savefig(path, dpi=150)
    plt.close(figure)


@click.group(invoke_without_command=True, context_settings={"show_default": True})
@click.pass_context
@click.option("--json", "json_path", type=Path, help="Write the results there.")
@click.option("--chart", type=Path, help="Draw a chart there.")
@click.option("--contenders", "text", help=f"Comma-separated, of: {', '.join(runs.MAKERS)}.")
@click.option("--seconds", default=60.0, help="For the alternating rounds of each setting.")
@click.option("--repeats", default=2, help="Processes alone of each contender.")
@click.option("--layers", default=TrainSettings.layers, help="Fewer, to try the command out.")
@click.option("--replay", type=Path, help="Show results of an earlier --json; measure nothing.")
def main(
    context: click.Context,
    json_path: Path | None,
    chart: Path | None,
    text: str | None,
    seconds: float,
    repeats: int,
    layers: int,
    replay: Path | None,
) -> None:
    """Compares whole training runs of cerebras_jax, flax, optax and torch."""
    if context.invoked_subcommand is not None:
        return
    console = Console(width=None if Console().is_terminal else 160, highlight=False)
    if replay is not None:
        header, *rows = json.loads(replay.read_text())
        console.print(header["machine"])
        for setting in dict.fromkeys(row["tree"] for row in rows):
            show([row for row in rows if row["tree"] == setting], console)
    else:
        start = time.perf_counter()
        picked = text.split(",") if text else list(runs.MAKERS)
        unknown = [name for name in picked if name not in runs.MAKERS]
        if unknown:
            raise click.BadParameter(
                f"unknown contenders {unknown}; there are {', '.join(runs.MAKERS)}"
            )
        skipped = runs.left_out(picked)
        model = gpt.model_of(TrainSettings(layers=layers))
        header = machine.describe() | {
            "parameters": sum(x.size for x in jax.tree.leaves(model)),
            "skipped": skipped,
            "repeats": repeats,
        }
        console.print(header["machine"])
        for name, why in skipped.items():
            console.print(f"{name}: skipped, {why}")
        names = [name for name in picked if name not in skipped]
        options = [f"--layers={layers}", f"--seconds={seconds}"]
        rows = []
        for row in measure(names, repeats, options, console):
            rows.append(row)
            if json_path is not None:
                write(json_path, [header, *rows])
        header["seconds"] = round(time.perf_counter() - start, 1)
        console.print(f"{header['seconds']} s in all")
        if json_path is not None:
            write(json_path, [header, *rows])
    if chart is not None:
        draw(header, rows, chart)


@main.command(hidden=True)
@click.argument("part", type=click.Choice(["alone", "together"]))
@click.argument("names", nargs=-1)
@click.option("--layers", type=int)
@click.option("--seconds", type=float)
@click.option("--fused", is_flag=True)
def part(part: str, names: Sequence[str], layers: int, seconds: float, fused: bool) -> None:
    """What runs in a process of its own; prints a line of JSON."""
    if fused:
        enable_multi_output_fusion()
    settings = TrainSettings(layers=layers)
    found = alone(names[0], settings) if part == "alone" else together(names, settings, seconds)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
