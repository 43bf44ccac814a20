"""A file imports only from the floors below its own; the tail of the code stays short."""

import ast
import pathlib
import sys

import embax

ROOT = pathlib.Path(embax.__file__).parent

# The first prefix that fits a module decides its floor.
FLOORS = (
    ("combiners", 0),
    ("optimizers", 0),
    ("rounding", 0),
    ("block_bits", 0),
    ("specs", 0),
    ("stacking", 1),
    ("sorted_rows", 1),
    ("costs", 1),
    ("placement", 1),
    ("planning", 1),
    ("sharded_tables", 1),
    ("table_state", 1),
    ("touched", 1),
    ("id_batch", 1),
    ("row_gradients", 1),
    ("id_forms", 2),
    ("id_inputs", 2),
    ("preprocess", 2),
    ("batch_shards", 2),
    ("kernels.nvrtc", 0),
    ("kernels.cubins", 0),
    ("kernels", 2),
    ("allocator", 2),
    ("exchange", 3),
    ("lookup", 4),
    ("update", 4),
    ("take", 4),
    ("quantized", 4),
    ("check_step", 4),
    ("gradients", 4),
    ("nnx", 5),
    ("linen", 5),
    ("sparsecore", 5),
    ("checkpoint", 5),
    ("data", 5),
    ("tasks", 6),
    ("cli", 6),
)


def _floor(module: str) -> int:
    for prefix, floor in FLOORS:
        if module == prefix or module.startswith((prefix + ".", prefix + "_")):
            return floor
    raise AssertionError(f"embax.{module} has no floor: add it to FLOORS, and to docs/architecture.md")


def _modules():
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            yield name, path


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "embax":
            if node.module == "embax":
                yield from (alias.name for alias in node.names)
            else:
                yield node.module.partition(".")[2]
        elif isinstance(node, ast.Import):
            yield from (a.name.partition(".")[2] for a in node.names if a.name.startswith("embax."))


def test_imports_go_down():
    seen = 0
    for name, path in _modules():
        for imported in _imports(path):
            if _floor(name) == 6 and not any(imported.startswith(prefix) for prefix, _ in FLOORS):
                continue  # the top floor uses public names, as users do
            seen += 1
            assert _floor(imported) <= _floor(name), f"embax.{name} (floor {_floor(name)}) imports embax.{imported}"
    assert seen > 40


BROUGHT = {
    **{"nnx": {"flax"}, "linen": {"flax"}, "sparsecore": {"flax"}, "checkpoint": {"orbax", "tensorstore", "flax"}},
    "data": {"grain", "pyarrow"},
}


def test_core_needs_only_jax_and_numpy():
    allowed = {"jax", "jaxlib", "numpy", "embax"}  # jaxlib comes with jax
    for name, path in _modules():
        if _floor(name) == 6:
            continue
        # A door to a framework is imported by those who have it.
        brought = BROUGHT.get(name.split(".")[0], set())
        for node in ast.parse(path.read_text()).body:  # inside a function one may use what the caller has brought
            roots = []
            if isinstance(node, ast.Import):
                roots = [alias.name.partition(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                roots = [node.module.partition(".")[0]]
            for root in roots:
                assert root in allowed | brought or root in sys.stdlib_module_names, f"embax.{name} imports {root}"


def test_the_tail_is_short():
    for name, path in _modules():
        text = path.read_text()
        assert text.count("\n") <= 400, f"embax.{name} has {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or 0) - node.lineno + 1
                if ast.get_docstring(node, clean=False) is not None:
                    length -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
                arguments = node.args
                count = len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs)
                count += bool(arguments.vararg) + bool(arguments.kwarg)
                assert length <= 60, f"embax.{name}.{node.name} has {length} lines"
                # The signatures of the SparseCore API are given.
                assert count <= 7 or name.startswith("sparsecore.lib"), (
                    f"embax.{name}.{node.name} has {count} arguments"
                )
