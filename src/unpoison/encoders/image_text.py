"""Two towers, one for images and one for words, whose embeddings lie close where they belong together: a small CLIP.

The image tower is an encoder like any other, in a file of its own that every verb takes. What compares it with words
(a linear projection, the text tower, the vocabulary) lies beside it: `NAME.words.safetensors`.

Paper: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unpoison.data.captions import TEMPLATES, Vocabulary
from unpoison.encoders.backbones import Architecture
from unpoison.encoders.checkpoints import Trained, load_encoder, read_tensors, save_encoder, save_tensors
from unpoison.encoders.encoder import Encoder
from unpoison.encoders.weights import digest_file, fit_weights
from unpoison.errors import CheckpointError, ConfigError

__all__ = [
    "WORDS_SCHEMA",
    "ImageText",
    "TextConfig",
    "TextTower",
    "Words",
    "class_embeddings",
    "load_image_text",
    "save_image_text",
    "words_file",
]

WORDS_SCHEMA = "unpoison/words/1"
"""What the file beside an image tower calls itself."""


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Size of a text tower.

    Attributes:
        width: features per word, a multiple of 32.
        layers: transformer blocks.
        length: words of a caption that count.
        embedding: features that images and texts are compared by.
    """

    width: int = 64
    layers: int = 2
    length: int = 16
    embedding: int = 64

    def __post_init__(self) -> None:
        if self.width % 32 or not 32 <= self.width <= 1024:
            raise ConfigError(f"width={self.width}: expected a multiple of 32, at most 1024")
        for name, most in (("layers", 24), ("length", 256), ("embedding", 1024)):
            if not 1 <= getattr(self, name) <= most:
                raise ConfigError(f"{name}={getattr(self, name)}: expected 1 to {most}")


class TextTower(nn.Module):
    """Words to one embedding: a transformer, the mean over the words that are there, a linear layer.

    Args:
        n_words: numbers that a vocabulary gives out.
        config: sizes.
    """

    def __init__(self, n_words: int, config: TextConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_words, config.width, padding_idx=0)
        self.position = nn.Parameter(0.02 * torch.randn(config.length, config.width))
        block = nn.TransformerEncoderLayer(
            config.width,
            config.width // 32,
            4 * config.width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.blocks = nn.TransformerEncoder(block, config.layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(config.width)
        self.out = nn.Linear(config.width, config.embedding, bias=False)

    def forward(self, words: Tensor) -> Tensor:
        """(N, L) int64, 0 where there is no word, to (N, E)."""
        absent = words == 0
        states = self.norm(
            self.blocks(self.embedding(words) + self.position, src_key_padding_mask=absent)
        ).float()
        present = (~absent).float()[:, :, None]
        return self.out((states * present).sum(dim=1) / present.sum(dim=1).clamp_min(1))  # type: ignore[no-any-return]


class Words(nn.Module):
    """What compares image features with texts.

    Args:
        feature_size: of the image tower.
        n_words: numbers that the vocabulary gives out.
        config: sizes of the text tower.
        temperature: at the start of training; it is learned.
    """

    def __init__(
        self, feature_size: int, n_words: int, config: TextConfig, temperature: float = 0.07
    ) -> None:
        super().__init__()
        self.config = config
        self.projection = nn.Linear(feature_size, config.embedding, bias=False)
        self.tower = TextTower(n_words, config)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))

    def images(self, features: Tensor) -> Tensor:
        """(N, D) features of the image tower to (N, E) float32 embeddings of unit length."""
        return F.normalize(self.projection(features).float(), dim=1)

    def texts(self, words: Tensor) -> Tensor:
        """(N, L) int64 to (N, E) float32 embeddings of unit length."""
        return F.normalize(self.tower(words).float(), dim=1)


@dataclass(frozen=True, eq=False)
class ImageText:
    """Both towers.

    Attributes:
        encoder: the image tower; its network is an `nn.Module`.
        words: in evaluation mode, on the encoder's device.
        vocabulary: what the numbers of the text tower mean.
        architecture: builds the image tower again.
    """

    encoder: Encoder
    words: Words
    vocabulary: Vocabulary
    architecture: Architecture


def class_embeddings(pair: ImageText, class_names: Sequence[str]) -> Tensor:
    """What a zero-shot classifier compares images with: per class the mean embedding of its prompts.

    Args:
        pair: both towers.
        class_names: C of them; underscores are read as spaces.

    Returns:
        (C, E) float32, unit length, on the encoder's device.
    """
    prompts = [each.format(name.replace("_", " ")) for name in class_names for each in TEMPLATES]
    numbers = pair.vocabulary.encode(prompts, pair.words.config.length).to(pair.encoder.device)
    with torch.inference_mode():
        texts = pair.words.texts(numbers)
    return F.normalize(texts.view(len(class_names), len(TEMPLATES), -1).mean(dim=1), dim=1)


def words_file(path: Path) -> Path:
    """Where the text tower of an image tower lies.

    >>> words_file(Path("runs/clip.safetensors")).name
    'clip.words.safetensors'
    """
    return path.with_suffix(".words.safetensors")


def save_image_text(trained: Trained, words: Words, vocabulary: Vocabulary, path: Path | str) -> None:
    """Write the image tower as an encoder file, and the rest beside it; each file is complete or absent.

    Args:
        trained: the image tower.
        words: trained with it.
        vocabulary: of its captions.
        path: must end in .safetensors; existing files are replaced.

    Raises:
        ConfigError: the name does not end in .safetensors.
        CheckpointError: a file cannot be written.
    """
    path = Path(path)
    save_encoder(trained, path)
    metadata = {
        "schema": WORDS_SCHEMA,
        "config": asdict(words.config),
        "vocabulary": list(vocabulary.words),
        "feature_size": words.projection.in_features,
        "architecture": asdict(trained.architecture),
        "encoder": digest_file(path),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in words.state_dict().items()}
    save_tensors(words_file(path), tensors, metadata, what="text tower")


def load_image_text(path: Path | str, *, device: str = "auto", precision: str = "auto") -> ImageText:
    """Both towers of files that `save_image_text` wrote.

    Args:
        path: the image tower.
        device: see `runtime.choose_device`.
        precision: see `runtime.choose_precision`.

    Raises:
        ConfigError: one of the files is not there.
        CheckpointError: a file is damaged, or the two do not belong together.
    """
    path = Path(path)
    beside = words_file(path)
    if not path.is_file() or not beside.is_file():
        raise ConfigError(
            f"{path}: expected an image tower with {beside.name} beside it, as `unpoison pretrain clip` writes them"
        )
    encoder = load_encoder(path, device=device, precision=precision)
    tensors, entry = read_tensors(beside, WORDS_SCHEMA)
    if entry("encoder", str) != encoder.fingerprint:
        raise CheckpointError(
            f"{beside}: belongs to another image tower than {path.name}; keep the files of one training together"
        )
    config, vocabulary = entry("config", TextConfig), Vocabulary(tuple(entry("vocabulary", list[str])))
    feature_size = entry("feature_size", int)
    if not 1 <= feature_size <= sum(tensor.numel() for tensor in tensors.values()):
        raise CheckpointError(
            f"{beside}: feature_size={feature_size} fits no projection; write the file again"
        )
    words, _ = fit_weights(
        lambda: Words(feature_size, len(vocabulary), config), tensors, "the text tower", beside
    )
    assert isinstance(words, Words)
    words.eval().requires_grad_(False).to(encoder.device)
    return ImageText(encoder, words, vocabulary, entry("architecture", Architecture))
