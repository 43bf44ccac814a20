"""The one battery: optimizers x combiners x dtypes x input kinds, each against the float64 oracle.

A case is one table with one feature. The tables of one optimizer and dtype share a plan of two stacks, one of
rectangles and one of ragged inputs, so that both ways through a backend are swept and few programs are compiled.
Every step starts the oracle from the very state that embax starts from, so tolerances hold one step's rounding.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pyarrow as pa

import embax

VOCABULARY, DIM, BATCH, VALENCY, POSITIONS = 17, 5, 6, 4, 3
PADDING = -7
EPSILON = {"float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-11}


@dataclasses.dataclass(frozen=True)
class OptimizerCase:
    """An embax optimizer and what the oracle is told: name, hyperparameters by step, modifiers."""

    make: Callable[[], embax.Optimizer]
    oracle_name: str
    hyper: Callable[[int], dict[str, Any]]
    modifiers: dict[str, float] = dataclasses.field(default_factory=dict)


def _case(make, name, modifiers=None, **hyper):
    return OptimizerCase(make, name, lambda step: hyper, modifiers or {})


def _decaying(step):
    return 0.5 / (1.0 + jnp.float32(step))


def _custom_adagrad(gradient, row, accumulator, learning_rate):
    accumulator = accumulator + gradient * gradient
    return row - learning_rate * gradient / jnp.sqrt(accumulator), accumulator


def _optax_adam():
    import optax

    return embax.Optax(transformation=optax.adam(0.05))


ALL = {"row_clip_norm": 0.5, "l2_weight_decay": 0.1, "decoupled_weight_decay": 0.2}
OPTIMIZERS: dict[str, OptimizerCase] = {
    "sgd": _case(lambda: embax.SGD(0.3), "sgd", learning_rate=0.3),
    "sgd_schedule": OptimizerCase(lambda: embax.SGD(_decaying), "sgd", lambda s: {"learning_rate": _decaying(s)}),
    "sgd_modified": _case(lambda: embax.SGD(0.3, **ALL), "sgd", ALL, learning_rate=0.3),
    "adagrad": _case(lambda: embax.Adagrad(0.2), "adagrad", learning_rate=0.2),
    "adagrad_callable": _case(lambda: embax.Adagrad(lambda: 0.2), "adagrad", learning_rate=0.2),
    "rowwise_adagrad": _case(lambda: embax.RowwiseAdagrad(0.2), "rowwise_adagrad", learning_rate=0.2),
    "adagrad_momentum": _case(lambda: embax.AdagradMomentum(0.1), "adagrad_momentum", learning_rate=0.1),
    "adagrad_momentum_nesterov": _case(
        lambda: embax.AdagradMomentum(0.1, momentum=0.8, beta2=0.95, exponent=3.0, use_nesterov=True),
        "adagrad_momentum",
        learning_rate=0.1,
        momentum=0.8,
        beta2=0.95,
        exponent=3.0,
        use_nesterov=True,
    ),
    "adam": _case(lambda: embax.Adam(0.05), "adam", learning_rate=0.05),
    "adam_modified": _case(lambda: embax.Adam(0.05, **ALL), "adam", ALL, learning_rate=0.05),
    "laprop": _case(lambda: embax.LaProp(0.05), "laprop", learning_rate=0.05),
    "ftrl": _case(
        lambda: embax.FTRL(0.1, l1_regularization_strength=0.01, l2_regularization_strength=0.02, beta=0.3),
        "ftrl",
        learning_rate=0.1,
        l1_regularization_strength=0.01,
        l2_regularization_strength=0.02,
        beta=0.3,
    ),
    "ftrl_multiplied": _case(
        lambda: embax.FTRL(0.1, l1_regularization_strength=0.01, multiply_linear_by_learning_rate=True),
        "ftrl",
        learning_rate=0.1,
        l1_regularization_strength=0.01,
        multiply_linear_by_learning_rate=True,
    ),
    "f2a": _case(
        lambda: embax.F2A(0.1, l1_regularization_strength=0.01, l2_regularization_strength=0.02),
        "f2a",
        learning_rate=0.1,
        l1_regularization_strength=0.01,
        l2_regularization_strength=0.02,
    ),
    "custom": _case(
        lambda: embax.Custom(0.2, _custom_adagrad, slot_variable_initializers_tuple=(0.1,)),
        "adagrad",
        learning_rate=0.2,
    ),
    "optax": _case(_optax_adam, "adam", learning_rate=0.05),
}


# ---- input kinds: (rng) -> ids and weights as a user gives them, and as plain samples for the oracle --------------


def _one(rng):
    ids = rng.integers(0, VOCABULARY, BATCH)
    return ids, None, [[i] for i in ids.tolist()], None


def _dense(rng):
    ids = rng.integers(0, VOCABULARY, (BATCH, VALENCY)).astype(np.int32)
    return ids, None, ids.tolist(), None


def _padded(rng):
    ids = rng.integers(0, VOCABULARY, (BATCH, VALENCY))
    ids[rng.random(ids.shape) < 0.3] = PADDING
    return ids, None, *oracle.dense_samples(ids, PADDING, None)


def _weighted(rng):
    ids = rng.integers(0, VOCABULARY, (BATCH, VALENCY))
    weights = rng.uniform(0.0, 2.0, ids.shape).astype(np.float32)
    weights[0] = 0.0
    return ids, weights, ids.tolist(), weights.tolist()


def _sequence(rng):
    lengths = rng.integers(0, POSITIONS + 1, BATCH)
    ids = [rng.integers(0, VOCABULARY, n).tolist() for n in lengths]
    samples = [[row[t]] if t < len(row) else [] for row in ids for t in range(POSITIONS)]
    return ids, None, samples, None


def _sequence_pooled(rng):
    ids = rng.integers(0, VOCABULARY, (BATCH, POSITIONS, VALENCY))
    return ids, None, ids.reshape(-1, VALENCY).tolist(), None


def _bags(rng):
    return [rng.integers(0, VOCABULARY, n).tolist() for n in rng.poisson(2.5, BATCH)]


def _lists(rng):
    ids = _bags(rng)
    return ids, None, ids, None


def _splits(rng):
    bags = _bags(rng)
    values = np.concatenate([np.asarray(b, np.int64) for b in bags])
    weights = rng.uniform(0.1, 2.0, len(values)).astype(np.float32)
    ids = embax.RaggedIds.from_lengths(values, [len(b) for b in bags])
    return ids, weights, bags, oracle.ragged_samples(weights.tolist(), ids.splits)


def _coo(rng):
    bags = _bags(rng)
    pairs = [(s, i) for s, bag in enumerate(bags) for i in bag]
    order = rng.permutation(len(pairs))
    shuffled = np.array(pairs, np.int64).reshape(-1, 2)[order]
    # Within a sample the ids keep the order they are given in.
    samples = [[int(i) for s, i in shuffled if s == sample] for sample in range(BATCH)]
    return embax.CooIds(shuffled[:, 0], shuffled[:, 1], BATCH), None, samples, None


def _arrow(rng):
    bags = _bags(rng)
    return pa.array(bags, pa.list_(pa.int64())), None, bags, None


def _hot(rng):
    bags = [[3] * int(n) for n in rng.integers(0, 9, BATCH)]
    return bags, None, bags, None


RECTANGLES = {
    "one": (_one, (BATCH,), (BATCH, DIM)),
    "dense": (_dense, (BATCH, VALENCY), (BATCH, DIM)),
    "padded": (_padded, (BATCH, VALENCY), (BATCH, DIM)),
    "weighted": (_weighted, (None, VALENCY), (None, DIM)),
    "sequence": (_sequence, (BATCH, POSITIONS), (BATCH, POSITIONS, DIM)),
    "sequence_pooled": (_sequence_pooled, (BATCH, POSITIONS, VALENCY), (BATCH, POSITIONS, DIM)),
}
RAGGED = {kind: (make, (BATCH,), (BATCH, DIM)) for kind, make in (
    ("lists", _lists), ("splits", _splits), ("coo", _coo), ("arrow", _arrow), ("hot", _hot)
)}  # fmt: skip
KINDS = {**RECTANGLES, **RAGGED}
COMBINERS = ("sum", "mean", "sqrtn")
DTYPES = tuple(EPSILON)
CASES = len(OPTIMIZERS) * len(COMBINERS) * len(DTYPES) * len(KINDS)


def plan_of(optimizer: embax.Optimizer, dtype: str, backend: str) -> embax.Plan:
    """One table and feature for every combiner and input kind, in two stacks."""
    features, stacks = {}, {"rectangles": [], "ragged": []}
    for kind, (_, inputs, outputs) in KINDS.items():
        for combiner in COMBINERS:
            name = f"{combiner}_{kind}"
            table = embax.TableSpec(
                name=name,
                vocabulary_size=VOCABULARY,
                embedding_dim=DIM,
                initializer=jax.nn.initializers.normal(1.0),
                optimizer=optimizer,
                combiner=combiner,
                dtype=dtype,
            )
            features[name] = embax.FeatureSpec(
                name=name, table_spec=table, input_shape=inputs, output_shape=outputs, padding_id=PADDING
            )
            stacks["ragged" if kind in RAGGED else "rectangles"].append(name)
    capacity = {name: 64 for name in stacks["ragged"]}
    return embax.plan(features, stacks=stacks, capacity=capacity, backend=backend)


def inputs_of(rng: np.random.Generator):
    """Ids, weights, and the oracle's samples and weights, by feature name."""
    made = {f"{combiner}_{kind}": KINDS[kind][0](rng) for kind in KINDS for combiner in COMBINERS}
    return tuple({name: parts[i] for name, parts in made.items()} for i in range(4))


def close(actual, wanted, epsilon, scale, what):
    """Asserts |actual - wanted| <= a few units of rounding at the size of the numbers that were combined."""
    actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted, np.float64)
    bound = 2 * epsilon * np.abs(wanted) + 64 * 2.0**-23 * scale + 1e-7
    worst = np.max(np.abs(actual - wanted) - bound, initial=-1.0)
    assert worst <= 0, f"{what}: off by {np.max(np.abs(actual - wanted))}, allowed {np.min(bound)}"
