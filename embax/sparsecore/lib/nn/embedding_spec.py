"""The SparseCore names of embax's own specifications and optimizers: the same classes, nothing translated.

>>> import embax
>>> AdagradOptimizerSpec is embax.Adagrad
True
"""

from embax.optimizers.adagrad import Adagrad as AdagradOptimizerSpec
from embax.optimizers.adagrad import AdagradMomentum as AdagradMomentumOptimizerSpec
from embax.optimizers.adagrad import AdagradMomentumSlotVariables as AdagradMomentumSlotVariables
from embax.optimizers.adagrad import AdagradSlotVariables as AdagradSlotVariables
from embax.optimizers.adam import Adam as AdamOptimizerSpec
from embax.optimizers.adam import AdamSlotVariables as AdamSlotVariables
from embax.optimizers.adam import LaProp as LaPropOptimizerSpec
from embax.optimizers.adam import LaPropSlotVariables as LaPropSlotVariables
from embax.optimizers.base import CallablePlaceholder as CallablePlaceholder
from embax.optimizers.base import Optimizer as OptimizerSpec
from embax.optimizers.custom import Custom as CustomOptimizerSpec
from embax.optimizers.frequency import F2A as F2AOptimizerSpec
from embax.optimizers.frequency import F2ASlotVariables as F2ASlotVariables
from embax.optimizers.ftrl import FTRL as FTRLOptimizerSpec
from embax.optimizers.ftrl import FTRLSlotVariables as FTRLSlotVariables
from embax.optimizers.sgd import SGD as SGDOptimizerSpec
from embax.optimizers.sgd import SGDSlotVariables as SGDSlotVariables
from embax.specs import FeatureIdTransformation as FeatureIdTransformation
from embax.specs import FeatureSpec as FeatureSpec
from embax.specs import QuantizationConfig as QuantizationConfig
from embax.specs import StackedTableSpec as StackedTableSpec
from embax.specs import TableSettingInStack as TableSettingInStack
from embax.specs import TableSpec as TableSpec

__all__ = [
    "AdagradMomentumOptimizerSpec",
    "AdagradMomentumSlotVariables",
    "AdagradOptimizerSpec",
    "AdagradSlotVariables",
    "AdamOptimizerSpec",
    "AdamSlotVariables",
    "CallablePlaceholder",
    "CustomOptimizerSpec",
    "F2AOptimizerSpec",
    "F2ASlotVariables",
    "FTRLOptimizerSpec",
    "FTRLSlotVariables",
    "FeatureIdTransformation",
    "FeatureSpec",
    "LaPropOptimizerSpec",
    "LaPropSlotVariables",
    "OptimizerSpec",
    "QuantizationConfig",
    "SGDOptimizerSpec",
    "SGDSlotVariables",
    "StackedTableSpec",
    "TableSettingInStack",
    "TableSpec",
]
