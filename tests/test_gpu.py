"""What only a CUDA device can show; skipped without one. Written on a machine without a GPU."""

import pytest
import torch

from models import Phases, SamplingSettings, generate_tokens
from tests.helpers import small_run
from tests.helpers.nano import stirred_nano
from utils.noise import Purpose, normals, uniforms, words
from utils.sampling.draws import image_noise
from utils.sampling.graphs import compile_pieces, static_phases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SETTINGS = SamplingSettings(cfg_scale=2.0, num_sampling_steps=4)


def generate(model, device, phases=None):
    images = torch.arange(3, device=device)
    noise = image_noise(0, images, SETTINGS.num_noise, model.config.latent_dim)
    return generate_tokens(model, images, SETTINGS, noise, phases).cpu()


def test_noise_is_that_of_the_cpu():
    index = torch.arange(1000)
    for draw in (words, uniforms):
        pair = [draw(7, Purpose.SAMPLING, index, count=16, device=device).cpu() for device in ("cpu", "cuda")]
        assert torch.equal(*pair)
    pair = [normals(7, Purpose.SAMPLING, index, count=16, device=device).cpu() for device in ("cpu", "cuda")]
    assert torch.allclose(*pair, atol=1e-6)
    assert (pair[0] != pair[1]).float().mean() < 1e-3


@pytest.mark.parametrize("compiled, graphs", [(False, True), (True, False), (True, True)])
def test_graphs_generate_what_eager_float32_does(compiled, graphs):
    model = stirred_nano()
    expected = generate(model, "cpu")
    model = model.cuda()
    assert torch.allclose(generate(model, "cuda"), expected, atol=1e-3)
    step = compile_pieces(model) if compiled else None
    phases = static_phases(Phases.of(model, SETTINGS, step), model.config.num_class_tokens, graphs)
    for _ in range(2):  # captured, then replayed
        assert torch.allclose(generate(model, "cuda", phases), expected, atol=1e-3)


@pytest.mark.parametrize("stage", ["svae", "ar"])
def test_bf16_training_runs_and_loads(tmp_path, stage):
    data, svae = small_run.write_tar(tmp_path / "train.tar"), small_run.write_svae(tmp_path / "svae.pt")
    command = small_run.flags(data, tmp_path / "run", "--max-steps", 4, svae=svae if stage == "ar" else None)
    state = small_run.run_here(*command)
    assert all(value.isfinite().all() for value in state["model"].values() if value.is_floating_point())
