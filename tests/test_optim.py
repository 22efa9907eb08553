"""AdamW's groups, the learning rate of each step, the update that skips, and the moving average."""

import math

import pytest
import torch
from torch import nn

from models import PRESETS, SphereAR
from utils.training.ema import EMA
from utils.training.optim import build_adamw, learning_rate, load_optimizer, poison, update
from utils.training.players import make_player


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def adamw(model: nn.Module, lr: float = 0.1) -> torch.optim.AdamW:
    return build_adamw(model.named_parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.05)


def test_what_decays_in_the_ar_model():
    with torch.device("meta"):
        model = SphereAR(PRESETS["SphereAR-Nano"])
    model.vae.requires_grad_(False)
    optimizer = adamw(model)
    names = {id(weight): name for name, weight in model.named_parameters()}
    decayed, plain = ({names[id(w)] for w in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]
    assert {"layers.0.attention.wqkv.weight", "pos_for_diff.weight", "head.net.cond_embed.weight"} <= decayed
    assert {
        "proj_in.weight",
        "proj_in.bias",
        "cls_embedding.weight",
        "norm.weight",
        "head.net.cond_embed.bias",
    } <= plain
    assert decayed | plain == {name for name in names.values() if not name.startswith("vae.")}


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.0), (5, 0.5), (10, 1.0), (19, 1.0), (20, 1.0), (60, 0.5 + 0.1 / 2), (100, 0.1)],
)
def test_learning_rate(step, expected):
    schedule = dict(lr=1.0, min_lr=0.1, warmup_steps=10, decay_start=20, total_steps=101)
    assert learning_rate(step, **schedule) == pytest.approx(expected)


def test_learning_rate_quarter_of_the_cosine_and_off():
    schedule = dict(lr=1.0, min_lr=0.0, warmup_steps=-1, decay_start=0, total_steps=101)
    assert learning_rate(25, **schedule) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert {learning_rate(s, **{**schedule, "decay_start": -1}) for s in (0, 50, 100)} == {1.0}


def test_a_norm_of_0_does_not_clip():
    steps = []
    for max_grad_norm in (0, 1e9, 1e-9):
        model = small_model()
        norm = backward_and_update(model, max_grad_norm)
        steps.append((norm, [weight.clone() for weight in model.parameters()]))
    assert steps[0][0] == steps[1][0] > 1
    assert all(torch.equal(a, b) for a, b in zip(steps[0][1], steps[1][1]))
    assert not torch.equal(steps[0][1][0], steps[2][1][0])


def backward_and_update(model: nn.Module, max_grad_norm: float) -> torch.Tensor:
    """One step of plain SGD-like AdamW whose size shows the gradient's: betas of 0 and a large epsilon."""
    optimizer = build_adamw(model.named_parameters(), lr=0.1, betas=(0.0, 0.0), weight_decay=0.0)
    for group in optimizer.param_groups:
        group["eps"] = 10.0
    model(torch.full((5, 3), 9.0)).square().sum().backward()
    return update(optimizer, list(model.parameters()), max_grad_norm=max_grad_norm)


def test_update_is_adamw_with_clipping():
    model, reference = small_model(), small_model()
    optimizer = adamw(model)
    groups = [{**g, "params": []} for g in optimizer.param_groups]
    for group, own in zip(groups, optimizer.param_groups):
        ids = {id(w) for w in own["params"]}
        group["params"] = [r for r, w in zip(reference.parameters(), model.parameters()) if id(w) in ids]
    plain = torch.optim.AdamW([{"params": g["params"], "weight_decay": g["weight_decay"]} for g in groups],
                              lr=0.1, betas=(0.9, 0.95), fused=False, foreach=False)  # fmt: skip
    for scale in (1.0, 100.0):
        x = torch.randn(5, 3)
        (scale * model(x).square().sum()).backward()
        (scale * reference(x).square().sum()).backward()
        expected = torch.stack([w.grad.norm() for w in reference.parameters()]).norm()
        nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        plain.step()
        plain.zero_grad()
        norm = update(optimizer, list(model.parameters()), max_grad_norm=1.0)
        torch.testing.assert_close(norm, expected)
        assert all(w.grad is None for w in model.parameters())
    for own, other in zip(model.parameters(), reference.parameters()):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_changes_nothing(bad):
    model = small_model()
    optimizer = adamw(model)
    weights = list(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    update(optimizer, weights, max_grad_norm=1.0)
    before = [w.detach().clone() for w in weights]
    moments = [value.clone() for state in optimizer.state.values() for value in state.values()]
    model(torch.randn(5, 3)).sum().backward()
    weights[2].grad[0] = bad
    assert not update(optimizer, weights, max_grad_norm=1.0).isfinite()
    assert all(torch.equal(a, b) for a, b in zip(before, weights))
    after = [value for state in optimizer.state.values() for value in state.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, after))
    model(torch.randn(5, 3)).sum().backward()
    update(optimizer, weights, max_grad_norm=1.0)
    assert not any(torch.equal(a, b) for a, b in zip(before, weights))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_poison(bad):
    x = torch.tensor([1.5, -2.0], requires_grad=True)
    good = poison(x.square().sum())
    assert good == 6.25
    assert torch.equal(torch.autograd.grad(good, x)[0], 2 * x)
    # an infinite loss may have finite gradients: |x - inf|
    assert torch.autograd.grad(poison((x - bad).abs().sum()), x)[0].isnan().all()


def test_ema():
    model = small_model()
    model[0].weight.requires_grad_(False)
    ema = EMA(model.named_parameters(), 0.75)
    start = {name: w.detach().clone() for name, w in model.named_parameters()}
    assert ema.state_dict().keys() == start.keys() - {"0.weight"}
    with torch.no_grad():
        for w in model.parameters():
            w.add_(1)
    ema.update()
    ema.update()
    for name, average in ema.state_dict().items():
        torch.testing.assert_close(average, start[name] + 1 - 0.75**2)
    other = EMA(small_model().named_parameters(), 0.75)
    other.load_state_dict({**model.state_dict(), **ema.state_dict(), "0.weight": torch.zeros(4, 3)})
    assert torch.equal(other.state_dict()["0.bias"], ema.state_dict()["0.bias"])


def test_fp16_scales_and_skips():
    """On a CPU by its own GradScaler: the same interface as a GPU's."""
    model, reference = small_model(), small_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer, plain = adamw(model), adamw(reference)
    x = torch.randn(5, 3)
    scaler.scale(model(x).square().sum()).backward()
    reference(x).square().sum().backward()
    norm = update(optimizer, list(model.parameters()), max_grad_norm=1.0, scaler=scaler)
    torch.testing.assert_close(norm, update(plain, list(reference.parameters()), max_grad_norm=1.0))
    for own, other in zip(model.parameters(), reference.parameters()):
        torch.testing.assert_close(own, other)
    before = [w.detach().clone() for w in model.parameters()]
    scaler.scale(model(x).square().sum() * float("inf")).backward()
    update(optimizer, list(model.parameters()), max_grad_norm=1.0, scaler=scaler)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert scaler.get_scale() == 512.0


def test_a_player_without_a_loss_yet_only_decays_in_fp16():
    """As the discriminator before its start: its scaler has scaled nothing, and its scale must not grow meanwhile."""
    module = small_model()
    player = make_player(
        "discriminator", module, torch.device("cpu"), lr=0.1, betas=(0.9, 0.95), weight_decay=0.5, is_fp16=True,
        num_parts=1,
    )  # fmt: skip
    weight = module[0].weight.detach().clone()
    player.backward_of_nothing()
    assert player.update(1.0) == 0
    torch.testing.assert_close(module[0].weight, weight * (1 - 0.1 * 0.5))
    player.backward(module(torch.randn(5, 3)).square().sum())
    assert player.update(1.0) > 0
    assert player.scaler.get_scale() == 65536.0
    assert not torch.equal(module[0].weight, weight * (1 - 0.1 * 0.5) ** 2)


def test_states_of_another_memory_format_are_laid_out_as_the_weights():
    """A GPU's S-VAE is channels_last: its moments go to a contiguous CPU model, and the next step is the same."""
    torch.manual_seed(0)
    there = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    here = nn.Conv2d(4, 6, 3)
    here.load_state_dict(there.state_dict())
    x = torch.randn(2, 4, 5, 5)
    first, second = adamw(there), adamw(here)
    there(x).square().sum().backward()
    update(first, list(there.parameters()), max_grad_norm=1.0)
    here.load_state_dict(there.state_dict())
    load_optimizer(second, first.state_dict())
    for module, optimizer in ((there, first), (here, second)):
        module(x).square().sum().backward()
        update(optimizer, list(module.parameters()), max_grad_norm=1.0)
    torch.testing.assert_close(here.weight, there.weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("broken", ["shape", "none", "empty"])
def test_an_optimizer_of_another_model_is_refused(broken):
    """Fused AdamW would read beyond the end of a moment that is too small."""
    weight = nn.Parameter(torch.zeros(4, 5))
    optimizer = build_adamw([("a", weight)], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    state = optimizer.state_dict()
    if broken == "shape":
        state["state"][0]["exp_avg"] = torch.zeros(3)
    with pytest.raises(ValueError, match="the checkpoint's optimizer"):
        load_optimizer(optimizer, {"shape": state, "none": None, "empty": {}}[broken])
