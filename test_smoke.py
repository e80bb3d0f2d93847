"""What must hold, in under a minute, without a network and without MNIST: pytest test_smoke.py"""
import copy
import inspect
import math
import os
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from torch.testing import assert_close
from torchvision.datasets import MNIST

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


def write_mnist(folder, n=None):
    """scikit-learn's digits, the first n of both parts, as bytes in MNIST's format."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    names = "train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"
    for name, array in zip(names, common.bundled_digits()):
        array = np.asarray(array[:n])
        if "images" in name:
            array = (255 * array).round().reshape(-1, 28, 28)
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
        (raw / f"{name}-ubyte").write_bytes(header + array.astype(np.uint8).tobytes())
    return folder


@pytest.fixture(scope="session")
def few(tmp_path_factory):
    """A folder with 300 digits, where something only has to run."""
    return write_mnist(tmp_path_factory.mktemp("few"), 300)


@pytest.fixture
def data(few):
    return common.load_mnist(few)


@pytest.fixture
def tiny(few, tmp_path):
    """Runs a script as from the command line, on few digits, its files in tmp_path."""
    def run(script, *argv):
        words = ["--data", few, "--out", tmp_path, "--epochs", 1, *argv]
        common.run(lambda argv: script.main([str(word) for word in words]))
    return run


def files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.*")}


class Toy(nn.Module):
    """Draws images of one tone: the first number of z sets it, and each class adds to it."""
    def __init__(self):
        super().__init__()
        self.z_dim, self.n_classes, self.weight = 2, 10, nn.Parameter(torch.zeros(()))

    def encode(self, x):
        return x[:, :2], torch.zeros(len(x), 2)  # sigma = 1

    def cluster(self, x):
        return common.one_hot((10 * x[:, 2]).round())

    def decode(self, z, y=torch.ones(1, 1)):
        tone = 0.3 + 0.1 * z[:, :1] + 0.05 * y.argmax(1, keepdim=True)
        return tone.expand(-1, 784).view(-1, 1, 28, 28)  # in the shape that some give images

    def forward(self, x, *y):
        return self.decode(self.encode(x)[0], *y), *self.encode(x)


def tones(figure):
    """The upper left pixel of each image of a figure."""
    return torch.tensor(figure.axes[0].images[0].get_array())[::28, ::28]


# The mathematics. Empty a function and write it anew: pytest test_smoke.py -k gaussian_kl

def check(loss, oracle, *inputs):
    """The same value and the same gradients."""
    gradients = [torch.autograd.grad(value, inputs, retain_graph=True) for value in (loss, oracle)]
    assert_close((loss, gradients[0]), (oracle, gradients[1]))


def test_reparameterize(script):
    mu, log_var = (2 * torch.randn(2, 3, 5)).requires_grad_()
    z = torch.stack([script.reparameterize(mu, log_var) for _ in range(4000)])
    noise = ((z - mu) / log_var.exp().sqrt()).detach()
    assert abs(noise.mean(0)).max() < 0.1 and abs(noise.var(0) - 1).max() < 0.15
    assert abs(torch.corrcoef(noise.flatten(1).T) - torch.eye(15)).max() < 0.1  # each its own
    check(z[0].sum(), (mu + torch.exp(log_var / 2) * noise[0]).sum(), mu, log_var)


def test_reconstruction(script):
    x, logits = torch.rand(7, 784), torch.randn(7, 784, requires_grad=True)
    p = D.Bernoulli(logits=logits, validate_args=False)
    check(script.reconstruction(logits, x), -p.log_prob(x).sum(1).mean(), logits)


def test_gaussian_kl(script):
    mu, log_var = torch.randn(2, 7, 5, requires_grad=True)
    kl = D.kl_divergence(D.Normal(mu, torch.exp(log_var / 2)), D.Normal(0.0, 1.0))
    check(script.gaussian_kl(mu, log_var), kl.sum(1).mean(), mu, log_var)


def test_categorical_kl():
    logits = torch.randn(9, 6, requires_grad=True)
    kl = D.kl_divergence(D.Categorical(logits=logits), D.Categorical(torch.ones(6))).mean()
    check(gumbel_vae.categorical_kl(logits.log_softmax(1)), kl, logits)


def test_clustering():
    logits, warped = torch.randn(9, 6, requires_grad=True), torch.randn(18, 6, requires_grad=True)
    q, teacher = D.Categorical(logits=logits), D.Categorical(logits=logits.detach().repeat(2, 1))
    oracle = D.kl_divergence(teacher, D.Categorical(logits=warped)).mean()
    oracle = oracle + 0.1 * q.entropy().mean() - 0.5 * D.Categorical(q.probs.mean(0)).entropy()
    loss = gumbel_vae.clustering(logits.log_softmax(1), warped.log_softmax(1))
    check(loss, oracle, logits, warped)


def test_read_back():
    model, k, told = gumbel_vae.GumbelVAE(), torch.arange(50) % 10, []
    gumbel_vae.read_back(model, torch.randn(50, 20), k).backward()
    taught = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert taught == {"from_latent", "to_logits", "to_cluster_hidden", "to_cluster_logits"}
    model.decode = lambda z, y: Toy().decode(z, y).flatten(1)
    model.cluster = lambda x: told.append(x) or gumbel_vae.GumbelVAE.cluster(model, x)
    loss = gumbel_vae.read_back(model, torch.zeros(50, 20), k)
    x = told[0].view(50, 28, 28)
    assert_close(x[:, 14, 14], 0.3 + 0.05 * k)  # drawn for k
    assert (x[:, 0, 0] == 0).any()  # and warped
    assert_close(loss, -D.Categorical(logits=model.cluster(told[0])).log_prob(k).mean())


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


# The training

@pytest.mark.parametrize("script, options, loss", [
    (vae, {}, lambda climb, half, recon, kl, *_: recon + kl),
    (cvae, dict(beta=5.0), lambda climb, half, recon, kl, *_: recon + (1 + 4 * climb) * kl),
    (gumbel_vae, dict(beta=2.0, objective="elbo", tau=0.3),
     lambda climb, half, recon, kl, kl_c, *_: recon + (1 + climb) * kl + kl_c),
    (gumbel_vae, dict(beta=30.0, objective="capacity"), lambda climb, half, recon, kl, kl_c, *_:
        recon + 30 * abs(kl - 2 * half) + 30 * abs(kl_c - math.log(10) * half)),
    (gumbel_vae, dict(beta=2.0, gamma=3.0, read_weight=7.0, tau=2.0),
     lambda climb, half, recon, kl, kl_c, alike, read:
        recon + (1 + climb) * kl + 3 * alike + 7 * climb * read)])
def test_training_goes_as_by_hand_with_the_same_random_numbers(script, options, loss, data):
    torch.manual_seed(0)
    model = MODELS[script](h_dim=32, z_dim=5)
    twin, state = copy.deepcopy(model), torch.get_rng_state()
    history = script.train(model, data, epochs=4, batch_size=128, lr=0.01, **options)
    torch.set_rng_state(state)
    optimizer = torch.optim.Adam(twin.parameters())
    for epoch, metrics in enumerate(history):
        nelbo = 0
        for i, batch in enumerate(torch.randperm(300).split(128), start=3 * epoch):  # of 12 steps
            climb, half = min(1, (i + 1) / 3), min(1, 2 * i / 12)
            optimizer.param_groups[0]["lr"] = 0.01 * min(climb, (12 - i) / 9)
            x, n = data.x_train[batch], len(batch)
            given = [common.one_hot(data.y_train[batch])] * (script is cvae)
            mu, log_var = twin.encode(x)
            kl_c = alike = read = torch.zeros(())
            warps = gumbel_vae.warp(torch.cat([x, x])) if "gamma" in options else x[:0]
            if script is gumbel_vae:
                log_q, log_q_warped = twin.cluster(x), twin.cluster(warps)
                given = [F.gumbel_softmax(log_q, options.get("tau", 0.5), hard=True)]
                kl_c = gumbel_vae.categorical_kl(log_q)
            z = D.Normal(mu, torch.exp(log_var / 2)).rsample()
            if "gamma" in options:
                alike = gumbel_vae.clustering(log_q, log_q_warped)
                codes = torch.cat([z[::8].detach(), torch.randn(len(z[::8]), 5)])
                k = torch.randint(10, (len(codes),))
                read = gumbel_vae.read_back(twin, codes, k)
            recon = script.reconstruction(twin.logits(z, *given), x)
            kl = script.gaussian_kl(mu, log_var)
            nelbo += (recon + kl + kl_c).item() * n / 300
            optimizer.zero_grad()
            loss(climb, half, recon, kl, kl_c, alike, read).backward()
            optimizer.step()
        expected = {"nelbo_train": nelbo, **script.evaluate(twin, data)}
        assert {**metrics, **expected} == pytest.approx(metrics, rel=1e-4, abs=1e-5)


def test_no_step_leaves_the_device_or_waits_for_it(script, data, monkeypatch):
    # Tensors on the meta device hold no numbers, and refuse those of other devices and .item().
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, fused: torch.optim.SGD(parameters))
    with torch.device("meta"):
        model, steps = MODELS[script](), []
    encode = model.encode
    model.encode = lambda x: steps.append(len(x)) or encode(x)
    with pytest.raises(RuntimeError, match="meta"):
        script.train(model, common.Data(*(tensor.to("meta") for tensor in data[:4]), ""), 1, 64)
    assert steps == [64] * 4 + [44]  # only the end of an epoch asks for a number


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_losses_of_the_cpu(script, few, tmp_path):
    on_cpu, on_cuda = (script.main(["--data", str(few), "--out", str(tmp_path), "--device", device])
                       for device in ("cpu", "cuda"))
    assert on_cuda["nelbo"] == pytest.approx(on_cpu["nelbo"], rel=0.05)


@torch.no_grad()
def test_forward_and_each_metric_agree_with_the_bound(script, data):
    torch.manual_seed(0)
    model, x, y = MODELS[script](), data.x_train.repeat(10, 1), data.y_train.repeat(10)
    data, k = data._replace(x_test=x, y_test=y), 0 * y if script is vae else y
    model.to_log_var.bias.fill_(-2)  # sigma is not 1
    if script is gumbel_vae:  # c is unsure, and each draws differently
        model.to_cluster_logits.weight.mul_(10)
        model.from_latent.weight[:, 20:].mul_(10)
    x_reconst, mu, log_var, *log_q = model(x, *[common.one_hot(y)] * (script is cvae))
    assert abs(x_reconst.mean() - 0.13) < 0.05  # it starts from MNIST's mean pixel
    q, p = D.Normal(mu, torch.exp(log_var / 2)), D.Normal(0.0, 1.0)
    recon = F.binary_cross_entropy(x_reconst, x, reduction="sum").item() / len(x)
    kl = D.kl_divergence(q, p).sum(1).mean().item()
    expected = {"recon": recon, "kl": kl, "nelbo": recon + kl}
    if script is gumbel_vae:
        c, h_c = D.Categorical(logits=log_q[0]), D.Categorical(log_q[0].exp().mean(0)).entropy()
        kl_c, k = math.log(10) - c.entropy().mean().item(), c.sample()
        expected.update(kl_c=kl_c, i_c=h_c.item() - c.entropy().mean().item(),
                        nelbo=recon + kl + kl_c, **gumbel_vae.score(y, log_q[0].argmax(1)))
    z = q.sample()
    change = (p.log_prob(z) - D.Normal(k[:, None] / 10, 1.5).log_prob(z)).sum(1).mean().item()
    expected["nelbo_fitted"] = expected["nelbo"] + change
    prior = [D.Independent(D.Normal(torch.full((20,), i / 10), 1.5), 1) for i in range(10)]
    prior = prior[0] if script is vae else prior
    metrics = script.evaluate(model, data, prior)
    assert metrics == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert script.evaluate(model, data, prior) == metrics  # whatever was drawn in between
    assert script.evaluate(model, data, seed=1)["recon"] != metrics["recon"]
    model.to_log_var.bias.fill_(-100)  # z is mu, only c is random
    one, two = (script.evaluate(model, data, seed=seed)["recon"] for seed in (0, 1))
    assert (one != two) == (script is gumbel_vae)
    model.to_mu.bias.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        script.evaluate(model, data)


# After training

def test_fit_prior_takes_a_sampled_code_of_each_training_image_of_its_class(script, capsys):
    group = (torch.arange(4000) % 10).clamp(max=3 if script is vae else 9)
    x = group[:, None] * torch.tensor([10.0, 10.0, 0.1])  # in Toy, z ~ N(10 * group, I), c = group
    y = (group + 3) % 10
    data = common.Data(x, y, x + 1000, y, "")
    prior = script.fit_prior(Toy(), data)
    if script is vae:
        z, weights = x[:, :2] + torch.randn(4000, 2), group.bincount() / 4000  # .1, .1, .1, .7
        truth = D.Normal(x[:, :2], 1.0).log_prob(z).sum(1) + weights[group].log()
        assert abs(prior.log_prob(z).mean() - truth.mean()) < 0.2
        return
    of = y if script is cvae else group
    assert_close(torch.stack([own.mean[0] for own in prior])[of], x[:, 0], atol=0.4, rtol=0)
    assert_close(torch.stack([own.variance for own in prior]), torch.ones(10, 2), atol=0.4, rtol=0)
    some = torch.cat([torch.arange(0, 450, 10), torch.arange(1, 301, 10)])  # 45, 30; 40 needed
    prior = script.fit_prior(Toy(), data._replace(x_train=x[some], y_train=y[some]))
    fitted = [k for k, own in enumerate(prior) if isinstance(own, D.MixtureSameFamily)]
    assert fitted == [of[0]] and prior[of[1]].mean.eq(0).all() and prior[of[1]].variance.eq(1).all()
    assert capsys.readouterr().out.count("N(0, I) stays") == 9
    common.fit_mixture(torch.randn(80, 2, requires_grad=True), 2)


# The pictures

def test_the_helpers_take_the_courses_models_and_calls():
    model = Toy()
    del model.z_dim, model.n_classes  # the course's models have none: 20 and 10
    torch.manual_seed(0)
    tone, classes = 0.3 + 0.1 * torch.randn(24, 20)[:, 0], 0.05 * torch.arange(10)[:, None]
    for helper, options, expected in (
            (common.plot_generation, {}, tone.view(3, 8)),
            (common.plot_generation, {"n": 24}, tone.view(3, 8)),
            (common.plot_conditional_generation, {"n": 8}, tone[:8] + classes),
            (common.plot_conditional_generation, {"n": 8, "fix_number": 2}, tone[None, :8] + 0.1)):
        torch.manual_seed(0)
        assert_close(tones(helper(model, **options)), expected)


def test_show_draws_dark_ink_on_white_and_labels_the_rows_from_the_top():
    images = torch.linspace(0, 1, 6)[:, None].expand(6, 784)
    figure = common.show(images, columns=2, row_labels="abc")
    axes, drawn = figure.axes[0], figure.axes[0].images[0].to_rgba(tones(figure).numpy())
    assert_close(1 - drawn[..., 0], images[:, 0].view(3, 2).double().numpy(), atol=0.01, rtol=0)
    assert axes.yaxis_inverted() and axes.get_yticks().tolist() == [14, 42, 70]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["a", "b", "c"]
    with pytest.raises(ValueError, match="no square images"):
        common.show(torch.rand(2, 60))


def test_each_picture_shows_what_its_name_says(script, data):
    history = [{"nelbo_train": 9, "nelbo": 7}, {"nelbo_train": 8, "nelbo": 6}]
    data = data._replace(x_test=torch.rand_like(data.x_test))  # each tells its own tone
    priors = [D.Independent(D.Normal(torch.tensor([k / 5, 0.0]), 1e-9), 1) for k in range(10)]
    figures = script.make_figures(Toy(), data, priors[0] if script is vae else priors, history)
    tone, classes = 0.3 + 0.1 * data.x_test[:12, 0], 0.05 * torch.arange(10)[:, None]
    asked = 0.05 * data.y_test[:12] if script is cvae else 0
    pairs = torch.stack([data.x_test[:12, 0], tone + asked])
    assert_close(tones(figures["reconstruction"]), pairs)
    generated, fitted = tones(figures["generation"]), tones(figures["fitted"])
    assert generated[0].std() > 0.02
    if script is vae:
        assert_close(fitted, torch.full((8, 8), 0.3))
    else:
        assert_close(generated - classes, generated[:1].expand(10, -1))  # one z down a column
        assert_close(fitted, (0.3 + 1.4 * classes).expand_as(fitted))  # z / 10, and the class
        given = torch.stack([data.x_test[:12, 0], torch.zeros(12)], 1)
        drawn = torch.cat([given, tone[:, None] + classes.T], 1)
        assert_close(tones(figures["handwriting"]), drawn)
        labels = [tick.get_text() for tick in figures["fitted"].axes[0].get_yticklabels()]
        assert labels == [f"{'y' if script is cvae else 'c'} = {k}" for k in range(10)]
    lines = figures["loss"].axes[0].lines
    curves = [(line.get_label(), *line.get_xydata().T.tolist()) for line in lines]
    assert curves == [("training images", [1, 2], [9, 8]), ("test images", [1, 2], [7, 6])]


def test_the_manifold_is_a_map_with_the_first_number_of_z_to_the_right():
    model, codes, normal = Toy(), torch.tensor([[0.0, -1.0], [2.0, 0.5]]), D.Normal(0.0, 1.0)
    model.decode = lambda z: (0.5 + 0.1 * z[:, :1] + 0.01 * z[:, 1:]).expand(-1, 784)
    figure = common.plot_manifold(model, codes, torch.tensor([3, 4]), n=4)
    ticks = normal.icdf(torch.tensor([1, 3, 5, 7]) / 8)
    assert_close(tones(figure), 0.5 + 0.1 * ticks + 0.01 * ticks.flip(0)[:, None])
    dots = figure.axes[1].collections[0]
    assert_close(torch.tensor(dots.get_offsets().data).float(), normal.cdf(codes))
    assert dots.get_array().tolist() == [3, 4] and len(figure.legends[0].texts) == 2


# The data

def test_load_mnist_gives_the_bytes_of_the_files_and_each_image_its_own_label(
        few, data, monkeypatch):
    for array, loaded in zip(common.bundled_digits(), data):
        array = torch.as_tensor(array[:300])
        assert_close(loaded, array if array.dim() == 1 else (255 * array).round() / 255)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: 1 / 0)  # the device is full
    with pytest.raises(ZeroDivisionError):  # and the files are not blamed
        common.load_mnist(few)


@pytest.mark.parametrize("error", [RuntimeError("no network"), TimeoutError(), OSError("full")])
def test_only_a_failed_download_leads_to_the_bundled_digits(error, tmp_path, monkeypatch, capsys):
    def refuse(self):
        raise error if socket.getdefaulttimeout() == 10 else ValueError("it might wait forever")
    monkeypatch.setattr(MNIST, "download", refuse)
    if type(error) is OSError:
        with pytest.raises(OSError, match="full"):
            common.load_mnist(tmp_path)
        return
    data = common.load_mnist(tmp_path)
    assert socket.getdefaulttimeout() is None
    assert (len(data.x_train), len(data.x_test)) == (14980, 299)
    assert "WARNING" in capsys.readouterr().out and "NOT MNIST" in data.source
    reader = KNeighborsClassifier(1).fit(*load_digits(return_X_y=True))
    small = F.interpolate(data.x_test.view(-1, 1, 28, 28)[..., 4:24, 4:24], size=8, mode="area")
    assert (reader.predict(16 * small.flatten(1)) == data.y_test.numpy()).mean() > 0.99
    reader.fit(data.x_test, data.y_test)
    assert (reader.predict(data.x_train[:1498]) == data.y_train[:1498].numpy()).mean() > 0.9
    assert not set(map(bytes, data.x_train.numpy())) & set(map(bytes, data.x_test.numpy()))


def test_make_data_copies_arrays_tensors_and_lists_of_bytes_or_floats():
    images, labels = torch.randint(256, (5, 6, 6), dtype=torch.uint8), [1, 2, 3, 4, 0]
    floats = images.flatten(1) / 255
    for given in images, images.numpy().astype(np.uint16), [*images.numpy()]:
        data = common.make_data(given, labels, floats, None)
        assert_close(data.x_train, data.x_test)
    floats[:] = 0
    assert data.x_test.max() > 0 and data.y_train.tolist() == labels and data.y_test is None


@pytest.mark.parametrize("change, says", [
    ({"x_train": torch.rand(4, 9) * 2 - 1}, "x_train must be floats from 0 to 1, or integers"),
    ({"x_test": torch.full((4, 9), math.nan)}, "x_test must be .* from nan to nan"),
    ({"x_train": torch.ones(4, 9, dtype=torch.uint8)}, "for 0 and 1, give floats.*uint8"),
    ({"x_train": torch.rand(0, 9)}, r"square images.* \(0, 9\)"),
    ({"x_train": torch.rand(100, 560)}, "square"), ({"x_test": torch.rand(4, 16)}, "one size"),
    ({"y_train": torch.arange(3)}, "y_train must be one"),
    ({"y_train": torch.arange(4) - 1}, "one integer from 0"),
    ({"y_test": torch.rand(4)}, "y_test must be one integer from 0.*float32")])
def test_make_data_says_what_is_wrong(change, says):
    good = dict(x_train=torch.rand(4, 3, 3), y_train=None, x_test=torch.rand(4, 9), y_test=None)
    with pytest.raises(ValueError, match=says):
        common.make_data(**{**good, **change})


def test_labels_may_be_missing_and_mistakes_are_named(data):
    for name in "y_train", "y_test":
        unlabelled = data._replace(**{name: None})
        with pytest.raises(ValueError, match="needs y_train and y_test"):
            cvae.train(cvae.CVAE(), unlabelled)
    gumbel_vae.train(gumbel_vae.GumbelVAE(), unlabelled, epochs=1)
    model = vae.VAE(z_dim=2)
    assert "manifold" in vae.make_figures(model, unlabelled, None, vae.train(model, unlabelled, 1))
    with pytest.raises(ValueError, match="'ELBO' is none of elbo, capacity, clustering"):
        gumbel_vae.train(model, data, objective="ELBO")
    with pytest.raises(TypeError):  # y is no temperature
        common.plot_reconstruction(gumbel_vae.GumbelVAE(), data.x_test, data.y_test)


# The command line

@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Each script once, as a user starts it, all at the same time; the folder of their data."""
    folder, runs = write_mnist(tmp_path_factory.mktemp("digits")), {}
    for script, more in (gumbel_vae, []), (vae, []), (cvae, ["--beta", "1"]):
        out = tmp_path_factory.mktemp("samples") / "of" / "mine"
        words = [f"{script.__name__}.py", "--data", folder, "--out", out, "--epochs", "3", *more]
        runs[script] = out, subprocess.Popen(
            [sys.executable, *words], cwd=HERE, text=True, stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"})
    return runs, folder


def test_a_run_learns_says_what_it_does_and_leaves_its_files(script, runs):
    out, process = runs[0][script]
    lines, data = process.communicate()[0].splitlines(), common.load_mnist(runs[1])
    assert process.returncode == 0
    assert {"MNIST,", "14,980", "299"} <= set(lines[0].split()) and "minimises" in lines[0]
    assert [line[:9] for line in lines[1:4]] == ["epoch   1", "epoch   2", "epoch   3"]
    names = ["reconstruction", "generation", "fitted", "handwriting", "loss"]
    names = [f"_{name}.png" for name in names if script is not vae or name != "handwriting"]
    paths = [out / f"{script.__name__}{name}" for name in (".pt", *names)]
    wrote, test, *pictures = lines[-1 - len(paths):]
    assert [wrote, *pictures] == [f"wrote {path}" for path in paths]
    assert sorted(out.iterdir()) == sorted(paths)
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in paths[1:])
    mean = data.x_train.mean(0).clamp(1e-3, 1 - 1e-3).expand_as(data.x_test)
    bound = F.binary_cross_entropy(mean, data.x_test, reduction="sum").item() / 299
    printed = {name: float(value) for name, value in re.findall(r"(\w+) (-?[\d.]+)", test)}
    assert printed["nelbo_fitted"] < printed["nelbo"] < bound - 20
    model, digit = MODELS[script](), torch.arange(10)
    model.load_state_dict(torch.load(paths[0]))
    assert script.evaluate(model, data)["nelbo"] == pytest.approx(printed["nelbo"], abs=0.01)
    if script is vae:
        return
    if script is gumbel_vae:
        c = model.cluster(data.x_train).argmax(1)
        digit = torch.stack([data.y_train[c == k].bincount(minlength=10).argmax() for k in digit])
        assert printed["acc"] > 0.65 and len(set(digit.tolist())) > 7
    reader = KNeighborsClassifier(3).fit(data.x_train[:1498], data.y_train[:1498])
    for prior in script.fit_prior(model, data), None:
        images = common.decode_classes(model, common.draw_codes(model, 50, prior)).flatten(0, 1)
        read = torch.tensor(reader.predict(images)).view(10, 50)
        least = 0.6 if script is gumbel_vae else 0.95 if prior else 0.8
        assert (read == digit[:, None]).float().mean() > least


@pytest.mark.parametrize("script, changed", [
    (vae, dict(epochs=2, batch_size=3, lr=0.1)),
    (cvae, dict(epochs=2, batch_size=3, lr=0.1, beta=0.0)),
    (gumbel_vae, dict(epochs=2, batch_size=3, lr=0.1, beta=0.0, objective="elbo", gamma=2.0,
                      read_weight=0.0, tau=0.1))])
def test_each_option_reaches_the_training_and_ctrl_c_changes_nothing_on_disk(
        script, changed, tiny, tmp_path, monkeypatch):
    seen, signature = [], inspect.signature(script.train)
    defaults = {name: signature.parameters[name].default for name in changed}
    assert defaults.items() <= vars(script.options().parse_args([])).items()

    def interrupted(*args):
        seen.append(signature.bind(*args).arguments)
        raise KeyboardInterrupt
    monkeypatch.setattr(script, "train", interrupted)
    (tmp_path / f"{script.__name__}.pt").write_bytes(b"yesterday's")
    words = [f"--{name.replace('_', '-')}={value}" for name, value in changed.items()]
    words += ["--z-dim=7", *["--n-classes=12"] * (script is gumbel_vae)]
    for seed in 1, 2, 1:
        with pytest.raises(SystemExit, match="130"):
            tiny(script, *words, "--seed", seed)
    assert files(tmp_path) == {f"{script.__name__}.pt": b"yesterday's"}
    assert changed.items() <= seen[0].items()
    one, two, same = (given["model"] for given in seen)
    assert one.z_dim == 7 and (script is not gumbel_vae or one.n_classes == 12)
    assert one.to_mu.bias.equal(same.to_mu.bias) and not one.to_mu.bias.equal(two.to_mu.bias)


@pytest.mark.parametrize("fails", ["fit_prior", "make_figures"])
def test_what_fails_after_the_training_cannot_cost_it(script, fails, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(script, fails, lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tiny(script)
    assert files(tmp_path).keys() == {f"{script.__name__}.pt"}


def test_weights_survive_a_full_disk_and_load_without_the_gpu_they_were_on(tiny, tmp_path):
    class OnGpu:  # as far as common.save can tell
        def cpu(self):
            return torch.ones(2)
    common.save({"bias": OnGpu()}, tmp_path / "vae.pt")
    resource = pytest.importorskip("resource")  # its limit on a file's size is like a full disk
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1]))
    try:
        with pytest.raises(SystemExit, match="too large"):
            tiny(vae)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_close(torch.load(tmp_path / "vae.pt"), {"bias": torch.ones(2)})


@pytest.mark.parametrize("fault, says", [
    *((option, option.split()[0]) for option in (
        "--epochs 0", "--z-dim 1.5", "--batch-size -1", "--lr 0", "--lr nan", "--beta -1",
        "--gamma inf", "--read-weight -1", "--tau 0", "--n-classes 0", "--wrong 1")),
    ("--lr 1e30", "diverged"), ("--out FILE", "File exists: 'FILE'"), ("--data FILE", "FILE"),
    ("--data OTHER", "call common.make_data"), ("--data GOOD/MNIST", "but there is GOOD/MNIST/raw"),
    ("--data GOOD/MNIST/raw", "give what holds MNIST/raw"), ("--data .", "/MNIST/raw: give")])
def test_faults_end_in_one_line(fault, says, tiny, few, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_bytes(b"not what it should be")
    for folder in "GOOD", "OTHER":
        shutil.copytree(few, folder)
    Path("OTHER/MNIST/raw/train-images-idx3-ubyte").write_bytes(b"noise")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        tiny(gumbel_vae, *fault.split())
    error = capsys.readouterr().err if stop.value.code == 2 else str(stop.value.code)
    assert says in error.splitlines()[-1] and sorted(tmp_path.rglob("*")) == before


def test_importing_does_nothing_and_a_pasted_script_trains(
        script, tmp_path, few, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(script.__file__)
    assert (*capsys.readouterr(), *tmp_path.iterdir()) == ("", "")
    monkeypatch.setattr(sys, "argv", ["/env/ipykernel_launcher.py", "-f", "kernel.json"])
    shutil.copytree(few, "data")
    exec(Path(script.__file__).read_text(encoding="utf-8"), {"__name__": "__main__"})
    assert f"{script.__name__}.pt" in files(tmp_path / "samples")


# The README

def test_every_command_in_the_readme_and_the_docstrings_parses():
    scripts = {script.__name__: script for script in MODELS}
    text = "\n".join([README, *(script.__doc__ for script in MODELS)])
    for name, argv in re.findall(rf"python ({'|'.join(scripts)})\.py\b([^\n#`&;|<]*)", text):
        scripts[name].options().parse_args(shlex.split(argv))


def test_the_readme_quotes_and_links_what_is_there():
    sources = [re.sub("\n *", "\n", inspect.getsource(module)) for module in (*MODELS, common)]
    for block in re.findall(r"```py\n(.*?)```", README, re.DOTALL):
        assert any(re.sub("\n *", "\n", block) in source for source in sources), block
    assert all((HERE / path).exists() for path in re.findall(r"\]\(([\w./]+)[#)]", README))
    for name, path, number in re.findall(r"\[`?(\w+)`?\]\((\w+\.py)#L(\d+)\)", README):
        line = (HERE / path).read_text(encoding="utf-8").splitlines()[int(number) - 1]
        assert re.match(rf"\s*(def|class) {name}\b", line), f"{path}#L{number} is not {name}"


def test_every_snippet_in_the_readme_runs_in_order(tmp_path, few, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(few, "data")
    scope = {}
    for snippet in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(snippet, scope)
