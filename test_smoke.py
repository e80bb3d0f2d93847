"""What must hold, in under a minute, without a network and without MNIST: pytest test_smoke.py"""
import ast
import gzip
import hashlib
import http.server
import inspect
import itertools
import math
import re
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributions as D
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.datasets import MNIST

import common
import cvae
import gumbel_vae
import vae

HERE = Path(__file__).parent
SCRIPTS = {"vae": vae, "cvae": cvae, "gumbel_vae": gumbel_vae}
PICTURES = {"vae": {"reconstruction", "generation", "loss"}, "cvae": {"reconstruction", "generation", "loss"},
            "gumbel_vae": {"reconstruction", "generation", "nmi"}}
every_script = pytest.mark.parametrize("script", SCRIPTS)


def idx(array):
    """The bytes of an idx file."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.astype(np.uint8).tobytes()


def made_up_files():
    """Four files in MNIST's format: 256 and 64 images with a blob whose place is the label, and noise."""
    rng, files = np.random.default_rng(0), {}
    for part, n in (("train", 256), ("t10k", 64)):
        labels = np.arange(n) % 10
        images = rng.integers(0, 40, (n, 28, 28))
        for image, label in zip(images, labels):
            image[2 * label:2 * label + 8, 8:20] = 220
        files[f"{part}-images-idx3-ubyte"], files[f"{part}-labels-idx1-ubyte"] = idx(images), idx(labels)
    return files


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """A --data folder with the made-up files unpacked, as torchvision leaves them."""
    raw = tmp_path_factory.mktemp("data") / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in made_up_files().items():
        (raw / name).write_bytes(content)
    return raw.parent.parent


@pytest.fixture
def tiny(data_folder, tmp_path):
    """Runs a script's main on the made-up images for two short epochs, with pictures in tmp_path."""
    def run(script, *argv, out=tmp_path):
        short = [] if "--load" in argv else ["--epochs", "2", "--batch-size", "64"]
        return SCRIPTS[script].main(["--data", str(data_folder), "--out", str(out), *short, *argv])
    return run


def pictures(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


@pytest.fixture
def no_network(monkeypatch):
    def refuse(url, **_):
        raise OSError("no network in this test")
    monkeypatch.setattr("urllib.request.urlopen", refuse)


def batch_for(script, n=16):
    """(model, its inputs): random binary images, and labels where the model wants them."""
    torch.manual_seed(0)
    x = (torch.rand(n, 784) < 0.3).float()
    model = {"vae": vae.VAE, "cvae": cvae.CVAE, "gumbel_vae": gumbel_vae.GumbelVAE}[script](h_dim=32, z_dim=5)
    return model, (x, common.one_hot(torch.arange(n) % 10)) if script == "cvae" else (x,)


# The mathematics, against torch.distributions

@every_script
def test_gaussian_kl_is_that_of_torch_distributions(script):
    mu, log_var = torch.randn(7, 5), torch.randn(7, 5)
    oracle = D.kl_divergence(D.Normal(mu, torch.exp(log_var / 2)), D.Normal(0.0, 1.0)).sum(1).mean()
    torch.testing.assert_close(SCRIPTS[script].gaussian_kl(mu, log_var), oracle)


@every_script
def test_reconstruction_is_the_bernoulli_log_likelihood(script):
    logits, x = 3 * torch.randn(7, 784), (torch.rand(7, 784) < 0.5).float()
    oracle = -D.Bernoulli(logits=logits).log_prob(x).sum(1).mean()
    torch.testing.assert_close(SCRIPTS[script].reconstruction(logits, x), oracle)


def test_categorical_kl_is_that_of_torch_distributions():
    log_p = torch.randn(7, 6).log_softmax(1)
    oracle = D.kl_divergence(D.Categorical(logits=log_p), D.Categorical(torch.full((7, 6), 1 / 6))).mean()
    torch.testing.assert_close(gumbel_vae.categorical_kl(log_p), oracle)
    torch.testing.assert_close(gumbel_vae.categorical_kl(torch.eye(6).log().clamp(min=-1e4)), torch.tensor(math.log(6)))


def test_clustering_is_made_of_the_entropies_and_the_divergence_of_torch_distributions():
    log_p, log_p_warped = torch.randn(9, 6).log_softmax(1), torch.randn(9, 6).log_softmax(1)
    q, q_warped = D.Categorical(logits=log_p), D.Categorical(logits=log_p_warped)
    aggregate = D.Categorical(probs=log_p.exp().mean(0))
    oracle = D.kl_divergence(q, q_warped).mean() + 0.1 * q.entropy().mean() - 0.5 * aggregate.entropy()
    torch.testing.assert_close(gumbel_vae.clustering(log_p, log_p_warped), oracle)


def test_kl_c_is_mutual_information_plus_the_aggregates_kl():
    log_p = (3 * torch.randn(50, 6)).log_softmax(1)
    aggregate = log_p.exp().mean(0)
    information = (log_p.exp() * (log_p - aggregate.log())).sum(1).mean()
    to_prior = D.kl_divergence(D.Categorical(aggregate), D.Categorical(torch.full((6,), 1 / 6)))
    torch.testing.assert_close(gumbel_vae.categorical_kl(log_p), information + to_prior)


def test_capacity_is_zero_on_target_and_grows_on_both_sides():
    assert gumbel_vae.capacity(torch.tensor(3.0), 3.0) == 0
    assert gumbel_vae.capacity(torch.tensor(2.5), 3.0, gamma=10.0) == 5
    assert gumbel_vae.capacity(torch.tensor(3.5), 3.0, gamma=10.0) == 5


def test_score_matches_clusters_to_labels_one_to_one():
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    assert gumbel_vae.score(labels, (labels + 1) % 3) == {"nmi": 1.0, "acc": 1.0, "clusters_used": 3}
    clusters = np.array([5, 5, 3, 5, 5, 4, 3, 1])
    best = max(sum(dict(zip(order, range(4)))[c] == y for c, y in zip(clusters, labels))
               for order in itertools.permutations((1, 3, 4, 5)))
    assert gumbel_vae.score(labels, clusters)["acc"] == best / 8


@every_script
def test_losses_do_not_depend_on_the_batch_size(script):
    for loss, size in ((SCRIPTS[script].reconstruction, 784), (SCRIPTS[script].gaussian_kl, 5)):
        a, b = torch.rand(8, size), torch.rand(8, size)
        torch.testing.assert_close(loss(a.repeat(3, 1), b.repeat(3, 1)), loss(a, b))


@every_script
def test_reparameterize_samples_the_posterior(script):
    model, _ = batch_for(script)
    mu, log_var = torch.tensor([[-1.0, 0.0, 3.0]]), torch.tensor([[-2.0, 0.0, 1.0]])
    z = model.reparameterize(mu.expand(20000, 3), log_var.expand(20000, 3))
    torch.testing.assert_close(z.mean(0), mu[0], atol=0.06, rtol=0)
    torch.testing.assert_close(z.var(0), log_var[0].exp(), atol=0, rtol=0.06)


@every_script
def test_shapes_and_gradients_reach_every_parameter(script):
    model, inputs = batch_for(script)
    logits, mu, log_var, *log_p = model(*inputs)
    assert logits.shape == (16, 784) and mu.shape == log_var.shape == (16, 5)
    assert not log_p or log_p[0].exp().sum(1).allclose(torch.ones(16))
    (SCRIPTS[script].reconstruction(logits, inputs[0]) + SCRIPTS[script].gaussian_kl(mu, log_var)).backward()
    for name, parameter in model.named_parameters():  # log_p's parameters: through the Gumbel sample alone
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_the_gumbel_sample_is_one_hot_and_drawn_from_its_distribution():
    model, _ = batch_for("gumbel_vae")
    seen = []
    model.decode = lambda z, c: seen.append(c)
    x = torch.rand(1, 784).expand(5000, 784)
    *_, log_p = model(x)
    assert set(seen[0].unique().tolist()) == {0.0, 1.0} and (seen[0].sum(1) == 1).all()
    torch.testing.assert_close(seen[0].mean(0), log_p[0].exp(), atol=0.03, rtol=0)


# What the scripts share

def test_shared_blocks_are_the_same_to_the_letter():
    source = inspect.getsource
    for a, b in ((vae, cvae), (cvae, gumbel_vae)):
        assert source(a.reconstruction) == source(b.reconstruction)
        assert source(a.gaussian_kl) == source(b.gaussian_kl)
    models = vae.VAE, cvae.CVAE, gumbel_vae.GumbelVAE
    assert len({source(model.reparameterize) for model in models}) == 1
    assert source(vae.VAE.encode) == source(cvae.CVAE.encode)
    mains = {re.sub(r"model = .*", "model = ...", source(module.main)) for module in SCRIPTS.values()}
    assert len(mains) == 1
    names = [[node.name for node in ast.parse(source(module)).body if hasattr(node, "name")] for module in (vae, cvae)]
    assert names[0][1:] == names[1][1:]


def test_importing_does_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import vae, cvae, gumbel_vae, common"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr, list(tmp_path.iterdir())) == (0, "", "", [])


def test_one_hot():
    assert common.one_hot(torch.tensor([2, 0]), 3).tolist() == [[0, 0, 1], [1, 0, 0]]
    for wrong in ([0, 3], [-1, 0]):
        with pytest.raises(ValueError, match="out of|go from"):
            common.one_hot(torch.tensor(wrong), 3)


@pytest.mark.parametrize("n", [1, 3, 8])
def test_conditional_generation_has_a_row_a_class_and_the_same_z_down_a_column(n):
    class Stub(torch.nn.Linear):
        z_dim, n_classes = 2, 4

        def decode(self, z, y):
            calls.append((z, y))
            return torch.zeros(len(z), 784)
    calls = []
    figure = common.plot_conditional_generation(Stub(1, 1), n=n)
    assert len(calls) == 4 and all(torch.equal(z, calls[0][0]) for z, _ in calls) and calls[0][0].shape == (n, 2)
    assert [y.argmax(1).tolist() for _, y in calls] == [[k] * n for k in range(4)]
    assert figure.axes[0].images[0].get_array().shape == (4 * 28, n * 28)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [f"digit {k}" for k in range(4)]
    calls.clear()
    common.plot_conditional_generation(Stub(1, 1), n=n, fix_number=3)
    assert len(calls) == 1 and (calls[0][1].argmax(1) == 3).all() and len(calls[0][0]) == n


# The data

def test_without_mnist_or_network_the_embedded_digits_serve_and_say_so(tmp_path, no_network, capsys):
    data = common.load_mnist(tmp_path)
    assert "WARNING" in capsys.readouterr().out and "NOT MNIST" in data.source
    for x, y in ((data.x_train, data.y_train), (data.x_test, data.y_test)):
        assert x.shape == (len(y), 784) and 0 <= x.min() and 0.9 < x.max() <= 1
        assert y.unique().tolist() == list(range(10))
    images = data.x_train[:1498].view(-1, 28, 28)
    at = torch.arange(28) - 13.5
    mass = images.sum((1, 2))
    assert ((images.sum(1) @ at) / mass).abs().max() < 1 and ((images.sum(2) @ at) / mass).abs().max() < 1  # centred
    assert images[:, 3:-3, 3:-3].sum() > 0.99 * images.sum() and len(data.x_train) == 14980  # with a margin
    seen, held_out = (set(map(bytes, x.numpy())) for x in (data.x_train, data.x_test))
    assert not seen & held_out


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A mirror on loopback with the made-up archives, the only one that torchvision lists; yields its folder."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    resources = []
    for name, content in made_up_files().items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
        resources.append((f"{name}.gz", hashlib.md5((folder / f"{name}.gz").read_bytes()).hexdigest()))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=folder)

        def log_message(self, *_):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(MNIST, "resources", resources)
    monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    monkeypatch.setattr(common, "GOOGLE_MIRROR", "http://127.0.0.1:9/")  # nobody answers there
    yield folder
    server.shutdown()


def test_download_checks_and_keeps_the_archives(tmp_path, mirror):
    raw = tmp_path / "data" / "MNIST" / "raw"
    data = common.load_mnist(tmp_path / "data")
    assert data.source == "MNIST" and data.x_train.shape == (256, 784) and data.x_train.max() == 220 / 255
    assert data.y_test.tolist() == [i % 10 for i in range(64)]
    assert sorted(path.name for path in raw.iterdir()) == sorted(name for name, _ in MNIST.resources)
    (raw / MNIST.resources[0][0]).write_bytes(b"half an arch")  # as an interrupted download would leave it
    for path in list(mirror.iterdir()):
        if path.name != MNIST.resources[0][0]:
            path.unlink()  # and what is whole is not fetched again
    torch.testing.assert_close(common.load_mnist(tmp_path / "data").x_train, data.x_train)


def test_a_mirror_with_wrong_files_is_not_believed(tmp_path, mirror, monkeypatch):
    (mirror / MNIST.resources[0][0]).write_bytes(gzip.compress(b"something else"))
    assert "NOT MNIST" in common.load_mnist(tmp_path / "data").source


def test_files_of_ones_own_are_used_kept_and_never_mixed(tmp_path, mirror):
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in made_up_files().items():
        (raw / f"{name}.gz").write_bytes(gzip.compress(content, mtime=1))  # whole, but another md5 sum
    kept = {path.name: path.read_bytes() for path in raw.iterdir()}
    assert common.load_mnist(tmp_path / "data").source == "files of your own"
    assert {path.name: path.read_bytes() for path in raw.iterdir()} == kept
    (raw / "train-labels-idx1-ubyte.gz").unlink()
    for _ in range(2):  # also once MNIST's own file has come from the mirror
        with pytest.raises(SystemExit, match="mixes files of your own with MNIST"):
            common.load_mnist(tmp_path / "data")


@pytest.mark.parametrize("damage", [lambda content: content[:100], lambda content: b"", lambda content: b"noise" * 100])
def test_damaged_files_are_mended_from_the_archive_or_refused(tmp_path, mirror, no_network, damage):
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in made_up_files().items():
        (raw / name).write_bytes(content)
    whole = common.load_mnist(tmp_path / "data")
    victim = raw / "train-images-idx3-ubyte"
    victim.write_bytes(damage(victim.read_bytes()))
    with pytest.raises(SystemExit, match=f"{victim.name} is damaged.*delete"):
        common.load_mnist(tmp_path / "data")
    archive = raw / f"{victim.name}.gz"
    archive.write_bytes((mirror / archive.name).read_bytes())
    torch.testing.assert_close(common.load_mnist(tmp_path / "data").x_train, whole.x_train)


# The scripts, through their own command line

@every_script
def test_a_run_reports_and_leaves_its_files(script, tiny, tmp_path, capsys):
    results = tiny(script)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"{script}.pt"} | {f"{script}_{name}.png" for name in PICTURES[script]}
    assert all(math.isfinite(value) for value in results.values()) and results["train_seconds"] > 0
    assert results["loss"] == pytest.approx(results["recon"] + results["kl"] + results.get("kl_c", 0))
    if script == "gumbel_vae":
        assert 0 <= results["nmi"] <= 1 and 0 < results["acc"] <= 1 and 1 <= results["clusters_used"] <= 10
    out = capsys.readouterr().out
    assert "\r" not in out and "\x1b" not in out
    table = out.splitlines()[2:5]
    assert len({len(line) for line in table}) == 1 and len(table[0]) <= 80 and table[2].startswith("    2 ")
    checkpoint = torch.load(tmp_path / f"{script}.pt", weights_only=True)
    assert checkpoint["args"]["z_dim"] == 20
    assert checkpoint["args"].get("n_classes") == (None if script == "vae" else 10)


@every_script
def test_load_redraws_the_same_pictures_and_figures(script, tiny, tmp_path):
    trained = tiny(script, "--z-dim", "3", "--seed", "5")
    loaded = tiny(script, "--load", str(tmp_path / f"{script}.pt"), out=tmp_path / "again")
    assert loaded == trained and pictures(tmp_path) == pictures(tmp_path / "again")
    with pytest.raises(SystemExit) as stop:
        tiny(script, "--load", str(tmp_path / f"{script}.pt"), "--z-dim", "4")
    assert stop.value.code == 2


@every_script
def test_same_seed_same_bytes_and_evaluating_does_not_disturb(script, tiny, tmp_path, monkeypatch):
    module = SCRIPTS[script]
    first = tiny(script, out=tmp_path / "a")
    evaluate = module.evaluate

    monkeypatch.setattr(module, "evaluate", lambda *args: evaluate(*args) and evaluate(*args))  # twice as often
    second = tiny(script, out=tmp_path / "b")
    assert {**first, "train_seconds": 0} == {**second, "train_seconds": 0}
    assert pictures(tmp_path / "a") == pictures(tmp_path / "b")
    assert tiny(script, "--seed", "1", out=tmp_path / "c")["loss"] != first["loss"]


@every_script
def test_no_step_waits_for_the_device(script, tiny):
    class Spy(TorchDispatchMode):
        waits = 0

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            self.waits += operation is torch.ops.aten._local_scalar_dense.default  # .item(), float(...), if tensor:
            return operation(*args, **(kwargs or {}))
    seen = []
    for batch_size in "64", "16":
        with Spy() as spy:
            tiny(script, "--batch-size", batch_size)
        seen.append(spy.waits)
    assert seen[0] == seen[1] > 0  # some an epoch, none a step


@every_script
def test_a_few_dozen_steps_on_one_batch_lower_the_loss(script, tiny, monkeypatch):
    rows = []
    log_epoch = common.log_epoch
    monkeypatch.setattr(common, "log_epoch", lambda *given: (rows.append(given[1]), log_epoch(*given)))
    tiny(script, "--batch-size", "1000", "--epochs", "40", "--beta", "1")
    assert rows[-1]["train"] < 0.85 * rows[0]["train"] and rows[-1]["recon"] < 0.85 * rows[0]["recon"]


@pytest.mark.parametrize("objective", ["elbo", "capacity", "mi"])
def test_every_objective_trains_and_odd_sizes_are_legal(objective, tiny):
    odd = ["--objective", objective, "--n-classes", "30" if objective == "mi" else "2", "--z-dim", "1", "--epochs", "1"]
    assert math.isfinite(tiny("gumbel_vae", *odd, "--batch-size", "255")["loss"])  # the last batch is one image


def test_digit_draws_that_digit_alone_also_from_a_checkpoint(tiny, tmp_path):
    tiny("cvae")
    grid = (tmp_path / "cvae_generation.png").read_bytes()
    tiny("cvae", "--load", str(tmp_path / "cvae.pt"), "--digit", "7")
    assert (tmp_path / "cvae_generation.png").read_bytes() != grid


REFUSED = [(script, flag, value) for script in SCRIPTS for flag, values in {
    "--epochs": ["0", "-1", "1.5", "many", "nan"], "--batch-size": ["0", "-8", "2.5"], "--z-dim": ["0", "-2", "x"],
    "--lr": ["0", "-1", "nan", "inf"], "--beta": ["-1", "nan", "inf"], "--seed": ["-1", "0.5"], "--device": ["gpu"],
    "--wrong": ["1"]}.items() for value in values] + [
    ("cvae", "--digit", "10"), ("cvae", "--digit", "-1"),
    ("gumbel_vae", "--n-classes", "1"), ("gumbel_vae", "--tau", "0"),
    ("gumbel_vae", "--n-classes", "2.5"), ("gumbel_vae", "--tau", "nan"), ("gumbel_vae", "--objective", "best")]


@pytest.mark.parametrize("script, flag, value", REFUSED)
def test_bad_options_are_refused_in_one_line_before_any_work(script, flag, value, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[script].main([flag, value])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and flag in error and value in error
    assert not list(tmp_path.iterdir())


def test_cuda_is_refused_where_there_is_none(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        vae.main(["--device", "cuda", "--out", str(tmp_path)])
    assert stop.value.code == 2 and "--device" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["--out", "--data"])
def test_a_file_in_place_of_a_folder_is_refused_before_training(place, tmp_path, data_folder, no_network):
    (tmp_path / "file").write_text("not a folder")
    argv = {"--out": str(tmp_path / "out"), "--data": str(data_folder), place: str(tmp_path / "file")}
    with pytest.raises(SystemExit, match="cannot .*file.*folder|cannot write to --out") as stop:
        vae.main([word for pair in argv.items() for word in pair])
    assert "\n" not in stop.value.code


@pytest.mark.parametrize("content", [None, b"", b"PK", b"not a checkpoint at all", "truncated", "foreign", "sizes"])
def test_load_refuses_what_it_did_not_save(content, tiny, tmp_path):
    path = tmp_path / "file.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        tiny("cvae" if content == "foreign" else "vae")
        whole = tmp_path / ("cvae.pt" if content == "foreign" else "vae.pt")
        path.write_bytes(whole.read_bytes()[:50000] if content == "truncated" else whole.read_bytes())
        if content == "sizes":
            checkpoint = torch.load(path, weights_only=True)
            checkpoint["args"]["z_dim"] = 3
            torch.save(checkpoint, path)
    with pytest.raises(SystemExit) as stop:
        tiny("vae", "--load", str(path))
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code and "cannot" in stop.value.code


@every_script
def test_divergence_stops_at_once_and_touches_nothing(script, tiny, tmp_path):
    tiny(script)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit, match="diverged in epoch 1: .*--lr") as stop:
        tiny(script, "--lr", "1e30")
    assert "\n" not in stop.value.code and {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@every_script
def test_ctrl_c_ends_the_training_and_saves_it(script, tiny, tmp_path, monkeypatch, capsys):
    log_epoch = common.log_epoch

    def interrupt_in_epoch_two(history, row, args):
        if history:
            raise KeyboardInterrupt
        log_epoch(history, row, args)
    monkeypatch.setattr(common, "log_epoch", interrupt_in_epoch_two)
    assert math.isfinite(tiny(script, "--epochs", "5")["loss"])
    assert "interrupted in epoch 2" in capsys.readouterr().out
    assert len(torch.load(tmp_path / f"{script}.pt", weights_only=True)["history"]) == 1
    before = pictures(tmp_path)

    def interrupt(*_):
        raise KeyboardInterrupt
    for place in ("log_epoch", "load_mnist"):  # before the first epoch ends: saved all the same; before it starts: 130
        monkeypatch.setattr(common, place, interrupt)
        if place == "log_epoch":
            assert math.isfinite(tiny(script)["loss"]) and pictures(tmp_path) != before
    with pytest.raises(SystemExit) as stop:
        common.run(lambda: tiny(script))
    assert stop.value.code == 130


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "picture.png").write_bytes(b"old")

    def full_disk(self, content):
        self.touch()
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(SystemExit, match="cannot write .*picture.png: No space left on device"):
        common.write_whole(tmp_path / "picture.png", b"new")
    assert list(tmp_path.iterdir()) == [tmp_path / "picture.png"]
    assert (tmp_path / "picture.png").read_bytes() == b"old"


def test_as_a_user_types_it(tmp_path, data_folder):
    def run(line):
        return subprocess.run([sys.executable, *shlex.split(line)], cwd=HERE, capture_output=True, text=True)
    done = run(f"gumbel_vae.py --epochs 1 --data {data_folder} --out {tmp_path}")
    assert done.returncode == 0 and done.stderr == "" and (tmp_path / "gumbel_vae_nmi.png").exists()
    done = run("cvae.py --epochs 0")
    assert done.returncode == 2 and done.stderr.count("\n") == 1


def test_the_readme_points_to_the_lines_it_names():
    places = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", (HERE / "README.md").read_text())
    assert len(places) > 5
    for name, file, line in places:
        assert f"def {name}(" in (HERE / file).read_text().splitlines()[int(line) - 1], (name, file, line)


def test_every_command_in_the_readme_and_the_docstrings_parses():
    text = "\n".join([(HERE / "README.md").read_text(), *(module.__doc__ for module in SCRIPTS.values())])
    commands = re.findall(r"python (vae|cvae|gumbel_vae)\.py\b([^\n#`&;|]*)", text)
    assert {script for script, _ in commands} == set(SCRIPTS)
    for script, argv in commands:
        SCRIPTS[script].options().parse_args(shlex.split(argv))
