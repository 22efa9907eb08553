"""LPIPS with VGG16 (Zhang et al. 2018): a frozen distance between images, made for training a reconstruction.

The features are torchvision's VGG16; the five linear heads are the data file of the `lpips` package.
"""

import hashlib
import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import VGG16_Weights, vgg16

HEADS_MD5 = "d507d7349b931f0638a25a48a722f98a"
STAGE_ENDS = 4, 9, 16, 23, 30  # after relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def head_weights() -> list[Tensor]:
    """The five heads (1, channels, 1, 1), read from the installed package's file; its code is not run.

    Raises ValueError when the package is missing or its file is not the one that everybody has.
    """
    package = importlib.util.find_spec("lpips")
    if package is None:
        raise ValueError("--perceptual-weight needs the package lpips (pip install lpips), or set it to 0")
    path = Path(package.submodule_search_locations[0], "weights/v0.1/vgg.pth")
    digest = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    if digest != HEADS_MD5:
        raise ValueError(f"{path}: md5 {digest} is not {HEADS_MD5}: reinstall the package lpips")
    heads = torch.load(path, map_location="cpu", weights_only=True)
    return [heads[f"lin{i}.model.1.weight"] for i in range(len(STAGE_ENDS))]


def vgg_weights(file: str | Path | None = None) -> dict[str, Tensor]:
    """torchvision's VGG16 state dict, from `file` or else from its download (528 MB, once, into torch's cache).

    Raises ValueError when the file holds something else or the download fails.
    """
    url = VGG16_Weights.IMAGENET1K_V1.url
    try:
        if file is not None and not Path(file).is_file():
            raise OSError(f"{file} is no file")
        if file is not None:
            return torch.load(file, map_location="cpu", weights_only=True)
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except Exception as error:  # network, file system, damaged or hostile file
        remedy = "give torchvision's vgg16-397923af.pth with --vgg-weights FILE, or set --perceptual-weight 0"
        if file is None or isinstance(error, OSError):
            reason = getattr(error, "strerror", None) or (str(error).strip() or type(error).__name__).splitlines()[0]
        else:  # torch's own advice, to read it without protection, is never repeated
            reason = "no file of weights, or damaged"
        raise ValueError(f"--vgg-weights {file or url}: VGG16's weights cannot be read ({reason}); {remedy}") from error


class LPIPS(nn.Module):
    """Distance (B,) of images (B, 3, S, S) in [-1, 1], S >= 16. Frozen, and in eval mode always.

    state: torchvision's VGG16 state dict (its classifier is not used).
    """

    def __init__(self, state: dict[str, Tensor]):
        super().__init__()
        with torch.device("meta"):
            features = vgg16(weights=None, init_weights=False).features[: STAGE_ENDS[-1]]
        prefix = "features."
        convolutions = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        try:
            features.load_state_dict(convolutions, assign=True)
        except RuntimeError as error:
            raise ValueError("--vgg-weights: the file holds other weights than torchvision's VGG16") from error
        for module in features:
            if isinstance(module, nn.ReLU):
                module.inplace = False  # the values before it are needed for its gradient under compilation
        starts = 0, *STAGE_ENDS[:-1]
        self.stages = nn.ModuleList(features[start:end] for start, end in zip(starts, STAGE_ENDS))
        for i, head in enumerate(head_weights()):
            self.register_buffer(f"head{i}", head)
        self.register_buffer("shift", torch.tensor(SHIFT).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(3, 1, 1))
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> "LPIPS":
        return self

    def forward(self, images: Tensor, reference: Tensor) -> Tensor:
        x, y = ((image.float() - self.shift) / self.scale for image in (images, reference))
        distance = 0.0
        for i, stage in enumerate(self.stages):
            x = stage(x)
            with torch.no_grad():
                y = stage(y)
            difference = (unit_channels(x) - unit_channels(y)).square()
            distance = distance + (difference * getattr(self, f"head{i}")).sum(1).mean((1, 2))
        return distance


def unit_channels(x: Tensor) -> Tensor:
    """x (B, C, H, W) in float32 with every channel vector of length 1, or 0 where it is 0."""
    return F.normalize(x.float(), dim=1, eps=1e-10)
