"""What must hold, in under a minute, without a network and without MNIST: pytest test_smoke.py"""
import ast
import inspect
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
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
SCRIPTS = {"vae": vae, "cvae": cvae, "gumbel_vae": gumbel_vae}
MODELS = {"vae": vae.VAE, "cvae": cvae.CVAE, "gumbel_vae": gumbel_vae.GumbelVAE}
CURVES = {"vae": "loss", "cvae": "loss", "gumbel_vae": "nmi"}
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


def model_and_data(script):
    """(a small model, images (256, 784), what decode takes beside z: nothing, or one-hot labels (256, 10))."""
    torch.manual_seed(0)
    data = blob_data()
    return MODELS[script](h_dim=32, z_dim=5), data.x_train, [common.one_hot(data.y_train)][:script != "vae"]


# The mathematics, against torch.distributions

@every_script
def test_the_losses_are_those_of_torch_distributions_for_any_batch_size(script):
    mu, log_var, logits, x = torch.randn(7, 5), torch.randn(7, 5), 3 * torch.randn(7, 784), torch.rand(7, 784).round()
    kl = D.kl_divergence(D.Normal(mu, torch.exp(log_var / 2)), D.Normal(0.0, 1.0)).sum(1).mean()
    recon = -D.Bernoulli(logits=logits).log_prob(x).sum(1).mean()
    for times in (1, 3):
        mu3, log_var3, logits3, x3 = (tensor.repeat(times, 1) for tensor in (mu, log_var, logits, x))
        torch.testing.assert_close(SCRIPTS[script].gaussian_kl(mu3, log_var3), kl)
        torch.testing.assert_close(SCRIPTS[script].reconstruction(logits3, x3), recon)


def test_reparameterize_samples_the_posterior():
    mu, log_var = torch.tensor([-1.0, 0.0, 3.0]), torch.tensor([-2.0, 0.0, 1.0])
    z = vae.reparameterize(mu.expand(20000, 3), log_var.expand(20000, 3))
    torch.testing.assert_close(z.mean(0), mu, atol=0.06, rtol=0)
    torch.testing.assert_close(z.var(0), log_var.exp(), atol=0, rtol=0.06)


def test_kl_c_is_that_of_torch_distributions_and_splits_into_information_and_the_kl_of_the_aggregate():
    log_p = (3 * torch.randn(50, 6)).log_softmax(1)
    q, uniform = D.Categorical(logits=log_p), D.Categorical(torch.full((6,), 1 / 6))
    aggregate = D.Categorical(q.probs.mean(0))
    torch.testing.assert_close(gumbel_vae.categorical_kl(log_p), D.kl_divergence(q, uniform).mean())
    torch.testing.assert_close(gumbel_vae.categorical_kl(log_p),
                               D.kl_divergence(q, aggregate).mean() + D.kl_divergence(aggregate, uniform))


def test_clustering_is_made_of_the_entropies_and_the_divergence_of_torch_distributions():
    log_p, log_p_warped, opinion = (torch.randn(n, 6).log_softmax(1) for n in (9, 18, 9))
    q, target = D.Categorical(logits=log_p), D.Categorical(logits=log_p + opinion)
    invariance = [D.kl_divergence(target, D.Categorical(logits=warped)).mean() for warped in log_p_warped.split(9)]
    oracle = sum(invariance) / 2 + 0.1 * q.entropy().mean() - 0.5 * D.Categorical(q.probs.mean(0)).entropy()
    torch.testing.assert_close(gumbel_vae.clustering(log_p, log_p_warped, opinion), oracle)


def test_the_second_opinion_is_the_weighted_log_density_of_the_codes_under_each_cluster():
    model, x, _ = model_and_data("gumbel_vae")
    prior, mu = gumbel_vae.fit_prior(model, blob_data(), seed=4), model.encode(x)[0]
    for k, cluster in enumerate(prior.component_distribution.loc):
        mixture = D.MultivariateNormal(cluster[0], prior.component_distribution.covariance_matrix[k, 0])  # of one
        opinion = gumbel_vae.second_opinion(model, blob_data(), weight=0.5, seed=4)[:, k]
        torch.testing.assert_close(opinion, 0.5 * mixture.log_prob(mu), atol=1e-3, rtol=1e-3)


def test_capacity_is_zero_on_target_and_grows_on_both_sides():
    assert [gumbel_vae.capacity(torch.tensor(kl), 3.0, gamma=10.0) for kl in (3.0, 2.5, 3.5)] == [0, 5, 5]


def test_score_matches_clusters_to_labels_one_to_one():
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    assert gumbel_vae.score(labels, (labels + 1) % 3) == {"nmi": 1.0, "acc": 1.0, "clusters_used": 3}
    # The best that one-to-one can do: 5 is digit 1, 4 and 1 cannot both be digit 2, and 3 is digit 0.
    assert gumbel_vae.score(labels, np.array([5, 5, 3, 5, 5, 4, 3, 1]))["acc"] == 4 / 8


def test_warp_with_no_strength_is_the_identity_and_a_shift_goes_where_it_says(monkeypatch):
    x = torch.zeros(2, 28, 28)
    x[:, 10:15, 8:13] = 1
    torch.testing.assert_close(gumbel_vae.warp(x.flatten(1), strength=0), x.flatten(1), atol=1e-4, rtol=0)
    draws = torch.tensor([0, 0, 0, 0, 1.0, 0.5])  # stretch x and y, shear, turn, right, down, as shares of their most
    monkeypatch.setattr(torch, "rand", lambda *_, **__: ((draws + 1) / 2)[:, None].expand(6, 2))
    monkeypatch.setattr(torch, "randn", lambda *size, **_: torch.zeros(size))
    moved = gumbel_vae.warp(x.flatten(1)).view(2, 28, 28)
    torch.testing.assert_close(moved, x.roll((1, 2), (1, 2)), atol=1e-4, rtol=0)  # one pixel down, two to the right


@pytest.mark.parametrize("script, beta", [("vae", 0.5), ("cvae", 7.0)])
def test_a_step_takes_the_gradient_of_reconstruction_plus_beta_kl(script, beta):
    model, x, labels = model_and_data(script)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(1)
    SCRIPTS[script].train(model, blob_data(), epochs=1, batch_size=256, beta=beta)  # one step, whose gradient remains
    taken = [parameter.grad.clone() for parameter in model.parameters()]
    model.load_state_dict(before)
    torch.manual_seed(1)
    order = torch.randperm(256)
    mu, log_var = model.encode(x[order])
    logits = model.decode(vae.reparameterize(mu, log_var), *(y[order] for y in labels))
    loss = vae.reconstruction(logits, x[order]) + beta * vae.gaussian_kl(mu, log_var)
    for gradient, expected in zip(taken, torch.autograd.grad(loss, model.parameters())):
        torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("objective", ["elbo", "capacity", "mi"])
def test_the_decoder_teaches_c_unless_the_objective_is_mi(objective, monkeypatch):
    monkeypatch.setattr(gumbel_vae, "categorical_kl", lambda log_p: torch.zeros(()))  # what is left of a gradient into
    monkeypatch.setattr(gumbel_vae, "clustering", lambda *_: torch.zeros(()))         # c comes from the decoder
    model, *_ = model_and_data("gumbel_vae")
    gumbel_vae.train(model, blob_data(), epochs=1, objective=objective)
    for name, parameter in model.named_parameters():
        taught = parameter.grad is not None and parameter.grad.abs().sum() > 0
        assert taught == ("cluster" not in name or objective != "mi"), name


@every_script
def test_evaluate_agrees_with_the_same_sums_by_hand(script):
    data = blob_data(n_test=1234)  # chunks of 500, 500 and 234
    model, *_ = model_and_data(script)
    prior = SCRIPTS[script].fit_prior(model, data)
    results = SCRIPTS[script].evaluate(model, data, prior, seed=3)
    rows = []                                                          # (B, 4): reconstruction, KL, fitted KL, KL(c)
    torch.manual_seed(3)
    for x, y in zip(data.x_test.split(500), data.y_test.split(500)):
        mu, log_var, *log_p = model.encode(x)
        q, kl_c = D.Normal(mu, torch.exp(log_var / 2)), torch.zeros(len(x))
        z = q.mean + q.stddev * torch.randn_like(mu)
        if script == "gumbel_vae":
            y = (log_p[0] - torch.empty_like(log_p[0]).exponential_().log()).argmax(1)  # the Gumbel-max trick
            kl_c = D.kl_divergence(D.Categorical(logits=log_p[0]), D.Categorical(torch.ones(10)))
        logits = model.decode(z, *[F.one_hot(y, 10).float()][:script != "vae"])
        log_prior = prior.log_prob(z[:, None])[range(len(x)), 0 if script == "vae" else y]
        rows.append(torch.stack([-D.Bernoulli(logits=logits, validate_args=False).log_prob(x).sum(1),
                                 D.kl_divergence(q, D.Normal(0.0, 1.0)).sum(1),
                                 q.log_prob(z).sum(1) - log_prior, kl_c], 1))
    recon, kl, kl_fitted, kl_c = torch.cat(rows).mean(0).tolist()
    expected = {"recon": recon, "kl": kl, "loss": recon + kl + kl_c, "loss_fitted": recon + kl_fitted + kl_c}
    assert {name: results[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_the_fitted_prior_finds_a_known_mixture():
    truth = vae.mixture(torch.tensor([[0.2, 0.3, 0.5]]), torch.tensor([[[-4.0, 0.0], [0.0, 5.0], [4.0, 0.0]]]),
                        torch.tensor([1.0, 2.0, 0.5])[None, :, None, None] * torch.eye(2))
    torch.manual_seed(0)
    z, held_out = truth.sample((20000,))[:, 0], truth.sample((5000,))[:, 0]
    model = nn.Module()  # whose "images" are the codes already, with a posterior of next to no width
    model.n_classes, model.encode = 2, lambda x: (x, torch.full_like(x, -30.0))
    data = common.Data(z, (z[:, 0] > 2).long(), None, None, "codes")
    fitted = vae.fit_prior(model, data, n_components=3)
    assert fitted.log_prob(held_out).mean() == pytest.approx(truth.log_prob(held_out).mean().item(), abs=0.01)
    by_class = cvae.fit_prior(model, data, n_components=1)
    for k in range(2):
        torch.testing.assert_close(by_class.mean[k], z[data.y_train == k].mean(0), atol=0.01, rtol=0)
    few = data._replace(x_train=z[:30], y_train=data.y_train[:30])     # too few to tell the classes apart
    torch.testing.assert_close(cvae.fit_prior(model, few).mean, z[:30].mean(0).expand(2, 2), atol=1e-4, rtol=0)


# What the scripts share, and how they come apart

def test_shared_blocks_are_the_same_to_the_letter():
    source = inspect.getsource
    for name in ("reparameterize", "reconstruction", "gaussian_kl", "sampled_kl", "mixture"):
        assert len({source(getattr(module, name)) for module in SCRIPTS.values()}) == 1, name
    assert source(vae.VAE.encode) == source(cvae.CVAE.encode)
    options = {script: set(source(module.options).splitlines()) for script, module in SCRIPTS.items()}
    assert len(options["vae"] - options["cvae"]) == 2 and len(options["vae"] - options["gumbel_vae"]) == 3
    names = [[node.name for node in ast.parse(source(module)).body if hasattr(node, "name")][1:]
             for module in SCRIPTS.values()]
    assert names[0] == names[1] == [name for name in names[2] if name in names[0]]


@every_script
def test_train_has_the_defaults_of_the_command_line(script):
    defaults = vars(SCRIPTS[script].options().parse_args([]))
    for name, parameter in list(inspect.signature(SCRIPTS[script].train).parameters.items())[2:]:
        assert parameter.default == defaults[name], name


def test_importing_does_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import vae, cvae, gumbel_vae, common"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr, list(tmp_path.iterdir())) == (0, "", "", [])


def test_the_labels_belong_to_their_images():
    torch.manual_seed(0)
    model, data = cvae.CVAE(h_dim=50), blob_data()
    cvae.train(model, data, epochs=20, batch_size=32)
    probs = torch.sigmoid(model.decode(torch.zeros(10, 20), torch.eye(10))).view(10, 28, 28)
    for digit in range(10):
        assert probs[digit, 2 * digit + 4:2 * digit + 8, 4:24].mean() > 3 * probs[digit].mean()


def test_one_hot():
    assert common.one_hot(torch.tensor([2, 0]), 3).tolist() == [[0, 0, 1], [1, 0, 0]]
    for wrong in ([0, 3], [-1, 0]):
        with pytest.raises(ValueError, match="the labels go from"):
            common.one_hot(torch.tensor(wrong), 3)


@every_script
def test_everything_stays_on_the_device(script):
    with torch.device("meta"):  # whose tensors hold no numbers but refuse those of other devices: no GPU is needed
        model, x, one_hot = MODELS[script](), torch.rand(16, 784), torch.rand(16, 10)
    mu, log_var, *log_p = model.encode(x)
    z = SCRIPTS[script].reparameterize(mu, log_var)
    losses = [SCRIPTS[script].reconstruction(model.decode(z, *[one_hot][:script != "vae"]), x),
              SCRIPTS[script].gaussian_kl(mu, log_var)]
    if script == "gumbel_vae":
        losses += [gumbel_vae.clustering(log_p[0], model.cluster(gumbel_vae.warp(x)), one_hot),
                   gumbel_vae.categorical_kl(log_p[0])]
    assert {loss.device.type for loss in losses} == {"meta"}


@every_script
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_losses_of_the_cpu(script, tiny):
    on_cpu, on_cuda = (tiny(script, "--device", device, "--epochs", 20) for device in ("cpu", "cuda"))
    assert on_cuda["loss"] == pytest.approx(on_cpu["loss"], rel=0.05)


# The data

def test_without_mnist_or_network_the_embedded_digits_serve_and_say_so(tmp_path, monkeypatch, capsys):
    def refuse(url, **_):
        raise URLError("no network in this test")
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    data = common.load_mnist(tmp_path)
    assert "WARNING" in capsys.readouterr().out and "NOT MNIST" in data.source
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
    raw = tmp_path / "MNIST" / "raw"
    shutil.copytree(data_folder / "MNIST" / "raw", raw)
    victim = raw / "train-images-idx3-ubyte"
    victim.write_bytes(victim.read_bytes()[:1000] if damaged is None else damaged)
    with pytest.raises(ValueError, match="MNIST/raw are damaged.*delete"):
        common.load_mnist(tmp_path)


# The scripts, through their own command line

@every_script
def test_a_run_reports_and_leaves_its_files_and_load_redraws_them(script, tiny, tmp_path, capsys):
    results = tiny(script, "--z-dim", 3, "--seed", 5)
    out = capsys.readouterr().out.splitlines()
    assert set(files(tmp_path)) == {f"{script}.pt", *(f"{script}_{name}.png" for name in (
        "reconstruction", "generation", "fitted", CURVES[script]))}
    assert all(map(math.isfinite, results.values())) and results["train_seconds"] > 0
    assert results["loss"] == pytest.approx(results["recon"] + results["kl"] + results.get("kl_c", 0))
    assert len({len(line) for line in out[2:5]}) == 1 and len(out[2]) <= 80 and out[4].startswith("    2 ")
    assert out[-2].startswith("test recon ") and out[-1].startswith("wrote ")
    checkpoint = torch.load(tmp_path / f"{script}.pt", weights_only=True)
    assert checkpoint["args"]["z_dim"] == 3 and checkpoint["args"].get("n_classes", 10) == 10
    drawn = files(tmp_path, "png")
    assert tiny(script, "--load", tmp_path / f"{script}.pt", "--seed", 5, out=tmp_path / "again") == results
    assert files(tmp_path / "again") == drawn


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
def test_no_step_waits_for_the_device(script, tiny):
    class Spy(TorchDispatchMode):
        waits = 0

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            self.waits += operation is torch.ops.aten._local_scalar_dense.default  # .item(), float(...), if tensor:
            return operation(*args, **(kwargs or {}))
    seen = []
    for batch_size in 64, 16:
        with Spy() as spy:
            tiny(script, "--batch-size", batch_size)
        seen.append(spy.waits)
    assert seen[0] == seen[1] > 0  # some in each epoch, none in each step


@pytest.mark.parametrize("objective", ["elbo", "capacity", "mi"])
def test_every_objective_trains_and_odd_sizes_are_legal(objective, tiny):
    odd = ["--objective", objective, "--n-classes", 30 if objective == "mi" else 2, "--z-dim", 1, "--epochs", 1]
    assert math.isfinite(tiny("gumbel_vae", *odd, "--batch-size", 255)["loss"])  # the last batch is one image


def test_digit_draws_that_digit_alone_from_a_checkpoint(tiny, tmp_path, monkeypatch):
    tiny("cvae")
    shown = {}
    monkeypatch.setattr(common, "save", lambda path, item: shown.update({path.name: item}))
    tiny("cvae", "--load", tmp_path / "cvae.pt", "--digit", 7, "--seed", 3)
    model, checkpoint = common.load_checkpoint(tmp_path / "cvae.pt", cvae.CVAE)
    torch.manual_seed(3)
    torch.randn(40, 20)  # spent on the reconstructions
    for name, z in (("generation", torch.randn(64, 20)),
                    ("fitted", cvae.mixture(**checkpoint["prior"]).sample((64,))[:, 7])):
        probs = torch.sigmoid(model.decode(z, common.one_hot(torch.full((64,), 7)))).view(8, 8, 28, 28)
        picture = torch.tensor(np.asarray(shown[f"cvae_{name}.png"].axes[0].images[0].get_array()))
        torch.testing.assert_close(picture, probs.detach().transpose(1, 2).reshape(224, 224))


def test_two_dimensions_are_drawn_as_a_plane(tiny, tmp_path):
    tiny("vae", "--z-dim", 2)
    assert (tmp_path / "vae_manifold.png").exists()


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


@pytest.mark.parametrize("fault, says", [
    *(("--" + option, option.split()[0]) for option in ("epochs 0", "batch-size 2.5", "lr nan", "beta inf", "wrong 1")),
    ("--out FILE", "FILE: File exists"), ("--data FILE", "FILE"),
    ("--load FILE", "FILE is not a complete VAE checkpoint"),
    ("--load missing.pt", "missing.pt: No such file"), ("--load cvae.pt", "not a complete VAE checkpoint"),
    ("--load SIZES", "SIZES is not a complete VAE checkpoint"), ("--lr 1000", "diverged")])
def test_faults_end_in_an_error_that_names_them_and_leave_all_files(fault, says, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny("vae")
    tiny("cvae")
    Path("FILE").write_bytes(b"not what it should be")
    torch.save({**torch.load("vae.pt", weights_only=True), "args": {"z_dim": 7, "h_dim": 50}}, "SIZES")
    before = files(tmp_path)
    with pytest.raises(SystemExit) as stop:
        common.run(lambda: tiny("vae", *fault.split()))
    message = str(stop.value.code) if stop.value.code != 2 else capsys.readouterr().err.splitlines()[-1]  # argparse's
    assert says in message and "\n" not in message
    assert files(tmp_path) == before


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


# The README

README = (HERE / "README.md").read_text()


def test_every_command_in_the_readme_and_the_docstrings_parses():
    text = "\n".join([README, *(module.__doc__ for module in SCRIPTS.values())])
    commands = re.findall(r"python (vae|cvae|gumbel_vae)\.py\b([^\n#`&;|]*)", text)
    assert {script for script, _ in commands} == set(SCRIPTS)
    for script, argv in commands:
        SCRIPTS[script].options().parse_args(shlex.split(argv))


def test_every_snippet_in_the_readme_runs_and_the_notebook_trains_as_the_script_does(tmp_path, data_folder, monkeypatch):
    load_mnist, scope, losses = common.load_mnist, {}, []
    monkeypatch.setattr(common, "load_mnist", lambda root="", device="cpu": load_mnist(data_folder, device))
    monkeypatch.setattr("torchvision.datasets.FashionMNIST", lambda root, **kw: torchvision.datasets.MNIST(data_folder))
    monkeypatch.chdir(tmp_path)
    cvae.main(["--epochs", "1", "--data", str(data_folder)])  # leaves the checkpoint that a snippet loads
    for snippet in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(snippet, scope)
        losses += [scope["history"][-1]["loss"]] if "history" in scope else []
    by_script = vae.main(["--data", str(data_folder), "--epochs", "3"])
    assert losses[0] == by_script["loss"]
