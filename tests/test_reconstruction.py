"""The command that measures an S-VAE, and the noise it puts on tokens."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from examples import reconstruction
from models import SVAE
from tests.helpers.evaluation import Instant, random_images, use_instant
from tests.helpers.nano import NANO, tokens_of
from tests.helpers.small_run import write_svae, write_tar


@pytest.fixture
def here(tmp_path, monkeypatch):
    use_instant(monkeypatch, Instant())
    monkeypatch.setattr(reconstruction, "vgg_weights", no_weights)
    write_svae(tmp_path / "vae.pt")
    np.savez(tmp_path / "real.npz", random_images(6, 32).numpy())
    return tmp_path


def no_weights(file):
    raise ValueError(f"--vgg-weights {file or 'the download'}: VGG16's weights cannot be read")


def run(here, *flags, data="real.npz"):
    words = [here / "vae.pt", here / data, "--out", here / "out.json", *flags]
    code = reconstruction.main([str(word) for word in words])
    return code, json.loads((here / "out.json").read_text()) if (here / "out.json").exists() else None


@pytest.mark.parametrize("angle", [0.1, 0.4, math.pi])
def test_a_turn_keeps_the_norm_and_has_its_angle(angle):
    tokens = tokens_of(NANO, 3)
    noise = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1))
    moved = reconstruction.turned(tokens, angle, noise)
    assert torch.allclose(moved.norm(dim=-1), tokens.norm(dim=-1))
    cosine = torch.cosine_similarity(moved.double(), tokens.double(), dim=-1)
    assert torch.allclose(cosine, torch.full_like(cosine, math.cos(angle)), atol=1e-6)


@pytest.mark.parametrize("scale", [None, 2.0])
def test_flat_tokens_get_noise_of_a_turns_energy(scale):
    config = replace(NANO.svae, posterior="gaussian", projection="none", latent_scale=scale)
    tokens = torch.randn(64, 16, 8, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1))
    on_sphere = tokens_of(NANO, 64)
    chord = (reconstruction.turned(on_sphere, 0.4, noise) - on_sphere).square().mean()
    moved = reconstruction.disturbed(SVAE(config), tokens, 0.4, noise)
    assert (moved - tokens).square().mean() == pytest.approx(chord.item(), rel=0.05)
    assert not torch.isclose(moved.norm(dim=-1), tokens.norm(dim=-1), rtol=1e-3).all()


def test_a_row_for_every_angle_with_less_noise_nearer_to_the_images(here, capsys):
    code, record = run(here, "--angles", 0.2, 3)
    rows = record["reconstruction"]
    assert code == 0 and [row["angle"] for row in rows] == [0, 0.2, 3]
    assert set(rows[0]) == {"angle", "rFID", "PSNR", "SSIM"} and record["noise"] == "tangential"
    assert len({row["rFID"] for row in rows}) == 3
    told = capsys.readouterr()
    assert "| 0.2 | " in told.out and told.err.startswith("no LPIPS: --vgg-weights the download")
    (here / "out.json").unlink()
    assert run(here, "--angles", 0.2, 3)[1]["reconstruction"] == rows  # seeded


def test_a_tar_gives_its_crops_and_lpips_where_there_are_weights(here, monkeypatch):
    write_tar(here / "data.tar")
    monkeypatch.setattr(reconstruction, "vgg_weights", lambda file: {})
    monkeypatch.setattr(reconstruction, "LPIPS", lambda state: Difference())
    code, record = run(here, "--angles", 0.4, "--num-images", 10, data="data.tar")
    assert code == 0 and record["images"] == 10
    assert record["reconstruction"][0]["LPIPS"] > 0


class Difference:
    def to(self, device):
        return self

    def __call__(self, made, images):
        assert made.shape == images.shape and made.abs().max() <= 1
        return (made - images).abs().mean((1, 2, 3))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--angles", 4], "--angles: 4 must lie in [0.0, 3.14"),
        (["--vgg-weights", "nowhere.pth"], "--vgg-weights nowhere.pth"),
        (["--num-images", 1], "--num-images: 1 must be at least 2"),
    ],
)
def test_mistakes_are_one_line(here, capsys, flags, message):
    assert run(here, *flags) == (2, None)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]


def test_no_file_is_overwritten_and_a_folder_must_be_there_before_the_work(here, capsys, monkeypatch):
    monkeypatch.setattr(reconstruction.checkpoint_file, "examine", lambda path: pytest.fail("work has begun"))
    before = (here / "vae.pt").read_bytes()
    assert run(here, "--out", here / "vae.pt")[0] == 2
    assert "vae.pt: is there already; remove it, or choose another name" in capsys.readouterr().err
    assert (here / "vae.pt").read_bytes() == before
    assert run(here, "--out", here / "no/out.json")[0] == 2
    assert f"there is no folder {here / 'no'}" in capsys.readouterr().err


def test_bad_data_is_called_as_it_is_here(here, capsys):
    assert run(here, data="nowhere.tar") == (2, None)
    assert f"error: {here / 'nowhere.tar'}: no such file" in capsys.readouterr().err


def test_images_of_another_size_are_refused(here, capsys):
    np.savez(here / "large.npz", random_images(6, 48).numpy())
    assert run(here, data="large.npz") == (2, None)
    assert "images are 48 x 48, the S-VAE's 32 wide" in capsys.readouterr().err
