"""``cerebras-jax train``: a small GPT, trained with the optimizer of a configuration."""

import contextlib
import dataclasses
import hashlib
import importlib.resources
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import jax
import yaml

from cerebras_jax.checkpoint import Checkpoints
from cerebras_jax.messages import shown
from cerebras_jax.processes import check_equal, from_first, is_first
from cerebras_jax.train import data, folder, report
from cerebras_jax.train.answers import EXPECTED, one_line, quiet_recipe, tell, told
from cerebras_jax.train.distributed import PATIENCE, check_options, joined
from cerebras_jax.train.plan_cli import mesh_option, zero_option
from cerebras_jax.train.run import Run, train
from cerebras_jax.train.settings import RANGES, TrainSettings, parse_mesh
from cerebras_jax.train.tensorboard import Events, import_writer
from cerebras_jax.yaml_config import read_config

# What of the section ``train`` may be another when a run is resumed.
_MAY_DIFFER = ("steps", "eval_every", "save_every", "keep", "mesh", "zero")


def _train_option(name: str, what: str) -> Any:
    flag = f"--{name.replace('_', '-')}"
    return click.option(flag, type=click.IntRange(*RANGES[name]), help=what)


@click.command("train")
@click.argument(
    "config", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=False
)
@click.option("--data", type=click.Path(exists=True, path_type=Path), help="Text file or folder.")
@_train_option("steps", "Number of training steps.")
@_train_option("batch_size", "Windows of text in a step.")
@_train_option("context", "Bytes in a window.")
@_train_option("seed", "Seed of the model and of the batches.")
@_train_option("grad_accum_steps", "Parts in which a batch is computed.  [default: CONFIG's, or 1]")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Run folder, new or empty.  [default: runs/TIME]",
)
@click.option("--overwrite", is_flag=True, help="Replace an earlier run in --out.")
@_train_option("save_every", "Steps from checkpoint to checkpoint; 0: none.  [default: 500]")
@_train_option("keep", "How many of the latest checkpoints to keep.  [default: 2]")
@click.option(
    "--resume",
    type=click.Path(file_okay=False, path_type=Path),
    help="Go on with the run in this folder from its latest checkpoint.",
)
@click.option("--tensorboard", is_flag=True, help="Write the metrics for TensorBoard, too.")
@mesh_option
@zero_option
@click.option(
    "--distributed", is_flag=True, help="Be one of several processes with the same command."
)
@click.option("--coordinator", metavar="HOST:PORT", help="Where process 0 is to be found.")
@click.option("--process-id", type=click.IntRange(0), help="Which of the processes this is.")
@click.option("--processes", type=click.IntRange(1), help="How many there are.")
@click.option(
    "--patience",
    type=click.IntRange(*PATIENCE),
    default=60,
    show_default=True,
    help="Seconds that another process may be silent.",
)
def train_command(
    config: Path | None,
    distributed: bool,
    coordinator: str | None,
    process_id: int | None,
    processes: int | None,
    patience: int,
    **options: Any,
) -> None:
    """Train a small byte-level GPT with the optimizer of CONFIG.yaml.

    CONFIG is a Model Zoo configuration: its section `optimizer` says what to train with; a
    section `train` may set steps, batch_size, context, layers, width, heads, eval_every, seed,
    save_every, keep, grad_accum_steps. Without one, AdamW with warm-up and cosine decay trains
    on the source code of Python's standard library. The run folder gets config.yaml,
    metrics.jsonl, training.png, sample.txt, weights.npz and checkpoints.

    A run that was interrupted or killed goes on with --resume RUN, and the same --data, as if it
    had not been; --steps may be more than before. On another number of devices, a run that was
    begun with --mesh needs another --mesh.

    All devices at hand train together, with a part of each batch each (data parallel), and the
    states of the optimizer are split over them (ZeRO). --mesh and --zero say otherwise, as do
    `mesh` and `zero` in the section `train`. With --distributed, the devices are those of several
    processes; without --coordinator, JAX finds these out of SLURM's, Open MPI's, Kubernetes' or
    Cloud TPU's environment.

    With --tensorboard, RUN/tensorboard gets the metrics, for `tensorboard --logdir RUN`.
    """
    with told():
        check_options(distributed, coordinator, process_id, processes)
    if not distributed:
        return _train(config, **options)
    with contextlib.ExitStack() as stack:
        with told():
            stack.enter_context(joined(coordinator, process_id, processes, patience))
        _train(config, **options)


def _train(
    config: Path | None,
    data: Path | None,
    out: Path | None,
    overwrite: bool,
    resume: Path | None,
    tensorboard: bool,
    mesh: str | None,
    **options: Any,
) -> None:
    """The command, in each of its processes."""
    console = report.plain_console(quiet=not is_first())
    with told():
        if tensorboard:
            import_writer()  # before anything is written
        options["mesh"] = None if mesh is None else parse_mesh(mesh)
        run, run_folder, checkpoints, start = _begin(config, data, out, overwrite, resume, options)
        writes_events = tensorboard and is_first()
        events = Events(run_folder / folder.EVENTS, start) if writes_events else None
    if resume is not None:
        console.print(f"resumed after {start} steps")
    result = train(run, run_folder, console, checkpoints, start, events)
    if result.steps:
        console.print(
            f"{'interrupted, ' if result.interrupted else ''}{result.steps} steps in "
            f"{result.seconds:.0f} s, {result.tokens_per_s:,.0f} tokens/s\n"
            f"training loss {result.first_loss:.3f} -> {result.last_loss:.3f}, held-out loss "
            f"{result.first_held_out_loss:.3f} -> {result.last_held_out_loss:.3f} nats per byte\n"
            f"{report.printable(str(run_folder))}/{folder.PICTURE}"
        )
    for name, error in result.failures.items():
        click.echo(f"Error: {name} was not complete: {one_line(error)}", err=True)
    if isinstance(result.stopped, EXPECTED):
        raise click.ClickException(one_line(result.stopped))
    if result.stopped is not None:
        raise result.stopped
    if result.failures:
        raise SystemExit(1)


def _begin(
    config: Path | None,
    text: Path | None,
    out: Path | None,
    overwrite: bool,
    resume: Path | None,
    options: dict[str, Any],
) -> tuple[Run, Path, Checkpoints | None, int]:
    """A run, its folder, where it saves if it does, and how many steps it has taken."""
    if resume is None:
        from_first(lambda: str(out and folder.check_folder(out, overwrite)))
        run, resolved = _load(config, text, options)
        made = from_first(lambda: _path_for_all(folder.make_folder(out, overwrite, resolved)))
        run_folder = Path(made)
        return run, run_folder, _checkpoints(run, run_folder), 0
    if out is not None or overwrite:
        raise ValueError("--resume goes on in the run's own folder, without --out and --overwrite")
    given = resume
    resume = Path(from_first(lambda: _path_for_all(given)))
    folder.check_run(resume)
    stored = read_config(resume / folder.CONFIG)
    run, resolved = _load(config or resume / folder.CONFIG, text, options)
    _check_same(stored, resolved)
    checkpoints = _checkpoints(run, resume)
    start = _resume(run, resume, checkpoints)
    if is_first():
        folder.rewrite_config(resume, resolved)
    return run, resume, checkpoints, start


def _path_for_all(path: Path) -> str:
    """A path that is the same in every process, wherever it was started."""
    return str(path if jax.process_count() == 1 else path.absolute())


def _checkpoints(run: Run, run_folder: Path) -> Checkpoints | None:
    every, keep = run.settings.save_every, run.settings.keep
    return Checkpoints(run_folder / folder.CHECKPOINTS, every, keep) if every else None


def _resume(run: Run, run_folder: Path, checkpoints: Checkpoints | None) -> int:
    """Brings a run to its latest checkpoint, also one that will save no more."""
    if checkpoints is not None:
        return run.resume(checkpoints)
    with Checkpoints(run_folder / folder.CHECKPOINTS) as found:
        return run.resume(found)


def _check_same(stored: Mapping[str, Any], resolved: Mapping[str, Any]) -> None:
    """Refuses to resume a run with another configuration."""
    ours, theirs = (
        {**config, "train": {k: v for k, v in config["train"].items() if k not in _MAY_DIFFER}}
        for config in (resolved, stored)
    )
    for key in dict.fromkeys([*theirs, *ours]):
        if ours.get(key) != theirs.get(key):
            key, mine, before = _difference(key, ours.get(key), theirs.get(key))
            raise ValueError(
                f"--resume: {key} is {shown(mine)}, it was {shown(before)} when the run was begun; "
                f"only {', '.join(_MAY_DIFFER)} may differ"
            )


def _difference(name: str, ours: Any, theirs: Any) -> tuple[str, Any, Any]:
    """The first value in which two configurations differ, by its dotted name."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        key = next(k for k in {**theirs, **ours} if ours.get(k) != theirs.get(k))
        return _difference(f"{name}.{key}", ours.get(key), theirs.get(key))
    return name, ours, theirs


def _load(
    config: Path | None, text: Path | None, options: dict[str, Any]
) -> tuple[Run, dict[str, Any]]:
    """The run, and the configuration that makes the same one."""
    default = importlib.resources.files("cerebras_jax.train") / "default.yaml"
    values = dict(
        yaml.safe_load(default.read_text("utf-8")) if config is None else read_config(config)
    )
    given = {k: v for k, v in options.items() if v is not None}
    if config is None and "steps" in given:  # the embedded schedule spans the run
        for entry in values["optimizer"]["learning_rate"]:
            share = entry["total_iters"] / values["train"]["steps"]
            entry["total_iters"] = max(1, round(share * given["steps"]))
    unused = [k for k in ("runconfig", "train_input", "eval_input", "model") if k in values]
    if unused:
        tell(f"Not used: {', '.join(unused)}; see --steps and --batch-size")
    settings = TrainSettings.from_config(values.get("train"), **given)
    recipe = quiet_recipe(values)
    if "grad_accum_steps" not in {**(values.get("train") or {}), **given}:
        settings = dataclasses.replace(settings, grad_accum_steps=recipe.grad_accum_steps)
    resolved = {**values, "train": settings.as_config()}
    loaded = data.load_text(text)
    digests = [hashlib.sha256(part.tobytes()).hexdigest() for part in loaded[:2]]
    check_equal(f"{resolved} {digests}", "the configuration or the text")
    return Run(recipe, settings, loaded), resolved
