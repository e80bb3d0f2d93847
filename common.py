"""What the three scripts share: the pictures, the data, the fitted prior, a little plumbing.

An image is a row of 784 pixels in [0, 1], 1 being ink; other square images will do. A picture is a
matplotlib figure: a notebook shows the one that ends a cell. A model is any nn.Module whose
decode(z), or decode(z, y) with a one-hot y, gives images; z_dim is 20 and n_classes 10 unless it
has such attributes.
"""
import io
import math
import socket
import sys
from collections import namedtuple
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
    """Integer labels (N,) from 0 to n_classes - 1 as floats (N, n_classes)."""
    return F.one_hot(labels.long(), n_classes).float()


# The pictures

def tile(images, columns):
    """Images (N, 784) as one array (rows * 28, columns * 28)."""
    images = images.detach().cpu().flatten(1)
    side = math.isqrt(images.shape[1])
    if not len(images) or side**2 != images.shape[1]:
        raise ValueError(f"these are no square images: {tuple(images.shape)}")
    return make_grid(images.view(-1, 1, side, side), columns, padding=0)[0].numpy()


def show(images, title="", columns=8, row_labels=()):
    """A figure of images (N, 784) in rows of `columns`, dark ink on white."""
    grid = tile(images, columns)
    rows = math.ceil(len(images) / columns)
    width = 0.6 * min(columns, len(images)) + 0.5 * bool(row_labels)  # inches
    figure, axes = plt.subplots(figsize=(max(4, width), 0.6 * rows + 0.3), layout="constrained")
    axes.imshow(grid, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=10, loc="left")
    centres = (np.arange(len(row_labels)) + 0.5) * len(grid) / rows
    axes.set(xticks=[], yticks=centres, yticklabels=row_labels)
    plt.close(figure)  # or a notebook would show it twice
    return figure


@torch.no_grad()
def plot_reconstruction(model, x, y=None, title="images above their reconstructions"):
    """A figure of a few images x (N, 784) above model(x)[0], or model(x, y)[0]."""
    x_reconst = model(x)[0] if y is None else model(x, y)[0]
    return show(torch.cat([x.flatten(1), x_reconst.flatten(1)]), title, columns=len(x))


def draw_codes(model, n, prior=None):
    """Codes z (n, z_dim) from N(0, I) or a prior; from a list of them, n of each class's own."""
    if isinstance(prior, list):
        return torch.stack([draw_codes(model, n, own) for own in prior])  # (n_classes, n, z_dim)
    z = torch.randn(n, getattr(model, "z_dim", 20)) if prior is None else prior.sample((n,))
    return z.to(next(model.parameters()).device)


@torch.no_grad()
def decode_classes(model, z):
    """Codes z (N, z_dim), or (n_classes, N, z_dim), drawn in every class: (n_classes, N, 784)."""
    every_y = torch.eye(getattr(model, "n_classes", 10), device=z.device)
    z = z.expand(len(every_y), -1, -1)  # the same in every class, unless each has its own
    images = [model.decode(z[k], y.expand(z.shape[1], -1)) for k, y in enumerate(every_y)]
    return torch.stack(images).flatten(2)


@torch.no_grad()
def plot_generation(model, n=24, prior=None, title="generated images"):
    """A figure of n images: z from N(0, I), or from `prior`, any distribution."""
    return show(model.decode(draw_codes(model, n, prior)), title)


def plot_conditional_generation(model, n=8, fix_number=None, prior=None, title="a class per row",
                                symbol="y"):
    """A figure with a class per row, n images in each, one z down a column; or n of fix_number."""
    images = decode_classes(model, draw_codes(model, n, prior))
    if fix_number is not None:
        return show(images[fix_number], title)
    row_labels = [f"{symbol} = {k}" for k in range(len(images))]
    return show(images.flatten(0, 1), title, n, row_labels)


def plot_handwriting(model, x, title="given, then its z in every class"):
    """A figure with a row for each image of x (N, 784). Kingma et al. 2014, figure 1."""
    x = x.flatten(1)
    columns = [x, torch.zeros_like(x), *decode_classes(model, model.encode(x)[0])]
    return show(torch.stack(columns, 1).flatten(0, 1), title, len(columns))


@torch.no_grad()
def plot_manifold(model, codes, labels=None, n=10):
    """Images over the plane of z, by quantiles of N(0, I), beside codes (N, 2) in label colours."""
    normal = D.Normal(0.0, 1.0)
    ticks = (torch.arange(n) + 0.5) / n
    z = normal.icdf(torch.cartesian_prod(ticks.flip(0), ticks)).flip(1)  # (n * n, 2), by rows
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.8), layout="constrained")
    grid = tile(model.decode(z.to(codes.device)), n)
    left.imshow(grid, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest", extent=(0, 1, 0, 1))
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
    """A figure of the -ELBO of training and test images, by epoch."""
    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    for name, images in ("nelbo_train", "training images"), ("nelbo", "test images"):
        values = [metrics[name] for metrics in history]
        axes.plot(range(1, 1 + len(history)), values, ".-", label=images)
    axes.set(xlabel="epoch", ylabel="-ELBO, nats per image")
    axes.legend()
    plt.close(figure)
    return figure


# The data

def make_data(x_train, y_train, x_test, y_test, source="own data", device="cpu"):
    """Data from arrays, tensors or lists: square images (N, H, H) or (N, H*H), labels (N,) or None.

    Images are integers to 255 or floats to 1, and are copied. ValueError says what is wrong.
    """
    tensors = []
    for part, x, y in ("train", x_train, y_train), ("test", x_test, y_test):
        x = np.asarray(x)
        side = math.isqrt(x[:1].size)
        most = 1 if x.dtype.kind == "f" else 255
        if not side or x.shape[1:] not in [(side, side), (side**2,)]:
            raise ValueError(f"x_{part} must be square images, (N, H, H) or (N, H*H): {x.shape}")
        if not 0 <= x.min() <= x.max() <= most or x.max() == 1 < most:
            raise ValueError(f"x_{part} must be floats from 0 to 1, or integers from 0 to 255 (for "
                             f"0 and 1, give floats): {x.dtype} from {x.min()} to {x.max()}")
        x = torch.tensor(x.reshape(len(x), -1), dtype=torch.float32, device=device).div_(most)
        tensors.append(x)
        if y is not None:
            y = np.asarray(y)
            if y.shape != (len(x),) or y.dtype.kind not in "iu" or y.min() < 0:
                raise ValueError(f"y_{part} must be one integer from 0 for each image, or None: "
                                 f"{y.dtype} {y.shape}")
            y = torch.tensor(y, dtype=torch.int64, device=device)
        tensors.append(y)
    if tensors[0].shape[1] != tensors[2].shape[1]:
        raise ValueError("x_train and x_test must be images of one size")
    return Data(*tensors, source)


def load_mnist(root="data", device="cpu"):
    """MNIST from `root`, or downloaded, else scikit-learn's digits; OSError if `root` is unfit."""
    folder = Path(root, "MNIST/raw")
    near = [path for name in ("raw", "*-ubyte*", "*/MNIST/raw") for path in Path(root).glob(name)]
    if near and not any(folder.glob("*")):
        raise OSError(f"no MNIST in {folder}, but there is {near[0]}: give what holds MNIST/raw")
    folder.mkdir(parents=True, exist_ok=True)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # seconds; a mirror that never answers must not hang
    try:
        train, test = (MNIST(root, train, download=True) for train in (True, False))
        if train.data.shape[1:] != (28, 28) or train.targets.max() > 9:
            raise ValueError("no 28x28 images with labels from 0 to 9")
        data = make_data(train.data, train.targets, test.data, test.targets, "MNIST")
    except Exception as error:  # torchvision raises all sorts
        downloaded = len([*folder.glob("*-ubyte")]) == 4
        if downloaded or not isinstance(error, (RuntimeError, TimeoutError, ConnectionError)):
            raise OSError(f"{folder} does not hold MNIST ({error}); give another folder, or "
                          "call common.make_data for images of your own") from error
        print(f"WARNING: no download of MNIST, so these are scikit-learn's 8x8 digits: {error!r}")
        data = make_data(*bundled_digits(), "scikit-learn's 8x8 digits (NOT MNIST)")
    finally:
        socket.setdefaulttimeout(timeout)
    return Data(*(tensor.to(device) for tensor in data[:4]), data.source)


def bundled_digits():
    """scikit-learn's 1,797 digits of 8x8 pixels, framed as MNIST's: x, y of both parts."""
    x, y = load_digits(return_X_y=True)
    x = torch.tensor(x / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    x = F.pad(F.interpolate(x, size=20, mode="bilinear"), (4, 4, 4, 4)).flatten(1)  # (1797, 784)
    test = np.arange(len(y)) % 6 == 5
    # Ten copies of the 1,498 training images make an epoch long enough to learn something in.
    return x[~test].repeat(10, 1), np.tile(y[~test], 10), x[test], y[test]


# The fitted prior

def fit_mixture(z, n_components):
    """A mixture of Gaussians fitted to codes z (N, z_dim): a distribution.

    A Gaussian takes 20 codes per dimension, on average; with fewer, N(0, I) is returned.
    """
    n, z_dim = z.shape
    n_components = min(n_components, n // (20 * z_dim))
    if n_components == 0:
        print(f"{n} codes are too few to fit a Gaussian: N(0, I) stays")
        return D.Independent(D.Normal(z.new_zeros(z_dim), 1.0), 1)
    # tol ends EM early. The least variance, reg_covar, keeps single precision stable at any scale.
    fit = GaussianMixture(n_components, tol=1.0, reg_covar=1e-5 * z.var().item(), random_state=0)
    fit.fit(z.detach().cpu().numpy())
    weights, means, covariances = (
        torch.tensor(values).to(z) for values in (fit.weights_, fit.means_, fit.covariances_))
    gaussians = D.MultivariateNormal(means, covariances)
    return D.MixtureSameFamily(D.Categorical(weights), gaussians)


# The plumbing

def number(kind, least, allowed):
    """An argparse type: a finite number of this kind from `least`; `allowed` says so."""
    def parse(text):
        value = kind(text)
        if not least <= value < math.inf:  # nan is not, either
            raise ValueError
        return value
    parse.__name__ = allowed  # argparse quotes it: invalid number > 0 value: '-1'
    return parse


count = number(int, 1, "integer >= 1")
positive = number(float, sys.float_info.min, "number > 0")
weight = number(float, 0, "number >= 0")


def save(state_dict, path):
    """Writes weights that load on any device; until all are written, an older file stays."""
    content = io.BytesIO()  # on a full disk, torch.save to a path raises no OSError
    torch.save({name: tensor.cpu() for name, tensor in state_dict.items()}, content)
    part = Path(f"{path}.part")
    part.write_bytes(content.getvalue())
    part.replace(path)
    print("wrote", path)


def run(main):
    """Calls main with the command line's words; file errors and divergence end in one line."""
    if "kernel_launcher" in sys.argv[0]:  # pasted into a notebook: the words are Jupyter's
        return main()
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, FloatingPointError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}; see also --help")
