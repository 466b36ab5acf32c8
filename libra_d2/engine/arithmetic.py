"""Reads the arithmetic that detectron2's zoo has in its yaml files, without running code."""

import ast
import contextlib
import io
import operator
import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode

from libra_d2.config import get_key

__all__ = ["ZooConfig", "config_files", "evaluate", "read_yaml"]

TAG = "tag:yaml.org,2002:python/object/apply:eval"
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
}
_FUNCTIONS = {"int": int, "float": float, "round": round, "range": range}
_MOST = 10_000  # characters of an expression, entries of a range, and largest number


def evaluate(expression: str) -> Any:
    """The value of an expression of numbers, lists, + - * / **, and comprehensions over lists.

    Raises:
        ValueError: if it has anything else.
    """
    if not isinstance(expression, str) or len(expression) > _MOST:
        raise ValueError("is no text, or too long")
    try:
        return _evaluate(ast.parse(expression.strip(), mode="eval").body, {}, count(1))
    except (SyntaxError, TypeError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"is no arithmetic ({error})") from error


def _evaluate(node: ast.AST, names: dict[str, Any], steps: Iterator[int]) -> Any:
    if next(steps) > _MOST:
        raise ValueError("takes too long")
    match node:
        case ast.Constant(value=int() | float() as value):
            return value
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return [_evaluate(element, names, steps) for element in elements]
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_evaluate(operand, names, steps))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            numbers = [_evaluate(side, names, steps) for side in (left, right)]
            # Above a small power numbers can take all the memory.
            small = type(op) is not ast.Pow or abs(numbers[1]) <= 64
            if all(isinstance(x, (int, float)) and abs(x) <= _MOST for x in numbers) and small:
                return _OPERATORS[type(op)](*numbers)
            raise ValueError(f"has {ast.unparse(node)}, whose numbers are too large")
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            value = _FUNCTIONS[name](*(_evaluate(arg, names, steps) for arg in args))
            if name != "range" or len(value) <= _MOST:
                return value
        case ast.ListComp(
            elt=element,
            generators=[
                ast.comprehension(target=ast.Name(id=name), iter=items, ifs=[], is_async=0)
            ],
        ):
            items = _evaluate(items, names, steps)
            return [_evaluate(element, {**names, name: x}, steps) for x in items]
    raise ValueError(f"has {ast.unparse(node)}, which is not read because it could run any code")


class _Loader(yaml.SafeLoader):
    """Safe yaml, and this one tag."""


def _construct(loader: _Loader, node: yaml.SequenceNode) -> Any:
    try:
        (expression,) = loader.construct_sequence(node)
        return evaluate(expression)
    except ValueError as error:
        problem = f"could not determine a constructor for the tag '{TAG}' that {error}"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


_Loader.add_constructor(TAG, _construct)


def _make_floats(cfg: CfgNode, defaults: CfgNode) -> None:
    for key, value in cfg.items():
        default = defaults.get(key)
        if isinstance(value, CfgNode) and isinstance(default, CfgNode):
            _make_floats(value, default)
        elif type(value) is int and isinstance(default, float):
            cfg[key] = float(value)


def read_yaml(text: str) -> Any:
    """The content of safe yaml that may have the zoo's arithmetic."""
    return yaml.load(text, _Loader)


def config_files(config_file: str) -> list[str]:
    """A config file and all that it is based on, once it has been read without an error.

    Of a Python file that is it alone: what it imports only it knows.
    """
    if config_file.endswith(".py"):
        return [config_file]
    files = [config_file] if os.path.isfile(config_file) else []
    for file in files:
        bases = read_yaml(Path(file).read_text()).get("_BASE_", [])
        for base in [bases] if isinstance(bases, str) else bases:
            base = os.path.join(os.path.dirname(file), os.path.expanduser(base))
            files += [base] if os.path.isfile(base) and base not in files else []
    return files


class ZooConfig(CfgNode):
    """A config that reads the zoo's files too, and a whole number where a float is wanted."""

    def merge_from_other_cfg(self, cfg_other: CfgNode) -> None:
        _make_floats(cfg_other, self)
        super().merge_from_other_cfg(cfg_other)

    def merge_from_list(self, cfg_list: list[str]) -> None:
        pairs = list(zip(cfg_list[::2], cfg_list[1::2], strict=True))
        for i, (key, value) in enumerate(pairs):
            with contextlib.suppress(KeyError, TypeError, ValueError):
                if isinstance(get_key(self, key), float):
                    pairs[i] = key, float(int(value))
        super().merge_from_list([part for pair in pairs for part in pair])

    @classmethod
    def _open_cfg(cls, filename: str):
        with super()._open_cfg(filename) as file:
            text = file.read()
        if "python/object/apply:eval" in text:
            text = yaml.safe_dump(read_yaml(text))
        return io.StringIO(text)
