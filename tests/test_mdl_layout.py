"""How `.mdl` files are laid out: the oracle is what the original's writers wrote."""

import gzip
import json
from pathlib import Path

import h5py
import pytest

from cerebras_jax.formats import cerebras

GOLDEN = Path(__file__).parent / "golden"

# Leaves that a reader cannot tell from others: what equals an earlier one is a link there, NumPy's
# arrays and constants are torch's here.
ONLY_THEIRS = {"LinkedObject", "DeferredFullTensor", "NumpyArraySerializer", "NumpyArrayH5Type"}


def plain(value):
    value = value.tolist() if hasattr(value, "tolist") else value
    return json.loads(value) if isinstance(value, str) and value.startswith("{") else value


@pytest.mark.parametrize(("name", "version"), [("cs203", "0.4"), ("cs210", "0.5")])
def test_files_are_laid_out_as_the_originals(tmp_path, name, version):
    """Every attribute's value and type, every dataset's type, shape, chunks and filters."""
    original, path = tmp_path / "original.mdl", tmp_path / "again.mdl"
    original.write_bytes(gzip.decompress((GOLDEN / f"{name}.mdl.gz").read_bytes()))
    tree, left = cerebras.load(original)
    cerebras.save(path, tree, version)
    compared = 0
    with h5py.File(original) as theirs, h5py.File(path) as ours:
        for key in set(theirs.attrs) - {"__spec__", "__cstorch_version__"}:
            mine, value = plain(ours.attrs.get(key)), plain(theirs.attrs[key])
            leaf = value.get(key, {}) if isinstance(value, dict) else {}
            if key.removesuffix(".__metadata__") in left or leaf.get("__TYPE__") in ONLY_THEIRS:
                continue
            assert mine == value, key
            assert ours.attrs.get_id(key).dtype == theirs.attrs.get_id(key).dtype
            compared += 1
        datasets = []
        theirs.visititems(lambda key, item: datasets.append((key, item)))
        for key, dataset in datasets:
            attrs = {k: plain(v) for k, v in dataset.attrs.items()}
            kind = attrs.get("__H5_TYPE__", attrs.get("__TYPE__"))
            if not isinstance(dataset, h5py.Dataset) or key in left or kind in ONLY_THEIRS:
                continue
            mine = ours[key]
            assert {k: plain(v) for k, v in mine.attrs.items()} == attrs, key
            for k in attrs:
                assert mine.attrs.get_id(k).dtype == dataset.attrs.get_id(k).dtype, (key, k)
            about = [(d.dtype, d.shape, d.chunks, d._filters) for d in (mine, dataset)]
            assert about[0] == about[1], key
            compared += 1
    assert compared > 60
