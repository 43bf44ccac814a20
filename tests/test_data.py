"""Data in files: what is read, counted, encoded and cut into batches, and what is said of files that are wrong."""

import collections

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow", reason="the data pipeline reads by Arrow")
grain = pytest.importorskip("grain", reason="batches are made by Grain")

import pyarrow.parquet as pq  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from embax.data import blocks, columns, files, loader, scan, split, vocabulary  # noqa: E402

ROWS, GROUP = 1000, 130


def _table(rows=ROWS, seed=0):
    rng = np.random.default_rng(seed)
    words = np.array(["ant", "bee", "cat", "dög", ""])
    return pa.table(
        {
            "word": pa.array(words[rng.integers(0, 5, rows)], mask=rng.random(rows) < 0.1),
            "number": rng.integers(-3, 40, rows),
            "bag": [list(map(int, rng.integers(0, 9, n))) for n in rng.integers(0, 4, rows)],
            "price": pa.array(rng.normal(5, 2, rows), mask=rng.random(rows) < 0.2),
            "row": np.arange(rows, dtype=np.float64),
            "clicked": rng.integers(0, 2, rows),
        }
    )


@pytest.fixture
def path(tmp_path):
    pq.write_table(_table(), tmp_path / "data.parquet", row_group_size=GROUP)
    return tmp_path / "data.parquet"


def _known(path, **options):
    found = files.Files(path)
    own = columns.columns_of(found.schema, "clicked", **options)
    return found, own, scan.scan(found, own)


def test_columns_by_their_types(path):
    found, own, _ = _known(path)
    assert own == ("clicked", ("word", "number"), ("bag",), ("price", "row"))
    assert columns.columns_of(found.schema, "clicked", numeric=["number"], categorical=["price"], ignore=["row"]) == (
        "clicked",
        ("word", "price"),
        ("bag",),
        ("number",),
    )


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.one_of(st.none(), st.integers(-9, 9)), max_size=20), min_size=1, max_size=6), st.integers(1, 4)
)
def test_a_vocabulary_has_what_came_often_enough(parts, min_count):
    """However the column is cut into batches: values by how often they came, ties by their order."""
    counter = vocabulary.Counter()
    for part in parts:
        counter.add(pa.array(part, pa.int64()))
    values = [value for part in parts for value in part]
    counts = collections.Counter(value for value in values if value is not None)
    wanted = sorted((value for value, n in counts.items() if n >= min_count), key=lambda value: (-counts[value], value))
    made = counter.vocabulary(min_count)
    assert made.values.to_pylist() == wanted and made.rows == len(wanted) + 1
    assert (counter.rows, counter.missing) == (len(values), values.count(None))
    rows = {value: row for row, value in enumerate(wanted, 1)}
    codes = made.encode(pa.array([*values, 100], pa.int64()))
    assert codes.dtype == np.int32 and codes.tolist() == [rows.get(value, 0) for value in [*values, 100]]


def test_vocabularies_are_kept(path, tmp_path):
    _, _, seen = _known(path)
    vocabulary.save_all(tmp_path / "kept", seen.vocabularies)
    kept = vocabulary.load_all(tmp_path / "kept")
    assert list(kept) == ["word", "number", "bag"]
    assert all(kept[name].values == seen.vocabularies[name].values for name in kept)
    word = kept["word"]
    assert word.value(0) is None and word.value(word.row("dög")) == "dög"
    with pytest.raises(KeyError):
        word.row("elk")


def test_scales_are_those_of_all_rows(path):
    found, _, seen = _known(path)
    whole = _table()
    price = np.array([x for x in whole["price"].to_pylist() if x is not None])
    np.testing.assert_allclose(seen.scales["price"], (price.mean(), price.std()), rtol=1e-12)
    assert (seen.rows["train"], seen.positive) == (ROWS, sum(whole["clicked"].to_pylist())) and found.rows == ROWS


def _shown(rows, seen, own):
    """Returns rows as Python values again."""
    words = [seen.vocabularies["word"].value(code) for code in rows.ids["word"]]
    bag = rows.ids["bag"]
    bags = [
        [seen.vocabularies["bag"].value(code) for code in bag.values[a:b]]
        for a, b in zip(bag.splits[:-1], bag.splits[1:], strict=True)
    ]
    mean, deviation = seen.scales["row"]
    number = np.round(rows.numbers[:, own.numeric.index("row")].astype(np.float64) * deviation + mean).astype(int)
    return list(zip(number.tolist(), words, bags, rows.labels.tolist(), strict=True))


@pytest.mark.parametrize("batch", [1, 64, 130, 1000, 3000])
def test_every_row_once_an_epoch(path, batch):
    found, own, seen = _known(path)
    whole = _table()
    wanted = {
        i: (word, bag, float(label))
        for i, (word, bag, label) in enumerate(
            zip(*(whole[name].to_pylist() for name in ("word", "bag", "clicked")), strict=True)
        )
    }
    data = loader.batches(found.groups, loader.Encode(own, seen), batch, epochs=2, seed=3)
    rows = [row for one in data for row in _shown(one, seen, own)]
    orders = [row[0] for row in rows]
    assert sorted(orders) == sorted(2 * list(range(ROWS)))
    assert orders != sorted(orders) and orders[:ROWS] != orders[ROWS:]
    assert all((word, bag, label) == wanted[i] for i, word, bag, label in rows)
    plain = loader.batches(found.groups, loader.Encode(own, seen, shuffled=False), batch)
    assert [row[0] for one in plain for row in _shown(one, seen, own)] == list(range(ROWS))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.nightly)])
def test_an_iterator_goes_on_where_another_stopped(path, workers):
    found, own, seen = _known(path)
    data = loader.batches(found.groups, loader.Encode(own, seen), 96, epochs=2, seed=1, workers=workers)
    whole = [_shown(one, seen, own) for one in data]
    for stop in (0, 1, 7, len(whole) - 1) if not workers else (7,):
        first = iter(data)
        for _ in range(stop):
            next(first)
        again = iter(data)
        again.set_state(first.get_state())
        assert [_shown(one, seen, own) for one in again] == whole[stop:]


def test_csv_is_made_parquet_once(tmp_path):
    text = "city,price,clicked\nLyon,1.5,1\nParis,,0\n,2.5,1\n"
    (tmp_path / "a.csv").write_text(text)
    found = files.Files(tmp_path / "a.csv", tmp_path / "cache")
    assert found.rows == 3 and found.schema.names == ["city", "price", "clicked"]
    (made,) = (tmp_path / "cache").iterdir()
    at = made.stat().st_mtime_ns
    again = files.Files(tmp_path / "a.csv", tmp_path / "cache")
    assert made.stat().st_mtime_ns == at and again.read(again.groups[0]).equals(found.read(found.groups[0]))


def _damage(path, kind):
    table = _table(40)
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut":
        pq.write_table(table, path)
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "no rows":
        pq.write_table(table.slice(0, 0), path)
    elif kind == "twice":
        pq.write_table(pa.table([table["word"], table["word"], table["clicked"]], ["word", "word", "clicked"]), path)
    elif kind == "all missing":
        pq.write_table(table.set_column(0, "word", pa.nulls(40, pa.string())), path)
    elif kind == "a label":
        labels = table["clicked"].to_pylist()
        labels[17] = 3
        pq.write_table(table.set_column(5, "clicked", pa.array(labels)), path, row_group_size=10)
    elif kind == "one label":
        pq.write_table(table.set_column(5, "clicked", pa.array([1] * 40)), path)
    elif kind == "infinite":
        prices = table["price"].to_pylist()
        prices[23] = float("inf")
        pq.write_table(table.set_column(3, "price", pa.array(prices)), path, row_group_size=10)
    elif kind == "utf8":
        bad = pa.Array.from_buffers(
            pa.string(), 1, [None, pa.py_buffer(np.array([0, 2], np.int32)), pa.py_buffer(b"\xff\xfe")]
        )
        pq.write_table(pa.table({"word": bad, "clicked": [1]}), path)
    elif kind == "dates":
        pq.write_table(table.append_column("day", pa.array([0] * 40, pa.timestamp("us"))), path)


@pytest.mark.parametrize(
    "kind, text",
    [
        ("missing", r"data.parquet: there is no such file; give a Parquet or CSV file, a folder of them, or a pattern"),
        ("empty", r"data.parquet: the file is empty \(0 bytes\); bring a Parquet or CSV file"),
        ("cut", r"data.parquet: it cannot be read as Parquet \(.*\); it may be cut off: write it again"),
        ("no rows", r"data.parquet: there are columns, and no rows; bring a file with rows"),
        ("twice", r'data.parquet: column "word" is there twice; rename or drop one of them'),
        ("all missing", r'data.parquet: column "word" has no value in any training row; --ignore word leaves it out'),
        ("a label", r'column "clicked", row 17: the label is 3, and must be 0 or 1; mend it, or drop the row'),
        ("one label", r'all 40 labels to train on in column "clicked" are 1; there is nothing to tell apart'),
        ("infinite", r'column "price", row 23: the number is inf; mend it, or make it missing'),
        ("utf8", r"rows 0 to 0 cannot be read \(.*\); a string is not UTF-8; encode it"),
        ("dates", r'column "day" is timestamp\[us\], neither a category nor a number; --ignore day leaves it out'),
    ],
)
def test_what_is_wrong_is_named(tmp_path, kind, text):
    path = tmp_path / "data.parquet"
    _damage(path, kind)
    with pytest.raises(files.DataError, match=text):
        _known(path)


@pytest.mark.parametrize(
    "content, text",
    [
        (b"", r"a.csv: the file is empty \(0 bytes\); bring one with a line of names and rows below it"),
        (b"a,a\n1,2\n", r'a.csv: column "a" is there twice; rename or drop one of them'),
        (b"a\xff,b\n1,2\n", r"a.csv: the line of names is not UTF-8 \(invalid start byte\); save the file as UTF-8"),
        (b"a,b\n", r"a.csv: there are columns, and no rows; bring a file with rows"),
        (b"\n\n", r"a.csv: after line 2 it cannot be read as CSV \(.*\); mend that line"),
        (b"a,b\n1,2\n1,2,3\n", r"a.csv: after line 2 it cannot be read as CSV \(.*\); mend that line"),
        (
            b"a,b\n1,\xff\xfe\n",
            r'a.csv: column "b", line 2: the text is not UTF-8 \(invalid start byte at its byte 0\); save',
        ),
    ],
)
def test_what_is_wrong_in_a_csv_is_named(tmp_path, content, text):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(files.DataError, match=text):
        files.Files(tmp_path / "a.csv", tmp_path / "made")
    left = [path.name for path in (tmp_path / "made").glob("*")]
    assert not [name for name in left if name.startswith(".")] and (not left or content == b"a,b\n")


@pytest.mark.parametrize(
    "options, text",
    [
        (
            {"label": "click"},
            r'there is no column "click" \(--label\); there are word, number, bag, price, row, clicked',
        ),
        ({"numeric": ["word"]}, r'column "word" is string, which is no number; leave it out of --numeric'),
        ({"numeric": ["price"], "ignore": ["price"]}, r'column "price" is named for two purposes; name it once'),
        ({"label": "word"}, r'column "word" is string, and a label must be 0 and 1, or booleans'),
        (
            {"ignore": ["word", "number", "bag"]},
            r"there are no categories among the columns; name some \(--categorical\)",
        ),
    ],
)
def test_options_that_do_not_fit_are_named(path, options, text):
    schema = files.Files(path).schema
    with pytest.raises(files.DataError, match=text):
        columns.columns_of(schema, **{"label": "clicked", **options})


def test_files_of_different_columns_are_named(tmp_path):
    for number, table in enumerate((_table(5), _table(5).drop_columns(["bag"]))):
        pq.write_table(table, tmp_path / f"{number}.parquet")
    with pytest.raises(
        files.DataError, match=r'1.parquet: column "bag" is missing, which .*0.parquet has; bring files'
    ):
        files.Files(tmp_path / "*.parquet")
    pq.write_table(_table(5), tmp_path / "1.parquet")
    assert files.Files(tmp_path).rows == 10 and len(blocks.Rows._fields) == 3


def _rows_of(data, deviation, mean):
    """Returns the number of each row, which is its only numeric column."""
    return [np.round(one.numbers[:, 0].astype(np.float64) * deviation + mean).astype(int).tolist() for one in data]


@settings(max_examples=12, deadline=None)
@given(
    groups=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    batch=st.integers(1, 50),
    epochs=st.integers(1, 3),
    mixed=st.integers(1, 200),
    by=st.sampled_from(["chance", "time"]),
    shares=st.tuples(st.sampled_from([0.0, 0.2]), st.sampled_from([0.0, 0.3])),
    kept=st.one_of(st.none(), st.integers(1, 150)),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_row_has_one_part_and_comes_once_an_epoch(
    tmp_path_factory, groups, batch, epochs, mixed, by, shares, kept, seed
):
    """Whatever the row groups, the batches, the shuffling and the split: parts are disjoint, together all rows."""
    total, folder = sum(groups), tmp_path_factory.mktemp("rows")
    ends = np.cumsum(groups)
    whole = pa.table({"row": np.arange(total) * 1.0, "a": ["x"] * total, "t": np.arange(total) // 2})
    schema = whole.schema
    with pq.ParquetWriter(folder / "d.parquet", schema) as writer:
        for first, end in zip([0, *ends[:-1]], ends, strict=True):
            writer.write_table(whole.slice(first, end - first))
    found = files.Files(folder / "d.parquet")
    validation, test = shares
    try:
        if by == "time":
            parts = split.by_time(found, "t", validation, test, kept=kept)
        else:
            parts = split.Split(seed, validation, test, kept=kept, rows=total)
        own = columns.columns_of(schema, None, ignore=["t"])
        seen = scan.scan(found, own, parts)
    except files.DataError as error:  # too few rows for a part
        assert "none is for" in str(error) or "no row is left" in str(error)
        return
    numbers = {}
    scale = (seen.scales["row"].deviation, seen.scales["row"].mean)
    for name, part in split.PARTS.items():
        encode = loader.Encode(own, seen, parts, part, shuffled=name == "train")
        data = loader.batches(
            found.groups, encode, batch, epochs=epochs if name == "train" else 1, seed=seed, mixed_rows=mixed
        )
        sizes = [len(one) for one in data]
        assert all(size == batch for size in sizes[:-1])
        rows = [row for one in _rows_of(data, *scale) for row in one]
        numbers[name] = sorted(rows)
        if name != "train":
            assert rows == sorted(rows)
    assert numbers["train"] == sorted(epochs * numbers["train"][::epochs])
    numbers["train"] = numbers["train"][::epochs]
    together = sorted(sum(numbers.values(), []))
    assert len(set(together)) == len(together) == min(kept or total, total)
    assert {name: len(own) for name, own in numbers.items()} == dict(seen.rows)
    if by == "time":
        times = {name: {row // 2 for row in own} for name, own in numbers.items()}
        assert not times["train"] & times["test"] and not times["train"] & times["validation"]
        assert max(times["train"]) < min(times["validation"] | times["test"], default=total)


def test_another_seed_is_another_order_and_another_part(path):
    found, own, seen = _known(path)
    scale = (seen.scales["row"].deviation, seen.scales["row"].mean)
    place = own.numeric.index("row")

    def rows(seed):
        data = loader.batches(found.groups, loader.Encode(own, seen), 100, seed=seed)
        return [np.round(one.numbers[:, place].astype(np.float64) * scale[0] + scale[1]).tolist() for one in data]

    assert rows(1) == rows(1) != rows(2)
    chosen = [
        np.concatenate([split.Split(seed, test=0.3).parts(found.read(g), g) for g in found.groups])
        for seed in (1, 1, 2)
    ]
    assert (chosen[0] == chosen[1]).all() and (chosen[0] != chosen[2]).any()
    assert abs((chosen[0] == split.TEST).mean() - 0.3) < 0.06


def test_a_part_of_rows_is_a_row(path):
    found, own, seen = _known(path)
    rows = loader.Encode(own, seen, shuffled=False).random_map(found.groups[:2], np.random.default_rng(0))
    only = rows._replace(ids={"word": rows.ids["word"]})
    assert isinstance(only, blocks.Rows) and list(only.ids) == ["word"] and len(only) == len(rows)


def test_a_constant_column_has_scale_1(tmp_path):
    """What is left of rounding is no deviation."""
    rows = 2000
    table = pa.table({"c": ["x"] * rows, "n": [1_000_000.1] * rows, "m": [0.1] * rows, "y": [0, 1] * (rows // 2)})
    pq.write_table(table, tmp_path / "d.parquet", row_group_size=300)
    found = files.Files(tmp_path / "d.parquet")
    seen = scan.scan(found, columns.columns_of(found.schema, "y"))
    assert seen.scales["n"].deviation == seen.scales["m"].deviation == 1.0
    np.testing.assert_allclose(seen.scales["n"].mean, 1_000_000.1)


def test_wider_integers_are_encoded():
    known = vocabulary.Vocabulary(pa.array([3, 5], pa.int8()), pa.array([2, 1]))
    assert known.encode(pa.array([5, 300, 3, None], pa.int64())).tolist() == [2, 0, 1, 0]


def test_other_content_of_one_size_is_told_apart(tmp_path):
    for name, label in (("a", [0, 1]), ("b", [1, 0])):
        (tmp_path / name).write_bytes(np.tile(np.array(label, np.int8), 5_000_000).tobytes() + b"the same end" * 10_000)
    assert files.sample(tmp_path / "a") != files.sample(tmp_path / "b")
    assert files.sample(tmp_path / "a") == files.sample(tmp_path / "a")


@given(st.lists(st.one_of(st.none(), st.integers(0, 60)), max_size=80), st.sampled_from([str, int]))
def test_few_values_have_the_rows_that_many_have(values, kind):
    """The search goes the other way round where a vocabulary is longer than what is asked for."""
    known = [kind(value) for value in range(0, 60, 2)]
    book = vocabulary.Vocabulary(pa.array(known), pa.array([1] * len(known)))
    column = [None if value is None else kind(value) for value in values]
    rows = {value: row for row, value in enumerate(known, 1)}
    codes = book.encode(pa.array(column, book.values.type))
    assert codes.dtype == np.int32 and codes.tolist() == [rows.get(value, 0) for value in column]
