"""Tables for the terminal, and a chart."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.cases import PEERS, Row


def _ratio(value: dict[str, float]) -> str:
    return f"{value['median']:.2f} ({value['q1']:.2f}-{value['q3']:.2f})"


def _seconds(value: float) -> str:
    return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.2f} s"


def show(rows: Sequence[Row], console: Console) -> None:
    """Prints the rows of one case on one tree as a table."""
    if not rows:
        return
    first = rows[0]
    title = f"{first['case']}, {first['optimizer']}, {first['tree']}"
    if first["case"] == "memory":
        _show_memory(rows, title, console)
        return
    peers = [p for p in PEERS if any(p in row["ratio"] for row in rows)]
    has_fraction = any("fraction_of_triad" in row for row in rows)
    table = Table(title=title, title_justify="left")
    table.add_column("contender")
    table.add_column("median", justify="right")
    for peer in peers:
        table.add_column(f"/ {peer}", justify="right")
    if has_fraction:
        table.add_column("of triad", justify="right")
    for row in rows:
        cells = [_ratio(row["ratio"][p]) if p in row["ratio"] else "" for p in peers]
        if has_fraction:
            fraction = row.get("fraction_of_triad")
            cells.append("" if fraction is None else f"{fraction:.0%}")
        table.add_row(row["contender"], _seconds(row["median_s"]), *cells)
    console.print(table)


def _show_memory(rows: Sequence[Row], title: str, console: Console) -> None:
    table = Table(title=f"{title}: bytes per parameter above parameters, state, gradients")
    for name in ("contender", "first step", "later steps", "of the total"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["contender"],
            f"{row['first_step_extra_bytes_per_parameter']:.2f}",
            f"{row['extra_bytes_per_parameter']:.2f}",
            f"{row['extra_fraction']:.1%}",
        )
    console.print(table)


WHOLE_RUN_COLUMNS = (
    "tokens/s",
    "time / jit + optax",
    "time / nnx",
    "time / torch eager",
    "s to first loss",
    "MiB, first step",
    "MiB, later",
)


def whole_run_cells(row: Row) -> list[str]:
    """What `WHOLE_RUN_COLUMNS` say of a whole training run."""
    speed, first, mib = row["tokens_per_s"], row.get("first_loss_s"), 2**20
    return [
        f"{speed['median']:,.0f} ({speed['q1']:,.0f}-{speed['q3']:,.0f})",
        *(
            f"{row['ratio'][peer]['median']:.2f}" if peer in row["ratio"] else ""
            for peer in ("jit + optax", "nnx", "torch eager")
        ),
        "" if first is None else f"{first['median']:.1f}",
        "" if first is None else f"{row['first_step_bytes'] / mib:.0f}",
        "" if first is None else f"{row['later_steps_bytes'] / mib:.0f}",
    ]


def _whole_runs(rows: Sequence[Row]) -> list[str]:
    """A Markdown table for each setting of XLA."""
    lines = []
    for setting in dict.fromkeys(row["tree"] for row in rows):
        lines += [f"| {setting} | {' | '.join(WHOLE_RUN_COLUMNS)} |"]
        lines += ["|---|" + "---:|" * len(WHOLE_RUN_COLUMNS)]
        for row in rows:
            if row["tree"] == setting:
                lines.append(f"| {row['contender']} | {' | '.join(whole_run_cells(row))} |")
        lines.append("")
    return lines


def _long_run(rows: Sequence[Row]) -> list[str]:
    """A Markdown table of at most ten of the rows."""
    if not rows:
        return []
    lines = ["| steps | resident MiB | live arrays | ms per step | programs |"]
    lines += ["|---|---:|---:|---:|---:|"]
    for r in [*rows[:-1][:: -(-len(rows) // 10)], rows[-1]]:
        lines.append(
            f"| {r['step']:,} | {r['resident_bytes'] / 2**20:.1f} | {r['live_arrays']} | "
            f"{r['median_step_s'] * 1e3:.2f} | {r['programs']} |"
        )
    return lines


def _pivot(rows: Sequence[Row], contender: str, peer: str, down: str, across: str) -> list[str]:
    """A Markdown table of the medians of ratios; no lines where there are none."""
    cells = {
        (r[down], r[across]): r["ratio"][peer]["median"]
        for r in rows
        if r["contender"] == contender and peer in r["ratio"]
    }
    if not cells:
        return []
    columns = list(dict.fromkeys(r[across] for r in rows if (r[down], r[across]) in cells))
    lines = [f"| {contender} / {peer} | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for name in dict.fromkeys(r[down] for r in rows):
        values = [cells.get((name, column)) for column in columns]
        if any(v is not None for v in values):
            shown = ["" if v is None else f"{v:.2f}" for v in values]
            lines.append(f"| {name} | {' | '.join(shown)} |")
    return [*lines, ""]


def markdown(rows: Sequence[Row]) -> str:
    """The ratios as tables for a page of the documentation."""
    lines = []
    updates = [r for r in rows if r["case"] == "update"]
    for contender, peer in (
        ("pure", "optax"),
        ("pure", "torch"),
        ("pure", "torch fused"),
        ("pure", "C"),
        ("class", "pure"),
        ("trace", "pure"),
        ("class", "nnx"),
        ("pure packed", "optax"),
        ("pure packed", "torch fused"),
        ("class packed", "torch fused"),
    ):
        lines += _pivot(updates, contender, peer, "optimizer", "tree")
    for case, pairs in {
        "muon": [("pure", "products"), ("pure", "optax"), ("class", "pure")],
        "training step": [("trace (tree)", "jit + optax"), ("trace (module)", "jit + optax")],
        "dispatch": [
            *(("class", "pure"), ("trace", "pure"), ("pure", "optax"), ("class", "nnx")),
            *(("pure packed", "optax"), ("class packed", "optax")),
        ],
    }.items():
        for contender, peer in pairs:
            chosen = [r for r in rows if r["case"] == case]
            lines += _pivot(chosen, contender, peer, "case", "tree")
    phases = [r for r in rows if r["case"] in ("trace", "lower", "compile", "total")]
    for form in ("pure", "pure packed"):
        lines += _pivot(phases, form, "optax", "case", "tree")
    extra = [r for r in rows if r["case"] == "memory"]
    if extra:
        lines += ["| bytes per parameter above the minimum | first step | later steps |"]
        lines += ["|---|---:|---:|"]
        for r in extra:
            first, later = r["first_step_extra_bytes_per_parameter"], r["extra_bytes_per_parameter"]
            lines.append(f"| {r['contender']} | {first:.1f} | {later:.1f} |")
    lines += _whole_runs([r for r in rows if r["case"] == "whole run"])
    lines += _long_run([r for r in rows if r["case"] == "long run"])
    return "\n".join(lines).strip() + "\n"


def draw(header: dict[str, Any], rows: Sequence[Row], path: Path) -> None:
    """A chart of the pure update on the largest leaf: its time as a multiple of each peer's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    peers = {"optax": "tab:blue", "torch": "tab:orange", "torch fused": "tab:red"}
    updates = [r for r in rows if r["case"] == "update" and r["contender"] == "pure"]
    trees = list(dict.fromkeys(r["tree"] for r in updates))
    tree = trees[0] if trees else ""
    chosen = [r for r in updates if r["tree"] == tree]
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.36 * len(chosen)), layout="constrained")
    height = 0.8 / len(peers)
    for k, (peer, color) in enumerate(peers.items()):
        for y, row in enumerate(chosen):
            value = row["ratio"].get(peer)
            if value is not None:
                error = [[value["median"] - value["q1"]], [value["q3"] - value["median"]]]
                axes.barh(
                    y + (k - 1) * height,
                    value["median"],
                    height,
                    xerr=error,
                    color=color,
                    label=f"{peer} = 1",
                )
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(chosen)), [r["optimizer"] for r in chosen])
    axes.invert_yaxis()
    axes.set_xlabel("time of one update as a multiple of the other library's (shorter is faster)")
    axes.set_title(f"{tree} parameters, float32; {header['machine']}", fontsize=9)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), loc="best")
    figure.savefig(path, dpi=150)
    plt.close(figure)
