"""The training run itself, as a user would write it: the class form in one compiled program."""

import collections
import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console

from cerebras_jax.checkpoint import Checkpoints
from cerebras_jax.formats.state_dict import to_numpy
from cerebras_jax.optim import Optimizer
from cerebras_jax.optim.scheduler import Scheduler
from cerebras_jax.processes import is_first, meet
from cerebras_jax.recipe import Recipe
from cerebras_jax.train import data, devices, gpt, report
from cerebras_jax.train import folder as run_folder
from cerebras_jax.train.interrupts import Interrupts, SharedInterrupts
from cerebras_jax.train.losses import LateLosses, Loss
from cerebras_jax.train.settings import TrainSettings, layout_text
from cerebras_jax.train.tensorboard import Events
from cerebras_jax.transforms.accumulate import accumulate
from cerebras_jax.transforms.loss_scale import GradScaler
from cerebras_jax.whole_graph import trace

_EVAL_BATCHES = 8

MOST_SKIPS = 10
"""So many steps in a row that are not taken end a run."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run came to; losses in nats per byte, NaN where there is none.

    Attributes:
      interrupted: Ctrl-C ended it.
      stopped: what ended it otherwise, before its last step.
      failures: what could not be written, by file name.
    """

    steps: int
    first_loss: float
    last_loss: float
    first_held_out_loss: float
    last_held_out_loss: float
    seconds: float
    tokens_per_s: float
    interrupted: bool
    stopped: BaseException | None
    failures: Mapping[str, Exception]


@dataclasses.dataclass(frozen=True)
class Parts:
    """In how many parts a batch is computed; static in a traced step."""

    number: int

    def loss(self, tokens: Any) -> Callable[[Any], Any]:
        """The loss of a batch, as a function of the model."""
        if self.number == 1:
            return lambda model: gpt.cross_entropy(model, tokens)
        return accumulate(gpt.cross_entropy, tokens, self.number)


@trace
def train_step(
    opt: Optimizer,
    schedulers: list[Scheduler],
    scaler: GradScaler | None,
    parts: Parts,
    tokens: Any,
) -> tuple[jax.Array, dict[str, Any]]:
    """Forward, backward, update and schedules; returns the loss, and what else was seen."""
    scaled = {} if scaler is None else {"scaler": scaler}
    seen = {} if scaler is None else {"loss_scale": scaler.state.loss_scale}
    loss = opt.step(parts.loss(tokens), **scaled)
    for scheduler in schedulers:
        scheduler.step()
    if "measure_gradients" in opt.settings:
        report = opt.report._asdict()  # pyright: ignore
        seen |= {name: value for name, value in report.items() if name != "norms"}
    return loss, seen


evaluate = nnx.jit(gpt.cross_entropy)


class Run:
    """A run between two steps.

    What changes from step to step is the model, the optimizer, the schedulers and the scaler; the
    batches follow from the seed and the number of the step. So these and that number are a run's
    whole state.
    """

    def __init__(self, recipe: Recipe, settings: TrainSettings, text: data.Text):
        self.settings = settings
        self.text = text
        window = settings.context + 1
        if min(len(text.train), len(text.held_out)) < window:
            raise ValueError(
                f"the text must have at least {10 * window} bytes for train.context "
                f"{settings.context}, got {len(text.train) + len(text.held_out)}"
            )
        self.model = gpt.model_of(settings)
        self.mesh = devices.mesh_of(settings)
        if self.mesh is not None:
            devices.place(self.model, self.mesh)
        self.zero_axis = settings.zero_axis(1 if self.mesh is None else self.mesh.size)
        self.opt, self.schedulers = recipe.optimizer(self.model, zero_axis=self.zero_axis)
        if "measure_gradients" in self.opt.settings:
            self.opt.measure_gradients = True  # pyright: ignore
        self.scaler = recipe.scaler()
        self.parts = Parts(settings.grad_accum_steps)
        self.scheduled = {
            key: recipe.schedule(key) for key in ("lr", "weight_decay") if recipe.has(key)
        }
        rng = np.random.default_rng(0)
        self.evaluation = [
            self._placed(self._batch(text.held_out, rng)) for _ in range(_EVAL_BATCHES)
        ]
        self.title = f"{type(self.opt).__name__}, {self.size:,} parameters, {text.source}"

    @property
    def place(self) -> str:
        """Where the run lies, for its first line; nothing, if that is one device."""
        if self.mesh is None:
            return ""
        of = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
        return f"; {self.mesh.size} devices{of}, {layout_text(self.mesh.shape, self.zero_axis)}"

    @property
    def size(self) -> int:
        """The number of parameters."""
        return sum(value.size for _, value in self.opt.named_parameters())

    def _batch(self, text: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return data.sample_batch(text, self.settings.batch_size, self.settings.context + 1, rng)

    def _placed(self, tokens: np.ndarray) -> jax.Array:
        if self.mesh is None:
            return jnp.asarray(tokens)
        return devices.split_batch(tokens, self.mesh)

    def batch(self, step: int) -> np.ndarray:
        """The windows of text of step number ``step``."""
        return self._batch(self.text.train, np.random.default_rng((self.settings.seed, step)))

    def step(self, tokens: np.ndarray) -> tuple[jax.Array, dict[str, Any]]:
        """One training step; its loss and what else was seen, still on their way."""
        batch = tokens if self.mesh is None else self._placed(tokens)
        return train_step(self.opt, self.schedulers, self.scaler, self.parts, batch)

    def held_out(self) -> dict[str, float]:
        """The mean loss over the same few batches every time; of sparse weights, the density."""
        # One after the other: on CPUs, many devices would have more to do than XLA has threads.
        losses = [float(evaluate(self.model, tokens)) for tokens in self.evaluation]
        return {"held_out_loss": float(np.mean(losses)), **report.density(self.opt)}

    def numbers(self, step: int) -> dict[str, float]:
        """The scheduled numbers that ``step`` is taken with."""
        return {key: float(schedule(step)) for key, schedule in self.scheduled.items()}

    def weights(self) -> dict[str, np.ndarray]:
        """The parameters by their dotted names, whole; all processes must call this."""
        return {name: to_numpy(value) for name, value in self.opt.named_parameters()}

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        text = hashlib.sha256(self.text.train.tobytes()).hexdigest()
        state = {"opt": self.opt, "schedulers": self.schedulers, "text": text}
        return state if self.scaler is None else {**state, "scaler": self.scaler}

    def resume(self, checkpoints: Checkpoints) -> int:
        """Goes back to the latest checkpoint; the number of steps that it had taken.

        Raises:
          ValueError: if the run was made with another text.
        """
        mine = self.state()
        found = checkpoints.restore(**mine)
        if found is None:
            return 0
        if found["text"] != mine["text"]:
            raise ValueError("the run was trained on another text; give the same --data")
        return found.step or 0

    def writer(self) -> gpt.GPT:
        """The model on one device, for `sample`; all processes must call this."""
        return self.model if self.mesh is None else devices.brought_home(self.model)

    def sample(self, model: gpt.GPT) -> str:
        """Text that the model writes."""
        key = jax.random.key(self.settings.seed)
        return gpt.generate(model, b"def ", 300, key, 0.8).decode("utf-8", "replace")


def train(
    run: Run,
    folder: Path,
    console: Console,
    checkpoints: Checkpoints | None = None,
    start: int = 0,
    events: Events | None = None,
) -> Result:
    """Trains, and writes metrics, weights, picture and sample into ``folder``.

    Whatever ends the run, and whichever of the files cannot be written, the others are; only a
    run that ends before its first step leaves nothing.

    Args:
      checkpoints: where to save, if at all.
      start: how many steps were taken already.
      events: where else to write the metrics; closed at the end.
    """
    settings = run.settings
    console.print(
        f"{report.printable(run.text.source)}; GPT with {run.size:,} parameters; "
        f"{type(run.opt).__name__}; {settings.steps} steps of {settings.batch_size} x "
        f"{settings.context} bytes"
        + (f" in {run.parts.number} parts" if run.parts.number > 1 else "")
        + run.place
    )
    together = jax.process_count() > 1
    interrupts = SharedInterrupts() if together else Interrupts()
    stopped: BaseException | None = None
    failures: dict[str, Exception] = {}
    mine = folder if is_first() else None
    reports = report.Reporter(mine, settings.steps, console, start, events)
    with interrupts.handled(), reports as reporter:
        try:
            _loop(run, reporter, interrupts, checkpoints, start)
        except BaseException as error:
            if together and not isinstance(error, FloatingPointError):
                raise  # the others are elsewhere; what they all see in a loss stops them all
            stopped = error
        interrupts.held = True  # what was reached is kept, even if Ctrl-C comes again
        if reporter.steps_done or stopped is None:
            failures = _write_results(run, reporter, folder, interrupts, stopped, checkpoints)
    if stopped is not None and not reporter.steps_done:
        if checkpoints is not None:
            checkpoints.close()
        if is_first():
            run_folder.discard(folder)
    meet("the end of the run")
    return _result(reporter.records, interrupts.count > 0, stopped, failures)


def _loop(
    run: Run,
    reporter: report.Reporter,
    interrupts: Interrupts,
    checkpoints: Checkpoints | None,
    start: int,
) -> None:
    settings = run.settings
    tokens_per_step = settings.batch_size * settings.context
    recent: collections.deque[float] = collections.deque(maxlen=8)  # losses may arrive in bunches

    def report_loss(loss: Loss) -> None:
        # Steps that were not taken do not count for the schedules.
        skipped = int(loss.more.get("num_skipped_steps", 0))
        took = bool(loss.more.get("took_step", True))
        numbers = run.numbers(loss.step - skipped + (not took))
        in_a_row = int(loss.more.get("skipped_in_a_row", 0))
        if (took and not math.isfinite(loss.value)) or in_a_row >= MOST_SKIPS:
            skips = f"; {in_a_row} steps in a row were not taken" if in_a_row else ""
            raise FloatingPointError(
                f"the loss is {loss.value} at step {loss.step}, with the learning rate "
                f"{numbers['lr']:g}{skips}"
            )
        seen = {k: v for k, v in loss.more.items() if k in ("gradient_norm", "loss_scale")}
        if skipped:
            seen["skipped_steps"] = skipped
        recent.append(loss.seconds)
        reporter.record(
            show=loss.step % max(settings.steps // 20, 1) == 0 or loss.step == settings.steps - 1,
            at=loss.time,
            step=loss.step,
            loss=loss.value,
            **numbers,
            **seen,
            tokens_per_s=tokens_per_step * len(recent) / sum(recent),
        )
        if loss.step == start:  # it was compiled
            recent.clear()

    with LateLosses(report_loss, in_step=jax.process_count() > 1) as losses:
        try:
            for step in range(start, settings.steps):
                if interrupts.end_before(step):
                    break
                if step % settings.eval_every == 0:
                    losses.flush()
                    reporter.record(True, step=step, **run.held_out())
                tokens = run.batch(step)
                started = time.perf_counter()
                losses.put(step, started, *run.step(tokens))
                if checkpoints is not None and (step + 1) % settings.save_every == 0:
                    losses.flush()  # what is saved is finite, and its metrics are written
                    checkpoints.save(step + 1, **run.state())
        except KeyboardInterrupt:
            interrupts.in_a_step()


def _write_results(
    run: Run,
    reporter: report.Reporter,
    folder: Path,
    interrupts: Interrupts,
    stopped: BaseException | None,
    checkpoints: Checkpoints | None,
) -> dict[str, Exception]:
    """Writes what a run leaves behind; what could not be written, by name.

    Of several processes, all do what all must do, and where one fails it raises.
    """
    console, step = reporter.console, reporter.steps_done
    together = jax.process_count() > 1
    weights, writer = None, None
    if interrupts.count:
        console.print(f"interrupted after {step} steps")

    def write_sample() -> None:
        sample = run.sample(writer or run.writer())
        with (folder / run_folder.SAMPLE).open("w", encoding="utf-8", newline="") as file:
            file.write(sample)
        console.rule("a sample of what the model writes")
        console.print(report.printable(sample, keep="\n\t"))
        console.rule()

    writers = {
        run_folder.WEIGHTS: lambda: run_folder.save_weights(
            weights or run.weights(), folder / run_folder.WEIGHTS
        ),
        run_folder.METRICS: lambda: reporter.record(True, step=step, **run.held_out()),
        run_folder.PICTURE: lambda: report.draw(
            reporter.records, run.title, folder / run_folder.PICTURE
        ),
        run_folder.SAMPLE: write_sample,
    }

    def save() -> None:
        assert checkpoints is not None
        # A second Ctrl-C may have come in a step; then its number is not known for certain.
        if stopped is None and interrupts.count < 2:
            checkpoints.save(step, force=True, **run.state())
        checkpoints.close()

    if checkpoints is not None:
        writers[run_folder.CHECKPOINTS] = save
    if isinstance(stopped, FloatingPointError):  # the weights are NaN by now
        del writers[run_folder.METRICS], writers[run_folder.SAMPLE]
    if together:
        for name in (run_folder.METRICS, run_folder.CHECKPOINTS):
            writers.pop(name, lambda: None)()
        weights, writer = run.weights(), run.writer()
    return run_folder.attempt(writers) if is_first() else {}


def _result(
    records: list[dict[str, Any]],
    interrupted: bool,
    stopped: BaseException | None,
    failures: dict[str, Exception],
) -> Result:
    steps = [r for r in records if "loss" in r]
    held_out = [r["held_out_loss"] for r in records if "held_out_loss" in r] or [math.nan]
    losses = [r["loss"] for r in steps] or [math.nan]
    speeds = [r["tokens_per_s"] for r in steps[1:]] or [0.0]  # the first step compiles
    return Result(
        steps=len(steps),
        first_loss=losses[0],
        last_loss=float(np.mean(losses[-10:])),
        first_held_out_loss=held_out[0],
        last_held_out_loss=held_out[-1],
        seconds=records[-1]["seconds"] if records else 0.0,
        tokens_per_s=float(np.median(speeds)),
        interrupted=interrupted,
        stopped=stopped,
        failures=failures,
    )
