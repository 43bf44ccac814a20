"""The settings of a run: said once, for the command line, the file of settings and the run's own record."""

import dataclasses
import difflib
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from embax.data.files import DataError
from embax.tasks.optimizers import NAMES

TASKS = ("click", "retrieval")
MODELS = {"click": ("dlrm", "dcn", "logistic"), "retrieval": ("mf", "two-tower")}
LOSSES = ("softmax", "bpr", "ccl")
SCORES = ("dot", "cosine")
BASELINES = ("logistic", "rate")


def _said(default: Any, text: str, **rule: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, **rule})


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run does; every attribute is a flag, ``batch_size`` being ``--batch-size``, and a key of a file."""

    data: str
    task: Literal["click", "retrieval"] = _said("click", "What is predicted: a label, or the next item of a user.")
    label: str | None = _said(None, "Column of 0 and 1 that is predicted (click).")
    user: tuple[str, ...] = _said((), "Columns of the user (retrieval), separated by commas; the first is the key.")
    item: tuple[str, ...] = _said((), "Columns of the item, likewise.")
    categorical: tuple[str, ...] = _said((), "Columns to take as categories whatever their type.")
    numeric: tuple[str, ...] = _said((), "Columns to take as numbers whatever their type.")
    ignore: tuple[str, ...] = _said((), "Columns to leave out.")
    wide: tuple[str, ...] = _said((), "Columns whose values get a weight and no embedding.")
    min_count: int = _said(1, "How often a value must occur in training to get a row of its own.", min=1)
    test: str | None = _said(None, "Other files, for the test alone.")
    test_fraction: float = _said(0.1, "Share of the rows for the test.", min=0.0, max=0.9)
    validation_fraction: float = _said(0.0, "Share of the rows for validation after each epoch.", min=0.0, max=0.9)
    time: str | None = _said(None, "Column of time: the last rows are the test. By chance without it.")
    test_from: str | None = _said(None, "First time of the test, instead of --test-fraction.")
    limit_rows: int | None = _said(None, "Use that many rows, evenly spaced.", min=1)
    model: str | None = _said(None, "click: dlrm, dcn, logistic; retrieval: mf, two-tower. The first is the default.")
    embedding_dim: int | None = _said(None, "Length of embeddings; 8 (click) or 64 (retrieval).", min=1)
    hidden: tuple[int, ...] = _said((64, 32), "Widths of the network's layers, separated by commas.", min=1)
    optimizer: str | None = _said(None, f"Of the tables: {', '.join(NAMES)}; adagrad (click) or adam (retrieval).")
    learning_rate: float | None = _said(None, "Of the embeddings; 0.1 (click) or 0.002 (retrieval).", min=0.0)
    weight_rate: float = _said(0.2, "Of the weights of values (click).", min=0.0)
    dense_rate: float = _said(3e-3, "Adam's rate for the dense part.", min=0.0)
    l2: float | None = _said(None, "Cost of the squares of looked-up rows; 0.001 (click) or 0 (retrieval).", min=0.0)
    dropout: float = _said(0.3, "Share of a sample's embeddings left out in training (click).", min=0.0, max=0.99)
    label_smoothing: float = _said(0.0, "How far labels move towards each other (click).", min=0.0, max=0.9)
    constant_rate: bool = _said(False, "Keep the rates; they fall linearly to 0 otherwise.")
    baseline: str = _said("logistic", "click: logistic, trained beside the model, or rate, the mean of the labels.")
    loss: str = _said("softmax", "retrieval: softmax, bpr (dot product) or ccl (cosine).")
    score: str = _said("dot", "Of softmax: dot, where items have lengths and users do not, or cosine.")
    negatives: int = _said(1024, "Items drawn for each batch as negatives (retrieval).", min=1)
    temperature: float = _said(0.12, "Of the scores in softmax.", min=1e-4)
    margin: float = _said(0.8, "Cosine below which ccl leaves a negative alone.", min=-1.0, max=1.0)
    negative_weight: float = _said(150.0, "Weight of the mean over negatives in ccl.", min=0.0)
    epochs: int | None = _said(None, "Passes over the training rows; 2 (click) or 12 (retrieval).", min=1)
    batch_size: int = _said(2048, "Samples of a step.", min=1)
    seed: int = _said(0, "Of everything that is drawn.", min=0, max=2**32 - 1)
    devices: int = _said(1, "Devices to train on; on a CPU as many are made of its cores.", min=1)
    workers: int = _said(0, "Processes that read and encode; 0 for a thread of this one.", min=0)
    mixed_rows: int = _said(1 << 20, "Rows that are shuffled at once; memory grows with it.", min=1)
    ahead: int = _said(2, "Batches prepared ahead of the step; 0 prepares each when its turn comes.", min=0)
    save_every: float = _said(600.0, "Seconds between checkpoints, besides those after each epoch.", min=1.0)

    def of_task(self) -> "Settings":
        """Returns the settings with the task's defaults for what was not said; DataError for what it does not take."""
        click = self.task == "click"
        given = {
            "model": MODELS[self.task][0] if self.task in MODELS else None,
            "embedding_dim": 8 if click else 64,
            "optimizer": "adagrad" if click else "adam",
            "learning_rate": 0.1 if click else 0.002,
            "l2": 1e-3 if click else 0.0,
            "epochs": 2 if click else 12,
        }
        whole = dataclasses.replace(self, **{k: v for k, v in given.items() if getattr(self, k) is None})
        for name, known in (
            ("task", TASKS),
            ("model", MODELS.get(self.task, ())),
            ("optimizer", NAMES),
            ("loss", LOSSES),
            ("score", SCORES),
            ("baseline", BASELINES),
        ):
            if getattr(whole, name) not in known:
                raise DataError(f"--{name} {getattr(whole, name)!r} must be one of {', '.join(known)}")
        _check_roles(whole)
        return whole


def _check_roles(settings: Settings) -> None:
    if settings.task == "click" and settings.label is None:
        raise DataError("--label is missing: name the column of 0 and 1 that is to be predicted")
    if settings.task == "click" and settings.user + settings.item:
        raise DataError("--user and --item are for --task retrieval; a click model sees all columns")
    if settings.task == "retrieval" and not (settings.user and settings.item):
        raise DataError("--user and --item are missing: name the columns of users and items, keys first")
    if settings.task == "retrieval" and settings.label is not None:
        raise DataError("--label is for --task click; a row of --task retrieval is an event that happened")
    if settings.test_from is not None and settings.test is not None:
        raise DataError("--test-from and --test exclude each other: one takes the test from the data, one brings it")
    if settings.model == "dcn" and not settings.hidden:
        raise DataError("--hidden is empty: --model dcn needs one width or more")
    if settings.devices & (settings.devices - 1) or settings.batch_size % settings.devices:
        raise DataError(
            f"--devices {settings.devices} must be 1, 2, 4, 8 and so on, and divide --batch-size {settings.batch_size}"
        )
    if settings.test_from is not None and settings.time is None:
        raise DataError("--test-from needs --time, the column that it is a value of")
    if settings.test_fraction + settings.validation_fraction >= 1:
        raise DataError("--test-fraction and --validation-fraction together leave no row to train on")


FIELDS = {field.name: field for field in dataclasses.fields(Settings)}


def read_file(path: Path) -> dict[str, Any]:
    """Returns the settings that a TOML file says; DataError for what is wrong with it."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # UnicodeDecodeError too
        raise DataError(f"{path} is not TOML: {error}") from None
    return checked(found, str(path))


def checked(found: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Returns settings with values of their types; DataError names the key, the value and what it must be.

    Args:
      found: values by name.
      where: the file that they are from; empty for the command line.
    """
    made = {}
    for key, value in found.items():
        name = key.replace("-", "_")
        if name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, 1)
            raise DataError(f"{where}: there is no setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        made[name] = _typed(FIELDS[name], value, where)
    return made


def _typed(field: Any, value: Any, where: str) -> Any:
    kind, rule = str(field.type), field.metadata
    what = f"{where}: {field.name} = {value!r}" if where else f"--{field.name.replace('_', '-')} {value}"
    if kind.startswith("tuple"):
        value = [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
        return _listed(int if "int" in kind else str, value, rule, what)
    wanted = bool if "bool" in kind else float if "float" in kind else int if "int" in kind else str
    numbers = (int, float) if wanted is float else (wanted,)
    fits = isinstance(value, numbers) and (wanted is bool or not isinstance(value, bool))
    if not fits or (isinstance(value, float) and not math.isfinite(value)):
        names = {bool: "true or false", float: "a number", int: "a whole number", str: "text"}
        raise DataError(f"{what} must be {names[wanted]}")
    if "min" in rule and value < rule["min"] or "max" in rule and value > rule["max"]:
        most = f" to {rule['max']:.10g}" if "max" in rule else " or more"
        raise DataError(f"{what} must be {rule['min']:g}{most}")
    return float(value) if wanted is float else value


def _listed(of: type, value: Any, rule: Mapping[str, Any], what: str) -> tuple[Any, ...]:
    """Returns a list of settings as a tuple; from a command line as numbers."""
    try:
        if not isinstance(value, (list, tuple)) or not all(type(part) in (of, str) for part in value):
            raise TypeError
        found = tuple(of(part) for part in value)
    except (TypeError, ValueError):
        raise DataError(f"{what} must be a list of {'whole numbers' if of is int else 'names'}") from None
    if "min" in rule and any(part < rule["min"] for part in found):
        raise DataError(f"{what} must be a list of whole numbers from {rule['min']}")
    return found
