"""The Inception network of 2015 on which FID, sFID, Inception Score, precision and recall are defined.

A plain table of blocks: 94 convolutions, each followed by batch norm (folded into it here) and ReLU.

Legend: B images, H x W their size, C channels. Activations are (B, C, 299 and smaller) in channels_last memory.
Source: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", arXiv:1512.00567, in the form of
the graph `classify_image_graph_def.pb`; protocol of Dhariwal & Nichol, arXiv:2105.05233.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INPUT_SIZE = 299
POOL_DIM = 2048
SPATIAL_CHANNELS, SPATIAL_DIM = 7, 17 * 17 * 7  # the first 7 channels of mixed_6/conv
NUM_LOGITS = 1008


class Conv(NamedTuple):
    """One row of the table: output channels, kernel (height, width), stride; SAME padding unless `valid`."""

    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    valid: bool = False


class Pool(NamedTuple):
    """3 x 3 pooling; stride 2 is VALID, stride 1 is SAME. Averages leave the padding out of the count."""

    kind: str
    stride: int = 1


# A branch is a list of layers, applied in order; a tuple inside a branch is a pair of convolutions side by side.
# The scopes of the original follow from the order: conv, conv_1, conv_2, ... inside <block>/<branch>.
Branch = list[Conv | Pool | tuple[Conv, Conv]]


def block_35(pool_width: int) -> dict[str, Branch]:
    return {
        "": [Conv(64)],
        "tower": [Conv(48), Conv(64, (5, 5))],
        "tower_1": [Conv(64), Conv(96, (3, 3)), Conv(96, (3, 3))],
        "tower_2": [Pool("average"), Conv(pool_width)],
    }


def block_17(width: int) -> dict[str, Branch]:
    return {
        "": [Conv(192)],
        "tower": [Conv(width), Conv(width, (1, 7)), Conv(192, (7, 1))],
        "tower_1": [Conv(width), Conv(width, (7, 1)), Conv(width, (1, 7)), Conv(width, (7, 1)), Conv(192, (1, 7))],
        "tower_2": [Pool("average"), Conv(192)],
    }


def block_8(pool: str) -> dict[str, Branch]:
    pair = (Conv(384, (1, 3)), Conv(384, (3, 1)))
    return {
        "": [Conv(320)],
        "tower": [Conv(384), pair],
        "tower_1": [Conv(448), Conv(384, (3, 3)), pair],
        "tower_2": [Pool(pool), Conv(192)],
    }


STEM: Branch = [
    Conv(32, (3, 3), 2, valid=True),
    Conv(32, (3, 3), valid=True),
    Conv(64, (3, 3)),
    Pool("max", 2),
    Conv(80, valid=True),
    Conv(192, (3, 3), valid=True),
    Pool("max", 2),
]
BLOCKS: dict[str, dict[str, Branch]] = {
    "mixed": block_35(32),
    "mixed_1": block_35(64),
    "mixed_2": block_35(64),
    "mixed_3": {
        "": [Conv(384, (3, 3), 2, valid=True)],
        "tower": [Conv(64), Conv(96, (3, 3)), Conv(96, (3, 3), 2, valid=True)],
        "pool": [Pool("max", 2)],
    },
    "mixed_4": block_17(128),
    "mixed_5": block_17(160),
    "mixed_6": block_17(160),
    "mixed_7": block_17(192),
    "mixed_8": {
        "tower": [Conv(192), Conv(320, (3, 3), 2, valid=True)],
        "tower_1": [Conv(192), Conv(192, (1, 7)), Conv(192, (7, 1)), Conv(192, (3, 3), 2, valid=True)],
        "pool": [Pool("max", 2)],
    },
    "mixed_9": block_8("average"),
    "mixed_10": block_8("max"),
}


class ConvParameters(NamedTuple):
    """What a weight file holds for one convolution: kernel (out, in, height, width) and its batch norm, (out,) each."""

    weight: Tensor
    beta: Tensor
    mean: Tensor
    variance: Tensor
    gamma: Tensor | None = None
    epsilon: float = 1e-3


class ConvReLU(nn.Conv2d):
    """Convolution with its batch norm folded in, then ReLU. `scope` is its name in the original graph."""

    def __init__(self, scope: str, channels: int, row: Conv):
        padding = (0, 0) if row.valid else (row.kernel[0] // 2, row.kernel[1] // 2)
        super().__init__(channels, row.width, row.kernel, row.stride, padding)
        self.scope = scope
        self.packed: Tensor | None = None

    def fold(self, parameters: ConvParameters) -> None:
        """Take weight and batch norm over, folded in float64."""
        scale = (parameters.variance.double() + parameters.epsilon).rsqrt()
        if parameters.gamma is not None:
            scale = scale * parameters.gamma.double()
        with torch.no_grad():
            self.weight.copy_(parameters.weight.double() * scale[:, None, None, None])
            self.bias.copy_(parameters.beta.double() - parameters.mean.double() * scale)

    def pack(self, like: Tensor) -> None:
        """Bring the weight into the layout that oneDNN likes best for inputs `like` this; the plain one goes."""
        geometry = list(self.padding), list(self.stride), list(self.dilation), self.groups
        self.packed = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *geometry, list(like.shape))
        self.weight = None

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is None:
            return F.relu_(super().forward(x))
        geometry = list(self.padding), list(self.stride), list(self.dilation), self.groups
        return torch.ops.mkldnn._convolution_pointwise(x, self.packed, self.bias, *geometry, "relu", [], "")


class SideBySide(nn.ModuleList):
    """Branches on one input, concatenated in channels."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self], dim=1)


def build_pool(pool: Pool) -> nn.Module:
    padding = 1 if pool.stride == 1 else 0
    if pool.kind == "average":
        return nn.AvgPool2d(3, pool.stride, padding, count_include_pad=False)
    return nn.MaxPool2d(3, pool.stride, padding)


def build_branch(scope: str, channels: int, layers: Branch) -> tuple[nn.Sequential, int]:
    """Modules of one branch, and its output channels."""
    modules, number = [], 0
    for layer in layers:
        if isinstance(layer, Pool):
            modules.append(build_pool(layer))
        elif isinstance(layer, Conv):
            modules.append(ConvReLU(f"{scope}conv_{number}" if number else f"{scope}conv", channels, layer))
            channels, number = layer.width, number + 1
        else:
            first, second = layer
            names = f"{scope}mixed/conv", f"{scope}mixed/conv_1"
            modules.append(SideBySide(ConvReLU(name, channels, row) for name, row in zip(names, layer)))
            channels = first.width + second.width
    return nn.Sequential(*modules), channels


class Inception(nn.Module):
    """Images in 0..255 to the features of the metrics. Sizes other than 299 are resized as TensorFlow did in 2015.

    Built with arbitrary weights: `load` takes those of a file (utils/evaluation/inception_weights.py).
    """

    def __init__(self):
        super().__init__()
        self.stem, channels = build_branch("", 3, STEM)
        self.blocks = nn.ModuleDict()
        for name, branches in BLOCKS.items():
            scopes = [f"{name}/{branch}/" if branch else f"{name}/" for branch in branches]
            built = [build_branch(scope, channels, layers) for scope, layers in zip(scopes, branches.values())]
            self.blocks[name] = SideBySide(modules for modules, _ in built)
            channels = sum(width for _, width in built)
        self.register_buffer("classifier", None)

    def convolutions(self) -> dict[str, ConvReLU]:
        """The 94 convolutions by their scope in the original graph, in the order of the table."""
        return {module.scope: module for module in self.modules() if isinstance(module, ConvReLU)}

    def load(self, parameters: dict[str, ConvParameters], classifier: Tensor | None) -> "Inception":
        """Take over the parameters of every scope and `softmax/weights` (2048, 1008), None where a file has none."""
        for scope, convolution in self.convolutions().items():
            convolution.fold(parameters[scope])
        self.classifier = classifier
        return self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def pack(self, batch_size: int) -> "Inception":
        """For inference on a CPU only, best in such batches: weights in oneDNN's own layout, ReLU inside convolutions.

        Takes the operators of torch's own compiler, which are not public; without them nothing changes.
        """
        names = "_reorder_convolution_weight", "_convolution_pointwise"
        if torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names):
            convolutions = self.convolutions().values()
            hooks = [c.register_forward_pre_hook(lambda c, inputs: c.pack(*inputs)) for c in convolutions]
            with torch.inference_mode():
                self(torch.zeros(batch_size, INPUT_SIZE, INPUT_SIZE, 3))
            for hook in hooks:
                hook.remove()
        return self

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, H, W, 3), uint8 or float in 0..255, to pool features (B, 2048) and spatial ones (B, 2023)."""
        x = self.stem(resize(images).sub_(128).mul_(1 / 128))
        for name, block in self.blocks.items():
            x = block(x)
            if name == "mixed_6":  # mixed_6/conv comes first in the concatenation; features go in H, W, C order
                spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return x.mean(dim=(2, 3)), spatial

    def logits(self, pool: Tensor) -> Tensor:
        """Pool features (B, 2048) to the logits (B, 1008) of the Inception Score, which leaves the bias out."""
        return pool @ self.classifier


def interpolation(size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Lower and upper source index (299,) of every target pixel, and its float32 weight of the upper one."""
    source = torch.arange(INPUT_SIZE, dtype=torch.float32) * (torch.tensor(size, dtype=torch.float32) / INPUT_SIZE)
    lower = source.floor()
    upper = (lower + 1).clamp(max=size - 1)
    return lower.long().to(device), upper.long().to(device), (source - lower).to(device)


def resize(images: Tensor) -> Tensor:
    """Images (B, H, W, 3) to (B, 3, 299, 299) float32, bit for bit TensorFlow's bilinear resize of 2015.

    No half-pixel shift, no antialiasing: target i reads source i * (size / 299), first along x, then along y.
    """
    top, bottom, y = interpolation(images.shape[1], images.device)
    left, right, x = interpolation(images.shape[2], images.device)
    columns = images.transpose(1, 2).contiguous().float()  # a column's pixels lie together: faster to gather
    a, b = columns.index_select(1, left), columns.index_select(1, right)
    rows = (a + (b - a) * x[:, None, None]).transpose(1, 2).contiguous()
    a, b = rows.index_select(1, top), rows.index_select(1, bottom)
    return (a + (b - a) * y[:, None, None]).permute(0, 3, 1, 2)  # channels_last in memory
