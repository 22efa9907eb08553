"""What a GPU would be given to do, counted on a CPU: Inductor's code for fake CUDA tensors."""

import pytest

from benchmarks.kernels import RESULTS, sampling
from models import PRESETS, SamplingSettings
from utils.files import read_json

BLOCKS = {name: preset.head_blocks for name, preset in PRESETS.items()}
TWO_STEPS = SamplingSettings(num_sampling_steps=2)


@pytest.fixture(scope="module")
def nano():
    """Three tokens of a generation; a tensor on the wrong device is an error of FakeTensorMode."""
    return sampling("SphereAR-Nano", batch=2, tokens=3, settings=TWO_STEPS)


@pytest.mark.parametrize("kind", ["ours", "ours with flash-attn"])
def test_a_guided_evaluation_is_four_kernels_a_block_and_five(nano, kind):
    """cat and cast, two products each with its own pointwise kernel a block, input and output product, last norm,
    guidance with the sampler's update."""
    assert nano[kind]["head evaluation"] == 4 * BLOCKS["SphereAR-Nano"] + 5


def test_nothing_breaks_a_graph_and_nothing_is_compiled_twice(nano):
    for kind in ("ours", "ours with flash-attn"):
        assert nano[kind]["graph_breaks"] == nano[kind]["recompiled"] == 0


@pytest.mark.faults  # long
def test_a_whole_generation_compiles_a_block_once_for_each_part_of_the_cache():
    whole = sampling("SphereAR-Nano", batch=2, tokens=16, settings=TWO_STEPS)
    assert whole["ours"]["graph_breaks"] == whole["ours with flash-attn"]["graph_breaks"] == 0
    assert whole["ours"]["recompiled"] == 2  # for the second and third part
    assert whole["ours with flash-attn"]["recompiled"] == 0


def test_a_decode_step_with_flash_attention_needs_fewer_kernels(nano):
    assert nano["ours with flash-attn"]["decode step"] < nano["ours"]["decode step"]


def test_the_recorded_counts_are_of_this_head():
    recorded = read_json(RESULTS, "python benchmarks/kernels.py") if RESULTS.exists() else {}
    for name, found in recorded.get("sampling", {}).get("kernels", {}).items():
        assert found["ours"]["head evaluation"] == 4 * BLOCKS[name] + 5
        assert found["ours"]["graph_breaks"] == found["ours"]["recompiled"] == 0
        assert found["ours"]["token"] < found["straightforward"]["token"]
