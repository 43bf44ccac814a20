"""Checkpoints of training: tables with their slots, the dense part, and where the data stood, by one call."""

import dataclasses
import functools
import itertools
import json
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from embax.checkpoint.compaction import compact_step
from embax.checkpoint.described import described
from embax.checkpoint.document import ADDED, read_body, read_document
from embax.checkpoint.errors import CheckpointError
from embax.checkpoint.handlers import DENSE, DOCUMENT, TABLES, DocumentArgs, TablesArgs, registry
from embax.checkpoint.held import Held, check_names, held_by, states_of
from embax.checkpoint.increments import base_of, is_tracked, new_mark, placed_marks
from embax.checkpoint.loading import Choice, Wanted, check_fits, load
from embax.checkpoint.tables import folder_of
from embax.checkpoint.trees import check_forms, forms_of, named_leaves, placed_as, with_leaves
from embax.planning import Plan
from embax.table_state import TableState, check_slots
from embax.touched import untouched


@dataclasses.dataclass(frozen=True)
class Restored:
    """What ``Checkpoints.restore`` found.

    Attributes:
      step: of the checkpoint.
      tables: ``{stack: TableState}`` of the plan; None where a model has them.
      dense: the dense part; None where it was not asked for, or a model has it.
      data: what ``save`` was given, as JSON has it.
    """

    step: int
    tables: Any
    dense: Any
    data: Any


class Checkpoints:
    """The checkpoints of a training run, in one folder, a step each.

    On disk tables are ``[vocabulary_size, embedding_dim]`` by their names, whatever devices, stacks and placements they
    came from, and load into any plan. A step is there when it is whole; a death at any moment leaves the steps before
    it as they are. Every process of a job calls every method; one job writes into a folder.

    Args:
      directory: an absolute path, or one relative to the working directory; made when the first step is saved.
      keep: how many of the newest steps stay; None for all.
      keep_every: steps that are multiples of it stay, too.
      asynchronous: ``save`` copies the tables to the host and returns; files are written while training goes on. False
        writes before it returns, with the memory of a few pieces.
      deltas: of tables that are tracked (``embax.track``) a save writes only the rows written since the step before, so
        many times in a row at most; then, or when that would be half of everything, all rows again. 0 for never.

    >>> import tempfile, jax, embax, embax.checkpoint
    >>> table = embax.TableSpec(name="item", vocabulary_size=6, embedding_dim=2, combiner="sum",
    ...     initializer=jax.nn.initializers.ones, optimizer=embax.Adagrad(0.5))
    >>> plan = embax.plan(embax.FeatureSpec(name="x", table_spec=table, input_shape=(None,), output_shape=(None, 2)))
    >>> tables = embax.init(plan, jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder, embax.checkpoint.Checkpoints(folder) as checkpoints:
    ...     tables = checkpoints.save(7, plan, tables, data={"epoch": 1})
    ...     found = checkpoints.restore(plan)
    >>> found.step, found.tables["item"].table.shape, found.data
    (7, (6, 2), {'epoch': 1})
    """

    def __init__(
        self,
        directory: Any,
        *,
        keep: int | None = 3,
        keep_every: int | None = None,
        asynchronous: bool = True,
        deltas: int = 16,
    ):
        if "://" in str(directory):
            raise ValueError(f"Checkpoints: {str(directory)!r} is no folder of this machine; give one that is mounted")
        if keep is not None and keep < 1:
            raise ValueError(f"Checkpoints: keep={keep} must be at least 1, or None to keep all")
        if not isinstance(deltas, int) or deltas < 0:
            raise ValueError(f"Checkpoints: deltas={deltas!r} must be an integer of at least 0; 0 for none")
        self.directory, self._asynchronous, self._deltas = Path(directory).absolute(), asynchronous, deltas
        if self.directory.exists() and not self.directory.is_dir():
            raise ValueError(f"Checkpoints: {self.directory} is a file; name a folder")
        self._under_way: int | None = None
        self._everything = False
        self._options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, keep_period=keep_every, enable_async_checkpointing=asynchronous, create=True
        )

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        # Made when it is needed, for it makes the folder: a name that is misspelt must not leave one behind.
        return ocp.CheckpointManager(self.directory, options=self._options, handler_registry=registry())

    def save(
        self, step: int, plan: Plan, tables: Mapping[str, TableState], *, dense: Any = None, data: Any = None
    ) -> dict[str, TableState]:
        """Saves a step, and returns the tables to go on with; what is under way of the step before is waited for.

        Those are the tables given; where they are tracked, none of their rows is marked as written since.

        Args:
          step: of training, above those that are there.
          plan: of the tables.
          tables: ``{stack: TableState}``. They may be donated as soon as this returns.
          dense: any pytree of arrays: parameters, optimizer state; None for none.
          data: of JSON: where the input pipeline stands, for one.

        Raises:
          ValueError: a step that is there or below the newest, tables of another plan, or names that no disk takes.
          CheckpointError: the step before, which was under way, was not saved; this one is not begun.
          TypeError: data that JSON does not have.
        """
        check_slots(plan, tables)
        states = self.save_held(step, states_of(held_by(plan), tables), dense, data)
        return dict(zip([stack.name for stack in plan.stacks], states, strict=True))

    def save_held(self, step: int, tables: list[tuple[Held, TableState]], dense: Any, data: Any) -> list[TableState]:
        """Saves a step of tables wherever they are held, and returns their states to go on with; see ``save``."""
        step, leaves = self._checked_step(step), named_leaves(dense)
        check_names([held for held, _ in tables])
        for held, state in tables:
            for table, part in itertools.product(held.stack.tables, held.parts(state)):
                folder_of(self.directory, held.name(table), part)  # whether there is such a name on disk
        try:
            data = json.loads(json.dumps(data, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise TypeError(f"save: data is not of JSON ({error}); give numbers, texts, lists and dicts") from None
        tables = [(held, placed_marks(held, state)) for held, state in tables]
        known = described(tables)
        body = {"step": step, "tables": known, "dense": forms_of(leaves) if leaves else None, "data": data, **ADDED}
        base, body["mark"] = None, new_mark() if is_tracked(tables) else 0
        if body["mark"] and not self._everything:
            base = base_of(self.directory, self.steps(), tables, known, self._deltas)
        if base is not None:
            body |= {"base": base.body["base"], "deltas": [*base.body["deltas"], base.delta]}
        items: dict[str, Any] = {
            TABLES: TablesArgs(tables, not self._asynchronous, base),
            DOCUMENT: DocumentArgs(body, base.files() if base else {}),
        }
        if leaves:
            items[DENSE] = ocp.args.StandardSave(leaves)
        self._under_way, self._everything = step, False
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        if not body["mark"]:
            return [state for _, state in tables]
        return [s._replace(touched=untouched(held.stack, held.devices, body["mark"])) for held, s in tables]

    def restore(self, plan: Plan, *, step: int | None = None, dense: Any = None, **choice: Any) -> Restored:
        """Returns a step, its tables as those of ``plan``.

        Args:
          plan: whose tables are wanted: on any devices, stacked and placed anyhow, of any dtype.
          step: None for the newest.
          dense: a pytree like the one saved, of arrays or ``jax.ShapeDtypeStruct`` with shardings; None for none.
          choice: as for ``Choice``: key, rename, accept, fresh_slots, serving, shrink, track.

        Raises:
          CheckpointError: no such step, a damaged one, or tables that do not fit: all differences are listed.
        """
        found = self.restore_held(step, [(held, None) for held in held_by(plan)], dense, Choice(**choice))
        names = [stack.name for stack in plan.stacks]
        return dataclasses.replace(found, tables=dict(zip(names, found.tables, strict=True)))

    def restore_held(self, step: int | None, wanted: Wanted, dense: Any, choice: Choice) -> Restored:
        """Returns a step, its tables in the order in which they are wanted; see ``restore``.

        A state that is given has the new rows of a vocabulary that has grown.
        """
        self.wait()
        step = self._step(step)
        folder = self.directory / str(step)
        body = read_document(folder / DOCUMENT, folder)
        if body["step"] != step:
            raise CheckpointError(
                f"{folder / DOCUMENT}: it is of step {body['step']}: the folder was renamed or copied; name it so"
            )
        check_fits(folder, body["tables"], wanted, choice)
        found = self._dense(folder, body, dense, choice.serving)
        tables = [load(folder / TABLES, body, held, state, choice) for held, state in wanted]
        return Restored(step, tables, found, body["data"])

    def forget_marks(self) -> None:
        """Makes the next save write everything: rows were changed of which no mark tells."""
        self._everything = True

    def compact(self, step: int | None = None) -> None:
        """Lays the deltas of a step over its tables, on disk, so that it has tables alone; None for the newest.

        A death at any moment leaves the step as it was, or as it shall be. The memory of a few pieces is needed.
        """
        self.wait()
        folder, failure = self.directory / str(self._step(step)), None
        if jax.process_index() == 0:
            try:
                compact_step(folder)
            except CheckpointError as error:
                failure = error
        done = failure is None
        if jax.process_count() > 1:
            done = bool(multihost_utils.broadcast_one_to_all(np.int32(done)))
        if not done:
            raise failure or CheckpointError(f"{folder}: the first process could not compact it, and says why")

    def dense_forms(self, step: int | None = None) -> dict[str, dict]:
        """Returns shape and dtype of the arrays of a step's dense part, by name; errors as ``restore``."""
        self.wait()
        folder = self.directory / str(self._step(step))
        return read_body(folder / DOCUMENT, folder)["dense"] or {}

    def delete(self, step: int) -> None:
        """Deletes a step; CheckpointError if there is none of that number."""
        self.wait()
        self._manager.delete(self._step(step))

    def steps(self) -> list[int]:
        """Returns the steps that are whole, from the oldest to the newest."""
        if not self.directory.exists():
            return []
        if not self._manager.is_saving_in_progress():
            self._manager.reload()  # another process may have written, too
        return sorted(self._manager.all_steps())

    def wait(self) -> None:
        """Waits until what is being saved is on disk; what went wrong there is raised here."""
        if "_manager" not in self.__dict__:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # whatever Orbax, TensorStore or the disk has to say
            step, self._under_way = self._under_way, None
            raise CheckpointError(
                f"{self.directory}: step {step} was not saved: {error}; the steps before it are as they were, and no "
                "other was begun: mend the cause and save again"
            ) from error

    def close(self) -> None:
        """Waits, and lets go of threads."""
        try:
            self.wait()
        finally:
            if "_manager" in self.__dict__:
                self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, failure: Any, traceback: Any) -> None:
        try:
            self.close()
        except CheckpointError as error:
            if failure is None:
                raise
            failure.add_note(str(error))  # what went wrong first is what is raised

    def _step(self, step: int | None) -> int:
        steps = self.steps()
        if not self.directory.exists():
            raise CheckpointError(f"{self.directory}: there is no such folder; save a step first, or mend the name")
        if not steps:
            raise CheckpointError(f"{self.directory}: there is no checkpoint; save one, or name another folder")
        if step is not None and step not in steps:
            raise CheckpointError(f"{self.directory}: there is no step {step}; there are {steps}")
        return steps[-1] if step is None else step

    def _checked_step(self, step: Any) -> int:
        try:
            number = operator.index(step)
        except TypeError:
            number = -1
        if number < 0:
            raise ValueError(f"save: step={step!r} must be an integer of at least 0")
        self.wait()
        steps = self.steps()
        if number in steps:
            raise ValueError(
                f"save: step {number} is in {self.directory} already; save another step, or delete({number}) first"
            )
        if steps and number < steps[-1]:
            raise ValueError(
                f"save: step {number} is below step {steps[-1]}, which restore() would take for the newest; delete the "
                f"steps after {number} first, or save into another folder"
            )
        return number

    def _dense(self, folder: Path, body: dict, wanted: Any, partial: bool) -> Any:
        leaves = named_leaves(wanted)
        if not leaves:
            return wanted
        if body["dense"] is None:
            raise CheckpointError(f"{folder}: the checkpoint has no dense part; restore without dense=")
        check_forms(folder / DENSE, body["dense"], leaves, partial)
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, leaves)
        how = ocp.checkpoint_utils.construct_restore_args(target)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            args = ocp.args.PyTreeRestore(target, restore_args=how, partial_restore=True)
            found = checkpointer.restore(folder / DENSE, args=args)
        return with_leaves(wanted, {name: placed_as(found[name], leaf) for name, leaf in leaves.items()})
