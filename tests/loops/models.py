"""Small models in the shapes that people's loops call: tuples, outputs with attributes, caches of their own, encoders."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from spelled_models import DecoderBlock, HandWrittenDecoder
from torch import nn

VOCABULARY = 41


class LastRowDecoder(HandWrittenDecoder):
    """Returns (logits of the last token [B, 1, V], None) and refuses prompts longer than its table, as training code does."""

    def __init__(self, longest: int = 32) -> None:
        super().__init__(VOCABULARY, 32, 4, longest, 2)
        self.block_size = longest

    def forward(self, ids: torch.Tensor, targets: torch.Tensor | None = None) -> Any:
        _, time = ids.size()
        assert time <= self.block_size, "the prompt is longer than the block"
        x = self.wte(ids) + self.wpe(torch.arange(time))
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if targets is None:
            return self.head(x[:, [-1], :]), None
        logits = self.head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class FlatRowDecoder(HandWrittenDecoder):
    """Returns the logits of the last token [B, V]."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, -1]))


class DroppingDecoder(HandWrittenDecoder):
    """Dropout behind the embeddings."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = F.dropout(self.wte(ids), 0.2, self.training) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class NoisyDecoder(HandWrittenDecoder):
    """Adds noise to its embeddings, in evaluation too."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.wte(ids)
        x = x + 0.01 * torch.randn_like(x) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class BothWays(nn.Module):
    """Attention without a mask: a later token changes the rows before it."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.qkv, self.head = nn.Embedding(VOCABULARY, 32), nn.Linear(32, 96), nn.Linear(32, VOCABULARY)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.wte(ids)).chunk(3, -1)
        return self.head((q @ k.transpose(1, 2) / math.sqrt(32)).softmax(-1) @ v)


class LengthScaled(HandWrittenDecoder):
    """Divides its embeddings by the length of the prompt, so that every row changes with every token."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.wte(ids) / math.sqrt(ids.shape[1]) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Counting(HandWrittenDecoder):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__(VOCABULARY)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(ids)


class OwnCache(nn.Module):
    """One block that keeps keys and values in its own buffers, addressed by positions or by a start."""

    def __init__(self, longest: int = 64) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, 32), nn.Embedding(longest, 32)
        self.qkv, self.head = nn.Linear(32, 96), nn.Linear(32, VOCABULARY)
        self.register_buffer("keys", torch.zeros(4, longest, 32), persistent=False)
        self.register_buffer("held", torch.zeros(4, longest, 32), persistent=False)

    def forward(self, ids: torch.Tensor, where: Any) -> torch.Tensor:
        time = ids.shape[1]
        places = where if isinstance(where, torch.Tensor) else torch.arange(where, where + time)
        q, k, v = self.qkv(self.wte(ids) + self.wpe(places)).chunk(3, -1)
        rows = ids.shape[0]
        self.keys[:rows, places], self.held[:rows, places] = k, v
        total = int(places[-1]) + 1
        seen = torch.arange(total)[None, :] <= places[:, None]
        scores = (q @ self.keys[:rows, :total].transpose(1, 2) / math.sqrt(32)).masked_fill(~seen, -torch.inf)
        return self.head(scores.softmax(-1) @ self.held[:rows, :total])


class ReturnedCache(nn.Module):
    """Returns logits and a cache that the next call takes."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.mix, self.head = nn.Embedding(VOCABULARY, 32), nn.Linear(32, 32), nn.Linear(32, VOCABULARY)

    def forward(self, ids: torch.Tensor, past: torch.Tensor | None = None) -> Any:
        x = self.wte(ids)
        carried = x.cumsum(1) if past is None else past[:, -1:] + x.cumsum(1)
        return SimpleNamespace(logits=self.head(torch.tanh(self.mix(carried))), past=carried)


class Translator(nn.Module):
    """An encoder and a decoder with cross attention, called apart."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Embedding(VOCABULARY, 32), nn.Linear(32, 32), nn.Tanh())
        self.decoder = CrossDecoder()


class CrossDecoder(nn.Module):
    """A causal block that also attends to an encoder's states."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.block = nn.Embedding(VOCABULARY, 32), DecoderBlock(32, 4, 64)
        self.query, self.head = nn.Linear(32, 32), nn.Linear(32, VOCABULARY)

    def forward(self, ids: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        x = self.block(self.wte(ids))
        return self.head(x + (self.query(x) @ memory.transpose(1, 2)).softmax(-1) @ memory)


class MeanTranslator(Translator):
    """Its decoder adds the mean of the encoder's states to every token, beside attending to them."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = MeanDecoder()


class MeanDecoder(CrossDecoder):
    """Mixes a state of the whole source into every token."""

    def forward(self, ids: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        x = self.block(self.wte(ids) + memory.mean(1, keepdim=True))
        return self.head(x + (self.query(x) @ memory.transpose(1, 2)).softmax(-1) @ memory)
