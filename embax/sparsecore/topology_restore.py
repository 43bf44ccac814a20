"""A step of a SparseCore checkpoint into a model and its optimizer, whatever devices and stacks it was saved from."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from embax.optimizers.base import slot_names
from embax.sparsecore.lib.flax.nnx.embed import SparseCoreEmbed, is_non_embedding_variables
from embax.sparsecore.topology import Layout, Target, layouts_of_proto, layouts_of_stacks, misfits
from embax.sparsecore.topology_files import Path, Step, flat_names, is_table, short
from embax.sparsecore.translation import check_cores, stacks_of


class Place(NamedTuple):
    """A stack of a model.

    Attributes:
      target: its tables.
      parts: its arrays: "table", and the slots by name.
    """

    target: Target
    parts: dict[str, jax.Array]


def layers_of(model: Any, name: str | None = None) -> list[SparseCoreEmbed]:
    """Returns the SparseCoreEmbed layers of a model, at any depth.

    Args:
      model: an NNX module.
      name: None, or an attribute of the model that has to be one.

    Raises:
      ValueError: there is none, or the attribute is not one.
    """
    layers = [node for _, node in nnx.iter_graph(model) if isinstance(node, SparseCoreEmbed)]
    if name is not None and not isinstance(getattr(model, name, None), SparseCoreEmbed):
        raise ValueError(
            f"embedding_layer_name={name!r}: the model's attribute of this name is a "
            f"{type(getattr(model, name, None)).__name__}, and it must be a SparseCoreEmbed; leave the name out and "
            "it is found"
        )
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no SparseCoreEmbed; such checkpoints are for models that have one"
        )
    return layers


def places_of(layers: list[SparseCoreEmbed], feature_specs: Any, num_sc: int) -> dict[str, Place]:
    """Returns the stacks of a model by name.

    Args:
      layers: of the model.
      feature_specs: all of its features.
      num_sc: SparseCores of all devices.

    Raises:
      ValueError: features that are not those of the model, or other SparseCores than they were stacked for.
    """
    stacks = stacks_of(feature_specs)
    check_cores(stacks, None, num_sc)
    targets = layouts_of_stacks(stacks, num_sc)
    held = {name: variables for layer in layers for name, variables in layer.embedding_table.get_value().items()}
    if set(held) != set(targets):
        raise ValueError(
            f"the model has stacks {sorted(held)}, and the feature specs have {sorted(targets)}; give its own"
        )
    made = {}
    for name, (rows, slots) in held.items():
        target = targets[name]
        shape = next(iter(target.layouts.values())).stack_shape
        if rows.shape != shape:
            raise ValueError(
                f'stack "{name}": the model has it in shape {rows.shape}, and the feature specs for {num_sc} '
                f"SparseCores in {shape}; give the feature specs, devices and SparseCores of the model"
            )
        names = slot_names(stacks[name].spec.optimizer)
        made[name] = Place(target, {"table": rows, **dict(zip(names, slots, strict=True))})
    return made


def layer_places(layers: list[SparseCoreEmbed]) -> dict[str, Place]:
    """Returns the stacks of a model as its layers know them."""
    made = {}
    for layer in layers:
        door = layer.door
        made.update(places_of([layer], door.feature_specs, door.shards * door.num_sc))
    return made


def restore(step: Step, model: Any, optimizer: Any, places: Mapping[str, Place], moves: bool) -> None:
    """Puts a step into a model and its optimizer; until all of it is read both stay as they are.

    Args:
      step: of a checkpoint.
      model: an NNX module.
      optimizer: its nnx.Optimizer.
      places: all stacks of the model.
      moves: whether tables may stand elsewhere than in the checkpoint.

    Raises:
      ValueError: what is in the checkpoint is not what is in the model: all of it is listed.
    """
    dense = {
        step.keys.model: nnx.state(model, is_non_embedding_variables),
        step.keys.optimizer: nnx.state(optimizer, nnx.OptState),
    }
    found = misfits(step.proto, {name: place.target for name, place in places.items()})
    found = found or _array_misfits(step, places)
    for key, state in dense.items():
        found += leaf_misfits(step, key, {short(path): leaf for path, leaf in flat_names(state).items()})
    _refuse(step, found, "build model, optimizer and feature specs as they were saved")
    if not moves:
        _refuse(step, _moved(step, places), "restore_cross_topology_checkpoint moves them")
    tables = _tables(step, places)
    states = {key: _leaves(step, key, state) for key, state in dense.items()}
    for layer in layers_of(model):
        layer.embedding_table.set_value(
            {
                name: jax.tree.unflatten(jax.tree.structure(old), list(tables[name].values()))
                for name, old in layer.embedding_table.get_value().items()
            }
        )
    nnx.update(model, states[step.keys.model])
    nnx.update(optimizer, states[step.keys.optimizer])


def leaf_misfits(step: Step, key: str, wanted: Mapping[Path, Any]) -> list[str]:
    """Returns what keeps the leaves of an item, but for tables, from being those of a model, a line each."""
    stored = {path: leaf for path, leaf in step.trees[key].items() if not is_table(path)}
    found = [f"{key} {'/'.join(path)}: the checkpoint has none" for path in wanted if path not in stored]
    found += [
        f"{key} {'/'.join(path)}: it is in the checkpoint, and not wanted" for path in stored if path not in wanted
    ]
    for path in wanted.keys() & stored.keys():
        old, new = _form(stored[path]), _form(wanted[path])
        if old != new:
            found.append(f"{key} {'/'.join(path)}: was {old} and is {new}")
    return sorted(found)


def slot_paths(step: Step, stack: str, names: tuple[str, ...]) -> dict[str, Path] | None:
    """Returns where a stack's rows and slots are in a checkpoint; None where its slots are others than ``names``."""
    parts = dict(step.parts.get(stack, {}))
    table = parts.pop("table", None)
    if table is None or len(parts) != len(names):
        return None
    if set(parts) != set(names):
        if set(parts) != {str(number) for number in range(len(names))}:
            return None
        parts = {name: parts[str(number)] for number, name in enumerate(names)}  # of a plain tuple
    return {"table": table, **{name: parts[name] for name in names}}


class Source:
    """The arrays of a checkpoint's stacks, of which those that are being copied from are in memory."""

    def __init__(self, step: Step, names: Mapping[str, tuple[str, ...]]):
        """Takes the step, and the slots of each table by the table's name."""
        self._step, self._names = step, names
        self.layouts = layouts_of_proto(step.proto)
        self._held: dict[Path, np.ndarray] = {}

    def path(self, table: str, part: str) -> Path:
        """Returns where a part of a table's stack is."""
        paths = slot_paths(self._step, self.layouts[table].stack, self._names[table])
        assert paths is not None  # checked before
        return paths[part]

    def of(self, tables: Any, part: str) -> dict[str, tuple[Layout, np.ndarray]]:
        """Returns the arrays that have a part of some tables; others are let go."""
        paths = {table: self.path(table, part) for table in tables}
        self._held = {path: array for path, array in self._held.items() if path in paths.values()}
        for path in paths.values():
            if path not in self._held:
                array = self._step.read(self._step.keys.model, {path: None})[path]
                self._held[path] = array.reshape(-1, array.shape[-1])
        return {table: (self.layouts[table], self._held[path]) for table, path in paths.items()}


def in_turn(stacks: Mapping[str, Any], source: Source, tables: Any) -> list[tuple[str, str]]:
    """Returns all stacks and their parts so that those of one source follow each other: (stack, part).

    Args:
      stacks: parts by the name of their stack.
      source: where they come from.
      tables: ``stack -> names of its tables``.
    """
    every = [(source.layouts[next(iter(tables(name)))].stack, part, name) for name in stacks for part in stacks[name]]
    return [(name, part) for _, part, name in sorted(every)]


def _tables(step: Step, places: Mapping[str, Place]) -> dict[str, dict[str, jax.Array]]:
    names = {
        table: tuple(part for part in place.parts if part != "table")
        for place in places.values()
        for table in place.target.layouts
    }
    source, made = Source(step, names), {name: dict(place.parts) for name, place in places.items()}
    for name, part in in_turn(made, source, lambda name: places[name].target.layouts):
        target, leaf = places[name].target, places[name].parts[part]
        if _stands(step, name, places[name], source.layouts):
            path = source.path(next(iter(target.layouts)), part)
            made[name][part] = step.read(step.keys.model, {path: leaf})[path]
            continue
        arrays = source.of(target.layouts, part)

        def piece(index: Any, target=target, part=part, arrays=arrays, rows=leaf.shape[0]) -> np.ndarray:
            first, last, _ = index[0].indices(rows)
            return target.piece(part, arrays, (first, last))

        # Waiting keeps a piece from standing in memory twice.
        made[name][part] = jax.block_until_ready(jax.make_array_from_callback(leaf.shape, leaf.sharding, piece))
    return made


def _stands(step: Step, name: str, place: Place, stored: Mapping[str, Layout]) -> bool:
    """Returns whether a stack stands in the checkpoint as it does in the model, and alone."""
    same = all(stored[table] == layout for table, layout in place.target.layouts.items())
    leaf = step.trees[step.keys.model][step.parts[name]["table"]] if same else None
    return leaf is not None and tuple(leaf.shape) == place.parts["table"].shape


def _array_misfits(step: Step, places: Mapping[str, Place]) -> list[str]:
    """Returns arrays of a checkpoint that are not as its proto says, or not what the model has, a line each."""
    stored, found, trees = layouts_of_proto(step.proto), [], step.trees[step.keys.model]
    for place in places.values():
        names = tuple(part for part in place.parts if part != "table")
        for table in place.target.layouts:
            paths = slot_paths(step, stored[table].stack, names)
            if paths is None:
                there = sorted(step.parts.get(stored[table].stack, {}))
                found.append(f'table "{table}": its arrays were {there or "nowhere"} and are {["table", *names]}')
                continue
            for part, path in paths.items():
                shape, dtype = tuple(trees[path].shape), np.dtype(trees[path].dtype)
                rows, width = stored[table].stack_shape
                wanted = place.parts[part]
                row_wise = wanted.shape[1] == 1 and place.parts["table"].shape[1] > 1
                whole = int(np.prod(shape[:-1])), shape[-1]
                if whole != (rows, 1 if row_wise else width):
                    found.append(f'table "{table}": {part} has shape {shape}, and embedding_spec has {(rows, width)}')
                if dtype != wanted.dtype:
                    found.append(f'table "{table}": {part} was {dtype} and is {wanted.dtype}')
    return found


def _moved(step: Step, places: Mapping[str, Place]) -> list[str]:
    stored, found = layouts_of_proto(step.proto), []
    for name, place in places.items():
        for table, layout in place.target.layouts.items():
            if not _stands(step, name, place, stored):
                found.append(f'table "{table}": it stood {_told(stored[table])} and stands {_told(layout)}')
    return found


def _told(layout: Layout) -> str:
    where = f"from row {layout.row_offset}, rotated by {layout.rotation}"
    return f'in stack "{layout.stack}" of shape {layout.stack_shape} on {layout.num_sc} SparseCores {where}'


def _leaves(step: Step, key: str, state: Any) -> Any:
    """Returns a state with the leaves of a checkpoint, bound to devices only where they are in ``state``."""
    from embax.checkpoint.trees import placed_as

    wanted = {short(path): leaf for path, leaf in flat_names(state).items()}
    found = step.read(key, wanted)
    leaves = [placed_as(_as_key(found[path], leaf), leaf) for path, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(state), leaves)


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _as_key(found: Any, wanted: Any) -> Any:
    """Returns a key where one is wanted; a converted checkpoint has its numbers."""
    if not _is_key(wanted) or _is_key(found):
        return found
    return jax.random.wrap_key_data(found, impl=jax.random.key_impl(wanted))


def _form(leaf: Any) -> str:
    if _is_key(leaf):
        leaf = jax.random.key_data(leaf)
    if not hasattr(leaf, "shape"):
        leaf = np.asarray(leaf)
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def _refuse(step: Step, found: list[str], fix: str) -> None:
    if found:
        lines = "\n  ".join(found[:10] + (["..."] if len(found) > 10 else []))
        raise ValueError(f"{step.name}: the checkpoint does not fit:\n  {lines}\n{fix}")
