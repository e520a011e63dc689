"""The training command on eight devices, and what it will take of many."""

import json
import struct

import jax
import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from jax.sharding import PartitionSpec as P

import cerebras_jax as cjax
from cerebras_jax.train import data, devices, run
from cerebras_jax.train.cli import main
from cerebras_jax.train.settings import TrainSettings

OPTIMIZER = {
    "optimizer_type": "AdamW",
    "weight_decay": 0.1,
    "max_gradient_norm": 1.0,
    "loss_scaling_factor": "dynamic",
    "learning_rate": {
        "scheduler": "CosineDecay",
        "initial_learning_rate": 0.01,
        "end_learning_rate": 0.001,
        "total_iters": 8,
    },
}
TRAIN = {
    **{"steps": 2, "batch_size": 16, "context": 8, "layers": 1, "width": 8, "heads": 2},
    **{"eval_every": 100, "save_every": 2},
}
KERNEL = "blocks.0.dense_in.kernel"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 30)
    return path


def invoke(tmp_path, *arguments, train=TRAIN):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"optimizer": OPTIMIZER, "train": train}))
    command, *rest = map(str, arguments)
    return CliRunner().invoke(main, [command, str(path), *rest])


def made(text, **train):
    recipe = cjax.load_recipe({"optimizer": OPTIMIZER})
    return run.Run(recipe, TrainSettings(**{**TRAIN, **train}), data.load_text(text))


def losses(training):
    return [float(training.step(training.batch(i))[0]) for i in range(4)]


def fewer(monkeypatch, count):
    monkeypatch.setattr(devices, "at_hand", lambda: jax.devices()[:count])


@pytest.fixture(scope="module")
def alone(text):
    """The losses of a run on one device."""
    with pytest.MonkeyPatch.context() as patch:
        fewer(patch, 1)
        training = made(text)
        assert training.mesh is None
        return losses(training)


@pytest.mark.parametrize(
    ("settings", "parameter", "state"),
    [
        ({}, P(), P("data")),
        ({"mesh": {"data": 4, "model": 2}}, P(None, "model"), P("data", "model")),
        ({"grad_accum_steps": 2, "zero": False}, P(), P()),
    ],
)
def test_eight_devices_train_as_one(text, alone, settings, parameter, state):
    training = made(text, **settings)
    np.testing.assert_allclose(losses(training), alone, rtol=2e-5)
    assert training.model.blocks[0].dense_in.kernel[...].sharding.spec == parameter
    assert training.opt.state[KERNEL]["exp_avg"].sharding.spec == state


def test_a_run_goes_on_with_another_number_of_devices(tmp_path, text, alone, monkeypatch):
    begun = ["train", "--data", text, "--out", tmp_path / "run", "--mesh", "data=4,model=2"]
    result = invoke(tmp_path, *begun)
    assert result.exit_code == 0, result.output
    assert "; 8 devices, data=4,model=2, states split over data\n" in result.output
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["train"]["mesh"] == {"data": 4, "model": 2}
    go_on = ["train", "--data", str(text), "--resume", str(tmp_path / "run"), "--steps", "4"]
    fewer(monkeypatch, 1)
    result = CliRunner().invoke(main, go_on)
    assert result.exit_code == 2
    assert "as many devices as there are, got data=4,model=2 for 1; --mesh gives" in result.stderr
    result = CliRunner().invoke(main, [*go_on, "--mesh", "data=1"])
    assert "resumed after 2 steps" in result.output, result.output
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    seen = [r["loss"] for r in map(json.loads, lines) if "loss" in r]
    np.testing.assert_allclose(seen, alone, rtol=2e-5)
    assert (tmp_path / "run" / "sample.txt").read_text().startswith("def ")


@pytest.mark.parametrize(
    ("arguments", "train", "message"),
    [
        (["--mesh", "data=4"], {}, "as many devices as there are, got data=4 for 8"),
        (["--mesh", "data"], {}, "--mesh must be like data=4,model=2, each axis once, got 'data'"),
        (["--mesh", "data=8,data=1"], {}, "each axis once, got 'data=8,data=1'"),
        (["--mesh", "data=8,x=1"], {}, "train.mesh must map axes of ['data', 'model'] to"),
        (["--mesh", "data=0"], {}, "train.mesh.data must be a whole number from 1 to"),
        ([], {"mesh": [8]}, "train.mesh must map axes of ['data', 'model'] to numbers, got [8]"),
        ([], {"zero": 1}, "train.zero must be true or false, got 1"),
        ([], {"batch_size": 12}, "axis data of train.mesh times train.grad_accum_steps, got 12"),
        ([], {"grad_accum_steps": 4}, "got 16 for 8 x 4"),
        (["--mesh", "data=2,model=4"], {}, "must divide train.heads, got 4 for 2"),
        (["--mesh", "model=8"], {"heads": 8}, None),
        (["--process-id", "0"], {}, "--process-id must stand with --distributed"),
        (["--distributed", "--processes", "2"], {}, "must stand with --coordinator, --process-id"),
        (
            ["--distributed", "--coordinator", "x:1", "--process-id", "2", "--processes", "2"],
            {},
            "--process-id must be below --processes, got 2 for 2",
        ),
        *(
            (
                ["--distributed", "--coordinator", at, "--process-id", "0", "--processes", "1"],
                {},
                "--coordinator must be HOST:PORT, with a port from 1 to 65535, got",
            )
            for at in ("x", ":1", "x:0", "x:65536", "x:\u0663", "http://x:80", "a b:1")
        ),
    ],
)
def test_meshes_that_do_not_suit(tmp_path, text, monkeypatch, arguments, train, message):
    monkeypatch.setattr(run.Run, "step", lambda *args: 1 / 0)
    out = tmp_path / "run"
    result = invoke(
        tmp_path, "train", "--data", text, "--out", out, *arguments, train={**TRAIN, **train}
    )
    assert not out.exists()
    if message is None:
        assert result.exit_code == 1  # the step's own error: it would have trained
        return
    assert result.exit_code == 2, result.output
    assert message in result.stderr.splitlines()[-1]


# --- what it will take ----------------------------------------------------------------------------


def rows(result):
    """The table: bytes as they are printed, by name."""
    assert result.exit_code == 0, result.output
    return dict(line.rsplit("  ", 1) for line in result.output.splitlines()[2:])


def units(table):
    sizes = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    return {
        k.strip(): float(v.split()[0]) * sizes[v.split()[1]] for k, v in table.items() if v.strip()
    }


@pytest.mark.parametrize("arguments", [[], ["--no-zero"], ["--mesh", "data=4,model=2"]])
def test_the_plan_is_what_a_run_takes(tmp_path, text, arguments):
    planned = units(rows(invoke(tmp_path, "plan", "--devices", 8, *arguments)))
    mesh = {"data": 4, "model": 2} if "--mesh" in arguments else None
    training = made(text, mesh=mesh, zero=False if arguments == ["--no-zero"] else None)

    def here(name):
        states = training.opt.state
        arrays = [
            p if name == "parameters" else states[k][name]
            for k, p in training.opt.named_parameters()
        ]
        shards = (s for x in arrays for s in x.addressable_shards)
        return sum(s.data.nbytes for s in shards if s.device == jax.devices()[0])

    for name in ("parameters", "exp_avg", "exp_avg_sq"):
        assert planned[name] == pytest.approx(here(name), rel=0.04)  # as it is rounded in print
    assert planned["gradients"] == planned["parameters"]


def test_the_plan_of_seventy_billion_parameters(tmp_path):
    shapes = {"embed": [128256, 8192], "head": [128256, 8192], "norm": [8192]}
    for i in range(80):
        shapes[f"{i}.attention"] = {"shape": [4, 8192, 5120], "dtype": "bfloat16"}
        shapes[f"{i}.mlp"] = {"shape": [3, 8192, 28672], "dtype": "bfloat16"}
    (tmp_path / "shapes.json").write_text(json.dumps(shapes))
    result = invoke(
        *(tmp_path, "plan", "--devices", 512, "--mesh", "data=64,model=8"),
        *("--parameters", tmp_path / "shapes.json"),
    )
    half, single = 80 * (4 * 8192 * 5120 + 3 * 8192 * 28672), 2 * 128256 * 8192
    table = units(rows(result))
    assert table["parameters"] == pytest.approx((2 * half + 4 * single) / 8, rel=0.01)
    assert table["exp_avg"] == pytest.approx((2 * half + 4 * single) / 512, rel=0.01)
    assert f"{half + single + 8192:,} parameters in 163 arrays" in result.output


def test_the_plan_reads_the_header_of_a_safetensors_file(tmp_path):
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "BF16", "shape": [1024, 4], "data_offsets": [0, 8192]},
        "b": {"dtype": "F32", "shape": [1024], "data_offsets": [8192, 12288]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)  # no data at all
    upper = tmp_path / "upper" / "X.SAFETENSORS"
    upper.parent.mkdir()
    upper.write_bytes((tmp_path / "x.safetensors").read_bytes())
    for path in (tmp_path / "x.safetensors", tmp_path, upper):
        result = invoke(tmp_path, "plan", "--devices", 4, "--parameters", path)
        assert units(rows(result))["parameters"] == 12 * 1024
    (tmp_path / "y.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes())
    result = invoke(tmp_path, "plan", "--devices", 4, "--parameters", tmp_path)
    assert "y.safetensors: 'a' is in another file of" in result.stderr


def test_the_plan_with_temporaries(tmp_path):
    result = invoke(tmp_path, "plan", "--devices", 8, "--compile")
    assert units(rows(result))["temporaries"] > 0
    result = invoke(tmp_path, "plan", "--devices", 4, "--compile")
    assert "--compile needs as many devices as --devices says, got 8 for 4" in result.stderr


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", "[1]", "must map names to shapes, got [1]"),
        ("x.json", "{", "is no JSON"),
        ("x.json", "{}", "there are no parameters in"),
        ("x.json", '{"w": [2, -1]}', "'w' must have a shape such as [2, 3], got [2, -1]"),
        ("x.json", '{"w": {"dtype": "float32"}}', "'w' must have a shape"),
        (
            "x.json",
            '{"w": {"shape": [2], "dtype": "int8"}}',
            "a dtype such as bfloat16, got 'int8'",
        ),
        ("x.json", '{"w": {"shape": [2], "dtype": null}}', "dtype such as bfloat16, got None"),
        ("x.json", '{"w": {"shape": [2], "dtype": "float8_e4m3fn"}}', "dtype such as bfloat16"),
        ("x.json", '{"w": {"shape": [2], "dtype": "float64"}}', "dtype that JAX has here"),
        ("x.json", '{"w": {"shape": [2], "dtyp": "bfloat16"}}', "'w' has the unknown key 'dtyp'"),
        ("x.json", '{"w": [2], "w": [3]}', "'w' is there twice"),
        ("x.safetensors", "no", "has no header of a .safetensors file"),
        ("x.safetensors", "\3\0\0\0\0\0\0\0{}", "has no header of a .safetensors file"),
    ],
)
def test_parameters_that_are_none(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    result = invoke(tmp_path, "plan", "--devices", 4, "--parameters", tmp_path / name)
    assert result.exit_code == 2
    assert message in result.stderr.splitlines()[-1]
