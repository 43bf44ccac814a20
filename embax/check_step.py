"""Does a training step touch only what its batch touches? Asked of the compiled program itself."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax

# What may have the shape of a table without moving one: names, and the loops and calls that pass it through.
_FREE = {
    "parameter",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "call",
    "conditional",
    "opt-barrier",
    "domain",
}
# One write of the touched rows, in place.
_WRITES = {"scatter", "dynamic-update-slice"}
_INSTRUCTION = re.compile(
    r"^\s*(ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>\([^=]*?\)|\S+) (?P<op>[\w\-]+)\((?P<rest>.*)$"
)
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.\-]+) .*\{$")
_HLO_LETTERS = {"float": "f", "bfloat": "bf", "int": "s", "uint": "u"}


@dataclasses.dataclass(frozen=True)
class StepReport:
    """What ``check_step`` found.

    Attributes:
      table_sized: instructions of a table's shape that are neither names nor in-place writes, as ``op name shape``.
      writes: in-place writes of table-shaped arrays (one for each table and slot is what a step needs).
      temp_bytes: memory that the program takes besides arguments and results.
      table_bytes: the tables and slots it was given.
    """

    table_sized: tuple[str, ...]
    writes: int
    temp_bytes: int
    table_bytes: int

    @property
    def ok(self) -> bool:
        """True if nothing of a table's shape is computed or copied; ``temp_bytes`` is for the reader to judge."""
        return not self.table_sized

    def __str__(self):
        verdict = "touches rows only" if self.ok else "works on whole tables"
        lines = [f"the step {verdict}: {self.writes} in-place writes, {self.temp_bytes:,} bytes of temporaries beside"]
        lines[0] += f" {self.table_bytes:,} bytes of tables"
        return "\n".join([*lines, *(f"  {found}" for found in self.table_sized)])


def check_step(function: Callable, *args: Any, donate_argnums: int | tuple[int, ...] = (), **kwargs: Any) -> StepReport:
    """Compiles a training step and reports the operations in it that are as large as a table.

    Nothing runs. Tables are those of any ``TableState``, ``embax.Table``, layer or optimizer state among the arguments;
    without one, any two-dimensional array among the donated arguments.

    Args:
      function: the step, jitted (with its own donation) or plain.
      *args: arguments it is called with, or ``jax.ShapeDtypeStruct`` of them.
      **kwargs: likewise.
      donate_argnums: for a plain function, the arguments to donate (the tables).

    Returns:
      A StepReport; ``print`` it, or ``assert report.ok``.

    >>> import jax, jax.numpy as jnp, embax
    >>> state = embax.TableState(jnp.zeros((1000, 4)), ())
    >>> def dense(state, ids):
    ...     return embax.TableState(state.table - jnp.zeros_like(state.table).at[ids].add(0.1), ())
    >>> embax.check_step(dense, state, jnp.array([3, 5]), donate_argnums=0).ok
    False
    """
    jitted = function if hasattr(function, "lower") else jax.jit(function, donate_argnums=donate_argnums)
    compiled = jitted.lower(*args, **kwargs).compile()
    arrays = _table_arrays((args, kwargs))
    if not arrays:
        chosen = (donate_argnums,) if isinstance(donate_argnums, int) else donate_argnums
        arrays = [leaf for i in chosen for leaf in jax.tree.leaves(args[i]) if getattr(leaf, "ndim", 0) == 2]
    if not arrays:
        raise ValueError(
            "check_step: there is no TableState or Table among the arguments, and no donated two-dimensional array; "
            "pass the tables as arguments of the step"
        )
    shapes = set().union(*(_hlo_shapes(array) for array in arrays))
    found, writes = _inspect(compiled.as_text() or "", shapes)
    memory = compiled.memory_analysis()
    sizes = [int(array.size) * array.dtype.itemsize for array in arrays]
    temporaries = int(getattr(memory, "temp_size_in_bytes", -1))
    return StepReport(tuple(found), writes, temporaries, sum(sizes))


def _table_arrays(tree: Any) -> list[Any]:
    # What holds a table or slots says so: TableState, embax.Table, the state of an optimizer, variables of a layer.
    owners = jax.tree.leaves(tree, is_leaf=lambda x: hasattr(x, "table_arrays"))
    return [array for owner in owners if hasattr(owner, "table_arrays") for array in owner.table_arrays()]


def _hlo_shapes(array: Any) -> set[str]:
    """Returns how HLO writes the array's shape; layers are also seen as one table."""
    wholes = {tuple(array.shape)}
    if getattr(array, "sharding", None) is not None:
        wholes.add(array.sharding.shard_shape(tuple(array.shape)))  # a program on a mesh has one device's shapes
    shapes = wholes | {(math.prod(shape[:-1]), shape[-1]) for shape in wholes}
    return {_hlo_shape(jax.ShapeDtypeStruct(shape, array.dtype)) for shape in shapes}


def _hlo_shape(array: Any) -> str:
    dtype = str(array.dtype)
    letters = dtype.rstrip("0123456789")
    return f"{_HLO_LETTERS.get(letters, letters)}{dtype[len(letters) :]}[{','.join(map(str, array.shape))}]"


def _inspect(text: str, shapes: set[str]) -> tuple[list[str], int]:
    """Returns the offending instructions and the number of in-place writes of an optimized HLO module."""
    computation, fused = "", _fused_computations(text)
    roots: dict[str, str] = {}
    instructions = []
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if header := _COMPUTATION.match(line):
            computation = header["name"]
        elif match := _INSTRUCTION.match(line):
            if match[1]:
                roots[computation] = match["op"]
            instructions.append((computation, match))
    found, writes = [], 0
    for computation, match in instructions:
        shape = match["shape"].partition("{")[0]
        op = match["op"]
        if op == "custom-call":
            ours, stray = _call_results(match, shapes)
            writes += ours
            found += [f"{op} {match['name']} {shape}" for shape in stray]
            continue
        if shape not in shapes or op in _FREE:
            continue
        if computation in fused:
            # Arithmetic on a whole table may hide in a fusion that ends in a write.
            if roots.get(computation) in _WRITES and op not in _WRITES:
                found.append(f"{op} {match['name']} {shape}")
            continue
        if op == "fusion":
            called = re.search(r"calls=%?([\w.\-]+)", match["rest"])
            op = roots.get(called[1], op) if called else op
        if op in _WRITES:
            writes += 1
        elif op not in _FREE:
            found.append(f"{op} {match['name']} {shape}")
    return found, writes


def _call_results(match: re.Match, shapes: set[str]) -> tuple[int, list[str]]:
    """Returns how many results of a native call are tables written in place, and the shapes of copies."""
    results = re.findall(r"\w+\[[\d,]*\]", match["shape"])
    aliased = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", match["rest"])
    in_place = set(re.findall(r"\{(\d*)\}: \(", aliased[1])) if aliased else set()
    alone = not match["shape"].startswith("(")
    tables = [(("" if alone else str(index)) in in_place, shape) for index, shape in enumerate(results)]
    tables = [(ours, shape) for ours, shape in tables if shape in shapes]
    return sum(ours for ours, _ in tables), [shape for ours, shape in tables if not ours]


def _fused_computations(text: str) -> set[str]:
    """Returns the computations inside fusions: they have no memory of their own, only their root has."""
    return set(re.findall(r"fusion\(.*calls=%?([\w.\-]+)", text))
