#!/usr/bin/env python
"""Writes docs/config.md: every config key that libra_d2 adds, from libra_d2/config.py.

python tools/config_reference.py
"""

import ast
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from detectron2.config import CfgNode, get_cfg

from libra_d2 import config
from libra_d2.config import add_libra_config, get_key, list_keys

_HEAD = """# Config keys

Every key that libra_d2 adds to detectron2's config, with its default. With all of them at their
defaults a model computes what detectron2's own computes. This page is made from
`libra_d2/config.py` by `tools/config_reference.py`. Which of them a LazyConfig has, and where:
[runs.md](runs.md), [lazyconfig.md](lazyconfig.md).

"""


def make_reference() -> str:
    """The page."""
    source = inspect.getsource(config)
    lines, functions = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            functions[node.name] = node
    defaults, plain = get_cfg(), get_cfg()
    add_libra_config(defaults)
    known = {key for key, _ in list_keys(plain)}
    added = [k for k, v in list_keys(defaults) if k not in known and not isinstance(v, CfgNode)]
    meanings, parts = {}, []
    for name in ("add_libra_config", *(n for n in functions if n.startswith("_add_"))):
        own = dict(_meanings(functions[name], functions, lines))
        meanings.update(own)
        parts.append((_title(functions[name]), [key for key in added if key in own]))
    missing = [key for key in added if not meanings.get(key)]
    if missing:
        raise ValueError(f"config.py says nothing about {', '.join(missing)}")
    page = [_HEAD]
    for title, keys in parts:
        if keys:
            page.append(f"## {title}\n\n| key | default | |\n|---|---|---|\n")
            for key in keys:
                value = get_key(defaults, key)
                page.append(f"| `{key}` | `{value!r}` | {_cell(meanings[key])} |\n")
            page.append("\n")
    return "".join(page).rstrip("\n") + "\n"


def _title(function: ast.FunctionDef) -> str:
    if function.name == "add_libra_config":
        return "Papers and reference code"
    return ast.get_docstring(function).splitlines()[0].rstrip(".")


def _meanings(
    function: ast.FunctionDef, functions: dict, lines: list[str], prefix: str = ""
) -> Iterator[tuple[str, str]]:
    """Each key that a function sets, with the comment above it, or above its group."""
    groups, comment = {}, ""
    for node in function.body:
        if isinstance(node, ast.For):  # names of one meaning
            (assignment,) = node.body
            group = prefix + _path(assignment.targets[0].value)
            for name in ast.literal_eval(node.iter):
                yield f"{group}.{name}", groups.get(group, comment)
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Attribute):
            continue
        key = prefix + _path(node.targets[0])
        above = _comment(lines, node.lineno)
        if above or not lines[node.lineno - 2].strip():
            comment = above
        made = node.value.func.id if isinstance(node.value, ast.Call) else ""
        if made == "CfgNode":
            groups[key] = comment
            continue
        own = above or groups.get(key.rpartition(".")[0], "") or comment
        if made in functions:
            called = functions[made]
            of = f"{key}."
            for name, meaning in _meanings(called, functions, lines, of):
                yield name, meaning or own
            continue
        yield key, own


def _path(node: ast.expr) -> str:
    parts = []
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        if isinstance(node, ast.Attribute):
            parts.append(node.attr)
        node = node.value
    return ".".join(reversed(parts))


def _comment(lines: list[str], number: int) -> str:
    """The comment that ends right above a line, counted from 1."""
    found = []
    for line in reversed(lines[: number - 1]):
        if not line.strip().startswith("#"):
            break
        found.append(line.strip().lstrip("# "))
    return " ".join(reversed(found))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    (ROOT / "docs" / "config.md").write_text(make_reference())
    print("wrote docs/config.md")


if __name__ == "__main__":
    main()
