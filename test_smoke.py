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
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.testing import assert_close
from torchvision.datasets import MNIST

import common
import cvae
import gumbel_vae
import vae

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text(encoding="utf-8")
MODELS = {vae: vae.VAE, cvae: cvae.CVAE, gumbel_vae: gumbel_vae.GumbelVAE}


@pytest.fixture(params=MODELS)
def script(request):
    """Whatever takes this runs three times: for vae, for cvae and for gumbel_vae."""
    return request.param


@pytest.fixture
def model(script):
    torch.manual_seed(0)
    return MODELS[script](h_dim=32, z_dim=5)


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """A folder in MNIST's format: images of noise, with a bright bar whose height is the label."""
    raw = tmp_path_factory.mktemp("data") / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 256), ("t10k", 64)):
        labels, images = np.arange(n) % 10, np.random.default_rng(n).integers(0, 40, (n, 28, 28))
        for image, label in zip(images, labels):
            image[2 * label + 4:2 * label + 8, 4:24] = 220
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            content = header + array.astype(np.uint8).tobytes()
            (raw / f"{part}-{name}-ubyte").write_bytes(content)
    return raw.parent.parent


@pytest.fixture
def data(data_folder):
    return common.load_mnist(data_folder)


@pytest.fixture
def tiny(data_folder, tmp_path):
    """Runs a script's main on the made-up images for two short epochs, its files in tmp_path."""
    def run(script, *argv, out=tmp_path):
        sizes = ["--epochs", 2, "--batch-size", 64, "--h-dim", 50]
        words = ["--data", data_folder, "--out", out, *sizes, *argv]
        return script.main([str(word) for word in words])
    return run


def decode(model, z, y):
    """Pixel logits; only the VAE's decoder takes no class, a one-hot y (N, 10), beside z."""
    return model.decode(z) if isinstance(model, vae.VAE) else model.decode(z, y)


def files(folder, pattern="*.*"):
    return {path.name: path.read_bytes() for path in folder.glob(pattern)}


def pixels(figure):
    return torch.tensor(np.asarray(figure.axes[0].images[0].get_array()))


# The mathematics

def test_the_losses_are_those_of_torch_distributions_for_any_batch_size():
    mu, log_var, logits = torch.randn(7, 5), torch.randn(7, 5), 3 * torch.randn(7, 784)
    x, log_q = torch.rand(7, 784).round(), (3 * torch.randn(7, 6)).log_softmax(1)
    q = D.Normal(mu, torch.exp(log_var / 2))
    kl = D.kl_divergence(q, D.Normal(0.0, 1.0)).sum(1).mean()
    kl_c = D.kl_divergence(D.Categorical(logits=log_q), D.Categorical(torch.ones(6))).mean()
    for n in (1, 3):
        assert_close(vae.gaussian_kl(mu.repeat(n, 1), log_var.repeat(n, 1)), kl)
        assert_close(gumbel_vae.categorical_kl(log_q.repeat(n, 1)), kl_c)
        recon = vae.reconstruction(logits.repeat(n, 1), x.repeat(n, 1))
        assert_close(recon, -D.Bernoulli(logits=logits).log_prob(x).sum(1).mean())


def test_clustering_is_made_of_entropies_and_a_divergence_of_torch_distributions():
    logits = torch.randn(9, 6, requires_grad=True)
    log_q, log_q_warped = logits.log_softmax(1), torch.randn(18, 6).log_softmax(1)
    q, teacher = D.Categorical(logits=log_q), D.Categorical(logits=log_q.detach())
    warped = [D.Categorical(logits=part) for part in log_q_warped.split(9)]
    oracle = sum(D.kl_divergence(teacher, pupil).mean() for pupil in warped) / 2
    oracle = oracle + 0.1 * q.entropy().mean() - 0.5 * D.Categorical(q.probs.mean(0)).entropy()
    loss = gumbel_vae.clustering(log_q, log_q_warped)
    assert_close(loss, oracle)
    gradients = [torch.autograd.grad(value, logits, retain_graph=True)[0]
                 for value in (loss, oracle)]
    assert_close(*gradients)


def test_evaluate_scores_the_clusters_against_the_labels(data):
    model = gumbel_vae.GumbelVAE()
    data = data._replace(y_test=data.y_test[torch.randperm(64)])  # in an order of its own
    sure = (100 * common.one_hot((data.y_test + 3) % 10)).log_softmax(1)
    model.cluster = lambda x: sure  # all 64 at once
    results = gumbel_vae.evaluate(model, data)
    entropy = D.Categorical(torch.bincount(data.y_test) / 64).entropy().item()
    assert results["nmi"] == results["acc"] == pytest.approx(1)
    assert results["i_c"] == pytest.approx(entropy, abs=1e-4)
    assert results["kl_c"] == pytest.approx(math.log(10), abs=1e-4)


def test_score_matches_clusters_to_labels_one_to_one():
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    assert gumbel_vae.score(labels, (labels + 1) % 3) == {"nmi": 1.0, "acc": 1.0}
    # At best 5 is digit 1, 4 and 1 cannot both be digit 2, and 3 is digit 0.
    assert gumbel_vae.score(labels, np.array([5, 5, 3, 5, 5, 4, 3, 1]))["acc"] == 4 / 8


@pytest.mark.parametrize("size", [28, 14])
def test_a_warp_shifts_turns_slants_and_bends_a_little(size):
    # Images whose pixels tell their own column, or row: warped, they tell where each came from.
    column, row = torch.meshgrid(torch.arange(0.0, size), torch.arange(0.0, size), indexing="xy")
    came, middle = [], slice(size // 4, -size // 4)
    for image in column, row:
        torch.manual_seed(0)
        came += [gumbel_vae.warp(image.flatten().repeat(500, 1)).view(500, size, size)]
    came = torch.stack(came)[..., middle, middle]  # (2, 500, size / 2, size / 2)
    shift = 28 / size * (came - torch.stack([column, row])[:, None, middle, middle]).mean((2, 3))
    assert abs(shift.mean()) < 0.2 and 1.5 < abs(shift).max() < 4  # pixels of 28
    turn, lean = came[1].diff(dim=2).mean((1, 2)), came[0].diff(dim=1).mean((1, 2))
    assert abs(turn.mean()) < 0.05 and 0.12 < turn.std() < 0.2 < abs(turn).max() < 0.5
    assert abs(lean.mean()) < 0.05 and 0.16 < lean.std() < 0.24
    assert abs((turn + lean).mean()) < 0.05 and 0.1 < (turn + lean).std() < 0.2  # the shear alone
    assert 0.05 < abs(came.diff(n=2)).max() < 0.5  # an unbent image has none


def by_hand(model, data, loss, steps, lr):
    """The -ELBO of every step of a training that takes all images at once."""
    optimizer, elbos = torch.optim.Adam(model.parameters()), []
    for step in range(steps):
        order = torch.randperm(len(data.x_train))
        x, y = data.x_train[order], common.one_hot(data.y_train[order])
        climb = min(1, step / (0.15 * steps))
        optimizer.param_groups[0]["lr"] = lr * min(climb + 1 / steps, (steps - step) / 0.85 / steps)
        terms = loss(model, x, y, climb, step)
        optimizer.zero_grad()
        terms[0].backward()
        optimizer.step()
        elbos.append(terms[1].item())
    return elbos


def recon_and_kl(model, x, y):
    mu, log_var = model.encode(x)
    q = D.Normal(mu, torch.exp(log_var / 2))
    p = D.Bernoulli(logits=decode(model, q.rsample(), y), validate_args=False)
    return -p.log_prob(x).sum(1).mean(), D.kl_divergence(q, D.Normal(0.0, 1.0)).sum(1).mean()


def check_training(script, data, loss, **options):
    torch.manual_seed(0)
    model = MODELS[script](h_dim=32, z_dim=5)
    twin = copy.deepcopy(model)
    torch.manual_seed(1)
    history = script.train(model, data, epochs=20, batch_size=256, lr=0.01, **options)
    torch.manual_seed(1)
    expected = by_hand(twin, data, loss, steps=20, lr=0.01)
    assert [epoch["train"] for epoch in history] == pytest.approx(expected, rel=1e-4)


def test_vae_minimises_the_elbo_with_a_weight_that_climbs(data):
    def loss(model, x, y, climb, step):
        recon, kl = recon_and_kl(model, x, y)
        return recon + (1 + 6 * climb) * kl, recon + kl
    check_training(vae, data, loss, beta=7.0)


def test_cvae_minimises_the_elbo_with_a_weight_that_climbs(data):
    def loss(model, x, y, climb, step):
        recon, kl = recon_and_kl(model, x, y)
        return recon + (1 + 9 * climb) * kl, recon + kl
    check_training(cvae, data, loss)


@pytest.mark.parametrize("objective", ["elbo", "capacity", "clustering"])
def test_gumbel_vae_minimises_its_objectives(data, objective):
    def loss(model, x, y, climb, step):
        log_q = model.cluster(x)
        c = F.gumbel_softmax(log_q, 0.7, hard=True)
        recon, kl = recon_and_kl(model, x, c)
        uniform = D.Categorical(torch.ones(10))
        kl_c = D.kl_divergence(D.Categorical(logits=log_q), uniform).mean()
        if objective == "elbo":
            total = recon + (1 + climb) * kl + kl_c
        elif objective == "capacity":
            half = min(1, step / 10)
            total = recon + 30 * abs(kl - 2 * half) + 30 * abs(kl_c - math.log(10) * half)
        else:
            warped = model.cluster(gumbel_vae.warp(x.repeat(2, 1)))
            total = recon + (1 + climb) * kl + 3 * gumbel_vae.clustering(log_q, warped)
        return total, recon + kl + kl_c
    check_training(gumbel_vae, data, loss, objective=objective, beta=2.0, gamma=3.0, tau=0.7)


def test_forward_is_what_train_uses(script, model, data):
    y = [common.one_hot(data.y_test)] if script is cvae else []
    outputs = model(data.x_test, *y)
    shapes = [(64, 784), (64, 5), (64, 5), (64, 10)][:4 if script is gumbel_vae else 3]
    assert [tuple(output.shape) for output in outputs] == shapes
    assert_close(outputs[1:3], model.encode(data.x_test))
    outputs[0].sum().backward()  # the decoder teaches both encoders
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_training_lowers_the_loss_and_only_its_steps_are_in_training_mode(script, model, data):
    encode, modes = model.encode, []
    model.encode = lambda x: modes.append((model.training, torch.is_grad_enabled())) or encode(x)
    before = script.evaluate(model, data)["loss"]
    assert script.train(model, data, epochs=6, batch_size=64)[-1]["loss"] < before - 10
    step, test = (True, True), (False, False)
    assert modes == [test, *[step, step, step, step, test] * 6]


def test_no_step_leaves_the_device_or_waits_for_it(script, data, monkeypatch):
    # Tensors on the meta device hold no numbers, and refuse those of other devices and .item().
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, fused: torch.optim.SGD(parameters))
    one_hot = lambda labels, n: torch.zeros(len(labels), n, device="meta")  # noqa: E731
    monkeypatch.setattr(common, "one_hot", one_hot)
    with torch.device("meta"):
        model, steps = MODELS[script](), []
    encode = model.encode
    model.encode = lambda x: steps.append(len(x)) or encode(x)
    with pytest.raises(RuntimeError, match="meta"):
        script.train(model, common.Data(*(tensor.to("meta") for tensor in data[:4]), ""), 1, 64)
    assert steps == [64] * 4  # only the end of an epoch asks for a number


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_losses_of_the_cpu(script, tiny):
    on_cpu, on_cuda = (tiny(script, "--device", device, "--epochs", 20)["loss"]
                       for device in ("cpu", "cuda"))
    assert on_cuda == pytest.approx(on_cpu, rel=0.05)


def test_evaluate_agrees_with_the_same_sums_by_hand(script, model, data):
    data = data._replace(x_test=data.x_train.repeat(3, 1), y_test=data.y_train.repeat(3))
    state, x, k, kl_c, change = torch.get_rng_state(), data.x_test, data.y_test, 0.0, 0.0
    prior = []
    if script is not gumbel_vae:
        prior = [common.mixture(**script.fit_prior(model, data))]
        state = torch.get_rng_state()
    results = script.evaluate(model, data, *prior, seed=3)
    assert torch.equal(torch.get_rng_state(), state)  # undisturbed
    generator, noise, gumbel = torch.Generator().manual_seed(3), [], []
    for n in 500, 268:
        noise.append(torch.randn(n, 5, generator=generator))
        if script is gumbel_vae:
            gumbel.append(-torch.empty(n, 10).exponential_(generator=generator).log())
    if script is gumbel_vae:
        log_q = model.cluster(x)
        k, kl_c = (log_q + torch.cat(gumbel)).argmax(1), gumbel_vae.categorical_kl(log_q).item()
    mu, log_var = model.encode(x)
    q, standard = D.Normal(mu, torch.exp(log_var / 2)), D.Normal(0.0, 1.0)
    z = q.mean + q.stddev * torch.cat(noise)
    p = D.Bernoulli(logits=decode(model, z, common.one_hot(k)), validate_args=False)
    recon, kl = -p.log_prob(x).sum(1).mean().item(), D.kl_divergence(q, standard).sum(1).mean()
    expected = {"recon": recon, "kl": kl.item(), "loss": recon + kl.item() + kl_c}
    if prior:
        fitted = prior[0].log_prob(z) if script is vae else prior[0].log_prob(z[:, None])[
            range(768), k]
        change = (standard.log_prob(z).sum(1) - fitted).mean().item()
        expected["loss_fitted"] = expected["loss"] + change
    else:
        h_c = D.Categorical(log_q.exp().mean(0)).entropy().item()
        expected["i_c"] = h_c - D.Categorical(logits=log_q).entropy().mean().item()
    assert {name: results[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-5)
    model.to_mu.bias.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        script.evaluate(model, data)


# After training

@pytest.mark.parametrize("scale", [0.01, 300.0])
def test_the_fitted_prior_finds_a_known_mixture_at_any_scale(scale):
    torch.manual_seed(0)
    means = scale * torch.tensor([[-7.0, 0.0], [-2.0, 5.0], [7.0, 0.0]])
    covariances = scale**2 * torch.tensor([0.1, 0.2, 1.0])[:, None, None] * torch.eye(2)
    truth = D.MixtureSameFamily(D.Categorical(probs=torch.tensor([0.05, 0.15, 0.8])),
                                D.MultivariateNormal(means, covariances))
    z = truth.sample((20000,))
    fitted = common.mixture(**common.fit_mixtures(z, n_components=3))
    best = truth.log_prob(z).mean().item()
    assert fitted.log_prob(z).mean() == pytest.approx(best, abs=0.01)
    labels = (z[:, 0] > 0).long()  # class 0 holds the first two Gaussians, class 1 the third
    fitted = common.mixture(**common.fit_mixtures(z, labels, 2, n_components=1))
    expected = torch.stack([z[labels == k].mean(0) for k in range(2)])
    assert_close(fitted.mean, expected, atol=1e-4 * scale, rtol=1e-4)
    line = z[:1000, :1] * torch.arange(1.0, 6.0) + 1e-6 * scale * torch.randn(1000, 5)
    assert common.mixture(**common.fit_mixtures(line)).log_prob(line).isfinite().all()


def test_a_class_without_codes_shares_those_of_all(data):
    fitted = common.fit_mixtures(torch.randn(500, 2), torch.zeros(500).long(), 3, 1)
    assert_close(fitted["means"][1], fitted["means"][2])
    assert fitted["covariances"].shape == (3, 1, 2, 2)


def test_transfer_gives_every_class_its_mean_and_covariance_and_its_own_code_back():
    torch.manual_seed(0)
    z, labels = torch.randn(6000, 2), torch.arange(6000) % 3
    z = z * torch.tensor([1.0, 3.0]) + labels[:, None] * torch.tensor([2.0, 0.5]) * (1 + z)
    fitted = common.fit_mixtures(z, labels, 3, n_components=2)
    moved = common.transfer(z, labels, **fitted)  # (6000, 3, 2)
    assert_close(moved[range(6000), labels], z, atol=1e-3, rtol=1e-3)
    for k in range(3):  # the codes of class 0, moved to k, are distributed as k's own
        own, came = z[labels == k], moved[labels == 0, k]
        assert_close(came.mean(0), own.mean(0), atol=0.02, rtol=0)
        assert_close(came.T.cov(), own.T.cov(), atol=0.02, rtol=0.02)


def test_shared_blocks_are_the_same_to_the_letter_and_in_the_same_order():
    source = inspect.getsource
    for name in "reparameterize", "reconstruction", "gaussian_kl":
        assert len({source(getattr(script, name)) for script in MODELS}) == 1, name
    assert len({source(model.encode) for model in MODELS.values()}) == 1
    names = [re.findall(r"^(?:def|class) (\w+)", source(script), re.M)[1:] for script in MODELS]
    assert names[0] == names[1]
    assert [name for name in names[1] if name in names[2]] == [
        name for name in names[2] if name in names[1]]


def test_train_has_the_defaults_of_the_command_line_which_reaches_it(script, tiny, monkeypatch):
    train, given = script.train, {}
    defaults = {name: option.default for name, option in inspect.signature(train).parameters.items()
                if name not in ("model", "data", "history")}
    assert defaults.items() <= vars(script.options().parse_args([])).items()
    chosen = dict(epochs=1, batch_size=255, lr=0.002, beta=0.3, objective="capacity", gamma=7.0,
                  tau=0.9)
    chosen = {name: chosen[name] for name in defaults}

    def spy(model, data, history, **options):
        given.update(options)
        assert_close(torch.sigmoid(model.to_logits.bias), data.x_train.mean(0).clamp(1e-3, 0.999))
        return train(model, data, history=history, **options)
    monkeypatch.setattr(script, "train", spy)
    tiny(script, *(f"--{name.replace('_', '-')}={value}" for name, value in chosen.items()))
    assert given == chosen


def test_importing_does_nothing(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(script.__file__)
    assert (*capsys.readouterr(), *tmp_path.iterdir()) == ("", "")


# The data

@pytest.mark.parametrize("error, says", [(OSError("no network in this test"), "no network in this"),
                                         (TimeoutError(), "TimeoutError")])
def test_without_mnist_or_network_the_embedded_digits_serve_and_say_so(
        error, says, tmp_path, monkeypatch, capsys):
    def refuse(self):
        raise error if socket.getdefaulttimeout() else ValueError("it might wait forever")
    monkeypatch.setattr(MNIST, "download", refuse)
    data, out = common.load_mnist(tmp_path), capsys.readouterr().out
    assert socket.getdefaulttimeout() is None
    assert "WARNING" in out and says in out and "NOT MNIST" in data.source
    assert data.y_train.unique().tolist() == data.y_test.unique().tolist() == list(range(10))
    for x in data.x_train, data.x_test:
        assert x.shape[1] == 784 and 0 <= x.min() and 0.9 < x.max() <= 1
    assert not set(map(bytes, data.x_train.numpy())) & set(map(bytes, data.x_test.numpy()))


def test_a_failed_download_is_forgiven_if_another_run_has_fetched_the_files(
        tmp_path, data_folder, monkeypatch):
    def lose_the_race(self):
        shutil.copytree(data_folder, tmp_path, dirs_exist_ok=True)
        raise RuntimeError("another run was faster")
    monkeypatch.setattr(MNIST, "download", lose_the_race)
    assert common.load_mnist(tmp_path).source == "MNIST"


def test_make_data_takes_arrays_and_tensors_of_bytes_or_floats():
    images = np.random.default_rng(0).integers(0, 256, (5, 6, 6), dtype=np.uint8)
    images[0, 0, 0] = 255
    labels = np.arange(5, dtype=np.uint8)
    data = common.make_data(images, labels, torch.tensor(images / 255.0).flatten(1), None, "mine")
    assert_close(data.x_train, data.x_test)
    assert data.x_test.dtype == torch.float32 and data.y_train.dtype == torch.int64
    assert data.y_test is None and data.source == "mine"


def test_load_mnist_gives_the_bytes_of_the_files_divided_by_255(data, data_folder):
    content = (data_folder / "MNIST/raw/train-images-idx3-ubyte").read_bytes()[16:]
    expected = torch.tensor(list(content)).view(256, 784) / 255
    assert_close(data.x_train, expected)


@pytest.mark.parametrize("change, says", [
    ({"x_train": torch.rand(4, 9) * 2 - 1}, "x_train goes from -0."),
    ({"x_test": torch.full((4, 9), math.nan)}, "x_test goes from nan to nan"),
    ({"x_test": torch.full((4, 9), math.inf)}, "goes from inf to inf"),
    ({"x_train": torch.full((4, 9), 256)}, "goes from 256 to 256"),
    ({"x_train": torch.ones(4, 9, dtype=torch.uint8)}, "goes from 1 to 1 as torch.uint8"),
    ({"x_train": torch.rand(0, 9)}, "shape (0, 9)"), ({"x_test": torch.rand(4, 3, 3, 3)}, "grey"),
    ({"x_train": torch.rand(4, 1, 9)}, "square"),
    ({"x_test": torch.rand(4, 16)}, "has 9 pixels an image, x_test 16"),
    ({"y_train": torch.arange(3)}, "y_train has the shape (3,)"),
    ({"y_test": torch.rand(4)}, "float32 for 4 images")])
def test_make_data_says_what_is_wrong(change, says):
    good = dict(x_train=torch.rand(4, 3, 3), y_train=torch.arange(4), x_test=torch.rand(4, 9),
                y_test=None)
    common.make_data(**good)
    with pytest.raises(ValueError) as error:
        common.make_data(**{**good, **change})
    assert says in str(error.value) and "\n" not in str(error.value)


def test_other_sizes_and_no_labels_train_fit_and_draw(script):
    digits = load_digits()
    labels = digits.target if script is cvae else None
    data = common.make_data(digits.images / 16, labels, digits.images / 16, labels)
    model = MODELS[script](image_size=64, h_dim=32)
    results = script.train(model, data, epochs=1)[-1]
    assert "acc" not in results
    fitted = [] if script is gumbel_vae else [script.fit_prior(model, data)]
    assert script.draw(model, data, *fitted, [results])


def test_pictures_must_be_square_and_cvae_needs_labels(data):
    with pytest.raises(ValueError, match="square"):
        common.show(torch.rand(2, 60))
    with pytest.raises(ValueError, match="no labels"):
        cvae.train(cvae.CVAE(), data._replace(y_train=None))


def test_a_mistake_in_the_code_keeps_its_traceback():
    with pytest.raises(ValueError, match="from 0 to 10, the classes from 0 to 9"):
        common.run(lambda: common.one_hot(torch.tensor([0, 10])))


# The command line

def test_a_run_leaves_its_files_which_the_same_seed_and_load_give_again(
        script, tiny, tmp_path, capsys):
    def run(*argv, out):
        results = tiny(script, "--seed", 5, *argv, out=tmp_path / out)
        return {**results, "train_seconds": 0}, capsys.readouterr().out.splitlines()
    results, log = run("--z-dim", 2, out="first")
    drawn, path = files(tmp_path / "first", "*.png"), tmp_path / "first" / f"{script.__name__}.pt"
    names = ["reconstruction", "generation", "loss", *{
        vae: ["fitted", "manifold"], cvae: ["fitted", "handwriting"],
        gumbel_vae: ["handwriting"]}[script]]
    assert set(drawn) == {f"{path.stem}_{name}.png" for name in names}
    assert all(picture.startswith(b"\x89PNG") for picture in drawn.values())
    assert all(map(math.isfinite, results.values()))
    assert len({len(line) for line in log[2:5]}) == 1 and len(log[2]) <= 80
    assert log[4].startswith("    2 ")
    assert log[-2].startswith("test recon ") and log[-1].startswith("wrote ")
    torch.save({**torch.load(path, weights_only=True), "data": "my digits"}, path)
    reloaded, log = run("--load", path, out="loaded")
    assert reloaded == results and files(tmp_path / "loaded") == drawn
    assert f"{path} was trained on my digits" in log[1] and "--z-dim 2 --seed 5" in log[2]
    again, _ = run("--z-dim", 2, out="again")
    assert again == results and files(tmp_path / "again", "*.png") == drawn
    assert run("--z-dim", 2, "--seed", 6, out="other")[0]["loss"] != results["loss"]


def test_ctrl_c_ends_the_training_and_keeps_what_was_learned(
        script, tiny, tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(common, "log_epoch", interrupt)
        patch.setattr(script, "draw", interrupt)  # the second Ctrl-C
        common.run(lambda: tiny(script, "--epochs", 5))
    assert stop.value.code == 130 and "what was learned is kept" in capsys.readouterr().out
    path = tmp_path / f"{script.__name__}.pt"
    model, checkpoint = common.load_checkpoint(path, MODELS[script])
    assert len(checkpoint["history"]) == 1 and "prior" not in checkpoint and not model.training
    assert math.isfinite(tiny(script, "--load", path)["loss"])


@pytest.mark.parametrize("fault, says", [
    *(("--" + option, option.split()[0])
      for option in ("epochs 0", "batch-size 2.5", "lr nan", "beta inf", "wrong 1")),
    ("--out FILE", "folder FILE: File exists"), ("--data FILE", "cannot write to the folder FILE"),
    ("--data DAMAGED", "raw are damaged"), ("--lr 1000", "diverged"),
    ("--load missing.pt", "missing.pt: No such file"),
    ("--load FILE", "FILE is not a complete VAE checkpoint"),
    *(("--load " + name, "not a complete VAE") for name in ("cvae.pt", "SIZES", "CODE"))])
def test_faults_end_in_one_line_about_them(
        fault, says, tiny, data_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny(vae, "--epochs", 1)
    tiny(cvae, "--epochs", 1)
    Path("FILE").write_bytes(b"not what it should be")
    checkpoint = torch.load("vae.pt", weights_only=True)
    torch.save({**checkpoint, "args": {"z_dim": 7, "h_dim": 50}}, "SIZES")
    torch.save({**checkpoint, "code": Path}, "CODE")  # a pickled class could do anything
    shutil.copytree(data_folder, "DAMAGED")
    Path("DAMAGED/MNIST/raw/train-images-idx3-ubyte").write_bytes(b"noise")
    before = files(tmp_path)
    with pytest.raises(SystemExit) as stop:
        common.run(lambda: tiny(vae, *fault.split()))
    error = capsys.readouterr().err
    message = str(stop.value.code) if stop.value.code != 2 else error.splitlines()[-1]
    assert says in message and "\n" not in message and files(tmp_path) == before


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    def full_disk(self, content):
        self.touch()
        raise OSError(28, "No space left on device")
    (tmp_path / "picture.png").write_bytes(b"old")
    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="cannot write .*picture.png: No space left on device"):
        common.save(tmp_path / "picture.png", {})
    assert files(tmp_path) == {"picture.png": b"old"}


def test_a_folder_without_room_is_found_before_the_training(tiny, monkeypatch):
    def refuse(dir):
        raise OSError(13, "Permission denied")
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    monkeypatch.setattr(common, "load_mnist", None)  # the next step
    with pytest.raises(OSError, match="cannot write to the folder .*: Permission denied; choose"):
        tiny(vae)


def test_as_a_user_types_it(tmp_path, data_folder):
    def run(*words):
        words = [sys.executable, *words, "--data", data_folder, "--out", tmp_path]
        return subprocess.run(words, cwd=HERE, capture_output=True, text=True)
    good = run("gumbel_vae.py", "--epochs", "1", "--n-classes", "30")
    bad = run("vae.py", "--load", tmp_path / "gumbel_vae.pt")
    assert good.returncode == 0 and good.stderr == ""
    assert (tmp_path / "gumbel_vae_handwriting.png").exists()
    assert bad.returncode == 1 and bad.stderr.count("\n") == 1
    assert bad.stderr.startswith("vae.py: ")


# The pictures

class Toy(torch.nn.Module):
    """Draws images of one tone: the first number of z, plus the class."""
    n_classes = 4

    def decode(self, z, y):
        return (z[:, :1] + y.argmax(1, keepdim=True)).expand(-1, 784)


def test_conditional_generation_has_a_class_per_row_and_one_z_per_column_or_per_image():
    for prior in D.Normal(torch.zeros(2), 1.0), D.Normal(torch.zeros(4, 2), 1.0):
        torch.manual_seed(0)
        z = prior.sample((9,))[..., 0].view(9, -1)  # (9, 1) or (9, 4)
        tones = torch.sigmoid(z + torch.arange(4)).T  # (4, 9)
        for digit, expected in (None, tones), (2, tones[2].view(3, 3)):
            torch.manual_seed(0)
            figure = common.plot_conditional_generation(Toy(), prior, n=9, digit=digit)
            assert_close(pixels(figure)[::28, ::28], expected)
    assert figure._repr_png_().startswith(b"\x89PNG")  # so a notebook can show it


def test_each_picture_has_the_codes_that_its_title_names(data):
    torch.manual_seed(0)
    model = vae.VAE(z_dim=2)
    gradients = []  # and an image tells its z:
    model.decode = lambda z: gradients.append(torch.is_grad_enabled()) or z[:, :1].expand(-1, 784)
    fitted = {"weights": torch.tensor([0.9, 0.1]), "means": torch.tensor([[6.0, 0], [-6.0, 0]]),
              "covariances": 0.01 * torch.eye(2).repeat(2, 1, 1)}
    figures = vae.draw(model, data, fitted, [], ", mine")
    shares = {name: (pixels(figures[name])[::28, ::28] > 0.99).float().mean()
              for name in ("generation", "fitted")}
    assert shares["generation"] < 0.05 and 0.75 < shares["fitted"] < 0.99
    redrawn = pixels(figures["reconstruction"])
    assert_close(redrawn[:28], data.x_test[:12].view(12, 28, 28).transpose(0, 1).reshape(28, -1))
    assert not torch.allclose(redrawn[:28], redrawn[28:], atol=0.1)
    assert figures["fitted"].axes[0].get_title("left") == "z ~ fitted prior, mine"
    assert not any(gradients)
    plane = pixels(figures["manifold"])
    assert plane[0, 0] < plane[0, -1] and plane[0, 0] == plane[-1, 0]  # z[0] grows to the right


def test_handwriting_shows_each_image_then_its_code_in_every_class():
    x, z = torch.rand(3, 1).expand(3, 784), torch.randn(3, 2)
    expected = torch.cat([x[:, :1], torch.sigmoid(z[:, :1] + torch.arange(4))], 1)
    assert_close(pixels(common.plot_handwriting(Toy(), x, z))[::28, ::28], expected)


def test_digit_has_pictures_of_its_own(tiny, monkeypatch):
    shown = {}
    monkeypatch.setattr(common, "save", lambda path, item: shown.update({path.name: item}))
    tiny(cvae, "--digit", 7)
    for name in "generation", "fitted":
        assert shown[f"cvae_{name}_7.png"].axes[0].get_title("left").startswith("digit 7")
        assert shown[f"cvae_{name}.png"].axes[0].get_title("left").startswith("one digit per row")


# The README

def test_every_command_in_the_readme_and_the_docstrings_parses():
    scripts = {script.__name__: script for script in MODELS}
    text = "\n".join([README, *(script.__doc__ for script in MODELS)])
    for name, argv in re.findall(rf"python ({'|'.join(scripts)})\.py\b([^\n#`&;|<]*)", text):
        scripts[name].options().parse_args(shlex.split(argv))


def test_every_link_in_the_readme_leads_to_a_file_or_to_the_definition_it_names():
    assert all((HERE / path).exists() for path in re.findall(r"\]\(([\w./]+)[#)]", README))
    links = re.findall(r"\[`?(\w+)`?\]\((\w+\.py)#L(\d+)\)", README)
    assert links
    for name, path, number in links:
        line = (HERE / path).read_text(encoding="utf-8").splitlines()[int(number) - 1]
        assert re.match(rf"\s*(def|class) {name}\b", line), f"{path}#L{number} is not {name}"


def test_every_snippet_in_the_readme_runs_in_order(tmp_path, data_folder, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.FashionMNIST", lambda root, **_: MNIST(data_folder))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data_folder, "data")
    histories, scope = [], {}
    for snippet in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(snippet, scope)
        histories += [[*scope["history"]]]
    length = len(histories[0])  # the notebook trains as the script does
    assert histories[0][-1]["loss"] == vae.main(["--epochs", str(length)])["loss"]


def test_every_change_in_the_readme_fits_its_script_and_runs(tmp_path, data_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = re.findall(r"```diff\n--- (\w+\.py)\n(.*?)```", README, re.DOTALL)
    assert changes
    for source, lines in changes:
        code, lines = (HERE / source).read_text(encoding="utf-8"), lines.splitlines()
        old, new = (["".join(line[1:] + "\n") for line in lines if line[0] == sign]
                    for sign in "-+")
        assert code.count("".join(old)) == 1, lines
        Path("changed.py").write_text(code.replace("".join(old), "".join(new)), encoding="utf-8")
        runpy.run_path("changed.py")["main"](["--epochs", "1", "--data", str(data_folder)])
