"""YAML 1.2's core schema, and nothing beside it."""

from __future__ import annotations

import json
import math
import os
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pretrain.config import yaml

# PyYAML's reader refuses a few characters as they stand, or takes them for line ends; dump escapes them, JSON does not.
JSON_TEXT = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"], exclude_characters="\ufffe\uffff"), max_size=30
)
TEXT = st.one_of(
    st.text(max_size=30),
    st.text(
        "0123456789eE+-._xo: #,[]{}&*!|>%@`'\"\r\n\t\x85\u2028 ~nulltrefasyoiNF", max_size=12
    ),  # what could mislead
)


def values(text: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    scalars = st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False) | text
    return st.recursive(
        scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3), max_leaves=6
    )


# Example 10.9 of YAML 1.2.2, and what differs from YAML 1.1, which most readers still speak.
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("null", None), ("Null", None), ("NULL", None), ("~", None), ("", None),
        ("true", True), ("True", True), ("false", False), ("FALSE", False),
        ("0", 0), ("0o7", 7), ("0x3A", 58), ("-19", -19), ("+12", 12), ("0o17", 15), ("0x1f", 31), ("007", 7),
        ("0.", 0.0), ("-0.0", -0.0), (".5", 0.5), ("+12e03", 12000.0), ("-2E+05", -200000.0), ("1e-3", 1e-3),
        ("1.0e-3", 1e-3), ("6e4", 6e4), (".inf", math.inf), ("-.Inf", -math.inf), ("+.INF", math.inf),
        ("on", "on"), ("off", "off"), ("yes", "yes"), ("no", "no"), ("y", "y"), ("nULL", "nULL"), ("tRUE", "tRUE"),
        ("2001-12-14", "2001-12-14"), ("2001-12-14t21:59:43.10-05:00", "2001-12-14t21:59:43.10-05:00"),
        ("190:20:30", "190:20:30"), ("1_000", "1_000"), ("0b101", "0b101"), ("-0x1f", "-0x1f"), ("0o8", "0o8"),
        ("1e", "1e"), ("e3", "e3"), ("inf", "inf"), ("nan", "nan"), ("<<", "<<"), ("=", "="), ("'1'", "1"), ('"~"', "~"),
    ],
)  # fmt: skip
def test_plain_values_are_read_as_yaml_1_2_says(text: str, value: Any) -> None:
    found = yaml.parse(f"[{text}]") if text else yaml.parse("- ")
    assert found == [value] and type(found[0]) is type(value)
    assert repr(found[0]) == repr(value)  # -0.0 is not 0.0


def test_not_a_number_is_read() -> None:
    assert math.isnan(yaml.parse(".NAN"))


@settings(max_examples=200, deadline=None)
@given(values(TEXT))
@example(["1e5", "0o7", "1e-3", "12e03", "null", "~", "True", "0x1F", ".inf", "1", "yes", "", " ", "a: b", "#", "- a"])
@example({"on": "on", "1": 1, "null": None, "\x85": "a\r\nb\u2028"})
def test_what_is_dumped_is_read_back(value: Any) -> None:
    found = yaml.parse(yaml.dump(value))
    assert found == value and repr(found) == repr(value)  # True is not 1, and 1.0 is not 1


@settings(max_examples=200, deadline=None)
@given(values(JSON_TEXT).filter(lambda value: "Infinity" not in json.dumps(value)), st.booleans())
def test_json_is_yaml(value: Any, ascii_only: bool) -> None:
    assert repr(yaml.parse(json.dumps(value, ensure_ascii=ascii_only))) == repr(value)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: 1\nb: 2\na: 3", 3, "the key 'a' stands twice"),
        ("a:\n  b: 1\n  b: 2", 3, "the key 'b' stands twice"),
        ("a: 1\n1: 2", 2, "the key 1 is no name"),
        ("~: 1", 1, "the key None is no name"),
        ("true: 1", 1, "the key True is no name"),
        ("? [a]\n: b", 1, "is no name"),
        ("? {a: b}\n: c", 1, "is no name"),
        ("a: 1\nb: !!python/object/apply:os.system ['false']", 2, "is a tag"),
        ("!!python/object:os.system x", 1, "is a tag"),
        ("!!python/name:os.system", 1, "is a tag"),
        ("!!map [a]", 1, "is a tag"),
        ("!!set {a}", 1, "is a tag"),
        ("!!bool hello", 1, "is a tag"),
        ("!!binary aGk=", 1, "is a tag"),
        ("!!timestamp 2020-01-01", 1, "is a tag"),
        ("!!int '1'", 1, "is a tag"),
        ("! 5", 1, "is a tag"),
        ("a: &a [*a]", 1, "*a stands for another value"),
        ("a: &a 1\nb: *a", 2, "*a stands for another value"),
        ("a: 1\n--- # another\nb: 2", 2, "another document"),
        ("a: b: c", 1, "mapping values are not allowed"),
        ("a: [1, 2", 1, "expected ',' or ']'"),
        ("a:\n\t- b", 2, "cannot start any token"),
        ('a: "\\ud83d"', 1, "half a surrogate pair"),
        ("%YAML 3.0\n---\na: 1", 1, "incompatible YAML"),
    ],
)
def test_what_is_no_plain_value_is_refused_with_its_line(text: str, line: int, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        yaml.parse(text)
    message = str(caught.value)
    assert message.startswith(f"line {line}: ") and words in message and "\n" not in message


def test_a_bomb_of_aliases_is_refused_before_it_grows() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]  # 9^30 values
    with pytest.raises(ValueError, match=r"line 2: .* write that out"):
        yaml.parse("\n".join(lines))


@pytest.mark.parametrize("text", ["[" * 20000, "{a: " * 5000, "- " * 20000, "[" * 600 + "]" * 600])
def test_deep_nesting_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        yaml.parse(text)


@pytest.mark.parametrize("text", ["#" * (1 << 16) + "\n", "a: \N{GREEK SMALL LETTER ALPHA}" + "β" * (1 << 15)])
def test_a_text_too_large_for_a_configuration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="larger than 64 KiB"):
        yaml.parse(text)


def test_control_characters_are_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match="special characters are not allowed") as caught:
        yaml.parse("a: b\x00")
    assert "\n" not in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60) | st.text("a:-[]{}&*!|>%@'\"\n ?#,1", max_size=40))
def test_any_text_gives_plain_values_or_one_error(text: str) -> None:
    try:
        value = yaml.parse(text)
    except ValueError as error:
        assert str(error).strip() and os.linesep not in str(error)
    else:
        assert is_plain(value)


def is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(type(key) is str and is_plain(inner) for key, inner in value.items())
    if isinstance(value, list):
        return all(map(is_plain, value))
    return value is None or type(value) in (bool, int, float, str)
