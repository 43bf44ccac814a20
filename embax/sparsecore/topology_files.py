"""Steps of a SparseCore checkpoint as Orbax has them: items model, optimizer and embedding_spec.

What is in an item is told by the file, and read leaf by leaf: paths are those of the file, without the last "value"
that flax puts behind a variable.
"""

import functools
import os
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from embax.sparsecore.proto_messages import message_class

Path = tuple[str, ...]
TABLES = "embedding_table"  # what SparseCoreEmbed calls its variables


class Keys(NamedTuple):
    """Names of the items of a checkpoint."""

    model: str = "model"
    optimizer: str = "optimizer"
    spec: str = "embedding_spec"


def orbax() -> Any:
    """Returns ``orbax.checkpoint``; ImportError with the remedy where it is not installed."""
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise ImportError(
            "orbax-checkpoint is not installed, and checkpoints need it: pip install 'embax[checkpoint]'"
        ) from error
    return ocp


def manager_of(path: Any, options: Any, keys: Keys) -> Any:
    """Returns an Orbax CheckpointManager of a folder, for items of these names."""
    ocp = orbax()

    class SpecHandler(ocp.ProtoCheckpointHandler):
        """Reads protos of later versions, too: fields that are not known are left out."""

        def restore(self, directory: Any, item: Any = None, args: Any = None) -> Any:
            from google.protobuf import text_format

            text = (directory / "proto.pbtxt").read_text()
            made = (args.item if args is not None else item)()
            return text_format.Parse(text, made, allow_unknown_field=True)

    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    standard, leaves = ocp.StandardCheckpointHandler(), ocp.PyTreeCheckpointHandler()
    spec = SpecHandler("proto.pbtxt")
    for key in (keys.model, keys.optimizer):
        registry.add(key, ocp.args.StandardSave, standard)
        registry.add(key, ocp.args.StandardRestore, standard)
        registry.add(key, ocp.args.PyTreeRestore, leaves)
    registry.add(keys.spec, ocp.args.ProtoSave, spec)
    registry.add(keys.spec, ocp.args.ProtoRestore, spec)
    return ocp.CheckpointManager(absolute(path), options=options, handler_registry=registry)


def reader_of(path: Any, keys: Keys) -> Any:
    """Returns a manager that reads only."""
    return manager_of(path, orbax().CheckpointManagerOptions(read_only=True), keys)


def absolute(path: Any) -> str:
    """Returns a path as Orbax wants it: absolute, unless it is of another file system."""
    text = os.fspath(path)
    return text if "://" in text else os.path.abspath(text)


class Step:
    """A step of a checkpoint.

    Args:
      manager: from ``manager_of``.
      step: None for the newest.
      keys: names of the items.

    Attributes:
      proto: its EmbeddingSpecProto.
      trees: what is in model and optimizer: ``{item: {path: what Orbax tells of the leaf}}``.

    Raises:
      ValueError: no such step, or an item that is not in it.
    """

    def __init__(self, manager: Any, step: int | None, keys: Keys):
        ocp = orbax()
        self._manager, self.keys = manager, keys
        steps = manager.all_steps()
        if not steps:
            raise ValueError(f"{manager.directory}: there is no checkpoint")
        self.number = max(steps) if step is None else step
        if self.number not in steps:
            raise ValueError(f"{manager.directory}: there is no step {step}; there are {sorted(steps)}")
        self.name = f"{manager.directory}, step {self.number}"
        found = manager.item_metadata(self.number)
        for key in keys:
            if key not in found:
                raise ValueError(
                    f'{self.name}: there is no item "{key}"; there are {", ".join(sorted(found))}: give their names '
                    "as they were at save, as model_key, optimizer_key and embedding_spec_key"
                )
        wanted = ocp.args.ProtoRestore(message_class("EmbeddingSpecProto"))
        self.proto = manager.restore(self.number, args=ocp.args.Composite(**{keys.spec: wanted}))[keys.spec]
        self.trees: dict[str, dict[Path, Any]] = {}
        self._full: dict[str, dict[Path, Path]] = {}
        self._items: dict[str, Any] = {}
        for key in (keys.model, keys.optimizer):
            if found[key] is None:
                raise ValueError(f'{self.name}: item "{key}" is not a tree of arrays; it was not saved as model state')
            self._items[key] = found[key].tree
            full = flat_names(found[key].tree)
            self.trees[key] = {short(path): leaf for path, leaf in full.items()}
            self._full[key] = {short(path): path for path in full}

    def read(self, key: str, wanted: Mapping[Path, Any]) -> dict[Path, Any]:
        """Returns leaves of an item.

        Args:
          key: of the item.
          wanted: by path, an array or ShapeDtypeStruct with the sharding to be read to, or None for numpy's arrays.
        """
        if not wanted:
            return {}
        ocp = orbax()

        # Of one who reads a part Orbax wants the whole, with a mark for all that is not read.
        def item(path: Any, _: Any) -> Any:
            name = short(_names(path))
            return ocp.PLACEHOLDER if name not in wanted else 0 if wanted[name] is None else wanted[name]

        def how(path: Any, _: Any) -> Any:
            leaf = wanted.get(short(_names(path)))
            return ocp.RestoreArgs(restore_type=np.ndarray) if leaf is None else _restore_args(leaf)

        whole = self._items[key]
        args = ocp.args.PyTreeRestore(
            item=jax.tree_util.tree_map_with_path(item, whole),
            restore_args=jax.tree_util.tree_map_with_path(how, whole),
        )
        found = self._manager.restore(self.number, args=ocp.args.Composite(**{key: args}))[key]
        leaves = {short(path): leaf for path, leaf in flat_names(found).items()}
        return {path: leaves[path] for path in wanted}

    def sequences(self, key: str) -> set[Path]:
        """Returns where there are lists in an item, by paths as the file has them."""
        return sequences(self._items[key])

    def full(self, key: str, path: Path) -> Path:
        """Returns a path as the file has it."""
        return self._full[key][path]

    @functools.cached_property
    def parts(self) -> dict[str, dict[str, Path]]:
        """Where the arrays of each stack are in the model: "table", and the slots by name.

        Raises:
          ValueError: no embedding tables, or a stack that is there twice.
        """
        places: dict[str, dict[str, Path]] = {}
        seen: dict[str, Path] = {}
        for path in filter(is_table, self.trees[self.keys.model]):
            at = path.index(TABLES) + 1
            name = path[at]
            if seen.setdefault(name, path[:at]) != path[:at]:
                raise ValueError(f'{self.name}: stack "{name}" is there twice, in {seen[name]} and {path[:at]}')
            places.setdefault(name, {})[path[-1]] = path
        if not places:
            raise ValueError(
                f'{self.name}: there are no tables in item "{self.keys.model}": no "{TABLES}" of a SparseCoreEmbed'
            )
        return places


def is_table(path: Path) -> bool:
    """Returns whether a path is that of rows or of a slot of a stack.

    >>> is_table(("embed", "embedding_table", "a", "slot", "accumulator")), is_table(("kernel",))
    (True, False)
    """
    rest = path[path.index(TABLES) + 1 :] if TABLES in path else ()
    return (len(rest) == 2 and rest[1] == "table") or (len(rest) == 3 and rest[1] == "slot")


def short(path: Path) -> Path:
    """Returns a path without the "value" behind a variable.

    >>> short(("embed", "embedding_table", "value", "a", "table")), short(("kernel", "value"))
    (('embed', 'embedding_table', 'a', 'table'), ('kernel',))
    """
    at = path.index(TABLES) + 1 if TABLES in path else 0
    if at and path[at : at + 1] == ("value",) and is_table(path[:at] + path[at + 1 :]):
        return path[:at] + path[at + 1 :]
    return path[:-1] if path[-1] == "value" and len(path) > 1 else path


def flat_names(tree: Any) -> dict[Path, Any]:
    """Returns the leaves of any pytree by the names of their paths, as Orbax writes them."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_names(path): leaf for path, leaf in leaves}


def nested(leaves: Mapping[Path, Any], sequences: Collection[Path] = ()) -> dict[str, Any]:
    """Returns leaves as dicts in dicts, and as lists what is named among ``sequences``.

    >>> nested({("a", "0"): 1, ("a", "1"): 2, ("d",): 3}, {("a",)})
    {'a': [1, 2], 'd': 3}
    """
    made: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = made
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    for path in sorted(sequences, key=len, reverse=True):
        node = made
        for name in path[:-1]:
            node = node[name]
        if path[-1] in node:
            parts = node[path[-1]]
            node[path[-1]] = [parts.get(str(number)) for number in range(1 + max(map(int, parts)))]
    return made


def sequences(tree: Any) -> set[Path]:
    """Returns the paths in a pytree at which there is a list or tuple.

    >>> sequences({"a": [1, 2], "b": 3})
    {('a',)}
    """
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]
    return {_names(path[:at]) for path in paths for at, key in enumerate(path) if hasattr(key, "idx") and at}


def _restore_args(leaf: Any) -> Any:
    return orbax().checkpoint_utils.construct_restore_args(leaf)


def _names(path: Any) -> Path:
    return tuple(_name(key) for key in path)


def _name(key: Any) -> str:
    for field in ("key", "name", "idx"):
        if hasattr(key, field):
            return str(getattr(key, field))
    raise TypeError(f"a path has {key!r}, which has no name in a checkpoint")
