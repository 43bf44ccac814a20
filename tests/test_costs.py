"""Costs are those of the compiled program; placements chosen by them; the command that prints them."""

import json

import jax
import numpy as np
import pytest
from helpers import feature, line_of, table_spec

import embax
from benchmarks.wire import wire_bytes
from embax.cli import plan as command
from embax.cli.errors import CommandError
from embax.costs import Machine, costs, explain

SAMPLES, VALENCY = 64, 3


def _line(devices, **settings):
    return embax.Devices(line_of(devices), **settings)


def _feature(rows=1000, combiner="mean", dim=16, name="a"):
    return feature(table_spec(name, rows, dim, combiner=combiner), f"of_{name}", (SAMPLES, VALENCY), (SAMPLES, dim))


@pytest.mark.parametrize(
    ("placement", "devices", "settings"),
    [
        ("row", 2, {}),
        ("row", 8, {"exchange": "gather"}),
        ("row", 4, {"exchange": "route"}),
        ("table", 4, {"exchange": "gather", "wire_dtype": "float16"}),
        ("column", 8, {}),
        ("replicated", 4, {}),
    ],
)
@pytest.mark.parametrize("rows", [1000, 40])
def test_bytes_on_the_wire(placement, devices, settings, rows):
    plan = embax.plan(_feature(rows), mesh=_line(devices, **settings), placement=placement)
    tables = embax.init(plan, jax.random.key(0))
    batch = embax.preprocess(plan, np.zeros((SAMPLES, VALENCY), int))
    look = jax.jit(lambda tables, batch: embax.lookup(plan, tables, batch))
    step = jax.jit(lambda tables, residuals, gradients: embax.update(plan, tables, residuals, gradients, 0))
    activations, residuals = look(tables, batch)
    (cost,) = costs(plan)
    compiled = [
        wire_bytes(look.lower(tables, batch).compile().as_text()),
        wire_bytes(step.lower(tables, residuals, activations).compile().as_text()),
    ]
    for predicted, measured in zip((cost.forward, cost.backward), compiled, strict=True):
        assert abs(predicted - measured) <= 0.1 * measured
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tables))
    assert cost.memory == held


def test_placements_chosen():
    features = [_feature(5, name="small"), _feature(1_000_000, name="large"), _feature(10_000, dim=512, name="wide")]
    plan = embax.plan(features, mesh=_line(8), placement="auto")
    chosen = {table.name: stack.placement for stack in plan.stacks for table in stack.tables}
    assert chosen == {"small": "replicated", "large": "row", "wide": "column"}


def test_tables_that_are_stacked_are_placed_together():
    features = [
        _feature(5, dim=16, name="small"),
        _feature(1_000_000, dim=16, name="large"),
        _feature(9, name="odd", dim=3),
    ]
    plan = embax.plan(features, mesh=_line(8), placement="auto", stacks={"both": ["small", "large"]})
    assert {stack.name: stack.placement for stack in plan.stacks} == {"both": "row", "odd": "replicated"}


def test_a_table_that_cannot_be_split_keeps_no_other_from_it():
    features = [_feature(10_000, dim=512, name="wide"), _feature(1_000_000, dim=3, name="odd")]
    plan = embax.plan(features, mesh=_line(8), placement="auto")
    assert {stack.name: stack.placement for stack in plan.stacks} == {"wide": "column", "odd": "row"}


def test_a_table_that_looks_at_whole_rows_is_not_split():
    wide = table_spec("wide", 1_000_000, 512, embax.RowwiseAdagrad(0.1))
    plan = embax.plan(feature(wide, "x", (SAMPLES,), (SAMPLES, 512)), mesh=_line(8), placement="auto")
    assert plan.stacks[0].placement == "row"


def test_explained():
    text = explain(embax.plan(_feature(), mesh=_line(2)), machine=Machine(1e9, 1e9))
    assert text.splitlines()[0].split() == (
        "stack placement exchange memory/device forward backward rows/step estimate".split()
    )
    assert text.splitlines()[1].split()[:3] == ["a", "row", "gather"] and text.splitlines()[2].startswith("all")
    with pytest.raises(ValueError, match="the plan is of one device, which sends nothing; pass mesh="):
        costs(embax.plan(_feature()))


SPEC = {
    "tables": {"item": {"vocabulary_size": 1000, "embedding_dim": 8, "optimizer": "adam"}},
    "features": {"bag": {"table": "item", "valency": 2}, "seen": {"table": "item", "positions": 5}},
}


def _written(tmp_path, spec):
    path = tmp_path / "spec.json"
    path.write_text(spec if isinstance(spec, str) else json.dumps(spec))
    return path


def test_command(tmp_path, capsys):
    command.plan(_written(tmp_path, SPEC), 1024, 65536, "row", "auto", 25.0, 200.0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("1024 devices, 65,536 samples a step") and lines[2].split()[:2] == ["item", "row"]


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("{", "is not JSON"),
        ({"tables": {}}, 'must be {"tables": '),
        ({**SPEC, "tables": {"item": {"embedding_dim": 8}}}, 'table "item" lacks vocabulary_size; it takes combiner'),
        ({**SPEC, "features": {"x": {"table": "user"}}}, "names table 'user', which is not in"),
        ({**SPEC, "features": {"x": {"table": "item", "width": 2}}}, "has unknown width; it takes positions"),
        ({**SPEC, "tables": {"item": {**SPEC["tables"]["item"], "optimizer": "adamw"}}}, "'adamw' must be one of sgd"),
        ({**SPEC, "tables": {"item": {**SPEC["tables"]["item"], "embedding_dim": 0}}}, "embedding_dim"),
    ],
)
def test_specs_that_are_refused(tmp_path, spec, text):
    with pytest.raises(CommandError, match=text):
        command.read_spec(_written(tmp_path, spec))
