"""Runs that are stopped in every way, and go on as if they had not been."""

import contextlib
import os
import resource
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from run_checkpointed import EVERY, make, train

import cerebras_jax as cjax


def steps_of(folder) -> list[int]:
    with cjax.Checkpoints(folder) as checkpoints:
        return checkpoints.steps()


@contextlib.contextmanager
def files_of_at_most(size: int):
    """The disk is full for every larger file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_killed_runs_end_as_the_one_that_was_not(tmp_path):
    """kill -9 while a checkpoint is being written; the next start gets to the end."""
    steps = 40
    expected = train(tmp_path / "whole", steps, lambda text: None)
    script = Path(__file__).with_name("run_checkpointed.py")
    env = {**os.environ, "PYTHONPATH": str(script.parents[1])}
    reached = 0
    for until in (20, None):
        with subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / "killed"), str(steps)],
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        ) as child:
            assert child.stdout is not None
            for line in child.stdout:
                what, *values = line.split()
                if what == "start":
                    assert reached - int(values[0]) < 2 * EVERY  # what the kill has cost
                elif what == "saved":
                    reached = int(values[0])
                    if reached == until:
                        child.kill()
    assert (what, values) == ("done", [*expected.values()])
    assert not [*(tmp_path / "killed").glob("*tmp*")]  # what was half written is gone


def test_which_steps_are_saved_and_kept(tmp_path):
    with cjax.Checkpoints(tmp_path, every=2, keep=2) as checkpoints:
        assert checkpoints.restore(x=0) is None
        saved = [checkpoints.save(step, x=step) for step in range(7)]
        assert saved == [True, False, True, False, True, False, True]
        assert checkpoints.save(7, force=True, x=7)
        assert not checkpoints.save(7, force=True, x=7)
        assert checkpoints.steps() == [6, 7]
        found = checkpoints.restore(x=0)
        assert (found.step, found["x"]) == (7, 7)


def test_an_older_step_and_on_from_there(tmp_path):
    with cjax.Checkpoints(tmp_path, every=1) as checkpoints:
        for step in range(4):
            checkpoints.save(step, x=step)
    with cjax.Checkpoints(tmp_path, every=1) as checkpoints:
        found = checkpoints.restore(step=1, x=0)
        assert (found.step, found["x"]) == (1, 1)
        assert checkpoints.steps() == [0, 1, 2, 3]  # looking changes nothing
        checkpoints.save(2, x=20)
        assert checkpoints.steps() == [0, 1, 2]
        assert checkpoints.restore(x=0)["x"] == 20
        with pytest.raises(cjax.CheckpointError, match=r"has no step 7, but \[0, 1, 2\]"):
            checkpoints.restore(step=7, x=0)


def test_two_runs_are_not_mixed(tmp_path):
    with cjax.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, x=0)
    with (
        cjax.Checkpoints(tmp_path) as checkpoints,
        pytest.raises(ValueError, match=r"has checkpoints of steps \[5\]; restore one of them"),
    ):
        checkpoints.save(1, x=0)
    assert steps_of(tmp_path) == [5]


def test_saved_values_are_those_of_the_moment(tmp_path):
    """Steps that overwrite the buffers right afterwards do not reach the file."""
    objects = make()
    opt = objects["opt"]
    with cjax.Checkpoints(tmp_path) as checkpoints:
        expected = cjax.fingerprint(opt.params)
        checkpoints.save(0, **objects)
        for _ in range(5):
            opt.step({"w": jnp.ones((32, 8)), "b": jnp.ones(8)})
        assert cjax.fingerprint(opt.params) != expected
        checkpoints.restore(**objects)
        assert cjax.fingerprint(opt.params) == expected


def test_a_full_disk_is_told_by_the_next_save_and_at_the_end(tmp_path):
    small, large = np.ones(10), np.random.default_rng(0).standard_normal(200_000)
    checkpoints = cjax.Checkpoints(tmp_path / "next")
    checkpoints.save(1, x=small)
    checkpoints.wait()
    with files_of_at_most(100_000):
        checkpoints.save(2, x=large)
        with pytest.raises(Exception, match="(?i)file too large"):
            checkpoints.save(3, x=small)
    assert checkpoints.steps() == [1]
    assert checkpoints.restore(x=small)["x"].tolist() == small.tolist()
    assert checkpoints.save(2, x=large)  # now there is room
    checkpoints.close()
    assert steps_of(tmp_path / "next") == [1, 2]
    with (
        files_of_at_most(100_000),
        pytest.raises(Exception, match="(?i)file too large"),
        cjax.Checkpoints(tmp_path / "end") as checkpoints,
    ):
        checkpoints.save(1, x=large)
    assert steps_of(tmp_path / "end") == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"every": 0}, "every must be >= 1, got 0"),
        ({"every": 2.5}, "every must be a whole number, got 2.5"),
        ({"keep": 0}, "keep must be >= 1, got 0"),
    ],
)
def test_wrong_arguments(tmp_path, given, message):
    with pytest.raises((ValueError, TypeError), match=message):
        cjax.Checkpoints(tmp_path, **given)
    with (
        cjax.Checkpoints(tmp_path) as checkpoints,
        pytest.raises(ValueError, match="step must be a whole number >= 0, got -1"),
    ):
        checkpoints.save(-1, x=0)
