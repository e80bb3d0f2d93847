"""What must hold, in under a minute, without a network and without MNIST: pytest test_smoke.py"""
import ast
import inspect
import math
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import common
import cvae
import gumbel_vae
import vae

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text(encoding="utf-8")
SCRIPTS = {"vae": vae, "cvae": cvae, "gumbel_vae": gumbel_vae}
MODELS = {"vae": vae.VAE, "cvae": cvae.CVAE, "gumbel_vae": gumbel_vae.GumbelVAE}
every_script = pytest.mark.parametrize("script", SCRIPTS)


def blobs(n, seed=0):
    """Made-up images (n, 28, 28) of bytes, noise and a bright bar whose height is the label; and their labels (n,)."""
    labels = np.arange(n) % 10
    images = np.random.default_rng(seed).integers(0, 40, (n, 28, 28))
    for image, label in zip(images, labels):
        image[2 * label + 4:2 * label + 8, 4:24] = 220
    return images, labels


def blob_data(n_test=64):
    """The same as load_mnist would return it."""
    (x_train, y_train), (x_test, y_test) = (map(torch.tensor, blobs(n, n)) for n in (256, n_test))
    return common.Data(x_train.flatten(1) / 255, y_train, x_test.flatten(1) / 255, y_test, "blobs")


def small_model(script, **sizes):
    torch.manual_seed(0)
    return MODELS[script](**{"h_dim": 32, "z_dim": 5, **sizes})


def decode(script, model, z, y):
    """Pixel logits; only the VAE's decoder takes no class, y (N, 10), beside z."""
    return model.decode(z) if script == "vae" else model.decode(z, y)


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """A --data folder with made-up files in MNIST's format, as torchvision unpacks them."""
    raw = tmp_path_factory.mktemp("data") / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 256), ("t10k", 64)):
        for name, array in zip(("images-idx3", "labels-idx1"), blobs(n)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            (raw / f"{part}-{name}-ubyte").write_bytes(header + array.astype(np.uint8).tobytes())
    return raw.parent.parent


@pytest.fixture
def tiny(data_folder, tmp_path):
    """Runs a script's main on the made-up images for two short epochs, with its files in tmp_path."""
    def run(script, *argv, out=tmp_path):
        argv = ["--data", data_folder, "--out", out, "--epochs", 2, "--batch-size", 64, "--h-dim", 50, *argv]
        return SCRIPTS[script].main([str(word) for word in argv])
    return run


def files(folder, suffix=""):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name.endswith(suffix)}


# The mathematics, against torch.distributions

def test_the_losses_are_those_of_torch_distributions_for_any_batch_size():
    mu, log_var, logits, x = torch.randn(7, 5), torch.randn(7, 5), 3 * torch.randn(7, 784), torch.rand(7, 784).round()
    kl = D.kl_divergence(D.Normal(mu, torch.exp(log_var / 2)), D.Normal(0.0, 1.0)).sum(1).mean()
    recon = -D.Bernoulli(logits=logits).log_prob(x).sum(1).mean()
    for times in (1, 3):
        mu3, log_var3, logits3, x3 = (tensor.repeat(times, 1) for tensor in (mu, log_var, logits, x))
        torch.testing.assert_close(vae.gaussian_kl(mu3, log_var3), kl)
        torch.testing.assert_close(vae.reconstruction(logits3, x3), recon)


def test_reparameterize_samples_the_posterior():
    mu, log_var = torch.tensor([-1.0, 0.0, 3.0]), torch.tensor([-2.0, 0.0, 1.0])
    z = vae.reparameterize(mu.expand(20000, 3), log_var.expand(20000, 3))
    torch.testing.assert_close(z.mean(0), mu, atol=0.06, rtol=0)
    torch.testing.assert_close(z.var(0), log_var.exp(), atol=0, rtol=0.06)


def test_kl_c_is_that_of_torch_distributions_and_splits_into_information_and_the_kl_of_the_aggregate():
    log_q = (3 * torch.randn(50, 6)).log_softmax(1)
    q, uniform = D.Categorical(logits=log_q), D.Categorical(torch.full((6,), 1 / 6))
    aggregate = D.Categorical(q.probs.mean(0))
    torch.testing.assert_close(gumbel_vae.categorical_kl(log_q), D.kl_divergence(q, uniform).mean())
    torch.testing.assert_close(gumbel_vae.categorical_kl(log_q),
                               D.kl_divergence(q, aggregate).mean() + D.kl_divergence(aggregate, uniform))


def test_clustering_is_made_of_the_entropies_and_the_divergence_of_torch_distributions():
    logits = torch.randn(9, 6, requires_grad=True)
    log_q, log_q_warped = logits.log_softmax(1), torch.randn(18, 6).log_softmax(1)
    q, teacher = D.Categorical(logits=log_q), D.Categorical(logits=log_q.detach())
    invariance = [D.kl_divergence(teacher, D.Categorical(logits=warped)).mean() for warped in log_q_warped.split(9)]
    oracle = sum(invariance) / 2 + 0.1 * q.entropy().mean() - 0.5 * D.Categorical(q.probs.mean(0)).entropy()
    loss = gumbel_vae.clustering(log_q, log_q_warped)
    torch.testing.assert_close(loss, oracle)
    torch.testing.assert_close(torch.autograd.grad(loss, logits), torch.autograd.grad(oracle, logits))


@pytest.mark.parametrize("clusters, expected", [
    ([2] * 8, 0.0), ([0, 1, 2, 3] * 2, -0.5 * math.log(4)), ([0, 1] * 4, -0.5 * math.log(2))])
def test_clustering_gains_nothing_from_a_collapsed_c_and_most_from_a_sure_one_that_uses_all_clusters(clusters, expected):
    log_q = (100 * common.one_hot(torch.tensor(clusters), 4)).log_softmax(1)
    assert gumbel_vae.clustering(log_q, log_q.repeat(2, 1)).item() == pytest.approx(expected, abs=1e-6)


def test_capacity_is_zero_on_target_and_grows_on_both_sides():
    assert [gumbel_vae.capacity(torch.tensor(kl), 3.0, gamma=10.0) for kl in (3.0, 2.5, 3.5)] == [0, 5, 5]


def test_score_matches_clusters_to_labels_one_to_one():
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    assert gumbel_vae.score(labels, (labels + 1) % 3) == {"nmi": 1.0, "acc": 1.0, "clusters_used": 3}
    # The best that one-to-one can do: 5 is digit 1, 4 and 1 cannot both be digit 2, and 3 is digit 0.
    assert gumbel_vae.score(labels, np.array([5, 5, 3, 5, 5, 4, 3, 1]))["acc"] == 4 / 8


def test_a_warp_moves_the_ink_a_little_in_any_direction_and_with_no_strength_not_at_all():
    x = torch.zeros(500, 28, 28)
    x[:, 12:17, 9:12] = 1  # around row 14, column 10
    torch.testing.assert_close(gumbel_vae.warp(x.flatten(1), strength=0), x.flatten(1), atol=1e-4, rtol=0)
    torch.manual_seed(0)
    warped = gumbel_vae.warp(x.flatten(1)).view(-1, 28, 28)
    ink, places = warped.sum((1, 2)), torch.arange(28.0)
    assert ink.mean() == pytest.approx(15, rel=0.05) and 0.5 * 15 < ink.min() and ink.max() < 2 * 15
    for axis, centre in (2, 14), (1, 10):
        moved = (warped.sum(axis) * places).sum(1) / ink - centre
        assert abs(moved.mean()) < 0.3 and moved.min() < -2 and moved.max() > 2 and moved.abs().max() < 5


# The training

@pytest.mark.parametrize("script, options, loss", [
    ("vae", {"beta": 0.5}, lambda climb, _: 1 + 0.5 * climb * 2), ("cvae", {"beta": 3}, lambda climb, _: 1 + 3 * climb * 2),
    ("gumbel_vae", {"beta": 0.5, "gamma": 10}, lambda climb, _: 1 + 0.5 * climb * 2 + 10 * 8),
    ("gumbel_vae", {"objective": "elbo"}, lambda *_: 1 + 2 + 4),
    ("gumbel_vae", {"objective": "capacity"},
     lambda _, half: 1 + 30 * abs(2 - 2.0 * half) + 30 * abs(4 - math.log(10) * half))])
def test_the_loss_of_every_step_has_the_right_parts_and_the_learning_rate_climbs_and_falls(
        script, options, loss, monkeypatch):
    for name, value in (("reconstruction", 1.0), ("gaussian_kl", 2.0), ("categorical_kl", 4.0), ("clustering", 8.0)):
        monkeypatch.setattr(SCRIPTS[script], name, lambda *_, value=value: torch.tensor(value), raising=False)
    losses, rates = [], []
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: losses.append(loss.item()))
    monkeypatch.setattr(torch.optim.Adam, "step", lambda adam: rates.append(adam.param_groups[0]["lr"]))
    SCRIPTS[script].train(small_model(script), blob_data(), epochs=5, batch_size=16, lr=0.1, **options)  # 80 steps
    # Two ramps: to 1 over the first 15 % of the steps, which are 12, and to 1 by half-time.
    assert losses == pytest.approx([loss(min(1, step / 12), min(1, step / 40)) for step in range(80)])
    assert max(rates) == pytest.approx(0.1, rel=0.05) and rates[-1] < 0.002
    assert rates[:12] == sorted(rates[:12]) and rates[12:] == sorted(rates[12:], reverse=True)


@pytest.mark.parametrize("script, options", [
    ("vae", {"beta": 0.5}), ("cvae", {"beta": 7.0}), ("gumbel_vae", {"objective": "elbo", "tau": 0.7}),
    ("gumbel_vae", {"beta": 0.5, "gamma": 3.0, "tau": 0.7}), ("gumbel_vae", {"beta": 2.0, "gamma": 0.0, "tau": 2.0})])
def test_a_step_takes_the_gradient_of_its_objective(script, options):
    model, data, module = small_model(script), blob_data(), SCRIPTS[script]
    torch.manual_seed(1)
    module.train(model, data, epochs=2, batch_size=256, lr=1e-9, **options)  # two steps too small to change the model
    taken = [parameter.grad.clone() for parameter in model.parameters()]
    torch.manual_seed(1)
    for _ in range(2):  # with the same random numbers; what stays is the second step, where the KL has its full weight
        order = torch.randperm(256)
        x, y = data.x_train[order], common.one_hot(data.y_train[order])
        mu, log_var, *log_q = model.encode(x)
        if script == "gumbel_vae":
            y = F.gumbel_softmax(*log_q, options["tau"], hard=True)
        logits = decode(script, model, module.reparameterize(mu, log_var), y)
        loss = module.reconstruction(logits, x) + options.get("beta", 1) * module.gaussian_kl(mu, log_var)
        if "objective" in options:
            loss += gumbel_vae.categorical_kl(*log_q)
        elif script == "gumbel_vae":
            loss += options["gamma"] * gumbel_vae.clustering(*log_q, model.cluster(gumbel_vae.warp(x.repeat(2, 1))))
    for gradient, expected in zip(taken, torch.autograd.grad(loss, model.parameters())):
        torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("objective", ["elbo", "capacity", "mi"])
def test_the_decoder_teaches_c_and_tau_changes_its_gradient_but_not_the_sample(objective, monkeypatch):
    monkeypatch.setattr(gumbel_vae, "categorical_kl", lambda log_q: torch.zeros(()))  # what is left of a gradient into
    monkeypatch.setattr(gumbel_vae, "clustering", lambda *_: torch.zeros(()))         # c comes from the decoder
    samples, gradients = [], []

    class Watched(gumbel_vae.GumbelVAE):
        def decode(self, z, c):
            samples.append(c.detach())
            return super().decode(z, c)
    for tau in (0.5, 2.0):
        torch.manual_seed(0)
        model = Watched(h_dim=32)
        gumbel_vae.train(model, blob_data(), epochs=1, batch_size=256, objective=objective, tau=tau)
        gradients.append(model.to_cluster_hidden.weight.grad)
    assert torch.equal(samples[0], samples[2]) and torch.equal(samples[0], samples[0].round())  # 1, 3: of evaluate
    assert all(gradient.any() for gradient in gradients) and not torch.allclose(*gradients, rtol=0.1)


@every_script
def test_training_lowers_the_test_loss(script):
    model, data = small_model(script), blob_data()
    before = SCRIPTS[script].evaluate(model, data)["loss"]
    assert SCRIPTS[script].train(model, data, epochs=6, batch_size=32)[-1]["loss"] < 0.7 * before


@every_script
def test_the_model_is_in_training_mode_for_the_steps_alone(script):
    modes = []

    class Watched(MODELS[script]):
        def encode(self, x):
            modes.append(self.training)
            return super().encode(x)
    model, data = Watched(h_dim=32), blob_data()
    SCRIPTS[script].train(model, data, epochs=2)
    assert modes == [True, True, False] * 2  # two batches, then the test images, in each epoch
    for use in SCRIPTS[script].fit_prior, SCRIPTS[script].evaluate:
        modes.clear()
        use(model.train(), data)
        assert modes == [False]


@every_script
def test_no_step_waits_for_the_device(script):
    class Spy(TorchDispatchMode):
        waits = 0

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            self.waits += operation is torch.ops.aten._local_scalar_dense.default  # .item(), float(...), if tensor:
            return operation(*args, **(kwargs or {}))
    seen = []
    for batch_size in 64, 16:
        with Spy() as spy:
            SCRIPTS[script].train(small_model(script), blob_data(), epochs=2, batch_size=batch_size)
        seen.append(spy.waits)
    assert seen[0] == seen[1] > 0  # some in each epoch, none in each step


def test_the_labels_belong_to_their_images():
    model = small_model("cvae")
    cvae.train(model, blob_data(), epochs=20, batch_size=32)
    probs = torch.sigmoid(model.decode(torch.zeros(10, 5), torch.eye(10))).view(10, 28, 28)
    for digit in range(10):
        assert probs[digit, 2 * digit + 4:2 * digit + 8, 4:24].mean() > 3 * probs[digit].mean()


@every_script
def test_everything_stays_on_the_device(script):
    with torch.device("meta"):  # whose tensors hold no numbers but refuse those of other devices: no GPU is needed
        model, x, y = MODELS[script](), torch.rand(16, 784), torch.rand(16, 10)
    mu, log_var, *log_q = model.encode(x)
    z = SCRIPTS[script].reparameterize(mu, log_var)
    losses = [vae.reconstruction(decode(script, model, z, y), x), vae.gaussian_kl(mu, log_var)]
    if script == "gumbel_vae":
        losses += [gumbel_vae.clustering(*log_q, model.cluster(gumbel_vae.warp(x))), gumbel_vae.categorical_kl(*log_q)]
    assert {loss.device.type for loss in losses} == {"meta"}


@every_script
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_losses_of_the_cpu(script, tiny):
    on_cpu, on_cuda = (tiny(script, "--device", device, "--epochs", 20) for device in ("cpu", "cuda"))
    assert on_cuda["loss"] == pytest.approx(on_cpu["loss"], rel=0.05)


# The evaluation and the fitted prior

@every_script
def test_evaluate_agrees_with_the_same_sums_by_hand(script):
    model, data, rows = small_model(script), blob_data(n_test=1234), []  # chunks of 500, 500 and 234
    prior = SCRIPTS[script].fit_prior(model, data)
    assert prior.batch_shape == (() if script == "vae" else (10,))
    results = SCRIPTS[script].evaluate(model, data, prior, seed=3)
    torch.manual_seed(3)
    for x, y in zip(data.x_test.split(500), data.y_test.split(500)):
        mu, log_var, *log_q = model.encode(x)
        q, standard, kl_c = D.Normal(mu, torch.exp(log_var / 2)), D.Normal(0.0, 1.0), torch.zeros(len(x))
        z = q.mean + q.stddev * torch.randn_like(mu)
        if script == "gumbel_vae":
            y = (log_q[0] - torch.empty_like(log_q[0]).exponential_().log()).argmax(1)  # the Gumbel-max trick
            kl_c = D.kl_divergence(D.Categorical(logits=log_q[0]), D.Categorical(torch.ones(10)))
        pixels = D.Bernoulli(logits=decode(script, model, z, common.one_hot(y)), validate_args=False)
        log_fitted = prior.log_prob(z) if script == "vae" else prior.log_prob(z[:, None])[range(len(x)), y]
        rows.append(torch.stack([-pixels.log_prob(x).sum(1), D.kl_divergence(q, standard).sum(1), kl_c,
                                 standard.log_prob(z).sum(1) - log_fitted], 1))                  # (B, 4)
    recon, kl, kl_c, change = torch.cat(rows).mean(0).tolist()
    loss = recon + kl + kl_c
    expected = {"recon": recon, "kl": kl, "loss": loss, "loss_fitted": loss + change}
    assert {name: results[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    with pytest.raises(FloatingPointError, match="not finite"):
        SCRIPTS[script].evaluate(model, data, SimpleNamespace(log_prob=lambda z: math.nan * z.sum(-1)))


def model_of_codes(script):
    """A model whose "images" are the codes z already, with a posterior of next to no width; z[0] > 2 is class 1."""
    def encode(x):
        mu_and_log_var = x, torch.full_like(x, -30.0)
        log_q = torch.stack([2 - x[:, 0], x[:, 0] - 2], 1).log_softmax(1)
        return (*mu_and_log_var, log_q) if script == "gumbel_vae" else mu_and_log_var
    model = nn.Module()
    model.n_classes, model.encode = 2, encode
    return model


@every_script
def test_the_fitted_prior_finds_a_known_mixture(script):
    truth = vae.mixture(torch.tensor([0.2, 0.3, 0.5]), torch.tensor([[-4.0, 0.0], [0.0, 5.0], [4.0, 0.0]]),
                        torch.tensor([0.1, 0.2, 0.05])[:, None, None] * torch.eye(2))
    torch.manual_seed(0)
    z, held_out, model = truth.sample((20000,)), truth.sample((5000,)), model_of_codes(script)
    data = common.Data(z, (z[:, 0] > 2).long(), None, None, "codes")
    if script == "vae":
        fitted = vae.fit_prior(model, data, n_components=3)
        assert fitted.log_prob(held_out).mean() == pytest.approx(truth.log_prob(held_out).mean().item(), abs=0.01)
    else:  # class 0 has the first two Gaussians, class 1 the third
        fitted, few = (SCRIPTS[script].fit_prior(model, data._replace(x_train=z[:n], y_train=data.y_train[:n]),
                                                 n_components=1) for n in (20000, 30))
        for k in range(2):
            torch.testing.assert_close(fitted.mean[k], z[data.y_train == k].mean(0), atol=0.01, rtol=0)
        # Thirty codes are too few to tell the classes apart.
        torch.testing.assert_close(few.mean, z[:30].mean(0).expand(2, 2), atol=1e-4, rtol=0)


@every_script
@pytest.mark.parametrize("scale", [0.01, 300.0])
def test_the_fit_is_sound_for_codes_of_any_scale_even_if_they_nearly_fill_a_line_only(script, scale):
    torch.manual_seed(0)
    wide, line = torch.randn(1000, 5), torch.randn(1000, 1) * torch.arange(1.0, 6.0) + 1e-6 * torch.randn(1000, 5)
    for z in scale * wide, scale * line:
        data = common.Data(z, torch.arange(1000) % 2, None, None, "codes")
        prior = SCRIPTS[script].fit_prior(model_of_codes(script), data)
        assert prior.log_prob(z if script == "vae" else z[:, None]).isfinite().all()


# What the scripts share, and how they come apart

def test_shared_blocks_are_the_same_to_the_letter_and_in_the_same_order():
    source = inspect.getsource
    for name in ("reparameterize", "reconstruction", "gaussian_kl", "mixture"):
        assert len({source(getattr(module, name)) for module in SCRIPTS.values()}) == 1, name
    assert source(vae.VAE.encode) == source(cvae.CVAE.encode)
    names = [[node.name for node in ast.parse(source(module)).body if hasattr(node, "name")][1:]  # after the model
             for module in SCRIPTS.values()]
    assert names[0] == names[1] == [name for name in names[2] if name in names[0]]


@every_script
def test_train_has_the_defaults_of_the_command_line_which_reaches_it(script, tiny, monkeypatch):
    train, parser, given = SCRIPTS[script].train, SCRIPTS[script].options(), {}
    names = list(inspect.signature(train).parameters)[2:]
    for name in names:
        assert inspect.signature(train).parameters[name].default == parser.get_default(name), name
    chosen = {"epochs": 1, "batch_size": 99, "lr": 0.002, "beta": 0.3, "seed": 8, "objective": "capacity", "gamma": 7.0,
              "tau": 0.9}
    monkeypatch.setattr(SCRIPTS[script], "train", lambda *args, **kw: given.update(kw) or train(*args, **kw))
    tiny(script, *(word for name in names for word in ("--" + name.replace("_", "-"), chosen[name])))
    assert given == {name: chosen[name] for name in names}


@every_script
def test_importing_does_nothing(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(HERE / f"{script}.py"))
    assert (*capsys.readouterr(), *tmp_path.iterdir()) == ("", "")


def test_one_hot():
    assert common.one_hot(torch.tensor([2, 0]), 3).tolist() == [[0, 0, 1], [1, 0, 0]]
    for wrong in ([0, 3], [-1, 0]):
        with pytest.raises(ValueError, match="the labels go from"):
            common.one_hot(torch.tensor(wrong), 3)


# The data

def test_without_mnist_or_network_the_embedded_digits_serve_and_say_so(tmp_path, monkeypatch, capsys):
    def refuse(url, **_):
        raise URLError("no network in this test")
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    data, out = common.load_mnist(tmp_path), capsys.readouterr().out
    assert "WARNING" in out and "no network in this test" in out and "NOT MNIST" in data.source
    for x, y in ((data.x_train, data.y_train), (data.x_test, data.y_test)):
        assert x.shape == (len(y), 784) and 0 <= x.min() and 0.9 < x.max() <= 1
        assert y.unique().tolist() == list(range(10))
    frame = torch.ones(28, 28, dtype=bool)
    frame[4:-4, 4:-4] = False
    assert not data.x_train.view(-1, 28, 28)[:, frame].any()  # digits of 20x20 pixels, as MNIST's are
    seen, held_out = (set(map(bytes, x.numpy())) for x in (data.x_train, data.x_test))
    assert not seen & held_out


@pytest.mark.parametrize("damaged", [b"", b"noise" * 100, None])
def test_damaged_files_are_refused_with_the_folder_to_delete(damaged, tmp_path, data_folder):
    shutil.copytree(data_folder, tmp_path / "data")
    victim = tmp_path / "data" / "MNIST" / "raw" / "train-images-idx3-ubyte"
    victim.write_bytes(victim.read_bytes()[:1000] if damaged is None else damaged)
    with pytest.raises(OSError, match="MNIST/raw are damaged.*delete"):
        common.load_mnist(tmp_path / "data")


# The scripts, through their own command line

@every_script
def test_a_run_reports_and_leaves_its_files_and_load_redraws_them(script, tiny, tmp_path, capsys):
    results = tiny(script, "--z-dim", 3, "--seed", 5)
    out = capsys.readouterr().out.splitlines()
    names = ["reconstruction", "generation", "fitted", "nmi" if script == "gumbel_vae" else "loss"]
    assert set(files(tmp_path)) == {f"{script}.pt", *(f"{script}_{name}.png" for name in names)}
    assert all(map(math.isfinite, results.values())) and results["train_seconds"] > 0
    assert results["loss"] == pytest.approx(results["recon"] + results["kl"] + results.get("kl_c", 0))
    assert len({len(line) for line in out[2:5]}) == 1 and len(out[2]) <= 80 and out[4].startswith("    2 ")
    assert out[-2].startswith("test recon ") and out[-1].startswith("wrote ")
    checkpoint, drawn = torch.load(tmp_path / f"{script}.pt", weights_only=True), files(tmp_path, "png")
    assert checkpoint["data"] == "MNIST" and checkpoint["state_dict"]["to_mu.weight"].shape == (3, 50)
    torch.save({**checkpoint, "data": "digits of mine"}, tmp_path / "mine.pt")
    assert tiny(script, "--load", tmp_path / "mine.pt", "--seed", 5, out=tmp_path / "again") == results
    assert files(tmp_path / "again") == drawn
    out = capsys.readouterr().out.splitlines()
    assert out[1].endswith("mine.pt was trained on digits of mine") and out[2].startswith("test recon ")


@every_script
def test_same_seed_same_bytes_and_evaluating_does_not_disturb(script, tiny, tmp_path, monkeypatch):
    first = tiny(script, out=tmp_path / "a")
    evaluate = SCRIPTS[script].evaluate
    monkeypatch.setattr(SCRIPTS[script], "evaluate",
                        lambda *args, **kw: evaluate(*args, **kw) and evaluate(*args, **kw))  # twice as often
    second = tiny(script, out=tmp_path / "b")
    assert {**first, "train_seconds": 0} == {**second, "train_seconds": 0}
    assert files(tmp_path / "a", "png") == files(tmp_path / "b", "png")
    assert tiny(script, "--seed", 1, out=tmp_path / "c")["loss"] != first["loss"]


@every_script
def test_a_fault_after_the_training_does_not_lose_the_model(script, tiny, tmp_path, monkeypatch):
    def no_memory(*_, **__):
        raise MemoryError
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(SCRIPTS[script], "fit_prior", no_memory)
        tiny(script)
    checkpoint = torch.load(tmp_path / f"{script}.pt", weights_only=True)
    assert set(checkpoint) == {"args", "data", "history", "state_dict"} and len(checkpoint["history"]) == 2
    assert math.isfinite(tiny(script, "--load", tmp_path / f"{script}.pt")["loss_fitted"])  # fits the missing prior


@pytest.mark.parametrize("objective", ["elbo", "capacity", "mi"])
def test_every_objective_trains_and_odd_sizes_are_legal(objective, tiny):
    odd = ["--objective", objective, "--n-classes", 30 if objective == "mi" else 2, "--z-dim", 1, "--epochs", 1]
    assert math.isfinite(tiny("gumbel_vae", *odd, "--batch-size", 255)["loss"])  # the last batch is one image


@pytest.mark.parametrize("fault, says", [
    *(("--" + option, option.split()[0]) for option in ("epochs 0", "batch-size 2.5", "lr nan", "beta inf", "wrong 1")),
    ("--out FILE", "folder FILE: File exists"), ("--data FILE", "folder FILE: File exists"),
    ("--load FILE", "FILE is not a complete VAE checkpoint"),
    ("--load missing.pt", "missing.pt: No such file"), ("--load cvae.pt", "not a complete VAE checkpoint"),
    ("--load SIZES", "SIZES is not a complete VAE checkpoint"), ("--lr 1000", "diverged")])
def test_faults_end_in_an_error_that_names_them_and_leave_all_files(fault, says, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny("vae", "--epochs", 1)
    tiny("cvae", "--epochs", 1)
    Path("FILE").write_bytes(b"not what it should be")
    torch.save({**torch.load("vae.pt", weights_only=True), "args": {"z_dim": 7, "h_dim": 50}}, "SIZES")
    before = files(tmp_path)
    with pytest.raises(SystemExit) as stop:
        common.run(lambda: tiny("vae", *fault.split()))
    message = str(stop.value.code) if stop.value.code != 2 else capsys.readouterr().err.splitlines()[-1]  # argparse's
    assert says in message and "\n" not in message
    assert files(tmp_path) == before


def test_a_mistake_in_the_code_keeps_its_traceback():
    with pytest.raises(ValueError, match="size"):
        common.run(lambda: vae.reconstruction(torch.zeros(2, 783), torch.zeros(2, 784)))


@every_script
def test_ctrl_c_ends_the_training_and_saves_it(script, tiny, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(common, "log_epoch", interrupt)
    assert math.isfinite(tiny(script, "--epochs", 5)["loss"])
    assert "interrupted in epoch 1" in capsys.readouterr().out
    assert len(torch.load(tmp_path / f"{script}.pt", weights_only=True)["history"]) == 1
    monkeypatch.setattr(common, "load_mnist", interrupt)
    with pytest.raises(SystemExit) as stop:
        common.run(lambda: tiny(script))
    assert stop.value.code == 130


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    def full_disk(self, content):
        self.touch()
        raise OSError(28, "No space left on device")
    (tmp_path / "picture.png").write_bytes(b"old")
    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="cannot write .*picture.png: No space left on device"):
        common.save(tmp_path / "picture.png", {})
    assert files(tmp_path) == {"picture.png": b"old"}


def test_as_a_user_types_it(tmp_path, data_folder):
    def run(line):
        return subprocess.run(f"{sys.executable} {line}", shell=True, cwd=HERE, capture_output=True, text=True)
    done = run(f"gumbel_vae.py --epochs 1 --data {data_folder} --out {tmp_path}")
    assert done.returncode == 0 and done.stderr == "" and (tmp_path / "gumbel_vae_nmi.png").exists()
    done = run(f"vae.py --load {tmp_path / 'gumbel_vae.pt'} --data {data_folder} --out {tmp_path}")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and done.stderr.startswith("vae.py: ")


# The pictures

@every_script
def test_every_picture_shows_itself_in_a_notebook(script):
    model, data, module = small_model(script, z_dim=2), blob_data(), SCRIPTS[script]
    figures = module.draw(model, data, module.fit_prior(model, data), module.train(model, data, epochs=1))
    assert ("manifold" in figures) == (script == "vae")  # only two dimensions can be drawn as a plane
    for figure in [*figures.values(), common.show(torch.rand(3, 784), columns=2)]:
        assert figure._repr_png_().startswith(b"\x89PNG")


def test_digit_draws_that_digit_alone_from_a_checkpoint(tiny, tmp_path, monkeypatch):
    tiny("cvae")
    shown = {}
    monkeypatch.setattr(common, "save", lambda path, item: shown.update({path.name: item}))
    tiny("cvae", "--load", tmp_path / "cvae.pt", "--digit", 7, "--seed", 3)
    model, checkpoint = common.load_checkpoint(tmp_path / "cvae.pt", cvae.CVAE)
    assert not model.training
    torch.manual_seed(3)
    torch.randn(40, 20)  # spent on the reconstructions
    for name, z in (("generation", torch.randn(64, 20)),
                    ("fitted", cvae.mixture(**checkpoint["prior"]).sample((64,))[:, 7])):
        probs = torch.sigmoid(model.decode(z, common.one_hot(torch.full((64,), 7)))).view(8, 8, 28, 28)
        picture = torch.tensor(np.asarray(shown[f"cvae_{name}.png"].axes[0].images[0].get_array()))
        torch.testing.assert_close(picture, probs.detach().transpose(1, 2).reshape(224, 224))


@pytest.mark.parametrize("n", [1, 3, 8])
def test_conditional_generation_has_one_class_per_row_and_one_z_per_column_or_one_per_image(n):
    class Stub(nn.Module):
        n_classes = 4

        def decode(self, z, y):
            return z.sum(1, keepdim=True) + torch.zeros(len(z), 784)
    shared, own = D.Normal(torch.zeros(2), 1.0), D.Normal(torch.zeros(4, 2), 1.0)
    for prior, rows in ((shared, 1), (own, 4)):
        axes = common.plot_conditional_generation(Stub(), prior, n=n).axes[0]
        tones = np.asarray(axes.images[0].get_array()).reshape(4, 28, n, 28)[:, 0, :, 0]         # (4, n)
        assert len(np.unique(tones, axis=0)) == rows and len(np.unique(tones)) == rows * n
        assert [label.get_text() for label in axes.get_yticklabels()] == [f"digit {k}" for k in range(4)]


# The README

def test_every_command_in_the_readme_and_the_docstrings_parses():
    text = "\n".join([README, *(module.__doc__ for module in SCRIPTS.values())])
    commands = re.findall(r"python (vae|cvae|gumbel_vae)\.py\b([^\n#`&;|]*)", text)
    assert {script for script, _ in commands} == set(SCRIPTS)
    for script, argv in commands:
        SCRIPTS[script].options().parse_args(shlex.split(argv))


def test_every_link_in_the_readme_leads_to_a_file_or_to_the_definition_it_names():
    for path in re.findall(r"\]\(([\w./]+)[#)]", README):
        assert (HERE / path).exists(), path
    links = re.findall(r"\[`?(\w+)`?\]\((\w+\.py)#L(\d+)\)", README)
    assert links
    for name, path, number in links:
        line = (HERE / path).read_text(encoding="utf-8").splitlines()[int(number) - 1]
        assert re.match(rf"(def|class) {name}\b", line), (name, path, number)


def test_every_snippet_in_the_readme_runs_and_the_notebook_trains_as_the_script_does(tmp_path, data_folder, monkeypatch):
    load_mnist, scope, histories = common.load_mnist, {}, []
    monkeypatch.setattr(common, "load_mnist", lambda root="", device="cpu": load_mnist(data_folder, device))
    monkeypatch.setattr("torchvision.datasets.FashionMNIST", lambda root, **kw: torchvision.datasets.MNIST(data_folder))
    monkeypatch.chdir(tmp_path)
    for script in SCRIPTS:  # leaves the checkpoints that snippets load
        SCRIPTS[script].main(["--epochs", "1"])
    for snippet in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(snippet, scope)
        histories += [scope["history"]] if "history" in scope else []
    assert histories[0][-1]["loss"] == vae.main(["--epochs", str(len(histories[0]))])["loss"]


def test_every_recipe_in_the_readme_changes_the_script_and_runs(tmp_path, data_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["--epochs", "1", "--data", str(data_folder)]
    for script in SCRIPTS:
        shutil.copy(HERE / f"{script}.py", tmp_path)
    for expressions, source, target in re.findall(r"sed (.+?) (\w+\.py) > (\w+\.py)", README):
        code = Path(source).read_text(encoding="utf-8")
        for expression in shlex.split(expressions.replace("-e ", "")):
            before, code = code, subprocess.run(["sed", expression], input=code, capture_output=True, check=True,
                                                encoding="utf-8").stdout
            assert code != before, expression
        Path(target).write_text(code, encoding="utf-8")
        scope = {"__name__": "recipe"}
        exec(code, scope)
        scope["main"](argv)
    for code in re.findall(r'python -c "(import gumbel_vae as g; .*)"', README):
        for name in re.findall(r"\bg\.(\w+)", code):
            assert hasattr(gumbel_vae, name), name
        monkeypatch.delitem(sys.modules, "gumbel_vae")  # so that the recipe changes a copy
        monkeypatch.setattr(sys, "argv", ["-c", *argv])
        exec(code, {})
