"""The contenders in torch: EmbeddingBag with torch.optim, and FBGEMM's fused table-batched bags.

Both read and train embax's memory (see ``memory``): they are made without rows of their own, and bound to it.
"""

import logging
import warnings

import numpy as np

from benchmarks.cpu.contenders import ACCUMULATOR, RATE, make_targets
from benchmarks.cpu.memory import Memory
from benchmarks.cpu.workloads import Batch, Skip, Workload


def import_torch():
    """Returns torch, or raises Skip."""
    try:
        import torch
    except Exception as error:  # a broken binary raises more than ImportError
        raise Skip(f"torch cannot be imported ({_first_line(error)})") from error
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    return torch


def import_fbgemm():
    """Returns fbgemm_gpu's modules of training and of inference, or raises Skip."""
    import_torch()
    logging.getLogger("fbgemm_gpu").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import fbgemm_gpu.split_table_batched_embeddings_ops_inference as inference
            import fbgemm_gpu.split_table_batched_embeddings_ops_training as training
    except Exception as error:
        raise Skip(f"fbgemm_gpu cannot be imported ({_first_line(error)})") from error
    return training, inference


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


class Torch:
    """One ``nn.EmbeddingBag`` (unpooled: ``nn.Embedding``) with sparse gradients for each table, and torch.optim."""

    def __init__(self, workload: Workload, optimizer: str, memory: Memory):
        self.torch = torch = import_torch()
        if optimizer == "rowwise":
            raise Skip("torch.optim has no row-wise Adagrad")
        self.workload, self.memory = workload, memory
        self.tables = []
        for _ in workload.tables:
            if workload.pooled:
                self.tables.append(torch.nn.EmbeddingBag(1, workload.dim, mode="sum", sparse=True))
            else:
                self.tables.append(torch.nn.Embedding(1, workload.dim, sparse=True))
        weights = [table.weight for table in self.tables]
        if optimizer == "sgd":
            self.optimizer = torch.optim.SGD(weights, RATE)
        elif optimizer == "adagrad":
            self.optimizer = torch.optim.Adagrad(weights, RATE, initial_accumulator_value=ACCUMULATOR)
        else:
            self.optimizer = torch.optim.SparseAdam(weights, RATE)
        self.slots = {"sgd": (), "adagrad": ("sum",), "adam": ("exp_avg", "exp_avg_sq")}[optimizer]
        self.targets = [torch.from_numpy(target) for target in make_targets(workload)]
        self.offsets = torch.arange(0, workload.batch * workload.valency, workload.valency)
        self.rebind()

    def rebind(self) -> None:
        """Binds tables and slots to the memory as it is now."""
        views = [self.torch.from_numpy(view) for view in self.memory.views()]
        places = zip(self.tables, self.workload.offsets, self.workload.tables, strict=True)
        for table, first, rows in places:
            table.weight.data = views[0][first : first + rows]
            state = self.optimizer.state[table.weight]
            if self.slots == ("exp_avg", "exp_avg_sq"):
                state.setdefault("step", 0)
            for name, view in zip(self.slots, views[1:], strict=True):
                state[name] = view[first : first + rows]

    def prepare(self, batches: list[Batch]) -> None:
        self.batches = [[self._ids(ids) for ids in batch] for batch in batches]

    def _ids(self, ids: np.ndarray):
        found = self.torch.from_numpy(ids.astype(np.int64))
        return found.reshape(-1) if self.workload.pooled else found

    def _run(self, index: int) -> list:
        found = []
        for ids, table in zip(self.batches[index], self.workload.features, strict=True):
            module = self.tables[table]
            found.append(module(ids, self.offsets) if self.workload.pooled else module(ids))
        return found

    def outputs(self, index: int) -> list[np.ndarray]:
        return [output.detach().numpy() for output in self._run(index)]

    def forward(self, index: int) -> None:
        with self.torch.no_grad():
            self._run(index)

    def step(self, index: int) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.torch.autograd.backward(self._run(index), self.targets)
        self.optimizer.step()


class Fbgemm:
    """``SplitTableBatchedEmbeddingBagsCodegen`` on CPU; the backward pass is the optimizer step.

    Unpooled lookups are bags of one id.
    """

    def __init__(self, workload: Workload, optimizer: str, memory: Memory):
        training, _ = import_fbgemm()
        self.torch = torch = import_torch()
        if optimizer == "adam":
            raise Skip("FBGEMM has no Adam on CPU")
        if workload.dim % 4:
            raise Skip("FBGEMM wants an embedding dimension that is a multiple of 4")
        self.workload, self.memory = workload, memory
        optim = training.OptimType
        kind = {"sgd": optim.EXACT_SGD, "rowwise": optim.EXACT_ROWWISE_ADAGRAD, "adagrad": optim.EXACT_ADAGRAD}
        host, cpu = training.EmbeddingLocation.HOST, training.ComputeDevice.CPU
        self.bags = training.SplitTableBatchedEmbeddingBagsCodegen(
            [(rows, workload.dim, host, cpu) for rows in workload.tables],
            feature_table_map=list(workload.features),
            optimizer=kind[optimizer],
            learning_rate=RATE,
            eps=1e-10,
            pooling_mode=training.PoolingMode.SUM,
            device=torch.device("cpu"),
            bounds_check_mode=training.BoundsCheckMode.NONE,
            stochastic_rounding=False,
            preallocated_host_buffers=self._buffers(),
        )
        targets = make_targets(workload)
        rows = workload.batch * (1 if workload.pooled else workload.valency)
        joined = np.concatenate([target.reshape(rows, workload.dim) for target in targets], axis=1)
        self.target = torch.from_numpy(np.ascontiguousarray(joined))
        valency = workload.valency if workload.pooled else 1
        self.offsets = torch.arange(0, workload.ids_per_step + 1, valency)

    def _buffers(self) -> dict:
        views = [self.torch.from_numpy(view).reshape(-1) for view in self.memory.views()]
        return dict(zip(("weights", "momentum1"), views, strict=False))

    def rebind(self) -> None:
        """Binds the weights and the optimizer's state to the memory as it is now."""
        for name, view in self._buffers().items():
            getattr(self.bags, f"{name}_host").data = view

    def prepare(self, batches: list[Batch]) -> None:
        flat = [np.concatenate([ids.ravel() for ids in batch]).astype(np.int64) for batch in batches]
        self.batches = [self.torch.from_numpy(ids) for ids in flat]

    def outputs(self, index: int) -> list[np.ndarray]:
        workload, joined = self.workload, self.bags(self.batches[index], self.offsets).detach().numpy()
        shape = (workload.batch, workload.dim) if workload.pooled else (workload.batch, workload.valency, workload.dim)
        parts = np.split(joined, len(workload.features), axis=1)
        return [part.reshape(shape) for part in parts]

    def forward(self, index: int) -> None:
        with self.torch.no_grad():
            self.bags(self.batches[index], self.offsets)

    def step(self, index: int) -> None:
        self.bags(self.batches[index], self.offsets).backward(self.target)
