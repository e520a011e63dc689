"""A run that saves as it goes, for `test_checkpoint_runs`: python run_checkpointed.py FOLDER STEPS.

It says "saved N" when it has begun to write a checkpoint, and "done FINGERPRINTS" at the end.
"""

import sys

import jax.numpy as jnp
import numpy as np

import cerebras_jax as cjax
from cerebras_jax import optim

EVERY = 5


def make():
    opt = optim.AdamW({"w": jnp.ones((32, 8)), "b": jnp.zeros(8)}, lr=0.1, weight_decay=0.1)
    return {"opt": opt, "sched": optim.lr_scheduler.CosineDecayLR(opt, 0.1, 0.01, 100)}


@cjax.trace
def train_step(opt, sched, x):
    loss = opt.step(lambda p: ((x @ p["w"] + p["b"] - 1) ** 2).mean())
    sched.step()
    return loss


def train(folder, steps, say=print):
    """The fingerprints of what the optimizer holds after so many steps."""
    objects, rng = make(), np.random.default_rng(0)
    with cjax.Checkpoints(folder, every=EVERY, keep=2) as checkpoints:
        found = checkpoints.restore(**objects, rng=rng)
        start = found.step if found else 0
        say(f"start {start}")
        for step in range(start, steps):
            train_step(objects["opt"], objects["sched"], rng.standard_normal((4, 32), np.float32))
            if checkpoints.save(step + 1, **objects, rng=rng):
                say(f"saved {step + 1}")
    state = objects["opt"].named_state()
    return cjax.fingerprint([objects["opt"].params, state.states, state.clocks])


if __name__ == "__main__":
    folder, steps = sys.argv[1:]
    result = train(folder, int(steps), lambda text: print(text, flush=True))
    print("done", *result.values(), flush=True)
