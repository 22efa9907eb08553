"""Writes a GraphDef of the form of the original `classify_image_graph_def.pb`, with seeded random weights.

Written from the specification alone, not from the table of utils/evaluation/inception.py, which it judges.
"""

import numpy as np
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.compat.proto.node_def_pb2 import NodeDef

FLOAT, INT32 = 1, 3


class GraphWriter:
    """Adds nodes to `graph`; every method returns the name of its output and the number of its channels."""

    def __init__(self, seed: int = 0):
        self.rng = np.random.default_rng(seed)
        self.graph = GraphDef()
        self.graph.versions.producer = 8  # the newest for which BatchNormWithGlobalNormalization is imported

    def node(self, name: str, op: str, *inputs: str, **attributes: object) -> NodeDef:
        node = self.graph.node.add(name=name, op=op, input=inputs)
        for key, value in attributes.items():
            attribute = node.attr[key]
            if isinstance(value, bool):
                attribute.b = value
            elif isinstance(value, float):
                attribute.f = value
            elif isinstance(value, bytes):
                attribute.s = value
            elif isinstance(value, list):
                attribute.list.i.extend(value)
            elif key in ("T", "dtype", "Tdim", "Tshape"):
                attribute.type = value
            else:
                attribute.i = value
        return node

    def constant(self, name: str, values: np.ndarray) -> str:
        values = np.asarray(values)
        node = self.node(name, "Const", dtype=FLOAT if values.dtype.kind == "f" else INT32)
        tensor = node.attr["value"].tensor
        tensor.dtype = node.attr["dtype"].type
        for size in values.shape:
            tensor.tensor_shape.dim.add(size=size)
        tensor.tensor_content = values.astype("<f4" if values.dtype.kind == "f" else "<i4").tobytes()
        return name

    def conv(self, scope, source, width, kernel=1, stride=1, padding=b"SAME"):
        source, channels = source
        height, breadth = (kernel, kernel) if isinstance(kernel, int) else kernel
        scale = np.sqrt(2 / (height * breadth * channels))
        params = self.rng.normal(size=(height, breadth, channels, width)) * scale
        self.constant(f"{scope}/conv2d_params", params)
        self.node(
            f"{scope}/Conv2D", "Conv2D", source, f"{scope}/conv2d_params",
            T=FLOAT, strides=[1, stride, stride, 1], padding=padding,
        )  # fmt: skip
        norm = f"{scope}/batchnorm"
        self.constant(f"{norm}/moving_mean", self.rng.normal(size=width) * 0.2)
        self.constant(f"{norm}/moving_variance", self.rng.uniform(0.5, 1.5, width))
        self.constant(f"{norm}/beta", self.rng.normal(size=width) * 0.2)
        self.constant(f"{norm}/gamma", self.rng.uniform(0.8, 1.2, width))
        self.node(
            norm, "BatchNormWithGlobalNormalization", f"{scope}/Conv2D",
            *(f"{norm}/{part}" for part in ("moving_mean", "moving_variance", "beta", "gamma")),
            T=FLOAT, variance_epsilon=0.001, scale_after_normalization=True,
        )  # fmt: skip
        self.node(scope, "Relu", norm, T=FLOAT)
        return scope, width

    def pool(self, scope, source, op, stride, padding, size=3):
        self.node(
            scope, op, source[0], T=FLOAT, ksize=[1, size, size, 1], strides=[1, stride, stride, 1], padding=padding
        )
        return scope, source[1]

    def join(self, block, *sources):
        axis = self.constant(f"{block}/join/concat_dim", np.array(3))
        self.node(f"{block}/join", "Concat", axis, *(name for name, _ in sources), T=FLOAT, N=len(sources))
        return f"{block}/join", sum(width for _, width in sources)

    def chain(self, scope, source, *layers):
        """Convolutions conv, conv_1, ... of (width, kernel[, stride, padding]) in order."""
        for number, layer in enumerate(layers):
            source = self.conv(f"{scope}/conv_{number}" if number else f"{scope}/conv", source, *layer)
        return source

    def block_35(self, block, x, width):
        return self.join(
            block,
            self.chain(block, x, (64, 1)),
            self.chain(f"{block}/tower", x, (48, 1), (64, 5)),
            self.chain(f"{block}/tower_1", x, (64, 1), (96, 3), (96, 3)),
            self.chain(f"{block}/tower_2", self.pool(f"{block}/tower_2/pool", x, "AvgPool", 1, b"SAME"), (width, 1)),
        )

    def block_17(self, block, x, c):
        row, column = (1, 7), (7, 1)
        return self.join(
            block,
            self.chain(block, x, (192, 1)),
            self.chain(f"{block}/tower", x, (c, 1), (c, row), (192, column)),
            self.chain(f"{block}/tower_1", x, (c, 1), (c, column), (c, row), (c, column), (192, row)),
            self.chain(f"{block}/tower_2", self.pool(f"{block}/tower_2/pool", x, "AvgPool", 1, b"SAME"), (192, 1)),
        )

    def block_8(self, block, x, op):
        tower = self.chain(f"{block}/tower", x, (384, 1))
        tower_1 = self.chain(f"{block}/tower_1", x, (448, 1), (384, 3))
        return self.join(
            block,
            self.chain(block, x, (320, 1)),
            self.conv(f"{block}/tower/mixed/conv", tower, 384, (1, 3)),
            self.conv(f"{block}/tower/mixed/conv_1", tower, 384, (3, 1)),
            self.conv(f"{block}/tower_1/mixed/conv", tower_1, 384, (1, 3)),
            self.conv(f"{block}/tower_1/mixed/conv_1", tower_1, 384, (3, 1)),
            self.chain(f"{block}/tower_2", self.pool(f"{block}/tower_2/pool", x, op, 1, b"SAME"), (192, 1)),
        )

    def input(self):
        self.node("image", "Placeholder", dtype=FLOAT)
        self.constant("ExpandDims/dim", np.array(0))
        self.node("ExpandDims", "ExpandDims", "image", "ExpandDims/dim", T=FLOAT)
        self.constant("ResizeBilinear/size", np.array([299, 299]))
        self.node("ResizeBilinear", "ResizeBilinear", "ExpandDims", "ResizeBilinear/size", T=FLOAT)
        self.constant("Sub/y", np.array(128.0))
        self.node("Sub", "Sub", "ResizeBilinear", "Sub/y", T=FLOAT)
        self.constant("Mul/y", np.array(1 / 128))
        self.node("Mul", "Mul", "Sub", "Mul/y", T=FLOAT)
        return "Mul", 3


def stem_graph(seed: int = 0) -> bytes:
    """The first three convolutions only: a small file of the same form."""
    writer = GraphWriter(seed)
    x = writer.conv("conv", writer.input(), 32, 3, 2, b"VALID")
    writer.conv("conv_2", writer.conv("conv_1", x, 32, 3, 1, b"VALID"), 64, 3)
    return writer.graph.SerializeToString()


def inception_graph(seed: int = 0) -> bytes:
    """The whole network."""
    writer = GraphWriter(seed)
    x = writer.conv("conv", writer.input(), 32, 3, 2, b"VALID")
    x = writer.conv("conv_1", x, 32, 3, 1, b"VALID")
    x = writer.conv("conv_2", x, 64, 3)
    x = writer.pool("pool", x, "MaxPool", 2, b"VALID")
    x = writer.conv("conv_3", x, 80, 1, 1, b"VALID")
    x = writer.conv("conv_4", x, 192, 3, 1, b"VALID")
    x = writer.pool("pool_1", x, "MaxPool", 2, b"VALID")
    for block, width in (("mixed", 32), ("mixed_1", 64), ("mixed_2", 64)):
        x = writer.block_35(block, x, width)
    x = writer.join(
        "mixed_3",
        writer.chain("mixed_3", x, (384, 3, 2, b"VALID")),
        writer.chain("mixed_3/tower", x, (64, 1), (96, 3), (96, 3, 2, b"VALID")),
        writer.pool("mixed_3/pool", x, "MaxPool", 2, b"VALID"),
    )
    for block, width in (("mixed_4", 128), ("mixed_5", 160), ("mixed_6", 160), ("mixed_7", 192)):
        x = writer.block_17(block, x, width)
    x = writer.join(
        "mixed_8",
        writer.chain("mixed_8/tower", x, (192, 1), (320, 3, 2, b"VALID")),
        writer.chain("mixed_8/tower_1", x, (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2, b"VALID")),
        writer.pool("mixed_8/pool", x, "MaxPool", 2, b"VALID"),
    )
    x = writer.block_8("mixed_9", x, "AvgPool")
    x = writer.block_8("mixed_10", x, "MaxPool")
    writer.pool("pool_3", x, "AvgPool", 1, b"VALID", 8)
    writer.constant("pool_3/_reshape/shape", np.array([-1, 2048]))
    writer.node("pool_3/_reshape", "Reshape", "pool_3", "pool_3/_reshape/shape", T=FLOAT)
    writer.constant("softmax/weights", writer.rng.normal(size=(2048, 1008)) * 0.3)
    writer.constant("softmax/biases", writer.rng.normal(size=1008))
    writer.node("softmax/logits/MatMul", "MatMul", "pool_3/_reshape", "softmax/weights", T=FLOAT)
    writer.node("softmax/logits", "BiasAdd", "softmax/logits/MatMul", "softmax/biases", T=FLOAT)
    writer.node("softmax", "Softmax", "softmax/logits", T=FLOAT)
    return writer.graph.SerializeToString()
