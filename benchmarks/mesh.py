"""One step on 1 to 8 virtual CPU devices: bytes on the wire as predicted and as compiled, memory, and time by part.

``python -m benchmarks.mesh [--markdown FILE]``. The devices share the machine's cores, so a perfect exchange takes the
time of one device; what is beyond that is the exchange's. Contenders take turns; medians.
"""

import argparse
import functools
import os
import statistics
import sys
import time
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

import embax  # noqa: E402
from benchmarks.wire import wire_bytes  # noqa: E402
from embax.costs import costs  # noqa: E402

WAYS = (("row", "gather"), ("row", "route"), ("table", "gather"), ("column", "gather"), ("replicated", "gather"))


class Contender:
    """One way to lie on some devices, ready to take steps; without ``devices`` the plan of one device."""

    def __init__(self, args, devices, placement, exchange, ids):
        table = embax.TableSpec(
            name="table",
            vocabulary_size=args.rows,
            embedding_dim=args.dim,
            combiner="sum",
            initializer=jax.nn.initializers.zeros,
            optimizer=embax.Adagrad(0.1),
        )
        feature = embax.FeatureSpec(
            name="x", table_spec=table, input_shape=(None, args.valency), output_shape=(None, args.dim)
        )
        mesh = None
        if devices:
            mesh = embax.Devices(jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("x",)), exchange=exchange)
        self.plan = plan = embax.plan(feature, mesh=mesh, placement=placement if mesh else "row")
        self.name = (devices, placement, exchange)
        self.tables = embax.init(plan, jax.random.key(0))
        self.batch = self._put(embax.preprocess(plan, ids))
        self.look = jax.jit(functools.partial(embax.lookup, plan))
        self.step = jax.jit(functools.partial(embax.update, plan, step=0), donate_argnums=0)
        activations, residuals = self.look(self.tables, self.batch)
        self.gradient = jax.tree.map(lambda x: jax.device_put(jnp.full(x.shape, 1e-3), x.sharding), activations)
        self.residuals = residuals
        self.times: dict[str, list[float]] = {"lookup": [], "update": []}

    def _put(self, batch):
        if self.plan.devices is None:
            return jax.device_put(batch)
        return jax.device_put(batch, self.plan.devices.sharding(self.plan.devices.batch_spec()))

    def turn(self):
        """Takes one step and notes its times."""
        begin = time.perf_counter()
        _, residuals = jax.block_until_ready(self.look(self.tables, self.batch))
        middle = time.perf_counter()
        self.tables = jax.block_until_ready(self.step(self.tables, residuals, self.gradient))
        self.times["lookup"].append(middle - begin)
        self.times["update"].append(time.perf_counter() - middle)

    def compiled_bytes(self) -> tuple[int, int]:
        """Returns the bytes on the wire of the compiled lookup and update."""
        forward = self.look.lower(self.tables, self.batch).compile().as_text()
        backward = self.step.lower(self.tables, self.residuals, self.gradient).compile().as_text()
        return wire_bytes(forward), wire_bytes(backward)


def main():
    """Runs every way on every number of devices, and prints two tables."""
    args = _arguments()
    embax.tune_allocator()
    rng = np.random.default_rng(0)
    shape = (args.batch, args.valency)
    ids = rng.integers(0, args.rows, shape) if args.ids == "uniform" else (rng.zipf(1.05, shape) - 1) % args.rows
    alone = Contender(args, 0, "row", "gather", ids)
    lines = [
        f"{args.rows:,} rows x {args.dim}, Adagrad, {args.batch:,} samples x {args.valency} {args.ids} ids",
        "",
        "| devices | placement | exchange | memory/device | forward wire | compiled | backward wire | compiled "
        "| lookup | update | step / one device |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for devices in args.devices:
        for placement, exchange in WAYS:
            if placement == "table" and devices == 1:
                continue
            ways = [alone, Contender(args, devices, placement, exchange, ids)]
            for _ in range(args.turns + 2):
                for way in ways:
                    way.turn()
            lines.append(_line(alone, ways[1]))
            print(lines[-1], file=sys.stderr, flush=True)
            del ways
            jax.clear_caches()
            alone.times = {"lookup": [], "update": []}
    text = "\n".join(lines)
    print(text)
    if args.markdown:
        args.markdown.write_text(text + "\n")


def _line(alone, way):
    cost = costs(way.plan)[0] if way.plan.features[0].batch_size else costs(way.plan, way.gradient.shape[0])[0]
    forward, backward = way.compiled_bytes()
    medians = {part: statistics.median(times[2:]) for part, times in way.times.items()}
    single = sum(statistics.median(times[2:]) for times in alone.times.values())
    parts = [*way.name, f"{cost.memory / 1e6:.1f} MB"]
    parts += [f"{n / 1e3:.1f} kB" for n in (cost.forward, forward, cost.backward, backward)]
    parts += [f"{1e3 * medians[part]:.2f} ms" for part in ("lookup", "update")]
    parts.append(f"{sum(medians.values()) / single:.2f}")
    return "| " + " | ".join(map(str, parts)) + " |"


def _arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--valency", type=int, default=20)
    parser.add_argument("--ids", choices=("uniform", "zipf"), default="uniform")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--markdown", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
