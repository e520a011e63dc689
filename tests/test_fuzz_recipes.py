"""Mutated recipes: each is read, or refused in a sentence of ours that says where it is wrong.

A few hundred here; ``python tests/test_fuzz_recipes.py 20000`` runs more and counts the outcomes.
"""

import collections
import copy
import functools
import itertools
import json
import linecache
import math
import random
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import cerebras_jax as cjax

PACKAGE = str(Path(cjax.__file__).parent)
TREE = {
    "decoder": {"attn_dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}},
    "embedding": {"embedding": jnp.ones((3, 2))},
}
LONGEST_MESSAGE = 1000


def sequential(entries: list) -> dict:
    return {"SequentialLR": {"schedulers": entries}}


def trainer_style(section: dict) -> dict:
    """The same recipe in the style of release 2.3 and later."""
    rest = {k: v for k, v in section.items() if k not in ("optimizer_type", "learning_rate")}
    entries = section["learning_rate"]
    entries = entries if isinstance(entries, list) else [entries]
    nested = [
        {f"{e['scheduler'].removesuffix('LR')}LR": {k: v for k, v in e.items() if k != "scheduler"}}
        if isinstance(e, dict)
        else {"ConstantLR": {"learning_rate": e}}
        for e in entries
    ]
    scheduler = nested[0] if len(nested) == 1 else sequential(nested)
    return {
        "trainer": {
            "init": {
                "model": {"hidden_size": 8, "filter_size": 32},
                "optimizer": {section["optimizer_type"]: rest},
                "schedulers": [scheduler],
                "precision": {"enabled": True, "max_gradient_norm": 1.0},
            }
        }
    }


def scaled_and_tagged() -> list[dict]:
    """What the optimizer sections alone do not show: tags, nested scaling, derived factors."""
    linear = {"initial_learning_rate": 0.0, "end_learning_rate": 0.1, "total_iters": 5}
    decay = {"initial_val": 0.1, "end_val": 0.0, "total_iters": 5}
    filters = [
        {"params": ["*kernel", "*nothing"], "tag": "wd"},
        {"params": "embedding.*", "tag": "slow"},
    ]
    init = {
        "optimizer": {"AdamW": {"weight_decay": 0.1, "params": filters}},
        "schedulers": [
            {"LinearLR": {**linear, "param_group_tags": "slow"}},
            {"LinearLR": {**linear, "param_group_tags": [None, "wd"]}},
            {"LinearWD": {**decay, "param_group_tags": "wd"}},
        ],
    }
    scaled = {
        "optimizer": {"SGD": {"momentum": 0.9, "adjust_learning_rate": {"embedding": 0.5}}},
        "schedulers": [{"ScalePerParamLR": {"scheduler": sequential([{"LinearLR": linear}] * 2)}}],
    }
    mup = {
        "model": {"hidden_size": 8, "mup_base_hidden_size": 2},
        "optimizer": {"AdamW": {"adjust_learning_rate": {"decoder_input_ffn": None}}},
        "schedulers": [{"LinearLR": linear}],
    }
    return [{"trainer": {"init": init}} for init in (init, scaled, mup)]


@functools.cache
def bases() -> list[dict]:
    """Recipes to start from: the public ones in both styles, and some with every feature."""
    path = Path(__file__).parent / "golden" / "modelzoo_configs.json"
    sections = [c["optimizer"] for c in json.loads(path.read_text())]
    runner = [{"optimizer": s} for s in sections]
    return runner + [trainer_style(s) for s in sections] + scaled_and_tagged() * 20


def endless() -> list:
    loop: list[Any] = [{"scheduler": "Constant", "learning_rate": 0.1}]
    loop.append({"scheduler": "SequentialLR", "schedulers": loop})
    return loop


def deep(n: int = 5000) -> Any:
    value: Any = 0.1
    for _ in range(n):
        value = [value]
    return value


def bomb() -> Any:
    value: Any = ["x"] * 10
    for _ in range(12):
        value = [value] * 10
    return value


WRONG: list[Any] = [
    None, True, False, "", "x", "None", "true", "1e-3", "nan", "inf", "-1", "1e400",
    -1, 0, 1, 2.5, 1e308, 10**400, 10**5000, -(10**400), math.inf, -math.inf, math.nan,
    [], {}, (), [None], [1, "a"], [[1.0]], {"a": 1}, {1: 2}, {None: None, "b": 1}, {1: 2, "x": 3},
    b"bytes", {1, 2}, object(), 1 + 2j, np.float32(0.1), np.arange(3.0), jnp.ones(2),
    "long " * 5000, list(range(5000)), {f"k{i}": i for i in range(5000)},
    {"scheduler": "Constant", "learning_rate": 0.1}, {"ConstantLR": {"learning_rate": 0.1}},
    [{"scheduler": "Linear"}], {"scheduler": None}, {"scheduler": ["Linear"]}, "AdamW", "SGD",
    "LinearLR", "ScalePerParamLR", "LinearWD", {"ScalePerParamLR": {"scheduler": 3}}, abs,
]  # fmt: skip
BUILDERS = [endless, deep, bomb]
KEYS: list[Any] = [
    1,
    None,
    (1, 2),
    True,
    "x",
    "",
    2.5,
    "learning_rate",
    "lr",
    "params",
    "scheduler",
]


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths of all nodes below the root."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in items:
        yield (*path, key)
        if isinstance(child, dict | list):
            yield from places(child, (*path, key))


def at(value: Any, path: tuple) -> Any:
    return functools.reduce(lambda node, key: node[key], path, value)


def mutate(config: Any, rng: random.Random) -> tuple:
    """Changes one place of ``config``; returns its path."""
    path = rng.choice(list(itertools.islice(places(config), 2000)))
    parent, key = at(config, path[:-1]), path[-1]
    i = rng.randrange(len(WRONG) + len(BUILDERS))
    wrong = copy.deepcopy(WRONG[i]) if i < len(WRONG) else BUILDERS[i - len(WRONG)]()
    action = rng.choice(["replace"] * 5 + ["delete", "rename", "insert", "repeat", "wrap"])
    if action == "delete":
        del parent[key]
    elif action == "rename" and isinstance(parent, dict):
        new = rng.choice(KEYS)
        parent[new] = parent.pop(key)
        return (*path[:-1], f"{key}>{new}")
    elif action == "insert" and isinstance(parent, dict):
        key = rng.choice(KEYS)
        parent[key] = wrong
    elif action == "repeat" and isinstance(parent, list):
        parent.append(copy.deepcopy(parent[key]))
    elif action == "wrap":
        parent[key] = [parent[key]]
    else:
        parent[key] = wrong
    return (*path[:-1], key)


def mutated(seed: int) -> tuple[Any, list[tuple]]:
    """A recipe with one to three mistakes, and where they are."""
    rng = random.Random(seed)
    config = copy.deepcopy(rng.choice(bases()))
    paths = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        try:
            paths.append(mutate(config, rng))
        except (IndexError, RecursionError):  # nothing left, or an endless list went in
            break
    return config, paths


def use(config: Any) -> None:
    """All that a recipe is for, except a step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recipe = cjax.load_recipe(config)
        for key in ("lr", "weight_decay"):
            if recipe.has(key):
                recipe.schedule(key)(3)
        recipe.optimizer(TREE)
        recipe.transformation(TREE)


def is_ours(error: BaseException) -> bool:
    """Whether a ``raise`` of this package made it, rather than Python or a library."""
    trace = error.__traceback__
    assert trace is not None
    while trace.tb_next is not None:
        trace = trace.tb_next
    file = trace.tb_frame.f_code.co_filename
    line = linecache.getline(file, trace.tb_lineno)
    return file.startswith(PACKAGE) and line.strip().startswith("raise ")


def names_the_place(message: str, paths: list[tuple]) -> bool:
    """Whether the message has a key of a wrong place, or of what encloses it closely."""
    keys = {key.lower() for path in paths for key in path[-4:] if isinstance(key, str)}
    names = {name for key in keys for name in key.split(">")}
    names |= {name.removesuffix("lr") for name in names}  # LinearLR may be called Linear
    is_root = any(len(path) == 1 for path in paths)
    return is_root or not keys or any(name in message.lower() for name in names - {""})


def outcome(config: Any, paths: list[tuple]) -> tuple[str, str]:
    """(kind, message): accepted, refused, or what is wrong with the refusal."""
    try:
        use(config)
    except Exception as error:
        message = str(error)
        shown = f"{type(error).__name__}: {message}"
        if not isinstance(error, ValueError | TypeError) or not is_ours(error):
            return "raw", shown
        if len(message) > LONGEST_MESSAGE:
            return "long", shown
        return ("refused" if names_the_place(message, paths) else "unnamed"), shown
    return "accepted", ""


@pytest.mark.parametrize("seed", range(4))
def test_a_mutated_recipe_is_read_or_refused_in_words(seed):
    counts = collections.Counter()
    for i in range(100):
        config, paths = mutated(1000 * seed + i)
        kind, message = outcome(config, paths)
        assert kind in ("accepted", "refused"), f"{kind} at {paths}: {message[:500]}"
        counts[kind] += 1
    assert counts["refused"] > 20
    assert counts["accepted"] >= 5  # one or two of the mutations are harmless, ten are not


def main(n: int) -> None:
    """Counts the outcomes of ``n`` recipes; one that takes 10 seconds is raw: a TimeoutError."""
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("10 seconds")))
    counts, examples = collections.Counter(), collections.defaultdict(list)
    for seed in range(n):
        config, paths = mutated(10**6 + seed)
        signal.alarm(10)
        kind, message = outcome(config, paths)
        signal.alarm(0)
        counts[kind] += 1
        counts["sorting"] += "not supported between" in message
        if kind not in ("accepted", "refused"):
            examples[kind].append((seed, paths, message[:200]))
    print(dict(counts))
    for kind, found in examples.items():
        different = {message.split("'")[0][:60]: (s, p, message) for s, p, message in found}
        for s, paths, message in list(different.values())[:40]:
            print(kind, s, str(paths)[:160], "|", message)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000)
