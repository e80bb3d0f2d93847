"""What must hold. The tests take under a minute, without network or MNIST: pytest test_smoke.py"""
import inspect
import io
import itertools
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock, patch

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch.testing import assert_close
from torchvision.datasets import MNIST

import common
import cvae
import gumbel_vae
import vae
from common import one_hot

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text(encoding="utf-8")
DIGITS = common.bundled_digits()

MODELS = {vae: vae.VAE, cvae: cvae.CVAE, gumbel_vae: gumbel_vae.GumbelVAE}
DEFAULTS = {  # with which the scores on the page, README.md, were measured
    vae: dict(epochs=15, batch_size=128, lr=8e-3, z_dim=20),
    cvae: dict(epochs=15, batch_size=128, lr=8e-3, z_dim=20, beta=10.0),
    gumbel_vae: dict(epochs=15, batch_size=128, lr=6e-3, z_dim=20, beta=1.0, gamma=400.0,
                     objective="clustering", read_weight=15.0, tau=0.5, n_classes=10)}


@pytest.fixture(params=MODELS, ids=lambda script: script.__name__)
def script(request):
    """A test that takes this fixture runs once for each script."""
    return request.param


# A test with this mark runs for these two scripts only.
with_classes = pytest.mark.parametrize("script", [cvae, gumbel_vae])


@pytest.fixture
def data(tmp_path, monkeypatch):
    """300 training and 299 test digits, also in data/ of the test's own working folder."""
    monkeypatch.chdir(tmp_path)
    write_mnist(tmp_path / "data", 300)
    return common.load_mnist()


def write_mnist(folder, n=None):
    """Writes the first n of scikit-learn's digits, to train and to test, in MNIST's file format."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    names = "train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"
    for name, array in zip(names, DIGITS):
        array = torch.as_tensor(array[:n])
        if "images" in name:
            array = (255 * array).round().view(-1, 28, 28)
        # Two zeros, 8 for "bytes", the number of dimensions, and the size of each:
        header = bytes([0, 0, 8, array.dim()]) + np.array(array.shape, ">i4").tobytes()
        (raw / f"{name}-ubyte").write_bytes(header + array.byte().numpy().tobytes())


def start(script, *words):
    """Runs the script for an epoch, as if from the command line."""
    with patch("sys.argv", [script.__file__, "--epochs=1", "--out=.", *words]):
        common.run(script.main)


def classes_of(script, model, x, y):
    """The class that evaluate decodes each image in: its label or its cluster; 0 in vae.py."""
    if script is gumbel_vae:
        return D.Categorical(logits=model.cluster(x)).sample()
    return y if script is cvae else 0 * y


def gaussian(mean, sd=1.0):
    """A distribution of codes (z_dim,) around a mean."""
    return D.Independent(D.Normal(mean, sd), 1)


# The mathematics. Delete a function's body, write it again, and let its test judge, for example:
# pytest test_smoke.py -k gaussian_kl

def insist(right, words):
    if not right:
        pytest.fail(words, pytrace=False)


def judge(name, loss, oracle, terms="", hint="", **inputs):
    """Compares a loss with an oracle: first their values, then their gradients by name."""
    insist(torch.is_tensor(loss), f"{name} returned {loss}; it should return a tensor")
    insist(loss.dim() == 0, f"{name} returned a tensor of shape {tuple(loss.shape)}; it should "
                            "return a single number, averaged over the images")
    insist(torch.isclose(loss.double(), oracle.double(), rtol=1e-4, atol=1e-5),
           f"{name} returned {loss:.5g}; it should return {oracle:.5g}{terms}")
    for argument, x in inputs.items():
        # 0 * x.sum(): if a loss does not depend on x, its gradient is 0, and no error is raised.
        found, right = (torch.autograd.grad(value + 0 * x.sum(), x, retain_graph=True)[0]
                        for value in (loss, oracle))
        insist(found.any() and torch.allclose(found, right, rtol=1e-3, atol=1e-4),
               f"{name} returns the right values, but the gradient of {argument} is "
               f"{'wrong' if found.any() else 'zero'}{hint}")


def test_reparameterize(script):
    mu, log_var = torch.randn(2, 3, 5, requires_grad=True)
    z = script.reparameterize(mu, log_var)
    found = (z.shape, z.dtype) if torch.is_tensor(z) else z
    insist(found == (mu.shape, mu.dtype),
           f"reparameterize returned {found}; it should return a tensor like mu")
    many = torch.stack([z, *(script.reparameterize(mu, log_var) for _ in range(4000))])
    noise = ((many - mu) / torch.exp(log_var / 2)).detach().flatten(1)  # (4001, 15)
    covariance = noise.T.cov()
    insist(abs(noise.mean(0)).max() < 0.1 and abs(covariance.diag() - 1).max() < 0.15,
           "reparameterize: the noise (z - mu) / sigma should have mean 0 and variance 1, "
           "where sigma is exp(log_var / 2)")
    insist(abs(covariance - covariance.diag().diag()).max() < 0.15,
           "reparameterize: each number of each image needs noise of its own")
    oracle = mu + torch.exp(log_var / 2) * noise[0].view(3, 5)  # the first noise is that of z
    judge("reparameterize", z.sum(), oracle.sum(), mu=mu, log_var=log_var)


def test_reconstruction(script):
    x, logits = torch.rand(7, 784), torch.randn(7, 784, requires_grad=True)
    p = D.Bernoulli(logits=logits, validate_args=False)  # or grey x would be refused
    oracle = -p.log_prob(x).sum(1).mean()
    judge("reconstruction", script.reconstruction(logits, x), oracle, logits=logits)


def test_gaussian_kl(script):
    mu, log_var = torch.randn(2, 7, 5, requires_grad=True)
    q = D.Normal(mu, torch.exp(log_var / 2))
    oracle = D.kl_divergence(q, D.Normal(0.0, 1.0)).sum(1).mean()
    judge("gaussian_kl", script.gaussian_kl(mu, log_var), oracle, mu=mu, log_var=log_var)


def test_categorical_kl():
    logits = torch.randn(9, 6, requires_grad=True)
    q = D.Categorical(logits=logits)
    oracle = D.kl_divergence(q, D.Categorical(torch.ones(6))).mean()
    judge("categorical_kl", gumbel_vae.categorical_kl(logits.log_softmax(1)), oracle, log_q=logits)


def test_clustering():
    logits, warped = torch.randn(9, 6, requires_grad=True), torch.randn(18, 6, requires_grad=True)
    q = D.Categorical(logits=logits)
    target = D.Categorical(logits=torch.cat([logits, logits]).detach())
    invariance = D.kl_divergence(target, D.Categorical(logits=warped)).mean()
    h_c = D.Categorical(q.probs.mean(0)).entropy()
    oracle = invariance + 0.1 * q.entropy().mean() - 0.5 * h_c
    loss = gumbel_vae.clustering(logits.log_softmax(1), warped.log_softmax(1))
    terms = f" = KL {invariance:.4g} + 0.1 H(c|x) {q.entropy().mean():.4g} - 0.5 H(c) {h_c:.4g}"
    hint = ": in the KL only log_q_warped learns, and in the entropies log_q"
    judge("clustering", loss, oracle, terms, hint, log_q=logits, log_q_warped=warped)


def test_read_back():
    model, read = gumbel_vae.GumbelVAE(h_dim=32), []
    for layer in model.from_latent, model.to_cluster_logits:
        torch.nn.init.normal_(layer.weight)  # large, so that drawings and readings differ
    model.to_cluster_hidden.register_forward_pre_hook(lambda layer, given: read.append(given[0]))
    z, k = torch.randn(50, 20), torch.arange(50) % 10
    torch.manual_seed(0)
    loss = gumbel_vae.read_back(model, z, k)
    drawn = model.decode(z, one_hot(k))
    torch.manual_seed(0)  # the same warps
    warped = gumbel_vae.warp(drawn)
    if loss is not None:  # if it is None, judge says so below
        insist(read, "read_back: the drawing should be read by model.cluster")
        insist(not drawn.equal(read[0]),
               "read_back: the drawing should be warped before it is read")
        insist(warped.shape == read[0].shape and torch.allclose(warped, read[0], atol=1e-4),
               "read_back: model.cluster should read warp(model.decode(z, y)), with one-hot k as y")
    oracle = -model.cluster(warped)[range(50), k].mean()
    judge("read_back", loss, oracle, hint=": the drawing and the reader both learn",
          drawing=model.to_logits.bias, reader=model.to_cluster_logits.bias)


def test_one_hot():
    for labels, n_classes in ([2, 0, 7], 10), ([1, 0], 2):
        found = common.one_hot(torch.tensor(labels), n_classes)
        right = torch.eye(n_classes)[labels]
        insist(torch.is_tensor(found), f"one_hot returned {found}; it should return a tensor")
        insist(found.shape == right.shape and (found == right).all(),
               f"one_hot of {labels} returned\n{found}\nit should return\n{right}")
        insist(found.dtype == right.dtype, f"one_hot returned {found.dtype}, not {right.dtype}")


def test_score():
    # The best match gives cluster 5 to digit 1, cluster 3 to digit 0, and 4 or 1 to digit 2.
    labels, clusters = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [5, 5, 3, 5, 5, 4, 3, 1]])
    # The entropies follow from how often each label, each cluster and each pair occurs:
    h, h_c, h_both = (D.Categorical(torch.tensor(counts)).entropy().item() for counts in (
        [3.0, 2, 3], [4.0, 2, 1, 1], [2.0, 1, 2, 1, 1, 1]))
    right = {"nmi": (h + h_c - h_both) / ((h + h_c) / 2), "acc": 4 / 8}
    found = gumbel_vae.score(labels, clusters)
    insist(found == pytest.approx(right), f"score returned {found}; it should return {right}")


def test_warps_shift_stretch_turn_slant_and_bend():
    places = torch.arange(28.0).expand(2000, 28, 28)  # each pixel holds the number of its column
    torch.manual_seed(0)
    column = gumbel_vae.warp(places.flatten(1))
    torch.manual_seed(0)  # the same warps
    row = gumbel_vae.warp(places.mT.flatten(1))
    # The column and the row that each inner pixel came from:
    came = torch.stack([column, row]).view(2, 2000, 28, 28)[:, :, 7:-7, 7:-7]
    right, down = came.diff(dim=3).mean((2, 3)), came.diff(dim=2).mean((2, 3))  # (2, 2000)
    # A step to the right changes the row by turn; a step down changes the column by slant - turn.
    turn, slant = right[1], right[1] + down[0]
    shift = came.mean((2, 3)) - 13.5
    moves = torch.stack([*shift, right[0] - 1, down[1] - 1, turn, slant])  # (6, 2000)
    # A number uniform in (-a, a) has sd a / sqrt(3), and the bend adds to it.
    most = torch.tensor([2.0, 2.0, 0.1, 0.1, 0.26, 0.2])
    bend = torch.tensor([0.43, 0.43, 0.055, 0.055, 0.055, 0.08])  # measured on warps that only bend
    sd = (most**2 / 3 + bend**2).sqrt()
    assert (abs(moves.mean(1)) < 0.1 * sd).all(), "on average a warp should move nothing"
    assert_close(moves.std(1), sd, rtol=0.1, atol=0)  # shifts, stretches, turn, slant
    assert abs(moves.corrcoef() - torch.eye(6)).max() < 0.2, "each move should be independent"


def test_encoder_and_decoder_have_400_relus(script):
    model, hidden = MODELS[script](), []
    for layer in model.to_mu, model.to_logits:
        layer.register_forward_pre_hook(lambda layer, given: hidden.append(given[0]))
    x, y = torch.rand(5, 784), one_hot(torch.arange(5))
    model(x, y) if script is cvae else model(x)
    assert [h.shape for h in hidden] == [(5, 400), (5, 400)]
    assert all(h.min() == 0 for h in hidden)


# The training

# Each function named by_hand returns -ELBO and the loss. During the training, climb goes from 0 to
# 1 in a quarter of the steps, and progress in half of them.

def z_and_kl(model, x):
    mu, log_var = model.encode(x)
    return D.Normal(mu, torch.exp(log_var / 2)).rsample(), vae.gaussian_kl(mu, log_var)


def vae_by_hand(model, x, y, climb, progress):
    z, kl = z_and_kl(model, x)
    recon = vae.reconstruction(model.logits(z), x)
    return recon + kl, recon + kl


def cvae_by_hand(model, x, y, climb, progress):
    z, kl = z_and_kl(model, x)
    recon = vae.reconstruction(model.logits(z, one_hot(y)), x)
    return recon + kl, recon + (1 + (5 - 1) * climb) * kl  # beta = 5


def gumbel_terms(model, x, tau):
    log_q = model.cluster(x)
    c = F.gumbel_softmax(log_q, tau, hard=True)
    z, kl = z_and_kl(model, x)
    recon = vae.reconstruction(model.logits(z, c), x)
    return log_q, z, recon, kl, gumbel_vae.categorical_kl(log_q)


def elbo_by_hand(model, x, y, climb, progress):
    log_q, z, recon, kl, kl_c = gumbel_terms(model, x, tau=0.3)
    return recon + kl + kl_c, recon + (1 + (2 - 1) * climb) * kl + kl_c  # beta = 2


def capacity_by_hand(model, x, y, climb, progress):
    log_q, z, recon, kl, kl_c = gumbel_terms(model, x, tau=0.5)
    pulls = abs(kl - 2 * progress) + abs(kl_c - math.log(3) * progress)
    return recon + kl + kl_c, recon + 30 * pulls  # beta = 30


def clustering_by_hand(model, x, y, climb, progress):
    warped = gumbel_vae.warp(torch.cat([x, x]))
    log_q, z, recon, kl, kl_c = gumbel_terms(model, x, tau=2.0)
    codes = z[::8].detach()
    codes = torch.cat([codes, torch.randn(len(codes), 5)])
    k = torch.randint(3, (len(codes),))
    loss = recon + (1 + (2 - 1) * climb) * kl  # beta = 2
    loss = loss + 3 * gumbel_vae.clustering(log_q, model.cluster(warped))  # gamma = 3
    loss = loss + 7 * climb * gumbel_vae.read_back(model, codes, k)  # the read weight is 7
    return recon + kl + kl_c, loss


# There are so few clusters that KL(c) crosses the capacity that it is pulled to.
@pytest.mark.parametrize("script, size, options, by_hand", [
    (vae, {}, {}, vae_by_hand),
    (cvae, {}, dict(beta=5.0), cvae_by_hand),
    (gumbel_vae, dict(n_classes=3), dict(objective="elbo", beta=2.0, tau=0.3), elbo_by_hand),
    (gumbel_vae, dict(n_classes=3), dict(objective="capacity", beta=30.0), capacity_by_hand),
    (gumbel_vae, dict(n_classes=3), dict(beta=2.0, tau=2.0, gamma=3.0, read_weight=7.0),
     clustering_by_hand)],
    ids=["vae", "cvae", "elbo", "capacity", "default"])
def test_training_agrees_with_steps_by_hand(script, size, options, by_hand, data):
    torch.manual_seed(0)
    model = MODELS[script](h_dim=32, z_dim=5, **size)
    history = script.train(model, data, epochs=4, batch_size=128, lr=0.01, **options)
    # The 4 epochs of 3 batches are 12 steps, of which 3 are a quarter and 6 are half.
    torch.manual_seed(0)  # the same weights, batches and noise
    twin = MODELS[script](h_dim=32, z_dim=5, **size)
    optimizer = torch.optim.Adam(twin.parameters())
    for epoch, metrics in enumerate(history):
        nelbo_train = 0
        for step, batch in enumerate(torch.randperm(300).split(128), start=3 * epoch):
            climb, progress = min(1, (step + 1) / 3), min(1, step / 6)
            optimizer.param_groups[0]["lr"] = 0.01 * min(climb, (12 - step) / 9)
            x, y = data.x_train[batch], data.y_train[batch]
            nelbo, loss = by_hand(twin, x, y, climb, progress)
            nelbo_train += nelbo.item() * len(x) / 300
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        right = {"nelbo_train": nelbo_train, **script.evaluate(twin, data)}
        found = {name: metrics[name] for name in right}
        assert found == pytest.approx(right, rel=1e-4, abs=1e-5), (
            f"{by_hand.__name__} draws its random numbers in the order of train: if train only "
            "changed that order, or reads x and its warps in two calls, change it here, too")


def test_the_seconds_are_those_of_one_epoch(script, data, monkeypatch):
    each_call_a_second_later = itertools.count().__next__
    monkeypatch.setattr(time, "perf_counter", each_call_a_second_later)
    history = script.train(MODELS[script](), data, epochs=3)
    assert len({metrics["seconds"] for metrics in history}) == 1


def on_meta(script, data):
    """A model and data on the meta device: they hold no numbers, so .item() and the like fail."""
    with torch.device("meta"):
        model = MODELS[script]()
    return model, common.Data(*(part.to("meta") for part in data[:4]), "")


def test_no_step_leaves_the_device_or_waits(script, data, monkeypatch):
    # A fused Adam refuses meta tensors.
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, fused: torch.optim.SGD(parameters))
    randperm = Mock(wraps=torch.randperm)
    monkeypatch.setattr(torch, "randperm", randperm)
    model, data = on_meta(script, data)
    model.eval()
    steps = []
    model.to_hidden.register_forward_hook(lambda layer, x, h: steps.append(len(h)))
    with pytest.raises(RuntimeError, match=r"item\(\)"):  # raised by the first .item()
        script.train(model, data, epochs=1, batch_size=64)
    assert steps == [64, 64, 64, 64, 44]  # so there was none until the epoch's end
    assert model.training  # although it was in eval mode
    assert randperm.call_args.kwargs["device"].type == "meta"


def test_random_numbers_reach_the_models_device(script, data):
    model, data = on_meta(script, data)
    with pytest.raises(RuntimeError, match=r"item\(\)"):  # evaluate goes on until the first .item()
        script.evaluate(model, data)
    for prior in None, gaussian(torch.zeros(20)):
        assert common.draw_codes(model, 5, prior).is_meta


def test_data_are_moved_to_the_device(data):
    assert all(part.is_meta for part in common.load_mnist(device="meta")[:4])
    made = common.make_data(*data[:4], device="meta")
    assert all(part.is_meta for part in made[:4])


def test_own_images_may_be_of_another_size_and_without_labels(script):
    x, y = load_digits(return_X_y=True)  # 8x8 pixels
    y_train, y_test = (y[:200], y[200:220]) if script is cvae else (None, None)
    data = common.make_data(x[:200] / 16, y_train, x[200:220] / 16, y_test)
    model = MODELS[script](image_size=64, z_dim=2)  # vae.py draws its manifold
    history = script.train(model, data, epochs=1)
    script.make_figures(model, data, script.fit_prior(model, data), history)


@pytest.mark.parametrize("script, options, says", [
    (cvae, {}, "needs y_train and y_test"),
    (gumbel_vae, dict(objective="ELBO"), "'ELBO' is not one of")])
def test_train_refuses_what_it_cannot_minimise(script, options, says, data):
    with pytest.raises(ValueError, match=says):
        script.train(MODELS[script](), data._replace(y_train=None), **options)


# The evaluation

@pytest.fixture
def unsure(script, data):
    """A model whose sigma is not 1, whose c is unsure, and whose pictures depend on y or c."""
    torch.manual_seed(0)
    model = MODELS[script]()
    with torch.no_grad():
        model.to_log_var.bias.fill_(-2)
        model.from_latent.weight[:, 20:].mul_(20)  # the weights of y or c; vae.py has none
        if script is gumbel_vae:
            model.to_cluster_logits.weight.mul_(10)
    # Ten draws for each image make sharper means.
    data = data._replace(x_test=data.x_test.repeat(10, 1), y_test=data.y_test.repeat(10))
    return model, data


@torch.no_grad()
def test_evaluate_agrees_with_forward(script, unsure):
    model, data = unsure
    x, y = data.x_test, data.y_test
    x_reconst, mu, log_var, *log_q = model(x, one_hot(y)) if script is cvae else model(x)
    metrics = script.evaluate(model, data)
    recon = F.binary_cross_entropy(x_reconst, x, reduction="sum") / len(x)
    bound = {"recon": recon.item(), "kl": script.gaussian_kl(mu, log_var).item()}
    if script is gumbel_vae:
        bound["kl_c"] = gumbel_vae.categorical_kl(*log_q).item()
    assert {name: metrics[name] for name in bound} == pytest.approx(bound, rel=1e-3)
    assert metrics["nelbo"] == pytest.approx(sum(metrics[name] for name in bound))
    assert abs(x_reconst.mean() - 0.13) < 0.05  # training starts from the mean pixel of MNIST


@torch.no_grad()
def test_a_fitted_prior_replaces_the_normal_one(script, unsure):
    model, data = unsure
    x, y = data.x_test, data.y_test
    priors = [gaussian(torch.full((20,), k / 10), 1.5) for k in range(10)]
    metrics = script.evaluate(model, data, priors[0] if script is vae else priors)
    mu, log_var = model.encode(x)
    z = D.Normal(mu, torch.exp(log_var / 2)).sample()
    classes = classes_of(script, model, x, y)
    log_r = D.Normal(classes[:, None] / 10, 1.5).log_prob(z).sum(1)
    log_p = D.Normal(0.0, 1.0).log_prob(z).sum(1)
    gain = metrics["nelbo"] - metrics["nelbo_fitted"]
    assert gain == pytest.approx((log_r - log_p).mean().item(), rel=0.01)


def test_evaluate_draws_by_its_seed_alone(script, unsure):
    state = torch.get_rng_state()
    one = script.evaluate(*unsure)
    assert torch.get_rng_state().equal(state)  # so it does not change the training
    assert script.evaluate(*unsure) == one
    assert script.evaluate(*unsure, seed=1)["recon"] != one["recon"]
    assert not unsure[0].training


@pytest.mark.parametrize("script", [gumbel_vae])
@torch.no_grad()
def test_evaluate_rates_the_clusters(script, unsure):
    model, data = unsure
    metrics = script.evaluate(model, data)
    q = D.Categorical(logits=model.cluster(data.x_test))
    information = D.kl_divergence(q, D.Categorical(q.probs.mean(0))).mean().item()
    assert metrics["i_c"] == pytest.approx(information, abs=1e-5)
    scores = script.score(data.y_test, q.probs.argmax(1))
    assert {name: metrics[name] for name in scores} == scores


# After training

class Toy(torch.nn.Module):
    """Draws plain grey images by tone(z, k), and encodes by the first pixels of x."""

    def __init__(self):
        super().__init__()
        self.z_dim, self.n_classes = 2, 10
        self.weight = torch.nn.Parameter(torch.ones(1))  # by which a model's device is known

    def encode(self, x):
        return x[:, :2], torch.zeros(len(x), 2)  # mu, and sigma = 1

    def cluster(self, x):
        return one_hot((10 * x[:, 2]).round())

    def decode(self, z, y=torch.ones(1, 1)):  # without a y, the class is 0
        images = tone(z, y.argmax(1))[:, None].expand(-1, 784)
        return images.view(-1, 1, 28, 28)  # some models return this shape

    def forward(self, x, *y):
        return self.decode(x, *y), *self.encode(x)


def tone(z, k=0):
    """The grey of images with code z (..., 2) and class k; z[0] counts more than z[1]."""
    return 0.4 + 0.05 * z[..., 0] + 0.005 * z[..., 1] + 0.03 * k


def tones(figure):
    """The upper left pixel of each image of a figure."""
    return torch.tensor(figure.axes[0].images[0].get_array())[::28, ::28]


@pytest.mark.parametrize("script, spots", [(vae, 150), (cvae, 10), (gumbel_vae, 10)])
def test_the_prior_fits_codes_in_as_many_spots_as_it_has_gaussians(script, spots):
    spot = torch.arange(80 * spots) // 80  # 80 codes in each
    place = 15.0 * torch.stack([spot // 10, spot % 10], 1)  # far apart, as sigma is 1
    x = torch.cat([place, torch.zeros(len(place), 1)], 1)  # all are of class 0
    prior = script.fit_prior(Toy(), common.Data(x, 0 * spot, None, None, ""))
    prior = prior if script is vae else prior[0]
    assert len(prior.mixture_distribution.probs) == spots
    z = place + torch.randn(len(place), 2)
    truth = D.Normal(place, 1.0).log_prob(z).sum(1) - math.log(spots)
    assert truth.mean() - prior.log_prob(z).mean() < 0.5
    assert prior.sample((4000,)).std(0) == pytest.approx(z.std(0).numpy(), rel=0.1)


@with_classes
def test_each_class_has_the_prior_of_its_codes(script):
    # 400 codes of a class are enough for ten Gaussians; the 30 of class 9 are too few for one.
    k = torch.cat([torch.arange(3600) % 9, torch.full((30,), 9)])
    x = torch.stack([10.0 * k, 10.0 * k, k / 10], 1)
    priors = script.fit_prior(Toy(), common.Data(x, k, None, None, ""))
    for prior, mean in zip(priors, [0.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 0.0]):
        assert_close(prior.mean, torch.full((2,), mean), atol=0.4, rtol=0)
        assert_close(prior.variance, torch.ones(2), atol=0.4, rtol=0)


@pytest.mark.parametrize("scale, n", [(1e-4, 1), (1, 1), (1e4, 10)])
def test_a_mixture_keeps_the_covariances_of_the_codes(scale, n):
    z = torch.randn(4000, 20, requires_grad=True) @ (torch.eye(20) + 0.2)  # correlated
    drawn = common.fit_mixture(scale * z, n).sample((4000,)) / scale
    assert abs(drawn.T.cov() - z.T.cov()).max() < 0.15 * z.var(0).max()


def test_fewer_gaussians_are_announced(capsys):
    assert common.fit_mixture(torch.randn(119, 2), 10).mixture_distribution.probs.shape == (2,)
    assert "119 codes are too few to fit 10 Gaussians: fitting 2\n" in capsys.readouterr().out
    common.fit_mixture(torch.randn(80, 2), 2)
    assert capsys.readouterr().out == ""


@with_classes
def test_a_class_without_images_stops_nothing(script, data):
    model = MODELS[script](n_classes=12)
    data.y_train[0], data.y_test[0] = 10, 11  # one image to train, and one to test
    if script is gumbel_vae:
        torch.nn.init.constant_(model.to_cluster_logits.bias[10:], -1000)  # no image at all
    prior = script.fit_prior(model, data)
    assert len(prior) == 12
    assert math.isfinite(script.evaluate(model, data, prior)["nelbo_fitted"])
    script.make_figures(model, data, prior, [])


# The pictures

@pytest.fixture
def figures(script, data):
    """Toy's pictures of random images; the prior of class k draws codes near (k / 5, 0)."""
    data = data._replace(x_test=torch.rand_like(data.x_test))
    priors = [gaussian(torch.tensor([k / 5, 0.0]), 0.01) for k in range(10)]
    history = [{"nelbo_train": 9, "nelbo": 7}, {"nelbo_train": 8, "nelbo": 6}]
    priors = priors[0] if script is vae else priors
    made = script.make_figures(Toy(), data, priors, history)
    assert plt.get_fignums() == []  # a notebook would show those left open a second time
    return made, data.x_test, data.y_test


def test_x_stands_above_x_reconst(script, figures):
    made, x, y = figures
    told = y[:12] if script is cvae else 0
    assert_close(tones(made["reconstruction"]), torch.stack([x[:12, 0], tone(x[:12, :2], told)]))


def test_generation_shows_codes_from_the_normal_prior(script, figures):
    """In a row, z varies as N(0, I) does, and the tones with it."""
    axes = figures[0]["generation"].axes[0]
    assert "N(0, I)" in axes.get_title("left")
    assert 0.01 < tones(figures[0]["generation"])[0].std() < 0.12  # 0.05 in the long run


@with_classes
def test_generation_shares_a_code_down_a_column(script, figures):
    seen = tones(figures[0]["generation"])
    assert_close(seen, seen[0] + 0.03 * torch.arange(10)[:, None])  # only the class differs


def test_fitted_shows_codes_from_the_fitted_prior(script, figures):
    """In row k, the tones are those of codes near (k / 5, 0), and differ a little."""
    seen = tones(figures[0]["fitted"])
    assert "fitted prior" in figures[0]["fitted"].axes[0].get_title("left")
    k = torch.arange(len(seen)) if script is not vae else torch.zeros(len(seen))
    right = tone(torch.stack([k / 5, 0 * k], 1), k)
    assert abs(seen - right[:, None]).max() < 0.005
    assert seen[0].std() > 1e-4


@with_classes
def test_handwriting_shows_a_code_in_every_class(script, figures):
    made, x = figures[0], figures[1][:12]
    blank = torch.zeros(12)
    drawn = [tone(x[:, :2], k) for k in range(10)]
    assert_close(tones(made["handwriting"]), torch.stack([x[:, 0], blank, *drawn], 1))


@with_classes
def test_each_row_is_labelled_with_its_class(script, figures):
    symbol = "y" if script is cvae else "c"
    for name in "generation", "fitted":
        axes = figures[0][name].axes[0]
        labels = [(tick.get_text(), tick.get_position()[1]) for tick in axes.get_yticklabels()]
        assert labels == [(f"{symbol} = {k}", k + 0.5) for k in range(10)]
        assert axes.get_ylim() == (10, 0) and axes.images[0].get_extent()[2:] == [10, 0]


@pytest.mark.parametrize("script", [vae])
def test_the_manifold_maps_the_plane_of_z_and_the_codes(script, figures):
    """Left: images decoded over the plane, z[0] to the right, z[1] up. Right: codes of images."""
    made, x, y = figures
    left, right = made["manifold"].axes[:2]
    middle = D.Normal(0.0, 1.0).icdf(torch.arange(10) / 10 + 0.05)
    z = torch.stack(torch.meshgrid(middle, middle.flip(0), indexing="xy"), 2)  # (10, 10, 2)
    assert_close(tones(made["manifold"]), tone(z))
    dots = right.collections[0]
    codes = D.Normal(0.0, 1.0).icdf(torch.tensor(dots.get_offsets().data).clamp(1e-6, 1 - 1e-6))
    noise = codes - x[:, :2]
    assert abs(noise.T @ noise / len(noise) - torch.eye(2)).max() < 0.3  # each code is one sample
    assert dots.get_array().tolist() == y.tolist()
    assert left.images[0].get_extent() == [0, 1, 0, 1]
    for axes in left, right:
        assert (axes.get_xlabel()[:4], axes.get_ylabel()[:4]) == ("z[0]", "z[1]")
        assert (*axes.get_xlim(), *axes.get_ylim()) == (0, 1, 0, 1)
    legend = made["manifold"].legends[0].get_texts()
    assert [re.sub(r"\D", "", text.get_text()) for text in legend] == list("0123456789")


def test_the_curves_show_both_losses_of_each_epoch(script, figures):
    axes = figures[0]["loss"].axes[0]
    curves = [(line.get_label(), *line.get_xydata().flat) for line in axes.lines]
    assert curves == [("training images", 1, 9, 2, 8), ("test images", 1, 7, 2, 6)]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "training images", "test images"]
    assert all(tick == round(tick) for tick in axes.get_xticks())


def test_fix_number_chooses_the_class():
    prior = gaussian(torch.zeros(2), 1e-6)
    seen = tones(common.plot_conditional_generation(Toy(), n=4, fix_number=3, prior=prior))
    assert_close(seen, torch.full((1, 4), tone(torch.zeros(2), 3)))


def test_a_model_may_lack_z_dim_and_n_classes():
    model = Toy()
    del model.z_dim, model.n_classes
    z = common.draw_codes(model, 500)
    assert z.shape == (500, 20)
    assert (z.mean(), z.std()) == pytest.approx((0, 1), abs=0.1)
    assert tones(common.plot_conditional_generation(model, n=4)).shape == (10, 4)


def test_a_label_is_not_taken_for_tau():
    with pytest.raises(TypeError):
        common.plot_reconstruction(gumbel_vae.GumbelVAE(), torch.rand(2, 784), torch.eye(10)[:2])


def test_ink_is_dark_whatever_a_users_settings_are():
    images = torch.tensor([0.0, 0.5])[:, None].expand(2, 784)
    with plt.rc_context({"image.origin": "lower", "axes.grid": True, "image.cmap": "viridis"}):
        row = common.show(images).axes[0]
        plane = common.plot_manifold(Toy(), torch.randn(9, 2)).axes[0]
        for axes in row, plane:
            image = axes.images[0]
            shades = image.to_rgba(np.array([[0.0, 0.5, 1.0]]))[0, :, 0]
            assert shades == pytest.approx([1, 0.5, 0], abs=0.01)  # of paper, grey and ink
            assert image.origin == "upper"
            assert not any(line.get_visible() for line in axes.get_xgridlines())


def test_images_are_squares_of_the_size_asked_for():
    nine, three = (common.show(torch.rand(n, 784), columns=4, size=2) for n in (9, 3))
    assert nine.axes[0].images[0].get_extent() == [0, 4, 3, 0]  # three rows of four
    assert nine.get_size_inches() == pytest.approx([8, 6.3])  # with 0.3 for the title
    assert three.axes[0].images[0].get_extent() == [0, 3, 1, 0]


@pytest.mark.parametrize("images, says", [
    (torch.rand(2, 60), "square images"), (torch.rand(0, 784), "square images"),
    (torch.rand(10, 9, 784), "square images"), (torch.rand(8, 4, 28, 28), "square images"),
    (torch.full((2, 28, 28), 255, dtype=torch.uint8), "from 255 to 255"),
    (torch.full((2, 784), -3.0), "values from 0 to 1"),
    (torch.full((2, 784), math.nan), "values from 0 to 1")])
def test_show_refuses_what_is_no_row_of_images(images, says):
    with pytest.raises(ValueError, match=says):
        common.show(images)
    assert plt.get_fignums() == []


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_prior_for_each_class_is_a_list_or_a_tuple(kind):
    priors = kind(gaussian(torch.tensor([k / 5, 0.0]), 0.01) for k in range(10))
    assert common.draw_codes(Toy(), 4, priors).shape == (10, 4, 2)
    with pytest.raises(ValueError, match="takes one prior"):
        common.plot_generation(Toy(), prior=priors)


# The data

@pytest.mark.parametrize("change", [
    lambda x: x.view(4, 28, 28).numpy(), lambda x: x.view(4, 1, 28, 28), lambda x: x.tolist(),
    lambda x: (255 * x).byte(), lambda x: (255 * x).numpy().astype(">i2"),
    lambda x: x.numpy().astype(">f8"), lambda x: x.flip(0).numpy()[::-1]])
def test_make_data_takes_images_of_any_layout_and_type(change):
    x = torch.arange(4.0)[:, None].expand(4, 784) / 255
    y = np.array([3, 1, 2, 0], ">i8")[::-1]
    data = common.make_data(change(x), y, change(x), None)
    assert_close(data[:4], (x, torch.tensor([0, 2, 1, 3]), x, None))


@pytest.mark.parametrize("change, says", [
    (dict(x_train=-torch.rand(4, 4)), "floats from 0 to 1"),
    (dict(x_test=torch.full((4, 4), math.nan)), "x_test must be .* from nan to nan"),
    (dict(x_train=torch.ones(4, 4, dtype=torch.uint8)), "images of only 0 and 1 must be floats"),
    (dict(x_train=torch.rand(0, 4)), "x_train must be square images"),
    (dict(x_test=torch.rand(4, 8)), "x_test must be square images"),
    (dict(x_test=torch.rand(4, 9)), "one size"),
    (dict(y_test=torch.arange(3)), "y_test must hold"),
    (dict(y_test=torch.zeros(4, 1, dtype=torch.int64)), "y_test must hold"),
    (dict(y_test=torch.arange(4) - 1), "y_test must hold one integer >= 0"),
    (dict(y_test=torch.rand(4)), "y_test must hold one integer")])
def test_make_data_says_what_is_wrong(change, says):
    good = dict(x_train=[[0.5] * 4], y_train=None, x_test=torch.rand(4, 2, 2), y_test=[0, 1, 2, 3])
    common.make_data(**good)
    with pytest.raises(ValueError, match=says):
        common.make_data(**{**good, **change})


def test_make_data_copies(data):
    arrays = [part.numpy() for part in data[:4]]
    common.make_data(*arrays).x_train.zero_()
    common.make_data(*data).y_train.zero_()
    assert data.x_train.any() and data.y_train.any()


@pytest.mark.parametrize("error", [TimeoutError(), RuntimeError("no network")])
def test_without_a_download_the_bundled_digits_are_read(error, data, monkeypatch, capsys):
    timeouts = []
    def refuse(self):
        timeouts.append(socket.getdefaulttimeout())
        raise error
    monkeypatch.setattr(MNIST, "download", refuse)
    bundled = common.load_mnist("new")
    assert "WARNING" in capsys.readouterr().out and "NOT MNIST" in bundled.source
    assert timeouts == [10] and socket.getdefaulttimeout() is None  # or it might wait forever
    for written, read in zip(data[:4], bundled):
        assert_close(written, read[:300], atol=0.002, rtol=0)  # rounded to bytes


def test_another_fault_of_the_download_is_not_hidden(data, monkeypatch):
    monkeypatch.setattr(MNIST, "download", Mock(side_effect=OSError("full disk")))
    with pytest.raises(OSError, match="full disk"):
        common.load_mnist("new")


def test_no_bundled_digit_is_in_both_parts():
    train, test = ({image.tobytes() for image in x.numpy()} for x in DIGITS[::2])
    assert train.isdisjoint(test)


def test_the_bundled_digits_are_upright_and_have_their_labels():
    x_train, y_train, x_test, y_test = DIGITS
    reader = KNeighborsClassifier(1).fit(*load_digits(return_X_y=True))
    for x, y in (x_train, y_train), (x_test, y_test):
        small = F.interpolate(x.view(-1, 1, 28, 28)[..., 4:24, 4:24], size=8, mode="area")
        assert reader.score(16 * small.flatten(1), y) > 0.99


# The command line

@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Runs all scripts at once, as a user would; returns their folder and what each printed."""
    folder, started = tmp_path_factory.mktemp("runs"), {}
    write_mnist(folder / "data")
    for script, words in (gumbel_vae, []), (vae, []), (cvae, ["--beta=1"]):
        out = f"--out={script.__name__}/a"  # the script has to make both folders
        words = [script.__file__, "--epochs=3", out, *words]
        started[script] = subprocess.Popen(
            [sys.executable, *words], cwd=folder, text=True, stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"})
    printed = {script: run.communicate()[0] for script, run in started.items()}
    assert [run.returncode for run in started.values()] == [0, 0, 0]
    return folder, printed


@pytest.fixture
def trained(script, runs):
    """The data, the model with the weights of the script's run, and the scores that it printed."""
    folder, printed = runs
    data, model = common.load_mnist(folder / "data"), MODELS[script]()
    name = script.__name__
    model.load_state_dict(torch.load(folder / name / "a" / f"{name}.pt"))
    line = printed[script].split("\ntest ")[1].splitlines()[0]
    return data, model, {name: float(value) for name, value in re.findall(r"(\w+) ([-\d.]+)", line)}


def test_a_run_says_what_it_does_and_leaves_its_files(script, runs):
    folder, printed = runs[0], runs[1][script]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert printed.startswith(f"MNIST, 14,980 + 299 images, on {device}: minimising ")
    assert re.findall("\nepoch +(.)", printed) == ["1", "2", "3"]
    assert "\nfitting the prior\n" in printed and "\ndrawing the pictures\n" in printed
    wrote = {folder / path for path in re.findall("wrote (.*)", printed)}
    assert wrote == {*(folder / script.__name__ / "a").iterdir()}
    assert len(wrote) == (5 if script is vae else 6)  # the weights and the pictures


def test_a_run_learns(script, trained):
    data, model, scores = trained
    mean = data.x_train.mean(0).logit(eps=1e-3).expand_as(data.x_test)
    # 20 nats better than if the mean image were drawn for every image:
    assert scores["nelbo_fitted"] < scores["nelbo"] < script.reconstruction(mean, data.x_test) - 20
    assert script.evaluate(model, data)["nelbo"] == pytest.approx(scores["nelbo"], abs=0.01)


@pytest.mark.parametrize("script", [gumbel_vae])
def test_a_run_finds_the_digits(script, trained):
    assert trained[2]["acc"] > 0.65


@pytest.mark.parametrize("script, least, least_fitted", [
    (cvae, 0.8, 0.95), (gumbel_vae, 0.6, 0.6)])
def test_a_run_draws_the_digits_asked_for(script, least, least_fitted, trained):
    data, model, scores = trained
    classes = classes_of(script, model, data.x_train, data.y_train)
    digit = torch.stack([data.y_train[classes == k].bincount(minlength=10).argmax()
                         for k in range(10)])
    assert len(set(digit.tolist())) > 7
    reader = KNeighborsClassifier(3).fit(data.x_train[:1498], data.y_train[:1498])
    for prior, share in (None, least), (script.fit_prior(model, data), least_fitted):
        images = common.decode_classes(model, common.draw_codes(model, 50, prior)).flatten(0, 1)
        assert reader.score(images, digit.repeat_interleave(50)) > share


def test_the_same_seed_gives_the_same_run(script, data, monkeypatch):
    monkeypatch.setattr(script, "make_figures", lambda *given: {})
    words = ["--epochs=1", "--z-dim=2", "--out=.", "--device=cpu"]  # on CUDA, sums may differ
    one, same, other = (script.main([*words, f"--seed={seed}"]) for seed in (5, 5, 6))
    assert one == same
    assert one != other


def test_the_defaults_are_those_of_the_page(script):
    defaults = DEFAULTS[script]
    assert defaults.items() <= vars(script.options().parse_args([])).items()
    train = inspect.signature(script.train).parameters
    assert all(train[name].default == defaults[name] for name in [*train][2:])


def test_help_shows_each_default(script):
    options = script.options()
    words = " ".join(options.format_help().split())  # however wide the terminal is
    assert words.count("(default: ") == len(vars(options.parse_args([])))


@pytest.fixture
def given(script, monkeypatch):
    """What main gives to train, by name; train itself is replaced, and does nothing."""
    signature, given = inspect.signature(script.train), {}
    monkeypatch.setattr(script, "train", lambda *args, **options: given.update(
        signature.bind(*args, **options).arguments))
    return given


def test_each_option_reaches_the_training(script, data, given, monkeypatch):
    monkeypatch.setattr(script, "fit_prior", Mock(side_effect=OSError("stop")))
    # Each is changed by an amount of its own, so that exchanged options are noticed.
    changed = {name: "capacity" if name == "objective" else value + i
               for i, (name, value) in enumerate(DEFAULTS[script].items(), start=1)}
    with pytest.raises(SystemExit, match="stop"):
        start(script, *(f"--{name.replace('_', '-')}={value}" for name, value in changed.items()))
    found = {**vars(given["model"]), **given}  # z_dim and n_classes are the model's
    assert {name: found[name] for name in changed} == changed


@pytest.mark.parametrize("fault, ends, says", [
    (KeyboardInterrupt(), SystemExit, "130"), (OSError("full"), SystemExit, "full"),
    (KeyError("a learner's"), KeyError, "a learner's")])
def test_later_faults_cost_no_weights(fault, ends, says, script, data, given, monkeypatch):
    monkeypatch.setattr(script, "fit_prior", Mock(side_effect=fault))
    with pytest.raises(ends, match=says):
        start(script)
    weights = given["model"].cpu().state_dict()
    assert_close(torch.load(f"{script.__name__}.pt"), dict(weights))


def test_weights_survive_a_full_disk(tmp_path):
    resource = pytest.importorskip("resource")  # which Windows lacks
    on_gpu = Mock(cpu=lambda: torch.ones(2))  # saved from the CPU, so that it loads anywhere
    common.save({"bias": on_gpu}, tmp_path / "vae.pt")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1]))  # no file may exceed 1 MB
    try:
        with pytest.raises(OSError, match="too large"):
            common.save({"bias": torch.zeros(10**6)}, tmp_path / "vae.pt")  # 4 MB
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_close(torch.load(tmp_path / "vae.pt"), {"bias": torch.ones(2)})


def test_a_sealed_folder_is_found_before_training(script, data, given, monkeypatch):
    Path("FILE").touch()
    with pytest.raises(SystemExit, match="FILE"):
        start(script, "--out=FILE")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as on a read-only disk
    with pytest.raises(SystemExit, match="folder sealed cannot be written to"):
        start(script, "--out=sealed")
    assert not given


def test_a_tilde_is_the_home_folder(script, data, given, monkeypatch):
    shutil.copytree("data", "home/data")
    monkeypatch.setenv("HOME", os.path.abspath("home"))
    monkeypatch.setenv("USERPROFILE", os.path.abspath("home"))  # on Windows
    monkeypatch.setattr(script, "fit_prior", Mock(side_effect=OSError("stop")))
    with pytest.raises(SystemExit, match="stop"):
        start(script, "--data=~/data", "--out=~/runs")
    assert given["data"].source == "MNIST"
    assert Path(f"home/runs/{script.__name__}.pt").exists()
    assert sorted(os.listdir()) == ["data", "home"]


@pytest.mark.parametrize("words", [
    "--epochs 0", "--z-dim 1.5", "--batch-size -1", "--lr 0", "--lr nan", "--beta -1",
    "--gamma inf", "--read-weight -1", "--tau 0", "--n-classes 0"])
def test_bad_options_are_refused(words, data, capsys):
    with pytest.raises(SystemExit, match="2"):
        start(gumbel_vae, *words.split())
    error = capsys.readouterr().err.splitlines()[-1]
    assert words.split()[0] in error and ">" in error  # as in: invalid number > 0 value
    assert os.listdir() == ["data"]


@pytest.mark.parametrize("words, says", [
    ("--lr=1e30", "diverged"), ("--data=FILE", "FILE"),
    ("--data=NOISE", "call common.make_data"), ("--data=CUT", "call common.make_data")])
def test_faults_end_in_one_line_and_leave_no_file(words, says, script, data):
    Path("FILE").touch()
    images = "MNIST/raw/train-images-idx3-ubyte"
    for folder, content in ("NOISE", b"noise"), ("CUT", Path("data", images).read_bytes()[:1000]):
        shutil.copytree("data", folder)
        Path(folder, images).write_bytes(content)
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit, match=rf"^.*{says}.*$"):  # . matches no line break
        start(script, words)
    assert sorted(Path().rglob("*")) == before


def test_a_log_file_shows_each_line_at_once(monkeypatch):
    written, seen = io.BytesIO(), []
    def main(argv):
        print("epoch 1")
        seen.append(written.getvalue())
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written))
    common.run(main)
    assert b"epoch 1" in seen[0]


def test_a_pasted_script_trains(script, data, monkeypatch, capsys):
    source = Path(script.__file__).read_text(encoding="utf-8")
    exec(source, {"__name__": script.__name__})
    assert (*capsys.readouterr(), os.listdir()) == ("", "", ["data"])
    monkeypatch.setattr(sys, "argv", ["/env/ipykernel_launcher.py", "-f", "kernel.json"])
    exec(source, {"__name__": "__main__"})
    assert Path(f"samples/{script.__name__}.pt").exists()


# The page

def test_the_page_quotes_the_code_as_it_is():
    source = " ".join("".join(inspect.getsource(module) for module in (*MODELS, common)).split())
    for block in re.findall(r"```py\n(.*?)```", README, re.DOTALL):
        assert " ".join(block.split()) in source


def test_the_links_of_the_page_lead_somewhere():
    paths = re.findall(r"\]\(([\w./]+)[#)]", README)
    assert [path for path in paths if not (HERE / path).exists()] == []
    for name, path, number in re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", README):
        line = (HERE / path).read_text(encoding="utf-8").splitlines()[int(number) - 1]
        assert line.startswith(f"def {name}(")


def test_the_commands_of_the_page_are_taken(script):
    commands = rf"\b{script.__name__}\.py( --[^\n#`&;|<]*)"
    for words in re.findall(commands, README + script.__doc__):
        script.options().parse_args(words.split())


def test_the_snippets_of_the_page_run_in_order(data):
    exec("".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL)), {})
