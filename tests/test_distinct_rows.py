"""The distinct rows of a batch: every backend gives what np.unique gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from embax import kernels


def _wanted(ids, rows):
    """Returns unique rows, filled up, and places, by numpy."""
    present = (ids >= 0) & (ids < rows)
    found = np.unique(ids[present])
    room = min(ids.size, rows)
    places = np.where(present, np.searchsorted(found, ids), room)
    return np.append(found, np.full(room - found.size, rows)), places


_RNG = np.random.default_rng(0)
_BIGGEST = 2**31 - 1
CASES = {
    "none": (np.zeros(0, np.int32), 5),
    "no rows": (np.array([0, 1, -1]), 0),
    "one": (np.array([3]), 5),
    "one absent": (np.array([5]), 5),
    "all absent": (_RNG.choice([-1, -(2**31), 7, _BIGGEST], 500), 7),
    "one row": (_RNG.integers(-1, 2, 300), 1),
    "sorted": (np.arange(-3, 400), 390),
    "tiny": (_RNG.integers(-2, 5, 20_000), 3),
    "hot": (np.where(_RNG.random(50_000) < 0.9, 77, _RNG.integers(0, 1000, 50_000)), 1000),
    "many": (_RNG.integers(-10, 1_000_100, 200_000), 1_000_000),
    "biggest": (_RNG.integers(0, _BIGGEST, 20_000), _BIGGEST),
}


@pytest.mark.parametrize("case", CASES)
def test_as_numpy_has_it(backend, case):
    ids, rows = CASES[case]
    ids = np.asarray(ids, np.int32)
    unique, places = jax.jit(kernels.get(backend).distinct_rows, static_argnums=1)(ids, rows)
    wanted_unique, wanted_places = _wanted(ids, rows)
    assert unique.dtype == places.dtype == jnp.int32
    np.testing.assert_array_equal(unique, wanted_unique)
    np.testing.assert_array_equal(places, wanted_places)


def test_inside_of_shard_map_and_loop(backend):
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    find, rows = kernels.get(backend).distinct_rows, 50
    ids = np.random.default_rng(1).integers(0, 60, (2, 40)).astype(np.int32)

    def local(ids):
        def body(carry):
            turn, _, _ = carry
            return turn + 1, *find(ids[0] + 0 * turn, rows)

        start = jax.lax.pcast((jnp.int32(0), jnp.zeros(40, jnp.int32), jnp.zeros(40, jnp.int32)), ("x",), to="varying")
        _, unique, places = jax.lax.while_loop(lambda carry: carry[0] < 3, body, start)
        return unique[None], places[None]

    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    unique, places = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("x"), out_specs=P("x")))(ids)
    for device in range(2):
        wanted_unique, wanted_places = _wanted(ids[device], rows)
        np.testing.assert_array_equal(unique[device], wanted_unique)
        np.testing.assert_array_equal(places[device], wanted_places)
