"""Malicious pickles, and whole files of them: nothing in them runs, as an audit hook sees. The
oracle of what data means is the pickle module itself."""

import contextlib
import gzip
import io
import json
import os
import pickle
import pickletools
import random
import sys
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cerebras_jax.formats import cerebras, convert, huggingface, inert, pt, records

GOLDEN = Path(__file__).parent / "golden"

# --- an audit hook: it cannot be removed, so it looks away until it is asked to watch -------------

WATCHED = (
    "import", "exec", "compile", "open", "os.", "subprocess.", "socket.", "ctypes.", "shutil.",
    "pickle.", "marshal.", "code.", "pty.", "builtins.input", "urllib.", "webbrowser.", "glob.",
    "tempfile.", "sqlite3.", "cpython.", "setopencodehook", "mmap.",
)  # fmt: skip
_seen: list | None = None


def _hook(event, args):
    if _seen is not None and event.startswith(WATCHED):
        _seen.append((event, args[:1]))


sys.addaudithook(_hook)
for codec in ("cp437", "raw_unicode_escape"):
    "".encode(codec)  # Python imports its codecs when it first needs them


@contextlib.contextmanager
def nothing_happens(*allowed):
    """Fails if the block imports, executes, opens or starts anything, but for ``allowed``."""
    global _seen
    _seen = []
    try:
        yield
    finally:
        seen, _seen = _seen, None
    bad = [e for e in seen if not (e[0] in ("open", "mmap.__new__") and allowed)]
    opened = {str(e[1][0]) for e in seen if e[0] == "open"} - {str(path) for path in allowed}
    assert not bad, bad
    assert not opened, opened


def test_the_hook_sees():
    with pytest.raises(AssertionError, match="open"), nothing_happens():
        Path(__file__).read_text()
    with pytest.raises(AssertionError, match="exec"), nothing_happens():
        eval("1")
    with pytest.raises(AssertionError, match="pickle.find_class"), nothing_happens():
        pickle.loads(pickle.dumps(OrderedDict()))
    with pytest.raises(AssertionError, match="os.system"), nothing_happens():
        os.system("true")


# --- attacks -------------------------------------------------------------------------------------


class Call:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduced


def _attacks(mark):
    shell = f"touch {mark}"
    code = f"open({mark!r}, 'w')"
    text = mark.encode()
    return {
        "os.system": pickle.dumps(Call(os.system, shell)),
        "eval": pickle.dumps({"state": Call(eval, code)}),
        "exec in depth": pickle.dumps([1, {"a": (Call(exec, code), Call(os.system, shell))}]),
        "getattr": pickle.dumps(Call(getattr, "", "join")),
        "open": pickle.dumps(Call(open, mark, "w")),
        "__import__": pickle.dumps(Call(__import__, "this")),
        "a state": pickle.dumps(Call(bytearray, 3, state={"x": Call(eval, code)})),
        "GLOBAL and REDUCE": b"cos\nsystem\n(S'touch " + text + b"'\ntR.",
        "INST": b"(S'touch " + text + b"'\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nS'touch " + text + b"'\no.",
        "NEWOBJ": b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85\x81.",
        "NEWOBJ_EX": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85}\x92.",
        "a dotted name": b"\x80\x04\x8c\x08builtins\x8c\x0cexec.__call__\x93\x8c\x011\x85R.",
        "BUILD": pickle.dumps(np.random.default_rng(0)),
        "an extension code": b"\x80\x02\x82\x01.",
        "a persistent id": b"\x80\x02X\x01\x00\x00\x00aQ.",
        "a key": b"\x80\x02}cos\nsystem\nX\x04\x00\x00\x00true\x85RK\x01s.",
        "a set": b"\x80\x04\x8f(cos\nsystem\nX\x04\x00\x00\x00true\x85R\x90.",
        "a class of the file": b"\x80\x02cbuiltins\ntype\nX\x01\x00\x00\x00A)}\x87R.",
        "append to a call": b"\x80\x02ccollections\ndeque\n)R(K\x01K\x02e.",
        "cut": pickle.dumps(Call(os.system, shell))[:-3],
    }


NAMES = list(_attacks("x"))


@pytest.mark.parametrize("name", NAMES)
def test_attacks(name, tmp_path):
    mark = tmp_path / "mark"
    data = _attacks(str(mark))[name]
    with nothing_happens():
        try:
            left = records.interpret(inert.load(io.BytesIO(data)))[1]
        except ValueError:
            left = ["refused"]
    assert left or name == "a set", "an attack was taken for data"
    assert not mark.exists()


def test_the_attacks_are_attacks(tmp_path):
    """Python's own reader runs them."""
    mark = tmp_path / "mark"
    for name in ("os.system", "GLOBAL and REDUCE", "INST", "OBJ", "open", "eval"):
        result = pickle.loads(_attacks(str(mark))[name])
        with contextlib.suppress(AttributeError):
            (result["state"] if isinstance(result, dict) else result).close()
        assert mark.exists(), name
        mark.unlink()


def test_bombs_are_refused():
    memo = b"\x80\x02" + b"r\xff\xff\xff\x7f".join([b"]", b"."])  # an index of two billion
    assert inert.load(io.BytesIO(memo)) == []
    tenfold = b"".join(b"](" + b"h%c" % i * 10 + b"eq%c" % (i + 1) for i in range(30))
    laughs = b"\x80\x02(]q\x00" + tenfold + b"1h\x1e"
    with pytest.raises(ValueError, match=r"more than 10,000,000 values"):
        records.interpret(inert.load(io.BytesIO(laughs + b".")))
    with pytest.raises(ValueError, match="contains itself"):
        records.interpret(inert.load(io.BytesIO(b"\x80\x02]q\x00(h\x00h\x00e.")))
    with pytest.raises(ValueError, match="nested too deeply"):
        records.interpret(inert.load(io.BytesIO(b"(" * 20_000 + b"l" * 20_000 + b".")))
    deep_key = b"\x80\x02}K\x01" + b"\x85" * 100_000 + b"K\x01s."
    with pytest.raises(ValueError, match="nested too deeply"):
        inert.load(io.BytesIO(deep_key))
    with pytest.raises(ValueError, match="expected 9223372036854775807 bytes"):
        inert.load(io.BytesIO(b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f" + b"x."))


# --- whole files ---------------------------------------------------------------------------------


def _evil_zip(path, obj):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(obj))


@pytest.mark.parametrize("name", ["checkpoint.pt", "plain.pt", "old.pt"])
def test_an_evil_torch_file(tmp_path, name):
    mark, path = str(tmp_path / "mark"), tmp_path / name
    tree = {
        "state": {0: {"step": 3.0, "hook": Call(os.system, f"touch {mark}")}},
        "param_groups": [{"lr": 0.1, "params": [0], "x": Call(eval, f"open({mark!r}, 'w')")}],
    }
    if name == "checkpoint.pt":
        _evil_zip(path, tree)
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
    pytest.importorskip("safetensors")
    for name in ("model.safetensors", "optimizer.pt", "config.json"):
        (tmp_path / name).write_bytes((GOLDEN / "hf_tiny" / name).read_bytes())
    mark = tmp_path / "mark"
    _evil_zip(tmp_path / "scheduler.pt", {"last_epoch": 2, "fn": Call(open, str(mark), "w")})
    names = np.load(GOLDEN / "hf_tiny" / "expected.npz")["names"].tolist()
    run = huggingface.read(tmp_path, names)
    assert (run.unread, run.schedulers, mark.exists()) == (["fn"], [{"last_epoch": 2}], False)
    (tmp_path / "model.safetensors").unlink()
    index = {"weight_map": {"w": "../secret.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="not in the folder"):
        huggingface.read(tmp_path, names)


def test_an_evil_spec(tmp_path):
    h5py = pytest.importorskip("h5py")
    mark, path = str(tmp_path / "mark"), tmp_path / "evil.mdl"
    path.write_bytes(gzip.decompress((GOLDEN / "cs203.mdl.gz").read_bytes()))
    cerebras.load(path)  # what reading itself imports, it imports now
    for evil in (Call(os.system, f"touch {mark}"), [Call(eval, f"open({mark!r}, 'w')")]):
        with h5py.File(path, "r+") as file:
            file.attrs["__spec__"] = pickle.dumps(evil).hex()
        with (
            nothing_happens(path),
            pytest.raises(ValueError, match=r"cannot be read: its __spec__ is no tree spec"),
        ):
            cerebras.load(path)
    assert not Path(mark).exists()


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
    seeds = [real, *_attacks("/nowhere/mark").values()]
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


# --- what data means -----------------------------------------------------------------------------

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
    | st.binary()
)  # fmt: skip
KEYS = st.text() | st.integers() | st.tuples(st.text(), st.integers())
TREES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(KEYS, inner)
        | st.tuples(inner, inner)
        | st.sets(KEYS)
        | st.dictionaries(KEYS, inner).map(OrderedDict)
    ),
    max_leaves=20,
)


@given(TREES, st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_data_means_what_pickle_says(tree, protocol):
    data = pickle.dumps(tree, protocol)
    assert records.interpret(inert.load(io.BytesIO(data))) == (pickle.loads(data), [])


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "array",
    [
        np.arange(6.0).reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3)),
        np.array([1 + 2j], np.complex64),
        np.array(3.5),
        np.zeros((0, 3), np.float16),
        np.arange(3, dtype=">i4"),
        np.float32(1.5),
        np.bool_(True),
    ],
    ids=lambda a: f"{np.asarray(a).dtype}{np.shape(a)}",
)
def test_numpy(array, protocol):
    data = pickle.dumps({"a": array, "d": defaultdict(list, x=[1])}, protocol)
    tree, left = records.interpret(inert.load(io.BytesIO(data)))
    assert left == []
    assert tree["d"] == {"x": [1]}
    native = array.astype(array.dtype.newbyteorder("="))
    np.testing.assert_array_equal(tree["a"], native, strict=True)


def test_arrays_of_objects_are_left_out():
    data = pickle.dumps({"a": np.array([OrderedDict()], object), "b": 1})
    assert records.interpret(inert.load(io.BytesIO(data))) == ({"b": 1}, ["a"])


def test_files_are_told_apart_by_their_contents(tmp_path):
    (tmp_path / "x").write_text("nothing of the kind")
    with pytest.raises(ValueError, match="of no known format: torch, huggingface"):
        convert.detect(tmp_path / "x")
    assert convert.detect(GOLDEN / "hf_tiny") == "huggingface"
    assert convert.detect(GOLDEN / "hf_tiny" / "optimizer.pt") == "torch"
    assert convert.detect(GOLDEN / "hf_tiny" / "model.safetensors") == "safetensors"
    assert convert.detect(GOLDEN / "torch_1_5.pt") == "torch"
