"""Reading and writing YAML 1.2's core schema: 1e-3 is a float; on, off, yes and no are text; dates are text.

Safe by construction: only null, booleans, numbers, text, lists and mappings come out; no tags, no duplicate keys.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

MAX_DEPTH = 32  # no configuration is half as deep; Python's own limit depends on who calls
MAX_BYTES = 1 << 16  # read in under a second
CORE = {  # tag, pattern, first characters (YAML 1.2, section 10.3.2)
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "tag:yaml.org,2002:null": (r"~|null|Null|NULL|", "~nN"),
    "tag:yaml.org,2002:int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
RESOLVERS: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
for _tag, (_pattern, _starts) in CORE.items():
    for _start in [*_starts, *([""] if _tag.endswith("null") else [])]:
        RESOLVERS.setdefault(_start, []).append((_tag, re.compile(f"^(?:{_pattern})$")))


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = RESOLVERS
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        wrong = "" if self.depth < MAX_DEPTH else "nested too deeply"
        if isinstance(event, yaml.AliasEvent):  # a few lines of these could stand for gigabytes
            wrong = f"*{event.anchor} stands for another value: write that out"
        elif event.tag is not None:
            wrong = f"{event.tag} is a tag, and values have none here: remove it"
        if wrong:
            raise yaml.composer.ComposerError(None, None, wrong, event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            name = self.construct_object(key)
            if not isinstance(name, str):
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} is no name", key.start_mark)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {name!r} stands twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def _integer(loader: yaml.SafeLoader, node: Any) -> int:
    text = loader.construct_scalar(node)
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text[2:] if base != 10 else text, base)


def _float(loader: yaml.SafeLoader, node: Any) -> float:
    text = loader.construct_scalar(node).lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


def _text(loader: yaml.SafeLoader, node: Any) -> str:
    text = loader.construct_scalar(node)
    try:  # JSON, which YAML 1.2 contains, escapes characters above U+FFFF as a pair of surrogates
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise yaml.constructor.ConstructorError(None, None, "half a surrogate pair", node.start_mark) from None


_Loader.add_constructor("tag:yaml.org,2002:str", _text)
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = RESOLVERS

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _quoted(dumper: yaml.SafeDumper, text: str) -> Any:
    """Text. PyYAML takes more than \\n for an end of line, which its plain and single-quoted forms do not keep; and these
    would break the line at each."""
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style='"' if set(text) & set("\n\r\x85\u2028\u2029") else None
    )


_Dumper.add_representer(str, _quoted)


def parse(text: str) -> Any:
    """The value of a YAML text. Raises ValueError with the line and what is wrong."""
    if len(text.encode(errors="surrogatepass")) > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES >> 10} KiB, which no configuration is")
    try:
        return yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{where}{getattr(error, 'problem', None) or ' '.join(str(error).split())}") from error


def dump(value: Any) -> str:
    """YAML that `parse` gives the value back from; inner lists and mappings on one line."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)
