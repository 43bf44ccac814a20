"""The tutorials run and hold what they assert, and the reference leaves no public name out."""

import ast
import doctest
import importlib
import importlib.util
import re
import runpy
from pathlib import Path

import jax
import pytest
import sparsecore_names

pytestmark = pytest.mark.once

ROOT = Path(__file__).parent.parent
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.py"))
REFERENCE = ROOT / "docs" / "reference"
MODULES = [
    name
    for name in ("embax", "embax.nnx", "embax.linen", "embax.checkpoint", "embax.data")
    if importlib.util.find_spec(name)
]
NEEDS = {
    "checkpoints": ("orbax.checkpoint", "optax"),
    "click_model": ("optax",),
    "flax_swap": ("flax", "optax"),
    "retrieval": ("optax",),
}


PRINTED = re.compile(r"^# > (.*)$", re.MULTILINE)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@pytest.mark.parametrize("script", TUTORIALS, ids=lambda script: script.stem)
def test_a_tutorial(script, eight_devices, tmp_path, monkeypatch, capsys):
    """It runs, what it asserts holds, and it prints what the page says, numbers but for a few hundredths."""
    for module in NEEDS.get(script.stem, ()):
        pytest.importorskip(module, reason=f"the tutorial {script.stem} needs {module}")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    # A reader runs them under JAX as it comes; the other tests are stricter about dtypes and ranks.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        runpy.run_path(str(script), run_name="__main__")
    printed, said = capsys.readouterr().out.strip(), "\n".join(PRINTED.findall(script.read_text(encoding="utf-8")))
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", said)
    found, wanted = ([float(number) for number in NUMBER.findall(text)] for text in (printed, said))
    assert found == pytest.approx(wanted, rel=0.02, abs=0.02), printed


def shown():
    """Returns the names that the pages of the reference take from docstrings, with the page that has each."""
    pages = {page.name: page.read_text(encoding="utf-8") for page in sorted(REFERENCE.glob("*.md"))}
    return [(name, page) for page, text in pages.items() for name in re.findall(r"^::: (\S+)$", text, re.MULTILINE)]


def public_names(module):
    """Returns what a module imports as itself; what ``__all__`` says where there is one."""
    source = Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")
    imports = [node for node in ast.parse(source).body if isinstance(node, ast.ImportFrom)]
    own = [alias.name for node in imports for alias in node.names if alias.asname == alias.name]
    return getattr(importlib.import_module(module), "__all__", own)


def _path(module, name):
    """Returns what the pages call a name: ``embax.take.take`` where a module ``embax.take`` stands in the way."""
    path = f"{module}.{name}"
    thing = getattr(importlib.import_module(module), name)
    return f"{thing.__module__}.{name}" if callable(thing) and _is_module(path) else path


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_in_the_reference_once(module):
    names = [_path(module, name) for name in public_names(module)]
    found = [name for name, _ in shown()]
    # Of Linen these two are embax's own, and the page says so.
    elsewhere = {"embax.linen.value_and_grad", "embax.linen.prefetch"}
    assert [name for name in names if found.count(name) != 1 and name not in elsewhere] == []


def test_every_module_of_data_is_in_the_reference():
    modules = {path.stem for path in (ROOT / "embax" / "data").glob("[!_]*.py")}
    assert {f"embax.data.{name}" for name in modules} == {name for name, page in shown() if page == "data.md"}


def test_every_sparsecore_module_is_in_the_reference():
    found = {name for name, _ in shown()}
    modules = {f"embax.sparsecore.{entry.module}" for entry in sparsecore_names.ENTRIES}
    assert modules - found - {"embax.sparsecore.lib.proto.embedding_spec_pb2"} == set()
    page = (REFERENCE / "sparsecore.md").read_text(encoding="utf-8")
    specs = importlib.import_module("embax.sparsecore.lib.nn.embedding_spec").__all__
    assert [name for name in specs if not re.search(rf"\b{name}\b", page)] == []


@pytest.mark.parametrize("name, page", shown(), ids=lambda value: value)
def test_what_the_reference_shows_is_there(name, page):
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        if _is_module(".".join(parts[:count])):
            break
    thing = _imported(".".join(parts[:count]))
    for part in parts[count:]:
        thing = getattr(thing, part)
    assert thing.__doc__, f"{page}: {name} has no docstring"


def _imported(name):
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if str(error.name).startswith("embax"):
            raise
        pytest.skip(f"{name} needs {error.name}")


def _is_module(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("script, needs", [("docs_pages", "mkdocs"), ("docs_reference", "griffe")])
def test_what_makes_the_site(script, needs):
    pytest.importorskip(needs, reason="pip install 'embax[docs]'")
    spec = importlib.util.spec_from_file_location(script, ROOT / "scripts" / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0 and result.failed == 0
