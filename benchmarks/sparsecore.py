"""The SparseCore path beside embax's own, on one CPU device: a step of training, and preprocessing.

    python -m benchmarks.sparsecore [--turns 61] [--markdown FILE]

A step is lookup, the gradient of the sum of squares and the update, jitted, the tables donated: by
``embedding.tpu_sparse_dense_matmul`` and its gradient inside of ``jax.shard_map`` over a mesh of one device, and by
``embax.lookup`` and ``embax.update``. Both take the same batches in turns; times are minima and medians. Preprocessing
is timed in the same turns, in one thread, statistics counted. Batches of 8,192: 26 tables of 100,000 rows x 64 with one
id each; one table of 1,000,000 rows x 64 with 20 ids a sample, and with lists of 0 to 40.
"""

import argparse
import platform
import statistics
import time
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import embax
from benchmarks.cpu.__main__ import cpu_name
from embax.sparsecore.lib.nn import embedding

BATCH, DIM, BATCHES = 8192, 64, 8


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=61)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    embax.tune_allocator()
    lines = [f"{cpu_name()}, Python {platform.python_version()}, jax {jax.__version__}, {args.turns} turns", ""]
    lines += ["| batch | what | embax | SparseCore path | ratio of minima, medians |", "|---|---|---|---|---|"]
    for name, features, ids in workloads():
        lines += rows(name, features, ids, args.turns)
        print(lines[-1], flush=True)
    text = "\n".join(lines)
    print(text)
    if args.markdown:
        args.markdown.write_text(text + "\n")


def workloads():
    """Yields name, features and batches."""
    rng = np.random.default_rng(0)
    many = [_feature(f"{i}", 100_000, 1) for i in range(26)]
    yield "26 x 1 id", many, [[rng.integers(0, 100_000, (BATCH, 1)) for _ in many] for _ in range(BATCHES)]
    dense = [rng.integers(0, 1_000_000, (BATCH, 20)) for _ in range(BATCHES)]
    yield "20 ids", [_feature("a", 1_000_000, 20)], [[ids] for ids in dense]
    ragged = [[rng.integers(0, 1_000_000, n) for n in rng.integers(0, 41, BATCH)] for _ in range(BATCHES)]
    yield "lists of 0 to 40", [_feature("a", 1_000_000, None)], [[ids] for ids in ragged]


def _feature(name, rows, valency):
    table = embax.TableSpec(
        name=name,
        vocabulary_size=rows,
        embedding_dim=DIM,
        combiner="sum",
        initializer=jax.nn.initializers.normal(0.1),
        optimizer=embax.Adagrad(0.01),
    )
    shape = (BATCH,) if valency is None else (BATCH, valency)
    return embax.FeatureSpec(name=name, table_spec=table, input_shape=shape, output_shape=(BATCH, DIM))


def rows(name, features, ids, turns) -> list[str]:
    """Returns the lines of one workload."""
    plan = embax.plan(features)  # before the features are stacked
    tables = embax.init(plan, jax.random.key(0))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    embedding.prepare_feature_specs_for_training(features, 1, 1)
    variables = embedding.init_embedding_variables(
        jax.random.key(0), embedding.get_table_specs(features), NamedSharding(mesh, P("x", None)), 1
    )
    shared = {"feature_specs": features, "global_device_count": 1, "num_sc_per_device": 1}

    def local(inputs, variables):
        activations = embedding.tpu_sparse_dense_matmul(inputs, variables, **shared)
        gradients = jax.tree.map(lambda x: 2 * x, activations)
        return embedding.tpu_sparse_dense_matmul_grad(gradients, inputs, variables, step=0, **shared)

    split = jax.shard_map(local, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False)

    def native(batch, tables):
        activations, residuals = embax.lookup(plan, tables, batch)
        return embax.update(plan, tables, residuals, jax.tree.map(lambda x: 2 * x, activations), step=0)

    def preprocessed(cores, ids):
        return embedding.preprocess_sparse_dense_matmul_input(ids, None, features, 1, 1, num_sc_per_device=cores)[0]

    steps = {"embax": jax.jit(native, donate_argnums=1), "SparseCore": jax.jit(split, donate_argnums=1)}
    batches = {
        "embax": [jax.device_put(embax.preprocess(plan, one)) for one in ids],
        "SparseCore": [jax.device_put(preprocessed(1, one), NamedSharding(mesh, P("x"))) for one in ids],
    }
    state, took = {"embax": tables, "SparseCore": variables}, {name: [] for name in steps}
    read = {"embax": lambda one: embax.preprocess(plan, one), "SparseCore": lambda one: preprocessed(1, one)}
    spent = {name: [] for name in read}
    for turn in range(turns + 2):
        for who in steps:
            begin = time.perf_counter()
            state[who] = jax.block_until_ready(steps[who](batches[who][turn % BATCHES], state[who]))
            took[who].append(time.perf_counter() - begin)
            begin = time.perf_counter()
            read[who](ids[turn % BATCHES])
            spent[who].append(time.perf_counter() - begin)
    sizes = [sum(np.size(x) for leaf in one for x in leaf) for one in ids]
    lines = [_line(name, "step, ms", took, 1e3), _line(name, "preprocessing, ns an id", spent, 1e9 / np.mean(sizes))]
    return lines


def _line(name, what, took, scale) -> str:
    figures = {who: (scale * min(times[2:]), scale * statistics.median(times[2:])) for who, times in took.items()}
    cells = [f"{least:.1f}, {median:.1f}" for least, median in figures.values()]
    ratios = [f"{other / own:.2f}" for own, other in zip(*figures.values(), strict=True)]
    return f"| {name} | {what} | {' | '.join(cells)} | {', '.join(ratios)} |"


if __name__ == "__main__":
    main()
