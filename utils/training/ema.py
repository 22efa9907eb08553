"""Exponential moving average of the trainable weights: ema <- decay * ema + (1 - decay) * weight."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class EMA:
    """Follows those of the named parameters that require a gradient, in one multi-tensor kernel per update.

    Starts as a copy. Its state dict has their names only; a whole one is `model.state_dict() | ema.state_dict()`.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]], decay: float):
        trainable = {name: weight for name, weight in named_parameters if weight.requires_grad}
        self.names, self.weights = list(trainable), list(trainable.values())
        self.averages = [weight.detach().clone() for weight in self.weights]
        self.average = get_ema_multi_avg_fn(decay)  # a foreach lerp

    def update(self) -> None:
        self.average(self.averages, self.weights, None)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(zip(self.names, self.averages))

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take the averages out of `state`, which may be a whole state dict. ValueError for one of another shape."""
        for name, average in zip(self.names, self.averages):
            if state[name].shape != average.shape:  # copying would broadcast it
                raise ValueError(f"{name} is {tuple(state[name].shape)}, not {tuple(average.shape)}")
            average.copy_(state[name])
