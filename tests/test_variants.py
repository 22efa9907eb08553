"""The paper's ablations as settings: every variant is trained in both stages, and sampled, by the same scripts."""

import numpy as np
import pytest
import torch

import sample_ddp
import train
from models import from_checkpoint
from tests.helpers import small_run
from utils import checkpoint_file

VARIANTS = {
    "vmf": ["--posterior", "vmf"],
    "gaussian": ["--posterior", "gaussian"],
    "gaussian, decoder": ["--posterior", "gaussian", "--projection", "decoder"],
    "gaussian, all": ["--posterior", "gaussian", "--projection", "all"],
    "fixed sigma": ["--posterior", "fixed-sigma", "--sigma", "0.2"],
    "random sigma": ["--posterior", "random-sigma", "--sigma", "0.2"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small_run.write_tar(tmp_path_factory.mktemp("variants") / "train.tar")


def train_svae(data, folder, *flags, steps=2):
    assert train.main(small_run.flags(data, folder, "--disc-weight", 0, "--max-steps", steps, *flags)) == 0
    return folder / "checkpoints" / "last.pt"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_trains_and_samples(data, tmp_path, variant, capsys):
    svae = train_svae(data, tmp_path / "svae", *VARIANTS[variant])
    measured = "latents: mean" in capsys.readouterr().out
    config = checkpoint_file.load(svae, from_checkpoint).config
    assert measured == config.is_flat == (config.latent_scale is not None)

    small_run.run_here(*small_run.flags(data, tmp_path / "ar", "--max-steps", 2, svae=svae))
    ckpt = tmp_path / "ar" / "checkpoints" / "last.pt"
    assert checkpoint_file.load(ckpt, from_checkpoint).config.svae == config

    sampling = ["--ckpt", ckpt, "--sample-dir", tmp_path / "samples", "--num-fid-samples", 3, "--to-npz"]
    assert sample_ddp.main([str(word) for word in [*sampling, "--num-sampling-steps", 2]]) == 0
    with np.load(tmp_path / "samples" / "samples.npz", allow_pickle=False) as arrays:
        assert arrays["arr_0"].shape == (3, 32, 32, 3)


def test_the_scale_of_flat_latents_is_measured_on_the_final_weights(data, tmp_path):
    """52 images, whose latents are then standard ones; and a longer run measures anew."""
    path = train_svae(data, tmp_path / "svae", "--posterior", "gaussian", "--ema", 0)
    first = checkpoint_file.load(path, from_checkpoint).config
    path = train_svae(data, tmp_path / "svae", "--posterior", "gaussian", "--ema", 0, steps=5)
    svae = checkpoint_file.load(path, from_checkpoint)
    assert svae.config.latent_scale != first.latent_scale
    torch.manual_seed(0)
    images = torch.stack([sample.image for sample in images_of(data)]).float() / 127.5 - 1
    tokens = svae.to_tokens(svae.encode(images).sample())
    assert tokens.mean().item() == pytest.approx(0, abs=0.05)
    assert tokens.std().item() == pytest.approx(1, abs=0.05)


def images_of(data):
    from dataset import build_dataset

    dataset = build_dataset(data, 32, num_classes=small_run.CLASSES, seed=0)
    return [dataset[i] for i in range(len(dataset))]


def test_an_s_vae_whose_scale_is_not_measured_yet_is_refused(data, tmp_path, capsys):
    path = train_svae(data, tmp_path / "svae", "--posterior", "gaussian")
    state = checkpoint_file.read(path)
    state["config"] |= {"latent_shift": 0.0, "latent_scale": None}
    checkpoint_file.write(state, tmp_path / "early.pt")
    assert train.main(small_run.flags(data, tmp_path / "ar", svae=tmp_path / "early.pt")) == 2
    assert "early.pt: its latents' scale is not measured yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--posterior", "gaussian"], "--posterior gaussian: the S-VAE"),
        (["--projection", "none"], "--projection none: the S-VAE"),
        (["--sigma", "0.2"], "--sigma 0.2: is for the S-VAE's training"),
    ],
)
def test_the_ar_stage_refuses_what_contradicts_its_svae(data, tmp_path, flags, message, capsys):
    svae = small_run.write_svae(tmp_path / "svae.pt")
    assert train.main(small_run.flags(data, tmp_path / "ar", *flags, svae=svae)) == 2
    assert message in capsys.readouterr().err
