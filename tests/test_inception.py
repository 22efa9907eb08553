"""The Inception network against TensorFlow on a graph of the original's form."""

import numpy as np
import pytest
import torch

from tests.helpers.evaluation import random_images, relative
from tests.helpers.graph_def import inception_graph
from utils.evaluation.inception import resize
from utils.evaluation.inception_weights import convolution_shapes, read_weights


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "graph.pb"
    path.write_bytes(inception_graph())
    return path


@pytest.fixture(scope="module")
def network(graph):
    return read_weights(graph).network()


def test_the_table_has_94_convolutions_and_23885392_parameters():
    shapes = convolution_shapes()
    assert len(shapes) == 94
    batch_norm = sum(4 * shape[0] for shape in shapes.values())
    assert sum(int(np.prod(shape)) for shape in shapes.values()) + batch_norm + 2049 * 1008 == 23_885_392


def test_features_and_logits_equal_tensorflow(graph, network):
    from utils.evaluation.inception_tensorflow import TensorFlowInception

    tensorflow = TensorFlowInception(graph)
    for size in (64, 300):
        images = random_images(4, size)
        pool, spatial = network(images)
        expected_pool, expected_spatial = tensorflow(images)
        assert relative(pool, expected_pool) < 2e-6
        assert relative(spatial, expected_spatial) < 1e-5
        assert relative(network.logits(pool), tensorflow.logits(expected_pool)) < 2e-6
        assert relative(pool[1:], pool[:-1]) > 1e-3  # the comparison above is of something that varies


def test_packed_weights_give_tensorflows_features_too(graph):
    from utils.evaluation.inception_tensorflow import TensorFlowInception

    images = random_images(5, 64)
    packed = read_weights(graph).network().pack(4)
    assert all(layer.packed is not None and layer.weight is None for layer in packed.convolutions().values())
    with torch.inference_mode():
        for batch in (images, images[:1]):  # of other sizes than packed for
            for mine, expected, tolerance in zip(packed(batch), TensorFlowInception(graph)(batch), (2e-6, 1e-5)):
                assert relative(mine, expected) < tolerance


@pytest.mark.parametrize("size", [32, 64, 128, 256, 299, 300, 512, 1024])
def test_resize_is_tensorflows_bit_for_bit(size):
    import tensorflow as tf

    images = torch.from_numpy(np.random.default_rng(size).integers(0, 256, (1, size, size, 3), dtype=np.uint8))
    expected = tf.raw_ops.ResizeBilinear(images=images.numpy().astype(np.float32), size=[299, 299])
    assert torch.equal(resize(images).permute(0, 2, 3, 1), torch.from_numpy(expected.numpy()))


def test_resize_of_unequal_sides():
    import tensorflow as tf

    images = np.random.default_rng(0).integers(0, 256, (2, 70, 400, 3), dtype=np.uint8)
    expected = tf.raw_ops.ResizeBilinear(images=images.astype(np.float32), size=[299, 299]).numpy()
    assert np.array_equal(resize(torch.from_numpy(images)).permute(0, 2, 3, 1).numpy(), expected)


def test_features_depend_neither_on_order_nor_on_the_batch(network):
    images = random_images(5, 40)
    pool, spatial = network(images)
    again = [torch.cat(parts) for parts in zip(*(network(images[rows]) for rows in ([4, 2], [0], [3, 1])))]
    order = [2, 4, 1, 3, 0]
    assert relative(again[0][order], pool) < 1e-6
    assert relative(again[1][order], spatial) < 1e-6
