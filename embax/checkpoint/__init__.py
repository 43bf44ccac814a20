"""Checkpoints that load into any plan; needs ``pip install 'embax[checkpoint]'``."""

from embax.checkpoint.checkpoints import Checkpoints as Checkpoints
from embax.checkpoint.checkpoints import Restored as Restored
from embax.checkpoint.errors import CheckpointError as CheckpointError
from embax.checkpoint.export import export_table as export_table
from embax.checkpoint.loading import Choice as Choice
