from __future__ import annotations

import sys

import pytest

from pretrain.data.selection import language
from pretrain.errors import UserError
from tests.pretrain.data.selection.making import selection

TEXTS = {
    "en": "The committee will meet on Thursday to discuss the budget, and its members have read all of the letters.",
    "de": "Der Ausschuss trifft sich am Donnerstag, um \u00fcber den Haushalt zu sprechen, und alle haben die Briefe gelesen.",
    "fr": "La commission se r\u00e9unira jeudi pour discuter du budget, et ses membres ont lu toutes les lettres.",
    "ru": "Комитет соберётся в четверг, чтобы обсудить бюджет и прочитать письма.",
}


@pytest.mark.parametrize("keep", [["en"], ["de", "fr"]])
def test_texts_of_the_languages_wanted_are_kept(keep: list[str]) -> None:
    verdicts = selection(language={"keep": keep, "least": 0.5}).judge(list(TEXTS.values()))
    assert {name for name, verdict in zip(TEXTS, verdicts, strict=True) if verdict.text is not None} == set(keep)
    assert {verdict.reason for verdict in verdicts} == {"", f"probability of {' or '.join(keep)}"}


def test_at_below_and_above_the_probability() -> None:
    text = TEXTS["en"][:25]
    chosen = selection(language={"keep": ["en"], "least": 1.0})
    [detail] = [verdict.detail for verdict in chosen.judge([text])]
    value = float(detail.split()[3].rstrip(","))
    assert 0 < value < 1
    found = [
        selection(language={"keep": ["en"], "least": least}).judge([text])[0].reason
        for least in (value, value + 0.0001)
    ]
    assert found == ["", "probability of en"]


def test_what_has_no_language_is_dropped_and_only_the_beginning_is_looked_at() -> None:
    chosen = selection(language={"keep": ["en"], "least": 0.5, "characters": 100})
    assert [
        bool(verdict.reason) for verdict in chosen.judge(["", "   ", "12345 67", TEXTS["en"] + TEXTS["ru"] * 9])
    ] == [
        True,
        True,
        True,
        False,
    ]


def test_a_language_that_is_not_known_is_told() -> None:
    with pytest.raises(UserError, match=r"language\.keep: english cannot be told by py3langid; it knows .*\ben\b"):
        selection(language={"keep": ["english", "en"]})


def test_without_the_library_its_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    language._identifier.cache_clear()
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(UserError, match="pip install"):
        selection(language={"keep": ["en"]})
