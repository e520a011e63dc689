"""What a long run takes as it goes on: ``python -m benchmarks.long_run [--steps 20000]``.

A tiny GPT by the training command's own traced step, with warm-up and cosine, clipping, a dynamic
loss scale, measured gradients, and losses read late. Every thousand steps: resident memory, live
arrays, programs compiled so far, and the mean time of a step. What matters is the slope.
"""

import json
import time
from pathlib import Path
from typing import Any

import click
import jax
import numpy as np

import cerebras_jax
from benchmarks import machine, memory, runs
from benchmarks.results_file import write
from cerebras_jax.train import data
from cerebras_jax.train.losses import LateLosses, Loss
from cerebras_jax.train.run import Run
from cerebras_jax.train.settings import TrainSettings

_compiled = [0]


def _count(event: str, duration_secs: float, **kwargs: object) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled[0] += 1


def _run(steps: int) -> Run:
    recipe = cerebras_jax.load_recipe(
        {
            "optimizer": {
                "optimizer_type": "AdamW",
                "weight_decay": 0.1,
                "max_gradient_norm": 1.0,
                "loss_scaling_factor": "dynamic",
                "steps_per_increase": 100,  # so that the scale moves, and steps are skipped
                "max_loss_scale": 2.0**127,
                "learning_rate": runs.warm_up_and_cosine(max(1, steps // 10), steps),
            }
        }
    )
    settings = TrainSettings(steps=steps, batch_size=4, context=16, layers=1, width=32, heads=2)
    return Run(recipe, settings, data.load_text())


def measure(steps: int, every: int) -> list[dict[str, Any]]:
    """One row for each ``every`` steps."""
    jax.monitoring.register_event_duration_secs_listener(_count)
    run, rows = _run(steps), []
    losses: list[Loss] = []
    began = time.perf_counter()
    with LateLosses(losses.append) as late:
        for step in range(steps):
            late.put(step, time.perf_counter(), *run.step(run.batch(step)))
            if (step + 1) % every == 0:
                late.flush()
                now = time.perf_counter()
                rows.append(
                    {
                        "case": "long run",
                        "step": step + 1,
                        "resident_bytes": memory.used_and_peak()[0],
                        "live_arrays": len(jax.live_arrays()),
                        "programs": _compiled[0],
                        "step_s": (now - began) / every,
                        "median_step_s": float(np.median([loss.seconds for loss in losses])),
                        "loss": float(np.mean([loss.value for loss in losses])),
                        "loss_scale": losses[-1].more["loss_scale"],
                        "skipped_steps": losses[-1].more["num_skipped_steps"],
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
                losses.clear()
                began = time.perf_counter()
    return rows


def slopes(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Growth by a straight line through the rows, without the first, in which it was compiled."""
    late = rows[1:]
    if len(late) < 2:
        return {}
    at = [row["step"] for row in late]
    seconds = [row["median_step_s"] for row in late]
    slope = float(np.polyfit(at, seconds, 1)[0])
    return {
        "resident_bytes_per_step": float(np.polyfit(at, [r["resident_bytes"] for r in late], 1)[0]),
        "resident_growth_bytes": late[-1]["resident_bytes"] - late[0]["resident_bytes"],
        "step_s_growth_fraction": slope * (at[-1] - at[0]) / float(np.median(seconds)),
        "programs_after_the_first_row": rows[-1]["programs"] - rows[0]["programs"],
        "live_arrays_growth": rows[-1]["live_arrays"] - rows[0]["live_arrays"],
    }


@click.command(context_settings={"show_default": True})
@click.option("--steps", default=20_000, help="How many steps in all.")
@click.option("--every", default=1_000, help="Steps from row to row.")
@click.option("--json", "json_path", type=Path, help="Write the rows there.")
def main(steps: int, every: int, json_path: Path | None) -> None:
    """Prints a row for each thousand steps, then the slopes."""
    start = time.perf_counter()
    rows = measure(steps, every)
    header = machine.describe() | {"steps": steps, **slopes(rows)}
    header["seconds"] = round(time.perf_counter() - start, 1)
    print(json.dumps(header, indent=1))
    if json_path is not None:
        write(json_path, [header, *rows])


if __name__ == "__main__":
    main()
