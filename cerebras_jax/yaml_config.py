"""Configurations from YAML, read only if they are of a size that people write."""

import os
from collections.abc import Callable, Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Any

import yaml

_MOST_BYTES = 2**20
_MOST_VALUES = 100_000
_MOST_LEVELS = 40
_MOST_BITS = 64
_MERGE = "tag:yaml.org,2002:merge"  # <<, which may stand more than once


def read_config(source: str | os.PathLike[str] | Mapping[str, Any]) -> Mapping[str, Any]:
    """A configuration as a mapping, from a YAML file or as it is.

    Raises:
      TypeError: if ``source`` is neither a path nor a mapping.
      ValueError: if the file is not a YAML mapping, has a key twice in one mapping, or
        `check_config` refuses what it holds.
      OSError: if the file cannot be read.

    >>> read_config({"optimizer": {"optimizer_type": "SGD"}})
    {'optimizer': {'optimizer_type': 'SGD'}}
    """
    if isinstance(source, Mapping):
        return source
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"a configuration is a path or a dict, got {type(source).__name__}")
    with open(source, "rb") as file:
        text = file.read(_MOST_BYTES + 1)
    if len(text) > _MOST_BYTES:
        raise ValueError(f"{source} is longer than {_MOST_BYTES:,} bytes")
    config = _parse(text, source)
    if not isinstance(config, Mapping):
        raise ValueError(f"{source} must be a YAML mapping, got {type(config).__name__}")
    check_config(config, str(source))
    return config


def check_config(config: Any, name: str = "the configuration") -> None:
    """Refuses what cannot be walked, shown or counted with.

    That is a value that holds itself, more than 40 levels, more than 100,000 values with shared
    ones counted wherever they stand, and whole numbers of more than 64 bits.

    Args:
      config: mappings and lists of plain values.
      name: what the message calls it.

    Raises:
      ValueError: says which of these it is.

    >>> endless = {}
    >>> endless["again"] = endless
    >>> check_config(endless)
    Traceback (most recent call last):
      ...
    ValueError: the configuration holds a value that contains itself
    """
    for value in _check_size(config, _members, name):
        if isinstance(value, int) and value.bit_length() > _MOST_BITS:
            raise ValueError(f"{name} has a whole number of {value.bit_length():,} bits")


def _parse(text: bytes, source: Any) -> Any:
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
    except yaml.YAMLError as error:
        raise _not_yaml(source, error) from None
    except RecursionError:
        raise ValueError(f"{source} is nested too deeply") from None
    # Before anything is built: merge keys write aliases out while it is.
    _check_keys(_check_size(node, _node_members, str(source)), source)
    try:
        return loader.construct_document(node) if node is not None else None
    except yaml.YAMLError as error:
        raise _not_yaml(source, error) from None
    except Exception as error:  # PyYAML lets through what int(), date() and its own tables raise
        raise ValueError(
            f"{source} has a value that is not what it claims: {type(error).__name__}: {error}"
        ) from None


def _check_keys(nodes: Iterable[Any], source: Any) -> None:
    """Refuses a key that stands twice in one mapping, of which the last would win silently."""
    for node in nodes:
        if not isinstance(node, yaml.MappingNode):
            continue
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            known = (key.tag, key.value)
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            if known in seen:
                line = key.start_mark.line + 1
                raise ValueError(f"{source} has the key {key.value[:80]!r} again at line {line}")
            seen.add(known)


def _not_yaml(source: Any, error: Exception) -> ValueError:
    return ValueError(f"{source} is not YAML: {' '.join(str(error).split())}")


def _members(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    return value if isinstance(value, list | tuple | set | frozenset) else ()


def _node_members(node: Any) -> Iterable[Any]:
    if isinstance(node, yaml.MappingNode):
        return [member for pair in node.value for member in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else ()


def _check_size(root: Any, members: Callable[[Any], Iterable[Any]], name: str) -> list[Any]:
    """All values, each once; a shared one is looked at once, and counted wherever it stands."""
    values, inside, todo = {id(root): root}, {}, [root]
    while todo:
        value = todo.pop()
        found = list(members(value))
        inside[id(value)] = [id(member) for member in found]
        new = {id(member): member for member in found if id(member) not in values}
        todo += new.values()
        values |= new
    size: dict[int, int] = {}
    levels: dict[int, int] = {}
    try:
        for i in TopologicalSorter(inside).static_order():  # the innermost first
            size[i] = min(1 + sum(size[j] for j in inside[i]), _MOST_VALUES + 1)
            levels[i] = 1 + max((levels[j] for j in inside[i]), default=0)
    except CycleError:
        raise ValueError(f"{name} holds a value that contains itself") from None
    if size[id(root)] > _MOST_VALUES:
        raise ValueError(f"{name} has more than {_MOST_VALUES:,} values, aliases written out")
    if levels[id(root)] > _MOST_LEVELS:
        raise ValueError(f"{name} has {levels[id(root)]:,} levels, more than {_MOST_LEVELS}")
    return list(values.values())
