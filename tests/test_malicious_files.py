"""Malicious and damaged files of every format: nothing in them runs, as an audit hook sees."""

import contextlib
import gzip
import io
import json
import os
import pickle
import pickletools
import random
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from attacks import NAMES, Call, attacks, nothing_happens

from cerebras_jax.formats import cerebras, convert, huggingface, inert, pt, records

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", ["checkpoint.pt", "plain.pt", "old.pt"])
def test_an_evil_torch_file(tmp_path, name):
    mark, path = str(tmp_path / "mark"), tmp_path / name
    tree = {
        "state": {0: {"step": 3.0, "hook": Call(os.system, f"touch {mark}")}},
        "param_groups": [{"lr": 0.1, "params": [0], "x": Call(eval, f"open({mark!r}, 'w')")}],
    }
    if name == "checkpoint.pt":
        _zipped(path, pickle.dumps(tree))
    elif name == "plain.pt":
        path.write_bytes(pickle.dumps(tree))
    else:
        parts = (pt._MAGIC, pt._VERSION, {"little_endian": True}, tree, [])
        path.write_bytes(b"".join(pickle.dumps(part) for part in parts))
    with nothing_happens(path):
        run = pt.read(path)
    assert run.unread == ["state.0.hook", "param_groups.0.x"]
    assert run.states == {"0": {"step": 3.0}}
    assert not Path(mark).exists()


def test_an_evil_folder(tmp_path):
    """scheduler.pt, where nobody looks; and a shard that points elsewhere."""
    for name in ("model.safetensors", "optimizer.pt", "config.json"):
        (tmp_path / name).write_bytes((GOLDEN / "hf_tiny" / name).read_bytes())
    mark = tmp_path / "mark"
    evil = {"last_epoch": 2, "fn": Call(open, str(mark), "w")}
    _zipped(tmp_path / "scheduler.pt", pickle.dumps(evil))
    names = np.load(GOLDEN / "hf_tiny" / "expected.npz")["names"].tolist()
    run = huggingface.read(tmp_path, names)
    assert (run.unread, run.schedulers, mark.exists()) == (["fn"], [{"last_epoch": 2}], False)
    (tmp_path / "model.safetensors").unlink()
    index = {"weight_map": {"w": "../secret.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="not in the folder"):
        huggingface.read(tmp_path, names)


def _zipped(path, data):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
    return path


def _folder(path):
    path.mkdir()
    (path / "model.safetensors").write_bytes(
        (GOLDEN / "hf_tiny" / "model.safetensors").read_bytes()
    )
    return path


def _unpacked(path):
    path.write_bytes(gzip.decompress((GOLDEN / "cs203.mdl.gz").read_bytes()))
    return path


def _with_spec(path, data):
    with h5py.File(path, "r+") as file:
        file.attrs["__spec__"] = data.hex()
    return path


@pytest.mark.parametrize("name", NAMES)
def test_attacks_in_every_file(tmp_path, name):
    """As the contents of a .pt, plain and in a zip, of a scheduler.pt, and as a .mdl's tree."""
    mark = tmp_path / "mark"
    data = attacks(str(mark))[name]
    (tmp_path / "plain.pt").write_bytes(data)
    folder = _folder(tmp_path / "folder")
    for path in (folder, GOLDEN / "torch_1_5.pt", _unpacked(tmp_path / "x.mdl")):
        convert.read(path)  # what reading itself imports, it imports now
    scheduler = _zipped(folder / "scheduler.pt", data)
    for path, opened in [
        (tmp_path / "plain.pt",) * 2,
        (_zipped(tmp_path / "zip.pt", data),) * 2,
        (folder, scheduler),
        (_with_spec(tmp_path / "x.mdl", data),) * 2,
    ]:
        with nothing_happens(path, opened), contextlib.suppress(ValueError):
            assert convert.read(path).unread
    assert not mark.exists()


def test_a_spec_that_is_no_tree_is_refused(tmp_path):
    path = _unpacked(tmp_path / "evil.mdl")
    for evil in (Call(os.system, "true"), [Call(eval, "1")], {"a": 1}):
        _with_spec(path, pickle.dumps(evil))
        with pytest.raises(ValueError, match=r"cannot be read: its __spec__ is no tree spec"):
            cerebras.load(path)


def test_damaged_tensors_are_refused(tmp_path):
    """Offsets, shapes and strides that reach beyond the storage; storages that lie about size."""
    good = (GOLDEN / "hf_tiny" / "optimizer.pt").read_bytes()
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (root,) = (name for name in members if name.endswith("data.pkl"))

    def write(name, **changes):
        path = tmp_path / f"{name}.pt"
        with zipfile.ZipFile(path, "w") as archive:
            for member, data in {**members, **changes}.items():
                if data is not None:
                    archive.writestr(member, data)
        return path

    pickled = members[root]
    assert pt.load(write("same"))[0]["state"][0]["exp_avg"].shape == (32, 8)
    shape = b"K K\x08\x86"  # (32, 8)
    storage = root.removesuffix("data.pkl") + "data/1"
    assert shape in pickled
    for name, changes, message in [
        ("large", {root: pickled.replace(shape, b"KhK\x08\x86", 1)}, "reaches beyond"),
        (
            "huge",
            {root: pickled.replace(shape, b"J\xff\xff\xff\x7fK\x08\x86", 1)},
            "reaches beyond",
        ),
        ("negative", {root: pickled.replace(shape, b"J\xff\xff\xff\xffK\x08\x86", 1)}, "no tensor"),
        ("rank", {root: pickled.replace(shape, b"K K\x08K\x01\x87", 1)}, "no tensor"),
        ("missing", {storage: None}, "data/1"),
        ("short", {storage: members[storage][:-4]}, "1020 bytes, its tensors expect 1024"),
        ("no pickle", {root: None}, "no data.pkl"),
        ("big-endian", {root.removesuffix("data.pkl") + "byteorder": b"big"}, "big-endian"),
    ]:
        with pytest.raises(ValueError, match=message):
            pt.load(write(name, **changes))


def test_flipped_and_cut_files_are_refused(tmp_path):
    good = (GOLDEN / "hf_tiny" / "optimizer.pt").read_bytes()
    whole, _ = pt.load(GOLDEN / "hf_tiny" / "optimizer.pt")
    path = tmp_path / "bad.pt"
    rng = random.Random(0)
    refused = 0
    for _ in range(150):
        place = rng.randrange(len(good))
        flipped = bytearray(good)
        flipped[place] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            tree, _ = pt.load(path)
        except ValueError:
            refused += 1
            continue
        for i, entry in whole["state"].items():  # what is read at all are the bytes that were there
            for key, value in entry.items():
                np.testing.assert_array_equal(tree["state"][i][key], value)
    assert refused > 50
    for length in range(0, len(good), 997):
        path.write_bytes(good[:length])
        with pytest.raises(ValueError):
            pt.load(path)


# --- fuzz ----------------------------------------------------------------------------------------


def _random_program(rng):
    """Any instructions with any arguments, names of dangerous functions among them."""
    names = [b"os\nsystem\n", b"builtins\neval\n", b"collections\nOrderedDict\n", b"x\ny\n"]
    texts = [b"true", b"os", b"system", b"builtins", b"eval", b"1", b"__class__"]
    code = [bytes([op.code.encode("latin1")[0]]) for op in pickletools.opcodes if op.name != "STOP"]
    program = [b"\x80\x04"]
    for _ in range(rng.randrange(1, 40)):
        if rng.random() < 0.35:
            text = rng.choice(texts)
            program.append(b"\x8c" + bytes([len(text)]) + text)
        op = rng.choice([*code, b"R", b"(", b"\x93", b"\x85", b"b", b"c", b"\x81", b"h", b"q"])
        argument = rng.randbytes(rng.choice([0, 0, 0, 1, 4]))
        program.append(op + (rng.choice(names) if op in (b"c", b"i") else argument))
    return b"".join(program) + b"."


def _mutated(rng, data):
    data = bytearray(data)
    for _ in range(rng.randrange(1, 6)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of escapes in random strings
def test_fuzz():
    """Whatever the bytes, they are read or refused, and nothing happens."""
    rng = random.Random(0)
    with zipfile.ZipFile(GOLDEN / "hf_tiny" / "scheduler.pt") as archive:
        real = next(archive.read(n) for n in archive.namelist() if n.endswith("data.pkl"))
    seeds = [real, *attacks("/nowhere/mark").values()]
    read = 0
    with nothing_happens():
        for i in range(6000):
            data = _random_program(rng) if i % 2 else _mutated(rng, rng.choice(seeds))
            try:
                records.interpret(inert.load(io.BytesIO(data), lambda pid: None))
                read += 1
            except ValueError:
                pass
    assert read > 200  # it is not all refused at the first instruction


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fuzz_of_files(tmp_path):
    """The same inside of a .pt and of a .mdl: one bad byte or many, and nothing happens."""
    rng = random.Random(1)
    with zipfile.ZipFile(GOLDEN / "hf_tiny" / "optimizer.pt") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    root = next(name for name in members if name.endswith("data.pkl"))
    mdl, path = _unpacked(tmp_path / "x.mdl"), tmp_path / "x.pt"
    with h5py.File(mdl) as file:
        spec = bytes.fromhex(file.attrs["__spec__"])
    cerebras.load(mdl)
    for i in range(150):
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, _mutated(rng, data) if name == root else data)
        with nothing_happens(path), contextlib.suppress(ValueError, TypeError):
            pt.read(path)
        if i % 5 == 0:
            _with_spec(mdl, _mutated(rng, spec))
            with nothing_happens(mdl), contextlib.suppress(ValueError, TypeError):
                cerebras.read(mdl)


def test_compressed_members_are_refused(tmp_path):
    """torch.save writes none, and a few bytes could become any number."""
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"0" * 10**6)
    with pytest.raises(ValueError, match="is compressed or encrypted"):
        pt.load(path)


def test_lengths_beyond_the_file_take_no_memory(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(b"\x80\x04\x8e" + (2**50).to_bytes(8, "little") + b"x.")
    with pytest.raises(ValueError, match="expected 1125899906842624 bytes"):
        pt.load(path)


def test_files_are_told_apart_by_their_contents(tmp_path):
    (tmp_path / "x").write_text("nothing of the kind")
    with pytest.raises(ValueError, match="of no known format: torch, huggingface"):
        convert.detect(tmp_path / "x")
    assert convert.detect(GOLDEN / "hf_tiny") == "huggingface"
    assert convert.detect(GOLDEN / "hf_tiny" / "optimizer.pt") == "torch"
    assert convert.detect(GOLDEN / "hf_tiny" / "model.safetensors") == "safetensors"
    assert convert.detect(GOLDEN / "torch_1_5.pt") == "torch"
