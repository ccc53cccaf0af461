"""YAML as its authors mean it: scalars of YAML 1.2, each key once, no aliases that multiply."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml


class YamlError(ValueError):
    """A text that is no YAML to us; the message is one line with the place."""


# YAML 1.2's scalars. PyYAML's own are YAML 1.1, where `no` is false, `1:30` is 90 and `1e-3` is a
# string: each a silent change of what the author wrote.
_SCALARS = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+",
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
    ),
}
ALIAS_BUDGET = 10_000
"""Nodes and characters that the aliases of a document may stand for, all together. Aliases of
aliases multiply: eight lines of nine say 43 million scalars, and whoever checks them or shows them
in an error writes each of them out."""


class _Loader(yaml.SafeLoader):
    """Safe loader with YAML 1.2 scalars that refuses duplicate keys and aliases that multiply."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's class attribute)

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._sizes: dict[yaml.Node, int] = {}  # with all that their own aliases stand for
        self._aliased = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        node: yaml.Node | None = super().compose_node(parent, index)
        if node is None:
            return None
        if not isinstance(event, yaml.AliasEvent):
            text = len(node.value) if isinstance(node, yaml.ScalarNode) else 0
            self._sizes[node] = 1 + text + sum(self._sizes[inner] for inner in _children(node))
        elif node not in self._sizes:
            raise _refused(event, f"alias *{event.anchor} stands within what it names")
        else:
            self._aliased += self._sizes[node]
            if self._aliased > ALIAS_BUDGET:
                raise _refused(
                    event, f"aliases stand for more than {ALIAS_BUDGET} characters: write them out"
                )
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            # YAML lets the last of two equal keys win: half a policy would vanish unseen.
            if key.value in seen:
                raise _refused(key, f"duplicate key {key.value!r}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    for inner in node.value if isinstance(node, yaml.CollectionNode) else ():
        yield from inner if isinstance(inner, tuple) else (inner,)


def _refused(where: Any, problem: str) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, where.start_mark)


class _Dumper(yaml.SafeDumper):
    """Quotes whatever YAML 1.1 or 1.2 would not read back as a string."""


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))  # decimal: YAML 1.1 reads 010 as 8


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
for _kind, _pattern in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_kind}", re.compile(rf"^(?:{_pattern})$"), None
        )


def parse_yaml(text: str) -> Any:
    """Parses one YAML document; raises ``YamlError`` with the line of a syntax error."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise YamlError(f"{where}not valid YAML: {problem}") from None
    # an integer of more digits than Python converts; a list for a key; a very deep nesting
    except (ValueError, TypeError, RecursionError) as error:
        raise YamlError(f"not valid YAML: {error}") from None


def dump_yaml(data: Any) -> str:
    """Text from which ``parse_yaml`` gives ``data`` back."""
    # ASCII with escapes: as Unicode, PyYAML writes U+0085 in a way that reads back as a space.
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False)
