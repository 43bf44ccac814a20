"""Bytes on the wire of a compiled program, read from its text."""

import math
import re

SIZES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "u16": 2, "s64": 8, "u64": 8, "pred": 1, "u8": 1, "s8": 1}
COLLECTIVE = re.compile(r"= (.*?) (all-gather|reduce-scatter|all-to-all|all-reduce)(?:-start)?\(")
BRANCHES = re.compile(r"(?:branch_computations=\{(.*?)\}|true_computation=%?([\w.-]+), false_computation=%?([\w.-]+))")


def wire_bytes(text: str) -> int:
    """Returns the bytes that one device receives in the collectives of a compiled program.

    Loops are counted once, and of the branches of a condition the one that receives most.
    """
    computations, entry = _computations(text)
    return round(_received(entry, computations))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    found: dict[str, list[str]] = {}
    name = entry = ""
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        header = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line)
        if header:
            name = header[2]
            entry = name if header[1] else entry
            found[name] = []
        elif name:
            found[name].append(line)
    return found, entry


def _received(name: str, computations: dict[str, list[str]]) -> float:
    total = 0.0
    for line in computations.get(name, ()):
        collective, branches = COLLECTIVE.search(line), BRANCHES.search(line)
        if collective:
            total += _of_collective(collective[1], collective[2], line)
        elif branches:
            named = branches[1].split(",") if branches[1] else branches.groups()[1:]
            total += max(_received(part.strip().lstrip("%"), computations) for part in named)
        else:
            called = re.findall(r"(?:body|to_apply|calls)=%?([\w.-]+)", line)
            total += sum(_received(part, computations) for part in called)
    return total


def _of_collective(result: str, kind: str, line: str) -> float:
    shapes = re.findall(r"\b(\w+)\[([\d,]*)\]", result)
    size = sum(SIZES[dtype] * math.prod(int(n) for n in dims.split(",") if n) for dtype, dims in shapes)
    devices = _group(line)
    share = (devices - 1) / devices
    return {"reduce-scatter": size * (devices - 1), "all-reduce": 2 * size * share}.get(kind, size * share)


def _group(line: str) -> int:
    """Returns how many devices take part in a collective."""
    mesh = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line)
    if mesh:  # from jax 0.12 on
        sizes = dict(re.findall(r"'(.*?)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(.*?)'", mesh[2]))
    group = re.search(r"replica_groups=(?:\{\{([\d,]*)\}|\[(\d+),(\d+)\])", line)
    assert group, line
    return len(group[1].split(",")) if group[1] else int(group[3])
