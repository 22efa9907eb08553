"""Terms of the S-VAE's objective, the PatchGAN and LPIPS."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torchvision.models import vgg16

from models.discriminator import PatchDiscriminator
from models.losses import adversarial_loss, adversarial_weight, discriminator_loss, reconstruction_loss
from models.lpips import LPIPS, head_weights, vgg_weights


def test_values():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.5])
    assert discriminator_loss(real, fake).item() == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1.5) / 2))
    assert adversarial_loss(fake).item() == pytest.approx(0.75)
    assert reconstruction_loss(torch.tensor([1.0, -1.0]), torch.tensor([0.5, 1.0])).item() == pytest.approx(1.25)


def test_the_game_starts_when_told():
    weights = [adversarial_weight(step, weight=0.5, start=20_000) for step in (0, 19_998, 19_999, 30_000)]
    assert weights == [0, 0, 0.5, 0.5]


def test_patchgan_is_pix2pix():
    discriminator = PatchDiscriminator()
    convolutions = [m for m in discriminator.modules() if isinstance(m, nn.Conv2d)]
    assert [(m.out_channels, m.stride[0], m.bias is not None) for m in convolutions] == [
        (64, 2, True), (128, 2, False), (256, 2, False), (512, 1, False), (1, 1, True),
    ]  # fmt: skip
    assert sum(w.numel() for w in discriminator.parameters()) == 2_765_633
    assert sum(isinstance(m, nn.BatchNorm2d) for m in discriminator.modules()) == 3
    assert abs(convolutions[3].weight.std().item() - 0.02) < 1e-3
    images = torch.randn(2, 3, 256, 256, requires_grad=True)
    logits = discriminator(images)
    assert logits.shape == (2, 1, 30, 30)
    # 70 x 70: look through the norms, which couple all pixels, by freezing them
    for m in discriminator.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.forward = lambda x: x
    (gradient,) = torch.autograd.grad(discriminator(images)[0, 0, 15, 15], images)
    rows = gradient[0].abs().sum((0, 2)).nonzero()
    assert rows.max() - rows.min() + 1 == 70


def vgg_state() -> dict[str, torch.Tensor]:
    """Random weights of VGG16's convolutions, of a size that keeps activations alive."""
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in vgg16(weights=None).features.state_dict().items()}
    return {
        f"features.{name}": torch.randn(shape) * (2 / shape[1:].numel()) ** 0.5
        if len(shape) > 1
        else torch.zeros(shape)
        for name, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def lpips():
    return LPIPS(vgg_state())


def test_lpips_equals_the_published_package(lpips):
    """The package's own network with the same random VGG16."""
    package = pytest.importorskip("lpips")
    with torch.device("meta"):
        theirs = package.LPIPS(net="vgg", pnet_rand=True, pretrained=False, verbose=False)
    theirs = theirs.to_empty(device="cpu").eval()
    theirs.scaling_layer = package.ScalingLayer()
    for layer, head in zip(theirs.lins, head_weights()):
        layer.model[1].weight.data = head
    convolutions = [m for m in theirs.net.modules() if isinstance(m, nn.Conv2d)]
    ours = [m for m in lpips.stages.modules() if isinstance(m, nn.Conv2d)]
    assert len(ours) == len(convolutions) == 13
    for mine, other in zip(ours, convolutions):
        other.load_state_dict(mine.state_dict())
    x, y = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = theirs(x, y).flatten()
    torch.testing.assert_close(lpips(x, y), expected, rtol=1e-5, atol=1e-7)
    assert expected.min() > 0


def test_lpips_is_frozen_and_in_eval_mode_always(lpips):
    parent = nn.ModuleList([lpips]).train()
    assert parent.training and not any(m.training for m in lpips.modules())
    assert not any(w.requires_grad for w in lpips.parameters())
    x = torch.zeros(1, 3, 32, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(lpips(x, torch.randn(1, 3, 32, 32)).sum(), x)
    assert gradient.isfinite().all() and gradient.abs().max() > 0
    assert lpips(x, x).item() == 0


def test_heads_come_from_the_file_without_running_the_package():
    code = "import sys; from models.lpips import head_weights; print(len(head_weights()), 'lpips' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == ["5", "False"]
    assert [tuple(head.shape) for head in head_weights()] == [(1, c, 1, 1) for c in (64, 128, 256, 512, 512)]
    assert all(head.min() >= 0 for head in head_weights())


def test_missing_or_wrong_weights_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"--vgg-weights .*nowhere.pth.*--perceptual-weight 0"):
        vgg_weights(tmp_path / "nowhere.pth")
    (tmp_path / "wrong.pth").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"--vgg-weights .*wrong.pth"):
        vgg_weights(tmp_path / "wrong.pth")
    torch.save(vgg_state(), tmp_path / "right.pth")
    assert "features.28.weight" in vgg_weights(tmp_path / "right.pth")
    monkeypatch.setattr("models.lpips.HEADS_MD5", "0" * 32)
    with pytest.raises(ValueError, match="md5"):
        head_weights()
