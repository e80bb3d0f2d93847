"""What the three scripts share: the pictures, the data, the fitted mixtures, a little plumbing.

Images are rows of 784 pixels in [0, 1], 1 being ink; any other square number will do. Pictures are
Figures: a notebook shows one that ends a cell, and `save` writes it to disk.
"""
import argparse
import inspect
import io
import math
import os
import shutil
import socket
import sys
import tempfile
from collections import namedtuple
from pathlib import Path

import matplotlib.figure
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from sklearn.datasets import load_digits
from sklearn.mixture import GaussianMixture
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal
from torchvision.utils import make_grid

Data = namedtuple("Data", "x_train y_train x_test y_test source")  # x (N, 784), y (N,) or None


class Figure(matplotlib.figure.Figure):
    """matplotlib's, which a notebook shows without any magic: Jupyter asks it for a PNG."""

    def _repr_png_(self):
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def side(images):
    """The height and width of square images (N, side * side), or ValueError."""
    size = math.isqrt(images.shape[-1])
    if images.dim() != 2 or size * size != images.shape[-1]:
        raise ValueError(f"these are no rows of square images: {tuple(images.shape)}")
    return size


def tile(images, columns):
    """Images (N, side * side) as one array (rows * side, columns * side)."""
    images = images.detach().cpu().reshape(-1, 1, side(images), side(images))
    return make_grid(images, nrow=columns, padding=0)[0].numpy()


def show(images, title="", columns=8, row_labels=()):
    """A Figure with images (N, 784) in a grid, dark ink on white; N may be any number."""
    grid, size = tile(images, columns), side(images)
    zoom = math.ceil(56 / size)  # whole numbers of screen pixels keep digits crisp
    height, width = zoom * grid.shape[0], zoom * grid.shape[1]
    left, top = 10 + 8 * max(map(len, row_labels), default=0), 30
    full_width, full_height = left + max(width, 8 * len(title)) + 10, top + height + 10
    figure = Figure(figsize=(full_width / 100, full_height / 100), dpi=100)
    axes = figure.add_axes((left / full_width, 10 / full_height,
                            width / full_width, height / full_height))
    axes.imshow(grid, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xticks([])
    axes.set_yticks([(row + 0.5) * size for row in range(len(row_labels))], row_labels)
    axes.tick_params(length=0)
    return figure


def plot_reconstruction(x, probs):
    """A Figure with a row of images, x (N, 784), above their reconstructions, probs (N, 784)."""
    labels = ["given", "redrawn"]
    return show(torch.cat([x, probs]), "test images and their reconstructions", len(x), labels)


@torch.no_grad()
def plot_generation(model, prior, title="samples from the prior", n=64):
    """A Figure with n samples: z from `prior`, a distribution, then p(x|z)'s probabilities."""
    z = prior.sample((n,))  # (n, z_dim)
    return show(torch.sigmoid(model.decode(z)), title, math.ceil(math.sqrt(n)))


@torch.no_grad()
def decode_classes(model, z):
    """The pictures (N, n_classes, 784) of z decoded with every class.

    z is (N, z_dim), the same for all classes, or (N, n_classes, z_dim), one for each.
    """
    y = torch.eye(model.n_classes, device=z.device).repeat(len(z), 1)  # (N * n_classes, n_classes)
    z = z if z.dim() == 3 else z[:, None].expand(-1, model.n_classes, -1)
    probs = torch.sigmoid(model.decode(z.flatten(0, 1), y))  # (N * n_classes, 784)
    return probs.view(len(z), model.n_classes, -1)


def plot_conditional_generation(model, prior, title="", n=10, digit=None, name="digit"):
    """A Figure with one class per row and n columns, or with n samples of a single digit.

    A `prior` shared by all classes gives the same z down each column; if it has the batch shape
    (n_classes,), each class draws from its own.
    """
    probs = decode_classes(model, prior.sample((n,))).transpose(0, 1)  # (n_classes, n, 784)
    if digit is not None:
        return show(probs[digit], f"{name} {digit}{title}", math.ceil(math.sqrt(n)))
    labels = [f"{name} {k}" for k in range(model.n_classes)]
    return show(probs.flatten(0, 1), f"one {name} per row{title}", n, labels)


def plot_handwriting(model, x, z, title=""):
    """A Figure: in each row an image of x (N, 784), then all classes in its handwriting.

    z is the code of x, (N, z_dim), or what it becomes in each class, (N, n_classes, z_dim).
    After Kingma et al. 2014, arXiv:1406.5298, figure 1.
    """
    rows = torch.cat([x[:, None], decode_classes(model, z)], 1)  # (N, 1 + n_classes, 784)
    return show(rows.flatten(0, 1), f"given, then all classes{title}", 1 + model.n_classes)


@torch.no_grad()
def plot_manifold(model, codes, labels=None, n=20):
    """For a two-dimensional z: images decoded over the plane, beside the codes (N, 2) by label."""
    normal, name = Normal(0.0, 1.0), "quantile of N(0, 1) at the {} number of z"
    ticks = normal.icdf((torch.arange(n, device=codes.device) + 0.5) / n)  # (n,): equally probable
    z = torch.cartesian_prod(ticks.flip(0), ticks).flip(1)  # (n * n, 2): by rows, from the top
    figure = Figure(figsize=(12, 6.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.imshow(tile(torch.sigmoid(model.decode(z)), n), cmap="gray_r", extent=(0, 1, 0, 1))
    colours = {} if labels is None else {"c": labels.cpu(), "cmap": "tab10"}
    points = right.scatter(*normal.cdf(codes).cpu().T.numpy(), s=2, **colours)
    if labels is not None:
        right.legend(*points.legend_elements(), title="digit", loc="upper right")
    for axes, title in (left, "images decoded from z"), (right, "codes z of test images"):
        axes.set(title=title, xlim=(0, 1), ylim=(0, 1), aspect="equal",
                 xlabel=name.format("first"), ylabel=name.format("second"))
    return figure


def plot_curves(history):
    """A Figure of the metrics by epoch, without the first one, whose losses dwarf the rest."""
    panels = [["train", "loss"], ["recon"], ["kl"], ["kl_c", "i_c"], ["nmi", "acc"]]
    panels = [names for names in panels if history and names[-1] in history[0]]
    figure, first = Figure(figsize=(3 * len(panels) + 1, 3), layout="constrained"), len(history) > 1
    for place, names in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), place, xlabel="epoch")
        values = [[epoch[name] for name in names] for epoch in history]
        axes.plot(range(1 + first, 1 + len(history)), values[first:], ".-", label=names)
        if "acc" in names:
            axes.set(ylabel="test set", ylim=(0, 1.02))  # a line at 1 does not touch the frame
        else:
            axes.set(ylabel="nats per image")
        axes.locator_params(axis="x", integer=True, min_n_ticks=1)
        axes.legend()
    return figure


def make_data(x_train, y_train, x_test, y_test, source="own data", device="cpu"):
    """Data from NumPy arrays or tensors: square images (N, H, H) or (N, H*H), labels (N,) or None.

    Images are integers from 0 to 255 or floats from 0 to 1, labels are integers of any type.
    Raises ValueError, saying what is wrong with which of them.
    """
    tensors = []
    for part, x, y in ("train", x_train, y_train), ("test", x_test, y_test):
        x = torch.as_tensor(x, device=device)
        if x.dim() not in (2, 3) or x.shape[1] != x.shape[-1] or not x.numel():
            raise ValueError(f"x_{part} has the shape {tuple(x.shape)}; give square grey images, "
                             "at least one, as (N, H, H) or (N, H*H)")
        low, high, most = x.min().item(), x.max().item(), 1 if x.is_floating_point() else 255
        if not 0 <= low <= high <= most or most == 255 and high == 1:
            raise ValueError(f"x_{part} goes from {low:g} to {high:g} as {x.dtype}; give integers "
                             "from 0 to 255, or floats from 0 to 1 of which none is nan")
        x = x.flatten(1).float()
        tensors += [x if most == 1 else x.div_(255), None]  # in place: of a copy
        if y is not None:
            y = torch.as_tensor(y, device=device)
            if y.shape != (len(x),) or y.is_floating_point():
                raise ValueError(f"y_{part} has the shape {tuple(y.shape)} and {y.dtype} for "
                                 f"{len(x)} images; give one integer an image, or None")
            tensors[-1] = y.long()
    sizes = [x.shape[1] for x in tensors[::2]]
    if sizes[0] != sizes[1]:
        raise ValueError(f"x_train has {sizes[0]} pixels an image, x_test {sizes[1]}; "
                         "bring them to one size")
    return Data(*tensors, source)


def load_mnist(root="data", device="cpu"):
    """MNIST as Data, from the folder `root` or downloaded to it; 60,000 and 10,000 images.

    Without a network, scikit-learn's digits serve, with a warning. Raises OSError if `root` cannot
    be used, or its files are damaged.
    """
    MNIST, folder = torchvision.datasets.MNIST, Path(root) / "MNIST/raw"
    files = [folder / Path(name).stem for name, _ in MNIST.resources]
    if not all(file.exists() for file in files):
        writable_folder(folder)
        usual = socket.getdefaulttimeout()
        try:  # in a folder of our own, so that several runs can start at once
            socket.setdefaulttimeout(10)  # seconds; a mirror that never answers must not hang us
            with tempfile.TemporaryDirectory(dir=root) as scratch:
                shutil.copytree(folder, Path(scratch) / "MNIST/raw")  # archives may be here
                MNIST(scratch, download=True)
                for file in files:
                    (Path(scratch) / "MNIST/raw" / file.name).replace(file)
        except Exception as error:  # torchvision raises all sorts of them
            if not all(file.exists() for file in files):  # nor has another run got them meanwhile
                reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
                source = "scikit-learn's 8x8 digits (NOT MNIST)"
                print(f"WARNING: MNIST is not in {folder} and could not be downloaded ({reason}); "
                      f"using {source} instead")
                return make_data(*embedded_digits(), source, device)
        finally:
            socket.setdefaulttimeout(usual)
    try:
        parts = [MNIST(root, train) for train in (True, False)]
        if any(part.data.shape[1:] != (28, 28) or part.targets.max() > 9 for part in parts):
            raise ValueError("these are not 28x28 images with labels from 0 to 9")
        return make_data(*[value for part in parts for value in (part.data, part.targets)],
                         "MNIST", device)
    except Exception as error:  # torchvision again
        raise OSError(f"the files in {folder} are damaged, or not MNIST's; delete or move this "
                      "folder, and MNIST will be downloaded again") from error


def embedded_digits():
    """scikit-learn's 1,797 digits of 8x8 pixels, framed as MNIST's: x, y of both parts."""
    digits = load_digits()
    x = torch.tensor(digits.images * 255 / 16, dtype=torch.float32)[:, None]  # (1797, 1, 8, 8)
    x = F.pad(F.interpolate(x, size=20, mode="bilinear"), (4, 4, 4, 4))[:, 0].byte()
    y, test = torch.tensor(digits.target), torch.arange(len(x)) % 6 == 5
    # Ten copies of the 1,498 training images make an epoch long enough to learn something in.
    return x[~test].repeat(10, 1, 1), y[~test].repeat(10), x[test], y[test]


def one_hot(labels, n_classes=10):
    """Integer labels (N,) to floats (N, n_classes); ValueError for none, or one out of range."""
    if labels is None:
        raise ValueError("there are no labels, and this model needs them; see gumbel_vae.py")
    if labels.numel() and not 0 <= labels.min() <= labels.max() < n_classes:
        raise ValueError(f"the labels go from {labels.min()} to {labels.max()}, "
                         f"the classes from 0 to {n_classes - 1}")
    return F.one_hot(labels.long(), n_classes).float()


def fit_mixtures(z, labels=None, n_classes=1, n_components=10):
    """One mixture of Gaussians for all codes z (N, z_dim), or one for each of n_classes labels.

    Returns a dict of weights (n_classes, M), means (n_classes, M, z_dim) and covariances
    (n_classes, M, z_dim, z_dim), without n_classes if labels is None; M <= n_components has 100
    codes each on average. A class with too few shares all codes. torch.manual_seed repeats it.
    """
    groups = [z if labels is None else z[labels == k] for k in range(n_classes)]
    n_components = max(1, min(n_components, len(z) // (100 * n_classes)))
    groups = [codes if len(codes) >= 50 * n_components else z for codes in groups]
    # tol ends it after about two steps of EM: convergence takes 31, and gains 0.007 nats in vae.py.
    # The least variance, reg_covar, keeps single precision stable, whatever the scale of z.
    seed, floor = torch.randint(2**31 - 1, ()).item(), 1e-5 * z.var().item()
    fits = [GaussianMixture(n_components, tol=1.0, reg_covar=floor, random_state=seed)
            .fit(codes.cpu().numpy()) for codes in groups]
    weights, means, covariances = (  # weights (n_classes, M) and so on
        torch.as_tensor(np.stack([getattr(fit, name) for fit in fits])).to(z)
        for name in ("weights_", "means_", "covariances_"))
    covariances = (covariances + covariances.mT) / 2  # undo rounding
    found = {"weights": weights, "means": means, "covariances": covariances}
    return found if labels is not None else {name: value[0] for name, value in found.items()}


def mixture(weights, means, covariances):
    """The distribution over z that fit_mixtures found: common.mixture(**fitted)."""
    return MixtureSameFamily(Categorical(weights), MultivariateNormal(means, covariances))


def transfer(z, labels, weights, means, covariances):
    """Codes z (N, z_dim) of classes labels (N,), moved to every class: (N, n_classes, z_dim).

    z' = mu_k + S_k^(1/2) S_y^(-1/2) (z - mu_y), with the mean and the covariance of each class's
    mixture: standardised in its own class, then coloured in another.
    """
    mu = (weights[..., None] * means).sum(1)  # (K, z_dim)
    offset = means - mu[:, None]  # (K, M, z_dim)
    scatter = covariances + offset[..., None] * offset[..., None, :]  # (K, M, z_dim, z_dim)
    values, vectors = torch.linalg.eigh((weights[..., None, None] * scatter).sum(1))
    root = vectors * values.sqrt()[:, None] @ vectors.mT  # (K, z_dim, z_dim), symmetric
    standard = torch.linalg.solve(root[labels], z - mu[labels])  # (N, z_dim)
    return mu + torch.einsum("kij,nj->nki", root, standard)


def in_range(kind, low, high):
    """An argparse type: an int or a float from low to high, both included."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:  # nan is never in range
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low} to {high}")
        return value
    parse.__name__ = kind.__name__  # argparse shows it when the text is not even a number
    return parse


def log_epoch(epoch, metrics):
    """Prints one aligned row of the log; in the first epoch also its header."""
    if epoch == 1:
        print("epoch " + " ".join(f"{name:>6}" for name in metrics))
    row = " ".join(f"{value:{max(6, len(name))}.2f}" for name, value in metrics.items())
    print(f"{epoch:5d} {row}", flush=True)


def writable_folder(path):
    """The Path of a folder, made if missing; OSError if no file can be written there."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise OSError(f"cannot write to the folder {path}: {error.strerror}; "
                      "choose another one") from None
    return Path(path)


def save(path, item):
    """Writes a Figure as a PNG, anything else with torch.save, whole or not at all; the path."""
    buffer, part = io.BytesIO(), Path(f"{path}.{os.getpid()}.part")
    if isinstance(item, matplotlib.figure.Figure):
        item.savefig(buffer, format="png")
    else:
        torch.save(item, buffer)
    try:
        part.write_bytes(buffer.getvalue())
        part.replace(path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}; make room there "
                      "or choose another folder") from None
    finally:
        part.unlink(missing_ok=True)
    return path


def load_checkpoint(path, model_class, device="cpu"):
    """(model, checkpoint) from a script's file, on the device; OSError if it is not such a file."""
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        sizes = inspect.signature(model_class).parameters.keys() & checkpoint["args"].keys()
        model = model_class(**{name: checkpoint["args"][name] for name in sizes})
        model.load_state_dict(checkpoint["state_dict"])
        source, epochs = checkpoint["data"], len(checkpoint["history"])
    except OSError as error:
        raise OSError(f"cannot read {path}: {error.strerror}; give a file "
                      "that its script saved") from None
    except Exception as error:  # torch.load alone fails in a dozen ways
        raise OSError(f"{path} is not a complete {model_class.__name__} checkpoint; give one that "
                      "its script saved") from error
    print(f"{path} was trained on {source} (epochs: {epochs})")
    return model.to(device).eval(), checkpoint


def run(main):
    """Calls main; file and training errors end in one line and exit code 1."""
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted: nothing more was written", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # as in `python vae.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains
        sys.exit(1)
    except (OSError, FloatingPointError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
