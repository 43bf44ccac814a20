"""One step at full size, asked row by row: some rows and slots before and after, against a float64 step of them."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu import oracles
from benchmarks.gpu.contenders import OPTIMIZERS, Embax
from benchmarks.gpu.oracles import NAMES, Wrong, close

TOUCHED, OTHERS, SAMPLES = 48, 48, 64  # of each table that is looked at


def check(contender: Embax, every: bool, save: Path | None = None) -> int:
    """Takes one step and returns how many rows were compared; raises Wrong where one is not right.

    Args:
      contender: its shared tables take the step.
      every: whether to look at all tables; else the first, the middle and the last.
      save: where to write the rows before and after, or None.
    """
    shared = contender.shared
    count = len(shared.job.tables)
    looked_at = range(count) if every else sorted({0, count // 2, count - 1})
    chosen = {t: _rows(shared.raw[0][t], shared.job.tables[t]) for t in looked_at}
    before = {t: _read(contender, t, rows) for t, rows in chosen.items()}
    activations = contender.one_step()
    after = {t: _read(contender, t, rows) for t, rows in chosen.items()}
    for t, rows in chosen.items():
        _compare(contender, t, rows, before[t], after[t])
    if save is not None:
        arrays = {f"t{t:02d}_rows": rows for t, rows in chosen.items()}
        for when, parts in (("before", before), ("after", after)):
            arrays |= {f"t{t:02d}_{when}_{i}": part for t in parts for i, part in enumerate(parts[t])}
        np.savez_compressed(save, **arrays)
    for t in looked_at:
        _compare_activations(contender, t, activations[t])
    return sum(len(rows) for rows in chosen.values())


def _rows(ids: np.ndarray, rows: int) -> np.ndarray:
    """Returns some rows that are looked up, some others, the first and the last."""
    rng = np.random.default_rng(rows)
    touched = np.unique(ids)
    found = rng.choice(touched, min(TOUCHED, len(touched)), replace=False)
    return np.unique(np.concatenate([found, rng.integers(0, rows, OTHERS), [0, rows - 1]]))


def _read(contender: Embax, table: int, rows: np.ndarray) -> list[np.ndarray]:
    """Returns rows and slots of a table, float64 but for the rows' own dtype."""
    stack, planned = contender.plan.table(f"t{table:02d}")
    state = contender.shared.tables[stack.name]
    places = jnp.asarray(rows + planned.row_offset, jnp.int32)
    return [np.asarray(_take(leaf, places)) for leaf in jax.tree.leaves((state.table, state.slots))]


@jax.jit
def _take(array, places):
    return jnp.take(array, places, axis=0, mode="clip")


def _compare(contender: Embax, table: int, rows: np.ndarray, before: list, after: list) -> None:
    job, shared = contender.shared.job, contender.shared
    ids, gradient = shared.raw[0][table], np.asarray(shared.gradients[0][table]).astype(np.float64)
    order = np.argsort(ids, axis=None, kind="stable")
    ranked = ids.reshape(-1)[order]
    first, last = np.searchsorted(ranked, rows), np.searchsorted(ranked, rows, side="right")
    wanted = [part.astype(np.float64) for part in before]
    slack = [np.zeros_like(part) for part in wanted]
    for index in np.flatnonzero(last > first):
        count = last[index] - first[index]
        summed = gradient[order[first[index] : last[index]] // job.valency].sum(0)
        # Tens of thousands of numbers added up in float32 are off by about this, and a step may magnify it.
        off = 2 * oracles.EPSILON["float32"] * count
        old = [part[index].copy() for part in wanted]
        right, *others = (_stepped(job.optimizer, old, summed + shift) for shift in (0.0, off, -off))
        for place, part in enumerate(right):
            wanted[place][index] = part
            slack[place][index] = np.max([np.abs(other[place] - part) for other in others], axis=0)
    what = f"table {table} of {job.name}"
    for place, (part, right, loose) in enumerate(zip(after, wanted, slack, strict=True)):
        kind, size = f"slot {place}" if place else "rows", np.abs(right).max(1, keepdims=True) + 1e-9
        close(part.astype(np.float64), right, "float32" if place else job.dtype, size, f"{kind} of {what}", loose)
        rest = first == last
        if part[rest].tobytes() != before[place][rest].tobytes():
            raise Wrong(f"{kind} of {what} that no id names have other bits")


def _stepped(optimizer: str, old: list, gradient: np.ndarray) -> list[np.ndarray]:
    """Returns a row and its slots after one float64 step."""
    oracle, name = oracles.load(), NAMES[optimizer]
    slots = dict(zip(oracle.OPTIMIZERS[name].slots, old[1:], strict=True))
    hyper = {"learning_rate": OPTIMIZERS[optimizer].learning_rate}
    row, slots = oracle.step_row(name, old[0], gradient, slots, 0, hyper)
    return [row, *slots.values()]


def _compare_activations(contender: Embax, table: int, activations: jax.Array) -> None:
    """Compares lookups after the step with the rows read one by one: those before it are gone."""
    shared, job = contender.shared, contender.shared.job
    samples = np.unique(np.linspace(0, job.batch - 1, SAMPLES).astype(int))
    ids = shared.raw[0][table][samples]
    if activations.shape != (job.batch, job.dim):
        raise Wrong(f"activations of table {table} have the shape {activations.shape}")
    contender.run("forward", 0)
    looked_up = np.asarray(contender.kept[0][table][samples]).astype(np.float64)
    wanted = _read(contender, table, ids.reshape(-1))[0].astype(np.float64).reshape(*ids.shape, job.dim)
    scale = np.abs(wanted).max() * np.sqrt(job.valency)
    close(looked_up, wanted.sum(1), job.dtype, scale, f"activations of table {table} of {job.name}")
