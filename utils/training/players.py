"""The players of a training: the model, and in the S-VAE's stage the discriminator. Each has its own optimizer."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils import distributed
from utils.training import optim


@dataclass
class Player:
    """A module in training, with what its gradients pass through. Call it for its forward pass."""

    name: str  # "model" or "discriminator"
    graph: nn.Module  # the module; on several processes inside DistributedDataParallel
    weights: list[nn.Parameter]  # those that require a gradient
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler  # disabled but for fp16
    is_scaled: bool = False  # whether the gradients of this step are

    @property
    def prefix(self) -> str:
        """Before its names in a checkpoint and in the log."""
        return "" if self.name == "model" else f"{self.name}_"

    def __call__(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.graph(*inputs)

    def reduces(self, is_last: bool) -> AbstractContextManager:
        """Around one part of a step: gradients are summed over processes with the last part only."""
        held_back = isinstance(self.graph, DistributedDataParallel) and not is_last
        return self.graph.no_sync() if held_back else nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(optim.poison(loss)).backward()
        self.is_scaled = self.scaler.is_enabled()

    def backward_of_nothing(self) -> None:
        """Gradients of 0: the update is then weight decay alone."""
        for weight in self.weights:
            weight.grad = torch.zeros_like(weight)
        self.is_scaled = False

    def update(self, max_grad_norm: float) -> Tensor:
        """Update the weights where the gradient is finite; the gradient's norm before clipping, 0-dim."""
        scaler = self.scaler if self.is_scaled else None
        return optim.update(self.optimizer, self.weights, max_grad_norm=max_grad_norm, scaler=scaler)

    def has_finite_weights(self) -> bool:
        return bool(nn.utils.get_total_norm(self.weights, norm_type=float("inf")).isfinite())

    def load_scaler(self, state: dict) -> None:
        """Take over the scale, where this run has one. ValueError for what is no scaler's state."""
        if not isinstance(state, dict) or (state and not 0 < state["scale"] < float("inf")):
            raise ValueError("no state of a scaler")
        if state and self.scaler.is_enabled():
            self.scaler.load_state_dict(state)


def make_player(
    name: str,
    module: nn.Module,
    device: torch.device,
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    is_fp16: bool,
    num_parts: int,
) -> Player:
    """A player of those weights of `module`, on `device`, that require a gradient; num_parts: parts of a step."""
    optimizer = optim.build_adamw(module.named_parameters(), lr=lr, betas=betas, weight_decay=weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=is_fp16)
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    if distributed.world_size() > 1:
        module = DistributedDataParallel(
            module,
            device_ids=[device.index] if device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            static_graph=num_parts == 1,  # torch cannot hold gradients back (no_sync) in a static graph
        )
    return Player(name, module, weights, optimizer, scaler)
