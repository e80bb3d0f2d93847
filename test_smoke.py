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
DEFAULTS = {vae: dict(epochs=15, batch_size=128, lr=8e-3),
            cvae: dict(epochs=15, batch_size=128, lr=8e-3, beta=10.0),
            gumbel_vae: dict(epochs=15, batch_size=128, lr=6e-3, beta=1.0,
                             objective="clustering", gamma=400.0, read_weight=25.0)}


@pytest.fixture(params=MODELS, ids=lambda script: script.__name__)
def script(request):
    """Whatever takes this runs three times: for vae, for cvae and for gumbel_vae."""
    return request.param


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """A folder in MNIST's format: images of noise, with a bar whose height tells the label."""
    raw = tmp_path_factory.mktemp("data") / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in ("train", 256), ("t10k", 64):
        labels = np.arange(n) * 7 % 10
        images = np.random.default_rng(n).integers(0, 40, (n, 28, 28))
        for image, label in zip(images, labels):
            image[2 * label + 4:2 * label + 6, 4:24] = 220
        for name, array in ("images-idx3", images), ("labels-idx1", labels):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            (raw / f"{part}-{name}-ubyte").write_bytes(header + array.astype(np.uint8).tobytes())
    return raw.parent.parent


@pytest.fixture
def data(data_folder):
    return common.load_mnist(data_folder)


@pytest.fixture
def tiny(data_folder, tmp_path):
    """Runs a script's main on the made-up images for two short epochs, its files in tmp_path."""
    def run(script, *argv):
        words = ["--data", data_folder, "--out", tmp_path, "--epochs", 2, "--batch-size", 64, *argv]
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

    def decode(self, z, y=torch.ones(1, 1)):
        return (0.3 + 0.1 * z[:, :1] + 0.05 * y.argmax(1, keepdim=True)).expand(-1, 784)

    def forward(self, x, *y):
        return self.decode(self.encode(x)[0], *y), *self.encode(x)


# The mathematics

def check(loss, oracle, *inputs):
    """The same value and the same gradients."""
    gradients = [torch.autograd.grad(value, inputs, retain_graph=True) for value in (loss, oracle)]
    assert_close((loss, gradients[0]), (oracle, gradients[1]))


@pytest.mark.parametrize("n", [1, 7])
def test_the_losses_and_their_gradients_are_those_of_torch_distributions(script, n):
    mu, log_var, logits = (torch.randn(n, size, requires_grad=True) for size in (5, 5, 784))
    x, q = torch.rand(n, 784), D.Normal(mu, torch.exp(log_var / 2))
    p = D.Bernoulli(logits=logits, validate_args=False)
    kl = D.kl_divergence(q, D.Normal(0.0, 1.0)).sum(1).mean()
    check(script.gaussian_kl(mu, log_var), kl, mu, log_var)
    check(script.reconstruction(logits, x), -p.log_prob(x).sum(1).mean(), logits)
    with torch.random.fork_rng():
        z = script.reparameterize(mu, log_var)
    check(z.sum(), q.rsample().sum(), mu, log_var)


def test_the_losses_of_c_and_their_gradients_are_those_of_torch_distributions():
    logits, warped = torch.randn(9, 6, requires_grad=True), torch.randn(18, 6, requires_grad=True)
    q, teacher = D.Categorical(logits=logits), D.Categorical(logits=logits.detach())
    kl = D.kl_divergence(q, D.Categorical(torch.ones(6))).mean()
    check(gumbel_vae.categorical_kl(logits.log_softmax(1)), kl, logits)
    oracle = sum(D.kl_divergence(teacher, D.Categorical(logits=part)).mean() / 2
                 for part in warped.split(9))
    oracle = oracle + 0.1 * q.entropy().mean() - 0.5 * D.Categorical(q.probs.mean(0)).entropy()
    loss = gumbel_vae.clustering(logits.log_softmax(1), warped.log_softmax(1))
    check(loss, oracle, logits, warped)


def test_read_back_asks_for_the_class_that_was_drawn(monkeypatch):
    monkeypatch.setattr(gumbel_vae, "warp", lambda x: x + 1)
    model = gumbel_vae.GumbelVAE()
    model.decode = Toy().decode  # a tone tells its class:
    tell = lambda x: common.one_hot(((x[:, 0] - 1.3) * 20).round())  # noqa: E731
    model.cluster = lambda x: torch.log(0.9 * tell(x) + 0.01)
    loss = gumbel_vae.read_back(model, torch.zeros(50, 2), torch.arange(50) % 10)
    assert loss.item() == pytest.approx(-math.log(0.91))
    model = gumbel_vae.GumbelVAE()
    gumbel_vae.read_back(model, torch.randn(5, 20), torch.arange(5)).backward()
    taught = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    assert taught == {"from_latent", "to_logits"}  # the decoder
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_scores_of_an_unequal_partition_by_hand():
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

def terms(script, model, x, y):
    """The terms of the losses if z is mu, c is q(c|x), Tx x turned, k 0; nats per image."""
    mu, log_var = model.encode(x)
    log_q = model.cluster(x) if script is gumbel_vae else None
    given = {vae: [], cvae: [y], gumbel_vae: [log_q if log_q is None else log_q.exp()]}[script]
    p = D.Bernoulli(logits=model.logits(mu, *given), validate_args=False)
    recon, q = -p.log_prob(x).sum(1).mean(), D.Normal(mu, torch.exp(log_var / 2))
    kl = D.kl_divergence(q, D.Normal(0.0, 1.0)).sum(1).mean()
    if script is not gumbel_vae:
        return recon, kl, torch.zeros(()), 0, 0
    z = torch.cat([mu[::8].detach(), torch.zeros(32, 5)])
    read = gumbel_vae.read_back(model, z, torch.zeros(64).long())
    return (recon, kl, gumbel_vae.categorical_kl(log_q), read,
            gumbel_vae.clustering(log_q, model.cluster(x.flip(1)).repeat(2, 1)))


@pytest.mark.parametrize("script, options, loss", [
    (vae, {}, lambda climb, half, recon, kl, *_: recon + kl),
    (cvae, dict(beta=5.0), lambda climb, half, recon, kl, *_: recon + (1 + 4 * climb) * kl),
    (gumbel_vae, dict(beta=2.0, objective="elbo"),
     lambda climb, half, recon, kl, kl_c, *_: recon + (1 + climb) * kl + kl_c),
    (gumbel_vae, dict(beta=30.0, objective="capacity"), lambda climb, half, recon, kl, kl_c, *_:
        recon + 30 * abs(kl - 2 * half) + 30 * abs(kl_c - math.log(10) * half)),
    (gumbel_vae, dict(beta=2.0, gamma=3.0, read_weight=7.0),
     lambda climb, half, recon, kl, kl_c, read, clustering:
        recon + (1 + climb) * kl + 3 * clustering + 7 * climb * read)])
def test_training_minimises_the_loss_by_a_schedule(script, options, loss, data, monkeypatch):
    # No randomness: images keep their order, z is mu, c is q(c|x), Tx is x turned, and k is 0.
    monkeypatch.setattr(torch, "randperm", lambda n, device: torch.arange(n))
    monkeypatch.setattr(torch, "randint", lambda high, size, device: torch.zeros(size).long())
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    monkeypatch.setattr(F, "gumbel_softmax", lambda log_q, tau, hard: log_q.exp())
    monkeypatch.setattr(gumbel_vae, "warp", lambda x: x.flip(1))
    torch.manual_seed(0)
    model, steps = MODELS[script](h_dim=32, z_dim=5), 20
    twin = copy.deepcopy(model)
    history = script.train(model, data, epochs=steps, batch_size=256, lr=0.01, **options)
    optimizer = torch.optim.Adam(twin.parameters())
    for step, epoch in enumerate(history):
        climb, half = min(1, step / (0.15 * steps)), min(1, 2 * step / steps)
        optimizer.param_groups[0]["lr"] = 0.01 * min(climb + 1 / steps, (1 - step / steps) / 0.85)
        found = terms(script, twin, data.x_train, common.one_hot(data.y_train))
        assert epoch["train"] == pytest.approx(sum(found[:3]).item(), rel=1e-4)
        optimizer.zero_grad()
        loss(climb, half, *found).backward()
        optimizer.step()
    if script is gumbel_vae:
        with pytest.raises(ValueError, match="'ELBO' is none of elbo, capacity, clustering"):
            script.train(model, data, objective="ELBO")


def test_no_step_leaves_the_device_or_waits_for_it(script, data, monkeypatch):
    # Tensors on the meta device hold no numbers, and refuse those of other devices and .item().
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, fused: torch.optim.SGD(parameters))
    with torch.device("meta"):
        model, steps = MODELS[script](), []
    encode = model.encode
    model.encode = lambda x: steps.append(len(x)) or encode(x)
    with pytest.raises(RuntimeError, match="meta"):
        script.train(model, common.Data(*(tensor.to("meta") for tensor in data[:4]), ""), 1, 64)
    assert steps == [64] * 4  # only the end of an epoch asks for a number


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_losses_of_the_cpu(script, tiny):
    on_cpu, on_cuda = (tiny(script, "--device", device)["loss"] for device in ("cpu", "cuda"))
    assert on_cuda == pytest.approx(on_cpu, rel=0.05)


def test_forward_and_evaluate_agree_with_the_bound(script, data):
    torch.manual_seed(0)
    model, x, y = MODELS[script](), data.x_train.repeat(40, 1), data.y_train.repeat(40)
    data, given = data._replace(x_test=x, y_test=y), [common.one_hot(y)] * (script is cvae)
    mean = torch.arange(10.0)[:, None].expand(10, 20) / 10 if given else torch.zeros(20)
    prior = [D.Independent(D.Normal(mean, 1.5), 1)]
    metrics = script.evaluate(model, data, *prior * (script is not gumbel_vae))
    x_reconst, mu, log_var, *log_q = model(x, *given)
    bound = F.binary_cross_entropy(x_reconst, x, reduction="sum") / len(y)
    bound = bound + script.gaussian_kl(mu, log_var)
    if log_q:
        q = D.Categorical(logits=log_q[0])
        bound = bound + math.log(10) - q.entropy().mean()
        i_c = D.Categorical(q.probs.mean(0)).entropy() - q.entropy().mean()
        assert metrics["i_c"] == pytest.approx(i_c.item(), abs=1e-5)
        assert gumbel_vae.score(y, q.probs.argmax(1)).items() <= metrics.items()
    else:
        z = script.reparameterize(mu, log_var)
        log_prior = D.Normal(mean[y] if given else mean, 1.5).log_prob(z)
        change = (D.Normal(0.0, 1.0).log_prob(z) - log_prior).sum(1).mean()
        assert metrics["loss_fitted"] - metrics["loss"] == pytest.approx(change.item(), abs=0.02)
    assert metrics["loss"] == pytest.approx(bound.item(), rel=1e-3)
    model.to_mu.bias.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        script.evaluate(model, data)


# After training

def test_fit_prior_takes_a_sampled_code_of_each_training_image_and_its_own_label(capsys):
    model, y = Toy(), torch.arange(4000) % 10
    x = (10.0 * y)[:, None].expand(-1, 2)
    data = common.Data(x, y, x + 1000, y, "")
    each, whole = cvae.fit_prior(model, data), vae.fit_prior(model, data)
    assert each.sample((3,)).shape == (3, 10, 2)
    assert_close(each.mean[:, 0], 10.0 * torch.arange(10), atol=0.3, rtol=0)
    assert_close(each.variance, torch.ones(10, 2), atol=0.3, rtol=0)
    codes = x + torch.randn_like(x)  # from ten Gaussians, far apart:
    truth = D.Normal(x, 1.0).log_prob(codes).sum(1).mean() - math.log(10)
    assert whole.log_prob(codes).mean().item() == pytest.approx(truth.item(), abs=0.1)
    few = data._replace(x_train=x[:300], y_train=y[:300])  # a class has 30 codes, and needs 40
    each = cvae.fit_prior(model, few)
    assert each.sample().shape == (10, 2) and each.mean.eq(0).all() and each.variance.eq(1).all()
    assert "N(0, I) stays" in capsys.readouterr().out


# The pictures

class Course(nn.Module):
    """The three models of the course's session: the plain one, and those with a class."""
    def __init__(self, n_classes=0, clusters=False):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(784, 400), nn.Linear(400, 20), nn.Linear(400, 20)
        self.fc4, self.fc5 = nn.Linear(20 + n_classes, 400), nn.Linear(400, 784)
        self.fc6 = nn.Linear(400, 10) if clusters else None

    def encode(self, x):
        h = F.relu(self.fc1(x))
        return self.fc2(h), self.fc3(h), *([self.fc6(h).log_softmax(1)] if self.fc6 else [])

    def decode(self, z, *y):
        return torch.sigmoid(self.fc5(F.relu(self.fc4(torch.cat([z, *y], dim=1)))))

    def forward(self, x, *y):
        mu, log_var, *log_p = self.encode(x)
        return self.decode(mu, *[log_p[0].exp()] if log_p else y), mu, log_var, *log_p


def test_the_helpers_take_the_courses_models_and_calls():
    def check(helper, images, columns, *given, **options):
        torch.manual_seed(0)
        figure = helper(*given, **options)
        assert_close(shown(figure), torch.tensor(common.tile(images, columns)))
    x, y, every = torch.rand(3, 784), common.one_hot(torch.tensor([2, 0, 9])), torch.eye(10)
    plain, cheating, clustering = Course(), Course(10), Course(10, clusters=True)
    torch.manual_seed(0)
    z, sevens = torch.randn(24, 20), D.Independent(D.Normal(torch.full((20,), 7.0), 1e-9), 1)
    check(common.plot_generation, plain.decode(z), 8, plain)
    check(common.plot_generation, plain.decode(z), 8, plain, n=24)
    check(common.plot_generation, plain.decode(z * 0 + 7), 8, plain, prior=sevens)
    for model, given in (plain, []), (cheating, [y]), (clustering, []):
        pairs = torch.cat([x, model(x, *given)[0]])
        check(common.plot_reconstruction, pairs, 3, model, x, *given)
    for model in cheating, clustering:
        rows = [model.decode(z[:8], every[[k] * 8]) for k in range(10)]
        check(common.plot_conditional_generation, torch.cat(rows), 8, model, n=8)
        check(common.plot_conditional_generation, rows[2], 8, model, n=8, fix_number=2)
        codes = model.encode(x)[0]
        rows = [torch.cat([x[[i]], model.decode(codes[[i] * 10], every)]) for i in range(3)]
        check(common.plot_handwriting, torch.cat(rows), 11, model, x)


def test_show_draws_dark_ink_on_white_and_labels_the_rows_from_the_top():
    images = torch.linspace(0, 1, 6)[:, None].expand(6, 784)
    figure = common.show(images, "a title", columns=2, row_labels="abc")
    axes, tones = figure.axes[0], figure.axes[0].images[0].to_rgba(shown(figure))[::28, ::28, 0]
    assert_close(1 - tones, images[:, 0].view(3, 2).double().numpy(), atol=0.01, rtol=0)
    ticks = zip(axes.get_yticks(), axes.get_yticklabels())
    assert [(at, tick.get_text()) for at, tick in ticks] == [(14, "a"), (42, "b"), (70, "c")]
    assert axes.yaxis_inverted() and axes.get_title("left") == "a title"
    for wrong in torch.rand(0, 784), torch.rand(2, 60):
        with pytest.raises(ValueError, match="no square images"):
            common.show(wrong)


def test_each_picture_shows_what_its_name_says(script, data):
    model, prior = Toy(), D.Independent(D.Normal(torch.tensor([2.0, 0.0]), 1e-9), 1)
    history = [{"train": 9, "seconds": 1, "kl": 3}, {"train": 8, "seconds": 1, "kl": 4}]
    prior = [] if script is gumbel_vae else [prior]
    figures = script.draw(model, data, *prior, history)
    tone = 0.3 + 0.1 * data.x_test[:12, 0]
    expected = tone + 0.05 * data.y_test[:12] if script is cvae else tone
    assert_close(shown(figures["reconstruction"])[28, ::28], expected)
    assert shown(figures["generation"])[0, ::28].std() > 0.02
    assert not prior or shown(figures["fitted"])[0, ::28].allclose(torch.tensor(0.5))
    if script is not vae:
        rows = torch.cat([data.x_test[:12, :1], tone[:, None] + 0.05 * torch.arange(10)], 1)
        assert_close(shown(figures["handwriting"])[::28, ::28], rows)
    curves = [(axes.get_title(), *axes.lines[0].get_xydata().T.tolist())
              for axes in figures["loss"].axes]
    assert curves == [("train", [1, 2], [9, 8]), ("kl", [1, 2], [3, 4])]


def test_the_manifold_is_a_map_with_the_first_number_of_z_to_the_right():
    model, codes, normal = Toy(), torch.tensor([[0.0, -1.0], [2.0, 0.5]]), D.Normal(0.0, 1.0)
    model.decode = lambda z: (0.5 + 0.1 * z[:, :1] + 0.01 * z[:, 1:]).expand(-1, 784)
    figure = common.plot_manifold(model, codes, torch.tensor([3, 4]), n=4)
    ticks = normal.icdf(torch.tensor([1, 3, 5, 7]) / 8)
    assert_close(shown(figure)[::28, ::28], 0.5 + 0.1 * ticks + 0.01 * ticks.flip(0)[:, None])
    places = torch.tensor(figure.axes[1].collections[0].get_offsets().data).float()
    assert_close(places, normal.cdf(codes))


# The data

def test_load_mnist_gives_the_bytes_of_the_files_and_each_image_its_own_label(data, data_folder):
    content = (data_folder / "MNIST/raw/train-images-idx3-ubyte").read_bytes()[16:]
    assert_close(data.x_train, torch.tensor(list(content)).view(256, 784) / 255)
    for x, y in (data.x_train, data.y_train), (data.x_test, data.y_test):
        assert torch.equal((x.view(-1, 28, 28).mean(2).argmax(1) - 4) // 2, y)


@pytest.mark.parametrize("error", [RuntimeError("no network"), TimeoutError(), OSError("full")])
def test_only_a_failed_download_leads_to_the_bundled_digits(error, tmp_path, monkeypatch, capsys):
    def refuse(self):
        raise error if socket.getdefaulttimeout() else ValueError("it might wait forever")
    monkeypatch.setattr(MNIST, "download", refuse)
    if type(error) is OSError:
        with pytest.raises(OSError, match="full"):
            common.load_mnist(tmp_path)
        return
    data = common.load_mnist(tmp_path)
    assert "WARNING" in capsys.readouterr().out and "NOT MNIST" in data.source
    reader = KNeighborsClassifier(1).fit(*load_digits(return_X_y=True))
    for x, y in (data.x_train[:300], data.y_train[:300]), (data.x_test, data.y_test):
        small = F.interpolate(x.view(-1, 1, 28, 28)[:, :, 4:24, 4:24], size=8, mode="area")
        assert (reader.predict(16 * small.flatten(1)) == y.numpy()).mean() > 0.99
    assert not set(map(bytes, data.x_train.numpy())) & set(map(bytes, data.x_test.numpy()))


def test_make_data_copies_arrays_tensors_and_lists_of_bytes_or_floats():
    images, labels = torch.randint(256, (5, 6, 6), dtype=torch.uint8), [1, 2, 3, 4, 0]
    floats = images.flatten(1) / 255
    for given in images, images.numpy().astype(np.uint16), [*map(to_pil_image, images)]:
        data = common.make_data(given, labels, floats, None, "mine")
        assert_close(data.x_train, data.x_test)
    floats[:] = 0
    assert data.x_test.max() > 0 and data.y_train.tolist() == labels and data.y_test is None


@pytest.mark.parametrize("change, says", [
    ({"x_train": torch.rand(4, 9) * 2 - 1}, "x_train must be integers from 0 to 255 or floats"),
    ({"x_test": torch.full((4, 9), math.nan)}, "x_test must be .* from nan to nan"),
    ({"x_train": torch.ones(4, 9, dtype=torch.uint8)}, "uint8 from 1 to 1"),
    ({"x_train": torch.rand(0, 9)}, r"square images.* \(0, 9\)"),
    ({"x_train": torch.rand(100, 560)}, "square"), ({"x_test": torch.rand(4, 16)}, "one size"),
    ({"y_train": torch.arange(3)}, "y_train must be one"),
    ({"y_test": torch.rand(4)}, "y_test must be one integer an image, or None: float32")])
def test_make_data_says_what_is_wrong(change, says):
    good = dict(x_train=torch.rand(4, 3, 3), y_train=None, x_test=torch.rand(4, 9), y_test=None)
    with pytest.raises(ValueError, match=says):
        common.make_data(**{**good, **change})


# The command line

def test_each_default_is_one_number_and_ctrl_c_changes_nothing_on_disk(
        script, tiny, tmp_path, monkeypatch):
    signature, given, defaults = inspect.signature(script.train), {}, DEFAULTS[script]
    assert defaults.items() <= {name: p.default for name, p in signature.parameters.items()}.items()
    assert defaults.items() <= vars(script.options().parse_args([])).items()
    chosen = {name: "elbo" if name == "objective" else 1 + defaults[name] for name in defaults}

    def interrupted(model, data, *args, **options):
        given.update(signature.bind(model, data, *args, **options).arguments)
        assert_close(torch.sigmoid(model.to_logits.bias), data.x_train.mean(0).clamp(1e-3, 0.999))
        raise KeyboardInterrupt
    monkeypatch.setattr(script, "train", interrupted)
    (tmp_path / f"{script.__name__}.pt").write_bytes(b"yesterday's")
    words = [f"--{name.replace('_', '-')}={value}" for name, value in chosen.items()]
    with pytest.raises(SystemExit, match="130"):
        common.run(lambda argv: tiny(script, *words))
    assert chosen.items() <= given.items()
    assert files(tmp_path) == {f"{script.__name__}.pt": b"yesterday's"}


def test_a_run_leaves_its_files_which_load_draws_again(script, tiny, tmp_path, data_folder, capsys):
    words = [sys.executable, f"{script.__name__}.py", "--data", data_folder, "--out", tmp_path,
             "--epochs", "2", "--z-dim", "2"]
    first = subprocess.run(words, cwd=HERE, capture_output=True, text=True)
    assert first.returncode == 0 and first.stderr == ""
    before, path = files(tmp_path), tmp_path / f"{script.__name__}.pt"
    names = ["reconstruction", "generation", "loss", *{
        vae: ["fitted", "manifold"], cvae: ["fitted", "handwriting"],
        gumbel_vae: ["handwriting"]}[script]]
    assert before.keys() == {path.name, *(f"{path.stem}_{name}.png" for name in names)}
    for picture in tmp_path.glob("*.png"):
        picture.unlink()
    tiny(script, "--load", path)
    out = capsys.readouterr().out
    assert files(tmp_path) == before and "trained on MNIST with epochs 2" in out
    assert out.splitlines()[-2] == first.stdout.splitlines()[-2]


@pytest.mark.parametrize("fault, says", [
    *((f"--{option}", option.split()[0]) for option in (
        "epochs 0", "z-dim 0", "batch-size -1", "wrong 1")), ("--lr nan", "diverged"),
    ("--out FILE", "File exists: 'FILE'"), ("--data FILE", "FILE"),
    ("--data OTHER", "call common.make_data"), ("--load FILE", "no checkpoint of a VAE"),
    ("--load CODE", "no checkpoint of a VAE"), ("--load missing.pt", "missing.pt is missing")])
def test_faults_end_in_one_line(fault, says, tiny, data_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_bytes(b"not what it should be")
    content = {"args": {}, "data": "", "history": [Path], "state_dict": vae.VAE().state_dict()}
    torch.save(content, "CODE")  # a pickled class could do anything
    shutil.copytree(data_folder, "OTHER")
    Path("OTHER/MNIST/raw/train-images-idx3-ubyte").write_bytes(b"noise")
    before = files(tmp_path)
    with pytest.raises(SystemExit) as stop:
        common.run(lambda argv: tiny(vae, *fault.split()))
    error = capsys.readouterr().err if stop.value.code == 2 else str(stop.value.code)
    assert says in error.splitlines()[-1] and files(tmp_path) == before


def test_a_checkpoint_of_a_gpu_loads_without_one(tmp_path, monkeypatch):
    model, path = vae.VAE(), tmp_path / "vae.pt"
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save({"args": {}, "data": "", "history": [], "state_dict": model.state_dict()}, path)
    assert_close(common.load_checkpoint(path, vae.VAE)[0].state_dict(), model.state_dict())


def test_importing_does_nothing_and_a_pasted_script_trains(
        script, tmp_path, data_folder, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(script.__file__)
    assert (*capsys.readouterr(), *tmp_path.iterdir()) == ("", "")
    monkeypatch.setattr(sys, "argv", ["/env/ipykernel_launcher.py", "-f", "kernel.json"])
    shutil.copytree(data_folder, "data")
    exec(Path(script.__file__).read_text(encoding="utf-8"), {"__name__": "__main__"})
    assert f"{script.__name__}.pt" in files(tmp_path / "samples")


# The README

def test_every_command_in_the_readme_and_the_docstrings_parses():
    scripts = {script.__name__: script for script in MODELS}
    text = "\n".join([README, *(script.__doc__ for script in MODELS)])
    for name, argv in re.findall(rf"python ({'|'.join(scripts)})\.py\b([^\n#`&;|<]*)", text):
        scripts[name].options().parse_args(shlex.split(argv))


def test_the_readme_quotes_and_links_what_is_there():
    for block in re.findall(r"```py\n(.*?)```", README, re.DOTALL):
        assert textwrap.indent(block, " " * 12) in inspect.getsource(vae.train)
    assert all((HERE / path).exists() for path in re.findall(r"\]\(([\w./]+)[#)]", README))
    for name, path, number in re.findall(r"\[`?(\w+)`?\]\((\w+\.py)#L(\d+)\)", README):
        line = (HERE / path).read_text(encoding="utf-8").splitlines()[int(number) - 1]
        assert re.match(rf"\s*(def|class) {name}\b", line), f"{path}#L{number} is not {name}"


def test_every_snippet_in_the_readme_runs_in_order(tmp_path, data_folder, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.FashionMNIST", lambda root, **_: MNIST(data_folder))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data_folder, "data")
    scope = {}
    for snippet in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(snippet, scope)
