"""Sparse training in the class form: what of it is static, and where it stands in a step."""

import dataclasses
from typing import Any

import jax
import optax

from cerebras_jax.engine.trees import leaf_paths
from cerebras_jax.sparse.masking import mask_gradients, mask_states, mask_tree, masks
from cerebras_jax.sparse.selection import Sparsity
from cerebras_jax.sparse.transform import sparsify
from cerebras_jax.transforms.grouped import GroupedState


@dataclasses.dataclass(frozen=True)
class Masking:
    """What of sparse training is static.

    Attributes:
      sparsity: which parameters are sparse, and how; None: none are.
      names: pairs of the dotted path of each parameter and its name, which patterns go by.
      states: the states to mask; None: all of the parameter's shape.
    """

    sparsity: Sparsity | None = None
    names: tuple[tuple[str, str], ...] = ()
    states: tuple[str, ...] | None = None

    def around(
        self, tx: optax.GradientTransformation, returns_params: bool = False
    ) -> optax.GradientTransformation:
        """The pair of the groups, made sparse; see `sparsify`."""
        if self.sparsity is None:
            return tx
        return sparsify(
            tx,
            self.sparsity,
            names=dict(self.names),
            states=self.states,
            returns_params=returns_params,
        )

    def before(self, tx: optax.GradientTransformation) -> optax.GradientTransformation:
        """What judges and clips gradients, so that it sees those that the masks leave."""
        return tx if self.sparsity is None else mask_gradients(tx)

    def prune(self, params: Any, state: Any) -> Any:
        """Parameters with zeros where the masks of a state prune."""
        return params if self.sparsity is None else mask_tree(masks(state), params)

    def fitted(self, state: Any, params: Any) -> Any:
        """A state of groups, within whatever wrappers, with a `SparseState` around the groups."""
        treedef, names = jax.tree.structure(params), leaf_paths(params)

        def fit(node: Any) -> Any:
            if not isinstance(node, GroupedState):
                return node
            seen = {name for members in node.names.of_group for name in members}
            pairs = zip(names, jax.tree.leaves(params), strict=True)
            mine = treedef.unflatten([x if n in seen else optax.MaskedNode() for n, x in pairs])
            first: Any = self.around(optax.identity()).init(mine)
            return first._replace(inner=mask_states(node, first.masks, mine, self.states))

        return jax.tree.map(fit, state, is_leaf=lambda x: isinstance(x, GroupedState))
