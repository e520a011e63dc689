"""The training run itself: one compiled program per step."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import yaml
from flax import nnx
from rich.console import Console

from cerebras_jax.recipe import Recipe
from cerebras_jax.signals import deferred_signals
from cerebras_jax.train import data, gpt, report

_EVAL_BATCHES = 8


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """Everything about a run that is not the optimizer: the section ``train`` of a config."""

    steps: int = 500
    batch_size: int = 16
    context: int = 128
    layers: int = 4
    width: int = 128
    heads: int = 4
    eval_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "seed" else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"train.{field.name} must be a whole number >= {least}, got {value!r}"
                )
        if self.width % self.heads:
            raise ValueError(
                f"train.width must be a multiple of train.heads, got {self.width}, {self.heads}"
            )

    @classmethod
    def from_config(cls, section: Any) -> "TrainSettings":
        """Reads the section ``train``; an unknown key is an error that names those there are."""
        if not isinstance(section, Mapping):
            raise ValueError(f"train must be a mapping, got {section!r}")
        names = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(section) - set(names))
        if unknown:
            raise ValueError(f"train has unknown keys {unknown}, there are {names}")
        return cls(**section)


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run came to; losses in nats per byte."""

    steps: int
    first_loss: float
    last_loss: float
    first_held_out_loss: float
    last_held_out_loss: float
    seconds: float
    tokens_per_s: float
    interrupted: bool


class Program:
    """The model and the compiled functions of a run."""

    def __init__(self, recipe: Recipe, settings: TrainSettings):
        model = gpt.GPT(
            context=settings.context,
            layers=settings.layers,
            width=settings.width,
            heads=settings.heads,
            rngs=nnx.Rngs(settings.seed),
        )
        self.graphdef, self.params = nnx.split(model, nnx.Param)
        self.tx = recipe.transformation(model)
        self.state = self.tx.init(self.params)
        self._step = jax.jit(self._train_step, donate_argnums=(0, 1))
        self._loss = jax.jit(self._loss_fn)

    @property
    def size(self) -> int:
        return sum(p.size for p in jax.tree.leaves(self.params))

    def _loss_fn(self, params: nnx.State, tokens: jax.Array) -> jax.Array:
        return gpt.cross_entropy(nnx.merge(self.graphdef, params), tokens)

    def _train_step(self, params: nnx.State, state: Any, tokens: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(self._loss_fn)(params, tokens)
        updates, state = self.tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    def step(self, tokens: np.ndarray) -> float:
        """One training step; its loss."""
        with deferred_signals():
            self.params, self.state, loss = self._step(self.params, self.state, tokens)
            return float(loss)

    def loss(self, batches: list[np.ndarray]) -> float:
        """The mean loss over batches."""
        return float(np.mean([self._loss(self.params, tokens) for tokens in batches]))

    def model(self) -> gpt.GPT:
        return nnx.merge(self.graphdef, self.params)


def train(
    recipe: Recipe,
    settings: TrainSettings,
    config: Mapping[str, Any],
    folder: Path,
    path: Path | None,
    console: Console,
) -> Result:
    """Trains; ``folder`` gets config.yaml, metrics.jsonl, training.png and sample.txt."""
    text, held_out, source = data.load_text(path)
    window = settings.context + 1
    if min(len(text), len(held_out)) < window:
        raise ValueError(f"the text must have at least {10 * window} bytes, got {len(text)}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(config), sort_keys=False))
    rng = np.random.default_rng(0)
    evaluation = [
        data.sample_batch(held_out, settings.batch_size, window, rng) for _ in range(_EVAL_BATCHES)
    ]
    program = Program(recipe, settings)
    name = recipe.optimizer_class.__name__
    console.print(
        f"{source}; GPT with {program.size:,} parameters; {name}; "
        f"{settings.steps} steps of {settings.batch_size} x {settings.context} bytes",
        highlight=False,
        soft_wrap=True,
    )
    interrupted = False
    with report.Reporter(folder, settings.steps, console) as reporter:
        try:
            _loop(program, settings, text, evaluation, recipe.schedule(), reporter)
        except KeyboardInterrupt:
            interrupted = True
        # What was reached is kept, even if Ctrl-C comes again meanwhile.
        with contextlib.suppress(KeyboardInterrupt), deferred_signals():
            losses = [r["loss"] for r in reporter.records if "loss" in r]
            if interrupted:
                console.print(f"interrupted after {len(losses)} steps")
            reporter.record(True, step=len(losses), held_out_loss=program.loss(evaluation))
            title = f"{name}, {program.size:,} parameters, {source}"
            report.draw(reporter.records, title, folder / "training.png")
    with contextlib.suppress(KeyboardInterrupt), deferred_signals():
        _print_sample(program.model(), settings, folder, console)
    return _result(reporter.records, interrupted)


def _loop(
    program: Program,
    settings: TrainSettings,
    text: np.ndarray,
    evaluation: list[np.ndarray],
    lr: Callable[[int], float],
    reporter: report.Reporter,
) -> None:
    rng = np.random.default_rng(settings.seed)
    tokens_per_step = settings.batch_size * settings.context
    for step in range(settings.steps):
        if step % settings.eval_every == 0:
            reporter.record(True, step=step, held_out_loss=program.loss(evaluation))
        tokens = data.sample_batch(text, settings.batch_size, settings.context + 1, rng)
        start = time.perf_counter()
        loss = program.step(tokens)
        if not np.isfinite(loss):
            raise ValueError(
                f"the loss is {loss} at step {step}, with the learning rate {lr(step):g}"
            )
        reporter.record(
            show=step % max(settings.steps // 20, 1) == 0 or step == settings.steps - 1,
            step=step,
            loss=loss,
            lr=lr(step),
            tokens_per_s=tokens_per_step / (time.perf_counter() - start),
        )


def _result(records: list[dict[str, Any]], interrupted: bool) -> Result:
    steps = [r for r in records if "loss" in r]
    held_out = [r["held_out_loss"] for r in records if "held_out_loss" in r]
    losses = [r["loss"] for r in steps] or [float("nan")]
    speeds = [r["tokens_per_s"] for r in steps[1:]] or [0.0]  # the first step compiles
    return Result(
        steps=len(steps),
        first_loss=losses[0],
        last_loss=float(np.mean(losses[-10:])),
        first_held_out_loss=held_out[0],
        last_held_out_loss=held_out[-1],
        seconds=records[-1]["seconds"],
        tokens_per_s=float(np.median(speeds)),
        interrupted=interrupted,
    )


def _print_sample(model: gpt.GPT, settings: TrainSettings, folder: Path, console: Console) -> None:
    key = jax.random.key(settings.seed)
    sample = gpt.generate(model, b"def ", 300, key, temperature=0.8).decode("utf-8", "replace")
    (folder / "sample.txt").write_text(sample, encoding="utf-8")
    console.rule("a sample of what the model writes")
    console.print(sample, markup=False, highlight=False, soft_wrap=True)
    console.rule()
