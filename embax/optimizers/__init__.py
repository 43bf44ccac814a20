"""Optimizers of table rows: one file per family, one protocol (``base.Optimizer``)."""

from embax.optimizers.adagrad import Adagrad as Adagrad
from embax.optimizers.adagrad import AdagradMomentum as AdagradMomentum
from embax.optimizers.adagrad import RowwiseAdagrad as RowwiseAdagrad
from embax.optimizers.adam import Adam as Adam
from embax.optimizers.adam import LaProp as LaProp
from embax.optimizers.base import Optimizer as Optimizer
from embax.optimizers.base import Slot as Slot
from embax.optimizers.custom import Custom as Custom
from embax.optimizers.frequency import F2A as F2A
from embax.optimizers.ftrl import FTRL as FTRL
from embax.optimizers.optax_bridge import Optax as Optax
from embax.optimizers.sgd import SGD as SGD
