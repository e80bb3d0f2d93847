"""What must hold, in under a minute, without a network and without MNIST: pytest test_smoke.py"""
import copy
import inspect
import math
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.testing import assert_close
from torchvision.datasets import MNIST
from torchvision.transforms.functional import to_pil_image

import common
import cvae
import gumbel_vae
import vae

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text(encoding="utf-8")
MODELS = {vae: vae.VAE, cvae: cvae.CVAE, gumbel_vae: gumbel_vae.GumbelVAE}


@pytest.fixture(params=MODELS, ids=lambda script: script.__name__)
def script(request):
    """Whatever takes this runs three times: for vae, for cvae and for gumbel_vae."""
    return request.param


def write_mnist(folder, *arrays):
    """Images and labels of both parts, as bytes in MNIST's format."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    names = "train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"
    for name, array in zip(names, arrays):
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
        (raw / f"{name}-ubyte").write_bytes(header + array.astype(np.uint8).tobytes())
    return folder


@pytest.fixture(scope="session")
def digits():
    """scikit-learn's digits: 14,980 and 299 of them, images as bytes (N, 28, 28)."""
    x, y, x_test, y_test = common.bundled_digits()
    x, x_test = ((255 * images).round().view(-1, 28, 28).numpy() for images in (x, x_test))
    return x, y, x_test, y_test


@pytest.fixture(scope="session")
def few(digits, tmp_path_factory):
    """A folder with 300 and 100 of them, where something only has to run."""
    x, y, x_test, y_test = digits
    return write_mnist(tmp_path_factory.mktemp("few"), x[:300], y[:300], x_test[:100], y_test[:100])


@pytest.fixture
def data(few):
    return common.load_mnist(few)


@pytest.fixture
def tiny(few, tmp_path):
    """Runs a script's main on the few for one epoch, its files in tmp_path."""
    def run(script, *argv):
        words = ["--data", few, "--out", tmp_path, "--epochs", 1, *argv]
        return script.main([str(word) for word in words])
    return run


def files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.*")}


def shown(figure):
    return torch.tensor(figure.axes[0].images[0].get_array())


class Toy(nn.Module):
    """Draws images of one tone: the first number of z sets it, and each class adds to it."""
    def __init__(self):
        super().__init__()
        self.z_dim, self.n_classes, self.weight = 2, 10, nn.Parameter(torch.zeros(()))

    def encode(self, x):
        return x[:, :2], torch.zeros(len(x), 2)  # sigma = 1

    def cluster(self, x):
        return torch.log(0.9 * common.one_hot((10 * x[:, 2]).round()) + 0.01)

    def decode(self, z, y=torch.ones(1, 1)):
        return (0.3 + 0.1 * z[:, :1] + 0.05 * y.argmax(1, keepdim=True)).expand(-1, 784)

    def forward(self, x, *y):
        return self.decode(self.encode(x)[0], *y), *self.encode(x)


# The mathematics. Empty a function and write it anew: pytest test_smoke.py -k gaussian_kl

def check(loss, oracle, *inputs):
    """The same value and the same gradients."""
    gradients = [torch.autograd.grad(value, inputs, retain_graph=True) for value in (loss, oracle)]
    assert_close((loss, gradients[0]), (oracle, gradients[1]))


def test_reparameterize(script):
    mu, log_var = (2 * torch.randn(3, 5)).requires_grad_(), torch.randn(3, 5, requires_grad=True)
    z = torch.stack([script.reparameterize(mu, log_var) for _ in range(4000)])
    noise = (z - mu) / log_var.exp().sqrt()
    assert abs(noise.mean(0)).max() < 0.1 and abs(noise.var(0) - 1).max() < 0.15
    assert abs(torch.corrcoef(noise.flatten(1).T) - torch.eye(15)).max() < 0.1  # each its own
    check(z[0].sum(), (mu + torch.exp(log_var / 2) * noise[0].detach()).sum(), mu, log_var)


@pytest.mark.parametrize("n", [1, 7])
def test_reconstruction(script, n):
    x, logits = torch.rand(n, 784), torch.randn(n, 784, requires_grad=True)
    p = D.Bernoulli(logits=logits, validate_args=False)
    check(script.reconstruction(logits, x), -p.log_prob(x).sum(1).mean(), logits)


@pytest.mark.parametrize("n", [1, 7])
def test_gaussian_kl(script, n):
    mu, log_var = (torch.randn(n, 5, requires_grad=True) for _ in range(2))
    kl = D.kl_divergence(D.Normal(mu, torch.exp(log_var / 2)), D.Normal(0.0, 1.0))
    check(script.gaussian_kl(mu, log_var), kl.sum(1).mean(), mu, log_var)


def test_categorical_kl():
    logits = torch.randn(9, 6, requires_grad=True)
    kl = D.kl_divergence(D.Categorical(logits=logits), D.Categorical(torch.ones(6))).mean()
    check(gumbel_vae.categorical_kl(logits.log_softmax(1)), kl, logits)


def test_clustering():
    logits, warped = torch.randn(9, 6, requires_grad=True), torch.randn(18, 6, requires_grad=True)
    q, teacher = D.Categorical(logits=logits), D.Categorical(logits=logits.detach())
    oracle = sum(D.kl_divergence(teacher, D.Categorical(logits=half)).mean() / 2
                 for half in warped.split(9))
    oracle = oracle + 0.1 * q.entropy().mean() - 0.5 * D.Categorical(q.probs.mean(0)).entropy()
    loss = gumbel_vae.clustering(logits.log_softmax(1), warped.log_softmax(1))
    check(loss, oracle, logits, warped)


def test_read_back():
    model, told, k = gumbel_vae.GumbelVAE(), [], torch.arange(50) % 10
    model.decode = lambda z, y: Toy().decode(z, y).clamp(0) + 0 * model.logits(z, y)
    model.cluster = lambda x: told.append(x) or gumbel_vae.GumbelVAE.cluster(model, x)
    loss = gumbel_vae.read_back(model, torch.zeros(50, 20), k)
    tones, log_q = told[0].view(50, 28, 28), model.cluster(told[0])
    assert loss.item() == pytest.approx(D.Categorical(logits=log_q).log_prob(k).mean().item() * -1)
    assert_close(tones[:, 14, 14], 0.3 + 0.05 * k)  # drawn for k
    assert (tones[:, 0, 0] != tones[:, 14, 14]).any()  # and warped
    del model.decode
    gumbel_vae.read_back(model, torch.randn(50, 20), k).backward()
    taught = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert taught == {"from_latent", "to_logits", "to_cluster_hidden", "to_cluster_logits"}


def test_one_hot():
    assert_close(common.one_hot(torch.tensor([2, 0, 9])), torch.eye(10)[[2, 0, 9]])
    assert_close(common.one_hot(torch.tensor([1, 0], dtype=torch.uint8), 2), torch.eye(2).flip(0))
    for wrong in -1, 10:
        with pytest.raises(RuntimeError, match="(?i)class values"):
            common.one_hot(torch.tensor([wrong]))


def test_score():
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    assert gumbel_vae.score(labels, (labels + 1) % 3) == {"nmi": 1.0, "acc": 1.0}
    # At best 5 is digit 1, 4 and 1 cannot both be digit 2, and 3 is digit 0.
    clusters = np.array([5, 5, 3, 5, 5, 4, 3, 1])
    h, h_c, h_both = (D.Categorical(torch.tensor(counts)).entropy().item() for counts in (
        [3.0, 2, 3], [4.0, 2, 1, 1], [2.0, 1, 2, 1, 1, 1]))
    nmi = (h + h_c - h_both) / ((h + h_c) / 2)
    assert gumbel_vae.score(labels, clusters) == pytest.approx({"nmi": nmi, "acc": 4 / 8})


def test_a_warp_stretches_slants_turns_shifts_and_bends_a_little():
    # Images whose pixels tell their own column, or row: warped, they tell where each came from.
    places = torch.stack(torch.meshgrid(*[torch.arange(28.0)] * 2, indexing="xy"))  # column, row
    came = []
    for image in places:
        torch.manual_seed(0)
        came += [gumbel_vae.warp(image.flatten().repeat(500, 1)).view(500, 28, 28)]
    came = torch.stack(came)[..., 7:-7, 7:-7]  # (2, 500, 14, 14)
    shift = (came - places[:, None, 7:-7, 7:-7]).mean((2, 3))
    assert abs(shift.mean()) < 0.2 and 1.5 < abs(shift).max() < 4  # pixels
    right, down = came.diff(dim=3).mean((2, 3)), came.diff(dim=2).mean((2, 3))
    stretches, turn, lean = torch.stack([right[0], down[1]]), right[1], down[0]
    assert abs(stretches.mean() - 1) < 0.02 and 0.07 < stretches.std(1).min() < 0.1
    assert abs(turn.mean()) < 0.05 and 0.12 < turn.std() < 0.2 < abs(turn).max() < 0.5
    assert abs(lean.mean()) < 0.05 and 0.1 < (turn + lean).std() < 0.2  # the slant alone
    assert 0.05 < abs(came.diff(n=2)).max() < 0.5  # an unbent image has none
