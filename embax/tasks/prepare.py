"""From settings to data that are ready: files, what their columns are for, which row is for what, vocabularies."""

from typing import Any, NamedTuple

from embax.data.blocks import encoded
from embax.data.columns import Columns, columns_of
from embax.data.files import DataError, Files, Group, sample
from embax.data.loader import Encode
from embax.data.scan import Scanned, scan
from embax.data.split import TEST, Split, by_time
from embax.tasks.run_folder import RunFolder
from embax.tasks.settings import Settings

ALL_TEST = Split(test=1.0)  # every row of other files that are for the test


class Prepared(NamedTuple):
    """Data that are ready.

    Attributes:
      files: of training, and of the test unless ``tests`` has others; None where the data are not at hand.
      tests: files that are for the test alone, or None.
      columns: what they are for.
      split: which row is for what.
      scanned: vocabularies, scales, counts.
    """

    files: Any
    tests: Files | None
    columns: Columns
    split: Split
    scanned: Scanned

    def encode(self, part: int, shuffled: bool = False) -> tuple[list[Group], Encode]:
        """Returns the row groups that have rows of a part, and what makes rows of them."""
        if part == TEST and self.tests is not None:
            return self.tests.groups, Encode(self.columns, self.scanned, ALL_TEST, TEST, False)
        return self.files.groups, Encode(self.columns, self.scanned, self.split, part, shuffled)

    def rows(self, part: str) -> int:
        """Returns how many rows a part has."""
        return self.tests.rows if part == "test" and self.tests is not None else self.scanned.rows[part]

    def fingerprint(self) -> list[list[Any]]:
        """Returns what tells these files from others wherever they lie: rows, bytes and samples of their content."""
        files = [self.files, *([self.tests] if self.tests else [])]
        groups = [[group.number, group.rows, group.size] for one in files for group in one.groups]
        return groups + [[sample(path)] for one in files for path in one.paths]


def opened(settings: Settings, folder: RunFolder) -> tuple[Files, Files | None]:
    """Returns the files to train on and those for the test alone; CSV is made Parquet in the run's folder."""
    import pyarrow as pa

    # A CSV's types are guessed of its first rows: categories are as they are written, and other files as the first.
    texts = {name: pa.string() for name in settings.categorical}
    files = Files(settings.data, folder.path / "parquet", texts)
    if settings.test is None:
        return files, None
    types = dict(zip(files.schema.names, files.schema.types, strict=True))
    tests = Files(settings.test, folder.path / "parquet", types)
    for name in files.schema.names:
        if name not in tests.schema.names:
            raise DataError(f'{tests.paths[0]}: column "{name}" is missing, which {files.paths[0]} has')
    return files, tests


def prepare(settings: Any, folder: RunFolder, progress: Any = None) -> Prepared:
    """Returns data after one pass over all of them, and one more over the column of time if there is one.

    Args:
      settings: of ``Settings.of_task``.
      folder: of the run.
      progress: called with the rows that were read, or None.

    Raises:
      DataError: whatever is wrong with the data or the settings.
    """
    files, tests = opened(settings, folder)
    columns = roles(settings, files)
    split = _split(settings, files, tests)
    scanned = scan(files, columns, split, settings.min_count, progress)
    if settings.batch_size > scanned.rows["train"] * settings.epochs:
        raise DataError(
            f"--batch-size {settings.batch_size} is more than the {scanned.rows['train']} training rows of "
            f"{settings.epochs} epochs; give less"
        )
    if settings.task == "retrieval" and scanned.card(settings.item[0]) == 1:
        raise DataError(
            f'{files.paths[0]}: no value of column "{settings.item[0]}" comes {settings.min_count} times '
            "(--min-count); give less"
        )
    if tests is not None:  # what is wrong with them is said now, not after training
        for group in tests.groups:
            encoded(tests.read(group, sorted(columns.all)), columns, scanned, group)
    return Prepared(files, tests, columns, split, scanned)


def known(folder: RunFolder) -> Prepared:
    """Returns what a run knows of its data, without the data: enough to look up and to predict."""
    return Prepared(None, None, *_kept(folder))


def _kept(folder: RunFolder) -> tuple[Columns, Split, Scanned]:
    columns, scanned, split = folder.known()
    return columns, split, scanned


def again(settings: Settings, folder: RunFolder) -> Prepared:
    """Returns data of a run that is to go on, without a pass over them; DataError if they are others."""
    files, tests = opened(settings, folder)
    found = Prepared(files, tests, *_kept(folder))
    if found.fingerprint() != folder.document()["fingerprint"]:
        raise DataError(
            f"{settings.data}: its files have other rows than those that {folder.path} was begun with; bring "
            "those back, or begin a new run with another --output"
        )
    return found


def roles(settings: Settings, files: Files) -> Columns:
    """Returns what each column is for, as the task has it."""
    where, names = files.paths[0], files.schema.names
    time = () if settings.time is None or settings.time in settings.categorical + settings.numeric else (settings.time,)
    ignore = tuple(dict.fromkeys((*settings.ignore, *(name for name in time if name in names))))
    if settings.task == "click":
        columns = columns_of(files.schema, settings.label, settings.categorical, settings.numeric, ignore, where)
        lost = [name for name in settings.wide if name not in columns.categorical + columns.bags]
        if lost:
            raise DataError(f'{where}: --wide names "{lost[0]}", which is no column of categories')
        if settings.model != "logistic" and set(columns.categorical + columns.bags) == set(settings.wide):
            raise DataError(
                f"{where}: --wide names all columns of categories, and --model {settings.model} needs one with "
                "embeddings; leave one out, or take --model logistic"
            )
        return columns
    sides = tuple(dict.fromkeys(settings.user + settings.item))
    for option, own in (("user", settings.user), ("item", settings.item)):
        missing = [name for name in own if name not in names]
        if missing:
            raise DataError(f'{where}: there is no column "{missing[0]}" (--{option}); there are {", ".join(names)}')
    others = [name for name in names if name not in sides]
    numeric = [name for name in settings.numeric if name in sides]
    categorical = [
        name for name in sides if name in settings.categorical or name in (settings.user[0], settings.item[0])
    ]
    columns = columns_of(files.schema, None, categorical, numeric, others, where)
    if settings.user[0] == settings.item[0]:
        raise DataError(f'{where}: column "{settings.user[0]}" is the key of --user and of --item; name two')
    if columns.numeric:
        name = columns.numeric[0]
        raise DataError(
            f'{where}: column "{name}" is a number, and --user and --item take categories alone; leave it out, or '
            f"--categorical {name} takes each of its values for one"
        )
    for key in (settings.user[0], settings.item[0]):
        if key not in columns.categorical:
            raise DataError(f'{where}: column "{key}" is {files.schema.field(key).type}, and a key must be one value')
    return columns


def _split(settings: Settings, files: Files, tests: Files | None) -> Split:
    test = 0.0 if tests is not None else settings.test_fraction
    if settings.time is not None:
        found = by_time(
            files, settings.time, settings.validation_fraction, test, settings.test_from, settings.limit_rows
        )
        return found._replace(seed=settings.seed)
    return Split(settings.seed, settings.validation_fraction, test, kept=settings.limit_rows, rows=files.rows)
