"""Pytrees of features, and what stands beside them: ids, weights, gradients."""

from collections.abc import Mapping
from typing import Any

import jax

from embax.specs import FeatureSpec


def is_feature(leaf: Any) -> bool:
    """Returns whether a leaf is a FeatureSpec."""
    return isinstance(leaf, FeatureSpec)


def leaves_beside(tree: Any, feature_specs: Any, what: str) -> list[Any]:
    """Returns what ``tree`` has for each feature; ValueError for another structure."""
    try:
        return _beside(feature_specs, tree)
    except (ValueError, TypeError, KeyError) as error:
        structure = jax.tree.structure(feature_specs, is_leaf=is_feature)
        raise ValueError(f"{what} must have the structure of feature_specs, {structure}; {error}") from None


def _beside(specs: Any, tree: Any) -> list[Any]:
    """Returns what stands in ``tree`` where ``specs`` has features; lists and tuples are alike, as are mappings."""
    if isinstance(specs, FeatureSpec):
        return [tree]
    if isinstance(specs, Mapping) and isinstance(tree, Mapping):
        if set(specs) != set(tree):
            raise ValueError(f"it has {sorted(map(str, tree))}")
        return [leaf for key in sorted(specs) for leaf in _beside(specs[key], tree[key])]
    if isinstance(specs, (list, tuple)) and isinstance(tree, (list, tuple)) and len(specs) == len(tree):
        return [leaf for pair in zip(specs, tree, strict=True) for leaf in _beside(*pair)]
    return jax.tree.structure(specs, is_leaf=is_feature).flatten_up_to(tree)
