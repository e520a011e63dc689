"""HDF5 files as far as checkpoints need them: whole datasets of the file itself, and attributes.

A file can refer to other files in four ways; all are refused. Datasets and attributes come by the
thousand, and h5py's lower level writes and reads them in a third of the time.
"""

import functools
import math
from typing import Any

import numpy as np

from cerebras_jax.messages import import_extra

_FILTERS = {1: "deflate", 2: "shuffle", 3: "fletcher32", 32000: "lzf", 32004: "lz4"}
_LZ4 = 32004
_LARGEST_CHUNK = 2**20


def import_h5py() -> Any:
    """h5py, with the LZ4 filter.

    Raises:
      ImportError: says how to install them.
    """
    h5py = import_extra("h5py", "convert")
    import_extra("hdf5plugin", "convert")  # registers filters
    return h5py


class Source:
    """Reads datasets that lie in the file itself, and are whole."""

    def __init__(self, h5py: Any, file: Any):
        self.h5py, self.file = h5py, file

    def dataset(self, name: str) -> Any:
        """A dataset.

        Raises:
          ValueError: if it is missing, or is not in this file.
        """
        parts = name.split("/")
        for i in range(len(parts)):
            path = "/".join(parts[: i + 1]).encode()
            if path not in self.file.id:
                raise ValueError(f"{name!r} is missing, or a link to elsewhere")
            if self.file.id.links.get_info(path).type != self.h5py.h5l.TYPE_HARD:
                raise ValueError(f"{name!r} is a link to elsewhere")
        found = self.h5py.h5o.open(self.file.id, name.encode())
        if not isinstance(found, self.h5py.h5d.DatasetID):
            raise ValueError(f"{name!r} is not a dataset")
        return self.h5py.Dataset(found)

    def array(self, name: str, dataset: Any) -> np.ndarray:
        """The numbers of a dataset.

        Raises:
          ValueError: if it holds something else, lies in another file, or was not finished.
        """
        id, h5d = dataset.id, self.h5py.h5d
        plist, dtype, shape = id.get_create_plist(), id.dtype, id.shape
        if plist.get_external_count() or plist.get_layout() == h5d.VIRTUAL:
            raise ValueError(f"{name!r} lies in another file")
        filters = {plist.get_filter(i)[0] for i in range(plist.get_nfilters())}
        if shape is None or dtype.kind not in "biufc" or not filters <= set(_FILTERS):
            raise ValueError(f"{name!r} is no array of numbers that could be read")
        if plist.get_layout() == h5d.CHUNKED:
            chunks = (-(-n // c) for n, c in zip(shape, plist.get_chunk(), strict=True))
            is_whole = id.get_num_chunks() == math.prod(chunks)
        else:
            is_whole = id.get_storage_size() >= math.prod(shape) * dtype.itemsize
        if not is_whole:
            raise ValueError(f"{name!r} was not written to its end")
        array = np.empty(shape, dtype)
        if array.size:
            id.read(self.h5py.h5s.ALL, self.h5py.h5s.ALL, array)
        return array


class Sink:
    """Writes datasets and attributes; types and spaces are made once."""

    def __init__(self, h5py: Any, file: Any):
        self.h5py, self.file = h5py, file
        self._type = functools.cache(lambda dtype: h5py.h5t.py_create(dtype, logical=True))
        self._memory = functools.cache(lambda dtype: h5py.h5t.py_create(dtype))
        self._space = functools.cache(h5py.h5s.create_simple)
        self._text = h5py.string_dtype()
        self._layout = functools.cache(self._make_layout)
        self._links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
        self._links.set_create_intermediate_group(True)
        self._links.set_char_encoding(h5py.h5t.CSET_UTF8)

    def _make_layout(self, shape: tuple[int, ...], itemsize: int) -> Any:
        """Chunks that LZ4 compresses, but for scalars and nothing."""
        layout = self.h5py.h5p.create(self.h5py.h5p.DATASET_CREATE)
        if math.prod(shape) and shape:
            chunk = list(shape)
            for axis in range(len(shape)):
                rest = itemsize * math.prod(shape[axis + 1 :])
                chunk[axis] = max(1, min(shape[axis], _LARGEST_CHUNK // rest))
                if chunk[axis] > 1:
                    break
            layout.set_chunk(tuple(chunk))
            layout.set_filter(_LZ4, self.h5py.h5z.FLAG_OPTIONAL, (0,))
        return layout

    def dataset(self, name: str, array: np.ndarray | None) -> Any:
        """A new dataset, to hang attributes on; None: one without data."""
        h5py = self.h5py
        if array is None:
            kind, layout = self._type(np.dtype(np.float32)), self._layout((), 4)
            space = h5py.h5s.create(h5py.h5s.NULL)
            return h5py.h5d.create(self.file.id, name.encode(), kind, space, layout, self._links)
        if array.dtype.kind not in "biufc":
            raise TypeError(f"{name}: HDF5 cannot hold arrays of {array.dtype}")
        kind, space = self._type(array.dtype), self._space(array.shape)
        layout = self._layout(array.shape, array.itemsize)
        made = h5py.h5d.create(self.file.id, name.encode(), kind, space, layout, self._links)
        if array.size:
            made.write(h5py.h5s.ALL, h5py.h5s.ALL, np.ascontiguousarray(array))
        return made

    def attributes(self, place: Any, **values: Any) -> None:
        """Attributes of a dataset or of the file: text, numbers, arrays or lists of them."""
        for name, value in values.items():
            first = value[0] if isinstance(value, list) and value else value
            array = np.array(value, self._text if isinstance(first, str) else None)
            kind, space = self._type(array.dtype), self._space(array.shape)
            attribute = self.h5py.h5a.create(place, name.encode(), kind, space)
            if array.size:
                attribute.write(array, mtype=self._memory(array.dtype))
