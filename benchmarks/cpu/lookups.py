"""Lookups in tables of 16 and 8 bits, with none of the memory shared: every contender has a table of its own."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

import embax
from benchmarks.cpu import measure, peers
from benchmarks.cpu.memory import make_features
from benchmarks.cpu.workloads import Batch, Skip, Workload, batches

WORKLOAD = Workload("lookup 1e6x64", (10**6,), 64, ids=("uniform",), optimizers=("forward",))
DTYPES = ("float32", "bfloat16", "float16", "int8")
VALUE = 0.01  # not 0: pages of zeros may exist only once


def embax_lookup(dtype: str, drawn: list[Batch]) -> Callable[[int], None]:
    """Returns embax's jitted lookup of a batch; int8 rows are made by ``embax.quantize_rows``."""
    if dtype == "int8" and not hasattr(embax, "quantize_rows"):
        raise Skip("embax has no quantize_rows yet")
    stored = "float32" if dtype == "int8" else dtype
    plan = embax.plan(make_features(WORKLOAD, embax.SGD(0.01), stored), activation_dtype="float32")
    state = embax.init(plan, jax.random.key(0))
    state = jax.tree.map(lambda a: jnp.full(a.shape, VALUE, a.dtype), state)
    if dtype == "int8":
        state = embax.quantize_tables(plan, state)  # type: ignore[attr-defined]
    prepared = [embax.preprocess(plan, batch) for batch in drawn]
    forward = jax.jit(lambda tables, batch: embax.lookup(plan, tables, batch)[0])
    return lambda index: jax.block_until_ready(forward(state, prepared[index]))


def torch_lookup(dtype: str, drawn: list[Batch]) -> Callable[[int], None]:
    """Returns EmbeddingBag's lookup of a batch."""
    torch = peers.import_torch()
    if dtype == "int8":
        raise Skip("torch's int8 bags are FBGEMM's")
    rows = torch.full((WORKLOAD.rows, WORKLOAD.dim), VALUE, dtype=getattr(torch, dtype))
    bag = torch.nn.EmbeddingBag(WORKLOAD.rows, WORKLOAD.dim, mode="sum", _weight=rows)
    prepared = [torch.from_numpy(batch[0].astype(np.int64).ravel()) for batch in drawn]
    offsets = torch.arange(0, WORKLOAD.ids_per_step, WORKLOAD.valency)

    def forward(index):
        with torch.no_grad():
            bag(prepared[index], offsets)

    return forward


def fbgemm_lookup(dtype: str, drawn: list[Batch]) -> Callable[[int], None]:
    """Returns the lookup of a batch by ``IntNBitTableBatchedEmbeddingBagsCodegen``."""
    _, inference = peers.import_fbgemm()
    torch = peers.import_torch()
    from fbgemm_gpu.split_embedding_configs import SparseType

    kinds = {"float32": SparseType.FP32, "float16": SparseType.FP16, "int8": SparseType.INT8}
    if dtype not in kinds:
        raise Skip(f"FBGEMM's inference tables have no {dtype} on CPU")
    host = inference.EmbeddingLocation.HOST
    bags = inference.IntNBitTableBatchedEmbeddingBagsCodegen(
        [("t00", WORKLOAD.rows, WORKLOAD.dim, kinds[dtype], host)],
        device=torch.device("cpu"),
        output_dtype=SparseType.FP32,
        bounds_check_mode=inference.BoundsCheckMode.NONE,
    )
    bags.fill_random_weights()
    prepared = [torch.from_numpy(batch[0].ravel()) for batch in drawn]
    offsets = torch.arange(0, WORKLOAD.ids_per_step + 1, WORKLOAD.valency, dtype=torch.int32)

    def forward(index):
        with torch.no_grad():
            bags(prepared[index], offsets)

    return forward


def look_up(effort: measure.Effort) -> Iterator[dict]:
    """Yields a row of results for each dtype; all of them are measured in turns with each other."""
    drawn = batches(WORKLOAD, "uniform", measure.BATCHES, effort.data)
    makers = {"embax": embax_lookup, "torch": torch_lookup, "FBGEMM": fbgemm_lookup}
    operations, skipped = {}, {dtype: {} for dtype in DTYPES}
    for dtype in DTYPES:
        for name, maker in makers.items():
            try:
                operations[name, dtype] = maker(dtype, drawn)
                operations[name, dtype](0)
            except Skip as reason:
                skipped[dtype][name] = str(reason)
            except Exception as error:
                skipped[dtype][name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                operations.pop((name, dtype), None)
    found = measure.in_turns(operations, WORKLOAD.turn, effort, lambda: None)
    for dtype in DTYPES:
        ms = {name: value for (name, kind), value in found.items() if kind == dtype}
        yield {"ids": dtype, "what": "forward", "ms": ms, "skipped": skipped[dtype]}
