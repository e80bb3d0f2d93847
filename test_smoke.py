"""What must hold, in under a minute, without a network and without MNIST: pytest test_smoke.py"""
import inspect
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

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

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text(encoding="utf-8")
MODELS = {vae: vae.VAE, cvae: cvae.CVAE, gumbel_vae: gumbel_vae.GumbelVAE}
DIGITS = common.bundled_digits()


@pytest.fixture(params=MODELS, ids=lambda script: script.__name__)
def script(request):
    """A test that takes this runs for each script."""
    return request.param


def write_mnist(folder, n=None):
    """scikit-learn's digits, the first n of both parts, as bytes in MNIST's format."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    names = "train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"
    for name, array in zip(names, DIGITS):
        array = torch.as_tensor(array[:n])
        if "images" in name:
            array = (255 * array).round().view(-1, 28, 28)
        header = bytes([0, 0, 8, array.dim()]) + np.array(array.shape, ">i4").tobytes()
        (raw / f"{name}-ubyte").write_bytes(header + array.byte().numpy().tobytes())


@pytest.fixture
def data(tmp_path, monkeypatch):
    """300 digits; also in data/ of a new current folder."""
    monkeypatch.chdir(tmp_path)
    write_mnist(tmp_path / "data", 300)
    return common.load_mnist()


def start(script, *words):
    """As from the command line."""
    common.run(lambda argv: script.main(["--epochs", "1", "--out", ".", *words]))


class Toy(torch.nn.Module):
    """Draws images of one tone, set by y and two numbers of z, above all by the first."""
    def __init__(self):
        super().__init__()
        self.z_dim, self.n_classes, self.weight = 2, 10, torch.nn.Parameter(torch.ones(1))

    def encode(self, x):
        return x[:, :2], torch.zeros(len(x), 2)  # sigma = 1

    def cluster(self, x):
        return common.one_hot((10 * x[:, 2]).round())

    def decode(self, z, y=torch.ones(1, 1)):
        tone = 0.3 + 0.1 * z[:, :1] + 0.01 * z[:, 1:2] + 0.05 * y.argmax(1, keepdim=True)
        return tone.expand(-1, 784).view(-1, 1, 28, 28)  # as some shape it

    def forward(self, x, *y):
        return self.decode(x, *y), *self.encode(x)


def tones(figure):
    """The upper left pixel of each image of a figure."""
    return torch.tensor(figure.axes[0].images[0].get_array())[::28, ::28]


# The mathematics. Empty a function and write it anew: pytest test_smoke.py -k gaussian_kl

def check(loss, oracle, *inputs):
    """The same value and the same gradients."""
    gradients = [torch.autograd.grad(value, inputs, retain_graph=True) for value in (loss, oracle)]
    assert_close((loss, gradients[0]), (oracle, gradients[1]))


def test_reparameterize(script):
    mu, log_var = torch.randn(2, 3, 5, requires_grad=True)
    z = torch.stack([script.reparameterize(mu, log_var) for _ in range(4000)])
    noise = ((z - mu) / log_var.exp().sqrt()).detach()
    assert abs(noise.mean(0)).max() < 0.1
    assert abs(noise.flatten(1).T.cov() - torch.eye(15)).max() < 0.15  # each its own
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
    toy, k, told = Toy(), torch.arange(50) % 10, []
    ink, logits = torch.ones(1, requires_grad=True), torch.randn(50, 10, requires_grad=True)
    toy.decode = lambda z, y: ink * Toy().decode(z, y).flatten(1)
    toy.cluster = lambda x: told.append(x) or (logits + x[:, 390:400]).log_softmax(1)
    loss = gumbel_vae.read_back(toy, torch.zeros(50, 2), k)
    oracle = -D.Categorical(logits=logits + told[0][:, 390:400]).log_prob(k).mean()
    check(loss, oracle, ink, logits)  # both the decoder and the reader learn
    x = told[0].view(50, 28, 28)
    assert_close(x[:, 14, 14], 0.3 + 0.05 * k)  # drawn for k
    assert (x[:, 0, 0] == 0).any()  # and warped


def test_one_hot():
    assert_close(common.one_hot(torch.tensor([2, 0, 7])), torch.eye(10)[[2, 0, 7]])
    assert_close(common.one_hot(torch.tensor([1, 0], dtype=torch.uint8), 2), torch.eye(2).flip(0))


def test_score():
    # At best 5 is digit 1, 4 and 1 cannot both be digit 2, and 3 is digit 0.
    labels, clusters = [0, 0, 0, 1, 1, 2, 2, 2], [5, 5, 3, 5, 5, 4, 3, 1]
    h, h_c, h_both = (D.Categorical(torch.tensor(counts)).entropy().item() for counts in (
        [3.0, 2, 3], [4.0, 2, 1, 1], [2.0, 1, 2, 1, 1, 1]))
    nmi = (h + h_c - h_both) / ((h + h_c) / 2)
    assert gumbel_vae.score(labels, clusters) == pytest.approx({"nmi": nmi, "acc": 4 / 8})


def test_warp_stretches_slants_turns_shifts_and_bends():
    # Pixels that tell their column, or row: warped, they tell where they came from.
    places, came = torch.arange(28.0).expand(2000, 28, 28), []
    for x in places, places.mT:
        torch.manual_seed(0)
        came += [gumbel_vae.warp(x.flatten(1)).view(2000, 28, 28)[:, 7:-7, 7:-7]]
    came = torch.stack(came)  # (2, 2000, 14, 14)
    right, down = came.diff(dim=3).mean((2, 3)), came.diff(dim=2).mean((2, 3))
    turn, slant = right[1], right[1] + down[0]
    seen = torch.stack([*came.mean((2, 3)) - 13.5, right[0] - 1, down[1] - 1, turn, slant])
    sd = torch.tensor([1.23, 1.23, 0.08, 0.08, 0.16, 0.14])
    assert_close(seen.cov() / sd / sd[:, None], torch.eye(6), atol=0.2, rtol=0)  # each its own
    assert (abs(seen.mean(1)) < 0.1 * sd).all()
    assert 0.01 < abs(came.diff(n=2)).median() < 0.03  # 0 if unbent


# The training, and what comes after it

@pytest.mark.parametrize("script, options", [
    (vae, {}), (cvae, {"beta": 5.0}),
    (gumbel_vae, {"beta": 2.0, "tau": 0.3, "objective": "elbo"}),
    (gumbel_vae, {"beta": 30.0, "objective": "capacity"}),
    (gumbel_vae, {"beta": 2.0, "tau": 2.0, "gamma": 3.0, "read_weight": 7.0})])
def test_training_goes_as_by_hand(script, options, data):
    torch.manual_seed(0)
    model = MODELS[script](h_dim=32, z_dim=5)
    history = script.train(model, data, epochs=4, batch_size=128, lr=0.01, **options)
    torch.manual_seed(0)
    twin = MODELS[script](h_dim=32, z_dim=5)  # the same noise
    optimizer = torch.optim.Adam(twin.parameters())
    beta = options.get("beta", 1)
    for epoch, metrics in enumerate(history):
        nelbo = 0
        for i, batch in enumerate(torch.randperm(300).split(128), start=3 * epoch):  # of 12 steps
            climb, half = min(1, (i + 1) / 3), min(1, i / 6)
            optimizer.param_groups[0]["lr"] = 0.01 * min(climb, (12 - i) / 9)
            x, kl_c = data.x_train[batch], 0
            given = [common.one_hot(data.y_train[batch])] * (script is cvae)
            if script is gumbel_vae:
                warped = script.warp(torch.cat([x, x])) if "gamma" in options else x
                log_q = twin.cluster(x)
                given = [F.gumbel_softmax(log_q, options.get("tau", 0.5), hard=True)]
                kl_c = script.categorical_kl(log_q)
            mu, log_var = twin.encode(x)
            z = D.Normal(mu, torch.exp(log_var / 2)).rsample()
            recon = script.reconstruction(twin.logits(z, *given), x)
            kl = script.gaussian_kl(mu, log_var)
            nelbo += (recon + kl + kl_c).item() * len(x) / 300
            loss = recon + (1 + (beta - 1) * climb) * kl
            if "gamma" in options:
                codes = torch.cat([z[::8].detach(), torch.randn(len(z[::8]), 5)])
                k = torch.randint(10, (len(codes),))
                loss += 3 * script.clustering(log_q, twin.cluster(warped))
                loss += 7 * climb * script.read_back(twin, codes, k)
            elif beta == 30:
                loss = recon + 30 * (abs(kl - 2 * half) + abs(kl_c - math.log(10) * half))
            else:
                loss += kl_c
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        expected = {"nelbo_train": nelbo, **script.evaluate(twin, data)}
        assert {**metrics, **expected} == pytest.approx(metrics, rel=1e-4, abs=1e-5)


def test_no_step_leaves_the_device_or_waits(script, data, monkeypatch):
    # Meta tensors hold no numbers; they refuse .item() and other devices.
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, fused: torch.optim.SGD(parameters))
    with torch.device("meta"):
        model, steps = MODELS[script](), []
    model.to_hidden.register_forward_hook(lambda layer, given, h: steps.append(len(h)))
    with pytest.raises(RuntimeError, match="meta"):
        script.train(model, common.Data(*(part.to("meta") for part in data[:4]), ""), 1, 64)
    assert steps == [64] * 4 + [44]  # only an epoch's end asks for a number


@torch.no_grad()
def test_each_metric_agrees_with_the_bound(script, data):
    torch.manual_seed(0)
    model, x, y = MODELS[script](), data.x_train.repeat(10, 1), data.y_train.repeat(10)
    model.to_log_var.bias.fill_(-2)  # sigma is not 1
    if script is gumbel_vae:  # c is unsure, and each draws differently
        model.to_cluster_logits.weight.mul_(10)
        model.from_latent.weight[:, 20:].mul_(10)
    x_reconst, mu, log_var, *log_q = model(x, *[common.one_hot(y)] * (script is cvae))
    assert abs(x_reconst.mean() - 0.13) < 0.05  # MNIST's mean pixel
    terms = {"recon": F.binary_cross_entropy(x_reconst, x, reduction="sum").item() / len(x),
             "kl": script.gaussian_kl(mu, log_var).item()}
    of, more = 0 * y if script is vae else y, {}
    if script is gumbel_vae:
        c = D.Categorical(logits=log_q[0])
        of, terms["kl_c"] = c.sample(), script.categorical_kl(*log_q).item()
        more = script.score(y, log_q[0].argmax(1))
        more["i_c"] = D.kl_divergence(c, D.Categorical(c.probs.mean(0))).mean().item()
    z = D.Normal(mu, torch.exp(log_var / 2)).sample()
    more["nelbo"] = sum(terms.values())
    gain = D.Normal(of[:, None] / 10, 1.5).log_prob(z) - D.Normal(0.0, 1.0).log_prob(z)
    more["nelbo_fitted"] = more["nelbo"] - gain.sum(1).mean().item()
    priors = [D.Independent(D.Normal(torch.full((20,), k / 10), 1.5), 1) for k in range(10)]
    given = model, data._replace(x_test=x, y_test=y), priors[0] if script is vae else priors
    state = torch.get_rng_state()
    metrics = script.evaluate(*given)
    assert metrics == pytest.approx({**terms, **more}, rel=1e-3, abs=1e-5)
    assert script.evaluate(*given) == metrics and torch.get_rng_state().equal(state)
    assert script.evaluate(*given, seed=1)["recon"] != metrics["recon"]
    model.to_log_var.bias.fill_(-100)  # only c is random
    one, two = (script.evaluate(*given, seed=seed)["recon"] for seed in (0, 1))
    assert (one != two) == (script is gumbel_vae)


def test_fit_prior_takes_codes_of_its_own_class(script):
    group = torch.cat([torch.arange(3600) % 9, torch.full((30,), 9)])  # 30: too few
    group = group.clamp(max=3) if script is vae else group
    x = group[:, None] * torch.tensor([10.0, 10.0, 0.1])  # in Toy, z ~ N(10 * group, I), c = group
    y = (group + 3) % 10
    prior = script.fit_prior(Toy(), common.Data(x, y, x + 1000, y, ""))
    if script is vae:
        z, share = x[:, :2] + torch.randn(3630, 2), group.bincount() / 3630
        truth = D.Normal(x[:, :2], 1.0).log_prob(z).sum(1) + share[group].log()
        assert abs(prior.log_prob(z).mean() - truth.mean()) < 0.2
        return
    prior = [prior[k] for k in (y if script is cvae else group)]
    moments = torch.stack([torch.cat([own.mean, own.variance]) for own in prior])  # (3630, 4)
    truth = torch.cat([x[:, :2] * (group[:, None] < 9), torch.ones(3630, 2)], 1)
    assert_close(moments, truth, atol=0.4, rtol=0)
    common.fit_mixture(torch.randn(80, 2, requires_grad=True), 2)


def test_helpers_take_the_courses_models():
    model = Toy()
    del model.z_dim, model.n_classes  # the course's models have none: 20 and 10
    figure = common.plot_conditional_generation(model, n=240, fix_number=2)
    assert abs(tones(figure).mean() - 0.4) < 0.03 and abs(tones(figure).std() - 0.1) < 0.02
    assert figure.axes[0].images[0].to_rgba([0.0, 1.0])[:, 0].tolist() == [1, 0]  # dark on light
    with pytest.raises(ValueError, match="no square"):
        common.show(torch.rand(2, 60))


def test_each_picture_shows_what_its_name_says(script, data):
    model, history = Toy(), [{"nelbo_train": 9, "nelbo": 7}, {"nelbo_train": 8, "nelbo": 6}]
    data = data._replace(x_test=torch.rand_like(data.x_test))  # each tells its own tone
    priors = [D.Independent(D.Normal(torch.tensor([k / 5, 0.0]), 0.01), 1) for k in range(10)]
    figures = script.make_figures(model, data, priors[0] if script is vae else priors, history)
    x, classes, normal = data.x_test[:12], 0.05 * torch.arange(10)[:, None], D.Normal(0.0, 1.0)
    given, tone = x[None, :, 0], model.decode(x)[None, :, 0, 0, 0]
    asked = 0.05 * data.y_test[:12] if script is cvae else 0
    assert_close(tones(figures["reconstruction"]), torch.cat([given, tone + asked]))
    generated, fitted = tones(figures["generation"]), tones(figures["fitted"])
    wanted = 0.3 if script is vae else 0.3 + 1.4 * classes  # z / 10, and the class
    assert abs(fitted - wanted).max() < 0.01
    assert generated[0].std() > 0.02 and fitted[0].std() > 1e-4
    if script is vae:
        ticks, figure = normal.icdf(torch.arange(10) / 10 + 0.05), figures["manifold"]
        assert_close(tones(figure), 0.3 + 0.1 * ticks + 0.01 * ticks.flip(0)[:, None])
        dots = figure.axes[1].collections[0]
        noise = normal.icdf(torch.tensor(dots.get_offsets().data)) - data.x_test[:, :2]
        assert abs(noise.T @ noise / len(noise) - torch.eye(2)).max() < 0.3
        assert dots.get_array().tolist() == data.y_test.tolist()
    else:
        assert_close(generated - classes, generated[:1].expand(10, -1))  # one z down a column
        assert_close(tones(figures["handwriting"]), torch.cat([given, 0 * given, tone + classes]).T)
        axes = figures["fitted"].axes[0]
        labels = [(tick.get_text(), tick.get_position()[1]) for tick in axes.get_yticklabels()]
        assert axes.yaxis_inverted() and labels == [
            (f"{'y' if script is cvae else 'c'} = {k}", 28 * k + 14) for k in range(10)]
    curves = [(line.get_label(), *line.get_xydata().flat) for line in figures["loss"].axes[0].lines]
    assert curves == [("training images", 1, 9, 2, 8), ("test images", 1, 7, 2, 6)]


def test_without_a_download_the_bundled_digits_are_read(data, monkeypatch, capsys):
    def refuse(self):
        assert socket.getdefaulttimeout() == 10  # or it might wait forever
        raise error
    monkeypatch.setattr(MNIST, "download", refuse)
    error = OSError("full disk")
    with pytest.raises(OSError, match="full disk"):
        common.load_mnist("new")
    for error in TimeoutError(), RuntimeError("no network"):
        bundled = common.load_mnist("new")
        assert "WARNING" in capsys.readouterr().out and "NOT MNIST" in bundled.source
    assert socket.getdefaulttimeout() is None
    for of_file, of_all in zip(data[:4], bundled):
        assert_close(of_file, of_all[:300], atol=0.002, rtol=0)  # rounded to bytes
    assert not set(map(bytes, bundled.x_train.numpy())) & set(map(bytes, bundled.x_test.numpy()))
    reader = KNeighborsClassifier(1).fit(*load_digits(return_X_y=True))
    for x, y in (bundled.x_train, bundled.y_train), (bundled.x_test, bundled.y_test):
        small = F.interpolate(x.view(-1, 1, 28, 28)[..., 4:24, 4:24], size=8, mode="area")
        assert reader.score(16 * small.flatten(1), y) > 0.99


@pytest.mark.parametrize("change, says", [
    ({"x_train": -torch.rand(4, 4)}, "floats from 0 to 1"),
    ({"x_test": torch.full((4, 4), math.nan)}, "x_test must be .* from nan to nan"),
    ({"x_train": torch.ones(4, 4, dtype=torch.uint8)}, "for 0 and 1, give floats"),
    ({"x_train": torch.rand(0, 4)}, "square images"), ({"x_test": torch.rand(4, 8)}, "square"),
    ({"x_test": torch.rand(4, 9)}, "one size"), ({"y_test": torch.arange(3)}, "y_test must be"),
    ({"y_test": torch.arange(4) - 1}, "from 0"), ({"y_test": torch.rand(4)}, "y_test .* integer")])
def test_make_data_copies_and_says_what_is_wrong(change, says, data):
    good = dict(x_train=[[0.5] * 4], y_train=None, x_test=torch.rand(4, 2, 2), y_test=[0, 1, 2, 3])
    with pytest.raises(ValueError, match=says):
        common.make_data(**{**good, **change})
    common.make_data(*data).x_train.zero_()
    assert data.x_train.any()


def test_labels_may_be_missing_and_mistakes_are_named(data):
    unlabelled, model = data._replace(y_train=None, y_test=None), gumbel_vae.GumbelVAE()
    gumbel_vae.train(model, unlabelled, epochs=1)
    vae.make_figures(vae.VAE(z_dim=2), unlabelled, None, [])  # with the manifold
    with pytest.raises(ValueError, match="needs y_train"):
        cvae.train(cvae.CVAE(), unlabelled)
    with pytest.raises(ValueError, match="'ELBO' is none of"):
        gumbel_vae.train(model, data, objective="ELBO")
    with pytest.raises(TypeError):  # y is no temperature
        common.plot_reconstruction(model, data.x_test, data.y_test)


# The command line and the README

@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Each script as a user starts it, all at once: its folder and process."""
    folder, runs = tmp_path_factory.mktemp("runs"), {}
    write_mnist(folder / "data")
    for script, words in (gumbel_vae, []), (vae, []), (cvae, ["--beta=1"]):
        words = [script.__file__, "--epochs=3", f"--out={script.__name__}/a", *words]
        runs[script] = folder, subprocess.Popen(
            [sys.executable, *words], cwd=folder, text=True, stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"})
    return runs


def test_a_run_learns_and_leaves_its_files(script, runs):
    folder, run = runs[script]
    printed, device = run.communicate()[0], "cuda" if torch.cuda.is_available() else "cpu"
    assert printed.startswith(f"MNIST, 14,980 + 299 images, on {device}: minimises ")
    assert run.returncode == 0 and re.findall("\nepoch +(.)", printed) == ["1", "2", "3"]
    wrote = [folder / path for path in re.findall("wrote (.*)", printed)]
    assert {*wrote} == {*folder.glob(f"{script.__name__}/a/*")}
    after = printed.split("\ntest ")[1]
    test = {name: float(value) for name, value in re.findall(r"(\w+) (-?[\d.]+)", after)}
    data, model, digit = common.load_mnist(folder / "data"), MODELS[script](), torch.arange(10)
    mean = data.x_train.mean(0).logit(eps=1e-3).expand_as(data.x_test)
    assert test["nelbo_fitted"] < test["nelbo"] < script.reconstruction(mean, data.x_test) - 20
    model.load_state_dict(torch.load(wrote[0]))
    assert script.evaluate(model, data)["nelbo"] == pytest.approx(test["nelbo"], abs=0.01)
    if script is vae:
        return
    if script is gumbel_vae:
        c = model.cluster(data.x_train).argmax(1)
        digit = torch.stack([data.y_train[c == k].bincount(minlength=10).argmax() for k in digit])
        assert test["acc"] > 0.65 and len(set(digit.tolist())) > 7
    reader = KNeighborsClassifier(3).fit(data.x_train[:1498], data.y_train[:1498])
    for prior in script.fit_prior(model, data), None:
        images = common.decode_classes(model, common.draw_codes(model, 50, prior)).flatten(0, 1)
        least = 0.6 if script is gumbel_vae else 0.95 if prior else 0.8
        assert reader.score(images, digit.repeat_interleave(50)) > least


def test_options_reach_train_and_no_fault_costs_weights(script, data, monkeypatch):
    with pytest.raises(SystemExit, match="diverged"):
        start(script, "--lr=1e30")
    signature, train = inspect.signature(script.train), Mock()
    faults = Mock(side_effect=[KeyboardInterrupt, KeyError("own"), OSError("full")])
    monkeypatch.setattr(script, "train", train)
    monkeypatch.setattr(script, "fit_prior", faults)
    defaults = {name: p.default for name, p in [*signature.parameters.items()][2:]}
    assert defaults.items() <= vars(script.options().parse_args([])).items()
    changed = {**dict.fromkeys(defaults, 0.0), "epochs": 2, "batch_size": 3, "lr": 0.1}
    changed.update({"objective": "elbo", "tau": 0.1} if script is gumbel_vae else {})
    words = [f"--{name.replace('_', '-')}={value}" for name, value in changed.items()]
    words += ["--z-dim=7", *["--n-classes=12"] * (script is gumbel_vae)]
    for seed, ends, says in (1, SystemExit, "130"), (2, KeyError, "own"), (1, SystemExit, "full"):
        with pytest.raises(ends, match=says):
            start(script, *words, f"--seed={seed}")
    assert changed.items() <= signature.bind(*train.call_args.args).arguments.items()
    one, two, same = (call.args[0] for call in train.call_args_list)
    assert one.z_dim == 7 and (script is not gumbel_vae or one.n_classes == 12)
    assert one.to_mu.bias.equal(same.to_mu.bias) and not one.to_mu.bias.equal(two.to_mu.bias)
    assert torch.load(f"{script.__name__}.pt")["to_mu.bias"].equal(one.to_mu.bias)


def test_weights_survive_a_full_disk_and_load_without_a_gpu(data):
    on_gpu = Mock(cpu=lambda: torch.ones(2))  # for common.save
    common.save({"bias": on_gpu}, "vae.pt")
    resource = pytest.importorskip("resource")  # a file too large is like a full disk
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1]))
    try:
        with pytest.raises(SystemExit, match="too large"):
            start(vae)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_close(torch.load("vae.pt"), {"bias": torch.ones(2)})


@pytest.mark.parametrize("fault, says", [
    *((option, option.split()[0]) for option in (
        "--epochs 0", "--z-dim 1.5", "--batch-size -1", "--lr 0", "--lr nan", "--beta -1",
        "--gamma inf", "--read-weight -1", "--tau 0", "--n-classes 0")),
    ("--lr 1e30", "diverged"), ("--out FILE", "File exists"), ("--data FILE", "FILE"),
    ("--data OTHER", "call common.make_data"), ("--data data/MNIST", "but there is data/MNIST/raw"),
    ("--data data/MNIST/raw", "give what holds MNIST/raw"), ("--data .", "/MNIST/raw: give")])
def test_faults_end_in_one_line(fault, says, data, capsys):
    Path("FILE").touch()
    shutil.copytree("data", "OTHER")
    Path("OTHER/MNIST/raw/train-images-idx3-ubyte").write_bytes(b"noise")
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as stop:
        start(gumbel_vae, *fault.split())
    error = capsys.readouterr().err if stop.value.code == 2 else str(stop.value.code)
    assert says in error.splitlines()[-1] and sorted(Path().rglob("*")) == before


def test_importing_does_nothing_and_a_pasted_script_trains(script, data, monkeypatch, capsys):
    source = Path(script.__file__).read_text(encoding="utf-8")
    exec(source, {"__name__": script.__name__})
    assert (*capsys.readouterr(), os.listdir()) == ("", "", ["data"])
    monkeypatch.setattr(sys, "argv", ["/env/ipykernel_launcher.py", "-f", "kernel.json"])
    exec(source, {"__name__": "__main__"})
    assert Path(f"samples/{script.__name__}.pt").exists()


def test_the_readmes_quotes_links_and_commands():
    source = " ".join("".join(inspect.getsource(module) for module in (*MODELS, common)).split())
    for block in re.findall(r"```py\n(.*?)```", README, re.DOTALL):
        assert " ".join(block.split()) in source
    assert all((HERE / path).exists() for path in re.findall(r"\]\(([\w./]+)[#)]", README))
    for name, path, number in re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", README):
        line = (HERE / path).read_text(encoding="utf-8").splitlines()[int(number) - 1]
        assert line.startswith(f"def {name}(")
    for script in MODELS:
        commands = rf"\bpython {script.__name__}\.py\b([^\n#`&;|<]*)"
        for words in re.findall(commands, README + script.__doc__):
            script.options().parse_args(words.split())


def test_the_readmes_snippets_run_in_order(data):
    exec("".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL)), {})
