"""Pickles: nothing in them runs, as an audit hook sees; the oracle of what data means is pickle."""

import contextlib
import io
import os
import pickle
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
from attacks import NAMES, attacks, nothing_happens
from hypothesis import given
from hypothesis import strategies as st

from cerebras_jax.formats import inert, records


def test_the_hook_sees():
    with pytest.raises(AssertionError, match="open"), nothing_happens():
        Path(__file__).read_text()
    with pytest.raises(AssertionError, match="exec"), nothing_happens():
        eval("1")
    with pytest.raises(AssertionError, match="pickle.find_class"), nothing_happens():
        pickle.loads(pickle.dumps(OrderedDict()))
    with pytest.raises(AssertionError, match="os.system"), nothing_happens():
        os.system("true")


@pytest.mark.parametrize("name", NAMES)
def testattacks(name, tmp_path):
    mark = tmp_path / "mark"
    data = attacks(str(mark))[name]
    with nothing_happens():
        try:
            left = records.interpret(inert.load(io.BytesIO(data)))[1]
        except ValueError:
            left = ["refused"]
    assert left or name == "a set", "an attack was taken for data"
    assert not mark.exists()


def test_the_attacks_areattacks(tmp_path):
    """Python's own reader runs them."""
    mark = tmp_path / "mark"
    for name in ("os.system", "GLOBAL and REDUCE", "INST", "OBJ", "open", "eval"):
        result = pickle.loads(attacks(str(mark))[name])
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
