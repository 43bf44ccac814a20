"""The contenders in torch, each in a process of its own: EmbeddingBag with torch.optim, and FBGEMM's fused bags."""

import logging
import warnings
from typing import Any

import numpy as np

from benchmarks.gpu import cases
from benchmarks.gpu.cases import Job
from benchmarks.gpu.contenders import ACCUMULATOR, RATE, Skip

SETS = 2  # of gradients
MOST_IDS_ON_CPU = 50_000  # to try the program; a torch without CUDA is no peer


def contenders(framework: str, job: Job, excluded: list[str]) -> tuple[None, dict[str, Any]]:
    """Returns nothing shared, and a function that makes the contender, by its name."""
    name, made = {"torch": ("torch", Torch), "fbgemm": ("FBGEMM", Fbgemm)}[framework]
    return None, {} if name in excluded else {name: lambda: made(job)}


def _import_torch() -> Any:
    import torch

    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    return torch


class _Timed:
    """What both have in common; ``passes`` are those that can be timed alone."""

    passes = ("forward", "step")

    def __init__(self, job: Job):
        self.torch = torch = _import_torch()
        self.job, self.kept = job, None
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = getattr(torch, job.dtype)
        if self.device.type == "cpu" and job.ids > MOST_IDS_ON_CPU:
            raise Skip("torch sees no GPU")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what the last job had
            free, _ = torch.cuda.mem_get_info()
            if job.state_bytes + 4 * job.activation_bytes > free:
                raise Skip(f"tables and slots take {job.state_bytes / 1e9:.0f} GB, and {free / 1e9:.0f} are free")

    def wait(self) -> None:
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()


class Torch(_Timed):
    """One ``nn.EmbeddingBag`` (one id a sample: ``nn.Embedding``) with sparse gradients a table, and torch.optim."""

    def __init__(self, job: Job):
        super().__init__(job)
        torch = self.torch
        if job.optimizer == "rowwise":
            raise Skip("torch.optim has no row-wise Adagrad")
        settings = {"sparse": True, "device": self.device, "dtype": self.dtype}
        if job.valency > 1:
            self.tables = [torch.nn.EmbeddingBag(rows, job.dim, mode="sum", **settings) for rows in job.tables]
        else:
            self.tables = [torch.nn.Embedding(rows, job.dim, **settings) for rows in job.tables]
        weights = [table.weight for table in self.tables]
        self.optimizer = {
            "sgd": lambda: torch.optim.SGD(weights, RATE),
            "adagrad": lambda: torch.optim.Adagrad(weights, RATE, initial_accumulator_value=ACCUMULATOR),
            "adam": lambda: torch.optim.SparseAdam(weights, RATE),
        }[job.optimizer]()
        shape = (job.batch, job.dim)
        make = {"device": self.device, "dtype": self.dtype}
        self.gradients = [[torch.randn(shape, **make) for _ in job.tables] for _ in range(SETS)]
        ids = [[one.astype(np.int64) for one in batch] for batch in cases.draw(job)[0]]
        form = (lambda one: one) if job.valency > 1 else (lambda one: one[:, 0].copy())
        self.ids = [[torch.from_numpy(form(one)).to(self.device) for one in batch] for batch in ids]

    def run(self, what: str, index: int) -> None:
        torch, ids = self.torch, self.ids[index % len(self.ids)]
        if what == "forward":
            with torch.no_grad():
                self.kept = [table(one) for table, one in zip(self.tables, ids, strict=True)]
            return
        self.optimizer.zero_grad(set_to_none=True)
        found = [table(one) for table, one in zip(self.tables, ids, strict=True)]
        torch.autograd.backward(found, self.gradients[index % SETS])
        self.optimizer.step()
        self.kept = [one.detach() for one in found]


class Fbgemm(_Timed):
    """``SplitTableBatchedEmbeddingBagsCodegen``, whose backward pass is the optimizer step."""

    def __init__(self, job: Job):
        super().__init__(job)
        torch = self.torch
        logging.getLogger("fbgemm_gpu").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import fbgemm_gpu.split_table_batched_embeddings_ops_training as training
            from fbgemm_gpu.split_embedding_configs import SparseType

        if job.dim % 4:
            raise Skip("FBGEMM wants an embedding dimension that is a multiple of 4")
        on_card = self.device.type == "cuda"
        if not on_card and job.optimizer == "adam":
            raise Skip("FBGEMM has no Adam on CPU")
        optim, precision = training.OptimType, SparseType.BF16 if job.dtype == "bfloat16" else SparseType.FP32
        kinds = {"sgd": "EXACT_SGD", "rowwise": "EXACT_ROWWISE_ADAGRAD", "adagrad": "EXACT_ADAGRAD", "adam": "ADAM"}
        place = training.EmbeddingLocation.DEVICE if on_card else training.EmbeddingLocation.HOST
        where = training.ComputeDevice.CUDA if on_card else training.ComputeDevice.CPU
        pooled = job.pooled or not on_card  # on CPU it has bags only
        self.bags = training.SplitTableBatchedEmbeddingBagsCodegen(
            [(rows, job.dim, place, where) for rows in job.tables],
            optimizer=getattr(optim, kinds[job.optimizer]),
            learning_rate=RATE,
            eps=1e-8,
            pooling_mode=training.PoolingMode.SUM if pooled else training.PoolingMode.NONE,
            weights_precision=precision,
            output_dtype=precision,
            bounds_check_mode=training.BoundsCheckMode.NONE,
            stochastic_rounding=False,
            device=self.device,
        )
        self.bags.init_embedding_weights_uniform(-0.01, 0.01)
        shape = (job.batch, len(job.tables) * job.dim) if pooled else (job.ids, job.dim)
        made = {"device": self.device, "dtype": self.dtype}
        self.gradients = [torch.randn(shape, **made) for _ in range(SETS)]
        flat = [np.concatenate([ids.reshape(-1) for ids in batch]).astype(np.int64) for batch in cases.draw(job)[0]]
        self.ids = [torch.from_numpy(ids).to(self.device) for ids in flat]
        self.offsets = torch.arange(0, job.ids + 1, job.valency, device=self.device)

    def run(self, what: str, index: int) -> None:
        ids = self.ids[index % len(self.ids)]
        if what == "forward":
            with self.torch.no_grad():
                self.kept = self.bags(ids, self.offsets)
            return
        found = self.bags(ids, self.offsets)
        found.backward(self.gradients[index % SETS])
        self.kept = found.detach()
