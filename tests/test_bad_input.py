# ruff: noqa: E501  # one case a line
"""Every refusal says whose value it is, the value, the rule and the fix. Nothing is accepted in silence."""

import datetime
import decimal

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from helpers import feature, table_spec

import embax

pytestmark = pytest.mark.once

INTEGERS = "they must be integers, and nothing is rounded or cast silently"
CAST = f"{INTEGERS}; use .astype(numpy.int32) if they are whole numbers"
MAPPED = f"{INTEGERS}; map them to integers first"
IDS = 'feature "history": ids'
FORMS = "give an integer array, a list of sequences, embax.RaggedIds, embax.CooIds (a whole feature) or an Arrow array"
ONE_EACH = "give every id one weight"
DEEP = "nested more deeply than the feature's shapes say; take out a level"
SHALLOW = "where the feature's shapes ask for one more level of nesting; add one"
SEQUENCE = "a sequence of numbers is expected there (None if empty)"
RAISE = 'raise vocabulary_size or set out_of_range="drop"'
TRACED = "traced values; inside jit use embax.preprocess_traced"


def plan_of(inputs=(None,), outputs=None, combiner="mean", **own):
    return embax.plan(feature(table_spec(combiner=combiner), "history", inputs, outputs, **own))


PLANS = {
    "ragged": plan_of(),
    "wide": plan_of((None, 2)),
    "batch of 3": plan_of((3,)),
    "sequence": plan_of((None, 3), (None, 3, 4)),
    "pooled sequence": plan_of((None, 3, 2), (None, 3, 4)),
    "cut sequence": plan_of((None, 2), (None, 2, 4), truncate="keep_first"),
    "grid": plan_of((None, 3, 2), (None, 3, 2, 4)),
    "declared": embax.plan(feature(table_spec(), "history", (None,)), capacity={"history": 3}),
}


def at(sample, position=None):
    where = f", position {position}" if position is not None else ""
    return f'feature "history", sample {sample}{where}: ids'


def out_of(id_, sample, fix=RAISE, where=""):
    rule = f"id {id_} is negative" if id_ < 0 else f"id {id_} >= vocabulary_size 50"
    return f'table "item": {rule} (feature "history", sample {sample}{where}); {fix}'


def negative(id_, sample):
    return out_of(id_, sample, f'set padding_id={id_} if it means "no id", or out_of_range="drop"')


def ragged(values, *splits):
    return embax.RaggedIds(np.array(values), np.array(splits))


def coo(samples, values, count):
    return embax.CooIds(np.array(samples), np.array(values), count)


def refused(error, text, call, *args):
    with pytest.raises((ValueError, TypeError)) as caught:
        call(*args)
    assert type(caught.value) is error, caught.value
    assert text in str(caught.value)


# name: (plan, ids, error, text)
BAD_IDS = {
    "negative": ("ragged", [[1], [2, -1]], ValueError, negative(-1, 1)),
    "too large": ("ragged", [[1], [], [2, 50]], ValueError, out_of(50, 2)),
    "too large, dense": ("wide", np.array([[1, 2], [50, 1]]), ValueError, out_of(50, 1)),
    "too large, at a position": ("sequence", [[1], [2, 50]], ValueError, out_of(50, 1, where=", position 1")),
    "too large, Coo": ("ragged", coo([1, 0], [50, 1], 2), ValueError, out_of(50, 1)),
    "beyond 32 bits": ("ragged", np.array([3, 2**32 + 5]), ValueError, out_of(2**32 + 5, 1)),
    "beyond 32 bits, ragged": ("ragged", ragged([2**32 + 5], 0, 1), ValueError, out_of(2**32 + 5, 0)),
    "beyond 32 bits, negative": ("ragged", np.array([-(2**32) + 5]), ValueError, negative(-(2**32) + 5, 0)),
    "beyond 63 bits": ("ragged", np.array([2**63 + 5], np.uint64), ValueError, out_of(2**63 + 5, 0)),
    "beyond 63 bits, with a negative": ("ragged", [[1], [2**63, -1]], ValueError, out_of(2**63, 1)),
    "beyond 63 bits, in rows": ("ragged", [np.array([-1]), np.array([2**63], np.uint64)], ValueError, negative(-1, 0)),
    "beyond 64 bits": ("ragged", [[2**70]], ValueError, out_of(2**70, 0)),
    "beyond 64 bits, flat": ("ragged", [1, 2**70], ValueError, out_of(2**70, 1)),
    "beyond 64 bits, negative": ("ragged", [[1], [-(2**70)]], ValueError, negative(-(2**70), 1)),
    "Arrow uint64": ("ragged", pa.array([[2**63 + 5]], pa.list_(pa.uint64())), ValueError, out_of(2**63 + 5, 0)),
    "float": ("ragged", np.array([1.0]), TypeError, f"{IDS} are float64; {CAST}"),
    "float32 rectangle": ("wide", np.ones((1, 2), np.float32), TypeError, f"{IDS} are float32; {CAST}"),
    "bool": ("ragged", np.array([True]), TypeError, f"{IDS} are bool; {CAST}"),
    "bfloat16": ("ragged", jnp.ones(2, jnp.bfloat16), TypeError, f"{IDS} are bfloat16; {MAPPED}"),
    "complex": ("ragged", np.array([1j]), TypeError, f"{IDS} are complex128; {MAPPED}"),
    "dates": ("ragged", np.array(["2020-01-01"], "M8[D]"), TypeError, f"{IDS} are datetime64[D]; {MAPPED}"),
    "records": ("ragged", np.zeros(1, [("a", int)]), TypeError, f"{IDS} are [('a', '<i8')]; {MAPPED}"),
    "strings": ("ragged", ["a"], TypeError, f"{at(0)} hold 'a', a str; {MAPPED}"),
    "rows of strings": ("ragged", [[1], ["b"]], TypeError, f"{at(1)} hold 'b', a str; {MAPPED}"),
    "an array of strings": ("ragged", np.array(["a"]), TypeError, f"{IDS} are <U1; {MAPPED}"),
    "one string": ("ragged", "abc", TypeError, f"{IDS} are of type str; {FORMS}"),
    "bytes": ("ragged", b"abc", TypeError, f"{IDS} are of type bytes; {FORMS}"),
    "decimals": ("ragged", [[decimal.Decimal(1)]], TypeError, f"{at(0)} hold Decimal('1'), a Decimal; {MAPPED}"),
    "floats": ("ragged", [[1], [2, 3.0]], TypeError, f"{at(1)} hold 3.0, a float; {CAST}"),
    "floats first": ("ragged", [1.5, 2], TypeError, f"{at(0)} hold 1.5, a float; {CAST}"),
    "NumPy floats": ("ragged", [[np.float32(1)]], TypeError, f"{at(0)} hold 1.0, a float; {CAST}"),
    "bool and int": ("ragged", [[1, True]], TypeError, f"{at(0)} hold True, a bool; {CAST}"),
    "NumPy bool and int": ("ragged", [[3], [1, np.True_]], TypeError, f"{at(1)} hold True, a bool; {CAST}"),
    "rows of bool and int": ("ragged", [np.array([1]), np.array([True])], TypeError, f"{at(1)} hold True, a bool; {CAST}"),
    "rows of bool": ("ragged", [np.array([True])], TypeError, f"{IDS} are bool; {CAST}"),
    "rows of int and float": ("ragged", [np.array([1]), np.array([2.0])], TypeError, f"{at(1)} hold 2.0, a float; {CAST}"),
    "objects of bool": ("ragged", np.array([1, True], object), TypeError, f"{at(1)} hold True, a bool; {CAST}"),
    "bool at a position": ("sequence", [[1], [2, True]], TypeError, f"{at(1, 1)} hold True, a bool; {CAST}"),
    "None": ("ragged", None, TypeError, f"{IDS} are missing (None); {FORMS}"),
    "None among ids": ("ragged", [[1], [2, None]], TypeError, f"{at(1)} hold None, a NoneType; drop it (None stands for"),
    "None among samples": ("ragged", [None, 1], TypeError, f"{at(0)} hold None, a NoneType; drop it (None stands for"),
    "a number": ("ragged", 5, TypeError, f"{IDS} are of type int; {FORMS}"),
    "no dimension": ("ragged", np.array(5), ValueError, f"{IDS} have shape (); the feature's input_shape is (batch,); reshape"),
    "a dict": ("ragged", {"a": 1}, TypeError, f"{IDS} are of type dict; {FORMS}"),
    "a set": ("ragged", [{1, 2}], TypeError, f"{at(0)} hold {{1, 2}}, a set; {MAPPED}"),
    "a generator": ("ragged", (i for i in [1]), TypeError, f"{IDS} are of type generator; {FORMS}"),
    "keys": ("ragged", jax.random.split(jax.random.key(0)), TypeError, f"{IDS} are of type PRNGKeyArray, which NumPy cannot"),
    "masked": ("ragged", np.ma.array([1, 2], mask=[0, 1]), ValueError, f"{IDS} are a masked array; fill it, masked ids with"),
    "masked row": ("ragged", [[1], np.ma.array([1], mask=[1])], ValueError, f"{at(1)} are a masked array; fill it"),
    "rank 3": ("ragged", np.ones((2, 2, 2), int), ValueError, f"{IDS} have shape (2, 2, 2); the feature's input_shape is (batch,)"),
    "rank 1": ("wide", np.ones(2, int), ValueError, f"{IDS} have shape (2,); the feature's input_shape is (batch, 2); reshape"),
    "width": ("wide", np.ones((2, 3), int), ValueError, f"{IDS} have shape (2, 3); the feature's input_shape is (batch, 2); reshape"),
    "flat list": ("sequence", [1, 2], ValueError, f"{IDS} have shape (2,); the feature's input_shape is (batch, 3); reshape"),
    "positions": ("pooled sequence", np.ones((1, 2, 2), int), ValueError, f"{IDS} have shape (1, 2, 2); the feature's"),
    "batch": ("batch of 3", [[1]], ValueError, f"{IDS} have 1 samples, and input_shape says 3; give that many"),
    "batch, dense": ("batch of 3", np.array([1]), ValueError, f"{IDS} have 1 samples, and input_shape says 3; give that many"),
    "batch, ragged": ("batch of 3", ragged([1], 0, 1), ValueError, f"{IDS} have 1 samples, and input_shape says 3"),
    "batch, Coo": ("batch of 3", coo([0], [1], 4), ValueError, f"{IDS} have 4 samples, and input_shape says 3"),
    "batch, empty": ("batch of 3", [], ValueError, f"{IDS} have 0 samples, and input_shape says 3"),
    "too deep": ("ragged", [[1], [[2]]], ValueError, f"{at(1)} hold [2], {DEEP}"),
    "too deep, arrays": ("ragged", [np.array([[1, 2]])], ValueError, f"{at(0)} hold [1, 2], {DEEP}"),
    "too deep, ragged": ("ragged", embax.RaggedIds(ragged([1], 0, 1), [0, 1]), ValueError, f"{IDS} hold RaggedIds(values="),
    "too deep, values": ("ragged", ragged([[1], [2]], 0, 2), ValueError, f"{IDS} hold [[1], [2]], {DEEP}"),
    "too deep, Arrow": ("ragged", pa.array([[[1]]]), ValueError, f"{IDS} hold a column of type list<item: int64>, {DEEP}"),
    "too deep at a position": ("pooled sequence", [[[1], [[2]]]], ValueError, f"{at(0, 1)} hold [2], {DEEP}"),
    "too shallow": ("pooled sequence", [[[1]], [2, 3]], ValueError, f"{at(1, 0)} are 2, and {SEQUENCE}"),
    "too shallow, ragged": ("pooled sequence", ragged([1, 2], 0, 2), ValueError, f"{IDS} hold int64(2,) {SHALLOW}"),
    "too shallow, Arrow": ("pooled sequence", pa.array([[1]]), ValueError, f"{IDS} hold a column of type int64 {SHALLOW}"),
    "a number among rows": ("ragged", [[1], 2], ValueError, f"{at(1)} are 2, and {SEQUENCE}"),
    "a row among numbers": ("ragged", [1, [2]], ValueError, f"{at(1)} hold [2], {DEEP}"),
    "RaggedIds in a list": ("ragged", [ragged([1], 0, 1)], TypeError, f"{at(0)} are RaggedIds in a list; make one RaggedIds"),
    "CooIds in a list": ("ragged", [coo([0], [1], 1)], TypeError, f"{at(0)} are of type CooIds; {FORMS}"),
    "too long": ("sequence", [[1], [1, 2, 3, 4]], ValueError, f"{IDS} of sample 1 have 4 positions, and the maximum is 3; raise it in"
                 ' input_shape and output_shape, or set truncate="keep_first" or "keep_last"'),
    "too long, pooled": ("pooled sequence", [[[1]] * 4], ValueError, f"{IDS} of sample 0 have 4 positions, and the maximum is 3"),
    "capacity": ("declared", [[1, 2], [3, 4]], ValueError, 'feature "history": 4 ids in one batch, and plan(capacity=...) declares 3; '
                 "declare more, or split the batch"),
}  # fmt: skip

SPLITS = 'feature "history": splits'
BEGIN = f"{SPLITS} must begin with 0 and never fall; splits"
SAMPLES = 'feature "history": CooIds.samples'
BAD_STRUCTURES = {
    "fall": (ragged([1, 2], 0, 2, 1), ValueError, f"{BEGIN}[1:] begin [2, 1]. Use RaggedIds.from_lengths if"),
    "fall, unsigned": (embax.RaggedIds([1], np.array([0, 2, 1], np.uint8)), ValueError, f"{BEGIN}[1:] begin [2, 1]"),
    "lengths": (ragged([1, 2, 3], 2, 1), ValueError, f"{BEGIN}[0:] begin [2, 1]. Use RaggedIds.from_lengths if"),
    "start": (ragged([1, 2], 1, 2), ValueError, f"{BEGIN}[0:] begin [1, 2]"),
    "end early": (ragged([1, 2], 0, 1), ValueError, f"{IDS}: splits end at 1, and there are 2 values; the last split must be the"),
    "end late": (ragged([1, 2], 0, 5), ValueError, f"{IDS}: splits end at 5, and there are 2 values; the last split must be the"),
    "none": (embax.RaggedIds([1], []), ValueError, f"{SPLITS} are empty; they must be integers [samples + 1] that begin with 0"),
    "float splits": (ragged([1, 2], 0.0, 2.0), TypeError, f"{SPLITS} are float64; {CAST}"),
    "bool splits": (embax.RaggedIds([1], [False, True]), TypeError, f"{SPLITS} hold False, a bool; {CAST}"),
    "2-d splits": (embax.RaggedIds([1], [[0, 1]]), ValueError, f"{SPLITS} hold [0, 1], nested more deeply"),
    "scalar splits": (embax.RaggedIds([1], 1), TypeError, f"{SPLITS} are of type int; give a flat array of integers"),
    "missing splits": (embax.RaggedIds([1], None), TypeError, f"{SPLITS} are missing (None); give a flat array of integers"),
    "missing values": (embax.RaggedIds(None, [0, 1]), TypeError, f"{IDS} are missing (None); {FORMS}"),
    "float values": (ragged([1.5], 0, 1), TypeError, f"{IDS} are float64; {CAST}"),
    "a bad value behind the splits": (embax.RaggedIds([1, "x"], [0, 1]), TypeError, f"{IDS} hold 'x', a str; {MAPPED}"),
    "sample too large": (coo([0, 3], [1, 2], 3), ValueError, f"{SAMPLES}[1] is 3 (id 2), outside of num_samples 3; correct it"),
    "sample negative": (coo([-1, 3], [1, 2], 3), ValueError, f"{SAMPLES}[0] is -1 (id 1), outside of num_samples 3; correct it"),
    "sample beyond 63 bits": (embax.CooIds(np.array([2**63], np.uint64), [1], 3), ValueError, f"{SAMPLES}[0] is {2**63} (id 1)"),
    "no samples": (coo([0], [1], 0), ValueError, f"{SAMPLES}[0] is 0 (id 1), outside of num_samples 0"),
    "samples and values": (coo([0, 1], [1], 3), ValueError, "there are 2 CooIds.samples for 1 ids; give every id its sample"),
    "float samples": (coo([0.0], [1], 3), TypeError, f"{SAMPLES} are float64; {CAST}"),
    "bool samples": (embax.CooIds([0, True], [1, 2], 3), TypeError, f"{SAMPLES} hold True, a bool; {CAST}"),
    "num_samples None": (coo([0], [1], None), ValueError, 'CooIds.num_samples is None; it must be the number of samples'),
    "num_samples negative": (coo([], [], -1), ValueError, 'CooIds.num_samples is -1; it must be the number of samples'),
    "num_samples float": (coo([0], [1], 2.0), ValueError, 'CooIds.num_samples is 2.0; it must be the number of samples'),
    "null among values": (pa.array([[1], [2, None]]), ValueError, f"{at(1)} hold a null (1 in all); drop the nulls, or fill them"),
    "null in a plain column": (pa.array([1, None, None]), ValueError, f"{at(1)} hold a null (2 in all); drop the nulls, or fill"),
    "only nulls in a list": (pa.array([[None]]), ValueError, f"{at(0)} hold a null (1 in all); drop the nulls, or fill them"),
    "Arrow float": (pa.array([[1.0]]), TypeError, f"{IDS} are float64; {CAST}"),
    "Arrow bool": (pa.array([True]), TypeError, f"{IDS} are bool; {CAST}"),
    "Arrow string": (pa.array(["a"]), TypeError, f"{IDS} are of Arrow type string; {MAPPED} (decode or cast the column)"),
    "Arrow strings": (pa.array([["a"]], pa.list_(pa.large_string())), TypeError, f"{IDS} are of Arrow type large_string; {MAPPED}"),
    "Arrow dictionary": (pa.array(["a"]).dictionary_encode(), TypeError, f"{IDS} are of Arrow type dictionary<values=string"),
    "Arrow dictionary of integers": (pa.array([7, 9]).dictionary_encode(), TypeError, "Arrow type dictionary<values=int64"),
    "Arrow dates": (pa.array([datetime.date.today()]), TypeError, f"{IDS} are of Arrow type date32[day]; {MAPPED}"),
    "Arrow decimal": (pa.array([decimal.Decimal(1)]), TypeError, f"{IDS} are of Arrow type decimal128(1, 0); {MAPPED}"),
    "Arrow struct": (pa.array([{"int": 1}]), TypeError, f"{IDS} are of Arrow type struct<int: int64>; {MAPPED}"),
    "Arrow map": (pa.array([[(1, 2)]], pa.map_(pa.int8(), pa.int8())), TypeError, f"{IDS} are of Arrow type map<int8, int8>"),
    "Arrow scalar": (pa.scalar(1), TypeError, f"{IDS} are of type Int64Scalar; {FORMS}"),
}  # fmt: skip
BAD_IDS |= {name: ("ragged", *case) for name, case in BAD_STRUCTURES.items()}
BAD_IDS["lists within"] = (
    "pooled sequence",
    embax.RaggedIds(ragged([1, 2], 0, 1, 2), [0, 1]),
    ValueError,
    f"{IDS}: splits end at 1, and there are 2 lists within; the last split must be their number",
)
BAD_IDS["too long, second position"] = (
    "grid",
    [[[1]], [[1], [1, 2, 3]]],
    ValueError,
    f"{IDS} of sample 1 have 3 positions, and the maximum is 2; raise it",
)
for kind in ("sequence", "pooled sequence"):
    text = 'feature "history": CooIds fit pooled features only; give a sequence feature nested lists or RaggedIds'
    BAD_IDS[f"CooIds for a {kind}"] = (kind, coo([0], [1], 1), ValueError, text)


@pytest.mark.parametrize("name", BAD_IDS)
def test_bad_ids(name):
    plan, ids, error, text = BAD_IDS[name]
    refused(error, text, embax.preprocess, PLANS[plan], ids)


W = 'feature "history": weights'
NUMBERS = "they must be floating point or integers"
BESIDE = "give numbers in the form of the ids, or one flat array beside RaggedIds and CooIds"
FINITE = "is not a finite float32; mend it, or leave the id out"


def w(sample, position=None):
    return at(sample, position).replace("ids", "weights")


# name: (plan, ids, weights, error, text)
BAD_WEIGHTS = {
    "NaN": ("ragged", [[1], [2, 3]], [[1.0], [2.0, np.nan]], ValueError, f'feature "history", sample 1: weight nan of id 3 {FINITE}'),
    "inf": ("wide", np.array([[1, 2]]), np.array([[1, np.inf]]), ValueError, f'sample 0: weight inf of id 2 {FINITE}'),
    "-inf": ("sequence", [[1, 2]], [[1.0, -np.inf]], ValueError, f'sample 0, position 1: weight -inf of id 2 {FINITE}'),
    "float64 only": ("ragged", [1], np.array([1e300]), ValueError, f"sample 0: weight 1e+300 of id 1 {FINITE}"),
    "huge integers": ("ragged", [[1]], [[10**400]], ValueError, f"{w(0)} hold integers beyond 64-bit floats; scale them down"),
    "divisor": ("ragged", [[1, 2]], [[3e38, -3e38 * (1 - 1e-16) + 1e22]], ValueError, "zzz"),
    "other lengths": ("ragged", [[1], [2, 3]], [[1.0, 2.0], [3.0]], ValueError, f"{w(0)} are 2 in number, and ids are 1; {ONE_EACH}"),
    "other position": ("pooled sequence", [[[1], [2, 3]]], [[[1.0], [2.0]]], ValueError, f"{w(0, 1)} are 1 in number, and ids are 2"),
    "fewer positions": ("pooled sequence", [[[1], [2]]], [[[1.0]]], ValueError, f"{w(0)} are 1 in number, and ids are 2; {ONE_EACH}"),
    "equal after the cut": ("cut sequence", [[1, 2, 3, 4]], [[1.0, 2.0, 3.0]], ValueError, f"{w(0)} are 3 in number, and ids are 4"),
    "more samples": ("ragged", [[1]], [[1.0], [2.0]], ValueError, f"{W} have 2 samples, and ids have 1; {ONE_EACH}"),
    "flat beside lists": ("ragged", [[1], [2, 3]], [1.0, 2.0, 3.0], ValueError, f"{W} have 3 samples, and ids have 2; {ONE_EACH}"),
    "shape": ("wide", np.array([[1, 2]]), np.ones((1, 3)), ValueError, f"{W} have shape (1, 3); the feature's input_shape is (batch, 2)"),
    "rank": ("wide", np.array([[1, 2]]), np.ones(2), ValueError, f"{W} have shape (2,); the feature's input_shape is (batch, 2)"),
    "None row": ("ragged", [[1]], [None], ValueError, f"{w(0)} are 0 in number, and ids are 1; {ONE_EACH}"),
    "None": ("ragged", [[1]], [[None]], TypeError, f"{w(0)} hold None, a NoneType; drop it"),
    "bool": ("ragged", [1], np.array([True]), TypeError, f"{W} are bool; {NUMBERS}"),
    "bool in a list": ("ragged", [[1]], [[True]], TypeError, f"{w(0)} hold True, a bool; {NUMBERS}"),
    "strings": ("ragged", [1], np.array(["a"]), TypeError, f"{W} are <U1; {NUMBERS}"),
    "complex": ("ragged", [1], np.array([1j]), TypeError, f"{W} are complex128; {NUMBERS}"),
    "a number": ("ragged", ragged([1, 2], 0, 2), 2.0, TypeError, f"{W} are of type float; {BESIDE}"),
    "too deep": ("ragged", [[1]], [[[1.0]]], ValueError, f"{w(0)} hold [1.0], {DEEP}"),
    "fewer beside RaggedIds": ("ragged", ragged([1, 2], 0, 2), [1.0], ValueError, f"{W}: splits end at 2, and there are 1 values; {ONE_EACH}"),
    "RaggedIds of other splits": ("ragged", ragged([1, 2], 0, 2, 2), ragged([1.0, 2.0], 0, 1, 2), ValueError, f"{w(0)} are 1 in number"),
    "fewer beside CooIds": ("ragged", coo([0, 1], [1, 2], 2), [1.0], ValueError, f"there are 1 weights for 2 ids; {ONE_EACH}"),
    "lists beside CooIds": ("ragged", coo([0, 1], [1, 2], 2), [[1.0], [2.0]], ValueError, f"{W} hold [1.0], {DEEP}"),
    "CooIds of other samples": ("ragged", coo([0, 1, 0], [1, 2, 3], 2), coo([0, 0, 1], [1.0, 2.0, 3.0], 2), ValueError,
                                'feature "history": CooIds.samples of weights differ from those of ids; give the same, in the same order'),
    "CooIds beside a rectangle": ("ragged", [1], coo([0], [1.0], 1), TypeError, f"{W} are of type CooIds; {BESIDE}"),
    "Arrow nulls": ("ragged", pa.array([[1, 2]]), pa.array([[1.0, None]]), ValueError, f"{w(0)} hold a null (1 in all)"),
    "Arrow strings": ("ragged", pa.array([1]), pa.array(["a"]), TypeError, f"{W} are of Arrow type string; {NUMBERS}"),
}  # fmt: skip
BAD_WEIGHTS["divisor"] = (
    "ragged", [[4], [1, 2, 3]], [[1.0], [1e-42, 1.0, -1.0]], ValueError,
    'table "item": combiner "mean" divides by weights that add up to almost zero, and float32 cannot hold the result (feature '
    '"history", sample 1); mend the weights, or use combiner "sum"',
)  # fmt: skip


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_bad_weights(name):
    plan, ids, weights, error, text = BAD_WEIGHTS[name]
    refused(error, text, embax.preprocess, PLANS[plan], ids, weights)


def test_other_structures():
    table = table_spec()
    features = {name: feature(table, name, (None,)) for name in ("age", "history")}
    plan, pair = embax.plan(features), embax.plan(list(features.values()))
    both = {"age": [1], "history": [2]}
    rule = " must have the structure of the features given to plan, PyTreeDef("
    for ids, weights, what, shown in (
        ({"age": [1]}, None, "ids", "present keys: ['age']"),
        ({**both, "more": [3]}, None, "ids", "present keys: ['age', 'history', 'more']"),
        ([[1], [2]], None, "ids", "Expected dict, got [[1], [2]]"),
        (None, None, "ids", "Expected dict, got None"),
        (both, {"age": [1.0]}, "weights", "present keys: ['age']"),
        (both, [[1.0], [1.0]], "weights", "Expected dict"),
    ):
        for call in (embax.preprocess, embax.preprocess_traced):
            refused(ValueError, what + rule, call, plan, ids, weights)
            refused(ValueError, shown, call, plan, ids, weights)
    refused(ValueError, "ids" + rule, embax.preprocess, pair, [[1]])
    refused(ValueError, "ids" + rule, embax.preprocess, pair, both)
    refused(TypeError, f"{IDS} are missing (None)", embax.preprocess, plan, {"age": [1], "history": None})
    refused(TypeError, "preprocess: a dict is not a Plan; call preprocess(plan, ids", embax.preprocess, both, plan)
    refused(TypeError, "preprocess_traced: a dict is not a Plan", embax.preprocess_traced, both, plan)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda x: (x, None), f"{IDS} are {TRACED}"),
        (lambda x: ([x, x], None), f"{at(0)} are {TRACED}"),
        (lambda x: ([[3], [x[0]]], None), f"{at(1)} hold a traced value; inside jit use embax.preprocess_traced"),
        (lambda x: ([x[0]], None), f"{at(0)} hold a traced value"),
        (lambda x: (embax.RaggedIds(x, [0, 2]), None), f"{IDS} are {TRACED}"),
        (lambda x: (embax.RaggedIds([1], x), None), f"{SPLITS} are {TRACED}"),
        (lambda x: (embax.CooIds([0, 0], x, 1), None), f"{IDS} are {TRACED}"),
        (lambda x: (embax.CooIds(x, [1, 2], 1), None), f"{SAMPLES} are {TRACED}"),
        (lambda x: ([1, 2], x), f"{W} are {TRACED}"),
        (lambda x: (ragged([1, 2], 0, 2), x), f"{W} are {TRACED}"),
        (lambda x: (coo([0, 0], [1, 2], 1), x), f"{W} are {TRACED}"),
        (lambda x: ([[1]], [[x[0]]]), f"{w(0)} hold a traced value"),
    ],
)
def test_traced_values_on_the_host(make, text):
    refused(TypeError, text, jax.jit(lambda x: embax.preprocess(PLANS["ragged"], *make(x))), jnp.array([0, 1]))


JIT = "use .astype(jnp.int32) if they are whole"
i32, one = jnp.array([1, 2]), jnp.array([1.0, 2.0])
BAD_TRACED = {
    "float": ("ragged", one, None, TypeError, f"{IDS} are float32; they must be integers ({JIT})"),
    "bool": ("ragged", one > 1, None, TypeError, f"{IDS} are bool; they must be integers ({JIT})"),
    "list": ("ragged", [1, 2], None, TypeError, f"{IDS} are of type list; inside jit they must be an integer array"),
    "None": ("ragged", None, None, TypeError, f"{IDS} are of type NoneType; inside jit they must be an integer array"),
    "shape": ("wide", i32, None, ValueError, f"{IDS} have shape (2,); the feature's input_shape is (batch, 2); reshape"),
    "scalar": ("ragged", jnp.int32(1), None, ValueError, f"{IDS} have shape (); the feature's input_shape is (batch,)"),
    "batch": ("batch of 3", i32, None, ValueError, f"{IDS} have 2 samples, and input_shape says 3"),
    "batch, ragged": ("batch of 3", embax.RaggedIds(i32, i32), None, ValueError, f"{IDS} have 1 samples, and input_shape says 3"),
    "batch, Coo": ("batch of 3", embax.CooIds(i32, i32, 2), None, ValueError, f"{IDS} have 2 samples, and input_shape says 3"),
    "sequence, ragged": ("sequence", embax.RaggedIds(i32, i32), None, ValueError, "inside jit a sequence feature takes a dense array"),
    "sequence, Coo": ("sequence", embax.CooIds(i32, i32, 2), None, ValueError, "CooIds fit pooled features only"),
    "nested": ("ragged", embax.RaggedIds(embax.RaggedIds(i32, i32), i32), None, TypeError, f"{IDS} are of type RaggedIds; inside"),
    "float splits": ("ragged", embax.RaggedIds(i32, one), None, TypeError, f"{SPLITS} are float32; they must be integers"),
    "2-d splits": ("ragged", embax.RaggedIds(i32, i32[None]), None, ValueError, f"{SPLITS} have shape (1, 2); they must have one"),
    "no splits": ("ragged", embax.RaggedIds(i32, i32[:0]), None, ValueError, f"{SPLITS} are empty; they must be integers [samples"),
    "2-d values": ("ragged", embax.RaggedIds(i32[None], i32), None, ValueError, f"{IDS} have shape (1, 2); they must have one"),
    "samples": ("ragged", embax.CooIds(i32[:1], i32, 2), None, ValueError, f"{SAMPLES} are 1 for 2 ids; give every id its sample"),
    "num_samples": ("ragged", embax.CooIds(i32, i32, None), None, ValueError, "CooIds.num_samples is None; it must be the number"),
    "more weights": ("ragged", i32, jnp.ones(3), ValueError, f"{W} are float32(3,); they must be floats, one per id: (2,)"),
    "integer weights": ("ragged", i32, i32, ValueError, f"{W} are int32(2,); they must be floats, one per id: (2,)"),
    "list of weights": ("ragged", i32, [1.0, 2.0], TypeError, f"{W} are of type list; inside jit they must be a float array"),
    "Coo weights": ("ragged", i32, embax.CooIds(i32, one, 2), TypeError, f"{W} are of type CooIds; inside jit they must be"),
    "other form": ("ragged", embax.RaggedIds(i32, i32), embax.CooIds(i32, one, 1), ValueError, f"{W} are CooIds of other splits"),
    "more splits": ("ragged", embax.RaggedIds(i32, i32), embax.RaggedIds(one, i32[:1]), ValueError, f"{W} are RaggedIds of other"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TRACED)
def test_bad_shapes_and_types_inside_jit(name):
    plan, ids, weights, error, text = BAD_TRACED[name]
    refused(error, text, embax.preprocess_traced, PLANS[plan], ids, weights)


@pytest.mark.parametrize(
    ("lengths", "error", "text"),
    [
        ([1.5], TypeError, f"RaggedIds: lengths hold 1.5, a float; {CAST}"),
        ([2, -1], ValueError, "RaggedIds: lengths[1] is -1; a length is 0 or more"),
        ([[1]], ValueError, "RaggedIds: lengths hold [1], nested more deeply"),
        (np.array([[1]]), ValueError, "RaggedIds: lengths hold [[1]], nested more deeply"),
        (None, TypeError, "RaggedIds: lengths are missing (None); give a flat array of integers"),
        ([True], TypeError, f"RaggedIds: lengths hold True, a bool; {CAST}"),
    ],
)
def test_bad_lengths(lengths, error, text):
    refused(error, text, embax.RaggedIds.from_lengths, [1, 2], lengths)


# ---- specifications and plans -----------------------------------------------------------------------------


def two(first, second, **settings):
    """A plan of two features; each is given as (name, table)."""
    return embax.plan([feature(table, name, (None,)) for name, table in (first, second)], **settings)


TABLE, OTHER = table_spec("item"), table_spec("user", rows=9)
SHAPES = (
    "the output is the input's batch (and positions) followed by embedding_dim: [B, n] -> [B, D], [B, T] -> [B, T, D], "
    "[B, T, n] -> [B, T, D]"
)
BAD_SPECS = {
    "combiner": (lambda: table_spec(combiner="Mean"), ValueError, "table \"item\": combiner 'Mean' is not one of 'sum', 'mean', "
                 "'sqrtn' (lower case); choose one of them"),
    "combiner None": (lambda: table_spec(combiner=None), ValueError, 'table "item": combiner None is not one of'),
    "combiner list": (lambda: table_spec(combiner=["sum"]), ValueError, "table \"item\": combiner ['sum'] is not one of"),
    "no name": (lambda: table_spec(""), ValueError, "TableSpec: name='' must be a string of at least one character"),
    "no rows": (lambda: table_spec(rows=0), ValueError, 'table "item": vocabulary_size=0 must be an integer of at least 1'),
    "float rows": (lambda: table_spec(rows=5.0), ValueError, 'table "item": vocabulary_size=5.0 must be an integer of at least 1'),
    "bool rows": (lambda: table_spec(rows=True), ValueError, 'table "item": vocabulary_size=True must be an integer of at least 1'),
    "no width": (lambda: table_spec(dim=0), ValueError, 'table "item": embedding_dim=0 must be an integer of at least 1'),
    "dtype": (lambda: table_spec(dtype="int8"), ValueError, 'table "item": dtype int8 is not one of float32, bfloat16, float16'),
    "initializer": (lambda: table_spec(initializer=0.0), TypeError, 'table "item": initializer=0.0 must be a callable'),
    "optimizer": (lambda: table_spec(optimizer="adam"), TypeError, "table \"item\": optimizer='adam' must be an embax optimizer"),
    "out_of_range": (lambda: feature(TABLE, out_of_range="clip"), ValueError, "feature \"history\": out_of_range='clip' is not one of"),
    "truncate": (lambda: feature(TABLE, truncate=True), ValueError, 'feature "history": truncate=True is not one of error, keep_first'),
    "padding_id": (lambda: feature(TABLE, padding_id=1.0), TypeError, 'feature "history": padding_id=1.0 must be an integer or None'),
    "padding_id bool": (lambda: feature(TABLE, padding_id=False), TypeError, "padding_id=False must be an integer or None"),
    "feature name": (lambda: feature(TABLE, None), ValueError, "FeatureSpec: name=None must be a string of at least one character"),
    "table_spec": (lambda: embax.FeatureSpec(name="x", table_spec="item", input_shape=(None,), output_shape=(None, 4)), TypeError, "feature \"x\": table_spec='item' must be"),
    "width": (lambda: feature(TABLE, outputs=(None, 5)), ValueError, 'feature "history": output_shape (None, 5) ends in 5, and table '
              '"item" has embedding_dim 4; they must be equal'),
    "shapes": (lambda: feature(TABLE, inputs=(8, 3), outputs=(9, 4)), ValueError, f"(8, 3) does not fit output_shape (9, 4); {SHAPES}"),
    "no batch": (lambda: feature(TABLE, inputs=(), outputs=(4,)), ValueError, f"() does not fit output_shape (4,); {SHAPES}"),
    "too many": (lambda: feature(TABLE, inputs=(None, 3, 2)), ValueError, f"(None, 3, 2) does not fit output_shape (None, 4); {SHAPES}"),
    "open positions": (lambda: feature(TABLE, inputs=(None, None)), ValueError, 'feature "history": input_shape=None must be an integer'),
    "features of one name": (lambda: two(("x", TABLE), ("x", OTHER)), ValueError, 'plan: two features are named "x"; every feature needs '
                             "a name of its own"),
    "tables of one name": (lambda: two(("x", TABLE), ("y", table_spec("item", rows=9))), ValueError, 'plan: feature "y" brings another '
                           'table named "item" with other settings; share one TableSpec, or rename one of the tables'),
    "vocabulary": (lambda: embax.plan(feature(table_spec(rows=2**31))), ValueError, 'table "item": vocabulary_size 2147483648 is above '
                   "2147483646, the most rows that one device can number; hash the ids into fewer rows or split the table by id"),
    "rows of a stack": (lambda: two(("x", TABLE), ("y", table_spec("user", rows=2**31 - 9)), stacks={"s": ["item", "user"]}), ValueError,
                        'plan: stack "s" would have more than 2147483646 rows; split it'),
    "no features": (lambda: embax.plan({}), ValueError, "plan: there are no features; pass at least one FeatureSpec"),
    "not a feature": (lambda: embax.plan({"x": TABLE}), TypeError, "is not a FeatureSpec"),
    "capacity of whom": (lambda: embax.plan(feature(TABLE), capacity={"x": 3}), ValueError, 'plan: capacity names feature "x", which'),
    "capacity": (lambda: embax.plan(feature(TABLE), capacity={"history": 0}), ValueError, 'capacity of feature "history" is 0; it must'),
    "capacity bool": (lambda: embax.plan(feature(TABLE), capacity={"history": True}), ValueError, "is True; it must be an integer"),
    "stacks": (lambda: embax.plan(feature(TABLE), stacks=True), ValueError, 'plan: stacks=True must be "auto", "none", or a mapping'),
    "stack of whom": (lambda: embax.plan(feature(TABLE), stacks={"s": ["x"]}), ValueError, 'plan: stack "s" names table "x", which no'),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_SPECS)
def test_bad_specifications(name):
    make, error, text = BAD_SPECS[name]
    refused(error, text, make)


def test_the_largest_vocabularies():
    """Row numbers, and the number one past the end, fit int32; tables that do not fit one stack get two."""
    plan = embax.plan(feature(table_spec(rows=2**31 - 2), "history", (None,), padding_id=2**31 - 2))
    batch = embax.preprocess(plan, np.array([2**31 - 3, 2**31 - 2]))
    assert batch.stacks["item"].ids.tolist() == [[2**31 - 3, 2**31 - 2]]
    refused(ValueError, "id 2147483647 >= vocabulary_size 2147483646", embax.preprocess, plan, [[2**31 - 1]])
    traced = jax.jit(lambda ids: embax.preprocess_traced(plan, ids))(np.array([2**31 - 3, 2**31 - 1, -1], np.int32))
    assert traced.stacks["item"].ids.tolist() == [[2**31 - 3, 2**31 - 2, 2**31 - 2]]
    assert len(two(("x", TABLE), ("y", table_spec("user", rows=2**31 - 9))).stacks) == 2
    plan = two(("x", table_spec("user", rows=2**31 - 99)), ("y", table_spec("item", rows=60)))
    assert embax.preprocess(plan, [[1], [59]]).stacks["user_item"].ids.tolist() == [[1, 2**31 - 99 + 59]]
