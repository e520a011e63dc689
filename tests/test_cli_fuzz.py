"""Whatever the configuration and the options are: a run, or one line that names the key."""

import copy
import math
import os

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cerebras_jax.train import cli, folder, run, train_cli

pytestmark = pytest.mark.usefixtures("one_device")

BUDGET = settings(
    max_examples=int(os.environ.get("CLI_FUZZ_EXAMPLES", "40")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

LINEAR = {
    "scheduler": "Linear",
    "initial_learning_rate": 0.0,
    "end_learning_rate": 1e-3,
    "total_iters": 5,
}
COSINE = {
    "scheduler": "CosineDecay",
    "initial_learning_rate": 1e-3,
    "end_learning_rate": 1e-4,
    "total_iters": 10,
}
TRAIN = {
    "steps": 2,
    "batch_size": 1,
    "context": 4,
    "layers": 1,
    "width": 4,
    "heads": 1,
    "eval_every": 10,
    "seed": 0,
}
BASES = [
    {
        "optimizer": {
            "optimizer_type": "AdamW",
            "betas": [0.9, 0.95],
            "eps": 1e-8,
            "weight_decay": 0.1,
            "correct_bias": True,
            "max_gradient_norm": 1.0,
            "loss_scaling_factor": "dynamic",
            "learning_rate": [LINEAR, COSINE],
        },
        "train": TRAIN,
    },
    {
        "trainer": {
            "init": {
                "optimizer": {"SGD": {"momentum": 0.9, "weight_decay": 0.0, "nesterov": False}},
                "scheduler": {
                    "SequentialLR": {
                        "schedulers": [
                            {"LinearLR": {k: v for k, v in LINEAR.items() if k != "scheduler"}},
                            {"ConstantLR": {"learning_rate": 1e-3}},
                        ]
                    }
                },
            }
        },
        "train": TRAIN,
    },
]

JUNK = (
    st.none()
    | st.booleans()
    | st.sampled_from([-1, 0, 1, 2, 3, 10**6, 2**31, 2**63, 2**70, 10**400, -(10**30)])
    | st.sampled_from([math.nan, math.inf, -math.inf, -0.5, 0.5, 1e-320, 1e39, 1e308])
    | st.sampled_from(["", "1e-3", "true", "none", "nan", "[x/]", "\x1b[2J", "\ud800", "x" * 9999])
    | st.sampled_from([[], {}, [[]], [{}], {"": None}, {1: 2}, [1, "a"], ["*"], {"scheduler": "X"}])
    | st.text(max_size=4)
)


def places(config, path=()):
    """The path of every value inside."""
    yield path
    items = config.items() if isinstance(config, dict) else enumerate(config)
    for key, value in items:
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))
        else:
            yield (*path, key)


# What messages call a key that lies in another one, or that was put there.
ALSO_CALLED = ["learning_rate", "lr", "scheduler", "optimizer section", "config.yaml", "extra"]


@st.composite
def changes(draw):
    """A configuration, and where it differs from a right one."""
    config = copy.deepcopy(draw(st.sampled_from(BASES)))
    path = draw(st.sampled_from([p for p in places(config) if p]))
    inner = config
    for key in path[:-1]:
        inner = inner[key]
    kind = draw(st.sampled_from(["replace", "replace", "replace", "delete", "add", "rename"]))
    key = path[-1]
    if kind == "delete":
        del inner[key]
    elif kind == "replace" or isinstance(inner, list):
        inner[key] = draw(JUNK)
    elif kind == "add":
        inner[draw(st.sampled_from(["extra", "lr", "scheduler"]))] = draw(JUNK)
    else:
        inner[draw(st.sampled_from(["other", ""]))] = inner.pop(key)
    return config, path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox\n" * 30)
    return path


@pytest.fixture(scope="module")
def untrained():
    """The command up to its first step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_cli, "train", lambda *arguments: run._result([], False, None, {}))
        yield


def check_answer(result, out, names):
    """A run, or one short line that holds one of the names, and no folder."""
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    if result.exit_code == 0:
        folder.discard(out)
        return
    assert result.exit_code == 2
    *_, line = result.stderr.splitlines()
    assert line.startswith("Error: ")
    assert len(line) < 500
    assert line.isprintable()
    assert any(name in line for name in names), (line, names)
    assert not out.exists()


@BUDGET
@given(changes())
def test_configurations(tmp_path_factory, text, untrained, change):
    config, path = change
    base = tmp_path_factory.getbasetemp()
    (base / "config.yaml").write_text(yaml.safe_dump(config))
    out = base / "run"
    command = ["train", str(base / "config.yaml"), "--data", str(text), "--out", str(out)]
    keys = [key for key in path if isinstance(key, str)]
    result = CliRunner().invoke(cli.main, command)
    check_answer(result, out, [*keys[-3:], *ALSO_CALLED])


@BUDGET
@given(
    st.dictionaries(
        st.sampled_from(["steps", "batch-size", "context", "seed"]),
        st.sampled_from(
            ["-1", "0", "1", "2", "", "x", "1e3", "99999999999999999999", "\x1b", "nan"]
        ),
        min_size=1,
    )
)
def test_options(tmp_path_factory, text, untrained, options):
    base = tmp_path_factory.getbasetemp()
    (base / "config.yaml").write_text(yaml.safe_dump(BASES[0]))
    out = base / "run"
    command = ["train", str(base / "config.yaml"), "--data", str(text), "--out", str(out)]
    command += [part for name, value in options.items() for part in (f"--{name}", value)]
    result = CliRunner().invoke(cli.main, command)
    check_answer(result, out, [f"--{name}" for name in options])
    is_right = [v in ("1", "2") or (name, v) == ("seed", "0") for name, v in options.items()]
    assert (result.exit_code == 0) == all(is_right)
