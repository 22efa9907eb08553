"""What a GPU would be given to do, counted on a CPU: Inductor's code for fake CUDA tensors."""

import pytest

from benchmarks.kernels import RESULTS, sampling
from models import PRESETS, SamplingSettings
from utils.files import read_json

BLOCKS = {name: preset.head_blocks for name, preset in PRESETS.items()}


@pytest.fixture(scope="module")
def nano():
    """Every token of a generation; a tensor on the wrong device is an error of FakeTensorMode."""
    return sampling("SphereAR-Nano", batch=2, tokens=16, settings=SamplingSettings(num_sampling_steps=2))


@pytest.mark.parametrize("kind", ["ours", "ours with flash-attn"])
def test_a_guided_evaluation_is_four_kernels_a_block_and_five(nano, kind):
    """cat and cast, two products each with its own pointwise kernel a block, input and output product, last norm,
    guidance with the sampler's update."""
    assert nano[kind]["head evaluation"] == 4 * BLOCKS["SphereAR-Nano"] + 5


def test_nothing_breaks_a_graph_and_nothing_is_compiled_twice(nano):
    assert nano["ours"]["graph_breaks"] == nano["ours with flash-attn"]["graph_breaks"] == 0
    assert nano["ours"]["recompiled"] == 2  # a block for the second and third part of the KV cache
    assert nano["ours with flash-attn"]["recompiled"] == 0


def test_a_decode_step_with_flash_attention_needs_fewer_kernels(nano):
    ours, flash = nano["ours"]["decode step"], nano["ours with flash-attn"]["decode step"]
    assert flash < ours < nano["straightforward"]["decode step"]


@pytest.mark.parametrize("name", ["SphereAR-B", "SphereAR-L", "SphereAR-H"])
def test_the_recorded_counts_are_of_this_head(name):
    found = read_json(RESULTS, "python benchmarks/kernels.py")["sampling"]["kernels"][name]
    assert found["ours"]["head evaluation"] == 4 * BLOCKS[name] + 5
    assert found["ours"]["graph_breaks"] == found["ours"]["recompiled"] == 0
    assert found["ours"]["token"] < found["straightforward"]["token"] / 1.5
