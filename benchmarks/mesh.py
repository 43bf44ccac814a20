"""One step on 1 to 8 virtual CPU devices: bytes on the wire as predicted and as compiled, memory, and time by part.

``python -m benchmarks.mesh [--markdown FILE]``. The devices share the machine's cores, so a perfect exchange takes the
time of one device; what is beyond that is the exchange's. Contenders take turns; medians.

``--ids uniform hot`` compares kinds of ids instead: the same tables and compiled programs take steps on one kind and on
the other in turns. Half of all "hot" ids are one id, the others uniform. Ratios are of medians and, behind a stroke, of
minima; "more memory" is by how much the process's peak grows when the second kind of ids first comes. Besides, what the
owner of that id has to do in "gather" is timed alone, on all cores, without any exchange.
"""

import argparse
import functools
import itertools
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
from benchmarks.mesh_memory import forget_peak, peak_bytes  # noqa: E402
from benchmarks.wire import wire_bytes  # noqa: E402
from embax.costs import costs  # noqa: E402

WAYS = (("row", "gather"), ("row", "route"), ("table", "gather"), ("column", "gather"), ("replicated", "gather"))
PARTS, HOT = ("lookup", "update"), 7


class Contender:
    """One way to lie on some devices, ready to take steps on every kind of ids; without ``devices`` that of one device.

    ``ids`` are given by kind, all of one shape: every kind runs the same compiled programs on the same tables.
    """

    def __init__(self, args, devices, placement, exchange, ids, rows=None):
        table = embax.TableSpec(
            name="table",
            vocabulary_size=rows or args.rows,
            embedding_dim=args.dim,
            combiner="sum",
            initializer=jax.nn.initializers.zeros,
            optimizer=embax.Adagrad(0.1),
        )
        feature = embax.FeatureSpec(
            name="x", table_spec=table, input_shape=(None, args.valency), output_shape=(None, args.dim), padding_id=-1
        )
        mesh = None
        if devices:
            mesh = embax.Devices(jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("x",)), exchange=exchange)
        self.plan = plan = embax.plan(feature, mesh=mesh, placement=placement if mesh else "row")
        self.name = (devices, placement, exchange)
        self.tables = embax.init(plan, jax.random.key(0))
        self.batches = {kind: self._put(embax.preprocess(plan, some)) for kind, some in ids.items()}
        shapes = [jax.tree.map(jax.typeof, batch) for batch in self.batches.values()]
        assert all(shape == shapes[0] for shape in shapes), "kinds of ids of different shapes run different programs"
        self.look = jax.jit(functools.partial(embax.lookup, plan))
        self.step = jax.jit(functools.partial(embax.update, plan, step=0), donate_argnums=0)
        activations, self.residuals = self.look(self.tables, self.batches[args.ids[0]])
        self.gradient = jax.tree.map(lambda x: jax.device_put(jnp.full(x.shape, 1e-3), x.sharding), activations)
        self.forget()

    def _put(self, batch):
        if self.plan.devices is None:
            return jax.device_put(batch)
        return jax.device_put(batch, self.plan.devices.sharding(self.plan.devices.batch_spec()))

    def forget(self):
        """Begins new lists of times, ``{kind: {part: seconds}}``."""
        self.times = {kind: {"lookup": [], "update": []} for kind in self.batches}

    def turn(self, kind):
        """Takes one step on that kind of ids, and notes its times."""
        begin = time.perf_counter()
        _, residuals = jax.block_until_ready(self.look(self.tables, self.batches[kind]))
        middle = time.perf_counter()
        self.tables = jax.block_until_ready(self.step(self.tables, residuals, self.gradient))
        self.times[kind]["update"].append(time.perf_counter() - middle)
        self.times[kind]["lookup"].append(middle - begin)

    def took(self, kind, part, of=statistics.median):
        """Returns the median (or another figure) of the seconds of a part of a step."""
        return of(self.times[kind][part][2:])

    def compiled(self):
        """Returns the compiled lookup and update."""
        forward = self.look.lower(self.tables, self.batches[next(iter(self.batches))]).compile()
        return forward, self.step.lower(self.tables, self.residuals, self.gradient).compile()


def draw(args, kind: str) -> np.ndarray:
    """Returns ids ``[batch, valency]`` of that kind, the same at every call."""
    rng = np.random.default_rng(0)
    shape = (args.batch, args.valency)
    if kind == "zipf":
        return (rng.zipf(1.05, shape) - 1) % args.rows
    ids = rng.integers(0, args.rows, shape)
    if kind == "hot":
        half = np.arange(ids.size) < ids.size // 2
        rng.shuffle(half)
        ids[half.reshape(shape)] = HOT
    return ids


def main():
    """Runs every way on every number of devices, and prints two tables."""
    args = _arguments()
    embax.tune_allocator()
    ids = {kind: draw(args, kind) for kind in args.ids}
    heading = f"{args.rows:,} rows x {args.dim}, Adagrad, {args.batch:,} samples x {args.valency}"
    lines = [f"{heading} {' and '.join(args.ids)} ids", ""]
    lines += _comparison(args, ids) if len(args.ids) > 1 else _against_one_device(args, ids)
    text = "\n".join(lines)
    print(text)
    if args.markdown:
        args.markdown.write_text(text + "\n")


def _ways(args):
    for devices in args.devices:
        for placement, exchange in args.ways:
            if placement != "table" or devices > 1:
                yield devices, placement, exchange


def _against_one_device(args, ids):
    lines = [
        "| devices | placement | exchange | memory/device | forward wire | compiled | backward wire | compiled "
        "| lookup | update | step / one device |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    alone, kind = Contender(args, 0, "row", "gather", ids), args.ids[0]
    for name in _ways(args):
        way = Contender(args, *name, ids)
        for _ in range(args.turns + 2):
            alone.turn(kind)
            way.turn(kind)
        lines.append(_line(alone, way, kind))
        print(lines[-1], file=sys.stderr, flush=True)
        del way
        jax.clear_caches()
        alone.forget()
    return lines


def _line(alone, way, kind):
    cost = costs(way.plan)[0] if way.plan.features[0].batch_size else costs(way.plan, way.gradient.shape[0])[0]
    forward, backward = (wire_bytes(program.as_text()) for program in way.compiled())
    single = sum(alone.took(kind, part) for part in PARTS)
    parts = [*way.name, f"{cost.memory / 1e6:.1f} MB"]
    parts += [f"{n / 1e3:.1f} kB" for n in (cost.forward, forward, cost.backward, backward)]
    parts += [f"{1e3 * way.took(kind, part):.2f} ms" for part in PARTS]
    parts.append(f"{sum(way.took(kind, part) for part in PARTS) / single:.2f}")
    return "| " + " | ".join(map(str, parts)) + " |"


def _comparison(args, ids):
    first, *others = args.ids
    names = ["devices", "placement", "exchange", "temporaries of lookup", "of update", f"lookup, {first}"]
    names += [f"{kind} / {first}" for kind in others] + [f"update, {first}"] + [f"{kind} / {first}" for kind in others]
    names += ["more memory" if len(others) == 1 else f"more memory, {kind}" for kind in others]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for name in _ways(args):
        lines.append(_compared(args, Contender(args, *name, ids)))
        print(lines[-1], file=sys.stderr, flush=True)
        if name[1:] == ("row", "gather") and name[0] > 1:
            seen = {kind: np.where(some % name[0] == HOT % name[0], some // name[0], -1) for kind, some in ids.items()}
            owner = Contender(args, 0, "row", "gather", seen, -(-args.rows // name[0]))
            owner.name = (name[0], "row", "its owner's part")
            lines.append(_compared(args, owner))
            print(lines[-1], file=sys.stderr, flush=True)
        jax.clear_caches()
    return lines


def _compared(args, way):
    first, *others = args.ids
    peaks = [_peak_of_two_turns(way, kind) for kind in args.ids]  # memory is kept: what a later kind adds is new
    for _ in range(args.turns):
        for kind in args.ids:
            way.turn(kind)
    parts = [*way.name] + [f"{p.memory_analysis().temp_size_in_bytes / 1e6:.1f} MB" for p in way.compiled()]
    for part in PARTS:
        parts.append(f"{1e3 * way.took(first, part):.2f} ms")
        for kind in others:
            ratios = [way.took(kind, part, of) / way.took(first, part, of) for of in (statistics.median, min)]
            parts.append(" / ".join(f"{ratio:.2f}" for ratio in ratios))
    parts += [f"{(after - before) / 1e6:.1f} MB" for before, after in itertools.pairwise(peaks)]
    return "| " + " | ".join(map(str, parts)) + " |"


def _peak_of_two_turns(way, kind):
    forget_peak()
    way.turn(kind)
    way.turn(kind)
    return peak_bytes()


def _way(text):
    placement, exchange = (*text.split("/"), "gather")[:2]
    if (placement, exchange) not in WAYS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join('/'.join(way) for way in WAYS)}")
    return placement, exchange


def _arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--valency", type=int, default=20)
    parser.add_argument("--ids", nargs="+", choices=("uniform", "zipf", "hot"), default=["uniform"])
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--ways", type=_way, nargs="+", default=WAYS, metavar="PLACEMENT/EXCHANGE")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--markdown", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
