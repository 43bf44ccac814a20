"""Runs a StableHLO program inside a JAX program: how a custom optimizer that is only a text takes its step."""

import functools

import jax
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import func

_program = Primitive("embax_stablehlo_program")
_program.multiple_results = True


def call_program(text: str, *arguments: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the results of the ``main`` function of a StableHLO module; numbers are spread to what it takes.

    Raises:
      ValueError: the text is no module with a ``main``, or ``main`` takes other shapes or dtypes.
    """
    inputs, outputs = _signature(text)
    if len(inputs) == len(arguments):  # a number where the program takes an array of it, as a TPU's programs do
        arguments = tuple(
            a if a.shape else jax.numpy.broadcast_to(a, t[0]) for a, t in zip(arguments, inputs, strict=True)
        )
    given = tuple((tuple(a.shape), str(a.dtype)) for a in arguments)
    if given != inputs:
        raise ValueError(f"the StableHLO program takes {_shown(inputs)}, and is given {_shown(given)}")
    # Always inside jit: the primitive is lowered, never evaluated on its own.
    return tuple(jax.jit(functools.partial(_program.bind, text=text, outputs=outputs))(*arguments))


def _shown(types: tuple) -> str:
    return ", ".join(f"{dtype}{list(shape)}" for shape, dtype in types)


@functools.lru_cache(maxsize=256)
def _signature(text: str) -> tuple[tuple, tuple]:
    """Returns (shape, dtype) of the arguments and of the results of ``main``."""
    with mlir.make_ir_context():
        try:
            module = ir.Module.parse(text)
            main = _main(module)
        except (ir.MLIRError, StopIteration, KeyError) as error:
            raise ValueError(f"stablehlo is not the text of a StableHLO module with a main function: {error}") from None
        kind = ir.FunctionType(ir.TypeAttr(main.attributes["function_type"]).value)
        return tuple(map(_type, kind.inputs)), tuple(map(_type, kind.results))


def _main(module: ir.Module):
    return next(op for op in module.body.operations if ir.StringAttr(op.attributes["sym_name"]).value == "main")


def _type(kind: ir.Type) -> tuple[tuple[int, ...], str]:
    tensor = ir.RankedTensorType(kind)
    names = {"f32": "float32", "f64": "float64", "f16": "float16", "bf16": "bfloat16", "i32": "int32", "i1": "bool"}
    element = str(tensor.element_type)
    if element not in names:
        raise ValueError(f"the StableHLO program has a value of type {element}; float32 is what optimizers work in")
    return tuple(tensor.shape), names[element]


@_program.def_abstract_eval
def _(*_, text, outputs):
    return [ShapedArray(shape, np.dtype(dtype)) for shape, dtype in outputs]


def _lower(ctx, *arguments, text, outputs):
    module = ir.Module.parse(text)
    types = list(ir.FunctionType(ir.TypeAttr(_main(module).attributes["function_type"]).value).results)
    # The table of the names that are taken: without it a function of both would be defined twice.
    names = ctx.module_context.symbol_table
    name = mlir.merge_mlir_modules(ctx.module_context.module, "embax_program", module, dst_symtab=names)
    return func.CallOp(types, ir.FlatSymbolRefAttr.get(name), list(arguments)).results


mlir.register_lowering(_program, _lower)
