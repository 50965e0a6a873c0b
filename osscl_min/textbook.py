"""The same network from PyTorch's own layers, as the authors' code runs it: what the benchmarks compare with.

Entries of the state have the names of `model.OSSCL`, so weights load from one into the other.
"""

from __future__ import annotations

import math

import torch
from osscl_kernels import LAYERS
from torch import nn
from torch.nn import functional as F

from osscl_min.config import ModelConfig
from osscl_min.model import ArcMarginHead, Tgram


class TextbookTFgram(nn.Module):
    """Conv1d, BatchNorm1d, ReLU and pools, one after the other."""

    def __init__(self, hop: int):
        super().__init__()
        self.hop = hop
        self.conv = nn.ModuleList(
            nn.Conv1d(x.inputs, x.outputs, x.kernel, x.stride, x.padding, dilation=x.dilation, bias=False)
            for x in LAYERS
        )
        self.norm = nn.ModuleList(nn.BatchNorm1d(layer.outputs) for layer in LAYERS)

    def forward(self, wave: torch.Tensor) -> torch.Tensor:
        """(B, samples) -> (B, 128, 1 + samples // hop)."""
        x, frames = wave.unsqueeze(1), 1 + wave.shape[1] // self.hop
        pools = {"max4": lambda x: F.max_pool1d(x, 4)}
        pools["frames2"] = lambda x: F.adaptive_max_pool1d(x, 2 * frames)
        pools["frames"] = lambda x: F.adaptive_max_pool1d(x, frames)
        for layer, conv, norm in zip(LAYERS, self.conv, self.norm, strict=True):
            x = F.relu(norm(conv(x)))
            if layer.pool:
                x = pools[layer.pool](x)
        return x


def _conv_block(inputs: int, outputs: int, kernel, stride=1, padding=0, groups=1, linear=False) -> nn.Module:
    block = nn.Module()
    block.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
    block.bn = nn.BatchNorm2d(outputs)
    block.prelu = nn.Identity() if linear else nn.PReLU(outputs)
    block.forward = lambda x: block.prelu(block.bn(block.conv(x)))
    return block


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int):
        super().__init__()
        inner, self.residual = inputs * expansion, stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.PReLU(inner),
            nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False), nn.BatchNorm2d(inner),
            nn.PReLU(inner), nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class TextbookEncoder(nn.Module):
    """MobileFaceNet in PyTorch's default memory format."""

    def __init__(self, maps: int, mels: int, frames: int, embedding: int):
        super().__init__()
        self.conv1 = _conv_block(maps, 64, 3, 2, 1)
        self.dw_conv1 = _conv_block(64, 64, 3, 1, 1, groups=64)
        shapes = [(64, 128, 2, 2), (128, 128, 1, 2), *[(128, 128, 2, 4), (128, 128, 1, 4)] * 2]
        self.blocks = nn.Sequential(*(_Bottleneck(*shape) for shape in shapes))
        self.conv2 = _conv_block(128, 512, 1)
        left = (math.ceil(mels / 16), math.ceil(frames / 16))
        self.linear7 = _conv_block(512, 512, left, groups=512, linear=True)
        self.linear1 = _conv_block(512, embedding, 1, linear=True)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """(B, maps, mels, frames) -> (B, embedding)."""
        x = self.blocks(self.dw_conv1(self.conv1(maps)))
        return self.linear1(self.linear7(self.conv2(x))).flatten(1)


class TextbookOSSCL(nn.Module):
    """The whole network; arguments and results are those of `model.OSSCL` with all three inputs.

    Parameters
    ----------
    config : ModelConfig
    """

    def __init__(self, config: ModelConfig = ModelConfig()):
        super().__init__()
        audio, half = config.audio, config.embedding // 2
        self.tgram = Tgram(audio.mels, audio.hop, audio.frames)
        self.tfgram = TextbookTFgram(audio.hop)
        self.encoder = TextbookEncoder(3, audio.mels, audio.frames, config.embedding)
        self.head = nn.Module()
        self.head.layers = nn.Sequential(
            nn.Linear(config.embedding, half), nn.ReLU(), nn.BatchNorm1d(half),
            nn.Linear(half, config.embedding), nn.ReLU(), nn.BatchNorm1d(config.embedding),
        )  # fmt: skip
        self.arcface = ArcMarginHead(config.embedding, config.classes, config.scale, config.margin)

    def forward(
        self, wave: torch.Tensor, log_mel: torch.Tensor, labels: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wave = wave.flatten(1)
        maps = torch.stack([log_mel.flatten(0, 1), self.tgram(wave), self.tfgram(wave)], 1)
        embedding = F.normalize(self.head.layers(self.encoder(maps).to(wave.dtype)))
        return self.arcface(embedding, labels), embedding
