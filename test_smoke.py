"""What must hold, in under a minute, without a network and without MNIST: pytest test_smoke.py"""
import inspect
import math
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
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
    """A --data folder in MNIST's format: on each image noise, and a bright bar whose height is the label."""
    raw = tmp_path_factory.mktemp("data") / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 256), ("t10k", 64)):
        labels, images = np.arange(n) % 10, np.random.default_rng(n).integers(0, 40, (n, 28, 28))
        for image, label in zip(images, labels):
            image[2 * label + 4:2 * label + 8, 4:24] = 220
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            (raw / f"{part}-{name}-ubyte").write_bytes(header + array.astype(np.uint8).tobytes())
    return raw.parent.parent


@pytest.fixture
def data(data_folder):
    return common.load_mnist(data_folder)


@pytest.fixture
def tiny(data_folder, tmp_path):
    """Runs a script's main on the made-up images for two short epochs, with its files in tmp_path."""
    def run(script, *argv, out=tmp_path):
        argv = ["--data", data_folder, "--out", out, "--epochs", 2, "--batch-size", 64, "--h-dim", 50, *argv]
        return script.main([str(word) for word in argv])
    return run


def decode(model, z, y):
    """Pixel logits; only the VAE's decoder takes no class, a one-hot y (N, 10), beside z."""
    return model.decode(z) if isinstance(model, vae.VAE) else model.decode(z, y)


def files(folder, pattern="*.*"):
    return {path.name: path.read_bytes() for path in folder.glob(pattern)}


# The mathematics

def test_the_losses_are_those_of_torch_distributions_for_any_batch_size():
    mu, log_var, logits, x = torch.randn(7, 5), torch.randn(7, 5), 3 * torch.randn(7, 784), torch.rand(7, 784).round()
    log_q = (3 * torch.randn(7, 6)).log_softmax(1)
    kl = D.kl_divergence(D.Normal(mu, torch.exp(log_var / 2)), D.Normal(0.0, 1.0)).sum(1).mean()
    kl_c = D.kl_divergence(D.Categorical(logits=log_q), D.Categorical(torch.ones(6))).mean()
    for n in (1, 3):
        assert_close(vae.gaussian_kl(mu.repeat(n, 1), log_var.repeat(n, 1)), kl)
        assert_close(gumbel_vae.categorical_kl(log_q.repeat(n, 1)), kl_c)
        recon = vae.reconstruction(logits.repeat(n, 1), x.repeat(n, 1))
        assert_close(recon, -D.Bernoulli(logits=logits).log_prob(x).sum(1).mean())


def test_clustering_is_made_of_the_entropies_and_the_divergence_of_torch_distributions():
    logits = torch.randn(9, 6, requires_grad=True)
    log_q, log_q_warped = logits.log_softmax(1), torch.randn(18, 6).log_softmax(1)
    q, teacher = D.Categorical(logits=log_q), D.Categorical(logits=log_q.detach())
    invariance = [D.kl_divergence(teacher, D.Categorical(logits=warped)).mean() for warped in log_q_warped.split(9)]
    oracle = sum(invariance) / 2 + 0.1 * q.entropy().mean() - 0.5 * D.Categorical(q.probs.mean(0)).entropy()
    loss = gumbel_vae.clustering(log_q, log_q_warped)
    assert_close(loss, oracle)
    assert_close(*(torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (loss, oracle)))
    for clusters, used in ([2] * 8, 1), ([0, 1, 2, 3] * 2, 4):  # a collapsed c, and one that sorts as well as it can
        log_q = (100 * common.one_hot(torch.tensor(clusters), 4)).log_softmax(1)
        assert gumbel_vae.clustering(log_q, log_q.repeat(2, 1)).item() == pytest.approx(-0.5 * math.log(used), abs=1e-6)


def test_score_matches_clusters_to_labels_one_to_one():
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    assert gumbel_vae.score(labels, (labels + 1) % 3) == {"nmi": 1.0, "acc": 1.0, "clusters_used": 3}
    # The best that one-to-one can do: 5 is digit 1, 4 and 1 cannot both be digit 2, and 3 is digit 0.
    assert gumbel_vae.score(labels, np.array([5, 5, 3, 5, 5, 4, 3, 1]))["acc"] == 4 / 8


def test_a_warp_moves_the_ink_a_little_in_any_direction_and_with_no_strength_not_at_all():
    x = F.pad(torch.ones(500, 5, 5), (8, 15, 12, 11))  # ink around row 14, column 10
    assert_close(gumbel_vae.warp(x.flatten(1), strength=0), x.flatten(1), atol=1e-4, rtol=0)
    torch.manual_seed(0)
    warped = gumbel_vae.warp(x.flatten(1)).view(-1, 28, 28)
    ink = warped.sum((1, 2))
    assert ink.mean() == pytest.approx(25, rel=0.05) and 12 < ink.min() and ink.max() < 50
    for axis, centre in (2, 14), (1, 10):
        moved = warped.sum(axis) @ torch.arange(28.0) / ink - centre
        assert abs(moved.mean()) < 0.3 and moved.min() < -2 and moved.max() > 2 and moved.abs().max() < 5


@pytest.mark.parametrize("script, options, charge", [
    (vae, {"beta": 0.5}, lambda climb, half, kl: (1 - 0.5 * climb) * kl),
    (cvae, {"beta": 7.0}, lambda climb, half, kl: (1 + 6 * climb) * kl),
    (gumbel_vae, {"objective": "elbo", "tau": 0.7}, lambda climb, half, kl, kl_c, clustering: kl + kl_c),
    (gumbel_vae, {"objective": "capacity", "tau": 0.7}, lambda climb, half, kl, kl_c, clustering:
        30 * abs(kl - 2.0 * half) + 30 * abs(kl_c - math.log(10) * half)),
    (gumbel_vae, {"objective": "mi", "tau": 0.7, "beta": 2.0, "gamma": 3.0}, lambda climb, half, kl, kl_c, clustering:
        (1 + climb) * kl + 3 * clustering())])
def test_every_step_takes_the_loss_and_gradient_of_the_objective(script, options, charge, model, data, monkeypatch):
    losses, steps, parameters, backward = [], [], list(model.parameters()), torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: losses.append(loss.detach()) or backward(loss))
    monkeypatch.setattr(torch.optim.Adam, "step", lambda adam: steps.append(  # and leave the model as it is
        (adam.param_groups[0]["lr"], [parameter.grad for parameter in parameters])))
    torch.manual_seed(1)
    script.train(model, data, epochs=20, batch_size=256, **options)
    torch.manual_seed(1)
    for step, (_, gradients) in enumerate(steps):
        order = torch.randperm(256)
        x, y, rest = data.x_train[order], common.one_hot(data.y_train[order]), []
        if script is gumbel_vae:
            log_q = model.cluster(x)
            y = F.gumbel_softmax(log_q, 0.7, hard=True)
            rest = [gumbel_vae.categorical_kl(log_q),
                    lambda: gumbel_vae.clustering(log_q, model.cluster(gumbel_vae.warp(x.repeat(2, 1))))]
        mu, log_var = model.encode(x)
        recon = vae.reconstruction(decode(model, mu + torch.exp(log_var / 2) * torch.randn(256, 5), y), x)
        climb, half = min(1, step / 3), min(1, step / 10)  # to 1 in 15 % of the 20 steps, and in half of them
        loss = recon + charge(climb, half, vae.gaussian_kl(mu, log_var), *rest)
        assert_close(losses[step], loss.detach())
        for gradient, expected in zip(gradients, torch.autograd.grad(loss, parameters, retain_graph=True)):
            assert_close(gradient, expected, atol=1e-4, rtol=1e-3)
    if script is gumbel_vae:  # the decoder teaches c under every objective
        assert torch.autograd.grad(recon, model.to_cluster_hidden.weight)[0].any()
    rates = [rate for rate, _ in steps]
    assert rates[0] < 0.1 * rates[3] and rates[:4] == sorted(rates[:4]) and rates[3:] == sorted(rates[3:], reverse=True)


def test_tau_changes_only_the_gradient_and_with_gamma_0_only_the_decoder_teaches_c(data, monkeypatch):
    def step(**options):  # the sampled c, and the gradient that a single step leaves
        torch.manual_seed(0)
        model, sampled = gumbel_vae.GumbelVAE(h_dim=32), []
        model.from_latent.register_forward_pre_hook(lambda _, inputs: sampled.append(inputs[0][:, 20:].detach()))
        gumbel_vae.train(model, data, epochs=1, batch_size=256, **options)
        return sampled[0], model.to_cluster_logits.weight.grad
    (c, gradient), (same_c, other_gradient) = step(tau=0.5), step(tau=2.0)
    assert torch.equal(c, same_c) and not torch.allclose(gradient, other_gradient)
    draw_c = F.gumbel_softmax
    monkeypatch.setattr(F, "gumbel_softmax", lambda log_q, *args, **named: draw_c(log_q.detach(), *args, **named))
    assert step(gamma=1.0)[1].any() and not step(gamma=0.0)[1].any()


def test_training_lowers_the_test_loss_and_only_its_steps_are_in_training_mode(script, model, data):
    encode, modes = model.encode, []
    model.encode = lambda x: modes.append(model.training) or encode(x)
    before = script.evaluate(model, data)["loss"]
    assert script.train(model, data, epochs=6, batch_size=64)[-1]["loss"] < 0.8 * before
    script.fit_prior(model.train(), data)
    assert modes == [False, *[True, True, True, True, False] * 6, False]  # four batches in each epoch, then the test


def test_no_step_leaves_the_device_or_waits_for_it(script, data, monkeypatch):
    # Tensors on the meta device hold no numbers, but refuse those of other devices and .item(): we need no GPU.
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, lr, fused: torch.optim.SGD(parameters, lr))
    monkeypatch.setattr(common, "one_hot", lambda labels, n: torch.zeros(len(labels), n, device="meta"))
    with torch.device("meta"):
        model, steps = MODELS[script](), []
    encode = model.encode
    model.encode = lambda x: steps.append(len(x)) or encode(x)
    with pytest.raises(RuntimeError, match="meta"):
        script.train(model, common.Data(*(tensor.to("meta") for tensor in data[:4]), "no numbers"), batch_size=64)
    assert steps == [64] * 4  # only the end of an epoch asks for a number


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_losses_of_the_cpu(script, tiny):
    on_cpu, on_cuda = (tiny(script, "--device", device, "--epochs", 20) for device in ("cpu", "cuda"))
    assert on_cuda["loss"] == pytest.approx(on_cpu["loss"], rel=0.05)


def test_evaluate_agrees_with_the_same_sums_by_hand(script, model, data):
    data = data._replace(x_test=data.x_train.repeat(3, 1), y_test=data.y_train.repeat(3))  # 500 and 268 images
    prior, x, k, kl_c = script.fit_prior(model, data), data.x_test, data.y_test, 0.0
    random_state = torch.get_rng_state()
    results = script.evaluate(model, data, prior, seed=3)
    assert torch.equal(torch.get_rng_state(), random_state)  # undisturbed
    torch.manual_seed(3)
    if script is gumbel_vae:
        log_q = model.cluster(x)
        kl_c = gumbel_vae.categorical_kl(log_q).item()
        k = (log_q - torch.empty_like(log_q).exponential_().log()).argmax(1)  # the Gumbel-max trick
    mu, log_var = model.encode(x)
    q, standard = D.Normal(mu, torch.exp(log_var / 2)), D.Normal(0.0, 1.0)
    z = q.mean + q.stddev * torch.cat([torch.randn(500, 5), torch.randn(268, 5)])
    pixels = D.Bernoulli(logits=decode(model, z, common.one_hot(k)), validate_args=False)
    recon, kl = -pixels.log_prob(x).sum(1).mean().item(), D.kl_divergence(q, standard).sum(1).mean().item()
    log_fitted = prior.log_prob(z) if script is vae else prior.log_prob(z[:, None])[range(768), k]
    change = (standard.log_prob(z).sum(1) - log_fitted).mean().item()
    expected = {"recon": recon, "kl": kl, "loss": recon + kl + kl_c, "loss_fitted": recon + kl + kl_c + change}
    assert {name: results[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    prior.log_prob = lambda z: math.nan * z.sum(-1)
    with pytest.raises(FloatingPointError, match="not finite"):
        script.evaluate(model, data, prior)


@pytest.mark.parametrize("scale", [0.01, 300.0])
def test_the_fitted_prior_finds_a_known_mixture_at_any_scale(scale, script):
    model = torch.nn.Module()  # whose "images" are codes z already, with a posterior of almost no width
    model.n_classes, model.encode = 2, lambda x: (x, torch.full_like(x, -30.0))
    model.cluster = lambda x: torch.stack([-x[:, 0], x[:, 0]], 1)
    torch.manual_seed(0)
    truth = vae.mixture(torch.tensor([0.2, 0.3, 0.5]), scale * torch.tensor([[-7.0, 0.0], [-2.0, 5.0], [7.0, 0.0]]),
                        scale**2 * torch.tensor([0.1, 0.2, 1.0])[:, None, None] * torch.eye(2))
    z = truth.sample((20000,))
    data = common.Data(z, (z[:, 0] > 0).long(), None, None, "codes")
    if script is vae:
        fitted = vae.fit_prior(model, data, n_components=3)
        assert fitted.log_prob(z).mean() == pytest.approx(truth.log_prob(z).mean().item(), abs=0.01)
    else:  # class 0 holds the first two Gaussians, class 1 the third
        fitted = script.fit_prior(model, data, n_components=1)
        assert_close(fitted.mean, torch.stack([z[data.y_train == k].mean(0) for k in range(2)]))
    line = z[:1000, :1] * torch.arange(1.0, 6.0) + 1e-6 * scale * torch.randn(1000, 5)  # or nearly so
    fitted = script.fit_prior(model, data._replace(x_train=line, y_train=data.y_train[:1000]))
    assert fitted.log_prob(line if script is vae else line[:, None]).isfinite().all()


def test_shared_blocks_are_the_same_to_the_letter_and_in_the_same_order():
    source = inspect.getsource
    for name in ("reparameterize", "reconstruction", "gaussian_kl", "mixture"):
        assert len({source(getattr(script, name)) for script in MODELS}) == 1, name
    assert len({source(model.encode) for model in MODELS.values()}) == 1
    names = [re.findall(r"^(?:def|class) (\w+)", source(script), re.M)[1:] for script in MODELS]  # but the model
    assert names[0] == names[1] == [name for name in names[2] if name in names[0]]


def test_train_has_the_defaults_of_the_command_line_which_reaches_it(script, tiny, monkeypatch):
    train, given = script.train, {}
    defaults = {name: option.default for name, option in list(inspect.signature(train).parameters.items())[2:]}
    assert defaults.items() <= vars(script.options().parse_args([])).items()
    chosen = dict(epochs=1, batch_size=255, lr=0.002, beta=0.3, objective="capacity", gamma=7.0, tau=0.9, seed=8)
    chosen = {name: chosen[name] for name in defaults}
    monkeypatch.setattr(script, "train", lambda *args, **options: given.update(options) or train(*args, **options))
    tiny(script, "--z-dim=1", *(f"--{name.replace('_', '-')}={value}" for name, value in chosen.items()))
    assert given == chosen


def test_importing_does_nothing(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(script.__file__)
    assert (*capsys.readouterr(), *tmp_path.iterdir()) == ("", "")


def test_without_mnist_or_network_the_embedded_digits_serve_and_say_so(tmp_path, monkeypatch, capsys):
    def refuse(url, **_):
        raise OSError("no network in this test")
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    data, out = common.load_mnist(tmp_path), capsys.readouterr().out
    assert "WARNING" in out and "no network in this test" in out and "NOT MNIST" in data.source
    assert data.y_train.unique().tolist() == data.y_test.unique().tolist() == list(range(10))
    for x in data.x_train, data.x_test:
        assert x.shape[1] == 784 and 0 <= x.min() and 0.9 < x.max() <= 1 and not x[:, :4 * 28].any()
    assert not set(map(bytes, data.x_train.numpy())) & set(map(bytes, data.x_test.numpy()))


def test_a_run_leaves_its_files_which_the_same_seed_and_load_give_again(script, tiny, tmp_path, capsys):
    def run(*argv, out):
        return tiny(script, "--seed", 5, *argv, out=tmp_path / out), capsys.readouterr().out.splitlines()
    results, log = run("--z-dim", 2, out="first")
    drawn, path = files(tmp_path / "first", "*.png"), tmp_path / "first" / f"{script.__name__}.pt"
    names = {vae: ["loss", "manifold"], cvae: ["loss"], gumbel_vae: ["nmi"]}[script]
    assert set(drawn) == {f"{path.stem}_{name}.png" for name in ["reconstruction", "generation", "fitted", *names]}
    assert all(picture.startswith(b"\x89PNG") for picture in drawn.values())
    assert all(map(math.isfinite, results.values())) and results["train_seconds"] > 0
    assert len({len(line) for line in log[2:5]}) == 1 and len(log[2]) <= 80 and log[4].startswith("    2 ")
    assert log[-2].startswith("test recon ") and log[-1].startswith("wrote ")
    torch.save({**torch.load(path, weights_only=True), "data": "my digits"}, path)
    reloaded, log = run("--load", path, out="loaded")
    assert reloaded == results and files(tmp_path / "loaded") == drawn
    assert f"{path} was trained on my digits" in log[1] and log[2].startswith("test recon ")
    again, _ = run("--z-dim", 2, out="again")
    assert {**again, "train_seconds": 0} == {**results, "train_seconds": 0}
    assert files(tmp_path / "again", "*.png") == drawn
    assert run("--z-dim", 2, "--seed", 6, out="other")[0]["loss"] != results["loss"]


def test_ctrl_c_ends_the_training_and_a_second_one_does_not_lose_it(script, tiny, tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(common, "log_epoch", interrupt)
        patch.setattr(script, "fit_prior", interrupt)
        common.run(lambda: tiny(script, "--epochs", 5))
    assert stop.value.code == 130 and "interrupted in epoch 1" in capsys.readouterr().out
    path = tmp_path / f"{script.__name__}.pt"
    model, checkpoint = common.load_checkpoint(path, MODELS[script])
    assert set(checkpoint) == {"args", "data", "history", "state_dict"} and len(checkpoint["history"]) == 1
    assert not model.training and math.isfinite(tiny(script, "--load", path)["loss_fitted"])  # of a prior fitted now


@pytest.mark.parametrize("fault, says", [
    *(("--" + option, option.split()[0]) for option in ("epochs 0", "batch-size 2.5", "lr nan", "beta inf", "wrong 1")),
    ("--out FILE", "folder FILE: File exists"), ("--data FILE", "folder FILE: File exists"),
    ("--data DAMAGED", "DAMAGED/MNIST/raw are damaged"), ("--lr 1000", "diverged"),
    ("--load missing.pt", "missing.pt: No such file"), ("--load FILE", "FILE is not a complete VAE checkpoint"),
    ("--load cvae.pt", "not a complete VAE checkpoint"), ("--load SIZES", "not a complete VAE checkpoint")])
def test_faults_end_in_one_line_about_them(fault, says, tiny, data_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny(vae, "--epochs", 1)
    tiny(cvae, "--epochs", 1)
    Path("FILE").write_bytes(b"not what it should be")
    torch.save({**torch.load("vae.pt", weights_only=True), "args": {"z_dim": 7, "h_dim": 50}}, "SIZES")
    shutil.copytree(data_folder, "DAMAGED")
    Path("DAMAGED/MNIST/raw/train-images-idx3-ubyte").write_bytes(b"noise")
    before = files(tmp_path)
    with pytest.raises(SystemExit) as stop:
        common.run(lambda: tiny(vae, *fault.split()))
    message = str(stop.value.code) if stop.value.code != 2 else capsys.readouterr().err.splitlines()[-1]  # argparse's
    assert says in message and "\n" not in message and files(tmp_path) == before


def test_a_mistake_in_the_code_keeps_its_traceback():
    with pytest.raises(ValueError, match="the labels go from 0 to 10, the classes from 0 to 9"):
        common.run(lambda: common.one_hot(torch.tensor([0, 10])))


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
    good, bad = (subprocess.run(f"{sys.executable} {line} --data {data_folder} --out {tmp_path}", shell=True, cwd=HERE,
                                capture_output=True, text=True)
                 for line in ("gumbel_vae.py --epochs 1 --n-classes 30", f"vae.py --load {tmp_path / 'gumbel_vae.pt'}"))
    assert good.returncode == 0 and good.stderr == "" and (tmp_path / "gumbel_vae_nmi.png").exists()
    assert bad.returncode == 1 and bad.stderr.count("\n") == 1 and bad.stderr.startswith("vae.py: ")


def test_conditional_generation_has_one_class_per_row_and_one_z_per_column_or_one_per_image():
    model = torch.nn.Module()
    model.n_classes, model.decode = 4, lambda z, y: (z[:, :1] + y.argmax(1, keepdim=True)).expand(-1, 784)
    for prior in D.Normal(torch.zeros(2), 1.0), D.Normal(torch.zeros(4, 2), 1.0):
        torch.manual_seed(0)
        z = prior.sample((9,))[..., 0].view(9, -1)                     # (9, 1) or (9, 4)
        tones = torch.sigmoid(z + torch.arange(4)).T                   # (4, 9)
        for digit, expected in (None, tones), (2, tones[2].view(3, 3)):
            torch.manual_seed(0)
            figure = common.plot_conditional_generation(model, prior, n=9, digit=digit)
            assert_close(torch.tensor(np.asarray(figure.axes[0].images[0].get_array()))[::28, ::28], expected)
    assert figure._repr_png_().startswith(b"\x89PNG")  # so a notebook can show it


def test_digit_draws_that_digit_alone(tiny, monkeypatch):
    shown = {}
    monkeypatch.setattr(common, "save", lambda path, item: shown.update({path.name: item}))
    tiny(cvae, "--digit", 7)
    assert all(shown[f"cvae_{name}.png"].axes[0].get_title().startswith("digit 7") for name in ("generation", "fitted"))


# The README

def test_every_command_in_the_readme_and_the_docstrings_parses():
    scripts = {script.__name__: script for script in MODELS}
    text = "\n".join([README, *(script.__doc__ for script in MODELS)])
    for name, argv in re.findall(rf"python ({'|'.join(scripts)})\.py\b([^\n#`&;|]*)", text):
        scripts[name].options().parse_args(shlex.split(argv))


def test_every_link_in_the_readme_leads_to_a_file_or_to_the_definition_it_names():
    assert all((HERE / path).exists() for path in re.findall(r"\]\(([\w./]+)[#)]", README))
    links = re.findall(r"\[`?(\w+)`?\]\((\w+\.py)#L(\d+)\)", README)
    assert links
    for name, path, number in links:
        line = (HERE / path).read_text(encoding="utf-8").splitlines()[int(number) - 1]
        assert re.match(rf"(def|class) {name}\b", line), f"{path}#L{number} is not {name}"


def test_every_snippet_in_the_readme_runs_and_the_notebook_trains_as_the_script(tmp_path, data_folder, monkeypatch):
    scope, histories = {}, []
    monkeypatch.setattr("torchvision.datasets.FashionMNIST", lambda root, **_: MNIST(data_folder))
    monkeypatch.chdir(tmp_path)
    Path("data").symlink_to(data_folder)
    for script in MODELS:  # leaves the checkpoints that snippets load
        script.main(["--epochs", "1"])
    for snippet in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(snippet, scope)
        histories += [scope["history"]] if "history" in scope else []
    assert histories[0][-1]["loss"] == vae.main(["--epochs", str(len(histories[0]))])["loss"]


def test_every_recipe_in_the_readme_changes_its_script_and_runs(tmp_path, data_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for expression, source, target in re.findall(r"sed '(.+?)' (\w+\.py) > (\w+\.py)", README):
        path = Path(source) if Path(source).exists() else HERE / source  # some recipes go on from an earlier one's
        code = path.read_text(encoding="utf-8")
        changed = subprocess.run(["sed", expression], input=code, capture_output=True, encoding="utf-8").stdout
        assert changed != code, expression
        Path(target).write_text(changed, encoding="utf-8")
        runpy.run_path(target)["main"](["--epochs", "1", "--data", str(data_folder)])
