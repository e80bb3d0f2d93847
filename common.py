"""What the three scripts share: the pictures, the data, the fitted prior, a little plumbing.

An image is a row of 784 pixels in [0, 1], 1 being ink; other square images will do. A picture is a
matplotlib figure: a notebook shows the one that ends a cell. A model is any nn.Module whose
decode(z), or decode(z, y) with a one-hot y, gives images; z_dim is 20 and n_classes 10 unless it
has such attributes.
"""
import argparse
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
    """Integer labels (N,) to floats (N, n_classes)."""
    return torch.eye(n_classes, device=labels.device)[labels.long()]


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
    grid, rows = tile(images, columns), math.ceil(len(images) / columns)
    inches = max(4, 0.6 * min(columns, len(images))), 0.6 * rows + 0.3
    figure, axes = plt.subplots(figsize=inches, layout="constrained")
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
    return show(torch.cat([x, x_reconst]), title, columns=len(x))


def draw_codes(model, n, prior=None, z_dim=None):
    """n codes z (n, z_dim) on the model's device, from N(0, I) or from the prior."""
    z_dim = z_dim or getattr(model, "z_dim", 20)
    z = torch.randn(n, z_dim) if prior is None else prior.sample((n,))
    return z.to(next(model.parameters()).device)


@torch.no_grad()
def decode_classes(model, z, n_classes=None):
    """Codes z (N, z_dim), or (N, n_classes, z_dim), decoded in every class: (n_classes, N, 784)."""
    every_y = torch.eye(n_classes or getattr(model, "n_classes", 10), device=z.device)
    return torch.stack([model.decode(z if z.dim() == 2 else z[:, k], y.expand(len(z), -1))
                        for k, y in enumerate(every_y)])


@torch.no_grad()
def plot_generation(model, n=24, prior=None, title="generated images", z_dim=None):
    """A figure of n images: z from N(0, I), or from `prior`, any distribution."""
    return show(model.decode(draw_codes(model, n, prior, z_dim)), title)


def plot_conditional_generation(model, n=8, fix_number=None, prior=None, title="a class per row",
                                z_dim=None, n_classes=None):
    """A figure with a class per row, n images in each, one z down a column; or n of fix_number."""
    images = decode_classes(model, draw_codes(model, n, prior, z_dim), n_classes)
    if fix_number is not None:
        return show(images[fix_number], title)
    return show(images.flatten(0, 1), title, columns=n, row_labels=range(len(images)))


def plot_handwriting(model, x, title="given, then its z in every class", n_classes=None):
    """A figure with a row for each image of x (N, 784). Kingma et al. 2014, figure 1."""
    images = torch.cat([x[None], decode_classes(model, model.encode(x)[0], n_classes)])
    return show(images.transpose(0, 1).flatten(0, 1), title, columns=len(images))


@torch.no_grad()
def plot_manifold(model, codes, labels, n=10):
    """Images over the plane of z, by quantiles of N(0, I), beside codes (N, 2) in label colours."""
    normal, ticks = D.Normal(0.0, 1.0), (torch.arange(n) + 0.5) / n
    z = normal.icdf(torch.cartesian_prod(ticks.flip(0), ticks)).flip(1)  # (n * n, 2), by rows
    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 3.7), layout="constrained")
    grid = tile(model.decode(z.to(codes.device)), n)
    left.imshow(grid, cmap="gray_r", interpolation="nearest", extent=(0, 1, 0, 1))
    places = normal.cdf(codes).cpu().T  # (2, N)
    right.scatter(*places, s=0.2, c=labels.cpu(), cmap="tab10", antialiased=False)
    for axes in left, right:
        axes.set(xlabel="z[0], quantile", ylabel="z[1], quantile", xlim=(0, 1), ylim=(0, 1),
                 aspect="equal")
    plt.close(figure)
    return figure


def plot_curves(history):
    """A figure with a panel for each metric of the history, by epoch."""
    names = [name for name in history[0] if name != "seconds"]
    rows = math.ceil(len(names) / 4)
    figure = plt.figure(figsize=(10, 2.5 * rows), layout="constrained")
    for place, name in enumerate(names, start=1):
        axes = figure.add_subplot(rows, 4, place, title=name, xlabel="epoch")
        axes.plot(range(1, 1 + len(history)), [metrics[name] for metrics in history], ".-")
    plt.close(figure)
    return figure


# The data

def make_data(x_train, y_train, x_test, y_test, source="own data", device="cpu"):
    """Data from arrays, tensors or lists: square images (N, H, H) or (N, H*H), labels (N,) or None.

    Images are integers to 255 or floats to 1, and are copied. ValueError says what is wrong.
    """
    tensors = []
    for part, x, y in ("train", x_train, y_train), ("test", x_test, y_test):
        x, y = np.asarray(x), None if y is None else np.asarray(y)
        side, most = math.isqrt(x[:1].size), 1 if x.dtype.kind == "f" else 255
        if not side or x.shape[1:] not in [(side, side), (side**2,)]:
            raise ValueError(f"x_{part} must be square images, (N, H, H) or (N, H*H): {x.shape}")
        if not 0 <= x.min() <= x.max() <= most or x.max() == 1 < most:
            raise ValueError(f"x_{part} must be integers from 0 to 255 or floats from 0 to 1: "
                             f"{x.dtype} from {x.min()} to {x.max()}")
        if y is not None and (y.shape != (len(x),) or y.dtype.kind not in "iu"):
            raise ValueError(f"y_{part} must be one integer an image, or None: {y.dtype} {y.shape}")
        x = torch.tensor(x.reshape(len(x), -1), dtype=torch.float32, device=device).div_(most)
        tensors += [x, None if y is None else torch.tensor(y, dtype=torch.int64, device=device)]
    if tensors[0].shape[1] != tensors[2].shape[1]:
        raise ValueError("x_train and x_test must be images of one size")
    return Data(*tensors, source)


def load_mnist(root="data", device="cpu"):
    """MNIST from `root`, or downloaded, else scikit-learn's digits; OSError if `root` is unfit."""
    folder, patience = Path(root, "MNIST/raw"), socket.getdefaulttimeout()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        socket.setdefaulttimeout(10)  # seconds; a mirror that never answers must not hang us
        train, test = (MNIST(root, train, download=True) for train in (True, False))
        if train.data.shape[1:] != (28, 28) or train.targets.max() > 9:
            raise ValueError("no 28x28 images with labels from 0 to 9")
        return make_data(train.data, train.targets, test.data, test.targets, "MNIST", device)
    except Exception as error:  # torchvision raises all sorts of them
        downloaded = len([*folder.glob("*-ubyte")]) == 4
        if downloaded or not isinstance(error, (RuntimeError, TimeoutError, ConnectionError)):
            raise OSError(f"{folder} does not hold MNIST ({error}); give another folder, or "
                          "call common.make_data for images of your own") from error
        print(f"WARNING: no download of MNIST, so these are scikit-learn's 8x8 digits: {error!r}")
        return make_data(*bundled_digits(), "scikit-learn's 8x8 digits (NOT MNIST)", device)
    finally:
        socket.setdefaulttimeout(patience)


def bundled_digits():
    """scikit-learn's 1,797 digits of 8x8 pixels, framed as MNIST's: x, y of both parts."""
    x, y = load_digits(return_X_y=True)
    x = torch.tensor(x / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    x = F.pad(F.interpolate(x, size=20, mode="bilinear"), (4, 4, 4, 4)).flatten(1)  # (1797, 784)
    test = np.arange(len(y)) % 6 == 5
    # Ten copies of the 1,498 training images make an epoch long enough to learn something in.
    return x[~test].repeat(10, 1), np.tile(y[~test], 10), x[test], y[test]


# The fitted prior

def fit_mixture(z, n_components, labels=None, n_classes=10):
    """A mixture of Gaussians fitted to codes z (N, z_dim), or one to each label's: a distribution.

    A Gaussian takes 20 codes per dimension, on average; with fewer, N(0, I) is returned.
    """
    groups = [z] if labels is None else [z[labels == k] for k in range(n_classes)]
    n_components = min(n_components, min(map(len, groups)) // (20 * z.shape[1]))
    if n_components == 0:
        print("too few codes to fit a prior: N(0, I) stays")
        return D.Independent(D.Normal(z.new_zeros(len(groups), z.shape[1]).squeeze(0), 1.0), 1)
    # tol ends it after about two steps of EM; all of them would gain 0.06 nats in vae.py. The least
    # variance, reg_covar, keeps single precision stable, whatever the scale of z.
    floor = 1e-5 * z.var().item()
    fits = [GaussianMixture(n_components, tol=1.0, reg_covar=floor, random_state=0)
            .fit(codes.cpu().numpy()) for codes in groups]
    weights, means, covariances = (
        torch.tensor(np.stack([getattr(fit, name) for fit in fits])).to(z).squeeze(0)
        for name in ("weights_", "means_", "covariances_"))
    gaussians = D.MultivariateNormal(means, scale_tril=torch.linalg.cholesky(covariances))
    return D.MixtureSameFamily(D.Categorical(weights), gaussians)


# The plumbing

def positive(text):
    """An argparse type: an integer from 1."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def options(description):
    """A parser of the options that all three scripts have."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--epochs", type=positive, default=15, help="passes over the images")
    parser.add_argument("--batch-size", type=positive, default=128, help="images per step")
    parser.add_argument("--z-dim", type=positive, default=20, help="dimensions of z")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--device", choices=devices, default=devices[0], help="where to compute")
    parser.add_argument("--data", default="data", help="folder of MNIST; downloaded if missing")
    parser.add_argument("--out", default="samples", help="folder for pictures and checkpoint")
    parser.add_argument("--load", metavar="FILE", help="redraw a checkpoint, with its own sizes")
    return parser


def save(args, name, figures, model, history, source):
    """Writes a PNG for each figure to args.out and, if the model was trained, its checkpoint."""
    if not args.load:
        part = Path(args.out, f"{name}.pt.part")  # a full disk must not cost the old checkpoint
        torch.save({"args": vars(args), "data": source, "history": history,
                    "state_dict": model.state_dict()}, part)
        part.replace(Path(args.out, f"{name}.pt"))
    for key, figure in figures.items():
        figure.savefig(Path(args.out, f"{name}_{key}.png"))
    print(f"wrote {len(figures)} pictures to {args.out}")


def load_checkpoint(path, model_class, device="cpu"):
    """(model, history) from a script's checkpoint; OSError if it is not such a file."""
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        args, source, history = (checkpoint[key] for key in ("args", "data", "history"))
        sizes = {key: args[key] for key in ("h_dim", "z_dim", "n_classes") if key in args}
        model = model_class(**sizes).to(device).eval()
        model.load_state_dict(checkpoint["state_dict"])
    except Exception as error:  # torch.load alone fails in a dozen ways
        raise OSError(f"{path} is missing, or no checkpoint of a {model_class.__name__}; "
                      "give a file that its script saved") from error
    print(f"{path} was trained on {source} with", *(f"{key} {args[key]}" for key in args))
    return model, history


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
