from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from pretrain.data.selection.minhash import ROUNDS, band_keys, shingles, signatures, sketch
from pretrain.data.selection.words import Texts
from tests.distributed import REPOSITORY
from tests.pretrain.data.selection.making import changed, jaccard, page

P = 128


LONG = " ".join(str(number * number) for number in range(2000))


def made(texts: list[str], unit: str = "words", size: int = 5) -> np.ndarray:
    return signatures(Texts(texts), unit, size, P)


def test_a_signature_depends_on_its_text_alone() -> None:
    texts = [page(number, 20 + 60 * number) for number in range(12)] + ["", "one", "one two"]
    together = made(texts)
    for text, found in zip(texts, together, strict=True):
        assert np.array_equal(made([text])[0], found)
    assert len({row.tobytes() for row in together}) == len(texts)


def test_case_space_and_punctuation_do_not_matter() -> None:
    one, other = made(["The cat, the dog - and a MOUSE!", "the CAT the\n\ndog and; a mouse"])
    assert np.array_equal(one, other)


def test_signatures_are_what_they_always_were() -> None:
    """Of a few shingles, where places are filled one by one, and of many."""
    found = [int.from_bytes(row.tobytes()[:8], "little") for row in made(["a b c d e f g", LONG])]
    assert found == GOLDEN


GOLDEN = [4567569806582985432, 4125299255991750250]


def test_another_process_makes_the_same_signatures() -> None:
    code = (
        "import hashlib; from tests.pretrain.data.selection.test_minhash import made, page;"
        "print(hashlib.sha256(made([page(1), page(2, 3000)]).tobytes()).hexdigest())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=REPOSITORY,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


@pytest.mark.parametrize("count", [40, 200, 1500])
def test_estimates_are_near_the_jaccard_similarity(count: int) -> None:
    """Over many pairs the mean error is within four of its standard errors, and no pair is off by five of its own."""
    errors = []
    for number in range(40):
        text = page(number, count)
        other = changed(text, number, every=4 + 3 * (number % 12))
        one, two = made([text, other])
        true = jaccard(text, other)
        errors.append(((one == two).mean() - true) / max(np.sqrt(true * (1 - true) / P), 0.01))
    assert max(map(abs, errors)) < 5 and abs(np.mean(errors)) < 4 / np.sqrt(len(errors))


def test_estimates_agree_with_datasketch() -> None:
    from datasketch import MinHash

    ours, theirs, true = [], [], []
    for number in range(30):
        texts = [page(number, 400), changed(page(number, 400), number, every=5 + number)]
        one, two = made(texts)
        sketches = []
        for text in texts:
            bare = "".join(c if c.isalnum() else " " for c in text.lower()).split()
            sketches.append(MinHash(num_perm=P, seed=1))
            sketches[-1].update_batch([" ".join(bare[place : place + 5]).encode() for place in range(len(bare) - 4)])
        ours.append((one == two).mean())
        theirs.append(sketches[0].jaccard(sketches[1]))
        true.append(jaccard(*texts))
    error = [np.abs(np.array(found) - true).mean() for found in (ours, theirs)]
    assert error[0] < 0.05 and error[0] < 1.5 * error[1] + 0.005
    assert np.abs(np.array(ours) - theirs).max() < 0.2 and np.corrcoef(ours, theirs)[0, 1] > 0.8


def test_texts_without_a_word_in_common_agree_nowhere() -> None:
    one, two = made([page(1, 300), page(2, 300)])
    assert jaccard(page(1, 300), page(2, 300)) == 0 and (one == two).mean() == 0


def test_few_shingles_fill_every_place() -> None:
    owners, keys = shingles(Texts(["a b c d e f", "g h i j k"]), "words", 5)
    assert owners.tolist() == [0, 0, 1] and ROUNDS < P
    found = sketch(owners, keys, 2, P)
    assert len(set(found[0].tolist())) > 2 and (found != 2**32 - 1).all()


def test_characters_serve_languages_without_spaces() -> None:
    text = "".join(chr(0x4E00 + int(value) * 7 % 5000) for value in range(600))
    other = text[:300] + "変" + text[301:]
    one, two = made([text, other], "characters", 5)
    assert (one == two).mean() > 0.9
    words = made([text, other], "words", 5)
    assert (words[0] == words[1]).mean() == 0, "one long word each"


def test_bands_agree_where_all_their_values_do() -> None:
    one, two = made([page(1, 200), changed(page(1, 200), 3, every=60)])
    keys = band_keys(np.stack([one, two]), 16)
    same = (one == two).reshape(16, 8).all(axis=1)
    assert keys.shape == (16, 2) and 0 < same.sum() < 16
    assert np.array_equal(keys[:, 0] == keys[:, 1], same)
    assert len(set(keys[:, 0].tolist())) == 16, "equal values in different bands are different keys"
