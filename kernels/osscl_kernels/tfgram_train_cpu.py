"""TFgram training on the CPU: a few clips at a time, raw convolutions kept, everything else recomputed.

Three things make it faster than the plain modules:

* convolutions run as conv2d of height 1 in channels_last, and weight gradients as matrix products, both of
  which are several times faster than conv1d; the first layer and, on tiles of a processor that has them,
  weight gradients in bfloat16 are compiled functions of our own;
* a group of clips is small enough for its activations to stay in the cache;
* the backward pass keeps one tensor a layer (the raw convolution output); BN + ReLU are recomputed.

Tensors are (clips, channels, 1, time) in channels_last memory format. Source: the same equations as
`tfgram_train_ref`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import native
from .clipwise import Normalisation, SideBySide, aten, combine_moments, dense, moments, weight_gradient
from .tfgram_infer import LAYERS, frames

GROUP_ROWS = 64_000  # time steps of the first layers in one group of clips: two clips of 10 s
FIRST = LAYERS[0]


def _regroup(parts: list[torch.Tensor], size: int) -> list[torch.Tensor]:
    if all(len(part) == size for part in parts):
        return parts
    return list(torch.cat(parts).split(size))


class _Pool:
    """ReLU and the maximum pool of a layer; where values tie the first one wins, as in torch."""

    def __init__(self, kind: str, length: int, frame_count: int):
        self.length = length
        self.width = {"max4": 4, "frames": 2}.get(kind)  # "frames" goes from 2 T to T
        count = length // self.width if self.width else 2 * frame_count
        out = torch.arange(count)
        if self.width:
            self.start, self.end = out * self.width, (out + 1) * self.width
        else:  # adaptive windows of unequal width, which overlap
            self.start, self.end = out * length // count, -((out + 1) * -length // count)

    def windows(self, clips: int) -> tuple[torch.Tensor, torch.Tensor]:
        """First row and the row after the last of every window of so many clips."""
        offset = torch.arange(clips)[:, None] * self.length
        return tuple((offset + edge).flatten().int() for edge in (self.start, self.end))

    def forward(self, norm: Normalisation, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """y (n, C, 1, T) -> maxima (n, C, 1, pooled) and where they were, if that is worth keeping."""
        if native.fits(y):
            start, end = self.windows(len(y))
            pooled = y.new_empty(len(y), 1, len(self.start), y.shape[1]).permute(0, 3, 1, 2)
            arguments = dense(y), norm.scale, norm.shift, pooled, start, end
            native.call("pool", y.dtype, *arguments, len(start), y.shape[1])
            return pooled, None
        z = norm.normalise(y)
        if self.width:
            pooled, index = F.max_pool2d(z, (1, self.width), return_indices=True)
            return pooled.relu_(), index
        z = z.permute(0, 2, 3, 1)[:, 0]
        steps = torch.arange(int((self.end - self.start).max()))
        taps = torch.minimum(self.start + steps[:, None], self.end - 1)  # the shorter repeat their last row
        best = z.index_select(1, taps[0])
        place = torch.zeros(best.shape, dtype=torch.int16)
        for step, tap in enumerate(taps[1:], 1):
            candidate = z.index_select(1, tap)
            place.masked_fill_(candidate > best, step)
            best = torch.maximum(best, candidate)
        return best[:, None].permute(0, 3, 1, 2).relu_(), place + taps[0][:, None]

    def backward(self, norm, dp, y, pooled, index):
        """dp (n, C, 1, pooled) -> dz (n, C, 1, T) of the rows that won, and BatchNorm's sums."""
        if index is None:
            start, end = self.windows(len(y))
            dp, y = dense(dp), dense(y)
            dz = torch.empty_like(y, memory_format=torch.channels_last)
            sums = torch.zeros(2, y.shape[1], dtype=torch.float64)
            arguments = dp, y, norm.mean, norm.scale, norm.shift, dz, sums, start, end
            native.call("pool_backward", y.dtype, *arguments, len(start), len(y) * self.length, y.shape[1])
            sums[0] *= norm.rstd
            return dz, sums
        dp = aten.threshold_backward(dp, pooled, 0)
        if self.width:
            size = (1, self.width)
            dz = aten.max_pool2d_with_indices_backward(dp, y, size, size, (0, 0), (1, 1), False, index)
        else:
            dz = dp.new_zeros(len(y), self.length, y.shape[1])
            dz.scatter_add_(1, index, dp[:, :, 0].transpose(1, 2))
            dz = dz[:, None].permute(0, 3, 1, 2)
        return dz, norm.sums(dz, y)


class ClipwiseTFgram(torch.autograd.Function):
    """output, *means, *variances = f(wave, eps, hop, dtype, *weights, *gammas, *betas): `tfgram_train`."""

    @staticmethod
    def forward(ctx, wave, eps, hop, dtype, *parameters):
        with SideBySide() as each:
            return ClipwiseTFgram._forward(ctx, each, wave, eps, hop, dtype, parameters)

    @staticmethod
    def _forward(ctx, each, wave, eps, hop, dtype, parameters):
        weights, gammas, betas = parameters[:7], parameters[7:14], parameters[14:]
        wide = torch.promote_types(dtype, torch.float32)
        frame_count = frames(wave.shape[1], hop)
        # BatchNorm ignores a constant of the wave: without it nothing cancels. Padding becomes -offset.
        x = wave.to(wide)
        offset = x.mean(dtype=torch.float64).to(wide)
        pad = (FIRST.padding, FIRST.padding)
        most = min(GROUP_ROWS * FIRST.stride // wave.shape[1], len(wave) // each.threads)
        x = list(F.pad(x - offset, pad, value=0.0).split(each.share(len(wave), most)))
        for part in x:
            part[:, : FIRST.padding] = part[:, part.shape[1] - FIRST.padding :] = -offset

        state = _State(x, weights, gammas, betas, eps, dtype)
        means, variances = state.first_statistics(each, offset)
        pooled_clips = each.share(len(wave), min(GROUP_ROWS // (4 * frame_count), len(wave) // each.threads))
        for index in range(1, len(LAYERS)):
            layer = LAYERS[index]
            if LAYERS[index - 1].pool == "frames2":
                state.pooled[index - 1] = _regroup(state.pooled[index - 1], pooled_clips)
            weight = weights[index].to(dtype)[:, :, None].contiguous(memory_format=torch.channels_last)

            def convolve(group, index=index, layer=layer, weight=weight):
                a = state.activation(index - 1, group)
                y = F.conv2d(a, weight, padding=(0, layer.padding), dilation=(1, layer.dilation))
                return y, moments(y)

            raw, parts = zip(*each(convolve, state.groups(index - 1)), strict=True)
            raw = list(raw)
            count, mean, square = combine_moments(*(torch.stack(m) for m in zip(*parts, strict=True)))
            state.raw[index] = raw
            state.counts[index] = int(count)
            state.norms[index] = Normalisation(
                mean, square / count, gammas[index], betas[index], eps, dtype, 0.0
            )
            means.append(mean.to(wide))
            variances.append((square / count).to(wide))
            if layer.pool:
                pool = state.pools[index] = _Pool(layer.pool, raw[0].shape[3], frame_count)
                norm = state.norms[index]
                results = each(lambda g, p=pool, n=norm, y=raw: p.forward(n, y[g]), len(raw))
                state.pooled[index] = [p for p, _ in results]
                state.indices[index] = [i for _, i in results]
        output = torch.cat(state.pooled[6])[:, :, 0].to(wide).contiguous()
        ctx.state, ctx.parameters_like, ctx.wave_shape = state, parameters, wave.shape
        ctx.mark_non_differentiable(*means, *variances)
        return output, *means, *variances

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output, *_):
        state, ctx.state = ctx.state, None
        if state is None:
            raise RuntimeError("tfgram_train: the backward pass ran a second time; its buffers are freed")
        with torch.autocast("cpu", enabled=False), SideBySide() as each:
            wave, weights, gammas, betas = state.backward(each, grad_output, ctx.needs_input_grad[0])
        if wave is not None:
            wave = wave.reshape(ctx.wave_shape)
        gradients = [
            g.to(p.dtype) for g, p in zip(weights + gammas + betas, ctx.parameters_like, strict=True)
        ]
        return wave, None, None, None, *gradients


class _State:
    """What one forward pass leaves for its backward pass."""

    def __init__(self, x, weights, gammas, betas, eps, dtype):
        self.x, self.weights, self.dtype, self.eps = x, weights, dtype, eps
        self.gammas, self.betas = gammas, betas
        self.wide = torch.promote_types(dtype, torch.float32)
        self.raw, self.pooled, self.indices, self.pools = {}, {}, {}, {}
        self.norms: dict[int, Normalisation] = {}
        self.counts: dict[int, int] = {}
        self.compiled = dtype in native.DTYPES and native.library() is not None  # also for the first layer

    def groups(self, index):
        return len(self.x if index == 0 else self.pooled.get(index) or self.raw[index])

    def windows(self, group):
        """(rows, 11): what the first convolution sees."""
        return self.x[group].unfold(1, FIRST.kernel, FIRST.stride).reshape(-1, FIRST.kernel)

    def first_statistics(self, each, offset):
        """Mean and variance of the first layer from the windows' mean and covariance, in float64."""

        def part(group):
            rows = self.windows(group).double()
            mean = rows.mean(0)
            rows = rows - mean
            return len(rows), mean, rows.T @ rows

        counts, means, squares = zip(*each(part, len(self.x)), strict=True)
        count, weights = sum(counts), torch.tensor(counts).double()
        mean = weights @ torch.stack(means) / count
        apart = torch.stack(means) - mean
        square = sum(squares) + apart.T @ (weights[:, None] * apart)
        weight = self.weights[0][:, 0].double()
        self.counts[0], self.window_mean, self.covariance = count, mean, square / count
        centred, variance = weight @ mean, ((weight @ self.covariance) * weight).sum(1)
        self.norms[0] = Normalisation(
            centred, variance, self.gammas[0], self.betas[0], self.eps, self.dtype, 0.0
        )
        return [(centred + weight.sum(1) * offset).to(self.wide)], [variance.to(self.wide)]

    def activation(self, index, group):
        """The layer's output (n, C, 1, T): after BN, ReLU and pool."""
        if index in self.pooled:
            return self.pooled[index][group]
        norm = self.norms[index]
        if index:
            return norm(self.raw[index][group])
        if self.compiled:
            x, weight = self.x[group], (self.weights[0][:, 0] * norm.scale[:, None]).T.contiguous()
            rows = (x.shape[1] - FIRST.kernel) // FIRST.stride + 1
            a = x.new_empty(len(x), 1, rows, FIRST.outputs, dtype=self.dtype).permute(0, 3, 1, 2)
            native.call("first", self.dtype, x, weight, norm.shift, a, *x.shape, rows, FIRST.outputs)
            return a
        # Three taps over blocks of five samples, a view of the wave: 15 >= 11 samples.
        weight = F.pad(self.weights[0][:, 0].to(self.wide) * norm.scale[:, None], (0, 4)).to(self.dtype)
        x, five = self.x[group].to(self.dtype), FIRST.stride
        x = F.pad(x, (0, -x.shape[1] % five)).unflatten(1, (1, -1, five)).permute(0, 3, 1, 2)
        weight = weight.unflatten(1, (1, 3, five)).permute(0, 3, 1, 2)
        return F.conv2d(x, weight, norm.shift.to(self.dtype)).relu_()

    def backward(self, each, grad_output, wave_needed):
        weights, gammas, betas = [None] * 7, [None] * 7, [None] * 7
        sizes = [len(p) for p in self.pooled[6]]
        da = [g.to(self.dtype)[:, :, None].contiguous(memory_format=torch.channels_last)
              for g in grad_output.split(sizes)]  # fmt: skip
        dz, sums = [], 0.0
        for index in range(6, 0, -1):
            layer, norm, raw = LAYERS[index], self.norms[index], self.raw[index]
            if layer.pool:  # da holds gradients of the pooled output: mask, then route to the winning rows
                sizes = [len(y) for y in raw]
                da = _regroup(da, sizes[0])
                pooled = _regroup(self.pooled.pop(index), sizes[0])

                def route(group, index=index, norm=norm, raw=raw, da=da, pooled=pooled):
                    where = self.indices[index][group]
                    return self.pools[index].backward(norm, da[group], raw[group], pooled[group], where)

                dz, sums = zip(*each(route, len(raw)), strict=True)
                dz, sums = list(dz), sum(sums)
            gammas[index], betas[index] = sums[0], sums[1]
            scale = (norm.gamma.double() * norm.rstd)[:, None, None]
            weight = self.weights[index].double() * scale
            flipped = weight.permute(1, 0, 2).flip(2)[:, :, None].to(self.dtype)
            flipped = flipped.contiguous(memory_format=torch.channels_last)

            def step(group, index=index, layer=layer, norm=norm, raw=raw, dz=dz, sums=sums, flipped=flipped):
                dy = norm.centred(dz[group], raw[group], *sums, self.counts[index])
                dz[group] = raw[group] = None
                d = F.conv2d(dy, flipped, padding=(0, layer.padding), dilation=(1, layer.dilation))
                below = index - 1
                if below in self.pooled or not below:
                    a = self.activation(below, group)
                    if not below:
                        d, sums = self.first_products(d, a, group, wave_needed)
                    else:
                        sums = None
                else:
                    d, a, sums, _ = self.norms[below].backward(d, self.raw[below][group], True)
                return weight_gradient(a, dy, 3, layer.dilation), d, sums

            total, da, sums = zip(*each(step, len(raw)), strict=True)
            dz, total = list(da), sum(total)
            sums = None if sums[0] is None else sum(sums)
            weights[index] = total.double() * scale
        return self.first_gradients(sums, dz, wave_needed, weights, gammas, betas)

    def first_products(self, d, a, group, keep):
        """dz if `keep`; sums over the rows of dz (window - mean window) and, last column, of dz: (64, 12)."""
        if self.compiled:
            x, sums = self.x[group], torch.zeros(FIRST.kernel + 1, FIRST.outputs, dtype=torch.float64)
            arguments = dense(d), a, x, self.window_mean.float(), sums
            native.call("first_backward", self.dtype, *arguments, *x.shape, a.shape[3], a.shape[1], keep)
            return d if keep else None, sums.T
        d = aten.threshold_backward.grad_input(d, a, 0, grad_input=d)
        rows = self.windows(group) - self.window_mean.to(self.wide)
        rows = F.pad(rows, (0, 1), value=1.0).to(self.dtype)
        return d if keep else None, (d.permute(1, 0, 2, 3).flatten(1) @ rows).double()

    def first_gradients(self, products, dz, wave_needed, weights, gammas, betas):
        """The first layer's gradients follow from those sums and the windows' covariance."""
        norm, weight = self.norms[0], self.weights[0][:, 0].double()
        rstd, gamma = norm.rstd.double(), norm.gamma.double()
        products, betas[0] = products[:, :-1], products[:, -1]
        gammas[0] = (weight * products).sum(1) * rstd
        correction = (gammas[0] * rstd)[:, None] * (weight @ self.covariance)
        weights[0] = ((gamma * rstd)[:, None] * (products - correction))[:, None]
        if not wave_needed:
            return None, weights, gammas, betas
        kernel = (weight * (gamma * rstd)[:, None])[:, None, None].to(self.wide)
        waves = []
        for group, d in enumerate(dz):
            y = F.conv2d(self.x[group][:, None, None], self.weights[0][:, :, None].to(self.wide),
                         stride=(1, FIRST.stride))  # fmt: skip
            dy = norm.centred(d.to(self.wide), y, gammas[0], betas[0], self.counts[0])
            extra = self.x[group].shape[1] - (FIRST.stride * (y.shape[3] - 1) + FIRST.kernel)
            dx = F.conv_transpose2d(dy, kernel, stride=(1, FIRST.stride), output_padding=(0, extra))
            waves.append(dx[:, 0, 0, FIRST.padding : -FIRST.padding])
        return torch.cat(waves), weights, gammas, betas
