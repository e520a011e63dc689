"""Which schedulers of a recipe drive which numbers of which parameter groups."""

import inspect
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from cerebras_jax.messages import shown
from cerebras_jax.optim.names import rate_key
from cerebras_jax.optim.optimizer import Optimizer
from cerebras_jax.optim.schedule_config import ScheduleConfig
from cerebras_jax.optim.scheduler import group_tags


def drivers(
    schedulers: Sequence[ScheduleConfig], groups: Sequence[Mapping[str, Any]]
) -> list[dict[str, ScheduleConfig]]:
    """For each group, what drives which of its numbers.

    Raises:
      ValueError: if two schedulers drive one number of a group, or one drives nothing.
    """
    result: list[dict[str, ScheduleConfig]] = [{} for _ in groups]
    for config in schedulers:
        mine = [i for i, group in enumerate(groups) if config.drives(group)]
        if not mine:
            tags = sorted({str(tag) for group in groups for tag in group_tags(group)})
            raise ValueError(
                f"{config.where}: param_group_tags {shown(config.param_group_tags)} match no "
                f"parameter group with a {config.key}; the groups' tags are {shown(tags)}"
            )
        for i in mine:
            other = result[i].setdefault(config.key, config)
            if other is not config:
                raise ValueError(
                    f"{other.where} and {config.where} both drive the {config.key} of "
                    f"{shown(groups[i]['params'])}"
                )
    return result


def check_schedulers(
    cls: type[Optimizer], schedulers: Sequence[ScheduleConfig], known: set[str], is_plain: bool
) -> None:
    """Refuses schedulers that no parameters can make right.

    Args:
      cls: the optimizer.
      schedulers: those of a recipe.
      known: the tags that the recipe gives to groups.
      is_plain: whether the optimizer's arguments are all that it has of numbers.
    """
    names = inspect.signature(cls).parameters
    for config in schedulers:
        tags = config.param_group_tags
        key = rate_key(cls) if config.key == "lr" else config.key
        if is_plain and key not in names:
            raise ValueError(f"{config.where}: {cls.__name__} has no {config.key} to schedule")
        if tags is not None and not set(tags) & {*known, None}:
            raise ValueError(
                f"{config.where}: param_group_tags {shown(tags)} are no tags of the optimizer's "
                f"params, which have {shown(sorted(known))}"
            )
    for one, other in itertools.combinations(schedulers, 2):
        a, b = one.param_group_tags, other.param_group_tags
        if one.key == other.key and (a is None or b is None or set(a) & set(b)):
            raise ValueError(
                f"{one.where} and {other.where} both drive the {one.key} of one group; their "
                f"param_group_tags are {shown(a)} and {shown(b)}"
            )
