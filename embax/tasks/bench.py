"""One training step of some tables on this machine: embax's backends beside dense gradients and optax.

Every contender starts from the same rows, takes the same batches, and holds its own tables, which are donated. Ids
follow a power law like Zipf's; the loss is linear in the activations. Before anything is timed each takes one step, and
the rows that it touched are compared. Contenders then take turns of a few steps, as steps follow each other in
training; the first turn is not counted, nor the first step of any, for it finds the caches full of another's tables.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import embax
from embax import kernels
from embax.planning import FeaturePlan, StackPlan

BATCHES = 4
STEPS = 4  # of a turn that are counted
LONGEST = 8  # ids of a sample, where the specification leaves the number open
DENSE = "dense + optax"
GB = 1e9
# A difference that is left to rounding: this part of what a step changed, and so many last places of the number.
TOLERANCE, LAST_PLACES = 1e-3, 4
_INITIALIZER = jax.nn.initializers.uniform(0.01)


class BenchError(Exception):
    """The measurement cannot be made, or its contenders disagree; the text says which."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
      batch_size: samples of a step.
      turns: of every contender, of ``STEPS`` counted steps each.
      seed: of ids and initial rows.
      exponent: of the law of the ids: the r-th most frequent has a frequency like r ** -exponent; 0 for all alike.
      max_bytes: that all contenders together may hold in tables, slots and dense gradients.
    """

    batch_size: int = 8192
    turns: int = 5
    seed: int = 0
    exponent: float = 1.05
    max_bytes: float = 4 * GB


class Peer(NamedTuple):
    """What optax has for one of embax's optimizers; ``same`` if it steps touched rows alike in the first step."""

    make: Callable[[Any], optax.GradientTransformation]
    same: bool
    text: str


@dataclasses.dataclass
class Contender:
    """One who trains: its state, its jitted step, and what it makes of ids on the host."""

    name: str
    bytes: int
    state: Any
    prepare: Callable[[Sequence[Any]], Any]
    step: Callable[[Any, Any, Any], tuple[Any, jax.Array]]
    rows_of: Callable[[Any, str, np.ndarray], jax.Array]
    batches: list[Any] = dataclasses.field(default_factory=list)
    host_seconds: list[float] = dataclasses.field(default_factory=list)
    step_seconds: list[float] = dataclasses.field(default_factory=list)

    def take_step(self, number: int, targets: Any) -> float:
        """Takes a step on a batch, waits for its end, and returns the loss."""
        batch = self.batches[number % len(self.batches)]
        self.state, loss = jax.block_until_ready(self.step(self.state, batch, targets))
        return float(loss)

    def rows(self, table: str, ids: np.ndarray) -> np.ndarray:
        """Returns rows of a table as they are now, in float32."""
        return np.asarray(self.rows_of(self.state, table, ids), np.float32)


class Measured(NamedTuple):
    """What a run gave: who took part, who was left out and why, mean ids of a step, rows compared with the peer's."""

    plan: embax.Plan
    contenders: list[Contender]
    left_out: dict[str, str]
    ids_a_step: float
    rows_compared: int


def run(features: Sequence[embax.FeatureSpec], settings: Settings) -> Measured:
    """Returns every contender with its times.

    Raises:
      BenchError: the tables are larger than ``settings.max_bytes``, or results after one step differ.
      ValueError: the features make no plan.
    """
    # Rows that differ, so that a lookup of the wrong one is seen.
    tables = [dataclasses.replace(feature.table_spec, initializer=_INITIALIZER) for feature in features]
    features = [dataclasses.replace(f, table_spec=t) for f, t in zip(features, tables, strict=True)]
    plan = embax.plan(features)
    contenders, left_out = _contenders(features, settings)
    rng = np.random.default_rng(settings.seed)
    batches = [[draw(f, settings, rng) for f in plan.features] for _ in range(BATCHES)]
    targets = [_target(plan, f, settings.batch_size, rng) for f in plan.features]
    for contender in contenders:
        contender.batches = [jax.device_put(contender.prepare(batch)) for batch in batches]
    compared = check(contenders, plan, batches[0], targets)
    take_turns(contenders, batches, targets, settings.turns)
    ids = sum(_values(ids).size for batch in batches for ids in batch)
    return Measured(plan, contenders, left_out, ids / BATCHES, compared)


def zipf_ids(rows: int, shape: Any, exponent: float, rng: np.random.Generator) -> np.ndarray:
    """Returns ids below ``rows`` whose frequencies fall by a power law of their rank; frequent ids lie anywhere."""
    uniform, power = rng.random(shape), 1.0 - exponent
    # The law's distribution function over real numbers from 1 to rows + 1, inverted: no table of all rows is needed.
    if abs(power) < 1e-9:
        value = (rows + 1.0) ** uniform
    else:
        value = (1.0 + uniform * ((rows + 1.0) ** power - 1.0)) ** (1.0 / power)
    rank = np.minimum(value.astype(np.int64) - 1, rows - 1)
    stride = int(0.618 * rows) + 1
    while math.gcd(stride, rows) != 1:
        stride += 1
    return (rank * stride % rows).astype(np.int32)


def draw(feature: FeaturePlan, settings: Settings, rng: np.random.Generator) -> Any:
    """Returns the ids of one feature for a batch: a rectangle, or lists of 0 to ``LONGEST``."""
    ids = functools.partial(zipf_ids, feature.table.vocabulary_size, exponent=settings.exponent, rng=rng)
    if feature.valency is not None or not feature.pooled:
        return ids(shape=feature.input_shape(settings.batch_size))
    # As many ids in every batch: nothing is compiled twice, and steps have the same work.
    lengths = rng.permutation(LONGEST - np.arange(settings.batch_size) % (LONGEST + 1))
    return embax.RaggedIds.from_lengths(ids(shape=lengths.sum()), lengths)


def _values(ids: Any) -> np.ndarray:
    return ids.values if isinstance(ids, embax.RaggedIds) else np.ravel(ids)


def _target(plan: embax.Plan, feature: FeaturePlan, samples: int, rng: np.random.Generator) -> jax.Array:
    """Returns the gradient of the loss with respect to a feature's activations.

    All of it is positive: sums over the many occurrences of a row then do not cancel, and rounding stays small.
    """
    shape = (samples, *feature.positions, plan.stack(feature.stack).embedding_dim)
    return jnp.asarray(rng.uniform(0.005, 0.015, shape), jnp.float32)


def _loss(activations: Sequence[jax.Array], targets: Sequence[jax.Array]) -> jax.Array:
    parts = [(a.astype(jnp.float32) * t).sum() for a, t in zip(activations, targets, strict=True)]
    return jnp.stack(parts).sum()


def _contenders(features: Sequence[embax.FeatureSpec], settings: Settings) -> tuple[list[Contender], dict[str, str]]:
    """Returns who fits into the memory, the best backend first, then the peer; and the reasons why others do not."""
    reasons = {name: kernels.get(name).unavailable() for name in kernels.REGISTRY}
    left_out = {f"embax {name}": why_not for name, why_not in reasons.items() if why_not is not None}
    best, *others = [embax.plan(features, backend=name) for name, why_not in reasons.items() if why_not is None]
    own, limit = sum(map(_stack_bytes, best.stacks)), f"and --max-memory is {_gb(settings.max_bytes)}"
    if own > settings.max_bytes:
        raise BenchError(f"the tables and slots take {_gb(own)}, {limit}; raise it, or make the tables smaller")
    first = _sparse(best, settings.seed)
    found, held = [first], own
    wanted = [(DENSE, _dense_bytes(best)[1], lambda: _dense(best, first))]
    wanted += [(f"embax {plan.backend}", own, functools.partial(_sparse, plan, settings.seed)) for plan in others]
    for name, needed, make in wanted:
        if held + needed > settings.max_bytes:
            what = "tables, slots and dense gradients" if name == DENSE else "tables and slots"
            left_out[name] = f"its {what} take {_gb(needed)} beside {_gb(held)} of others, {limit}"
        else:
            found.append(make())
            held += needed
    return sorted(found, key=lambda c: c.name == DENSE), left_out


def _sparse(plan: embax.Plan, seed: int) -> Contender:
    """Returns embax's contender for the backend of ``plan``."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, batch, targets):
        tables, count = state
        activations, residuals = embax.lookup(plan, tables, batch)
        loss, gradients = jax.value_and_grad(_loss)(activations, targets)
        return (embax.update(plan, tables, residuals, gradients, count), count + 1), loss

    def rows_of(state, table, ids):
        stack, planned = plan.table(table)
        return state[0][stack.name].table[ids + planned.row_offset]

    state = embax.init(plan, jax.random.key(seed)), jnp.zeros((), jnp.int32)
    prepare = functools.partial(embax.preprocess, plan)
    return Contender(f"embax {plan.backend}", sum(map(_stack_bytes, plan.stacks)), state, prepare, step, rows_of)


def _dense(plan: embax.Plan, first: Contender) -> Contender:
    """Returns the peer: what flax's Embed does (``jnp.take``), dense gradients, and a transformation of optax."""
    pools = [_dense_pool(plan, feature) for feature in plan.features]
    optimizers = {name: peer_of(stack).make(stack.optimizer) for name, stack in _tables(plan).items()}
    tables = {}
    for name, stack in _tables(plan).items():
        planned, whole = plan.table(name)[1], first.state[0][stack.name].table
        # A copy even where the table is the whole stack, for both are donated.
        tables[name] = jnp.copy(whole[planned.row_offset : planned.row_offset + planned.vocabulary_size])

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, batch, targets):
        def loss_fn(tables):
            return _loss([pool(tables, ids) for pool, ids in zip(pools, batch, strict=True)], targets)

        tables, slots = state
        loss, gradients = jax.value_and_grad(loss_fn)(tables)
        new_tables, new_slots = {}, {}
        for name, optimizer in optimizers.items():
            changes, new_slots[name] = optimizer.update(gradients[name], slots[name], tables[name])
            new_tables[name] = optax.apply_updates(tables[name], changes)
        return (new_tables, new_slots), loss

    def prepare(batch):
        return [_dense_ids(feature, ids) for feature, ids in zip(plan.features, batch, strict=True)]

    state = tables, {name: optimizers[name].init(table) for name, table in tables.items()}
    return Contender(DENSE, _dense_bytes(plan)[0], state, prepare, step, lambda state, table, ids: state[0][table][ids])


def _dense_ids(feature: FeaturePlan, ids: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns a rectangle of ids; of lists, a rectangle of the longest and its gains, 0 where no id is."""
    if not isinstance(ids, embax.RaggedIds):
        return ids, None
    lengths = np.diff(ids.splits)
    present = np.arange(LONGEST) < lengths[:, None]
    filled = np.zeros(present.shape, np.int32)
    filled[present] = ids.values
    gains = _gain(feature.table.combiner, np.maximum(lengths, 1))
    return filled, (present * np.reshape(gains, (-1, 1))).astype(np.float32)


def _gain(combiner: str, count: Any) -> Any:
    """Returns the gain of each of ``count`` ids of a sample."""
    return count ** {"sum": 0.0, "mean": -1.0, "sqrtn": -0.5}[combiner]


def _dense_pool(plan: embax.Plan, feature: FeaturePlan) -> Callable[[Any, Any], jax.Array]:
    """Returns a function of all tables and a feature's ids that gives its activations."""
    dtype, gain = plan.stack(feature.stack).dtype, 1.0
    if feature.valency is not None:
        gain = float(_gain(feature.table.combiner, feature.valency))

    def pool(tables, given):
        ids, gains = given
        rows = jnp.take(tables[feature.table.name], ids, axis=0)
        if not feature.pooled:
            return rows
        rows = rows.astype(jnp.float32)
        pooled = rows.sum(axis=-2) * gain if gains is None else (rows * gains[..., None]).sum(axis=-2)
        return pooled.astype(dtype)

    return pool


def _adagrad(o: Any) -> optax.GradientTransformation:
    return optax.adagrad(o.learning_rate, o.initial_accumulator_value, eps=0.0)


def _adam(o: Any) -> optax.GradientTransformation:
    return optax.adam(o.learning_rate, o.beta_1, o.beta_2, o.epsilon)


def _adagrad_momentum(o: Any) -> optax.GradientTransformation:
    root = optax.scale_by_rss(o.initial_accumulator_value, o.epsilon)
    return optax.chain(root, optax.trace(o.momentum, o.use_nesterov), optax.scale_by_learning_rate(o.learning_rate))


def _laprop(o: Any) -> optax.GradientTransformation:
    rate = o.learning_rate * math.sqrt(1 - o.b1**2)
    return optax.rmsprop(rate, o.b2, o.eps, momentum=o.b1, bias_correction=True)


MOVES_ALL = ", whose momentum moves untouched rows too"
PEERS: dict[type, Peer] = {
    embax.SGD: Peer(lambda o: optax.sgd(o.learning_rate), True, "optax.sgd"),
    embax.Adagrad: Peer(_adagrad, True, "optax.adagrad with eps=0"),
    embax.RowwiseAdagrad: Peer(_adagrad, False, "optax.adagrad, the nearest: it keeps a number for each of a row"),
    embax.AdagradMomentum: Peer(_adagrad_momentum, True, f"optax.scale_by_rss and optax.trace{MOVES_ALL}"),
    embax.Adam: Peer(_adam, True, f"optax.adam{MOVES_ALL}"),
    embax.LaProp: Peer(_laprop, True, f"optax.rmsprop with momentum and bias correction{MOVES_ALL}"),
    embax.FTRL: Peer(_adagrad, False, "optax.adagrad, the nearest: optax has no FTRL"),
    embax.F2A: Peer(_adagrad, False, "optax.adagrad, the nearest: optax does not count a row's steps"),
}


def peer_of(stack: StackPlan) -> Peer:
    """Returns what optax has for the tables of a stack; for 16-bit tables nothing of it is the same."""
    peer = PEERS[type(stack.optimizer)]
    if stack.dtype == "float32":
        return peer
    return peer._replace(same=False, text=f"{peer.text}; its gradients and slots are {stack.dtype}, embax's float32")


def _tables(plan: embax.Plan) -> dict[str, StackPlan]:
    return {table.name: stack for stack in plan.stacks for table in stack.tables}


def _stack_bytes(stack: StackPlan) -> int:
    """Returns the bytes of a stack and of its slots."""
    shape, slots = (stack.rows, stack.embedding_dim), stack.optimizer.slots()
    return _bytes(jax.eval_shape(lambda: [jnp.zeros(shape, stack.dtype), *(slot.full(shape) for slot in slots)]))


def _dense_bytes(plan: embax.Plan) -> tuple[int, int]:
    """Returns the bytes of the peer's tables and slots, and those with its dense gradients; makes no array."""
    held = gradients = 0
    for name, stack in _tables(plan).items():
        table = jax.ShapeDtypeStruct((plan.table(name)[1].vocabulary_size, stack.embedding_dim), stack.dtype)
        gradients += _bytes(table)
        held += _bytes((table, jax.eval_shape(peer_of(stack).make(stack.optimizer).init, table)))
    return held, held + gradients


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _gb(count: float) -> str:
    return f"{count / GB:,.3g} GB"


def check(contenders: Sequence[Contender], plan: embax.Plan, batch: Sequence[Any], targets: Any) -> int:
    """Lets everybody take one step on the first batch, and returns how many rows were then compared with the peer's.

    The backends of embax are compared with each other in every table; the peer where its step is the same.

    Raises:
      BenchError: the losses, or rows that the step touched, differ by more than rounding.
    """
    touched: dict[str, list[np.ndarray]] = {}
    for feature, ids in zip(plan.features, batch, strict=True):
        touched.setdefault(feature.table.name, []).append(_values(ids))
    rows = {name: np.unique(np.concatenate(parts)) for name, parts in touched.items()}
    before = {name: contenders[0].rows(name, ids) for name, ids in rows.items()}
    losses = {c.name: c.take_step(0, targets) for c in contenders}
    stacks, (first, *others) = _tables(plan), contenders
    narrow = any(stack.dtype != "float32" for stack in stacks.values())
    compared = 0
    for other in others:
        if not math.isclose(losses[first.name], losses[other.name], rel_tol=2e-2 if narrow else TOLERANCE):
            raise _disagreement(first, other, "the loss of the first step", losses[first.name], losses[other.name])
        for name, ids in rows.items():
            if other.name != DENSE or peer_of(stacks[name]).same:
                _compare(first, other, name, ids, before[name], float(jnp.finfo(stacks[name].dtype).eps))
                compared += len(ids) if other.name == DENSE else 0
    return compared


def _compare(first: Contender, other: Contender, table: str, ids: np.ndarray, before: np.ndarray, eps: float) -> None:
    one, two = first.rows(table, ids), other.rows(table, ids)
    room = TOLERANCE * np.abs(one - before) + LAST_PLACES * eps * np.maximum(np.abs(one), np.abs(before))
    wrong = ~(np.abs(one - two) <= room)  # not a number is wrong too
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        place = f'table "{table}", row {ids[row]}, column {column}, after one step from {before[row, column]:.6g}'
        place += f" ({wrong.any(axis=1).sum():,} of {len(ids):,} touched rows)"
        raise _disagreement(first, other, place, float(one[row, column]), float(two[row, column]))


def _disagreement(first: Contender, other: Contender, place: str, one: float, two: float) -> BenchError:
    return BenchError(
        f"{first.name} and {other.name} disagree: {place}: {one:.6g} against {two:.6g}; nothing was timed, for one of "
        "them is wrong: please report it with the specification"
    )


def take_turns(contenders: Sequence[Contender], batches: Sequence[list], targets: Any, turns: int) -> None:
    """Notes the seconds of every counted step, and of making a batch on the host, in each contender."""
    for turn in range(turns + 1):
        for contender in contenders[:: -1 if turn % 2 else 1]:  # nobody always follows the same other
            begin = time.perf_counter()
            jax.block_until_ready(jax.device_put(contender.prepare(batches[turn % BATCHES])))
            host, steps = time.perf_counter() - begin, []
            for number in range(turn, turn + 1 + STEPS):
                begin = time.perf_counter()
                contender.take_step(number, targets)
                steps.append(time.perf_counter() - begin)
            if turn:  # the first turn goes through every batch, compiles, and touches the memory
                contender.host_seconds.append(host)
                contender.step_seconds += steps[1:]
