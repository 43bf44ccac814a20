"""Law: pieces are the rows of a table in their order, and dealt out they are the table that was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import feature, line_of, table_spec
from jax.sharding import AxisType

import embax
from embax import sharded_tables
from embax.exchange.pieces import Part, collect, deal

ROWS = {"a": 101, "b": 38}
DIM = 24

pytestmark = pytest.mark.usefixtures("eight_devices")


def _square():
    mesh = jax.make_mesh((2, 4), ("d", "m"), axis_types=(AxisType.Auto, AxisType.Auto))
    return embax.Devices(mesh, batch_axes="d", table_axes="m")


MESHES = {
    "alone": lambda: None,
    "one": lambda: line_of(1),
    "three": lambda: line_of(3),
    "eight": lambda: line_of(8),
    "square": _square,
}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("placement", ["row", "table", "column", "replicated"])
def test_pieces(mesh, placement):
    settings = {} if mesh == "alone" else {"mesh": MESHES[mesh](), "placement": placement}
    optimizer = embax.RowwiseAdagrad(0.1)
    tables = [table_spec(name, rows, DIM, optimizer, dtype="bfloat16") for name, rows in ROWS.items()]
    plan = embax.plan([feature(table, table.name) for table in tables], stacks={"both": list(ROWS)}, **settings)
    rng = np.random.default_rng(0)
    given = {
        name: {"table": -rng.normal(size=(rows, DIM)).astype(jnp.bfloat16), "accumulator": rng.normal(size=(rows, 1))}
        for name, rows in ROWS.items()
    }
    given["a"]["table"][3, 4] = -0.0
    states, blank = embax.from_arrays(plan, given), embax.init(plan, jax.random.key(0))
    stack = plan.stacks[0]
    specs = sharded_tables.part_specs(stack, plan.devices) if plan.devices else {"table": None, "accumulator": None}
    for name, array, target in (
        ("table", states["both"].table, blank["both"].table),
        ("accumulator", states["both"].slots.accumulator, blank["both"].slots.accumulator),
    ):
        part = Part(stack, plan.devices, specs[name])
        for table in stack.tables:
            wanted = given[table.name][name]
            for size in (16, 30):
                for start in range(0, table.vocabulary_size, part.pieces * size):
                    rows = wanted[start : start + part.pieces * size]
                    pieces = collect(part, size, array, table.row_offset + start)
                    assert pieces.shape == (part.pieces * size, wanted.shape[1])
                    np.testing.assert_array_equal(
                        np.asarray(pieces)[: len(rows)].view(np.uint8), rows.astype(pieces.dtype).view(np.uint8)
                    )
                    if size == 30:
                        target = deal(part, target, pieces, table.row_offset + start, len(rows))
        np.testing.assert_array_equal(np.asarray(target), np.asarray(array))
