"""Checkpoint folders of Hugging Face's Trainer.

A folder has ``model.safetensors``, ``optimizer.pt``, ``scheduler.pt`` and ``trainer_state.json``.
The optimizer has two groups, what decays first, each in the order of the model. That order is not
in the folder: safetensors sorts by name. So reading needs names, unless shapes tell all parameters
apart; `module_order` asks transformers for them.

References:
  https://huggingface.co/docs/transformers/trainer
"""

import json
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cerebras_jax.formats import dialects, pt, safetensors_file
from cerebras_jax.formats.matching import Names
from cerebras_jax.formats.run import Run

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
_NOT_DECAYED = re.compile(r"(?i)bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def read(path: str | Path, names: Names | None = None) -> Run:
    """A run from a folder; a folder with weights only is one, too.

    Args:
      path: the folder, e.g. ``output/checkpoint-500``.
      names: ``[name for name, _ in model.named_parameters()]``, or `module_order`, or one list for
        each group.

    Raises:
      ImportError: if safetensors is missing.
      ValueError: if a part is missing or damaged, or names cannot be told.
    """
    folder = Path(path)
    weights, ordered = _read_weights(folder)
    optimizer, scheduler, unread = None, [], []
    if (folder / "optimizer.pt").exists():
        optimizer, unread = pt.load(folder / "optimizer.pt")
    if (folder / "scheduler.pt").exists():
        state, more = pt.load(folder / "scheduler.pt")
        scheduler, unread = [state], unread + more
    extra = {
        key: json.loads((folder / f"{key}.json").read_text())
        for key in ("config", "trainer_state")
        if (folder / f"{key}.json").exists()
    }
    return Run.of(
        weights,
        optimizer,
        scheduler,
        extra.get("trainer_state", {}).get("global_step"),
        names=names,
        ordered=ordered,
        extra=extra,
        unread=unread,
    )


def _read_weights(folder: Path) -> tuple[dict[str, Any], bool]:
    """Weights, and whether they are in the model's order."""
    kind = next((name for name in _WEIGHTS if (folder / name).exists()), None)
    if kind is None:
        raise ValueError(f"{folder} has none of {', '.join(_WEIGHTS)}")
    if kind == "pytorch_model.bin":
        return pt.read(folder / kind).params, True
    if kind == "model.safetensors":
        return safetensors_file.load(folder / kind), False
    files = sorted(set(json.loads((folder / kind).read_text())["weight_map"].values()))
    weights: dict[str, Any] = {}
    for name in files:
        if Path(name).name != name:
            raise ValueError(f"{folder / kind} refers to {name!r}, which is not in the folder")
        weights |= safetensors_file.load(folder / name)
    return weights, False


def module_order(path: str | Path) -> list[str]:
    """The parameters' names in the order of the model that the folder's config describes.

    transformers builds the model without weights; code that a model brings along is not run.

    Raises:
      ImportError: if transformers or torch is missing.
      ValueError: if the configuration names no architecture that transformers has.
    """
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    architecture = next(iter(config.architectures or []), "")
    model = getattr(transformers, architecture, None)
    if not (isinstance(model, type) and issubclass(model, transformers.PreTrainedModel)):
        raise ValueError(f"{path}: transformers has no architecture {architecture!r}")
    with torch.device("meta"):
        return [name for name, _ in model(config).named_parameters()]


def write(path: str | Path, run: Run, names: Names | None = None) -> None:
    """A folder from which ``Trainer.train(resume_from_checkpoint=path)`` continues.

    Parameters are regrouped as the Trainer groups them: biases and normalization layers last.

    Args:
      path: the folder; it appears when it is whole.
      run: its optimizer is written as torch's of the same name has it.
      names: the names in the model's order, or two lists of them, one for each group.

    Raises:
      ImportError: if torch or safetensors is missing.
      FileExistsError: if there is something at ``path``.
      ValueError: if the order of the parameters is not known, or values differ inside of a group.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} is there already")
    run = run.in_order(names)
    if run.groups and (names is None or isinstance(names[0], str)):
        order = [n for n in run.params if n in set(run.trained)]
        run = run.in_order([[n for n in order if _decays(n, run) is d] for d in (True, False)])
    run = dialects.to_torch(run)
    run.check()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir(parents=True)
    try:
        _write_files(temporary, run)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _decays(name: str, run: Run) -> bool:
    """The Trainer's rule; a vector that is not a bias is taken for a normalization's scale."""
    return not _NOT_DECAYED.search(name) and np.ndim(run.params.get(name, 0)) != 1


def _write_files(folder: Path, run: Run) -> None:
    safetensors_file.save(folder / "model.safetensors", run.params)
    if run.groups:
        optimizer = run.state_dict()
        for group in optimizer["param_groups"]:
            del group["param_names"]
        pt.save(folder / "optimizer.pt", optimizer)
        pt.save(folder / "scheduler.pt", _scheduler(run))
    state = {"log_history": [], **run.extra.get("trainer_state", {})}
    if run.step is not None:
        state["global_step"] = run.step
    for key, value in (("config", run.extra.get("config")), ("trainer_state", state)):
        if value is not None:
            (folder / f"{key}.json").write_text(json.dumps(value, indent=2) + "\n")


def _scheduler(run: Run) -> Mapping[str, Any]:
    """The Trainer's own scheduler's state, or the least that brings a new one to this step."""
    if run.schedulers and "lr_lambdas" in run.schedulers[0]:
        return run.schedulers[0]
    if run.step is None:
        raise ValueError("the step of the run is not known, and the Trainer's scheduler needs it")
    return {
        "last_epoch": run.step,
        "_step_count": run.step + 1,
        "_last_lr": [group["lr"] for group in run.groups],
        "lr_lambdas": [None] * len(run.groups),
    }
