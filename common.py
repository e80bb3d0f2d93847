"""What the three scripts share: the pictures, the data, the fitted prior, and a little plumbing.

An image is a row of 784 pixels in [0, 1], where 1 is ink; other square sizes work, too. Functions
that show something return a matplotlib figure, which a notebook displays if it is the value of a
cell's last line. A model is any nn.Module whose decode(z), or decode(z, y) with a one-hot y, gives
images. If it has no attributes z_dim and n_classes, the helpers assume 20 and 10. If it has dropout
or batch normalisation, call model.eval() first.
"""
import argparse
import gzip
import io
import math
import socket
import sys
import tempfile
import zlib
from collections import namedtuple
from contextlib import suppress
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributions as D
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.mixture import GaussianMixture
from torchvision.datasets import MNIST
from torchvision.utils import make_grid

Data = namedtuple("Data", "x_train y_train x_test y_test source")  # x (N, 784), y (N,) or None


def one_hot(labels, n_classes=10):
    """Returns labels (N,), integers from 0 to n_classes - 1, as one-hot floats (N, n_classes)."""
    return F.one_hot(torch.as_tensor(labels).long(), n_classes).float()


# The pictures

def image_side(x, name="images"):
    """Returns H for square images x, (N, H*H), (N, H, H) or (N, 1, H, H), or raises ValueError."""
    side = math.isqrt(math.prod(x.shape[1:]))
    if 0 in x.shape or tuple(x.shape[1:]) not in [(side**2,), (side, side), (1, side, side)]:
        raise ValueError(f"{name} must be square images, (N, H*H), (N, H, H) or (N, 1, H, H), "
                         f"but their shape is {tuple(x.shape)}")
    return side


def tile(images, columns):
    """Tiles images (N, 784) into one array (rows * 28, columns * 28), or raises ValueError."""
    if isinstance(images, (list, tuple)):
        images = torch.stack([torch.as_tensor(image) for image in images])
    images = torch.as_tensor(images).detach().cpu().float()
    side = image_side(images)
    if not -0.01 < images.min() <= images.max() < 1.01:  # rounding lifts warped images above 1
        raise ValueError("images must have values from 0 to 1, but these range from "
                         f"{images.min():g} to {images.max():g}")
    return make_grid(images.reshape(-1, 1, side, side), columns, padding=0)[0].numpy()


def show(images, title="", columns=8, row_labels=(), size=0.6, column_labels=()):
    """Shows images (N, 784) in rows of `columns`, each image `size` inches wide.

    In a loop or a function of a notebook, write display(common.show(x)).
    """
    grid = tile(images, columns)
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    width = size * (columns + 1.6 * (len(row_labels) > 0))
    height = size * (rows + 0.5 * (len(column_labels) > 0)) + 0.3
    figure, axes = plt.subplots(figsize=(max(4, width), height), layout="compressed")
    extent = 0, columns, rows, 0  # an image is 1 wide and 1 high
    axes.imshow(grid, "gray_r", vmin=0, vmax=1, interpolation="nearest", extent=extent,
                origin="upper")
    axes.set_title(title, fontsize=10, loc="left")
    axes.set(xticks=np.arange(len(column_labels)) + 0.5, xticklabels=column_labels,
             yticks=np.arange(len(row_labels)) + 0.5, yticklabels=row_labels)
    axes.tick_params(labelsize=32 * size, length=0, labeltop=True, labelbottom=False)
    plt.close(figure)  # or a notebook would show it twice
    return figure


@torch.no_grad()
def plot_reconstruction(model, x, y=None, title="images above their reconstructions"):
    """Shows images x (N, 784) above their reconstructions, model(x)[0] or model(x, y)[0]."""
    x_reconst = model(x)[0] if y is None else model(x, y)[0]
    return show(torch.cat([x.flatten(1), x_reconst.flatten(1)]), title, columns=len(x))


def draw_codes(model, n, prior=None):
    """Draws codes z (n, z_dim) from N(0, I) or from `prior`; from a list of priors, n of each."""
    if isinstance(prior, (list, tuple)):
        return torch.stack([draw_codes(model, n, p) for p in prior])  # (n_classes, n, z_dim)
    z = torch.randn(n, getattr(model, "z_dim", 20)) if prior is None else prior.sample((n,))
    return z.to(next(model.parameters()).device)


@torch.no_grad()
def decode_classes(model, z):
    """Decodes codes z (N, z_dim), each in every class, to images (n_classes, N, 784).

    If z is (n_classes, N, z_dim), each class has N codes of its own instead.
    """
    every_y = torch.eye(getattr(model, "n_classes", 10), device=z.device)
    z = z.expand(len(every_y), -1, -1)  # repeats z for each class, unless each has its own
    images = [model.decode(z[k], y.expand(z.shape[1], -1)) for k, y in enumerate(every_y)]
    return torch.stack(images).flatten(2)


@torch.no_grad()
def plot_generation(model, n=24, prior=None, title="generated images"):
    """Shows n images, with z from N(0, I) or from `prior`, any torch distribution of z."""
    return show(model.decode(draw_codes(model, n, prior)), title)


def plot_conditional_generation(model, n=8, fix_number=None, prior=None, title="generated images",
                                symbol="y", size=0.6):
    """Shows one class per row in n columns, or, if fix_number is given, n images of that class.

    The drawings of a column share their z, unless `prior` is a list with a prior for each class.
    """
    images = decode_classes(model, draw_codes(model, n, prior))
    if fix_number is not None:
        return show(images[fix_number], title)
    row_labels = [f"{symbol} = {k}" for k in range(len(images))]
    return show(images.flatten(0, 1), title, n, row_labels, size)


@torch.no_grad()
def plot_handwriting(model, x, prior=None, classes=None, title="input, then its mu in each class"):
    """Shows each image of x (N, 784), then its mu decoded in each class, as Kingma et al. 2014 do.

    With a list of priors and the classes (N,) of x, mu is moved first: from its place among the
    codes of its own class to the same place, in standard deviations, among those of each class.
    Raises ValueError if only one of them is given, or if a class has no prior.
    """
    if (prior is None) != (classes is None):
        raise ValueError("to move mu, plot_handwriting needs a list of priors and the classes of x")
    z = model.encode(x)[0]  # (N, z_dim)
    if prior is not None:
        given = torch.as_tensor(classes, device=z.device)
        classes = given.long()  # uint8 would be taken for a mask
        if (given.is_floating_point() or given.dtype == torch.bool or given.shape != (len(x),)
                or classes.min() < 0 or classes.max() >= len(prior)):
            raise ValueError("classes must hold, for each image of x, an integer from 0 to "
                             f"{len(prior) - 1}")
        mean = torch.stack([r.mean for r in prior])  # (n_classes, z_dim)
        sd = torch.stack([r.stddev for r in prior])  # (n_classes, z_dim)
        z = mean[:, None] + (z - mean[classes]) / sd[classes] * sd[:, None]  # (n_classes, N, z_dim)
    x = x.flatten(1)
    blank = torch.zeros_like(x)  # an empty column between the input and the drawings
    columns = [x, blank, *decode_classes(model, z)]
    labels = ["x", "", *range(len(columns) - 2)]
    return show(torch.stack(columns, 1).flatten(0, 1), title, len(columns), column_labels=labels)


@torch.no_grad()
def plot_manifold(model, codes, labels=None, n=10):
    """Shows images over the plane of z, beside codes (N, 2); the axes show N(0, 1)'s quantiles."""
    normal = D.Normal(0.0, 1.0)
    ticks = normal.icdf((torch.arange(n) + 0.5) / n)
    z = torch.stack(torch.meshgrid(ticks, ticks.flip(0), indexing="xy"), 2)  # (n, n, 2), by rows
    grid = tile(model.decode(z.view(-1, 2).to(codes.device)), n)
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.8), layout="constrained")
    left.imshow(grid, "gray_r", vmin=0, vmax=1, interpolation="nearest", extent=(0, 1, 0, 1),
                origin="upper")
    colours = {} if labels is None else {"c": labels.cpu(), "cmap": "tab10"}
    dots = right.scatter(*normal.cdf(codes).cpu().T, s=0.2, antialiased=False, **colours)
    if labels is not None:
        figure.legend(*dots.legend_elements(), loc="outside right center", title="label")
    for axes in left, right:
        axes.set(xlabel="z[0], quantile", ylabel="z[1], quantile", xlim=(0, 1), ylim=(0, 1),
                 aspect="equal")
    plt.close(figure)
    return figure


def plot_curves(history):
    """Shows the -ELBO of the training and test images after each epoch."""
    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    for name, images in ("nelbo_train", "training images"), ("nelbo", "test images"):
        values = [metrics[name] for metrics in history]
        axes.plot(range(1, 1 + len(history)), values, ".-", label=images)
    axes.set(xlabel="epoch", ylabel="-ELBO, nats per image")
    axes.locator_params(axis="x", integer=True)  # ticks at whole epochs only
    axes.legend()
    plt.close(figure)
    return figure


# The data

def make_data(x_train, y_train, x_test, y_test, source="own data", device="cpu"):
    """Makes Data from arrays, CPU tensors or lists: images (N, H*H), (N, H, H) or (N, 1, H, H).

    Images are integers from 0, paper, to 255, ink, or floats from 0 to 1, and are copied. Labels
    are (N,) or None. A ValueError says what is wrong.
    """
    tensors = []
    for part, x, y in ("train", x_train, y_train), ("test", x_test, y_test):
        if x is None:
            raise ValueError(f"x_{part} is None, but both training and test images are needed")
        x = np.asarray(x)
        image_side(x, f"x_{part}")
        most = 1 if x.dtype.kind == "f" else 255
        # Integers of which the largest is 1 are refused, too: divided by 255, they would be paper.
        if not -0.001 < x.min() <= x.max() < most + 0.001 or x.max() == 1 < most:
            raise ValueError(f"x_{part} must be floats from 0 to 1, or integers from 0 to 255 "
                             "(images of only 0 and 1 must be floats), but it holds "
                             f"{x.dtype} from {x.min()} to {x.max()}")
        x = x.reshape(len(x), -1).astype("float32")  # torch cannot read all numpy arrays
        tensors.append(torch.from_numpy(x).to(device).div_(most))
        if y is not None:
            y = np.asarray(y)
            if y.shape != (len(x),) or y.dtype.kind not in "iu" or y.min() < 0:
                raise ValueError(f"y_{part} must hold one integer >= 0 for each image, or be "
                                 f"None, but it holds {y.dtype} of shape {y.shape}")
            y = torch.from_numpy(y.astype("int64")).to(device)
        tensors.append(y)
    if tensors[0].shape[1] != tensors[2].shape[1]:
        raise ValueError("the images of x_train and x_test must have the same size")
    if tensors[0].mean() > 0.5:
        print("WARNING: the mean of x_train is above a half; is paper 0 and ink 1?")
    return Data(*tensors, source)


def check_data(data, n_classes=None):
    """Raises ValueError unless images are from 0 to 1, and all or none have labels < n_classes."""
    for part, x, y in ("train", *data[:2]), ("test", *data[2:4]):
        if x is None or len(x) == 0 or y is not None and len(y) != len(x):
            raise ValueError(f"x_{part} must have images, and y_{part} one label for each, or None")
        if not -0.001 < x.min() <= x.max() < 1.001:  # resizing rounds; this refuses nan, too
            raise ValueError(f"x_{part} must have values from 0 (paper) to 1 (ink), but these "
                             f"range from {x.min():g} to {x.max():g}")
        if n_classes and not 0 <= y.min() <= y.max() < n_classes:
            raise ValueError(f"y_{part} holds {y.min()} to {y.max()}, but n_classes is {n_classes}")


def load_mnist(root="data", device="cpu"):
    """Loads MNIST from `root`, or downloads it there; if that fails, loads scikit-learn's digits.

    Raises OSError if `root` cannot be used, or if its files cannot be read.
    """
    root = Path(root).expanduser()
    folder = root / "MNIST/raw"
    folder.mkdir(parents=True, exist_ok=True)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # seconds, so that a silent mirror cannot hang the script
    try:
        for archive in folder.glob("*-ubyte.gz"):  # a download would overwrite the user's own
            if archive.stat().st_size and not archive.with_suffix("").exists():
                with suppress(EOFError, zlib.error, gzip.BadGzipFile):  # if damaged, download it
                    archive.with_suffix("").write_bytes(gzip.decompress(archive.read_bytes()))
        train, test = (MNIST(root, train, download=True) for train in (True, False))
        data = make_data(train.data, train.targets, test.data, test.targets, "MNIST")
    except Exception as error:  # torchvision raises all sorts of errors
        downloaded = len([*folder.glob("*-ubyte")]) == 4
        if downloaded or not isinstance(error, (RuntimeError, TimeoutError, ConnectionError)):
            raise OSError(f"{folder} does not hold MNIST ({error}); delete any damaged file, give "
                          "another folder, or call common.make_data for your images") from error
        print(f"WARNING: MNIST could not be downloaded ({error!r}); using scikit-learn's digits")
        data = make_data(*bundled_digits(), "scikit-learn's 8x8 digits (NOT MNIST)")
    finally:
        socket.setdefaulttimeout(timeout)
    return Data(*(tensor.to(device) for tensor in data[:4]), data.source)


def bundled_digits():
    """Returns scikit-learn's 8x8 digits, framed like MNIST's, as arguments of make_data."""
    x, y = load_digits(return_X_y=True)
    x = torch.tensor(x / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    x = F.pad(F.interpolate(x, size=20, mode="bilinear"), (4, 4, 4, 4)).flatten(1)  # (1797, 784)
    test = np.arange(len(y)) % 6 == 5
    # Ten copies of the 1,498 training images make an epoch long enough for a model to learn.
    return x[~test].repeat(10, 1), np.tile(y[~test], 10), x[test], y[test]


# The fitted prior

def fit_mixture(z, n_components, name="prior"):
    """Fits a mixture of Gaussians to codes z (N, z_dim), and returns it as a torch distribution.

    Each Gaussian needs 20 * z_dim codes, on average. If there are too few codes for n_components
    Gaussians, fewer are fitted, or N(0, I) is returned; a message with this name says so.
    """
    n, z_dim = z.shape
    enough = n // (20 * z_dim)
    if enough < n_components:
        used = f"{enough} Gaussians" if enough else "N(0, I)"
        print(f"{name}: {n} codes are too few to fit {n_components} Gaussians, so {used} is used")
    if enough == 0:
        return D.Independent(D.Normal(z.new_zeros(z_dim), 1.0), 1)
    n_components = min(n_components, enough)
    # With tol=1.0, EM takes about two steps after k-means. reg_covar keeps float32 stable.
    fit = GaussianMixture(n_components, tol=1.0, reg_covar=1e-5 * z.var().item(), random_state=0)
    fit.fit(z.detach().cpu().numpy())
    weights, means, covariances = (
        torch.tensor(values).to(z) for values in (fit.weights_, fit.means_, fit.covariances_))
    # Rounding leaves large covariances not quite symmetric, which covariance_matrix= would refuse.
    gaussians = D.MultivariateNormal(means, scale_tril=torch.linalg.cholesky(covariances))
    return D.MixtureSameFamily(D.Categorical(weights), gaussians)


# The plumbing

def number(kind, least, allowed):
    """Returns an argparse type: a finite `kind`, int or float, >= `least`; errors say `allowed`."""
    def parse(text):
        with suppress(ValueError):
            if least <= kind(text) < math.inf:  # this is false for nan, too
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not {allowed}")
    return parse


positive_int = number(int, 1, "an integer >= 1")
positive_float = number(float, sys.float_info.min, "a number > 0")
nonnegative_float = number(float, 0, "a number >= 0")


def results_folder(path):
    """Makes this folder if it is missing, and returns it; raises OSError if it is not writable."""
    folder = Path(path).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):  # raises OSError before the training, not after it
        return folder


def check_finite(loss):
    """Raises FloatingPointError if the loss is not finite: then the training has diverged."""
    if not math.isfinite(loss):
        raise FloatingPointError("the training diverged: the loss is not finite; try a smaller lr")


def save(state_dict, path):
    """Saves weights that load on any device; an older file stays until the new one is complete."""
    content = io.BytesIO()  # on a full disk, torch.save to a path raises a RuntimeError
    torch.save({name: tensor.cpu() for name, tensor in state_dict.items()}, content)
    part = Path(f"{path}.part")
    part.write_bytes(content.getvalue())
    part.replace(path)
    print("wrote", path)


def run(main):
    """Calls main, in a shell or a notebook; a file error or divergence ends in one line of text."""
    if "kernel_launcher" in sys.argv[0]:  # pasted into a notebook: the arguments are Jupyter's
        return main()
    if isinstance(sys.stdout, io.TextIOWrapper):  # under a notebook's %run it is not
        # Each line reaches a log file at once, and characters that it cannot hold are escaped.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        main(sys.argv[1:])
    except (OSError, FloatingPointError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}; see also --help")
