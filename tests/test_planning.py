"""Plans: frozen, hashable snapshots; stacks; names; refusals."""

import dataclasses
import pickle

import jax
import pytest
from helpers import feature, table_spec

import embax
from embax.stacking import MAX_STACK_ROWS
from embax.table_state import table_key


def test_equal_specs_make_equal_plans():
    initializer = jax.nn.initializers.zeros
    one, two = (embax.plan({"x": feature(table_spec(initializer=initializer), "x")}) for _ in range(2))
    assert one == two and hash(one) == hash(two)
    other = embax.plan({"x": feature(table_spec(initializer=initializer, rows=51), "x")})
    assert other != one
    calls = []
    traced = jax.jit(lambda plan: calls.append(plan) or 0, static_argnums=0)
    traced(one), traced(two)
    assert len(calls) == 1


def test_a_kept_hash_does_not_travel():
    plan = embax.plan(feature(table_spec(initializer=jax.nn.initializers.zeros)))
    hash(plan)
    assert "_hash" in vars(plan) and "_hash" not in plan.__getstate__()


def test_a_plan_is_a_snapshot():
    table = table_spec()
    plan = embax.plan(feature(table))
    table.vocabulary_size = 7
    assert plan.stacks[0].rows == 50
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.backend = "cpu"


def test_tables_are_stacked_where_they_agree():
    tables = [
        table_spec("a", rows=3),
        table_spec("b", rows=5, combiner="mean"),
        table_spec("wide", dim=8),
        table_spec("half", dtype="bfloat16"),
        table_spec("other", optimizer=embax.SGD(0.1)),
        table_spec("c", rows=2),
    ]
    plan = embax.plan([feature(t, t.name) for t in tables])
    assert [s.name for s in plan.stacks] == ["a_b_c", "wide", "half", "other"]
    assert [(t.name, t.row_offset) for t in plan.stacks[0].tables] == [("a", 0), ("b", 3), ("c", 8)]
    assert plan.stacks[0].rows == 10
    none = embax.plan([feature(t, t.name) for t in tables], stacks="none")
    assert len(none.stacks) == 6
    stack, planned = plan.table("c")
    assert (stack.name, planned.row_offset) == ("a_b_c", 8)


def test_a_stack_never_outgrows_int32():
    tables = [table_spec(n, rows=1_500_000_000, dim=1) for n in "ab"] + [table_spec("c", rows=600_000_000, dim=1)]
    plan = embax.plan([feature(t, t.name) for t in tables])
    assert [[t.name for t in s.tables] for s in plan.stacks] == [["a", "c"], ["b"]]
    assert all(s.rows <= MAX_STACK_ROWS for s in plan.stacks)


def test_long_names_are_shortened_with_a_hash():
    plan = embax.plan([feature(table_spec(f"a_rather_long_table_name_{i}"), f"f{i}") for i in range(4)])
    name = plan.stacks[0].name
    assert len(name) == 50 + 3 + 12 and name[50:53] == "..."


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: embax.plan({}), "plan: there are no features; pass at least one FeatureSpec"),
        (lambda: embax.plan({"x": 3}), "plan: 3 is not a FeatureSpec"),
        (lambda: embax.plan([feature(table_spec())] * 2), 'plan: two features are named "history"'),
        (
            lambda: embax.plan([feature(table_spec(), "x"), feature(table_spec(rows=51), "y")]),
            'plan: feature "y" brings another table named "item" with other settings; share one TableSpec',
        ),
        (
            lambda: embax.plan(feature(table_spec(rows=2**31, dim=1))),
            'table "item": vocabulary_size 2147483648 is above 2147483646, the most rows that one device can number',
        ),
        (lambda: embax.plan(feature(table_spec()), stacks="some"), 'plan: stacks=\'some\' must be "auto", "none"'),
        (lambda: embax.plan(feature(table_spec()), stacks={"s": ["user"]}), 'stack "s" names table "user", which no'),
        (lambda: embax.plan(feature(table_spec()), stacks={"s": []}), 'plan: stack "s" has no tables'),
        (lambda: embax.plan(feature(table_spec()), stacks={"s": ["item", "item"]}), 'table "item" is in two stacks'),
        (
            lambda: embax.plan(
                [feature(table_spec("a"), "x"), feature(table_spec("b", dim=3), "y")], stacks={"s": ["a", "b"]}
            ),
            'stack "s" cannot hold tables "a" and "b": they differ in embedding_dim, dtype, optimizer, quantization',
        ),
        (
            lambda: embax.plan([feature(table_spec("a"), "x"), feature(table_spec("b"), "y")], stacks={"b": ["a"]}),
            'plan: two stacks would be named "b"; rename a table, or name the stacks',
        ),
        (
            lambda: embax.plan(feature(table_spec()), capacity={"x": 3}),
            'plan: capacity names feature "x", which is not',
        ),
        (
            lambda: embax.plan(feature(table_spec()), capacity={"history": 0}),
            'capacity of feature "history" is 0; it must',
        ),
    ],
)
def test_refusals_name_the_thing_the_rule_and_the_fix(make, text):
    with pytest.raises((ValueError, TypeError)) as error:
        make()
    assert text in str(error.value)


def test_unknown_names_list_the_known():
    plan = embax.plan(feature(table_spec()))
    with pytest.raises(KeyError, match="no table 'user'; the plan has 'item'"):
        plan.table("user")


def test_table_keys_differ_by_name():
    key = jax.random.key(0)
    keys = {tuple(jax.random.key_data(table_key(key, name)).tolist()) for name in ("a", "b", "ab", "ba")}
    assert len(keys) == 4


def test_specs_without_callables_can_be_pickled():
    config = embax.QuantizationConfig(min_value=0.0, max_value=1.0, num_buckets=4)
    for value in (config, embax.Adagrad(0.1), embax.FTRL()):
        assert pickle.loads(pickle.dumps(value)) == value
