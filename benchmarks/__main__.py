"""The command line: ``python -m benchmarks [--suite quick|full] [--json FILE]``."""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
from rich.console import Console

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory too

from benchmarks import cases, contenders, machine, memory, report, trees
from benchmarks.results_file import write
from cerebras_jax import enable_multi_output_fusion

Job = tuple[str, Callable[[], Iterator[cases.Row]]]

CASES = ("update", "muon", "training", "dispatch", "compile", "memory")
_QUICK: tuple[str, ...] = ("adamw", "sgd", "lamb", "lion", "adafactor")


def _jobs(
    full: bool, names: list[str], tree_names: list[str], chosen: tuple[str, ...], scale: float
) -> Iterator[Job]:
    budget = 4.0 if full else 2.0
    for tree in tree_names if "update" in chosen else ():
        for name in names:
            if full or name == "adamw" or tree == "64M":
                every = name == "adamw" and (full or tree in ("64M", "300 leaves"))
                yield (
                    f"update, {name}, {tree}",
                    lambda t=tree, n=name, e=every: cases.update(t, n, scale, budget, e),
                )
    if "muon" in chosen:
        yield "muon", lambda: cases.muon(scale, 40.0 if full else 10.0)
    if "training" in chosen:
        yield "training step", lambda: cases.training(scale, 40.0 if full else 10.0)
    if "dispatch" in chosen:
        for n in (100, 300, 1000, 3000) if full else (300, 1000):
            n = max(4, round(n * min(1.0, scale) ** 0.5))
            yield f"dispatch, {n} leaves", lambda n=n: cases.dispatch(n, budget)
    if "compile" in chosen:
        for n in (100, 300, 1000, 3000) if full else (300, 1000):
            rounds = 3 if n < (3000 if full else 1000) else 1
            n = max(4, round(n * min(1.0, scale) ** 0.5))
            yield (
                f"compile, {n} leaves",
                lambda n=n, r=rounds: cases.compile_time(f"{n} leaves", trees.many_leaves(n), r),
            )
        n = max(4, round((300 if full else 100) * min(1.0, scale) ** 0.5))
        yield (
            f"compile, {n} shapes",
            lambda n=n: cases.compile_time(
                f"{n} shapes", trees.distinct_leaves(n), 3 if full else 1
            ),
        )
    if "memory" in chosen:
        kinds = [
            name
            for name in (memory.CONTENDERS if full else ("pure", "class", "trace", "optax"))
            if contenders.torch_device() is not None or not name.startswith("torch")
        ]
        yield "memory", lambda: cases.peak_memory(kinds, "adamw", scale)


def _choose(text: str | None, known: tuple[str, ...], what: str) -> list[str]:
    if text is None:
        return list(known)
    picked = [x.strip() for x in text.split(",")]
    unknown = [x for x in picked if x not in known]
    if unknown:
        raise click.BadParameter(f"unknown {what} {unknown}; there are {', '.join(known)}")
    return picked


@click.command(context_settings={"show_default": True})
@click.option("--suite", type=click.Choice(["quick", "full"]), default="quick")
@click.option("--json", "json_path", type=Path, help="Write the results there.")
@click.option("--chart", type=Path, help="Draw a chart there.")
@click.option("--trees", "tree_text", help=f"Comma-separated, of: {', '.join(trees.TREES)}.")
@click.option("--optimizers", help=f"Comma-separated, of: {', '.join(contenders.SPECS)}.")
@click.option("--cases", "case_text", help=f"Comma-separated, of: {', '.join(CASES)}.")
@click.option("--scale", default=1.0, help="Shrinks every tree, to try the command out.")
@click.option(
    "--multi-output-fusion", is_flag=True, help="Call enable_multi_output_fusion first (CPU)."
)
@click.option("--markdown", is_flag=True, help="Print tables of ratios for the documentation.")
@click.option("--replay", type=Path, help="Show results of an earlier --json; measure nothing.")
def main(
    suite: str,
    json_path: Path | None,
    chart: Path | None,
    tree_text: str | None,
    optimizers: str | None,
    case_text: str | None,
    scale: float,
    multi_output_fusion: bool,
    markdown: bool,
    replay: Path | None,
) -> None:
    """Compares cerebras_jax with optax, flax nnx.Optimizer and torch.optim, in one process."""
    width = 160 if not Console().is_terminal else None
    console = Console(width=width, highlight=False)
    if replay is not None:
        header, *rows = json.loads(replay.read_text())
        console.print(header["machine"])
        groups = {}
        for row in rows if not markdown else ():
            groups.setdefault((row["case"], row["optimizer"], row["tree"]), []).append(row)
        for group in groups.values():
            report.show(group, console)
    else:
        if multi_output_fusion:
            enable_multi_output_fusion()
        full = suite == "full"
        known = tuple(contenders.SPECS)
        picked = _choose(optimizers, known, "optimizers")
        if optimizers is None and not full:
            picked = [*_QUICK]
        tree_names = _choose(tree_text, tuple(trees.TREES), "trees")
        chosen = tuple(_choose(case_text, CASES, "cases"))
        explicit = optimizers is not None or tree_text is not None
        header, rows = machine.describe() | {"suite": suite, "scale": scale}, []
        console.print(f"{header['machine']}; XLA_FLAGS={header['xla_flags']!r}")
        console.print(", ".join(f"{k} {v}" for k, v in header["versions"].items()))
        if contenders.torch_device() is None:
            reason = "not installed" if contenders.torch is None else "has no such device"
            console.print(f"torch: skipped, {reason}")
        start = time.perf_counter()
        for title, job in _jobs(full or explicit, picked, tree_names, chosen, scale):
            begun = time.perf_counter()
            done = list(job())
            cases.free()
            for key in dict.fromkeys(row["case"] for row in done):
                report.show([row for row in done if row["case"] == key], console)
            console.print(f"{title}: {time.perf_counter() - begun:.0f} s\n")
            rows += done
            if json_path is not None:  # after every case: an interrupted run keeps what it has
                write(json_path, [header, *rows])
        header["seconds"] = round(time.perf_counter() - start, 1)
        console.print(f"{header['seconds']} s in all")
        if json_path is not None:
            write(json_path, [header, *rows])
    if markdown:
        click.echo(report.markdown(rows))
    if chart is not None:
        report.draw(header, rows, chart)


if __name__ == "__main__":
    main()
