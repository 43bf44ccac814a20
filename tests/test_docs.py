"""README.md and docs/ say what is true: their Python runs, and the specification leaves nothing out."""

import ast
import dataclasses
import doctest
import inspect
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

import embax

pytestmark = pytest.mark.once

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SPECIFICATION = ROOT / "docs" / "specification.md"
FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,}) *(?P<info>[^`]*?) *$")


class Block(NamedTuple):
    """A fenced block: its language, its text and the number of its first line, counted from 1."""

    language: str
    source: str
    line: int


def blocks(text):
    """Returns the fenced blocks of a Markdown page in order; AssertionError for one that is not closed."""
    found, opened, inside = [], None, []
    for number, line in enumerate(text.splitlines(), start=1):
        fence = FENCE.match(line)
        if opened is None:
            if fence:
                opened, first, inside = fence, number + 1, []
        elif fence and not fence["info"] and fence["fence"].startswith(opened["fence"]):
            language = opened["info"].split(" ")[0].lower()
            found.append(Block(language, textwrap.dedent("\n".join(inside)) + "\n", first))
            opened = None
        else:
            inside.append(line)
    assert opened is None, f"the block opened in line {first - 1} is not closed"
    return found


def run_block(block, name, namespace):
    """Runs one block of the page ``name``; a failure is an AssertionError that names the page and the line."""
    if not re.search(r"^\s*>>>", block.source, re.MULTILINE):
        try:
            # Blank lines in front give every line the number that it has on the page.
            exec(compile("\n" * (block.line - 1) + block.source, name, "exec"), namespace)
        except Exception as error:
            line = _line_of(error, name) or block.line
            raise AssertionError(f"{name}, line {line}: {type(error).__name__}: {error}") from error
        return
    test = doctest.DocTestParser().get_doctest(block.source, {}, name, name, block.line - 1)
    test.globs = namespace  # the parser copies it, and the next block needs what this one defines
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    report = []
    runner.run(test, out=report.append, clear_globs=False)
    if report:
        raise AssertionError("".join(report))


def _line_of(error, name):
    if isinstance(error, SyntaxError):
        return error.lineno
    lines, trace = [], error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == name:
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return lines[0] if lines else None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run(page):
    name, namespace = page.relative_to(ROOT).as_posix(), {"__name__": "__main__"}
    # A reader runs them under JAX as it comes; the other tests are stricter about dtypes and ranks.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in blocks(page.read_text(encoding="utf-8")):
            if block.language == "python":
                run_block(block, name, namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_a_page_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    assert [link for link in re.findall(r"\]\(#([^)]*)\)", prose) if link not in anchors] == []


# ---- the runner itself ---------------------------------------------------------------------------------------------


def test_blocks_share_a_namespace_and_failures_name_the_line():
    page = "text\n```python\nx = 2\n```\n```sh\nfalse\n```\n- item\n\n"
    first, shell, second = blocks(page + "  ```python\n  >>> x + 1\n  3\n  >>> x + 2\n  5\n  ```\n")
    assert (first.line, shell.language, second.line) == (3, "sh", 11)
    namespace = {}
    run_block(first, "page.md", namespace)
    with pytest.raises(AssertionError, match=r'File "page.md", line 13') as error:
        run_block(second, "page.md", namespace)
    assert "Expected:\n    5\nGot:\n    4" in str(error.value)
    with pytest.raises(AssertionError, match=r"page.md, line 13: ZeroDivisionError"):
        run_block(Block("python", "a = 1\n\na / 0\n", 11), "page.md", namespace)
    with pytest.raises(AssertionError, match=r"page.md, line 12: SyntaxError"):
        run_block(Block("python", "a = 1\nb =\n", 11), "page.md", namespace)
    with pytest.raises(AssertionError, match="opened in line 2 is not closed"):
        blocks("text\n```python\nx = 2\n")


# ---- the specification is whole ------------------------------------------------------------------------------------


def public_names():
    """Returns what ``embax/__init__.py`` imports as itself."""
    tree = ast.parse(inspect.getsource(embax))
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    return [alias.asname for node in imports for alias in node.names if alias.asname == alias.name.split(".")[-1]]


def code():
    """Returns all code of the specification: its Python blocks, and what stands between backticks."""
    text = SPECIFICATION.read_text(encoding="utf-8")
    fenced = [block.source for block in blocks(text)]
    prose = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return "\n".join([*fenced, *re.findall(r"`([^`]+)`", prose)])


def rows(first_cell):
    """Returns the cells of every table row of the specification whose first cell begins with `` `first_cell``."""
    lines = SPECIFICATION.read_text(encoding="utf-8").splitlines()
    return [[c.strip() for c in line.strip("| ").split(" | ")] for line in lines if line.startswith(f"| `{first_cell}")]


def section(title):
    """Returns the lines of the specification below the heading of that title, up to the next of its level."""
    text = SPECIFICATION.read_text(encoding="utf-8")
    return re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^\1 |\Z)", text, re.MULTILINE | re.DOTALL)[2]


def public_fields(cls):
    return [field for field in dataclasses.fields(cls) if not field.name.startswith("_")]


OPTIMIZERS = sorted(
    (v for v in map(vars(embax).get, public_names()) if inspect.isclass(v) and issubclass(v, embax.Optimizer)),
    key=lambda cls: cls.__name__,
)


def test_every_public_name_is_in_the_last_table_and_in_code():
    text, table = code(), section("Every name")
    names = public_names()
    assert len(names) > 30
    assert [name for name in names if not re.search(rf"\b{name}\b", text)] == []
    assert [name for name in names if f"`{name}`" not in table] == []
    listed = re.findall(r"`(\w+)`", "".join(re.findall(r"^\|([^|]*)\|", table, re.MULTILINE)))
    assert [name for name in listed if name not in names] == []


@pytest.mark.parametrize("cls", [embax.TableSpec, embax.FeatureSpec], ids=lambda cls: cls.__name__)
def test_every_parameter_of_a_spec_has_a_row_and_its_default(cls):
    documented = {c[0].strip("`"): c[2] for c in _parameter_rows(cls.__name__)}
    assert documented == {field.name: _shown(field.default) for field in public_fields(cls)}


def test_every_parameter_of_plan_has_a_row():
    documented = [cells[0].strip("`") for cells in _parameter_rows("plan")]
    assert documented == list(inspect.signature(embax.plan).parameters)


@pytest.mark.parametrize("cls", OPTIMIZERS, ids=lambda cls: cls.__name__)
def test_every_parameter_of_an_optimizer_is_there_with_its_default(cls):
    common = [f.name for f in public_fields(embax.Optimizer) if f.kw_only]
    own = [field for field in public_fields(cls) if field.name not in common]
    if cls is embax.Optimizer:
        documented = {cells[0].strip("`"): cells[2] for cells in _parameter_rows("Clipping and weight decay")}
        assert documented == {f.name: _shown(f.default) for f in public_fields(cls) if f.kw_only}
        return
    (cells,) = rows(f"{cls.__name__}(")
    assert cells[0] == f"`{cls.__name__}({', '.join(f'{field.name}={field.default!r}' for field in own)})`"


def test_every_slot_variable_is_named():
    for cls in OPTIMIZERS:
        if cls not in (embax.Optimizer, embax.Custom, embax.Optax):
            (cells,) = rows(f"{cls.__name__}(")
            missing = [name for name in cls().slots()._fields if not re.search(rf"\b{name}\b", cells[1])]
            assert missing == [], cls.__name__


def _shown(default):
    if default is dataclasses.MISSING:
        return "required"
    return f'`"{default}"`' if isinstance(default, str) else f"`{default!r}`"


def _parameter_rows(title):
    """Returns the cells of the tables of a section whose heading row begins with "parameter"."""
    found, inside = [], False
    for line in section(title).splitlines():
        inside = line.startswith("|") and (inside or line.startswith("| parameter |"))
        if inside and line.startswith("| `"):
            found.append([cell.strip() for cell in line.strip("| ").split(" | ")])
    return found
