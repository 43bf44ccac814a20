"""An extension of griffe, which reads the docstrings for the reference: what embax writes in its own way.

- Examples with ``>>>`` are blocks of code.
- ``from a import X as X`` makes X public in the module that says so.
- Private fields of a dataclass are no parameters to know of.
"""

import ast
import re

import griffe

# From a prompt to the next blank line.
SESSION = re.compile(r"^( *)>>> (?:.*\S.*(?:\n|\Z))+", re.MULTILINE)


def fenced(docstring: str) -> str:
    r"""Returns a docstring with its sessions in fences; sessions that only a blank line parts share one.

    >>> fenced("Text.\n\n>>> 1 + 1\n2")
    'Text.\n\n```pycon\n>>> 1 + 1\n2\n```\n'
    """
    found = SESSION.sub(lambda m: f"{m[1]}```pycon\n{m[0].rstrip()}\n{m[1]}```\n", docstring)
    return re.sub(r"^ *```\n\n *```pycon\n", "\n", found, flags=re.MULTILINE)


def public_imports(module: ast.Module) -> set[str]:
    """Returns what a module imports as itself.

    >>> public_imports(ast.parse("from a import X as X, Y, z as Z"))
    {'X'}
    """
    imports = [node for node in module.body if isinstance(node, ast.ImportFrom)]
    return {alias.name for node in imports for alias in node.names if alias.asname == alias.name}


class Reference(griffe.Extension):
    """Changes what is loaded before the pages are made of it."""

    def on_object(self, *, obj, loader, **kwargs):
        """Puts the sessions of a docstring into fences."""
        if obj.docstring and ">>>" in obj.docstring.value:
            obj.docstring.value = fenced(obj.docstring.value)

    def on_module_members(self, *, node, mod, agent, **kwargs):
        """Says what a module offers, if it does not say so by ``__all__``."""
        if isinstance(node, ast.Module) and mod.exports is None:
            imported = public_imports(node)
            own = {name for name, member in mod.members.items() if not member.is_alias and not name.startswith("_")}
            mod.exports = sorted(imported | own)

    def on_package(self, *, pkg, loader, **kwargs):
        """Leaves private fields out of the signatures that dataclasses are given; comes after ``dataclasses``."""
        for cls in _classes(pkg):
            if "dataclass" in cls.labels and "__init__" in cls.members:
                parameters = cls.members["__init__"].parameters
                for name in [parameter.name for parameter in parameters if parameter.name.startswith("_")]:
                    del parameters[name]


def _classes(scope):
    """Yields the classes that are defined in a package, at any depth."""
    for member in scope.members.values():
        if not member.is_alias and member.is_class:
            yield member
        if not member.is_alias and (member.is_module or member.is_class):
            yield from _classes(member)
