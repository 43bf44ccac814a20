"""A hook of mkdocs: pages that are made of files which are no Markdown of ``docs/``.

- ``docs/tutorials/NAME.py``, a script in cells (``# %%``), is the page ``tutorials/NAME.md``.
- A file outside of ``docs/`` that a page links to (``../examples/x.py``) becomes a page, so that the link leads to it.
- Examples with ``>>>`` are coloured as a session.
"""

import os
import re
from pathlib import Path

from mkdocs.structure.files import File, InclusionLevel

CELL = re.compile(r"^# %%(?P<kind> \[markdown\])?.*\n", re.MULTILINE)
LINK = re.compile(r"(?<=\]\()(?P<path>[^)#:\s]+)(?=[)#])")
SESSION = re.compile(r"^( *)```python\n(?=\s*>>>)", re.MULTILINE)
RENAMED = {"CHANGELOG.md": "changes.md", "CONTRIBUTING.md": "contributing.md"}


def markdown_of(script: str) -> str:
    r"""Returns the page of a script: comment cells as text, the others as code, with what they print below.

    Args:
      script: what the file holds; what stands before its first cell is left out. A cell that prints ends in lines
        ``# > what it prints``.

    >>> print(markdown_of("# %% [markdown]\n# # Title\n#\n# Text.\n\n# %%\nprint(1)\n# > 1\n"))
    # Title
    <BLANKLINE>
    Text.
    <BLANKLINE>
    ```python
    print(1)
    ```
    <BLANKLINE>
    ```text
    1
    ```
    <BLANKLINE>
    """
    _, *parts = CELL.split(script)
    cells = []
    for kind, text in zip(parts[::2], parts[1::2], strict=True):
        if kind:
            cells.append(re.sub(r"^# ?", "", text.strip("\n"), flags=re.MULTILINE))
            continue
        code, *printed = re.split(r"^# > ", text.strip("\n"), flags=re.MULTILINE)
        cells.append(f"```python\n{code.rstrip()}\n```")
        if printed:
            cells.append(f"```text\n{''.join(printed)}\n```")
    return "\n\n".join(cells) + "\n"


def page_of(path: str) -> str:
    """Returns where the page of a repository's file outside of ``docs/`` stands.

    >>> page_of("CHANGELOG.md"), page_of("examples/shakespeare/by_nnx.py")
    ('changes.md', 'files/examples/shakespeare/by_nnx.py.md')
    """
    return RENAMED.get(path, f"files/{path}" if path.endswith(".md") else f"files/{path}.md")


def on_files(files, config):
    """Adds the pages of the tutorials, and of files outside of ``docs/`` that pages link to."""
    docs, root = Path(config.docs_dir), Path(config.docs_dir).parent
    for script in sorted((docs / "tutorials").glob("*.py")):
        text = markdown_of(script.read_text(encoding="utf-8"))
        text += f"\nThis page is a script: [{script.name}]({script.name}).\n"
        files.append(File.generated(config, f"tutorials/{script.stem}.md", content=text))
    waiting = {*RENAMED, *(path for page in docs.rglob("*.md") for path in _outside(page, root))}
    done = set()
    while waiting:
        path = waiting.pop()
        done.add(path)
        text = (root / path).read_text(encoding="utf-8")
        if path.endswith(".md"):
            waiting |= _outside(root / path, root) - done
            text = _moved(text, path)
        else:
            text = f"# {path}\n\n```{path.rpartition('.')[2]}\n{text.rstrip()}\n```\n"
        inclusion = InclusionLevel.INCLUDED if path in RENAMED else InclusionLevel.NOT_IN_NAV
        files.append(File.generated(config, page_of(path), content=text, inclusion=inclusion))
    return files


def on_page_markdown(markdown, page, config, files):
    """Leads links to files outside of ``docs/`` to their pages."""
    if not page.file.generated_by:
        markdown = _moved(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)
    return SESSION.sub(r"\1```pycon\n", markdown)


def _outside(page: Path, root: Path) -> set[str]:
    """Returns the repository's files outside of ``docs/`` that a page links to; what is not there is left to mkdocs."""
    linked = {_target(page.relative_to(root).as_posix(), m["path"]) for m in LINK.finditer(page.read_text("utf-8"))}
    return {path for path in linked if not path.startswith(("docs/", "../")) and (root / path).is_file()}


def _target(source: str, link: str) -> str:
    return os.path.normpath(os.path.join(os.path.dirname(source), link)).replace(os.sep, "/")


def _moved(markdown: str, source: str, page: str | None = None) -> str:
    """Returns the text of the repository's file ``source`` with its links as they are to be on ``page``."""
    root, start = Path(__file__).parent.parent, os.path.dirname(page or page_of(source))

    def led(match):
        target = _target(source, match["path"])
        if not (root / target).is_file() or (page and target.startswith("docs/")):
            return match["path"]
        there = target.removeprefix("docs/") if target.startswith("docs/") else page_of(target)
        return os.path.relpath(there, start or ".").replace(os.sep, "/")

    return LINK.sub(led, markdown)
