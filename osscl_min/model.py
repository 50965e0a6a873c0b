"""The network: Tgram and TFgram from the wave, MobileFaceNet over the stacked maps, FPH, ArcFace.

It has the layers that get a gradient in the authors' code, 1,372,246 of their 81,174,760 parameters, and the
same arithmetic. `checkpoint.load_upstream_state` reads their checkpoints.
"""

from __future__ import annotations

import math

import torch
from osscl_kernels import LAYERS, fold_batchnorm, tfgram_infer, tfgram_train, update_running_statistics
from osscl_kernels.tfgram_train import rows as values_per_channel
from torch import nn
from torch.nn import functional as F

from osscl_min.config import ModelConfig
from osscl_min.runtime.files import UserError


class Tgram(nn.Module):
    """Time-domain feature of STgram-MFN: one wide strided convolution, then three along the frames.

    LayerNorm runs over the frames and ties the module to one clip length.
    """

    def __init__(self, mels: int, hop: int, frames: int):
        super().__init__()
        self.extractor = nn.Conv1d(1, mels, 2 * hop, stride=hop, padding=hop, bias=False)
        self.encoder = nn.Sequential(
            *(
                nn.Sequential(
                    nn.LayerNorm(frames), nn.LeakyReLU(0.2), nn.Conv1d(mels, mels, 3, padding=1, bias=False)
                )
                for _ in range(3)
            )
        )

    def forward(self, wave: torch.Tensor) -> torch.Tensor:
        """(B, samples) -> (B, mels, frames)."""
        return self.encoder(self.extractor(wave.unsqueeze(1)))


class TFgram(nn.Module):
    """The paper's feature: seven convolutions along the wave with BatchNorm, ReLU and maximum pools.

    Parameters and buffers are those of the plain modules; two fused kernels compute the result, in Triton on
    a GPU and in PyTorch elsewhere.
    """

    def __init__(self, hop: int):
        super().__init__()
        self.hop = hop
        self.conv = nn.ModuleList(
            nn.Conv1d(x.inputs, x.outputs, x.kernel, x.stride, x.padding, x.dilation, bias=False)
            for x in LAYERS
        )
        self.norm = nn.ModuleList(nn.BatchNorm1d(x.outputs) for x in LAYERS)
        for conv in self.conv:
            nn.init.xavier_uniform_(conv.weight)

    def forward(self, wave: torch.Tensor) -> torch.Tensor:
        """(B, samples) -> (B, 128, 1 + samples // hop)."""
        if not self.training:
            return tfgram_infer(wave, fold_batchnorm(self), hop=self.hop)
        weights = [conv.weight for conv in self.conv]
        gammas, betas = [norm.weight for norm in self.norm], [norm.bias for norm in self.norm]
        result, means, variances = tfgram_train(
            wave, weights, gammas, betas, eps=self.norm[0].eps, hop=self.hop
        )
        update_running_statistics(self.norm, means, variances, values_per_channel(wave, self.hop))
        return result


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm1d and BatchNorm2d in one. A single value per channel, with which PyTorch's fail (one clip in
    training mode), takes the running statistics."""

    def _check_input_dim(self, input: torch.Tensor) -> None:
        """Any number of dimensions will do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and x.numel() == x.shape[1]:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


class ConvBlock(nn.Module):
    """Conv2d without bias, BatchNorm and, unless linear, a PReLU per channel."""

    def __init__(self, inputs, outputs, kernel, stride=1, padding=0, groups=1, linear=False):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.bn = BatchNorm(outputs)
        self.prelu = None if linear else nn.PReLU(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn(self.conv(x))
        return x if self.prelu is None else self.prelu(x)


class Bottleneck(nn.Module):
    """MobileNetV2's inverted residual with PReLU: 1x1 expand, 3x3 depthwise, 1x1 project."""

    def __init__(self, inputs, outputs, stride, expansion):
        super().__init__()
        self.residual = stride == 1 and inputs == outputs
        inner = inputs * expansion
        self.conv = nn.Sequential(
            nn.Conv2d(inputs, inner, 1, bias=False),
            BatchNorm(inner),
            nn.PReLU(inner),
            nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False),
            BatchNorm(inner),
            nn.PReLU(inner),
            nn.Conv2d(inner, outputs, 1, bias=False),
            BatchNorm(outputs),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileFaceNet(nn.Module):
    """The encoder: (B, maps, mels, frames) -> (B, embedding).

    Four strides of two shrink a map 16-fold, 128 x 313 to (8, 20). The last depthwise kernel covers all of
    that, so a trained encoder fits one clip length.
    """

    def __init__(self, inputs: int, mels: int, frames: int, embedding: int = 128):
        super().__init__()
        self.conv1 = ConvBlock(inputs, 64, 3, 2, 1)
        self.dw_conv1 = ConvBlock(64, 64, 3, 1, 1, groups=64)
        self.blocks = nn.Sequential(
            Bottleneck(64, 128, stride=2, expansion=2),
            Bottleneck(128, 128, stride=1, expansion=2),
            *(Bottleneck(128, 128, stride, expansion=4) for stride in (2, 1, 2, 1)),
        )
        self.conv2 = ConvBlock(128, 512, 1)
        remaining = tuple(math.ceil(size / 16) for size in (mels, frames))
        # convolutions, under the authors' names
        self.linear7 = ConvBlock(512, 512, remaining, groups=512, linear=True)
        self.linear1 = ConvBlock(512, embedding, 1, linear=True)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        maps = maps.contiguous(memory_format=torch.channels_last)  # the fastest layout for convolutions
        x = self.blocks(self.dw_conv1(self.conv1(maps)))
        return self.linear1(self.linear7(self.conv2(x))).flatten(1)


class FeaturePerturbationHead(nn.Module):
    """The paper's head (FPH), used in training and at test: 128 -> 64 -> 128, activation before BatchNorm.

    Its kind is "basic" (ReLU) or "leaky" (LeakyReLU with slope 0.01).
    """

    def __init__(self, embedding: int = 128, kind: str = "basic"):
        super().__init__()
        half, activation = embedding // 2, nn.ReLU if kind == "basic" else nn.LeakyReLU  # of slope 0.01
        self.layers = nn.Sequential(
            nn.Linear(embedding, half),
            activation(),
            BatchNorm(half),
            nn.Linear(half, embedding),
            activation(),
            BatchNorm(embedding),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class ArcMarginHead(nn.Module):
    """ArcFace (Deng et al., 2019): scaled cosines, with an angular margin (radians) on the own class."""

    def __init__(self, embedding: int, classes: int, scale: float = 30.0, margin: float = 0.4):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, embedding))
        self.scale, self.margin = scale, margin
        nn.init.xavier_uniform_(self.weight)

    def forward(self, embedding: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """(B, D) unit vectors -> (B, classes) logits; with `labels` (B,), their logits carry the margin.

        With `labels` (B, K) the logits are (B, K, classes), the k-th row with the margin on the k-th label.
        """
        cosine = F.linear(embedding, F.normalize(self.weight))
        if labels is None:
            return self.scale * cosine
        # The authors' 1 - cos^2 is unclamped: NaN for an aligned feature. Clamped at 0, the gradient would be
        # infinite, so the limit is a little above.
        sine = (1 - cosine.square()).clamp(min=torch.finfo(cosine.dtype).eps).sqrt()
        shifted = cosine * math.cos(self.margin) - sine * math.sin(self.margin)
        beyond = cosine - math.sin(math.pi - self.margin) * self.margin  # where theta + m > pi
        shifted = torch.where(cosine > math.cos(math.pi - self.margin), shifted, beyond)
        own = F.one_hot(labels, cosine.shape[1]).bool()
        if labels.dim() == 2:
            shifted, cosine = shifted.unsqueeze(1), cosine.unsqueeze(1)
        return self.scale * torch.where(own, shifted, cosine)


class OSSCL(nn.Module):
    """The whole detector network.

    Parameters
    ----------
    config : ModelConfig
        Names the inputs, the head, the number of classes and the clip length.
    """

    def __init__(self, config: ModelConfig = ModelConfig()):
        super().__init__()
        audio = config.audio
        if not config.inputs or len(set(config.inputs)) < len(config.inputs):
            raise UserError(
                f"model.inputs: name each of log_mel, tgram, tfgram at most once, got {config.inputs}"
            )
        if "tfgram" in config.inputs and audio.mels != LAYERS[-1].outputs:
            raise UserError(
                f"model.audio.mels: TFgram gives {LAYERS[-1].outputs} rows, so mels cannot be {audio.mels}"
            )
        if not set(config.frozen) <= set(config.inputs):
            raise UserError(f"model.frozen: {config.frozen} are not all among the inputs {config.inputs}")
        self.config = config
        self.tgram = Tgram(audio.mels, audio.hop, audio.frames) if "tgram" in config.inputs else None
        self.tfgram = TFgram(audio.hop) if "tfgram" in config.inputs else None
        self.encoder = MobileFaceNet(len(config.inputs), audio.mels, audio.frames, config.embedding)
        self.head = FeaturePerturbationHead(config.embedding, config.head) if config.head != "none" else None
        self.arcface = ArcMarginHead(config.embedding, config.classes, config.scale, config.margin)
        for name in config.frozen:  # only the convolutions keep their initial weights; BatchNorm is trained
            for module in getattr(self, name).modules():
                if isinstance(module, nn.Conv1d):
                    module.requires_grad_(False)

    def maps(self, wave: torch.Tensor, log_mel: torch.Tensor) -> torch.Tensor:
        """The stacked input maps, in the order of `config.inputs`: (B, maps, mels, frames)."""
        wave, audio = wave.flatten(1), self.config.audio
        log_mel = log_mel.reshape(len(wave), audio.mels, -1)
        if log_mel.shape[-1] != audio.frames or 1 + wave.shape[-1] // audio.hop != audio.frames:
            raise UserError(
                f"this model takes clips of {audio.seconds:g} s ({audio.samples} samples, {audio.frames} "
                f"frames), not {wave.shape[-1]} samples and {log_mel.shape[-1]} frames; train one for those"
            )
        maps = [log_mel if name == "log_mel" else getattr(self, name)(wave) for name in self.config.inputs]
        return torch.stack(maps, 1)

    def forward(
        self, wave: torch.Tensor, log_mel: torch.Tensor, labels: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Parameters
        ----------
        wave : (B, samples) or (B, 1, samples), in [-1, 1]
        log_mel : (B, 1, mels, frames) or (B, mels, frames), dB
        labels : (B,) or (B, K) int64, optional

        Returns
        -------
        logits : (B, classes), (B, K, classes) for K labels
            s cos, with the margin on the own class where labels are given.
        embedding : (B, embedding)
            Of unit length.
        """
        features = self.encoder(self.maps(wave, log_mel))
        # half precision would round cosines that the losses multiply by 30 and 50
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(self.arcface.weight.dtype)
            embedding = F.normalize(features if self.head is None else self.head(features))
            return self.arcface(embedding, labels), embedding
