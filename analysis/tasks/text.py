"""A small GPT on sentences of a made-up language, drawn by a grammar: the same words, in the same order, everywhere.

Words have the frequencies of a natural language (within a class the r-th has probability proportional to 1 / r), agree
in number, and come from the topic of their text, so that near and far context both tell something of the next word.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CONTEXT", "VOCABULARY", "load_text", "make_gpt"]

CONTEXT = 16
"""Words that are seen and predicted of a text."""
NUM_TRAIN, NUM_TEST = 768, 192
TOPICS, NOUNS, VERBS = 6, 10, 6
NUMBERS = ("singular", "plural")
WIDTH, HEADS, BLOCKS = 32, 4, 3


def _words() -> Iterator[str]:
    yield from (".", "and", "that", "of", "in", "with", "often", "never", "very")
    for number in NUMBERS:
        yield from (f"{article} ({number})" for article in ("the", "some", "this"))
        yield from (f"it ({number})", f"is ({number})")
    yield from (f"adjective {i}" for i in range(20))
    for topic in range(TOPICS):
        for number in NUMBERS:
            yield from (f"noun {topic}.{i} ({number})" for i in range(NOUNS))
            yield from (f"verb {topic}.{i} ({number})" for i in range(VERBS))


VOCABULARY = tuple(_words())
"""The words; a text holds their places."""


class _Writer:
    """Draws texts; Python's generator gives the same numbers in all versions."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def text(self, length: int) -> list[int]:
        """Return a text of so many words, sentences on one topic (and a fifth of their nouns on another)."""
        topic, words = self._random.randrange(TOPICS), list[str]()
        while len(words) < length:
            words += [*self._sentence(topic), "."]
        return [_PLACES[word] for word in words[:length]]

    def _sentence(self, topic: int) -> list[str]:
        number = self._random.choice(NUMBERS)
        words = [f"it ({number})"] if self._chance(0.2) else self._nouns(topic, number)
        words += ["often"] if self._chance(0.1) else ["never"] if self._chance(0.1) else []
        if self._chance(0.25):
            words += [f"is ({number})", *(["very"] if self._chance(0.3) else []), self._ranked("adjective", 20)]
        else:
            words.append(f"{self._ranked(f'verb {topic}.', VERBS)} ({number})")
            words += ["that", *self._sentence(topic)] if self._chance(0.1) else self._nouns(topic)
        return [*words, "and", *self._sentence(topic)] if self._chance(0.1) else words

    def _nouns(self, topic: int, number: str | None = None) -> list[str]:
        number = self._random.choice(NUMBERS) if number is None else number
        topic = self._random.randrange(TOPICS) if self._chance(0.2) else topic
        words = [f"{self._random.choice(('the', 'the', 'some', 'this'))} ({number})"]
        words += [self._ranked("adjective", 20)] if self._chance(0.3) else []
        words.append(f"{self._ranked(f'noun {topic}.', NOUNS)} ({number})")
        more = self._chance(0.25)
        return [*words, self._random.choice(("of", "of", "in", "with")), *self._nouns(topic)] if more else words

    def _ranked(self, name: str, count: int) -> str:
        weights = [1 / (rank + 1) for rank in range(count)]
        (rank,) = self._random.choices(range(count), weights)
        return f"{name}{rank}" if name.endswith(".") else f"{name} {rank}"

    def _chance(self, probability: float) -> bool:
        return self._random.random() < probability


_PLACES = {word: place for place, word in enumerate(VOCABULARY)}


def load_text() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return 768 texts for training and 192 for testing: words (N, 16), int64, and the words after them, the same."""
    writer = _Writer(0)
    texts = torch.tensor([writer.text(CONTEXT + 1) for _ in range(NUM_TRAIN + NUM_TEST)])
    words, following = texts[:, :-1].contiguous(), texts[:, 1:].contiguous()
    return (words[:NUM_TRAIN], following[:NUM_TRAIN]), (words[NUM_TRAIN:], following[NUM_TRAIN:])


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(2, (HEADS, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(WIDTH), _Attention(), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class _GPT(nn.Module):
    """(N, T) words -> (N, V, T) logits of the next ones."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(len(VOCABULARY), WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(_Block() for _ in range(BLOCKS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(VOCABULARY), bias=False)
        for embedding in (self.words, self.places):
            nn.init.normal_(embedding.weight, std=0.1)

    def forward(self, words: Tensor) -> Tensor:
        x = self.blocks(self.words(words) + self.places.weight[: words.shape[1]])
        logits: Tensor = self.head(self.norm(x))
        return logits.transpose(1, 2)


def make_gpt() -> nn.Module:
    """Return a decoder of 3 blocks, width 32 and 4 heads, with separate matrices for embedding and head."""
    return _GPT()
