"""embax: large embedding tables for JAX, looked up, pooled and trained in place.

The library in seven lines:

>>> import jax, embax
>>> table = embax.TableSpec(name="item", vocabulary_size=1000, embedding_dim=4, combiner="mean",
...     initializer=jax.nn.initializers.normal(0.1), optimizer=embax.Adagrad(0.1))
>>> features = {"history": embax.FeatureSpec(name="history", table_spec=table,
...     input_shape=(None,), output_shape=(None, 4))}
>>> ids = {"history": [[5, 3], [], [6, 6, 812]]}
>>> loss_fn = lambda acts: (acts["history"] ** 2).sum()

>>> plan = embax.plan(features)                                    # host, once: frozen, static under jit
>>> tables = embax.init(plan, jax.random.key(0))                   # {stack: TableState(table, slots)}
>>> batch = embax.preprocess(plan, ids)                            # host: validates -> IdBatch
>>> acts, residuals = embax.lookup(plan, tables, batch)            # {"history": [3, 4]}
>>> loss, act_grads = jax.value_and_grad(loss_fn)(acts)
>>> tables = embax.update(plan, tables, residuals, act_grads, step=0)  # touched rows only
>>> acts["history"].shape
(3, 4)
"""

from embax import costs as costs
from embax.allocator import tune_allocator as tune_allocator
from embax.check_step import StepReport as StepReport
from embax.check_step import check_step as check_step
from embax.gradients.doors import value_and_grad as value_and_grad
from embax.gradients.joint_optimizer import JointOptimizer as JointOptimizer
from embax.gradients.norms import clip_by_global_norm as clip_by_global_norm
from embax.gradients.norms import global_norm as global_norm
from embax.gradients.prefetch import prefetch as prefetch
from embax.gradients.primitive import SparseGradientError as SparseGradientError
from embax.gradients.table import Prefetched as Prefetched
from embax.gradients.table import Table as Table
from embax.id_batch import IdBatch as IdBatch
from embax.id_inputs import CooIds as CooIds
from embax.id_inputs import RaggedIds as RaggedIds
from embax.kernels.native import native_calls as native_calls
from embax.lookup import Residuals as Residuals
from embax.lookup import lookup as lookup
from embax.optimizers import F2A as F2A
from embax.optimizers import FTRL as FTRL
from embax.optimizers import SGD as SGD
from embax.optimizers import Adagrad as Adagrad
from embax.optimizers import AdagradMomentum as AdagradMomentum
from embax.optimizers import Adam as Adam
from embax.optimizers import Custom as Custom
from embax.optimizers import LaProp as LaProp
from embax.optimizers import Optax as Optax
from embax.optimizers import Optimizer as Optimizer
from embax.optimizers import RowwiseAdagrad as RowwiseAdagrad
from embax.placement import Devices as Devices
from embax.planning import Plan as Plan
from embax.planning import plan as plan
from embax.preprocess import preprocess as preprocess
from embax.preprocess_traced import preprocess_traced as preprocess_traced
from embax.quantized import QuantizedRows as QuantizedRows
from embax.quantized import quantize_rows as quantize_rows
from embax.quantized import quantize_tables as quantize_tables
from embax.row_gradients import RowGradients as RowGradients
from embax.row_gradients import merge_row_gradients as merge_row_gradients
from embax.specs import FeatureSpec as FeatureSpec
from embax.specs import QuantizationConfig as QuantizationConfig
from embax.specs import TableSpec as TableSpec
from embax.table_state import TableState as TableState
from embax.table_state import from_arrays as from_arrays
from embax.table_state import init as init
from embax.table_state import init_slots as init_slots
from embax.table_state import to_arrays as to_arrays
from embax.take import take as take
from embax.take import take_gradient as take_gradient
from embax.touched import track as track
from embax.update import apply_row_gradients as apply_row_gradients
from embax.update import apply_rows as apply_rows
from embax.update import row_gradients as row_gradients
from embax.update import update as update

__version__ = "0.1.0"
