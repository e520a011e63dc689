"""The training command, on a small text with a small model."""

import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from cerebras_jax.train import data, folder, gpt, report, run
from cerebras_jax.train.cli import main
from cerebras_jax.train.losses import LateLosses

pytestmark = pytest.mark.usefixtures("one_device")

CONFIG = {
    "optimizer": {
        "optimizer_type": "AdamW",
        "weight_decay": 0.1,
        "max_gradient_norm": 1.0,
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


def invoke(tmp_path, config, *arguments, out="run", charset="utf-8"):
    path = tmp_path / "config.yaml"
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    out = tmp_path / out
    command = ["train", str(path), "--out", str(out), *arguments]
    return CliRunner(charset=charset).invoke(main, command), out


def short(**train):
    """A run of three steps."""
    return {**CONFIG, "train": {**CONFIG["train"], "steps": 3, **train}}


def read_metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run(tmp_path, text):
    result, out = invoke(tmp_path, CONFIG, "--data", str(text))
    assert result.exit_code == 0, result.output
    records = read_metrics(out)
    losses = [r["loss"] for r in records if "loss" in r]
    assert len(losses) == 20
    assert losses[-1] < losses[0]
    assert [r["lr"] for r in records if "loss" in r][:6] == pytest.approx(
        [0.0, 0.002, 0.004, 0.006, 0.008, 0.01]
    )
    known = "step loss lr weight_decay gradient_norm tokens_per_s seconds"
    assert list(records[1]) == known.split()
    assert {r["weight_decay"] for r in records if "loss" in r} == {0.1}
    assert all(r["tokens_per_s"] > 0 for r in records if "loss" in r)
    held_out = [r["held_out_loss"] for r in records if "held_out_loss" in r]
    assert len(held_out) == 3
    assert held_out[-1] < held_out[0]
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "sample.txt").read_text().startswith("def ")
    assert "20 steps in" in result.output
    weights = dict(np.load(out / "weights.npz"))
    assert weights["embedding.embedding"].shape == (256, 16)
    assert len(weights) == 16
    # the resolved config makes the same run
    again, twin = invoke(
        tmp_path, (out / "config.yaml").read_text(), "--data", str(text), out="twin"
    )
    assert again.exit_code == 0, again.output
    assert [r["loss"] for r in read_metrics(twin) if "loss" in r] == losses
    for name, value in np.load(twin / "weights.npz").items():
        np.testing.assert_array_equal(value, weights[name])


@pytest.mark.usefixtures("no_pictures")
def test_a_sparse_run(tmp_path, text):
    section = {"sparsity": 0.75, "param_filter": "*kernel"}
    result, out = invoke(tmp_path, {**short(), "sparsity": section}, "--data", str(text))
    assert result.exit_code == 0, result.output
    assert [r["density"] for r in read_metrics(out) if "held_out_loss" in r] == [0.25, 0.25]
    assert "density 0.2500" in result.output
    weights = dict(np.load(out / "weights.npz"))
    kernels = [x for name, x in weights.items() if name.endswith("kernel")]
    assert len(kernels) == 4
    for kernel in kernels:
        assert (kernel == 0).sum() == 3 * kernel.size // 4


@pytest.mark.usefixtures("no_pictures")
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
        (changed("train", steps=0), "train.steps must be a whole number from 1 to .*, got 0"),
        (changed("train", speed=1), r"train has unknown keys \['speed'\]"),
        ({**CONFIG, "train": [1]}, r"train must be a mapping, got \[1\]"),
        (changed("train", steps="x" * 10**5), "train.steps must be .*, got 'xxx.*xxx'$"),
        (changed("optimizer", weight_decay="x" * 10**5), ".*weight_decay"),
        (
            changed("optimizer", params=[{"params": "nothing.*"}]),
            ".*params",
        ),
        (changed("train", width=15), "train.width must be a multiple of train.heads"),
        ({"train": {}}, "must have the key 'optimizer_type'"),
        ("- a\n- b\n", "must be a YAML mapping, got list"),
        ("a: [", "is not YAML"),
    ],
)
def test_bad_configs(tmp_path, text, config, message):
    result, out = invoke(tmp_path, config, "--data", str(text))
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    line = result.stderr.splitlines()[-1]  # warnings may stand before it
    assert re.match(f"Error: .*{message}", line)
    assert line.isprintable()
    assert len(line) < 500
    assert not out.exists()


def test_too_little_text(tmp_path):
    (tmp_path / "short.txt").write_text("short")
    result, out = invoke(tmp_path, CONFIG, "--data", str(tmp_path / "short.txt"))
    assert result.exit_code == 2
    assert "the text must have at least 170 bytes for train.context 16, got 5" in result.output
    assert not out.exists()


# --- folders --------------------------------------------------------------------------------------


def test_runs_of_one_second_get_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "20260101-120000")
    made = []

    def make():
        made.append(folder.make_folder(None, False, {}))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 8
    assert sorted(p.name for p in (tmp_path / "runs").iterdir())[:2] == [
        "20260101-120000",
        "20260101-120000-2",
    ]
    assert all((path / "config.yaml").exists() for path in made)


def test_files_of_other_people_stay(tmp_path, text, monkeypatch):
    """Also the configuration itself, when the run folder is where it lies."""
    monkeypatch.chdir(tmp_path)
    result, _ = invoke(tmp_path, short(), "--data", str(text), out=".")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert result.exit_code == 2
    assert "holds files already" in result.output
    assert "--overwrite" in result.output
    result, _ = invoke(tmp_path, short(), "--data", str(text), "--overwrite", out=".")
    assert result.exit_code == 2
    assert "holds ['config.yaml'] of no earlier run" in result.output
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.usefixtures("no_pictures")
def test_overwrite_replaces_a_run(tmp_path, text):
    result, out = invoke(tmp_path, short(), "--data", str(text))
    assert result.exit_code == 0, result.output
    (out / "notes.txt").write_text("mine")
    first = (out / "weights.npz").read_bytes()
    again, _ = invoke(tmp_path, short(), "--data", str(text))
    assert again.exit_code == 2
    assert (out / "weights.npz").read_bytes() == first
    again, _ = invoke(tmp_path, short(seed=1), "--data", str(text), "--overwrite")
    assert again.exit_code == 0, again.output
    assert (out / "weights.npz").read_bytes() != first
    assert len(read_metrics(out)) == 5
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.usefixtures("no_pictures")
def test_an_empty_folder_is_taken(tmp_path, text):
    (tmp_path / "run").mkdir()
    result, out = invoke(tmp_path, short(), "--data", str(text))
    assert result.exit_code == 0, result.output
    with pytest.raises(FileExistsError, match="config.yaml"):
        (out / "config.yaml").open("x")


# --- what is written and shown --------------------------------------------------------------------


def test_names_and_texts_of_any_characters(tmp_path, monkeypatch):
    name = b"$\\alpha$ {$ [red] [/x] :smile: \xff \x1b[31m \xe4\xb8\xad"
    path = os.path.join(os.fsencode(tmp_path), name)
    try:
        os.makedirs(path)
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    with open(os.path.join(path, b"\xff.txt"), "wb") as file:
        file.write(bytes(range(1, 256)) * 20)
    result, out = invoke(tmp_path, short(), "--data", os.fsdecode(path), out="[red] $ [/x]")
    assert result.exit_code == 0, result.output
    shown = result.output.splitlines()
    assert "$\\alpha$ {$ [red] [/x] :smile: \\udcff \\x1b[31m \u4e2d: 1 files" in "\n".join(shown)
    assert shown[-1].endswith("[red] $ [/x]/training.png")
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "sample.txt").exists()


@pytest.mark.parametrize("charset", ["ascii", "utf-8"])
def test_the_sample_is_shown_in_any_terminal(tmp_path, text, monkeypatch, charset):
    sample = "def \x1b]0;title\x07\r\x9b31m caf\u00e9\nend \u202e"
    monkeypatch.setattr(gpt, "generate", lambda *args: sample.encode())
    result, out = invoke(tmp_path, short(), "--data", str(text), charset=charset)
    assert result.exit_code == 0, result.output
    shown = "def \\x1b]0;title\\x07\\r\\x9b31m caf\u00e9\nend \\u202e\n"
    assert shown.encode(charset, "replace").decode(charset) in result.output
    assert (out / "sample.txt").read_bytes() == sample.encode()


@pytest.mark.usefixtures("no_pictures")
def test_progress_is_shown_in_an_ascii_terminal(tmp_path, text, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, for rich
    result, _ = invoke(tmp_path, short(), "--data", str(text), charset="ascii")
    assert result.exit_code == 0, result.output


# --- how runs end ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("broken", "missing"),
    [
        ((report, "draw"), "training.png"),
        ((gpt, "generate"), "sample.txt"),
        ((np, "savez"), "weights.npz"),
        ((run.Run, "held_out"), None),
    ],
)
def test_every_result_is_written_whatever_becomes_of_the_others(
    tmp_path, text, monkeypatch, broken, missing
):
    def fail(*args, **kwargs):
        if missing or args[0].opt.state["norm.bias"]["exp_avg"].any():  # not at the first step
            raise RuntimeError("no [/x] luck")
        return {}

    monkeypatch.setattr(*broken, fail)
    result, out = invoke(tmp_path, short(), "--data", str(text))
    assert result.exit_code == 1, result.output
    told = missing or "metrics.jsonl"
    assert f"Error: {told} was not complete: no [/x] luck" in result.stderr
    assert "3 steps in" in result.output
    names = {"config.yaml", "metrics.jsonl", "training.png", "sample.txt", "weights.npz"}
    names |= {"checkpoints"}
    assert {p.name for p in out.iterdir()} == names - {missing}
    assert sum("loss" in r for r in read_metrics(out)) == 3


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, text, monkeypatch, value):
    step = run.Run.step

    def diverge(self, tokens):
        loss, seen = step(self, tokens)
        steps.append(loss)
        return (float(value) if len(steps) > 7 else loss), seen

    steps = []
    monkeypatch.setattr(run.Run, "step", diverge)
    result, out = invoke(tmp_path, CONFIG, "--data", str(text))
    assert result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    assert last == f"Error: the loss is {value} at step 7, with the learning rate 0.01"
    assert len(steps) <= 7 + 5
    losses = [r["loss"] for r in read_metrics(out) if "loss" in r]
    assert len(losses) == 7
    assert np.isfinite(losses).all()
    assert {p.name for p in out.iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "training.png",
        "weights.npz",
        "checkpoints",
    }


@pytest.mark.parametrize(
    ("error", "exit_code"), [(ValueError("no step"), 1), (KeyError("a mistake of ours"), None)]
)
def test_a_run_without_a_step_leaves_nothing(tmp_path, text, monkeypatch, error, exit_code):
    def fail(*args):
        raise error

    monkeypatch.setattr(run, "train_step", fail)
    result, out = invoke(tmp_path, short(), "--data", str(text))
    assert not out.exists()
    if exit_code:
        assert result.exit_code == exit_code
        assert result.stderr.splitlines()[-1] == "Error: no step"
    else:
        assert result.exception is error


def test_an_error_on_the_way_keeps_what_was_reached(tmp_path, text, monkeypatch):
    batch = run.Run.batch

    def fail(self, step):
        if step == 5:
            raise OSError("the disk is gone")
        return batch(self, step)

    monkeypatch.setattr(run.Run, "batch", fail)
    result, out = invoke(tmp_path, CONFIG, "--data", str(text))
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "Error: the disk is gone"
    assert (out / "weights.npz").exists()
    assert (out / "training.png").exists()
    assert "5 steps in" in result.output


@pytest.fixture
def interrupts_raise():
    """Whatever the shell made of them: it ignores them in a background job."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.signal(signal.SIGINT, previous) is signal.default_int_handler


@pytest.mark.parametrize("presses", [1, 2])
def test_an_interrupt_keeps_what_was_reached(
    tmp_path, text, monkeypatch, interrupts_raise, presses
):
    batch, generate = run.Run.batch, gpt.generate

    def interrupted(self, step):
        if step == 5:
            for _ in range(presses):
                signal.raise_signal(signal.SIGINT)
        return batch(self, step)

    def interrupted_again(*args):
        signal.raise_signal(signal.SIGINT)
        return generate(*args)

    monkeypatch.setattr(run.Run, "batch", interrupted)
    monkeypatch.setattr(gpt, "generate", interrupted_again)
    result, out = invoke(tmp_path, CONFIG, "--data", str(text))
    assert result.exit_code == 0, result.output
    steps = 6 if presses == 1 else 5  # the first lets the step at hand end
    assert f"interrupted after {steps} steps" in result.output
    assert sum("loss" in r for r in read_metrics(out)) == steps
    assert (out / "training.png").exists()
    assert (out / "sample.txt").exists()
    assert (out / "weights.npz").exists()


def test_an_ignored_interrupt_stays_ignored():
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        interrupts = run.Interrupts()
        with interrupts.handled():
            signal.raise_signal(signal.SIGINT)
        assert interrupts.count == 0
    finally:
        signal.signal(signal.SIGINT, previous)


# --- losses are read late -------------------------------------------------------------------------


class OnItsWay:
    """A loss that is there once the device has been given enough to do."""

    def __init__(self, ready, value=0.0):
        self.ready, self.value = ready, value

    def __float__(self):
        assert self.ready.wait(timeout=60), "the loop waits for the device at every step"
        return self.value


def test_steps_are_dispatched_while_others_run(monkeypatch):
    """No loss is there before three further steps were dispatched."""
    reported, steps = [], 12
    ready = [threading.Event() for _ in range(steps)]
    with LateLosses(reported.append) as losses:
        for step in range(steps):
            if step >= 3:
                ready[step - 3].set()
            losses.put(step, time.perf_counter(), OnItsWay(ready[step], step / 2))
            assert step - 4 < len(reported) <= step
        for event in ready:
            event.set()
        losses.flush()
    assert [(loss.step, loss.value) for loss in reported] == [(i, i / 2) for i in range(steps)]
    assert all(loss.seconds >= 0 for loss in reported)


def test_an_error_of_the_device_is_raised_once():
    class Lost:
        def __float__(self):
            raise RuntimeError("the device is lost")

    reported, ready = [], threading.Event()
    with LateLosses(reported.append) as losses:
        losses.put(0, 0.0, OnItsWay(ready))
        losses.put(1, 0.0, Lost())
        losses.put(2, 0.0, Lost())
        ready.set()
        with pytest.raises(RuntimeError, match="is lost"):
            losses.flush()
    assert [loss.step for loss in reported] == [0]


# --- texts ----------------------------------------------------------------------------------------


def test_the_standard_library_is_there():
    train, held_out, source = data.load_text()
    assert len(train) > 5 * len(held_out) > 100_000
    assert "standard library" in source


def test_no_more_is_read_than_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_LIMIT", 1000)
    (tmp_path / "long.txt").write_text("x" * 5000)
    assert sum(map(len, data.load_text(tmp_path / "long.txt")[:2])) == 1000


@pytest.mark.usefixtures("no_pictures")
def test_a_run_that_skips_scales_and_accumulates(tmp_path, text, monkeypatch):
    """One batch is not finite: the run goes on, the schedule and the scale tell of it."""
    step, steps = run.Run.step, []

    def poisoned(self, tokens):
        steps.append(tokens)
        if len(steps) == 4:
            self.opt.set_parameter("embedding.embedding", embedding(self) * np.inf)
            result = step(self, tokens)
            self.opt.set_parameter("embedding.embedding", kept[0])
            return result
        kept[:] = [embedding(self)]
        return step(self, tokens)

    def embedding(self):
        return np.array(dict(self.opt.named_parameters())["embedding.embedding"])

    kept = []
    monkeypatch.setattr(run.Run, "step", poisoned)
    scaled = {"loss_scaling_factor": "dynamic", "grad_accum_steps": 2}
    config = {**CONFIG, "optimizer": {**CONFIG["optimizer"], **scaled}}
    result, out = invoke(tmp_path, config, "--data", str(text))
    assert result.exit_code == 0, result.output
    records = [r for r in read_metrics(out) if "loss" in r]
    assert [r["step"] for r in records if r["loss"] is None] == [3]
    assert [r.get("skipped_steps", 0) for r in records[:6]] == [0, 0, 0, 1, 1, 1]
    assert records[3]["lr"] == records[4]["lr"]  # the schedule waits
    assert records[0]["loss_scale"] == 2.0**15
    assert records[4]["loss_scale"] == 2.0**14


@pytest.mark.usefixtures("no_pictures")
def test_a_batch_in_parts_is_the_same_step(tmp_path, text):
    losses = []
    for i, parts in enumerate(("1", "2")):
        (tmp_path / str(i)).mkdir()
        options = ("--data", str(text), "--steps", "2", "--grad-accum-steps", parts)
        result, out = invoke(tmp_path / str(i), CONFIG, *options)
        assert result.exit_code == 0, result.output
        assert yaml.safe_load((out / "config.yaml").read_text())["train"][
            "grad_accum_steps"
        ] == int(parts)
        losses.append([r["loss"] for r in read_metrics(out) if "loss" in r])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


@pytest.mark.usefixtures("no_pictures")
def test_the_option_of_parts_comes_before_the_optimizers(tmp_path, text):
    config = {**CONFIG, "optimizer": {**CONFIG["optimizer"], "grad_accum_steps": 2}}
    for options, parts in (((), 2), (("--grad-accum-steps", "1"), 1)):
        folder = tmp_path / str(parts)
        folder.mkdir()
        result, out = invoke(folder, config, "--data", str(text), "--steps", "1", *options)
        assert result.exit_code == 0, result.output
        assert ("bytes in 2 parts" in result.output) == (parts == 2)
        resolved = yaml.safe_load((out / "config.yaml").read_text())
        assert resolved["train"]["grad_accum_steps"] == parts


@pytest.mark.usefixtures("no_pictures")
def test_losses_that_arrive_in_bunches_make_no_wild_speeds(tmp_path, text, monkeypatch):
    class Bunches(LateLosses):
        def __init__(self, tell, **options):
            seconds = {0: 60.0, 1: 2.0, 2: 1e-6, 3: 2.0}
            super().__init__(lambda loss: tell(loss._replace(seconds=seconds[loss.step])))

    monkeypatch.setattr(run, "LateLosses", Bunches)
    result, out = invoke(tmp_path, CONFIG, "--data", str(text), "--steps", "4")
    assert result.exit_code == 0, result.output
    speeds = [r["tokens_per_s"] for r in read_metrics(out) if "loss" in r]
    assert max(speeds[1:]) / min(speeds[1:]) < 2.1


def test_a_batch_that_cannot_be_parted_is_refused(tmp_path, text):
    result, _ = invoke(tmp_path, CONFIG, "--data", str(text), "--grad-accum-steps", "7")
    assert result.exit_code != 0
    assert "batch_size must be a multiple of train.grad_accum_steps" in result.output


# --- other commands -------------------------------------------------------------------------------


def test_the_list_of_commands_is_whole():
    lines = CliRunner().invoke(main, ["--help"]).output.splitlines()
    commands = lines[lines.index("Commands:") + 1 :]
    modules = sorted(Path(run.__file__).parent.glob("*_cli.py"))
    assert [line.split()[0] for line in commands] == [m.stem.removesuffix("_cli") for m in modules]
    for line in commands:  # each is there
        assert CliRunner().invoke(main, [line.split()[0], "--help"]).exit_code == 0
    assert all(line.endswith(".") and not line.endswith("...") for line in commands)


def test_a_picture_that_cannot_be_written(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (tmp_path / "folder.png").mkdir()
    for name, reason in (("no/x.png", "no folder"), ("folder.png", "Is a directory")):
        out = tmp_path / name
        result = CliRunner().invoke(
            main, ["schedule", str(tmp_path / "config.yaml"), "-o", str(out)]
        )
        assert result.exit_code == 2
        assert f"{out} cannot be written: {reason}" in result.stderr
