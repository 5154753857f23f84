"""YAML for recipes: strict where people make mistakes, and typed by how each key is declared (values.py).

Refused with the line number: a duplicate key, a tag, a merge key, a value that contains itself. A plain scalar becomes what its
key needs; in quotes it is always text. YAML 1.1's traps (`010`, `1:30`, `1_000`) are not numbers here. YAML's extra line
separators (U+0085, U+2028, U+2029), which would become spaces or line ends, are refused, as are other invisible characters.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from wan_mlperf.inputs import values

MOST_NODES = 100_000  # aliases of aliases would fill the memory
INVISIBLE = re.compile(r"[^\t\n\r\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class NotStrict(ValueError):
    """What is wrong, with the line number where it is known."""


def load(text: str, kind: Any = None) -> Any:
    """Return plain values from YAML text. `kind` declares what is expected. Raises NotStrict."""
    if odd := INVISIBLE.search(text):
        line, code = text.count("\n", 0, odd.start()) + 1, ord(odd[0])
        escape = f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
        raise NotStrict(f"line {line}: the character U+{code:04X}; write it as {escape} in double quotes")
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        return None if node is None else _Reader().value(node, kind, ())
    except yaml.YAMLError as error:
        raise NotStrict(_explained(error)) from None
    except RecursionError:
        raise NotStrict("nested too deeply") from None


class _Reader:
    def __init__(self) -> None:
        self._nodes = 0

    def value(self, node: yaml.Node, kind: Any, inside: tuple[yaml.Node, ...]) -> Any:
        self._nodes += 1
        if self._nodes > MOST_NODES:
            raise NotStrict("too many values")
        if any(node is one for one in inside):
            raise NotStrict(f"line {_line(node)}: a value that contains itself")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, kind)
        if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.rpartition(":")[2] not in ("map", "seq"):
            raise NotStrict(f"line {_line(node)}: the tag {node.tag!r}; write it without")
        if isinstance(node, yaml.SequenceNode):
            items = enumerate(node.value)
            return [self.value(one, values.item_type(kind, index), (*inside, node)) for index, one in items]
        assert isinstance(node, yaml.MappingNode)
        return self._mapping(node, kind, inside)

    def _mapping(self, node: yaml.MappingNode, kind: Any, inside: tuple[yaml.Node, ...]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise NotStrict(f"line {_line(key_node)}: a key that is not text")
            key, line = key_node.value, _line(key_node)
            if key == "<<" and key_node.style is None:
                raise NotStrict(f"line {line}: the merge key <<; write its values out")
            if key in found:
                raise NotStrict(f"{key!r} is given twice, in line {lines[key]} and in line {line}")
            found[key], lines[key] = self.value(value_node, values.field_type(kind, key), (*inside, node)), line
        return found

    def _scalar(self, node: yaml.ScalarNode, kind: Any) -> Any:
        if node.style is not None:
            return node.value
        if node.tag not in _PLAIN:
            raise NotStrict(f"line {_line(node)}: the tag {node.tag!r}; write it without")
        return values.scalar(node.value, kind)


# The tags that YAML 1.1 gives plain scalars. An explicit `!!str` or the like looks the same, and does no harm.
_PLAIN = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "timestamp", "value")}


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _explained(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = str(getattr(error, "problem", None) or error)
    hint = "; a text that holds ': ' goes in quotes" if "mapping values are not allowed" in problem else ""
    return f"not YAML ({f'line {mark.line + 1}: ' if mark else ''}{' '.join(problem.split())[:160]}{hint})"
