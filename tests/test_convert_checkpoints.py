"""Runs between other people's files and our own checkpoints, bit for bit."""

import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner

import cerebras_jax as cjax
from cerebras_jax import optim
from cerebras_jax.formats import cerebras, checkpoint, convert, safetensors_file
from cerebras_jax.formats.run import Run
from cerebras_jax.train.cli import main

PARAMS = {"b": jnp.zeros(3), "w": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3)}
GRADS = {"b": jnp.ones(3), "w": jnp.full((2, 3), 0.25)}


def trained(make=optim.AdamW, steps=3, dtype=jnp.float32, **kwargs):
    params = {k: x.astype(dtype) for k, x in PARAMS.items()}
    groups = optim.param_groups(params, [{"params": "b", "lr": 0.05}])
    opt = make(groups, **{"lr": 0.1, **kwargs})
    for _ in range(steps):
        opt.step({k: g.astype(dtype) for k, g in GRADS.items()})
    return opt


def assert_same(a, b):
    """Runs with the same parameters, states, group values and step."""
    assert (a.step, a.trained, set(a.params)) == (b.step, b.trained, set(b.params))
    for name, x in a.params.items():
        np.testing.assert_array_equal(x, b.params[name])
        assert np.asarray(x).dtype == np.asarray(b.params[name]).dtype
    assert set(a.states) == set(b.states)
    for name, entry in a.states.items():
        assert set(entry) == set(b.states[name])
        for key, x in entry.items():
            np.testing.assert_array_equal(x, b.states[name][key], err_msg=f"{name} {key}")
    for mine, other in zip(a.groups, b.groups, strict=True):
        assert {k: v for k, v in mine.items() if k in other} == other


def test_from_cerebras_and_back(tmp_path):
    opt = trained(weight_decay=0.1)
    run = Run.of(dict(opt.named_parameters()), opt.state_dict(), step=3)
    cerebras.write(tmp_path / "a.mdl", run)
    convert.convert(tmp_path / "a.mdl", tmp_path / "b.cjax", optimizer="AdamW")
    _, left = convert.convert(tmp_path / "b.cjax", tmp_path / "c.mdl")
    assert left == []
    assert_same(cerebras.read(tmp_path / "a.mdl"), cerebras.read(tmp_path / "c.mdl"))
    fresh = optim.AdamW(optim.param_groups(PARAMS, [{"params": "b"}]), lr=0.0)
    with pytest.warns(UserWarning, match="restored"):  # the values of the groups
        assert cjax.restore(tmp_path / "b.cjax", opt=fresh).step == 3
    for o in (opt, fresh):
        o.step(GRADS)
    for name, x in opt.params.items():
        np.testing.assert_array_equal(x, fresh.params[name])


@pytest.mark.parametrize("make", [optim.Adam, optim.AdamW])
def test_from_torch_and_back(tmp_path, make):
    """torch's groups tell its Adam from its AdamW."""
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    theirs = getattr(torch.optim, make.__name__)(model.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(3):
        theirs.zero_grad()
        model(torch.randn(8, 3)).square().mean().backward()
        theirs.step()
    saved = {"model": model.state_dict(), "optimizer": theirs.state_dict(), "global_step": 3}
    torch.save(saved, tmp_path / "a.pt")
    convert.convert(tmp_path / "a.pt", tmp_path / "b.cjax")
    convert.convert(tmp_path / "b.cjax", tmp_path / "c.pt")
    assert list(checkpoint.read(tmp_path / "b.cjax").params) == list(saved["model"])
    back = torch.load(tmp_path / "c.pt")
    for name, x in saved["model"].items():  # the buffers, and their 64-bit counter, too
        assert torch.equal(x, back["model"][name])
        assert x.dtype == back["model"][name].dtype
    for i, entry in saved["optimizer"]["state"].items():
        for key, x in entry.items():
            assert torch.equal(x, back["optimizer"]["state"][i][key]), key
    theirs.load_state_dict(back["optimizer"])
    assert theirs.param_groups[0]["weight_decay"] == 0.1
    params = {n: jnp.zeros(p.shape) for n, p in model.named_parameters()}
    ours = make(params)
    with pytest.warns(UserWarning, match="restored"):
        cjax.restore(tmp_path / "b.cjax", opt=ours)
    np.testing.assert_array_equal(ours.params["0.weight"], saved["model"]["0.weight"].numpy())


@pytest.mark.parametrize(
    ("make", "kwargs"),
    [
        (optim.SGD, {"momentum": 0.9}),
        (optim.Lion, {}),
        (optim.Adafactor, {"lr": 0.1, "relative_step": False}),
        (optim.Adam, {"amsgrad": True}),
        (optim.AdamW, {"dtype": jnp.bfloat16, "state_dtype": {"exp_avg_sq": jnp.float32}}),
    ],
    ids=["SGD", "Lion", "Adafactor", "amsgrad", "bfloat16"],
)
def test_read_and_written_again_it_is_the_same_checkpoint(tmp_path, make, kwargs):
    opt = trained(make, **kwargs)
    cjax.save(tmp_path / "a", opt=opt, step=3)
    checkpoint.write(tmp_path / "b", checkpoint.read(tmp_path / "a"))
    a, b = cjax.inspect(tmp_path / "a"), cjax.inspect(tmp_path / "b")
    assert (a.step, a.fingerprints) == (b.step, b.fingerprints)
    ours, theirs = a.objects["opt"][""], b.objects["opt"][""]
    assert ours == theirs


def test_exactly_rounded_parameters_come_out_in_float32(tmp_path):
    opt = trained(dtype=jnp.bfloat16, rounding="exact")
    cjax.save(tmp_path / "a", opt=opt)
    run = checkpoint.read(tmp_path / "a")
    for name, x in opt.full_precision().items():
        assert run.params[name].dtype == np.float32
        np.testing.assert_array_equal(run.params[name], x)
    assert "low_bits" not in run.states["w"]


def test_weights_alone(tmp_path):
    weights = {"w": np.ones((2, 3), np.float32), "a.b": np.zeros(2, np.float32)}
    safetensors_file.save(tmp_path / "a.safetensors", weights)
    convert.convert(tmp_path / "a.safetensors", tmp_path / "b.cjax")
    like = {"w": jnp.zeros((2, 3)), "a": {"b": jnp.ones(2)}}
    found = cjax.restore(tmp_path / "b.cjax", opt={"params": like})
    np.testing.assert_array_equal(found["opt"]["params"]["a"]["b"], 0)
    convert.convert(tmp_path / "b.cjax", tmp_path / "c.safetensors")
    assert_same(*(safetensors_file.read(tmp_path / f"{n}.safetensors") for n in "ac"))


def test_the_command_takes_the_latest_of_a_runs_folder(tmp_path):
    opt = trained()
    with cjax.Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        checkpoints.save(2, opt=opt)
        checkpoints.save(10, opt=opt, key=jnp.zeros(2))
    (tmp_path / "names").write_text("w\nb\n")
    paths = [str(tmp_path / name) for name in ("run", "weights.mdl", "names")]
    call = CliRunner().invoke(main, ["convert", *paths[:2]])
    assert call.exit_code == 2
    assert "names= must list them in the model's order" in call.output
    assert "--target-names" in call.output
    call = CliRunner().invoke(main, ["convert", *paths[:2], "--target-names", paths[2]])
    assert call.exit_code == 0, call.output
    assert "step 10" in call.output
    assert "Left behind, unknown to the target: key" in call.output
    assert cerebras.read(tmp_path / "weights.mdl").step == 10


def test_what_cannot_be_told_or_held_is_refused(tmp_path):
    opt = trained()
    cjax.save(tmp_path / "two", a=opt, b=opt)
    cjax.save(tmp_path / "pure", opt={"params": PARAMS, "state": optim.sgd(0.1).init(PARAMS)})
    for name in ("two", "pure"):
        with pytest.raises(ValueError, match="optimizers of the class form, expected 1, among"):
            checkpoint.read(tmp_path / name)
    run = Run.of(dict(opt.named_parameters()), opt.state_dict())
    run.rule = None
    with pytest.raises(ValueError, match="--optimizer must say, such as AdamW"):
        checkpoint.write(tmp_path / "x", run)
    with pytest.raises(ValueError, match="there is no optimizer 'Best', but"):
        checkpoint.rule_of("Best")
    run.rule, run.params["w"] = "adamw", np.ones((2, 3), np.float64)
    with pytest.raises(ValueError, match=r"\['w'\] have 64 bits, .* JAX_ENABLE_X64=1"):
        checkpoint.write(tmp_path / "x", run)
    with pytest.raises(FileExistsError, match="is there already"):
        checkpoint.write(tmp_path / "two", run)
    assert not (tmp_path / "x").exists()
