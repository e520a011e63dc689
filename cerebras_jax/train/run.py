"""The training run itself: one compiled program per step."""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import yaml
from flax import nnx
from rich.console import Console

from cerebras_jax.recipe import Recipe
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

    model = gpt.GPT(
        context=settings.context,
        layers=settings.layers,
        width=settings.width,
        heads=settings.heads,
        rngs=nnx.Rngs(settings.seed),
    )
    graphdef, params = nnx.split(model, nnx.Param)
    tx = recipe.transformation(model)
    state = tx.init(params)

    def loss_fn(params: nnx.State, tokens: jax.Array) -> jax.Array:
        return gpt.cross_entropy(nnx.merge(graphdef, params), tokens)

    def train_step(params: nnx.State, state: Any, tokens: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    compiled_step = jax.jit(train_step, donate_argnums=(0, 1))
    compiled_loss = jax.jit(loss_fn)

    def held_out_loss(params: nnx.State) -> float:
        rng = np.random.default_rng(0)  # the same windows every time
        batches = [
            data.sample_batch(held_out, settings.batch_size, window, rng)
            for _ in range(_EVAL_BATCHES)
        ]
        return float(np.mean([compiled_loss(params, tokens) for tokens in batches]))

    size = sum(p.size for p in jax.tree.leaves(params))
    console.print(
        f"{source}; GPT with {size:,} parameters; {recipe.optimizer_class.__name__}; "
        f"{settings.steps} steps of {settings.batch_size} x {settings.context} bytes",
        highlight=False,
        soft_wrap=True,
    )
    lr = recipe.schedule()
    rng = np.random.default_rng(settings.seed)
    tokens_per_step = settings.batch_size * settings.context
    interrupted = False
    completed = 0
    with report.Reporter(folder, settings.steps, console) as reporter:
        start = loop_start = last = time.perf_counter()
        try:
            reporter.record(True, step=0, held_out_loss=held_out_loss(params))
            last = time.perf_counter()
            for step in range(settings.steps):
                tokens = data.sample_batch(text, settings.batch_size, window, rng)
                params, state, loss = compiled_step(params, state, tokens)
                value = float(loss)
                if not np.isfinite(value):
                    raise ValueError(
                        f"the loss is {value} at step {step}, with the learning rate {lr(step):g}"
                    )
                now = time.perf_counter()
                reporter.record(
                    show=step % max(settings.steps // 20, 1) == 0 or step == settings.steps - 1,
                    step=step,
                    loss=value,
                    lr=lr(step),
                    tokens_per_s=tokens_per_step / (now - last),
                )
                completed = step + 1
                if step == 0:
                    loop_start = now  # from here on without compilation
                last = now
                if completed % settings.eval_every == 0 and completed < settings.steps:
                    reporter.record(True, step=completed, held_out_loss=held_out_loss(params))
                    last = time.perf_counter()
        except KeyboardInterrupt:
            interrupted = True
            console.print(f"interrupted after {completed} steps")
        if completed:
            reporter.record(True, step=completed, held_out_loss=held_out_loss(params))
    losses = [r["loss"] for r in reporter.records if "loss" in r]
    if not losses:
        raise KeyboardInterrupt
    evaluated = [r["held_out_loss"] for r in reporter.records if "held_out_loss" in r]
    report.draw(
        reporter.records,
        f"{recipe.optimizer_class.__name__}, {size:,} parameters, {source}",
        folder / "training.png",
    )
    _print_sample(nnx.merge(graphdef, params), settings, folder, console)
    return Result(
        steps=len(losses),
        first_loss=losses[0],
        last_loss=float(np.mean(losses[-10:])),
        first_held_out_loss=evaluated[0],
        last_held_out_loss=evaluated[-1],
        seconds=time.perf_counter() - start,
        tokens_per_s=tokens_per_step * (len(losses) - 1) / max(last - loop_start, 1e-9),
        interrupted=interrupted,
    )


def _print_sample(model: gpt.GPT, settings: TrainSettings, folder: Path, console: Console) -> None:
    key = jax.random.key(settings.seed)
    sample = gpt.generate(model, b"def ", 300, key, temperature=0.8).decode("utf-8", "replace")
    (folder / "sample.txt").write_text(sample, encoding="utf-8")
    console.rule("a sample of what the model writes")
    console.print(sample, markup=False, highlight=False, soft_wrap=True)
    console.rule()
