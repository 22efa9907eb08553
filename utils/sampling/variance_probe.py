"""The collapse, measured: what a token is before its projection, position by position (SphereAR, section on scale).

Letters: B images · P tokens · C latent channels.
"""

import torch
from torch import Tensor


class VarianceProbe:
    """Watches a generation of `num_images` images (generate_tokens' `observe`) and keeps its raw tokens."""

    def __init__(self, num_images: int):
        self.num_images = num_images
        self._raw: list[Tensor] = []

    def __call__(self, position: int, raw: Tensor, token: Tensor) -> None:
        self._raw.append(raw[: self.num_images].float().cpu())  # at token 0 the null rows' own token lies behind

    @property
    def raw(self) -> Tensor:
        """Raw tokens (B, P, C)."""
        return torch.stack(self._raw, dim=1)


def scale_of_tokens(raw: Tensor, reference: Tensor) -> dict[str, list[float]]:
    """What the collapse shows in, of raw tokens (B, P, C), by position.

    norm and norm_sd: mean and deviation of ‖token‖ over images. sd: deviation between images, root mean square over
    dimensions; sd_least and sd_greatest: of a single dimension. cosine: to `reference` (B, P, C), the same images by
    another run, mean over images.
    """
    norms, deviations = raw.norm(dim=-1), raw.std(dim=0)  # (B, P), (P, C)
    found = {
        "norm": norms.mean(0),
        "norm_sd": norms.std(0),
        "sd": deviations.square().mean(-1).sqrt(),
        "sd_least": deviations.amin(-1),
        "sd_greatest": deviations.amax(-1),
        "cosine": torch.cosine_similarity(raw, reference, dim=-1).mean(0),
    }
    return {name: values.tolist() for name, values in found.items()}
