"""What a chat template does with a conversation, told from its syntax tree."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from jinja2 import nodes

_AS_OBJECTS = {"tojson", "items", "dictsort"}
_KINDS = {"mapping", "string", "iterable"}


def reads_parts(tree: nodes.Template) -> bool:
    """Whether it goes through the parts of a message's content by itself."""
    for loop in tree.find_all(nodes.For):
        if any(_names(node, "content") for node in _within(loop.iter)):
            return True
    return False


def reads_tools(tree: nodes.Template) -> bool:
    """Whether it looks at the functions it is given at all."""
    return any(node.name == "tools" and node.ctx == "load" for node in tree.find_all(nodes.Name))


def quotes_arguments(tree: nodes.Template) -> bool:
    """Whether it writes a call's arguments as they are, and so expects text, not an object.

    One that turns them into JSON, goes through them, asks what they are or keeps them in a variable
    is taken to expect an object, as transformers gives it.
    """
    wants_object = any(
        _names(node, "arguments") for taker in _takers(tree) for node in _within(taker)
    )
    written = tree.find_all((nodes.Getattr, nodes.Getitem))
    return not wants_object and any(_names(node, "arguments") for node in written)


def _takers(tree: nodes.Template) -> Iterator[nodes.Node]:
    yield from (node for node in tree.find_all(nodes.Filter) if node.name in _AS_OBJECTS)
    yield from (node for node in tree.find_all(nodes.Test) if node.name in _KINDS)
    yield from (loop.iter for loop in tree.find_all(nodes.For))
    yield from tree.find_all((nodes.Call, nodes.Assign))


def _within(node: nodes.Node) -> Iterable[nodes.Node]:
    return [node, *node.find_all((nodes.Name, nodes.Getattr, nodes.Getitem))]


def _names(node: nodes.Node, name: str) -> bool:
    if isinstance(node, nodes.Name):
        return node.name == name
    if isinstance(node, nodes.Getattr):
        return node.attr == name
    is_key = isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const)
    return is_key and node.arg.value == name  # type: ignore[attr-defined]
