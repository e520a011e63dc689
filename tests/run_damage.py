"""Breaks a checkpoint in many ways, for `test_checkpoint_damage`: python run_damage.py FOLDER.

It prints, as JSON, how often what came back was the same, was refused, or was wrong. In a process
of its own, since orbax complains about unreadable files long after it has raised an error.
"""

import json
import sys
import warnings
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import cerebras_jax as cjax
from cerebras_jax import optim


def make():
    opt = optim.AdamW({"w": jnp.ones((64, 33)), "b": jnp.zeros(33)}, lr=0.1)
    return {"opt": opt, "sched": optim.lr_scheduler.CosineDecayLR(opt, 0.1, 0.01, 20)}


def save(path):
    objects = make()
    rng = np.random.default_rng(0)
    parts = objects["opt"].parts()
    numbers = [jnp.asarray(rng.integers(1, 99, x.shape), x.dtype) for x in parts.arrays]
    objects["opt"].restore(numbers, parts.numbers)
    for _ in range(3):
        objects["sched"].step()
    cjax.save(path, **objects, key=jax.random.key(1), note={"n": 3, "text": "words"})


def content(path):
    """What is restored into fresh objects."""
    objects = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        note = {"n": 0, "text": ""}
        found = cjax.restore(path, **objects, key=jax.random.key(0), note=note)
    return (
        cjax.fingerprint([objects["opt"].parts().arrays, found["key"]]),
        objects["opt"].param_groups,
        objects["sched"].state_dict(),
        found["note"],
    )


def outcome(path, expected) -> str:
    try:
        return "same" if content(path) == expected else "WRONG"
    except cjax.CheckpointError:
        return "refused"


def files(path):
    return sorted(f for f in path.rglob("*") if f.is_file() and f.stat().st_size)


def flipped_bits(path, expected):
    """Most of them in values."""
    rng, outcomes = np.random.default_rng(0), Counter()
    sizes = np.cumsum([f.stat().st_size for f in files(path)])
    for place in rng.integers(sizes[-1], size=30):
        file = files(path)[int(np.searchsorted(sizes, place, side="right"))]
        intact = file.read_bytes()
        broken = bytearray(intact)
        broken[rng.integers(len(broken))] ^= 1 << rng.integers(8)
        file.write_bytes(broken)
        outcomes[outcome(path, expected)] += 1
        file.write_bytes(intact)
    return outcomes


def cut_and_deleted(path, expected):
    """Every file once."""
    outcomes = Counter()
    for file in files(path):
        intact = file.read_bytes()
        file.write_bytes(intact[: len(intact) // 2])
        outcomes[outcome(path, expected)] += 1
        file.unlink()
        outcomes[outcome(path, expected)] += 1
        file.write_bytes(intact)
    return outcomes


if __name__ == "__main__":
    path = Path(sys.argv[1])
    save(path)
    expected = content(path)
    results = [flipped_bits(path, expected), cut_and_deleted(path, expected)]
    results.append(Counter([outcome(path, expected)]))
    print(json.dumps(results))
