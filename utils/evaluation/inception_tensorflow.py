"""The original graph executed by TensorFlow, as the published evaluator does: the arbiter of inception.py."""

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from utils.evaluation.inception import POOL_DIM, SPATIAL_CHANNELS


class TensorFlowInception:
    """Called as `Inception`: images (B, H, W, 3) to pool features (B, 2048) and spatial ones (B, 2023), on the CPU.

    The batch replaces the graph's `ExpandDims:0`; resizing and scaling are the graph's own. Raises ValueError when
    TensorFlow is missing or cannot import the graph.
    """

    def __init__(self, path: Path):
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        try:
            import tensorflow
        except ImportError as error:
            raise ValueError(f"--backend tensorflow needs tensorflow 2.19 (pip install tensorflow): {error}") from None
        tf = tensorflow.compat.v1
        definition = tf.GraphDef.FromString(path.read_bytes())
        with tf.Graph().as_default() as graph:
            self.batch = tf.placeholder(tf.float32, (None, None, None, 3))
            try:
                pool, spatial = tf.import_graph_def(
                    definition, {"ExpandDims:0": self.batch}, ["pool_3:0", "mixed_6/conv:0"], name="inception"
                )
                weights = graph.get_tensor_by_name("inception/softmax/logits/MatMul:0").op.inputs[1]
            except (ValueError, KeyError) as error:
                raise ValueError(f"{path}: TensorFlow cannot use this graph: {str(error).splitlines()[0]}") from None
            self.features = tf.reshape(pool, (-1, POOL_DIM)), spatial[..., :SPATIAL_CHANNELS]
            self.pool = tf.placeholder(tf.float32, (None, POOL_DIM))
            self.output = tf.matmul(self.pool, weights)
        self.session = tf.Session(graph=graph)

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        pool, spatial = self.session.run(self.features, {self.batch: images.cpu().numpy().astype(np.float32)})
        return torch.from_numpy(pool), torch.from_numpy(spatial).flatten(1)

    def logits(self, pool: Tensor) -> Tensor:
        """Pool features (B, 2048) to the logits (B, 1008), without the bias."""
        return torch.from_numpy(self.session.run(self.output, {self.pool: pool.cpu().numpy()}))
