"""What the three scripts share: first the pictures, then the data, then a little plumbing.

Images are rows of 784 pixels in [0, 1], 1 being ink. Pictures are Figures: a notebook shows one that ends a cell, and
`save` writes it to disk.
"""
import argparse
import inspect
import io
import math
import os
import socket
import sys
import tempfile
from collections import namedtuple
from pathlib import Path

import matplotlib.figure
import torch
import torch.nn.functional as F
import torchvision
from sklearn.datasets import load_digits
from torchvision.utils import make_grid

Data = namedtuple("Data", "x_train y_train x_test y_test source")  # x: (N, 784) floats, y: (N,) integers


class Figure(matplotlib.figure.Figure):
    """matplotlib's Figure, which also shows in a notebook without `%matplotlib inline`: Jupyter asks it for a PNG."""

    def _repr_png_(self):
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def show(images, title="", columns=8, row_labels=()):
    """A Figure with images (N, 784) in a grid, dark ink on white; N may be any number."""
    grid = make_grid(images.detach().cpu().reshape(-1, 1, 28, 28), nrow=columns, padding=0)[0].numpy()  # (28 R, 28 C)
    height, width = 2 * grid.shape[0], 2 * grid.shape[1]  # two screen pixels for each pixel of a digit keep it crisp
    left, top = 10 + 8 * max(map(len, row_labels), default=0), 30
    full_width, full_height = max(left + width, 8 * len(title)) + 10, top + height + 10
    figure = Figure(figsize=(full_width / 100, full_height / 100), dpi=100)
    axes = figure.add_axes((left / full_width, 10 / full_height, width / full_width, height / full_height))
    axes.imshow(grid, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([14 + 28 * row for row in range(len(row_labels))], row_labels)
    axes.tick_params(length=0)
    return figure


def plot_reconstruction(x, probs):
    """A Figure with a row of test digits, x (N, 784), above their reconstructions, probs (N, 784)."""
    return show(torch.cat([x, probs]), "test digits and their reconstructions", len(x), ["digit", "reconstruction"])


@torch.no_grad()
def plot_generation(model, prior, title="samples from the prior", n=64):
    """A Figure with n samples: z from `prior`, a distribution over z, then the pixel probabilities of p(x|z)."""
    z = prior.sample((n,))                                             # (n, z_dim)
    return show(torch.sigmoid(model.decode(z)), title, math.ceil(math.sqrt(n)))


@torch.no_grad()
def plot_conditional_generation(model, prior, title="from the prior", n=10, digit=None, name="digit"):
    """A Figure with one class per row and n columns, or with n samples of a single digit.

    A `prior` shared by all classes gives the same z down each column; if it has the batch shape (n_classes,), each
    class draws from its own.
    """
    z = prior.sample((n,))                                             # (n, z_dim) or (n, n_classes, z_dim)
    z = z if z.dim() == 3 else z[:, None].expand(-1, model.n_classes, -1)
    classes = range(model.n_classes) if digit is None else [digit]
    y = one_hot(torch.arange(model.n_classes, device=z.device), model.n_classes)
    probs = torch.cat([torch.sigmoid(model.decode(z[:, k], y[k].expand(n, -1))) for k in classes])
    if digit is None:
        return show(probs, f"one {name} per row, {title}", n, [f"{name} {k}" for k in classes])
    return show(probs, f"{name} {digit}, {title}", math.ceil(math.sqrt(n)))


@torch.no_grad()
def plot_manifold(model, codes, labels, n=20):
    """For a two-dimensional z: digits decoded over the plane, beside the codes (N, 2), coloured by label (N,)."""
    normal = torch.distributions.Normal(0.0, 1.0)
    ticks = normal.icdf((torch.arange(n, device=codes.device) + 0.5) / n)  # (n,): in equal steps of prior probability
    z = torch.stack([ticks.repeat(n), ticks.flip(0).repeat_interleave(n)], 1)                    # (n * n, 2)
    grid = make_grid(torch.sigmoid(model.decode(z)).cpu().view(-1, 1, 28, 28), nrow=n, padding=0)[0].numpy()
    figure = Figure(figsize=(12, 6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.imshow(grid, cmap="gray_r", vmin=0, vmax=1, extent=(0, 1, 0, 1))
    points = right.scatter(*normal.cdf(codes).cpu().T.numpy(), s=2, c=labels.cpu(), cmap="tab10")
    right.legend(*points.legend_elements(), title="digit", loc="center left", bbox_to_anchor=(1, 0.5))
    left.set(title="digits decoded from z", xlabel="share of N(0, 1) below z[0]", ylabel="share of N(0, 1) below z[1]")
    right.set(title="codes z of test digits", xlim=(0, 1), ylim=(0, 1), xlabel="share of N(0, 1) below z[0]")
    return figure


def plot_curves(title, unit, history, labels):
    """A Figure with one line for each name in `labels`, which maps names of metrics in the history to their labels."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="epoch", ylabel=unit)
    for name, label in labels.items():
        axes.plot(range(1, len(history) + 1), [row[name] for row in history], marker=".", label=label)
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def load_mnist(root="data", device="cpu"):
    """MNIST from the folder `root`, else downloaded to it, else scikit-learn's digits in its place, with a warning.

    Returns Data: x_train (60000, 784) and x_test (10000, 784) in [0, 1], y_train (60000,) and y_test (10000,), all on
    the device, and `source`, their name. Raises OSError if `root` cannot be used or its files are damaged.
    """
    MNIST, folder, timeout = torchvision.datasets.MNIST, Path(root) / "MNIST" / "raw", socket.getdefaulttimeout()
    complete = all((folder / Path(name).stem).exists() for name, _ in MNIST.resources)
    if not complete:
        writable_folder(root)
    try:
        socket.setdefaulttimeout(10)  # seconds; a mirror that never answers must not hang us
        parts = [(part.data, part.targets) for part in (MNIST(root, train, download=True) for train in (True, False))]
        if any(x.shape != (len(y), 28, 28) or not len(y) or y.max() > 9 for x, y in parts):
            raise ValueError("these are not 28x28 images with labels from 0 to 9")
        source = "MNIST"
    except Exception as error:  # torchvision raises all sorts of them
        if complete:
            raise OSError(f"the files in {folder} are damaged, or not MNIST's; delete or move this folder, and MNIST "
                          "will be downloaded again") from error
        parts, source = embedded_digits(), "scikit-learn's 8x8 digits (NOT MNIST)"
        print(f"WARNING: MNIST is not in {folder} and could not be downloaded ({str(error).strip().splitlines()[-1]}); "
              f"using {source} instead")
    finally:
        socket.setdefaulttimeout(timeout)
    tensors = [tensor for x, y in parts for tensor in (x.to(device).flatten(1).float().div_(255), y.to(device))]
    return Data(*tensors, source)


def embedded_digits():
    """scikit-learn's 1,797 digits of 8x8 pixels, framed like MNIST's: bytes (N, 28, 28), labels (N,), both parts."""
    digits = load_digits()
    x = torch.tensor(digits.images * 255 / 16, dtype=torch.float32)[:, None]                     # (1797, 1, 8, 8)
    x = F.pad(F.interpolate(x, size=20, mode="bilinear"), (4, 4, 4, 4))[:, 0].byte()             # (1797, 28, 28)
    y, test = torch.tensor(digits.target), torch.arange(len(x)) % 6 == 5
    # Ten copies of the 1,498 training images make an epoch long enough to learn something in.
    return (x[~test].repeat(10, 1, 1), y[~test].repeat(10)), (x[test], y[test])


def one_hot(labels, n_classes=10):
    """Integer labels (N,) to floats (N, n_classes) on their device; ValueError for a label out of range."""
    if labels.numel() and not 0 <= labels.min() <= labels.max() < n_classes:
        raise ValueError(f"the labels go from {labels.min()} to {labels.max()}, the classes from 0 to {n_classes - 1}")
    return F.one_hot(labels.long(), n_classes).float()


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
    shown = {name: value for name, value in metrics.items() if isinstance(value, float)}  # no room for integers
    if epoch == 1:
        print("epoch " + " ".join(f"{name:>6}" for name in shown))
    print(f"{epoch:5d} " + " ".join(f"{value:{max(6, len(name))}.2f}" for name, value in shown.items()), flush=True)


def writable_folder(path):
    """The Path of a folder, made if missing; OSError if no file can be written there, before any work is done."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise OSError(f"cannot write to the folder {path}: {error.strerror}; choose another one") from None
    return Path(path)


def save(path, item):
    """Writes a Figure as a PNG, anything else with torch.save, whole or not at all; the path, or OSError."""
    buffer, part = io.BytesIO(), Path(f"{path}.{os.getpid()}.part")
    if isinstance(item, matplotlib.figure.Figure):
        item.savefig(buffer, format="png")
    else:
        torch.save(item, buffer)
    try:
        part.write_bytes(buffer.getvalue())
        part.replace(path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}; make room there or choose another folder") from None
    finally:
        part.unlink(missing_ok=True)
    return path


def load_checkpoint(path, model_class, device="cpu"):
    """(model, checkpoint) from a script's file, on the device; OSError if it is unreadable or not such a checkpoint."""
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        sizes = inspect.signature(model_class).parameters
        model = model_class(**{name: value for name, value in checkpoint["args"].items() if name in sizes})
        model.load_state_dict(checkpoint["state_dict"])
        source, epochs = checkpoint["data"], len(checkpoint["history"])
    except OSError as error:
        raise OSError(f"cannot read {path}: {error.strerror}; check the name") from None
    except Exception as error:  # torch.load alone fails in a dozen ways
        raise OSError(f"{path} is not a complete {model_class.__name__} checkpoint; give one that its script "
                      "saved") from error
    print(f"{path} was trained on {source} (epochs: {epochs})")
    return model.to(device).eval(), checkpoint


def run(main):
    """Calls main; file and training errors become one line and exit code 1, all others keep their traceback."""
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted: nothing more was written", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # as in `python vae.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes
        sys.exit(1)
    except (OSError, FloatingPointError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
