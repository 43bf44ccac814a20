"""Does training on a mesh hold the tables once? Peak memory against the bytes of tables and slots.

    python -m benchmarks.mesh_memory [--gigabytes 1] [--devices 8] [--placement row] [--optimizer rowwise_adagrad]

Makes a [V, 64] float32 table over virtual CPU devices, takes a few donated steps (8,192 bags of 20 uniform ids each)
and prints the process's peak (VmHWM) in each stage. A second table, or a copy of one, would show as twice the bytes.
"""

import argparse
import functools
import os
import time

BATCH, VALENCY, DIM = 8192, 20, 64


def peak_bytes() -> int:
    """Returns the most memory that this process has had: VmHWM."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def forget_peak() -> None:
    """Begins a new peak, at what the process has now."""
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")


def main() -> None:
    """Prints the peak of every stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of the table, slots not counted")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--placement", default="row", choices=["row", "table", "column", "replicated"])
    parser.add_argument("--optimizer", default="rowwise_adagrad", choices=["sgd", "adagrad", "rowwise_adagrad"])
    parser.add_argument("--backend", default=None)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={args.devices}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    measure(args)


def measure(args: argparse.Namespace) -> None:
    """Makes the table, trains, and prints."""
    import jax
    import numpy as np
    from jax.sharding import Mesh

    import embax

    optimizers = {"sgd": embax.SGD, "adagrad": embax.Adagrad, "rowwise_adagrad": embax.RowwiseAdagrad}
    table = embax.TableSpec(
        name="table",
        vocabulary_size=int(args.gigabytes * 1e9) // (4 * DIM),
        embedding_dim=DIM,
        initializer=jax.nn.initializers.uniform(0.01),
        optimizer=optimizers[args.optimizer](0.1),
        combiner="sum",
    )
    feature = embax.FeatureSpec(name="ids", table_spec=table, input_shape=(BATCH, VALENCY), output_shape=(BATCH, DIM))
    mesh = Mesh(np.array(jax.devices()), ("x",))
    plan = embax.plan(feature, mesh=mesh, placement=args.placement, backend=args.backend)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(tables, batch, number):
        activations, residuals = embax.lookup(plan, tables, batch)
        return embax.update(plan, tables, residuals, activations, number)  # of the loss |activations|^2 / 2

    jax.block_until_ready(jax.device_put(0.0))
    base, began = peak_bytes(), time.perf_counter()
    tables = jax.block_until_ready(embax.init(plan, jax.random.key(0)))
    leaves = jax.tree.leaves(tables)
    held = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
    where = f"{args.placement}, {args.devices} devices"
    print(f"{where}: {held / 1e9:.2f} GB of tables and slots; {base / 1e9:.2f} GB before them")
    rng = np.random.default_rng(0)

    def report(stage: str) -> None:
        peak = peak_bytes()
        print(
            f"  {stage:8} peak {peak / 1e9:.2f} GB, {(peak - base) / held:.2f} of tables and slots; "
            f"{time.perf_counter() - began:.1f} s",
            flush=True,
        )
        forget_peak()

    report("init")
    for number in range(args.steps):
        ids = rng.integers(0, table.vocabulary_size, (BATCH, VALENCY))
        tables = jax.block_until_ready(step(tables, embax.preprocess(plan, ids), number))
    report(f"{args.steps} steps")


if __name__ == "__main__":
    main()
