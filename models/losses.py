"""Terms of the S-VAE's objective: 1.0 L1 + 1.0 LPIPS + 0.5 hinge + 0.004 KL in the recipe. Images are in [-1, 1]."""

import torch
import torch.nn.functional as F


def reconstruction_loss(reconstruction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Mean absolute error per value, in float32."""
    return F.l1_loss(reconstruction.float(), images.float())


def adversarial_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """Generator's side of the hinge game: raise the discriminator's logits on reconstructions."""
    return -fake_logits.float().mean()


def discriminator_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """Discriminator's side of the hinge game: half of each of the two terms."""
    return 0.5 * (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean())


def adversarial_weight(step: int, *, weight: float, start: int) -> float:
    """Weight of both sides of the game at update `step` (from 0): 0 while step + 1 < start."""
    return weight if step + 1 >= start else 0.0
