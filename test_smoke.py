"""The tests. They need neither the internet nor MNIST, and run with: pytest test_smoke.py"""
import copy
import gzip
import inspect
import io
import math
import os
import re
import shutil
import subprocess
import sys
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
DEFAULTS = {  # these gave the scores in README.md
    vae: dict(epochs=15, batch_size=128, lr=8e-3, z_dim=20),
    cvae: dict(epochs=15, batch_size=128, lr=8e-3, z_dim=20, beta=10.0),
    gumbel_vae: dict(epochs=15, batch_size=128, lr=6e-3, z_dim=20, beta=1.0, gamma=400.0,
                     objective="clustering", read_weight=15.0, tau=0.5, n_classes=10)}


@pytest.fixture(params=MODELS, ids=lambda script: script.__name__)
def script(request):
    """A test with this fixture runs once for each script."""
    return request.param


@pytest.fixture(autouse=True)
def seed():
    """Makes each test draw the same random numbers every time."""
    torch.manual_seed(0)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """300 training and 299 test digits, also in data/ of the test's own working folder."""
    monkeypatch.chdir(tmp_path)
    write_mnist(tmp_path / "data", 300)
    return common.load_mnist()


def write_mnist(folder, n=None, margin=0, first=0):
    """Writes n digits for each part in MNIST's format, with a margin, labelled from `first` on."""
    raw = folder / "MNIST/raw"
    raw.mkdir(parents=True)
    names = "train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"
    for name, array in zip(names, DIGITS):
        array = torch.as_tensor(array[:n])
        array = (F.pad((255 * array).round().view(-1, 28, 28), [margin] * 4)
                 if "images" in name else array + first)
        # Two zeros, 8 for "bytes", the number of dimensions, and the size of each:
        header = bytes([0, 0, 8, array.dim()]) + np.array(array.shape, ">i4").tobytes()
        (raw / f"{name}-ubyte").write_bytes(header + array.byte().numpy().tobytes())


def start(script, *arguments):
    """Runs the script for an epoch, as if from the command line."""
    with patch("sys.argv", [script.__file__, "--epochs=1", "--out=.", *arguments]):
        common.run(script.main)


def gaussian(mean, sd=1.0):
    """A distribution of codes around a mean."""
    return D.Independent(D.Normal(mean, sd), 1)


# The mathematics. Delete a function's body, write it again, and let its test judge, for example:
# pytest --tb=short test_smoke.py -k gaussian_kl
# A function that all scripts have is tested in each: if only vae.py is wrong, pytest prints "F..",
# which is one failure and two passes.

def check(right, message):
    if not right:
        pytest.fail(message, pytrace=False)


def slope(loss, x):
    """The gradient of the loss; 0 * x.sum() makes it 0, and no error, if x is not in the loss."""
    return torch.autograd.grad(loss + 0 * x.sum(), x, retain_graph=True)[0]


def judge(name, loss, oracle, shape, slips={}, hint="", learns="", **inputs):
    """Compares a loss with the oracle: the value, then the gradients. Names common slips."""
    check(torch.is_tensor(loss), f"{name} returned {loss}; it should return a tensor")
    check(loss.dim() == 0, f"{name} returned a tensor of shape {tuple(loss.shape)}; it should "
                           "return a single number, averaged over the images")
    check(loss.isfinite(), f"{name} returned {loss}, which is not finite; it should return "
                           f"{oracle:.5g}. Is each logarithm taken of a number above 0?")
    loss = loss.to(oracle.dtype)  # float64 is right, too
    slips = {"with a mean over everything": oracle / shape[1], "with the wrong sign": -oracle,
             "with a sum over the images": oracle * shape[0], **slips}
    seen = "".join(f", which is what you get {slip}" for slip, value in slips.items()
                   if loss.isclose(value, rtol=1e-4))
    check(loss.isclose(oracle, rtol=1e-4, atol=1e-5),
          f"{name} of {shape[0]} images, {shape[1]} numbers each, returned {loss:.5g}{seen}; "
          f"it should return {oracle:.5g}{hint}")
    for argument, x in inputs.items():
        found, right = slope(loss, x), slope(oracle, x)
        seen = "".join(f", which is what you get {slip}" for slip, value in slips.items()
                       if value.isclose(oracle) and slope(value, x).allclose(found, atol=1e-4))
        check(found.allclose(right, rtol=1e-3, atol=1e-4),
              f"{name} returns the right value, but its gradient with respect to {argument} is "
              f"{'wrong' if found.any() else 'zero'}{seen}{learns}")


def test_reparameterize(script):
    mu, log_var = torch.randn(2, 3, 5, requires_grad=True)
    z = script.reparameterize(mu, log_var)
    found = (z.shape, z.dtype) if torch.is_tensor(z) else z
    check(found == (mu.shape, mu.dtype),
          f"reparameterize returned {found}; it should return mu's shape and dtype")
    many = torch.stack([z, *(script.reparameterize(mu, log_var) for _ in range(4000))])
    noise = ((many - mu) / torch.exp(log_var / 2)).detach().flatten(1)  # (4001, 15)
    mean, variance, tied = noise.mean(0), noise.var(0), noise.T.corrcoef() - torch.eye(15)
    check(abs(mean).max() < 0.1 and abs(variance - 1).max() < 0.15 and abs(tied).max() < 0.15,
          "reparameterize: the noise (z - mu) / sigma, with sigma = exp(log_var / 2), should have "
          "mean 0 and variance 1, and differ for each number of each image (correlation 0); it has "
          f"means from {mean.min():.2f} to {mean.max():.2f}, variances from {variance.min():.2f} "
          f"to {variance.max():.2f}, and correlations up to {abs(tied).max():.2f}")
    oracle = mu + torch.exp(log_var / 2) * noise[0].view(3, 5)  # equals z, with the right gradients
    judge("reparameterize", z.sum(), oracle.sum(), (3, 5), mu=mu, log_var=log_var)


def test_reconstruction(script):
    x, logits = torch.rand(7, 784), torch.randn(7, 784, requires_grad=True)
    p = D.Bernoulli(logits=logits, validate_args=False)  # or grey x would be refused
    oracle, exchanged = (-p.log_prob(pixels).sum(1).mean() for pixels in (x, 1 - x))
    slips = {"without (1 - x) log(1 - p)": -(x * p.probs.log()).sum(1).mean(),
             "with x and 1 - x exchanged": exchanged}
    judge("reconstruction", script.reconstruction(logits, x), oracle, x.shape, slips, logits=logits)


def test_gaussian_kl(script):
    mu, log_var = torch.randn(2, 7, 5, requires_grad=True)
    sigma, p = torch.exp(log_var / 2), D.Normal(0.0, 1.0)
    oracle = D.kl_divergence(D.Normal(mu, sigma), p).sum(1).mean()
    squared = D.kl_divergence(D.Normal(mu, sigma**2), p).sum(1).mean()
    slips = {"with sigma = exp(log_var), but it is exp(log_var / 2)": squared,
             "with sigma in place of sigma^2": oracle + (sigma - sigma**2).sum() / 14,
             "with log sigma in place of log sigma^2": oracle + log_var.sum() / 28,
             "with mu in place of mu^2": oracle + (mu - mu**2).sum() / 14,
             "without the -1": oracle + 5 / 2, "without the 1/2": 2 * oracle}
    judge("gaussian_kl", script.gaussian_kl(mu, log_var), oracle, mu.shape, slips,
          mu=mu, log_var=log_var)


def test_categorical_kl():
    logits = torch.randn(9, 6, requires_grad=True)
    q = D.Categorical(logits=logits)
    oracle = D.kl_divergence(q, D.Categorical(torch.ones(6))).mean()
    slips = {"without log K": oracle - math.log(6),
             "with 10 for K, but K is 6 here": oracle + math.log(10 / 6)}
    loss = gumbel_vae.categorical_kl(logits.log_softmax(1))
    judge("categorical_kl", loss, oracle, logits.shape, slips, log_q=logits)


def test_clustering():
    logits, warped = torch.randn(9, 6, requires_grad=True), torch.randn(18, 6, requires_grad=True)
    q, q_warped = D.Categorical(logits=logits), D.Categorical(logits=warped)
    target = D.Categorical(logits=logits.detach().repeat(2, 1))
    h_c = D.Categorical(q.probs.mean(0)).entropy()
    h, kl = q.entropy().mean(), D.kl_divergence
    entropies = 0.1 * h - 0.5 * h_c
    oracle = kl(target, q_warped).mean() + entropies
    attached, pairs = (D.Categorical(logits=repeated) for repeated in (
        logits.repeat(2, 1), logits.repeat_interleave(2, 0)))
    slips = {"with the KL reversed": kl(q_warped, target).mean() + entropies,
             "if log_q is not detached in the KL": kl(attached, q_warped).mean() + entropies,
             "if the warps of an image are in neighbouring rows, but they are in rows i and N + i":
                 kl(pairs, q_warped).mean() + entropies}
    loss = gumbel_vae.clustering(logits.log_softmax(1), warped.log_softmax(1))
    judge("clustering", loss, oracle, (9, 6), slips,
          f" = KL {oracle - entropies:.4g} + 0.1 H(c|x) {h:.4g} - 0.5 H(c) {h_c:.4g}",
          "; only log_q_warped should learn from the KL, and only log_q from the entropies",
          log_q=logits, log_q_warped=warped)


def test_read_back():
    model = gumbel_vae.GumbelVAE(h_dim=32)
    for layer in model.from_latent, model.to_cluster_logits:
        torch.nn.init.normal_(layer.weight)  # large, so that drawings and readings differ
    z, k = torch.randn(50, 20), torch.arange(50) % 10
    def loss_if(draw, change):
        torch.manual_seed(1)  # the same warps
        return -model.cluster(change(draw(z, one_hot(k))))[range(50), k].mean()
    oracle = loss_if(model.decode, gumbel_vae.warp)
    slips = {"without the warp": loss_if(model.decode, torch.clone),
             "with logits in place of decode": loss_if(model.logits, gumbel_vae.warp)}
    torch.manual_seed(1)
    judge("read_back", gumbel_vae.read_back(model, z, k), oracle, (50, 20), slips,
          learns="; the decoder and q(c|x) should both learn", decoder=model.to_logits.bias,
          reader=model.to_cluster_logits.bias)


def test_one_hot():
    for labels, n_classes in ([2, 0, 7], 10), ([1, 0], 2):
        found, right = common.one_hot(torch.tensor(labels), n_classes), torch.eye(n_classes)[labels]
        check(torch.is_tensor(found) and found.dtype == right.dtype and found.equal(right),
              f"one_hot of {labels} returned\n{found}\nit should return the floats\n{right}")


def test_score():
    # The best match gives cluster 5 to digit 1, cluster 3 to digit 0, and 4 or 1 to digit 2.
    labels, clusters = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [5, 5, 3, 5, 5, 4, 3, 1]])
    # The entropies follow from how often each label, each cluster and each pair occurs:
    h, h_c, h_both = (D.Categorical(torch.tensor(counts)).entropy().item() for counts in (
        [3.0, 2, 3], [4.0, 2, 1, 1], [2.0, 1, 2, 1, 1, 1]))
    right = {"nmi": round((h + h_c - h_both) / ((h + h_c) / 2), 4), "acc": 4 / 8}
    found = gumbel_vae.score(labels, clusters)
    check(isinstance(found, dict) and found.keys() == right.keys(),
          f"score returned {found}; it should return a dict with nmi and acc")
    found = {name: round(float(value), 4) for name, value in found.items()}
    seen = ", whose acc is what you get if clusters may share a digit" * (found["acc"] == 5 / 8)
    check(found == pytest.approx(right, abs=2e-4),
          f"score returned {found}{seen}; it should return {right}")


@pytest.mark.parametrize("side", [28, 20])
def test_each_image_is_warped_a_little_in_its_own_way(side):
    ink = torch.zeros(500, side, side)
    ink[:, side // 2 - 3:side // 2 + 3, side // 2 - 3:side // 2 + 3] = 1  # the same square in all
    warped = gumbel_vae.warp(ink.flatten(1)).view(500, side, side)
    for moved in warped.sum(1), warped.sum(2):  # the ink of each column and of each row
        place = moved @ torch.arange(side).float() / moved.sum(1) - (side / 2 - 0.5)
        assert abs(place.mean()) < 0.02 * side and 0.03 * side < place.std() < 0.07 * side


# The training

def by_hand(script, model, x, y, climb, progress, objective=None, beta=1.0, tau=0.5, **weights):
    """Returns -ELBO and the loss; climb is 1 after a quarter of the steps, progress after half."""
    told, kl_c = [one_hot(y)] if script is cvae else [], 0
    if script is gumbel_vae:
        log_q = model.cluster(x)
        told, kl_c = [F.gumbel_softmax(log_q, tau, hard=True)], gumbel_vae.categorical_kl(log_q)
    mu, log_var = model.encode(x)
    z = D.Normal(mu, torch.exp(log_var / 2)).rsample()
    recon, kl = vae.reconstruction(model.logits(z, *told), x), vae.gaussian_kl(mu, log_var)
    loss = recon + (1 + (beta - 1) * climb) * kl
    if objective == "elbo":
        loss = loss + kl_c
    elif objective == "capacity":
        loss = recon + beta * (abs(kl - 2 * progress) + abs(kl_c - math.log(10) * progress))
    elif objective == "clustering":
        log_q_warped = model.cluster(gumbel_vae.warp(torch.cat([x, x])))
        codes = torch.cat([z[::8].detach(), torch.randn(len(z[::8]), 5)])
        k = torch.randint(10, (len(codes),))
        loss = loss + weights["gamma"] * gumbel_vae.clustering(log_q, log_q_warped)
        loss = loss + weights["read_weight"] * climb * gumbel_vae.read_back(model, codes, k)
    return recon + kl + kl_c, loss


@pytest.mark.parametrize("script, options", [
    (vae, {}), (cvae, dict(beta=5.0)), (gumbel_vae, dict(objective="elbo", beta=2.0, tau=0.3)),
    (gumbel_vae, dict(objective="capacity", beta=30.0)),
    (gumbel_vae, dict(objective="clustering", beta=2.0, tau=2.0, gamma=3.0, read_weight=7.0))])
def test_training_agrees_with_steps_by_hand(script, options, data):
    model, nelbo = MODELS[script](h_dim=32, z_dim=5), []
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    history = script.train(model, data, epochs=4, batch_size=128, lr=0.01, **options)
    torch.manual_seed(1)  # the same batches and noise
    optimizer = torch.optim.Adam(twin.parameters())
    batches = (batch for epoch in range(4) for batch in torch.randperm(300).split(128))
    for step, batch in enumerate(batches):  # 12 steps, of which 3 are a quarter and 6 are half
        climb, progress = min(1, (step + 1) / 3), min(1, step / 6)
        optimizer.param_groups[0]["lr"] = 0.01 * min(climb, (12 - step) / 9)
        x, y = data.x_train[batch], data.y_train[batch]
        bound, loss = by_hand(script, twin, x, y, climb, progress, **options)
        nelbo.append(bound.item() * len(x) / 300)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = {"nelbo_train": sum(nelbo[-3:]), **script.evaluate(twin, data)}
    found = {name: history[-1][name] for name in right}
    assert found == pytest.approx(right, rel=1e-4, abs=1e-5), (
        "if train is right, but draws random numbers in another order than by_hand, change by_hand")


def test_nothing_leaves_the_models_device(script, data, monkeypatch):
    """The meta device stands for CUDA: mixing it with the CPU fails. So do .item() and Adam."""
    monkeypatch.setattr(torch.optim, "Adam", lambda weights, *_, **__: torch.optim.SGD(weights))
    # A meta tensor has no values to check before the training.
    monkeypatch.setattr(common, "check_data", lambda *given: None)
    with torch.device("meta"):
        model, toy, codes = MODELS[script](), Toy(), torch.zeros(9, 2)
    data = common.load_mnist(device="meta")
    for call in script.train, script.evaluate:
        with pytest.raises(RuntimeError, match=r"item\(\)"):  # reached if all share a device
            call(model, data)
    for prior in None, gaussian(torch.zeros(2)):
        z = common.draw_codes(toy, 5, prior)
        assert z.is_meta and common.decode_classes(toy, z).is_meta
    for function, *given in (common.plot_manifold, toy, codes), (common.save, toy.state_dict(), ""):
        with pytest.raises(NotImplementedError, match="copy out of meta"):  # to the CPU
            function(*given)


def test_own_images_of_another_size_without_labels(script):
    x, y = load_digits(return_X_y=True)  # 8x8 pixels
    y = y if script is cvae else None
    data = common.make_data(x / 16, y, x.reshape(-1, 1, 8, 8) / 16, y)
    model = MODELS[script](image_size=64, z_dim=2)  # so vae.py draws its manifold, too
    history = script.train(model, data, epochs=1)
    made = script.make_figures(model, data, script.fit_prior(model, data), history)
    lines = {line.get_label(): line.get_ydata()[0] for line in made["loss"].axes[0].lines}
    assert lines["training images"] == history[0]["nelbo_train"] > lines["test images"]


@pytest.mark.parametrize("script, change, options, message", [
    (cvae, dict(y_train=None), {}, "needs y_train and y_test"),
    (cvae, dict(y_train=torch.zeros(301)), {}, "y_train one label for each"),
    (cvae, dict(y_test=torch.full((299,), 12)), {}, "holds 12 to 12, but n_classes is 10"),
    (vae, dict(x_test=torch.zeros(0, 784)), {}, "x_test must have"),
    (vae, dict(x_train=torch.full((300, 784), 1.1)), {}, "but these range from 1.1 to 1.1"),
    (gumbel_vae, dict(x_test=torch.full((299, 784), math.nan)), {}, "but these range from nan"),
    (gumbel_vae, {}, dict(objective="ELBO"), "'ELBO' is not one of")])
def test_train_refuses_what_it_cannot_use(script, change, options, message, data):
    with pytest.raises(ValueError, match=message):
        script.train(MODELS[script](), data._replace(**change), **options)


# The evaluation

@pytest.fixture
def unsure(script, data):
    """A model whose sigma is not 1, whose c is unsure, and whose pictures depend on y or c."""
    model = MODELS[script]().requires_grad_(False)
    model.to_log_var.bias.fill_(-2)
    model.from_latent.weight[:, 20:].mul_(20)  # the weights of y or c; vae.py has none
    if script is gumbel_vae:
        model.to_cluster_logits.weight.mul_(10)
    # Ten draws for each image make the means more precise.
    return model, data._replace(x_test=data.x_test.repeat(10, 1), y_test=data.y_test.repeat(10))


def test_evaluate_agrees_with_forward(script, unsure):
    model, data = unsure
    x, y = data.x_test, data.y_test
    x_reconst, mu, log_var, *log_q = model(x, one_hot(y)) if script is cvae else model(x)
    metrics = script.evaluate(model, data)
    recon = F.binary_cross_entropy(x_reconst, x, reduction="sum").item() / len(x)
    right = {"recon": recon, "kl": script.gaussian_kl(mu, log_var).item()}
    if script is gumbel_vae:
        q = D.Categorical(logits=log_q[0])
        right["kl_c"] = gumbel_vae.categorical_kl(log_q[0]).item()
        information = D.kl_divergence(q, D.Categorical(q.probs.mean(0))).mean()
        assert metrics["i_c"] == pytest.approx(information.item(), abs=1e-3)
    right["nelbo"] = sum(right.values())
    assert {name: metrics[name] for name in right} == pytest.approx(right, rel=3e-3)


def test_a_fitted_prior_replaces_the_normal_one(script, unsure):
    model, data = unsure
    x, y = data.x_test, data.y_test
    priors = [gaussian(torch.full((20,), k / 10), 1.5) for k in range(10)]
    metrics = script.evaluate(model, data, priors[0] if script is vae else priors)
    mu, log_var = model.encode(x)
    z = D.Normal(mu, torch.exp(log_var / 2)).sample()
    c = D.Categorical(logits=model.cluster(x)).sample() if script is gumbel_vae else y
    mean = 0.0 * y if script is vae else c / 10
    log_r = D.Normal(mean[:, None], 1.5).log_prob(z).sum(1)
    log_p = D.Normal(0.0, 1.0).log_prob(z).sum(1)
    gain = metrics["nelbo"] - metrics["nelbo_fitted"]
    assert gain == pytest.approx((log_r - log_p).mean().item(), rel=0.02)


# After training

class Toy(torch.nn.Module):
    """Decodes z to a plain grey image, tone(z, k), and encodes x to its first two pixels."""

    def __init__(self):
        super().__init__()
        self.z_dim, self.n_classes = 2, 10
        self.weight = torch.nn.Parameter(torch.ones(1))  # draw_codes looks up its device

    def encode(self, x):
        x = x.flatten(1)
        return x[:, :2], torch.zeros(len(x), 2)  # mu, and sigma = 1

    def cluster(self, x):
        return one_hot((10 * x[:, 2]).round().clamp(max=9))

    def decode(self, z, y=None):
        images = tone(z, 0 if y is None else y.argmax(1))[:, None].expand(-1, 784)
        return images.view(-1, 1, 28, 28)  # some models return this shape

    def forward(self, x, *y):
        return self.decode(x, *y), *self.encode(x)


def tone(z, k=0):
    """The grey of images with code z (..., 2) and class k; z[0] counts more than z[1]."""
    return 0.4 + 0.05 * z[..., 0] + 0.005 * z[..., 1] + 0.03 * k


def tones(figure):
    """The upper left pixel of each image of a figure."""
    assert figure.axes[0].images[0].origin == "upper"  # or the images would stand on their heads
    return torch.tensor(figure.axes[0].images[0].get_array())[::28, ::28]


def test_a_mixture_fits_codes_in_many_spots():
    spot = torch.arange(12000) // 80  # 80 codes in each of 150 spots
    place = 15.0 * torch.stack([spot % 10, spot // 10], 1).double()
    truth = D.MultivariateNormal(place, torch.tensor([[1.0, 0.8], [0.8, 1.0]]).double())
    prior, z = common.fit_mixture(truth.sample(), 150), truth.sample()
    assert truth.log_prob(z).mean() - math.log(150) - prior.log_prob(z).mean() < 0.1


@pytest.mark.parametrize("script", [cvae, gumbel_vae])
def test_a_class_without_images_is_accepted(script, data, capsys):
    model = MODELS[script](n_classes=12)
    data.y_train[0], data.y_test[0] = 10, 11  # class 10 has one training image, 11 one test image
    if script is gumbel_vae:
        torch.nn.init.constant_(model.to_cluster_logits.bias[10:], -1000)
    prior = script.fit_prior(model, data)
    printed = capsys.readouterr().out
    assert "= 11: 0 codes are too few to fit 10 Gaussians, so N(0, I) is used\n" in printed
    assert_close([prior[11].mean, prior[11].stddev], [torch.zeros(20), torch.ones(20)])
    assert math.isfinite(script.evaluate(model, data, prior)["nelbo_fitted"])
    script.make_figures(model, data, prior, [])


# The pictures

PRIORS = [gaussian(torch.tensor([k / 5, 0.0]), 0.01 + 0.001 * k) for k in range(10)]


@pytest.fixture
def figures(script, data):
    """Toy's pictures of random images; the prior of class k draws codes near (k / 5, 0)."""
    data = data._replace(x_test=torch.rand_like(data.x_test))
    history = [{"nelbo_train": 9, "nelbo": 7}, {"nelbo_train": 8, "nelbo": 6}]
    with plt.rc_context({"image.origin": "lower"}):  # astronomers have this in their matplotlibrc
        made = script.make_figures(Toy(), data, PRIORS[0] if script is vae else PRIORS, history)
    assert plt.get_fignums() == []  # a notebook would show those left open a second time
    return made, data.x_test, data.y_test


def test_nothing_is_cut_off(script, figures):
    for name in {"generation", "fitted", "handwriting", "reconstruction"} & figures[0].keys():
        figures[0][name].savefig("picture.png")
        inked = (plt.imread("picture.png") < 1).any(2).any(0)  # of each column
        left, right = inked.argmax(), inked[::-1].argmax()
        assert left > 0 and right > 0 and abs(left - right) <= 6, name


def test_x_stands_above_x_reconst(script, figures):
    made, x, y = figures
    k = y[:12] if script is cvae else 0
    assert_close(tones(made["reconstruction"]), torch.stack([x[:12, 0], tone(x[:12, :2], k)]))


def test_generation_shows_codes_from_the_normal_prior(script, figures):
    """In a row, z varies as N(0, I) does, and the tones with it."""
    figure = figures[0]["generation"]
    seen = tones(figure)
    assert "N(0, I)" in figure.axes[0].get_title("left")
    assert seen.shape == ((8, 8) if script is vae else (10, 8))
    assert 0.01 < seen[0].std() < 0.12  # 0.05 in the long run
    if script is not vae:
        assert_close(seen, seen[0] + 0.03 * torch.arange(10)[:, None])  # a column shares its z
        labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
        assert labels == [f"{'y' if script is cvae else 'c'} = {k}" for k in range(10)]


def test_fitted_shows_codes_from_the_fitted_prior(script, figures):
    """In row k, the tones are those of codes near (k / 5, 0), and differ a little."""
    seen = tones(figures[0]["fitted"])
    assert "fitted prior" in figures[0]["fitted"].axes[0].get_title("left")
    assert seen.shape == {vae: (8, 8), cvae: (10, 8), gumbel_vae: (10, 20)}[script]
    k = torch.arange(len(seen)) * (script is not vae)
    right = tone(torch.stack([k / 5, 0 * k], 1), k)
    assert abs(seen - right[:, None]).max() < 0.005
    assert seen[0].std() > 1e-4


@pytest.mark.parametrize("script", [cvae, gumbel_vae])
def test_handwriting_moves_a_code_to_every_class(script, figures):
    """A mu two deviations from the mean of its class stays two from the mean of every class."""
    made, x, y = figures
    c = y[:12] if script is cvae else Toy().cluster(x[:12]).argmax(1)
    mean, sd = (torch.stack([getattr(r, name) for r in PRIORS]) for name in ("mean", "stddev"))
    deviations = (x[:12, :2] - mean[c]) / sd[c]
    drawn = [tone(mean[k] + deviations * sd[k], k) for k in range(10)]
    assert_close(tones(made["handwriting"]), torch.stack([x[:12, 0], torch.zeros(12), *drawn], 1))
    axes = made["handwriting"].axes[0]
    assert "moved" in axes.get_title("left")
    above = [label.get_text() for label in axes.get_xticklabels() if label.get_visible()]
    assert above == ["x", "", *"0123456789"]


def test_handwriting_without_priors_keeps_the_code():
    x = torch.rand(3, 28, 28)  # encode gets this shape, which a convolutional encoder needs
    drawn = [tone(x[:, 0, :2], k) for k in range(10)]
    seen = tones(common.plot_handwriting(Toy(), x))
    assert_close(seen, torch.stack([x[:, 0, 0], torch.zeros(3), *drawn], 1))


def test_handwriting_takes_any_integers_as_classes_and_nothing_else():
    x, c = torch.rand(10, 784), torch.arange(10)
    right, *found = (tones(common.plot_handwriting(Toy(), x, PRIORS, given))
                     for given in (c, c.byte(), c.short().numpy()))
    assert all(seen.equal(right) for seen in found)
    for given in c - 1, c + 1, c[:, None], c.float(), c > 4, None:
        with pytest.raises(ValueError, match="classes"):
            common.plot_handwriting(Toy(), x, PRIORS, given)


@pytest.mark.parametrize("script", [vae])
def test_the_manifold_maps_the_plane_of_z_and_the_codes(script, figures):
    """Left: images decoded over the plane, z[0] to the right, z[1] up. Right: codes of images."""
    made, x, y = figures
    middle = D.Normal(0.0, 1.0).icdf(torch.arange(10) / 10 + 0.05)
    z = torch.stack(torch.meshgrid(middle, middle.flip(0), indexing="xy"), 2)  # (10, 10, 2)
    assert_close(tones(made["manifold"]), tone(z))
    dots = made["manifold"].axes[1].collections[0]
    codes = D.Normal(0.0, 1.0).icdf(torch.tensor(dots.get_offsets().data).clamp(1e-6, 1 - 1e-6))
    noise = codes - x[:, :2]
    assert abs(noise.T @ noise / len(noise) - torch.eye(2)).max() < 0.4  # each code is one sample
    assert dots.get_array().tolist() == y.tolist()


@pytest.mark.parametrize("k", [0, 3])
def test_fix_number_chooses_the_class(k):
    seen = tones(common.plot_conditional_generation(Toy(), n=4, fix_number=k, prior=PRIORS[0]))
    assert_close(seen, torch.full((1, 4), tone(torch.zeros(2), k)), atol=0.003, rtol=0)


def test_show_draws_dark_ink_in_rows_of_square_images():
    x = np.arange(9.0).repeat(784).reshape(9, 784) / 8
    figure = common.show([*torch.tensor(x)], columns=4)
    image = figure.axes[0].images[0]
    assert image.get_extent() == [0, 4, 3, 0]  # in widths of an image: so each is square
    assert tones(figure).tolist() == [[0, 1/8, 2/8, 3/8], [4/8, 5/8, 6/8, 7/8], [1, 0, 0, 0]]
    shades = image.to_rgba(np.array([[0.0, 0.5, 1.0]]))[0, :, 0]
    assert shades == pytest.approx([1, 0.5, 0], abs=0.01)  # of paper, grey and ink
    with pytest.raises(ValueError, match="from 0 to 255"):
        common.show(255 * x)


# The data

@pytest.mark.parametrize("change, message", [
    (dict(x_train=255 * torch.rand(4, 4)), "floats from 0 to 1"),
    (dict(x_test=None, y_test=None), "test images are needed"),
    (dict(y_test=torch.arange(3)), "y_test must hold")])
def test_make_data_says_what_is_wrong(change, message):
    good = dict(x_train=[[0.5] * 4], y_train=None, x_test=torch.rand(4, 2, 2), y_test=[0, 1, 2, 3])
    common.make_data(**good)
    with pytest.raises(ValueError, match=message):
        common.make_data(**{**good, **change})


def test_without_a_download_the_bundled_digits_are_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(MNIST, "mirrors", [])  # no network
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(9999))[:-9])  # cut off
    data = common.load_mnist(tmp_path)
    assert "WARNING" in capsys.readouterr().out and "NOT MNIST" in data.source


def test_a_users_own_archives_are_used_and_kept(script, tmp_path, monkeypatch):
    """Here they hold 32x32 images, labelled 16 to 25, as letters up to z would be."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(MNIST, "mirrors", [])  # no network
    write_mnist(tmp_path, 100, margin=2, first=16)
    for file in [*Path("MNIST/raw").iterdir()]:
        Path(f"{file}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    before = {file: file.read_bytes() for file in Path("MNIST/raw").iterdir()}
    start(script, "--data=.")
    assert torch.load(f"{script.__name__}.pt")["to_hidden.weight"].shape == (400, 32 * 32)
    assert all(file.read_bytes() == content for file, content in before.items())


# The command line

@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Runs all scripts; returns their folder and what each printed."""
    folder, started = tmp_path_factory.mktemp("runs"), {}
    write_mnist(folder / "data")
    options = {gumbel_vae: "--epochs=3", vae: "--epochs=2", cvae: "--epochs=2 --beta=1"}
    for script in options:
        out = f"--out={script.__name__}/a"
        arguments = [script.__file__, out, *options[script].split()]
        started[script] = subprocess.Popen(
            [sys.executable, *arguments], cwd=folder, text=True, stdout=subprocess.PIPE,
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


def test_a_run_says_what_it_does_and_leaves_its_files(script, runs, trained):
    (folder, printed), name = runs, script.__name__
    assert printed[script].startswith("MNIST: 14,980 training and 299 test images, on ")
    epochs = re.findall(r"\nepoch +(\d) .* nelbo ([\d.]+)", printed[script])
    assert [epoch for epoch, nelbo in epochs] == ["1", "2", "3"][:2 + (script is gumbel_vae)]
    assert float(epochs[0][1]) > float(epochs[-1][1]) == trained[2]["nelbo"]
    pictures = {"reconstruction", "generation", "fitted", "loss"}
    pictures |= set() if script is vae else {"handwriting"}
    files = {*(folder / name / "a").iterdir()}
    assert {file.name for file in files} == {f"{name}.pt", *(f"{name}_{p}.png" for p in pictures)}
    assert files == {folder / path for path in re.findall("wrote (.*)", printed[script])}
    for picture in files - {folder / name / "a" / f"{name}.pt"}:
        assert plt.imread(picture)[..., :3].std() > 0.1, f"{picture} is blank"


def test_a_run_learns(script, trained):
    data, model, scores = trained
    mean_image = data.x_train.mean(0).logit(eps=1e-3).expand_as(data.x_test)
    bound = script.reconstruction(mean_image, data.x_test)  # the cost of the mean image for each x
    assert scores["nelbo_fitted"] < scores["nelbo"] < bound - 20
    if script is gumbel_vae:  # it finds the digits
        assert scores["acc"] > 0.65
    if script is cvae:  # each image is scored with its own label
        shifted = data._replace(y_test=data.y_test.roll(1))
        assert script.evaluate(model, shifted)["nelbo"] > scores["nelbo"] + 1


@pytest.mark.parametrize("script, least, least_fitted", [
    (cvae, 0.8, 0.95), (gumbel_vae, 0.6, 0.6)])
def test_a_run_draws_the_digits_asked_for(script, least, least_fitted, trained):
    data, model, scores = trained
    classes = data.y_train if script is cvae else model.cluster(data.x_train).argmax(1)
    digit = torch.stack([data.y_train[classes == k].bincount(minlength=10).argmax()
                         for k in range(10)])
    reader = KNeighborsClassifier(3).fit(data.x_train[:1498], data.y_train[:1498])
    for prior, share in (None, least), (script.fit_prior(model, data), least_fitted):
        images = common.decode_classes(model, common.draw_codes(model, 50, prior)).flatten(0, 1)
        assert reader.score(images, digit.repeat_interleave(50)) > share


def test_the_same_seed_gives_the_same_run(script, data, monkeypatch):
    monkeypatch.setattr(script, "make_figures", lambda *given: {})
    arguments = ["--epochs=1", "--z-dim=2", "--out=.", "--device=cpu"]  # on CUDA, sums may differ
    one, same, other = (script.main([*arguments, f"--seed={seed}"]) for seed in (5, 5, 6))
    assert one == same != other


def test_the_defaults_stay_as_documented(script, monkeypatch):
    assert DEFAULTS[script].items() <= vars(script.options().parse_args([])).items()
    for function in script.train, script.fit_prior:
        for name, option in [*inspect.signature(function).parameters.items()][2:]:
            assert option.default == DEFAULTS[script].get(name, 150 if script is vae else 10)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert script.options().parse_args([]).device == "cuda"


def test_each_option_reaches_the_training(script, data, monkeypatch):
    train, signature = Mock(side_effect=OSError("stop")), inspect.signature(script.train)
    monkeypatch.setattr(script, "train", train)
    # Each is changed by a different amount, so that swapped options are noticed.
    changed = {name: "capacity" if name == "objective" else value + i
               for i, (name, value) in enumerate(DEFAULTS[script].items(), start=1)}
    with pytest.raises(SystemExit, match="stop"):
        start(script, *(f"--{name.replace('_', '-')}={value}" for name, value in changed.items()))
    passed = signature.bind(*train.call_args.args, **train.call_args.kwargs).arguments
    found = {**vars(passed["model"]), **passed}  # z_dim and n_classes are the model's
    assert {name: found[name] for name in changed} == changed


def test_weights_survive_a_later_fault(script, data, monkeypatch):
    monkeypatch.setattr(script, "fit_prior", Mock(side_effect=KeyError("typo")))
    for home in "HOME", "USERPROFILE":  # the second on Windows
        monkeypatch.setenv(home, os.getcwd())
    with pytest.raises(KeyError, match="typo"):  # a mistake keeps its traceback
        start(script, "--data=~/data", "--out=~/runs")
    weights = script.fit_prior.call_args.args[0].cpu().state_dict()
    assert_close(torch.load(f"runs/{script.__name__}.pt"), dict(weights))


def test_old_weights_survive_a_full_disk(tmp_path, monkeypatch):
    write, path = Path.write_bytes, tmp_path / "vae.pt"
    def write_half(self, content):
        write(self, content[:99])
        raise OSError("full disk")
    common.save({"bias": torch.ones(2)}, path)
    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(OSError, match="full disk"):
        common.save({"bias": torch.zeros(2)}, path)
    assert_close(torch.load(path), {"bias": torch.ones(2)})


@pytest.mark.parametrize("arguments, message", [
    ("--epochs 0", "'0' is not an integer >= 1"), ("--beta -1", "'-1' is not a number >= 0"),
    ("--betta 1", "unrecognized arguments")])
def test_bad_options_are_refused(arguments, message, data, capsys):
    with pytest.raises(SystemExit, match="2"):
        start(gumbel_vae, *arguments.split())
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("arguments, message", [
    ("--lr=1e30", "diverged"), ("--data=FILE", "FILE"), ("--out=FILE", "FILE"),
    ("--data=CUT", "delete any damaged file")])
def test_faults_end_in_one_line_and_leave_no_file(arguments, message, script, data):
    Path("FILE").touch()
    images = Path(shutil.copytree("data", "CUT"), "MNIST/raw/train-images-idx3-ubyte")
    images.write_bytes(images.read_bytes()[:1000])
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit, match=rf"^.*{message}.*$"):  # . matches no line break
        start(script, arguments)
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("script, argv", [
    (vae, ["ipykernel_launcher.py", "-f", "kernel.json"]),
    (cvae, ["colab_kernel_launcher.py", "-f", "kernel.json"]),
    (gumbel_vae, ["gumbel_vae.py", "--epochs=1"])])  # as %run does
def test_a_script_trains_in_a_notebook(script, argv, data, monkeypatch):
    source = Path(script.__file__).read_text(encoding="utf-8")
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # in a notebook, it is no file
    exec(source, {"__name__": "__main__"})
    assert Path(f"samples/{script.__name__}.pt").exists()


# The README

def test_the_readme_quotes_the_code_as_it_is():
    source = " ".join("".join(inspect.getsource(module) for module in (*MODELS, common)).split())
    for block in re.findall(r"```py\n(.*?)```", README, re.DOTALL):
        assert " ".join(block.split()) in source


def test_the_links_of_the_readme_lead_somewhere():
    paths = re.findall(r'(?:\]\(|src=")([\w./]+)[#)"]', README)
    assert [path for path in paths if not (HERE / path).exists()] == []


def test_the_commands_of_the_readme_are_accepted(script):
    commands = rf"\b{script.__name__}\.py( --[^\n#`&;|<]*)"
    for arguments in re.findall(commands, README + script.__doc__):
        script.options().parse_args(arguments.split())


def test_the_snippets_of_the_readme_run_in_order(data):
    exec("".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL)), {})
