"""Ids and weights in every form embax accepts, and what the float64 oracle makes of them.

Samples are nested lists: ``[batch][ids]`` for pooled features and unpooled sequences, ``[batch][positions][ids]``
for pooled sequences. A case plan has three tables of different combiners in one stack, and two features on each: one
with a ``padding_id``, one that drops what is out of range; sequences keep their first or their last positions.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import oracle
import pyarrow as pa
from helpers import table_spec

import embax

ROWS, DIM, BATCH, POSITIONS = 7, 3, 4, 3
PADDING = {"sum": 0, "mean": -1, "sqrtn": 99}  # in the vocabulary, negative, beyond it
SHAPES = {
    "ragged": ((None,), (None, DIM)),
    "wide": ((None, 2), (None, DIM)),
    "sequence": ((None, POSITIONS), (None, POSITIONS, DIM)),
    "pooled sequence": ((None, POSITIONS, 2), (None, POSITIONS, DIM)),
}
DEPTH = {"ragged": 1, "wide": 1, "sequence": 1, "pooled sequence": 2}


def case_features(kind, **settings):
    inputs, outputs = SHAPES[kind]
    features = {}
    for combiner, padding in PADDING.items():
        table = table_spec(combiner, ROWS, DIM, embax.SGD(1.0), combiner)
        for name, own in (
            (f"{combiner} padded", {"padding_id": padding, "truncate": "keep_first"}),
            (f"{combiner} dropping", {"out_of_range": "drop", "truncate": "keep_last"}),
        ):
            features[name] = embax.FeatureSpec(
                name=name, table_spec=table, input_shape=inputs, output_shape=outputs, **{**own, **settings}
            )
    return features


def allowed_ids(spec):
    """The ids that the feature takes on the host, good and absent ones."""
    absent = [-3, ROWS, 120] if spec.out_of_range == "drop" else [PADDING[spec.table_spec.combiner]]
    return [*range(ROWS), *absent]


def case_tables(plan, seed=0):
    rng = np.random.default_rng(seed)
    values = {t.name: rng.normal(size=(ROWS, DIM)).astype(np.float32) for s in plan.stacks for t in s.tables}
    return values, embax.from_arrays(plan, {name: {"table": value} for name, value in values.items()})


# ---- the oracle -------------------------------------------------------------------------------------------


def positions_of(spec, samples):
    """Samples of a feature as the oracle takes them: one list of ids (or weights) per activation."""
    if len(spec.output_shape) == 2:
        return [list(s or ()) for s in samples], 0
    flat, cut = [], 0
    for sample in samples:
        sample = list(sample or ())
        kept = sample[:POSITIONS] if spec.truncate == "keep_first" else sample[-POSITIONS:]
        pooled = len(spec.input_shape) == 3
        cut += sum(len(p or ()) if pooled else 1 for p in sample) - sum(len(p or ()) if pooled else 1 for p in kept)
        flat += [list(p or ()) if pooled else [p] for p in kept] + [[]] * (POSITIONS - len(kept))
    return flat, cut


@dataclasses.dataclass
class Expected:
    activations: np.ndarray
    statistics: tuple  # ids, padding, out_of_range, truncated, bad_weights
    samples: list
    weights: list | None


def expected(spec, table, samples, weights=None):
    flat, truncated = positions_of(spec, samples)
    flat_weights = None if weights is None else positions_of(spec, weights)[0]
    kept, kept_weights, padding, outside = [], [], 0, 0
    for index, ids in enumerate(flat):
        good = [i for i, id_ in enumerate(ids) if id_ != spec.padding_id and 0 <= id_ < ROWS]
        padding += sum(id_ == spec.padding_id for id_ in ids)
        outside += sum(id_ != spec.padding_id and not 0 <= id_ < ROWS for id_ in ids)
        kept.append([ids[i] for i in good])
        if flat_weights is not None:
            kept_weights.append([flat_weights[index][i] for i in good])
    kept_weights = None if weights is None else kept_weights
    activations = oracle.pool(table, kept, kept_weights, spec.table_spec.combiner)
    shape = (len(samples), *spec.output_shape[1:])
    counts = (sum(map(len, kept)), padding, outside, truncated, 0)
    return Expected(activations.reshape(shape), counts, kept, kept_weights)


def check(features, plan, batch, ids, weights=None, seed=0):
    """Asserts that lookup gives the oracle's activations, and that the statistics count what they say."""
    values, tables = case_tables(plan, seed)
    activations, _ = embax.lookup(plan, tables, batch)
    for index, (name, spec) in enumerate(sorted(features.items())):
        wanted = expected(spec, values[spec.table_spec.name], ids[name], None if weights is None else weights[name])
        np.testing.assert_allclose(activations[name], wanted.activations, rtol=1e-5, atol=1e-5, err_msg=name)
        assert tuple(int(count[0, index]) for count in batch.statistics) == wanted.statistics, name


# ---- the forms --------------------------------------------------------------------------------------------


def objects(rows):
    array = np.empty(len(rows), object)
    for i, row in enumerate(rows):
        array[i] = row
    return array


def deep(rows, depth, leaf, node=list):
    """Rebuilds nested lists: ``leaf`` makes the innermost ones, ``node`` the others."""
    return leaf(rows) if depth == 0 else node([deep(row or [], depth - 1, leaf, node) for row in rows])


def joined(rows):
    return [value for row in rows for value in row or ()]


def ragged(rows, depth, dtype, make):
    inner = np.asarray(joined(rows), dtype) if depth == 1 else ragged(joined(rows), depth - 1, dtype, make)
    return make(inner, [len(row or ()) for row in rows])


def _from_splits(values, lengths):
    return embax.RaggedIds(values, np.concatenate([[0], np.cumsum(lengths, dtype=np.int32)]).astype(np.uint16))


def _jax_ragged(values, lengths):
    splits = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(jnp.asarray(lengths, jnp.int32))])
    return embax.RaggedIds(values if isinstance(values, embax.RaggedIds) else jnp.asarray(values), splits)


def _arrow_type(dtype, depth, list_type=pa.list_):
    kind = pa.from_numpy_dtype(dtype)
    for _ in range(depth):
        kind = list_type(kind)
    return kind


def _arrow(rows, depth, dtype, list_type=pa.list_):
    return pa.array(rows, _arrow_type(dtype, depth, list_type))


def _sliced(rows, depth, dtype):
    extra = [[1]] if depth == 1 else [[[1]]]
    return _arrow([*extra, *rows, *extra], depth, dtype).slice(1, len(rows))


def _chunked(rows, depth, dtype):
    return pa.chunked_array([_arrow(part, depth, dtype) for part in (rows[:1], [], rows[1:])])


def coo(rows, dtype):
    """CooIds in an order that mixes the samples and keeps the order within each."""
    entries = [(i, s, value) for s, row in enumerate(rows) for i, value in enumerate(row or ())]
    entries.sort(key=lambda e: (e[0], -e[1]))
    samples, values = np.array([e[1] for e in entries], np.int64), np.array([e[2] for e in entries], dtype)
    return embax.CooIds(samples, values, len(rows))


# Each takes (rows, depth, dtype); all give one and the same batch.
FORMS = {
    "lists": lambda r, d, t: deep(r, d, list),
    "tuples": lambda r, d, t: deep(r, d, tuple, tuple),
    "None rows": lambda r, d, t: [row or None for row in r],
    "arrays": lambda r, d, t: deep(r, d, lambda x: np.asarray(x, t)),
    "JAX arrays": lambda r, d, t: deep(r, d, lambda x: jnp.asarray(np.asarray(x, t))),
    "arrays and lists": lambda r, d, t: [deep(x or [], d - 1, (np.array, list)[i % 2]) for i, x in enumerate(r)],
    "objects": lambda r, d, t: deep(r, d, list, objects),
    "objects of arrays": lambda r, d, t: deep(r, d, lambda x: np.asarray(x, t), objects),
    "object rows": lambda r, d, t: deep(r, d, objects),
    "NumPy scalars": lambda r, d, t: deep(r, d, lambda x: [np.dtype(t).type(v) for v in x]),
    "0-d arrays": lambda r, d, t: deep(r, d, lambda x: [np.asarray(v, t) for v in x]),
    "RaggedIds": lambda r, d, t: ragged(r, d, t, _from_splits),
    "RaggedIds of lengths": lambda r, d, t: ragged(r, d, t, embax.RaggedIds.from_lengths),
    "RaggedIds of JAX arrays": lambda r, d, t: ragged(r, d, t, _jax_ragged),
    "RaggedIds of lists": lambda r, d, t: embax.RaggedIds(
        joined(r) if d == 1 else deep(joined(r), d - 1, list), [0, *np.cumsum([len(x or ()) for x in r]).tolist()]
    ),
    "Arrow lists": _arrow,
    "Arrow large lists": lambda r, d, t: _arrow(r, d, t, pa.large_list),
    "Arrow list views": lambda r, d, t: _arrow(r, d, t, pa.list_view),
    "Arrow null lists": lambda r, d, t: _arrow([row or None for row in r], d, t),
    "Arrow slice": _sliced,
    "Arrow chunks": _chunked,
    "Arrow rows": lambda r, d, t: [_arrow(row or [], d - 1, t) for row in r],
}
