"""What is said to those who begin, where a call is not quite what is expected."""

import subprocess
import sys

import jax.numpy as jnp
import pytest

import cerebras_jax as cjax
from cerebras_jax import optim

PARAMS = {"a": jnp.ones((2, 2)), "lm_head": jnp.ones((2, 2))}


def test_muon_warns_at_the_line_that_makes_it():
    with pytest.warns(UserWarning, match="Muon is not for embeddings") as caught:
        optim.Muon(PARAMS, lr=0.1)
    assert [w.filename for w in caught] == [__file__]


def test_names_may_come_from_a_generator():
    opt = optim.AdamW(PARAMS, lr=0.1)
    saved = opt.state_dict()
    opt.load_state_dict(saved, param_names=(name for name in PARAMS))
    with pytest.raises(ValueError, match=r"param_names must be the 2 names .*, got \['a'\]"):
        opt.load_state_dict(saved, param_names=(name for name in ["a"]))


def test_names_that_are_not_ours_are_refused():
    opt = optim.AdamW(PARAMS, lr=0.1)
    with pytest.raises(ValueError, match=r"param_names must be \['a', 'lm_head'\], got \['a', 'b'"):
        opt.load_state_dict(opt.state_dict(), param_names=["a", "b"])


def test_a_warning_of_names_is_at_the_line_that_loads():
    saved = optim.AdamW({"x": PARAMS["a"], "y": PARAMS["a"]}, lr=0.1).state_dict()
    opt = optim.AdamW(PARAMS, lr=0.1)
    with pytest.warns(UserWarning, match="param_names are not ours") as caught:
        opt.load_state_dict(saved)
    assert caught[0].filename == __file__


def test_a_file_around_a_state_dict_shows_its_keys():
    opt = optim.AdamW(PARAMS, lr=0.1)
    with pytest.raises(ValueError, match=r"no 'state'; got \['model', 'optimizer'"):
        opt.load_state_dict({"model": {}, "optimizer": opt.state_dict()})


def test_a_mistyped_key_of_a_schedule_is_shown():
    linear = {"scheduler": "Linear", "initial_learning_rate": 0.0, "end_learning_rate": 1.0}
    opt = optim.AdamW(PARAMS, lr=0.1)
    with (
        pytest.warns(UserWarning, match="unused parameters"),
        pytest.raises(ValueError, match=r"needs \['total_iters'\], got .*'total_iter'"),
    ):
        optim.configure_lr_scheduler(opt, {**linear, "total_iter": 3})


def test_what_can_not_be_stored_is_named_as_it_was_given(tmp_path):
    with pytest.raises(TypeError, match="^loss can not be stored"):
        cjax.save(tmp_path / "x", loss=abs)


def test_a_folder_of_checkpoints_says_which_there_are(tmp_path):
    opt = optim.AdamW({"a": jnp.ones(2)}, lr=0.1)
    with cjax.Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(5, force=True, opt=opt)
    with pytest.raises(cjax.CheckpointError, match="give run/5, or use cerebras_jax.Checkpoints"):
        cjax.restore(tmp_path / "run", opt=opt)


_LOADED = """
import sys
from click.testing import CliRunner
from cerebras_jax.train import cli

help = CliRunner().invoke(cli.main, ["--help"]).output
assert "Train a small GPT." in help
assert not {"jax", "numpy", "rich", "yaml"} & set(sys.modules), "help loads it"

import optax
from flax import nnx
packages = {name.partition(".")[0] for name in sys.modules}
from cerebras_jax import optim
added = {name.partition(".")[0] for name in sys.modules} - packages
assert not added - sys.stdlib_module_names, added
for name in ("checkpoint", "recipe", "whole_graph", "train.run"):
    assert f"cerebras_jax.{name}" not in sys.modules, name
"""


def test_only_what_is_used_is_loaded():
    subprocess.run([sys.executable, "-c", _LOADED], check=True)


def test_the_face_of_the_package_shows_all_its_names():
    assert {"optim", "trace", "save", "__version__"} <= set(dir(cjax))
    assert all(hasattr(cjax, name) for name in cjax.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'tracer'"):
        cjax.tracer  # noqa: B018
