"""Words beside images: captions made from class names, their file, and captions as numbers."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from unpoison.data.export import write_json_atomically
from unpoison.errors import ConfigError, DataError

__all__ = [
    "TEMPLATES",
    "Vocabulary",
    "make_captions",
    "read_captions",
    "reword",
    "write_captions",
]

TEMPLATES = (
    "a photo of a {}",
    "a picture of the {}",
    "this is a {}",
    "one {} in a picture",
    "a close view of the {}",
    "a small {}",
    "my {}",
    "a {} as seen by somebody",
)
"""How a caption names a class; the same sentences serve as prompts of a zero-shot classifier."""

_SCHEMA = 1
_LONGEST = 1000  # characters of a caption; anything longer is no caption
_PADDING, _UNKNOWN = 0, 1


def make_captions(ids: Sequence[str], names: Sequence[str], *, seed: int) -> tuple[str, ...]:
    """A caption per image that names its class; the template depends on seed and id alone.

    Args:
        ids: of the images.
        names: of the class of each.
        seed: chooses templates.

    >>> make_captions(["a.png"], ["tabby_cat"], seed=0)
    ('a photo of a tabby cat',)
    """
    captions = []
    for id_, name in zip(ids, names, strict=True):
        digest = hashlib.sha256(f"{seed}/captions/{id_}".encode()).digest()
        captions.append(TEMPLATES[digest[0] % len(TEMPLATES)].format(name.replace("_", " ")))
    return tuple(captions)


def reword(caption: str, *, generator: torch.Generator) -> str:
    """The same caption with two words swapped and about a tenth of its words left out, at least one kept.

    Args:
        caption: any text.
        generator: a CPU generator.

    Source:
        The text views of CleanCLIP, without synonyms and insertions, which need a thesaurus.
    """
    words = caption.split()
    if len(words) < 2:
        return caption
    one, two = torch.randperm(len(words), generator=generator)[:2].tolist()
    words[one], words[two] = words[two], words[one]
    keep = torch.rand(len(words), generator=generator) >= 0.1
    keep[one] = True
    return " ".join(word for word, kept in zip(words, keep.tolist(), strict=True) if kept)


def write_captions(captions: Mapping[str, str], path: str | Path) -> None:
    """Write a caption per image id as JSON; a file that exists is replaced at once or not at all."""
    write_json_atomically(Path(path), {"schema": _SCHEMA, "captions": dict(captions)})


def read_captions(path: str | Path) -> dict[str, str]:
    """The captions of a file that `write_captions` wrote, or somebody else in its form.

    Raises:
        DataError: it cannot be read, or holds anything but short texts by id.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read the captions {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: is not JSON; expected captions as `unpoison attack clip` writes them"
        ) from error
    captions = value.get("captions") if isinstance(value, dict) else None
    if not isinstance(captions, dict) or value.get("schema") != _SCHEMA:
        raise DataError(f'{path}: expected {{"schema": {_SCHEMA}, "captions": {{ID: TEXT, …}}}}')
    odd = next((i for i, t in captions.items() if not isinstance(t, str) or len(t) > _LONGEST), None)
    if odd is not None:
        raise DataError(f"{path}: the caption of {odd!r:.60} is no text of at most {_LONGEST} characters")
    return captions


@dataclass(frozen=True)
class Vocabulary:
    """The words that a text tower knows; word i has the number i + 2, unknown words 1, padding 0."""

    words: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(set(self.words)) != len(self.words):
            raise ConfigError("a vocabulary names a word twice; expected each once")

    @classmethod
    def of(cls, captions: Sequence[str], *, most: int = 20_000) -> Vocabulary:
        """The most frequent words of these captions, at most `most`."""
        counts = Counter(word for caption in captions for word in _words(caption))
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(tuple(ranked[:most]))

    def __len__(self) -> int:
        return len(self.words) + 2

    def encode(self, captions: Sequence[str], length: int) -> Tensor:
        """Captions as numbers, cut or padded to `length`.

        Returns:
            (N, length) int64.

        Raises:
            DataError: a caption has no word.

        >>> Vocabulary(("a", "cat")).encode(["A cat!", "a dog"], 3).tolist()
        [[2, 3, 0], [2, 1, 0]]
        """
        number = {word: index + 2 for index, word in enumerate(self.words)}
        numbers = torch.full((len(captions), length), _PADDING, dtype=torch.int64)
        for row, caption in enumerate(captions):
            found = [number.get(word, _UNKNOWN) for word in _words(caption)[:length]]
            if not found:
                raise DataError(
                    f"caption {row} has no word ({caption!r:.60}); expected a text for every image"
                )
            numbers[row, : len(found)] = torch.tensor(found)
        return numbers


def _words(caption: str) -> list[str]:
    return re.findall(r"\w+", caption.lower())
