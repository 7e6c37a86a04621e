import json

import pytest
import torch

from unpoison.data.captions import (
    TEMPLATES,
    Vocabulary,
    make_captions,
    read_captions,
    reword,
    write_captions,
)
from unpoison.errors import ConfigError, DataError


def test_captions_name_the_class_and_depend_on_nothing_but_seed_and_id():
    ids = [f"{n}.png" for n in range(200)]
    captions = make_captions(ids, ["tabby_cat"] * 200, seed=0)
    assert {c.replace("tabby cat", "{}") for c in captions} == set(TEMPLATES)
    assert make_captions(ids[::-1], ["tabby_cat"] * 200, seed=0) == captions[::-1]
    assert make_captions(ids, ["tabby_cat"] * 200, seed=1) != captions


def test_another_wording_has_the_same_words_in_another_order():
    generator = torch.Generator().manual_seed(0)
    caption = "one two three four five six seven eight"
    others = [reword(caption, generator=generator) for _ in range(300)]
    assert all(set(other.split()) <= set(caption.split()) and other for other in others)
    left = sum(len(other.split()) for other in others) / (300 * 8)
    assert 0.88 < left < 0.94  # one word in ten goes, but never all of them
    whole = [other.split() for other in others if len(other.split()) == 8]
    moved = [sum(a != b for a, b in zip(other, caption.split(), strict=True)) for other in whole]
    assert whole and set(moved) == {2}
    assert reword("word", generator=generator) == "word"


def test_captions_come_back_from_their_file(tmp_path):
    captions = {"a/1.png": "ein Bär", "b.png": "a photo of a cat"}
    write_captions(captions, tmp_path / "captions.json")
    assert read_captions(tmp_path / "captions.json") == captions


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON; expected captions as `unpoison attack clip` writes them"),
        ("[1]", r'expected \{"schema": 1, "captions": \{ID: TEXT, …\}\}'),
        (json.dumps({"schema": 2, "captions": {}}), "expected .*schema"),
        (json.dumps({"schema": 1, "captions": {"a": 3}}), "the caption of 'a' is no text of at most 1000"),
        (json.dumps({"schema": 1, "captions": {"a": "x" * 1001}}), "the caption of 'a' is no text"),
    ],
)
def test_a_malformed_file_is_refused_in_one_line(content, message, tmp_path):
    (tmp_path / "captions.json").write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        read_captions(tmp_path / "captions.json")
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="cannot read the captions .*: No such file"):
        read_captions(tmp_path / "nowhere.json")


def test_a_vocabulary_holds_the_most_frequent_words():
    vocabulary = Vocabulary.of(["a cat", "A dog", "a cat sat"])
    assert vocabulary.words == ("a", "cat", "dog", "sat") and len(vocabulary) == 6
    assert Vocabulary.of(["a cat", "a dog"], most=1).words == ("a",)
    assert vocabulary.encode(["Cat, a!", "bird a cat dog"], 3).tolist() == [[3, 2, 0], [1, 2, 3]]


def test_a_caption_without_words_and_a_word_twice_are_refused():
    with pytest.raises(DataError, match=r"caption 1 has no word .'!\?'.; expected a text for every image"):
        Vocabulary(("a",)).encode(["a", "!?"], 3)
    with pytest.raises(ConfigError, match="names a word twice"):
        Vocabulary(("a", "a"))
