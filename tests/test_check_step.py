"""check_step reads compiled programs: what it finds, what it lets pass, what it asks for."""

import jax
import jax.numpy as jnp
import pytest

import embax


def test_a_copy_a_fill_and_an_addition_are_named():
    state = embax.TableState(jnp.zeros((1000, 4)), ())

    def dense(state, ids):
        return embax.TableState(state.table - jnp.zeros_like(state.table).at[ids].add(0.1), ())

    report = embax.check_step(dense, state, jnp.array([3, 5]), donate_argnums=0)
    assert not report.ok and report.table_sized
    assert all("f32[1000,4]" in found for found in report.table_sized)
    assert str(report).startswith("the step works on whole tables:")
    assert report.table_bytes == 16_000


def test_one_write_passes():
    state = embax.TableState(jnp.zeros((1000, 4)), ())

    def sparse(state, ids):
        return embax.TableState(state.table.at[ids].add(0.1), ())

    report = embax.check_step(jax.jit(sparse, donate_argnums=0), state, jnp.array([3, 5]))
    assert report.ok and report.writes == 1 and report.temp_bytes < 16_000
    assert str(report).startswith("the step touches rows only: 1 in-place writes")


def test_bare_arrays_are_tables_where_they_are_donated():
    def sparse(table, ids):
        return table.at[ids].add(0.1)

    assert embax.check_step(sparse, jnp.zeros((1000, 4)), jnp.array([3]), donate_argnums=0).ok
    with pytest.raises(ValueError, match="there is no TableState or Table among the arguments, and no donated"):
        embax.check_step(sparse, jnp.zeros((1000, 4)), jnp.array([3]))


def test_arithmetic_inside_a_writing_fusion_is_found():
    state = embax.TableState(jnp.zeros((1000, 4)), ())

    def decay(state, row):
        return embax.TableState(jax.lax.dynamic_update_slice(state.table * 0.99, jnp.ones((1, 4)), (row, 0)), ())

    assert not embax.check_step(decay, state, jnp.int32(3), donate_argnums=0).ok


def test_tables_of_any_dtype_are_tables():
    for dtype in (jnp.int32, jnp.int8, jnp.uint16, jnp.float16):
        state = embax.TableState(jnp.zeros((1000, 4), dtype), ())
        report = embax.check_step(lambda s: embax.TableState(s.table * s.table, ()), state, donate_argnums=0)
        assert not report.ok, dtype


def test_shapes_are_enough():
    state = embax.TableState(jax.ShapeDtypeStruct((1000, 4), jnp.bfloat16), ())

    def twice(state):
        return embax.TableState(state.table * jnp.bfloat16(2), ())

    assert not embax.check_step(twice, state, donate_argnums=0).ok
