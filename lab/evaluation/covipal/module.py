# SPDX-License-Identifier: Apache-2.0
"""The module before the language model that scores visual tokens for a question; its file."""

from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHTS = Path(__file__).parents[2] / "checkpoints" / "tinyvqa-covipal" / "model.safetensors"
WIDTH, HEADS, LAYERS = 64, 4, 2
MOST_WORDS = 32
_WAVES = 6  # of each axis


class PruningModule(nn.Module):
    """Two layers of attention among visual tokens and words, and a score for each visual token."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.see = nn.Linear(hidden, WIDTH)
        self.read = nn.Linear(hidden, WIDTH)
        self.place = nn.Linear(4 * _WAVES, WIDTH)
        self.order = nn.Embedding(MOST_WORDS, WIDTH)
        block = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 3 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.score = nn.Linear(WIDTH, 1)

    def forward(self, features: Tensor, rows: int, words: Tensor, padding: Tensor) -> Tensor:
        """Scores `[batch, tokens]`.

        Args:
            features: `[batch, tokens, hidden]` of images of `rows` rows, as the language model receives them.
            words: `[batch, length, hidden]` embeddings of questions.
            padding: `[batch, length]` true where there is no word.
        """
        tokens, length = features.shape[1], words.shape[1]
        seen = self.see(features) + self.place(places(rows, tokens // rows))
        read = self.read(words) + self.order.weight[:length]
        nothing = torch.zeros(len(features), tokens, dtype=torch.bool)
        mixed = self.blocks(
            torch.cat([seen, read], dim=1), src_key_padding_mask=torch.cat([nothing, padding], dim=1)
        )
        scores: Tensor = self.score(mixed[:, :tokens])[..., 0]
        return scores


@cache
def places(rows: int, cols: int) -> Tensor:
    """`[rows * cols, 4 * _WAVES]`: sines and cosines of where the middle of each token is."""
    axes = ((torch.arange(count) + 0.5) / count for count in (rows, cols))
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
    turns = (grid[..., None] * torch.pi * 2.0 ** torch.arange(_WAVES)).flatten(1)
    return torch.cat([turns.sin(), turns.cos()], dim=1)


def write_module(module: PruningModule, path: Path) -> None:
    """As safetensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: part.contiguous() for name, part in module.state_dict().items()}, path)


@cache
def read_module(path: Path = WEIGHTS) -> PruningModule:
    """The inverse."""
    weights = load_file(path)
    module = PruningModule(weights["see.weight"].shape[1])
    module.load_state_dict(weights)
    return module.eval()
