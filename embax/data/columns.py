"""What the columns of a data set are for: told by their types, or by the user.

Strings, integers and booleans are categories; lists of them are bags of categories; other numbers are numbers.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from embax.data.files import DataError


class Columns(NamedTuple):
    """Names of columns by what they are for.

    Attributes:
      label: 0 and 1, or booleans; None where every row is an event that happened.
      categorical: one value of a category in each row.
      bags: a list of them in each row.
      numeric: a number in each row.
    """

    label: str | None
    categorical: tuple[str, ...]
    bags: tuple[str, ...]
    numeric: tuple[str, ...]

    @property
    def inputs(self) -> tuple[str, ...]:
        """All but the label."""
        return self.categorical + self.bags + self.numeric

    @property
    def all(self) -> tuple[str, ...]:
        """What must be read."""
        return self.inputs if self.label is None else (*self.inputs, self.label)


def columns_of(
    schema: Any,
    label: str | None,
    categorical: Sequence[str] = (),
    numeric: Sequence[str] = (),
    ignore: Sequence[str] = (),
    where: str = "the data",
) -> Columns:
    """Returns what each column is for.

    Args:
      schema: a ``pyarrow.Schema``.
      label: the column to be predicted, or None.
      categorical: columns that are categories whatever their type: floats, dates.
      numeric: columns that are numbers whatever their type: integers, booleans.
      ignore: columns to be left out.
      where: the data, for errors.

    Raises:
      DataError: a name that no column has or that is given twice, a column of a type that is neither.
    """
    labels = [] if label is None else [label]
    for option, names in (("label", labels), ("categorical", categorical), ("numeric", numeric), ("ignore", ignore)):
        for name in names:
            if name not in schema.names:
                raise DataError(
                    f'{where}: there is no column "{name}" (--{option}); there are {", ".join(schema.names)}'
                )
    given = [*labels, *categorical, *numeric, *ignore]
    twice = sorted({name for name in given if given.count(name) > 1})
    if twice:
        raise DataError(f'{where}: column "{twice[0]}" is named for two purposes; name it once')
    found: dict[str, list[str]] = {"categorical": [], "bags": [], "numeric": []}
    for field in schema:
        if field.name == label:
            _check_label(field, where)
        elif field.name not in ignore:
            found[_kind(field, categorical, numeric, where)].append(field.name)
    if not found["categorical"] + found["bags"]:
        raise DataError(f"{where}: there are no categories among the columns; name some (--categorical)")
    return Columns(label, *(tuple(found[kind]) for kind in ("categorical", "bags", "numeric")))


def _kind(field: Any, categorical: Iterable[str], numeric: Iterable[str], where: str) -> str:
    import pyarrow.types as types

    kind = field.type
    what = f'{where}: column "{field.name}" is {kind}'
    if field.name in numeric:
        if not (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_decimal(kind)):
            raise DataError(f"{what}, which is no number; leave it out of --numeric")
        return "numeric"
    if types.is_list(kind) or types.is_large_list(kind):
        if not _is_category(kind.value_type):
            raise DataError(f"{what}; a list must be of strings or integers: --ignore {field.name} leaves it out")
        return "bags"
    if _is_category(kind):
        return "categorical"
    if field.name in categorical:
        if not _can_be_category(kind):
            raise DataError(f"{what}, whose values cannot be categories; leave it out of --categorical")
        return "categorical"
    if types.is_floating(kind) or types.is_decimal(kind):
        return "numeric"
    other = f", --time {field.name} parts the rows by it" * types.is_temporal(kind)
    other += f", --categorical {field.name} takes each of its values for one" * _can_be_category(kind)
    raise DataError(f"{what}, neither a category nor a number; --ignore {field.name} leaves it out{other}")


def _is_category(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        return _is_category(kind.value_type)
    return types.is_string(kind) or types.is_large_string(kind) or types.is_integer(kind) or types.is_boolean(kind)


def _can_be_category(kind: Any) -> bool:
    """Returns whether values can be counted, ordered and made of text, for whoever asks for it."""
    import pyarrow.types as types

    number = types.is_float32(kind) or types.is_float64(kind) or types.is_decimal(kind)
    return number or types.is_date(kind) or types.is_timestamp(kind)


def _check_label(field: Any, where: str) -> None:
    import pyarrow.types as types

    if not (types.is_integer(field.type) or types.is_floating(field.type) or types.is_boolean(field.type)):
        raise DataError(
            f'{where}: column "{field.name}" is {field.type}, and a label must be 0 and 1, or booleans; name another '
            "(--label), or make it numbers"
        )
