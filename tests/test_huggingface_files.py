"""Folders of Hugging Face's Trainer: golden/hf_tiny was written by transformers 5.24 after two of
five steps; expected.npz has the gradients and rates of the other three, and where they led."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from cerebras_jax import optim
from cerebras_jax.formats import huggingface, pt, safetensors_file
from cerebras_jax.formats.run import Run

FOLDER = Path(__file__).parent / "golden" / "hf_tiny"
EXPECTED = dict(np.load(FOLDER / "expected.npz"))
ORDER = EXPECTED["names"].tolist()
NORMS = [n for n in ORDER if "norm" in n]


def test_reading():
    run = huggingface.read(FOLDER, ORDER)
    assert (run.step, run.ordered, run.unread) == (2, True, [])
    assert [g["params"] for g in run.groups] == [[n for n in ORDER if n not in NORMS], NORMS]
    assert [g["weight_decay"] for g in run.groups] == [0.1, 0.0]
    assert list(run.params) == ORDER
    assert run.schedulers[0]["last_epoch"] == 2
    assert run.extra["config"]["architectures"] == ["LlamaForCausalLM"]
    run.check()


def test_the_order_is_not_in_the_folder():
    with pytest.raises(
        ValueError, match=r"have the same shape, and the order does not tell.*names="
    ):
        huggingface.read(FOLDER)
    by_group = [[n for n in ORDER if n not in NORMS], NORMS]
    assert huggingface.read(FOLDER, by_group).groups == huggingface.read(FOLDER, ORDER).groups


def test_a_run_goes_on_with_the_same_numbers():
    run = huggingface.read(FOLDER, ORDER)
    params = {n: jnp.asarray(p) for n, p in run.params.items()}
    opt = optim.AdamW(optim.param_groups(params, run.groups), lr=1.0)
    opt.load_state_dict(run.state_dict())
    for t in range(3):
        for group in opt.param_groups:
            group["lr"] = EXPECTED["lr"][t]
            group["eps"] = lambda t: 1e-8 * jnp.sqrt(1 - 0.999 ** (t + 1.0))  # torch's place of eps
        opt.step({n: jnp.asarray(EXPECTED[f"grads/{2 + t}/{n}"]) for n in params})
    for name, value in opt.params.items():
        np.testing.assert_allclose(value, EXPECTED[f"params/5/{name}"], rtol=1e-6, atol=1e-6)


def test_weights_alone(tmp_path):
    shutil.copy(FOLDER / "model.safetensors", tmp_path)
    run = huggingface.read(tmp_path)
    assert (sorted(run.params), run.groups, run.step) == (sorted(ORDER), [], None)
    with pytest.raises(ValueError, match=r"has none of model.safetensors"):
        huggingface.read(tmp_path / "..")


def test_shards(tmp_path):
    weights = safetensors_file.load(FOLDER / "model.safetensors")
    shutil.copy(FOLDER / "optimizer.pt", tmp_path)
    half = len(ORDER) // 2
    index = {}
    for i, part in enumerate((ORDER[:half], ORDER[half:])):
        file = f"model-{i}.safetensors"
        safetensors_file.save(tmp_path / file, {n: weights[n] for n in part})
        index |= dict.fromkeys(part, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    run = huggingface.read(tmp_path, ORDER)
    np.testing.assert_array_equal(run.params[ORDER[0]], weights[ORDER[0]])


def test_damaged_weights(tmp_path):
    whole = (FOLDER / "model.safetensors").read_bytes()
    for data in (whole[:5], whole[:-1], b"\xff" * 8 + whole[8:], whole[:10] + b"x" + whole[11:]):
        (tmp_path / "model.safetensors").write_bytes(data)
        with pytest.raises(ValueError, match="cannot be read"):
            huggingface.read(tmp_path)


def test_safetensors_there_and_back(tmp_path):
    import ml_dtypes

    path = tmp_path / "x.safetensors"
    run = Run({"b": np.ones((2, 3), ml_dtypes.bfloat16).T, "a": np.array(3, np.int8),
               "e": np.zeros((0, 2), np.float16)})  # fmt: skip
    safetensors_file.write(path, run)
    again = safetensors_file.read(path)
    assert not again.ordered
    for name, value in run.params.items():
        np.testing.assert_array_equal(again.params[name], value, strict=True)
    with pytest.raises(ValueError, match="holds weights only"):
        safetensors_file.write(path, Run({}, {"a": {}}, [{"params": ["a"]}]))


def test_old_weights_are_in_the_models_order(tmp_path):
    pytest.importorskip("torch")
    weights = huggingface.read(FOLDER, ORDER).params
    pt.save(tmp_path / "pytorch_model.bin", weights)
    shutil.copy(FOLDER / "optimizer.pt", tmp_path)
    run = huggingface.read(tmp_path)
    assert run.groups == huggingface.read(FOLDER, ORDER).groups
    assert run.ordered


# --- out -----------------------------------------------------------------------------------------


def test_there_and_back_is_equal_bit_for_bit(tmp_path):
    torch = pytest.importorskip("torch")
    run = huggingface.read(FOLDER, ORDER)
    huggingface.write(tmp_path / "out", run)
    for name in ("optimizer.pt", "scheduler.pt"):
        theirs, ours = (torch.load(folder / name) for folder in (FOLDER, tmp_path / "out"))
        if name == "scheduler.pt":
            assert theirs == ours
            continue
        assert theirs["param_groups"] == ours["param_groups"]
        for i, entry in theirs["state"].items():
            assert list(entry) == list(ours["state"][i])
            assert all(torch.equal(v, ours["state"][i][k]) for k, v in entry.items())
    for name in ("config.json", "trainer_state.json"):
        theirs, ours = (json.loads((f / name).read_text()) for f in (FOLDER, tmp_path / "out"))
        assert theirs == ours
    weights = (safetensors_file.load(f / "model.safetensors") for f in (FOLDER, tmp_path / "out"))
    theirs, ours = weights
    assert all((theirs[n] == ours[n]).all() for n in ORDER)
    with pytest.raises(FileExistsError, match="is there already"):
        huggingface.write(tmp_path / "out", run)


def test_from_an_optimizer_of_ours(tmp_path):
    """One group of a sorted dict becomes the Trainer's two in the model's order."""
    pytest.importorskip("torch")
    params = {n: jnp.asarray(p) for n, p in sorted(huggingface.read(FOLDER, ORDER).params.items())}
    opt = optim.AdamW(params, lr=0.1)
    opt.step(params)
    run = Run.of(dict(opt.named_parameters()), opt.state_dict(), step=1, ordered=False)
    with pytest.raises(ValueError, match="names= must list them in the model's order"):
        huggingface.write(tmp_path / "out", run)
    huggingface.write(tmp_path / "out", run, names=ORDER)
    again = huggingface.read(tmp_path / "out", ORDER)
    assert [g["params"] for g in again.groups] == [[n for n in ORDER if n not in NORMS], NORMS]
    for name, entry in opt.state.items():
        np.testing.assert_array_equal(again.states[name]["exp_avg"], entry["exp_avg"])
        assert float(again.states[name]["step"]) == 1
    scheduler, _ = pt.load(tmp_path / "out" / "scheduler.pt")
    assert scheduler == {
        "last_epoch": 1, "_step_count": 2, "_last_lr": [0.1, 0.1], "lr_lambdas": [None, None],
    }  # fmt: skip
    mixed = optim.AdamW(optim.param_groups(params, [{"params": ["*.0.*"], "lr": 1.0}]), lr=0.1)
    run = Run.of(dict(mixed.named_parameters()), mixed.state_dict(), step=1, ordered=False)
    with pytest.raises(ValueError, match=r"cannot be in one group: lr is"):
        huggingface.write(tmp_path / "mixed", run, names=ORDER)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_trainer_itself_goes_on(tmp_path):
    """Read, written by us, resumed by transformers: the losses of a run that never stopped."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    pytest.importorskip("accelerate")
    assert huggingface.module_order(FOLDER) == ORDER
    huggingface.write(tmp_path / "checkpoint-2", huggingface.read(FOLDER, ORDER))

    def losses(resume):
        config = transformers.AutoConfig.from_pretrained(FOLDER)
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.load_state_dict(
            {n: torch.tensor(p) for n, p in huggingface.read(FOLDER, ORDER).params.items()}
        )
        generator = torch.Generator().manual_seed(0)
        data = [torch.randint(0, 32, (8,), generator=generator) for _ in range(64)]
        args = transformers.TrainingArguments(
            output_dir=str(tmp_path / "out"), max_steps=5, per_device_train_batch_size=4,
            learning_rate=1e-2, weight_decay=0.1, warmup_steps=1, lr_scheduler_type="cosine",
            report_to=[], use_cpu=True, logging_steps=1, seed=1, save_strategy="no",
            disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model=model, args=args, train_dataset=[{"input_ids": d, "labels": d} for d in data]
        )
        trainer.train(resume_from_checkpoint=str(resume))
        history = trainer.state.log_history
        return [(e["step"], e["loss"], e["learning_rate"]) for e in history if "loss" in e], model

    (theirs, a), (ours, b) = losses(FOLDER), losses(tmp_path / "checkpoint-2")
    assert theirs == ours
    assert len(ours) == 5
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
