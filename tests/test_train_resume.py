"""Training runs that were stopped, and go on as if they had not been."""

import json
import re
import signal

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from cerebras_jax.train import run
from cerebras_jax.train.cli import main

pytestmark = pytest.mark.usefixtures("one_device", "no_pictures")

CONFIG = {
    "optimizer": {
        "optimizer_type": "AdamW",
        "weight_decay": 0.1,
        "max_gradient_norm": 1.0,
        "learning_rate": {
            "scheduler": "CosineDecay",
            "initial_learning_rate": 0.01,
            "end_learning_rate": 0.001,
            "total_iters": 12,
        },
    },
    "train": {
        **{"steps": 12, "batch_size": 2, "context": 8, "layers": 1, "width": 8, "heads": 2},
        **{"eval_every": 4, "save_every": 5},
    },
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 30)
    return str(path)


def invoke(*arguments):
    return CliRunner().invoke(main, ["train", *map(str, arguments)])


def begin(tmp_path, text, name, *arguments, config=CONFIG):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return invoke(path, "--data", text, "--out", tmp_path / name, *arguments), tmp_path / name


def metrics(out):
    """Without what is measured."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_s")} for r in records]


def check_same(out, other):
    assert metrics(out) == metrics(other)
    ours, theirs = (dict(np.load(folder / "weights.npz")) for folder in (out, other))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name])


@pytest.fixture(scope="module")
def whole(tmp_path_factory, text):
    """A run that nothing stopped; tests only look at it."""
    result, out = begin(tmp_path_factory.mktemp("runs"), text, "whole")
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["10", "12"]
    return out


def stop_at(monkeypatch, step, stop):
    """Calls ``stop`` when the batch of this step is drawn."""
    batch = run.Run.batch

    def stopped(self, i):
        if i == step:
            stop()
        return batch(self, i)

    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "batch", stopped)
        yield


class Killed(Exception):
    """Ends a run as kill -9 does: nothing more is saved."""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends(tmp_path, text, whole, monkeypatch, number):
    previous = signal.signal(number, signal.default_int_handler)
    try:
        for _ in stop_at(monkeypatch, 6, lambda: signal.raise_signal(number)):
            result, out = begin(tmp_path, text, "run")
    finally:
        signal.signal(number, previous)
    assert result.exit_code == 0, result.output
    assert "interrupted after 7 steps" in result.output
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["5", "7"]
    result = invoke("--resume", out, "--data", text)
    assert result.exit_code == 0, result.output
    assert "resumed after 7 steps" in result.output
    check_same(out, whole)


def test_a_killed_run_goes_on(tmp_path, text, whole, monkeypatch):
    def kill():
        raise Killed

    for _ in stop_at(monkeypatch, 9, kill):
        result, out = begin(tmp_path, text, "run")
    assert isinstance(result.exception, Killed)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # a line that was cut off
    result = invoke("--resume", out, "--data", text, "--steps", "12")
    assert "resumed after 5 steps" in result.output, result.output
    check_same(out, whole)
    again = invoke("--resume", out, "--data", text)  # there is nothing left to do
    assert "resumed after 12 steps" in again.output
    check_same(out, whole)


def test_a_run_that_had_saved_nothing_begins_anew(tmp_path, text, whole, monkeypatch):
    def kill():
        raise Killed

    for _ in stop_at(monkeypatch, 3, kill):
        _, out = begin(tmp_path, text, "run")
    result = invoke("--resume", out, "--data", text)
    assert "resumed after 0 steps" in result.output, result.output
    check_same(out, whole)


def test_more_steps(tmp_path, text, whole):
    short = {**CONFIG, "train": {**CONFIG["train"], "steps": 6}}
    result, out = begin(tmp_path, text, "run", config=short)
    assert result.exit_code == 0, result.output
    result = invoke("--resume", out, "--data", text, "--steps", 12)
    assert result.exit_code == 0, result.output
    check_same(out, whole)
    assert yaml.safe_load((out / "config.yaml").read_text())["train"]["steps"] == 12


def test_what_resume_refuses(tmp_path, text, whole):
    before = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    other = tmp_path / "other.yaml"
    for change, message in (
        (
            {"optimizer": {**CONFIG["optimizer"], "weight_decay": 0.2}},
            "optimizer.weight_decay is 0.2, it was 0.1",
        ),
        (
            {"train": {**CONFIG["train"], "seed": 1}},
            "train.seed is 1, .*only steps, eval_every, save_every",
        ),
    ):
        other.write_text(yaml.safe_dump({**CONFIG, **change}))
        result = invoke(other, "--resume", whole, "--data", text)
        assert result.exit_code == 2
        assert re.search(message, result.stderr), result.stderr
    for arguments, message in (
        (["--resume", whole, "--out", tmp_path / "x"], "without --out"),
        (["--resume", tmp_path], "there is no run in this folder"),
        (["--resume", whole, "--data", other], "was trained on another text"),
        (["--resume", whole, "--data", text, "--seed", 3], "train.seed is 3, it was 0 when"),
    ):
        result = invoke("--data", text, *arguments)
        assert result.exit_code == 2, result.output
        assert message in result.stderr
    assert {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()} == before


def test_no_checkpoints(tmp_path, text):
    result, out = begin(tmp_path, text, "run", "--save-every", "0", "--steps", "2")
    assert result.exit_code == 0, result.output
    assert not (out / "checkpoints").exists()
    assert (out / "weights.npz").exists()


def test_overwrite_removes_checkpoints_too(tmp_path, text):
    for arguments in (["--save-every", "1"], ["--save-every", "0", "--overwrite"]):
        result, out = begin(tmp_path, text, "run", "--steps", "2", *arguments)
        assert result.exit_code == 0, result.output
    assert not (out / "checkpoints").exists()


def test_inspect(tmp_path, whole):
    for path in (whole, whole / "checkpoints", whole / "checkpoints" / "12"):
        result = CliRunner().invoke(main, ["inspect", str(path), "--verify"])
        assert result.exit_code == 0, result.output
        assert "12: step 12," in result.output
        assert "opt/params/embedding.embedding: float32[256, 8]" in result.output
    result = CliRunner().invoke(main, ["inspect", str(tmp_path)])
    assert result.exit_code == 2
    assert "is no checkpoint" in result.stderr
