"""The sweep at its smallest: what it samples, what it keeps, what it shows."""

import json

import numpy as np
import pytest
import torch

from examples import sweep
from models import checkpoint_state, config_to_dict
from tests.helpers.evaluation import Instant, random_images, use_instant
from tests.helpers.nano import NANO
from tests.helpers.sampling import calm_nano, write_checkpoint
from utils.images import to_uint8
from utils.sampling.draws import make_labels


@pytest.fixture(autouse=True)
def network(monkeypatch):
    """An instant one in Inception's place."""
    network = Instant()
    use_instant(monkeypatch, network)
    return network


@pytest.fixture
def here(tmp_path):
    write_checkpoint(tmp_path / "nano.pt")
    np.savez(tmp_path / "real.npz", random_images(12, 32).numpy())
    return tmp_path


def run(here, *flags, ckpt="nano.pt"):
    """The command on few images; its exit code, and its record."""
    out = here / "out"
    words = [here / ckpt, here / "real.npz", "--out", out, "--num-images", 5, "--batch-size", 3, *flags]
    code = sweep.main([str(word) for word in words])
    return code, json.loads((out / "sweep.json").read_text()) if (out / "sweep.json").exists() else None


FEW = "--samplers", "ab2=2", "sde=2:1", "--cfg-scales", "1", "3", "--seeds", "0", "1"


def test_every_point_is_made_once_and_more_may_be_asked_for(here, capsys):
    code, record = run(here, *FEW)
    assert code == 0 and len(record["points"]) == 2 * 2 * 2
    first = record["points"][0]
    assert [first[name] for name in ("seed", "weights", "sampler", "steps", "cfg_scale")] == [0, "ema", "ab2", "2", 1.0]
    assert {point["evaluations"] for point in record["points"]} == {
        2,
        2.5,
    }  # sde: a small last step, two of four stairs
    assert [point["seed"] for point in record["points"]] == [0] * 4 + [1] * 4  # all of a seed first
    assert record["floor"]["images"] == 5 and record["floor"]["pixel_frechet"] > 0
    rows = (here / "out" / "sweep.md").read_text().splitlines()
    assert len([row for row in rows if row.startswith("| ab2") or row.startswith("| sde")]) == 4
    assert len([row for row in rows if "**" in row]) == 2 and all("| 2 |" in row for row in rows[2:6])
    assert (here / "out" / "sweep.png").read_bytes()[:4] == b"\x89PNG"

    assert "8 points to sample for pixel Fréchet" in capsys.readouterr().out
    (here / "out" / "sweep.md").unlink()
    code, again = run(here, *FEW, "--samplers", "ab2=2", "sde=2:1", "ode=1")
    assert "4 points to sample for pixel Fréchet" in capsys.readouterr().out
    assert again["points"][:8] == record["points"] and len(again["points"]) == 12
    assert "ode" in (here / "out" / "sweep.md").read_text()


def test_its_images_are_those_of_sample_ddp(here):
    from tests.helpers.sampling import load_images, sample_here

    flags = ["--num-fid-samples", 4, "--cfg-scale", 3, "--sampler", "midpoint", "--num-sampling-steps", 2, "--to-npz"]
    assert sample_here(here / "nano.pt", here / "samples", *flags, "--class-ids", "1,8,3,4", "--global-seed", 7) == 0
    images, labels = load_images(here / "samples")
    make = sweep.sampled(calm_nano(), sweep.Point(7, "ema", "midpoint", "2", 3.0), torch.from_numpy(labels))
    assert np.abs(to_uint8(make(torch.arange(4))).astype(int) - images).max() <= 1


def test_scores_are_those_of_the_images(here):
    """A judge that agrees where it should, and distances that do not depend on the batch size."""

    class Judge:
        def agreement(self, images, asked):
            assert len(images) == len(asked) and images.dtype == np.uint8
            return float((asked < 5).mean())

    labels = torch.from_numpy(make_labels("balanced", 10, 10, 0))
    file, cpu = sweep.open_images(here / "real.npz"), torch.device("cpu")
    real = sweep.Real(sweep.pixels_of(file), Judge())
    images = random_images(10, 32, seed=3).permute(0, 3, 1, 2) / 127.5 - 1
    found = [real.score(lambda numbers: images[numbers], labels, size) for size in (3, 10)]
    assert found[0] == found[1] and found[0]["class_agreement"] == pytest.approx(0.5)
    with sweep.inception(cpu, file) as extraction:
        real = real._replace(extraction=extraction, reference=sweep.as_reference(extraction(file), cpu))
        more = real.score(lambda numbers: images[numbers], labels, 3)
    assert more == found[0] | {name: more[name] for name in ("FID", "sFID", "MIND")}


def test_inception_features_of_the_best_guidance_alone(here, network, capsys):
    few = *FEW, "--seeds", 0, "--inception", "best"
    code, record = run(here, *few)
    assert code == 0
    have = [(point["sampler"], point["cfg_scale"]) for point in record["points"] if "FID" in point]
    assert [sampler for sampler, _ in have] == ["ab2", "sde"]  # of each sampler one guidance
    assert record["floor"]["FID"] > 0 and network.images == 12 + 2 * 5
    for sampler, scale in have:
        values = {
            point["cfg_scale"]: point["pixel_frechet"] for point in record["points"] if point["sampler"] == sampler
        }
        assert values[scale] == min(values.values())
    capsys.readouterr()
    assert run(here, *few)[1]["points"] == record["points"]
    assert "0 points to sample for FID" in capsys.readouterr().out


def test_raw_weights_are_a_row_of_their_own(here):
    state = checkpoint_state(calm_nano())
    raw = {name: value + 0.05 * torch.randn_like(value) for name, value in state.items()}
    torch.save({"model": raw, "ema": state, "config": config_to_dict(NANO)}, here / "both.pt")
    few = "--samplers", "ab2=1", "--cfg-scales", "2", "--seeds", "0", "--weights", "ema", "raw"
    code, record = run(here, *few, ckpt="both.pt")
    assert code == 0 and [point["weights"] for point in record["points"]] == ["ema", "raw"]
    assert record["points"][0]["pixel_frechet"] != record["points"][1]["pixel_frechet"]
    assert "| ab2, raw |" in (here / "out" / "sweep.md").read_text()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--samplers", "dpm=3"], "--samplers: dpm=3 must be SAMPLER=STEPS,…; samplers are sde, "),
        (["--samplers", "sde"], "sde must be SAMPLER=STEPS"),
        (["--samplers", "sde=0"], "0 must lie in [1, 10000]"),
        (["--weights", "raw"], "holds one set of weights"),
        (["--num-images", "3"], "--num-images: 3 must be at least 4"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_sampled(here, capsys, flags, message):
    assert run(here, *flags) == (2, None)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]


def test_another_checkpoint_is_refused_by_name(here, capsys):
    few = "--samplers", "ab2=1", "--cfg-scales", "2", "--seeds", "0"
    assert run(here, *few)[0] == 0
    torch.save({"model": checkpoint_state(calm_nano()), "config": config_to_dict(NANO), "step": 3}, here / "other.pt")
    assert run(here, *few, ckpt="other.pt")[0] == 2
    assert "holds another sweep (checkpoint sha256: " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["sweep.md", "sweep.png"])
def test_files_of_nobodys_sweep_are_refused_before_the_work(here, capsys, monkeypatch, name):
    monkeypatch.setattr(sweep.checkpoint_file, "examine", lambda path: pytest.fail("work has begun"))
    (here / "out").mkdir()
    (here / "out" / name).write_text("mine")
    assert run(here, *FEW) == (2, None)
    assert f"{name}: is there already, without a sweep.json; move it away" in capsys.readouterr().err
    assert (here / "out" / name).read_text() == "mine"


GOOD = {"seed": 0, "weights": "ema", "sampler": "ab2", "steps": "1", "cfg_scale": 2, "evaluations": 1}
GOOD |= {"pixel_frechet": 0.5, "FID": 7}


@pytest.mark.parametrize(
    "points", [None, {}, [1], [{"x": 1}], [GOOD | {"seed": []}], [GOOD | {"steps": 1}], [GOOD | {"FID": "low"}]]
)
def test_a_record_that_is_no_sweeps_is_one_line(tmp_path, points):
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps({"plan": 1, "points": [GOOD]}))
    assert sweep.open_record(path, {"plan": 1})["points"] == [GOOD]
    path.write_text(json.dumps({"plan": 1, "points": points}))
    with pytest.raises(ValueError, match="is damaged, not as a sweep writes it: remove it"):
        sweep.open_record(path, {"plan": 1})
