"""The page docs/faq.md explains every error and warning that the package raises on purpose."""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from convexheads import errors

ROOT = Path(__file__).parent.parent
ANY = "…"  # stands for whatever is not literal text, here and on the page


def texts(node: ast.expr, local: dict[str, ast.expr]) -> set[str]:
    """The texts that an expression may stand for."""
    match node:
        case ast.Constant(value=str(text)):
            return {text}
        case ast.JoinedStr(values=parts):
            return {"".join(each) for each in product(*(texts(part, local) for part in parts))}
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return {first + second for first in texts(left, local) for second in texts(right, local)}
        case ast.IfExp(body=body, orelse=other):
            found = texts(body, local) | texts(other, local)
            return {ANY} if ANY in found else found
        case ast.Name(id=name) if name in local:
            return texts(local[name], {other: value for other, value in local.items() if other != name})
        case ast.Call(func=ast.Attribute(value=text, attr="replace")):
            return texts(text, local)
    return {ANY}


def messages(path: Path) -> Iterator[tuple[int, str]]:
    """The line and the message of each error and warning; one with several wordings comes several times."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for node in ast.walk(tree):
        match node:
            case ast.Raise(exc=ast.Call(func=ast.Name(id=name), args=args, keywords=keywords)):
                make = getattr(errors, name, None) or getattr(builtins, name)
            case ast.Call(func=ast.Attribute(value=ast.Name(id="warnings"), attr="warn"), args=[message, *_]):
                make, args, keywords = str, [message], []
            case ast.Raise(exc=ast.expr()):
                raise NotImplementedError(f"a way to raise that this test can't read: {path}:{node.lineno}")
            case _:
                continue
        around = [function for function in functions if function.lineno <= node.lineno <= (function.end_lineno or 0)]
        assignments = [a for f in around[-1:] for a in ast.walk(f) if isinstance(a, ast.Assign)]
        earlier = sorted((a for a in assignments if a.lineno < node.lineno), key=lambda a: a.lineno)
        local = {a.targets[0].id: a.value for a in earlier if isinstance(a.targets[0], ast.Name)}
        for values in product(*(texts(value, local) for value in [*args, *(keyword.value for keyword in keywords)])):
            named = dict(zip([keyword.arg for keyword in keywords], values[len(args) :], strict=True))
            text = str(make(*values[: len(args)], **named))
            yield (
                node.lineno,
                re.sub(r": pip install.*", f": pip install {ANY}", text),
            )  # packages are those of pyproject.toml


FOUND = [
    (f"{path.relative_to(ROOT)}:{line}", message)
    for path in sorted((ROOT / "convexheads").rglob("*.py"))
    for line, message in messages(path)
]
PATTERNS = {message: re.compile(re.escape(message).replace(ANY, ".*")) for _, message in FOUND if message != ANY}
LINES = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8").splitlines()
CODE = re.compile(r"\| (`+)(?!`)(.+?)(?<!`)\1 \|")  # in the first cell of a row
ENTRIES = {" ".join(found[2].split()) for found in map(CODE.match, LINES) if found}


def test_every_message_is_explained():
    missing = {message for message, pattern in PATTERNS.items() if not any(map(pattern.fullmatch, ENTRIES))}
    assert not missing, "not in docs/faq.md: " + "; ".join(f"{at}: {text}" for at, text in FOUND if text in missing)


def test_nothing_is_explained_that_is_never_raised():
    messages = {entry for entry in ENTRIES if ANY in entry or ": got" in entry}
    assert not [entry for entry in messages if not any(pattern.fullmatch(entry) for pattern in PATTERNS.values())]


def test_the_messages_are_found():
    found = {message for _, message in FOUND}
    assert len(found) > 100
    assert {
        "mask: got no example left in …, wanted at least one in every task",  # both arguments are literal
        "ways: got a tensor of …, shape …, wanted integers, one a task, …",  # a name, assigned before
        "labels: got … in …, wanted values 0..…",  # a conditional expression
        "CvxpyHead needs the package 'cvxpylayers': pip install …",  # keywords
    } <= found
