"""The training command, on a small text with a small model."""

import json

import pytest
import yaml
from click.testing import CliRunner

from cerebras_jax.train import data
from cerebras_jax.train.cli import main

CONFIG = {
    "optimizer": {
        "optimizer_type": "AdamW",
        "weight_decay": 0.1,
        "max_gradient_norm": 1.0,
        "loss_scaling_factor": "dynamic",
        "learning_rate": [
            {
                "scheduler": "Linear",
                "initial_learning_rate": 0.0,
                "end_learning_rate": 0.01,
                "total_iters": 5,
            },
            {"scheduler": "Constant", "learning_rate": 0.01},
        ],
    },
    "train": {
        "steps": 20,
        "batch_size": 4,
        "context": 16,
        "layers": 1,
        "width": 16,
        "heads": 2,
        "eval_every": 10,
    },
}


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 30)
    (folder / "binary.bin").write_bytes(b"\0" * 10000)
    return folder


def invoke(tmp_path, config, *arguments):
    path = tmp_path / "config.yaml"
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    out = tmp_path / "run"
    return CliRunner().invoke(main, ["train", str(path), "--out", str(out), *arguments]), out


def test_a_run(tmp_path, text):
    result, out = invoke(tmp_path, CONFIG, "--data", str(text))
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [r["loss"] for r in records if "loss" in r]
    assert len(losses) == 20
    assert losses[-1] < losses[0]
    assert [r["lr"] for r in records if "loss" in r][:6] == pytest.approx(
        [0.0, 0.002, 0.004, 0.006, 0.008, 0.01]
    )
    held_out = [r["held_out_loss"] for r in records if "held_out_loss" in r]
    assert len(held_out) == 3
    assert held_out[-1] < held_out[0]
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "sample.txt").read_text().startswith("def ")
    assert "20 steps in" in result.output
    # the resolved config makes the same run
    again, _ = invoke(tmp_path, (out / "config.yaml").read_text(), "--data", str(text))
    assert again.exit_code == 0, again.output
    repeated = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["loss"] for r in repeated if "loss" in r] == losses


def test_options_override_the_config(tmp_path, text):
    config = {**CONFIG, "runconfig": {"max_steps": 40}}
    result, out = invoke(tmp_path, config, "--data", str(text / "0.txt"), "--steps", "3")
    assert result.exit_code == 0, result.output
    assert "Not used: runconfig; see --steps" in result.output
    assert yaml.safe_load((out / "config.yaml").read_text())["train"]["steps"] == 3
    assert "3 steps of 4 x 16 bytes" in result.output


def changed(section, **values):
    return {**CONFIG, section: {**CONFIG[section], **values}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed("optimizer", weight_decay=-1), "weight_decay must be >= 0, got -1"),
        (changed("optimizer", max_gradient_norm=0), "max_gradient_norm must be > 0, got 0"),
        (changed("optimizer", optimizer_type="Best"), "there is no optimizer 'Best'"),
        (changed("optimizer", learning_rate={"scheduler": "X"}), "there is no scheduler 'X'"),
        (changed("train", steps=0), "train.steps must be a whole number >= 1, got 0"),
        (changed("train", speed=1), r"train has unknown keys \['speed'\]"),
        (changed("train", width=15), "train.width must be a multiple of train.heads"),
        ({"train": {}}, "must have the key 'optimizer_type'"),
        ("- a\n- b\n", "must be a YAML mapping, got list"),
        ("a: [", "is not YAML"),
    ],
)
def test_bad_configs(tmp_path, text, config, message):
    result, out = invoke(tmp_path, config, "--data", str(text))
    assert result.exit_code == 1
    assert result.exception is None or isinstance(result.exception, SystemExit)
    import re

    assert re.search(message, " ".join(result.output.split()))
    assert not out.exists()


def test_too_little_text(tmp_path):
    (tmp_path / "short.txt").write_text("short")
    result, _ = invoke(tmp_path, CONFIG, "--data", str(tmp_path / "short.txt"))
    assert result.exit_code == 1
    assert "the text must have at least" in result.output


def test_an_interrupt_keeps_what_was_reached(tmp_path, text, monkeypatch):
    batches = []
    sample = data.sample_batch

    def interrupted(*args):
        batches.append(1)
        if len(batches) == 8 + 6:  # the first evaluation takes 8
            raise KeyboardInterrupt
        return sample(*args)

    monkeypatch.setattr(data, "sample_batch", interrupted)
    result, out = invoke(tmp_path, CONFIG, "--data", str(text))
    assert result.exit_code == 0, result.output
    assert "interrupted after 5 steps" in result.output
    assert (out / "training.png").exists()
    assert (out / "sample.txt").exists()


def test_the_standard_library_is_there():
    train, held_out, source = data.load_text()
    assert len(train) > 5 * len(held_out) > 100_000
    assert "standard library" in source
