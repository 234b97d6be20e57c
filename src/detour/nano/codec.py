"""The VAE of the trained miniature: an AutoencoderKL built by hand that keeps every cell of the drawn world.

Pictures of the world have cells of 4 x 4 pixels, so an 8 x 8 block holds 2 x 2 cells of three colours: 12 numbers, for
which 16 latent channels are room enough. Encoding is linear: average cells, take the Haar transform of the 2 x 2 (mean,
left - right, upper - lower, diagonal), scale, and spread the 12 numbers over 16 channels by columns of a Hadamard
matrix, so that no channel is idle. `encode` and `decode` are the same mathematics without the network.

Decoding by the real class is harder, because its decoder only repeats positions and convolves: after repetition the
four cells of a block look alike. Their neighbours tell them apart. At a left cell the right neighbour is a copy, so
R = |c(x + 1) - c(x)| is exactly zero and L = |c(x) - c(x - 1)| is not; at a right cell it is the other way round. With
the soft threshold T(d, s) = relu(d - 64 s) - relu(-d - 64 s), the horizontal detail d is added as T(d, R) - T(d, L):
plus d on the left, minus d on the right. Where both neighbours are alike it is lost, but there is none in a flat area;
only a pattern that repeats every two cells would suffer. One residual block does this across, the next one down.
relu(x) is silu(1024 x) / 1024. Group norms are made constants by loud channels, as in the other hand-made VAE.
Nothing is trained, and pictures come back to 1e-3 in pixels of -1 to 1 (1e-2 in bf16; tests/nano/test_codec.py).

Shapes: N pictures, C channels, H W cells or latent positions.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from diffusers.models.autoencoders.vae import Decoder, Encoder
    from diffusers.models.resnet import ResnetBlock2D

    from detour.nano.world import Pictures

SCALING, SHIFT = 0.3611, 0.1159  # of the real VAE
CHANNELS, POSITIONS = 16, 16  # latents of a picture of the world are 16 x 16 x 16
GAINS = (4.0,) * 3 + (16.0,) * 9
"""Of means and details, before `SCALING`: a mean then has a deviation of 1.0, a detail of .13 to .5, about the root of
what it has beside the mean in a picture."""
_WIDTHS = [8, 8, 64, 64]
_DETAILS = 12
_LOUD = 8192.0
_SHARP = 1024.0  # silu(1024 x) / 1024 differs from relu(x) by 3e-4 at most
_GATE = 64.0  # a detail is kept where neighbours differ by a sixty-fourth of it
_PROJECTIONS = 3


def build_vae() -> AutoencoderKL:
    """The VAE in float32, frozen. Loading weights into the real class gives the same."""
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):  # the constructor draws weights, all of which are replaced
        model = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=_WIDTHS,
            layers_per_block=1,
            latent_channels=CHANNELS,
            norm_num_groups=1,
            scaling_factor=SCALING,
            shift_factor=SHIFT,
            use_quant_conv=False,
            use_post_quant_conv=False,
            force_upcast=True,
            mid_block_add_attention=True,
        )
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.weight.zero_()
                if module.bias is not None:
                    module.bias.zero_()
        _wire_encoder(model.encoder)
        _wire_decoder(model.decoder)
    return model.eval().requires_grad_(False)


# --- the same without the network --------------------------------------------------------------------------------


def encode(pictures_NHW3: Pictures) -> Tensor:
    """Normalised latents (N, 16, 16, 16) of pictures of the world (N, 32, 32, 3; 0 to 1), float32."""
    pixels = torch.from_numpy(pictures_NHW3).permute(0, 3, 1, 2) * 2 - 1
    n, _, height, width = pixels.shape
    quads_NCHWQ = pixels.unfold(2, 2, 2).unfold(3, 2, 2).reshape(n, 3, height // 2, width // 2, 4)
    details = torch.einsum("kq,nchwq->nkchw", _haar() / 4, quads_NCHWQ).flatten(1, 2)
    return torch.einsum("lk,nkhw->nlhw", _spread() * torch.tensor(GAINS) * SCALING, details)


def decode(latents_NCHW: Tensor) -> Pictures:
    """The inverse of `encode`; not clipped."""
    latents = latents_NCHW.float().cpu()
    n, _, height, width = latents.shape
    details = torch.einsum("lk,nlhw->nkhw", _spread() / (torch.tensor(GAINS) * SCALING), latents)
    quads = torch.einsum("kq,nkchw->nchwq", _haar(), details.reshape(n, 4, 3, height, width))
    pixels = quads.reshape(n, 3, height, width, 2, 2).permute(0, 2, 4, 3, 5, 1)
    pictures: Pictures = (pixels.reshape(n, height * 2, width * 2, 3) * 0.5 + 0.5).numpy()
    return pictures


def _haar() -> Tensor:
    """Mean, left - right, upper - lower, diagonal of four cells in reading order. Its inverse is its transpose / 4."""
    return torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])


def _spread() -> Tensor:
    """16 x 12 with orthonormal columns: the first columns of the Hadamard matrix of Sylvester, over 4."""
    hadamard = torch.ones(1, 1)
    for _ in range(4):
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    return hadamard[:, 1 : 1 + _DETAILS] / 4


# --- the network ---------------------------------------------------------------------------------------------------


def _wire_encoder(encoder: Encoder) -> None:
    _copy(encoder.conv_in, 3)
    for block in encoder.down_blocks[:2]:
        for color in range(3):
            block.downsamplers[0].conv.weight[color, color, :2, :2] = 0.25
    _copy(encoder.down_blocks[2].resnets[0].conv_shortcut, 3)
    split = encoder.down_blocks[2].downsamplers[0].conv
    for kind, row in enumerate(_haar().reshape(4, 2, 2) / 4):
        for color in range(3):
            split.weight[3 * kind + color, color, :2, :2] = row
    _paired(split, _DETAILS)
    _read_pairs(encoder.conv_norm_out, encoder.conv_out, _spread() * torch.tensor(GAINS))
    encoder.conv_out.bias[:CHANNELS] = SHIFT
    encoder.conv_out.bias[CHANNELS:] = -20.0  # log variance: posterior samples are the mean


def _wire_decoder(decoder: Decoder) -> None:
    decoder.conv_in.weight[:_DETAILS, :, 1, 1] = (_spread() / torch.tensor(GAINS)).T
    decoder.conv_in.bias[:_DETAILS] = -SHIFT * decoder.conv_in.weight[:_DETAILS, :, 1, 1].sum(dim=1)
    _wire_differences(decoder.up_blocks[0].upsamplers[0].conv)
    across, down = decoder.up_blocks[1].resnets
    _wire_thresholds(across, {_MEAN: _ACROSS, _DOWN: _DIAGONAL}, plus="right", minus="left")
    _wire_thresholds(down, {_MEAN: _DOWN}, plus="lower", minus="upper")
    _copy(decoder.up_blocks[1].upsamplers[0].conv, 3)
    _copy(decoder.up_blocks[2].resnets[0].conv_shortcut, 3)
    _copy(decoder.up_blocks[2].upsamplers[0].conv, 3)
    _paired(decoder.up_blocks[2].upsamplers[0].conv, 3)
    _read_pairs(decoder.conv_norm_out, decoder.conv_out, torch.eye(3))


# Channels after the first upsampling: the 12 details, three colours of each kind; the differences to each neighbour in
# three projections; of all these the negatives; then loud ones.
_MEAN, _ACROSS, _DOWN, _DIAGONAL = 0, 3, 6, 9
_SIDES = {"left": (0, -1), "right": (0, 1), "upper": (-1, 0), "lower": (1, 0)}
_FIRST = {side: _DETAILS + index * _PROJECTIONS for index, side in enumerate(_SIDES)}
_ALL = _DETAILS + len(_SIDES) * _PROJECTIONS


def _wire_differences(conv: nn.Conv2d) -> None:
    """Copy the details, and take the differences to the four neighbours in a few projections."""
    _copy(conv, _DETAILS)
    steps = torch.arange(_PROJECTIONS * _DETAILS).reshape(_PROJECTIONS, _DETAILS)
    weights = 0.25 * torch.sin(1.0 + 2.4 * steps)  # any numbers without a pattern
    weights[:, 3:] *= 4  # details are small
    for side, (y, x) in _SIDES.items():
        for index, row in enumerate(weights):
            conv.weight[_FIRST[side] + index, :_DETAILS, 1, 1] = row
            conv.weight[_FIRST[side] + index, :_DETAILS, 1 + y, 1 + x] = -row
    _paired(conv, _ALL)


def _wire_thresholds(block: ResnetBlock2D, details: dict[int, int], *, plus: str, minus: str) -> None:
    """Add T(detail, difference to `plus`) - T(detail, difference to `minus`) to each target, for three colours.

    `details` gives the first channel of a detail by the first channel of its target. The norm and SiLU before the first
    convolution rectify every channel and its negative, so that d is a difference of two and |c| a sum. Each half of a
    threshold is a hidden channel, and has its negative beside it so that the second norm's mean stays zero.
    """
    _linear_norm(block.norm1, _ALL, _SHARP)
    inside, outside = block.conv1.weight[:, :, 1, 1], block.conv2.weight[:, :, 1, 1]
    halves = [
        (target + color, detail + color, side, sign, half)
        for target, detail in details.items()
        for color in range(3)
        for side, sign in ((plus, 1.0), (minus, -1.0))
        for half in (1.0, -1.0)
    ]
    for hidden, (target, detail, side, sign, half) in enumerate(halves):
        inside[hidden, detail] = half / _SHARP
        inside[hidden, _ALL + detail] = -half / _SHARP
        for first in (_FIRST[side], _ALL + _FIRST[side]):
            inside[hidden, first : first + _PROJECTIONS] = -_GATE / _SHARP
        outside[target, hidden] = half * sign / _SHARP
    _paired(block.conv1, len(halves))
    _linear_norm(block.norm2, len(halves), _SHARP)
    outside[_ALL : 2 * _ALL] = -outside[:_ALL]


def _copy(conv: nn.Conv2d, channels: int) -> None:
    middle = conv.kernel_size[0] // 2
    for channel in range(channels):
        conv.weight[channel, channel, middle, middle] = 1.0


def _paired(conv: nn.Conv2d, count: int) -> None:
    """Outputs: `count` channels as they are, their negatives, then the loud channels, half of each sign."""
    assert conv.bias is not None
    conv.weight[count : 2 * count] = -conv.weight[:count]
    conv.bias[2 * count :] = _loud(conv.out_channels - 2 * count)


def _loud(count: int) -> Tensor:
    assert count > 0 and count % 2 == 0, count
    return torch.tensor([_LOUD, -_LOUD]).repeat(count // 2)


def _linear_norm(norm: nn.GroupNorm, pairs: int, scale: float) -> None:
    """Undo the norm's division on pairs, times `scale`, and drop the loud channels."""
    loud = norm.num_channels - 2 * pairs
    norm.weight.zero_()
    norm.weight[: 2 * pairs] = scale * _LOUD * math.sqrt(loud / norm.num_channels)


def _read_pairs(norm: nn.GroupNorm, conv: nn.Conv2d, factors_OI: Tensor) -> None:
    """Undo the norm, and take each output from the differences of pairs: silu(y) - silu(-y) = y."""
    outputs, pairs = factors_OI.shape
    _linear_norm(norm, pairs, 1.0)
    conv.weight[:outputs, :pairs, 1, 1] = factors_OI
    conv.weight[:outputs, pairs : 2 * pairs, 1, 1] = -factors_OI
