"""AdamW as the recipe sets it: which weights decay, the learning rate of a step, and an update that skips bad steps."""

import math
from collections.abc import Iterable

import torch
from torch import nn

UNDECAYED = ("proj_in", "cls_embedding")


def decays(name: str, weight: torch.Tensor) -> bool:
    """Weight decay is for matrices and convolutions, but not for proj_in and cls_embedding (the recipe's rule)."""
    return weight.ndim >= 2 and not any(part in name for part in UNDECAYED)


def build_adamw(
    named_parameters: Iterable[tuple[str, nn.Parameter]], *, lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """Fused AdamW over the parameters that require a gradient: group 0 decays, group 1 does not."""
    trainable = [(name, weight) for name, weight in named_parameters if weight.requires_grad]
    groups = [
        {"params": [weight for name, weight in trainable if decays(name, weight)], "weight_decay": weight_decay},
        {"params": [weight for name, weight in trainable if not decays(name, weight)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def learning_rate(
    step: int, *, lr: float, min_lr: float, warmup_steps: int, decay_start: int, total_steps: int
) -> float:
    """Learning rate of update `step` (counted from 0, so the first step of a warm-up has 0).

    Linear warm-up over `warmup_steps`, then `lr`, then from `decay_start` a cosine that is `min_lr` at the last step;
    -1 turns either off.
    """
    if step < warmup_steps:
        return lr * step / warmup_steps
    if decay_start < 0 or step < decay_start:
        return lr
    done = (step - decay_start) / max(1, total_steps - 1 - decay_start)
    return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * min(1.0, done))) / 2


def set_lr(optimizers: Iterable[torch.optim.Optimizer], lr: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Take over a state dict, as copies that lie in memory as the weights do.

    A GPU's checkpoint has channels_last moments where a CPU's weights are contiguous, and the other way round; fused
    AdamW on a CPU would silently pair the wrong elements.
    """
    try:
        optimizer.load_state_dict(state)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"the checkpoint's optimizer is not this model's: {error}") from None
    for weight, moments in optimizer.state.items():
        for name, value in moments.items():
            if name.startswith("exp_avg") and value.shape != weight.shape:  # fused AdamW would read beyond its end
                raise ValueError(f"the checkpoint's optimizer has {name} {tuple(value.shape)} of {tuple(weight.shape)}")
            like = weight if value.shape == weight.shape else value
            moments[name] = torch.empty_like(like, dtype=value.dtype, device=value.device).copy_(value)


def poison(loss: torch.Tensor) -> torch.Tensor:
    """`loss` itself where it is finite; otherwise a loss whose every gradient is NaN.

    The gradients are then not finite on all processes after their reduction, so that one look at the gradient norm,
    on the device, tells every process to skip the update.
    """
    return loss * (loss.detach() * 0 + 1)


def update(
    optimizer: torch.optim.AdamW,
    weights: list[nn.Parameter],
    *,
    max_grad_norm: float,
    scaler: torch.amp.GradScaler | None = None,
) -> torch.Tensor:
    """Clip (to 0: not), then update unless the gradient is not finite; its norm before, 0-dim, on the device.

    The decision stays on the device: fused AdamW leaves weights and state as they are where `found_inf` is 1, the
    interface that GradScaler uses. `scaler`: what the loss was scaled by (fp16), None where it was not.
    """
    if scaler is not None:
        scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(weights, max_grad_norm or math.inf)
    if scaler is None:
        optimizer.grad_scale, optimizer.found_inf = None, (~torch.isfinite(norm)).float()
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm
