"""What the three scripts share: options, data, pictures, files. Plumbing only: no model, no loss, no training loop.

Images are rows of 784 pixels in [0, 1], on one device from the start. Pictures are matplotlib Figures, which a notebook
displays and `save` writes.
"""
import argparse
import contextlib
import gzip
import hashlib
import http.client
import io
import math
import os
import sys
import tempfile
import urllib.request
import zlib
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.datasets import MNIST
from torchvision.utils import make_grid

GOOGLE_MIRROR = "https://storage.googleapis.com/cvdf-datasets/mnist/"
EMBEDDED, OWN = "scikit-learn's 8x8 digits (NOT MNIST)", "files of your own"
Data = namedtuple("Data", "x_train y_train x_test y_test source")  # x: (N, 784) floats, y: (N,) integers


# Options: every flag has one default, and bad input ends in one line.

def number(kind, low, high=math.inf, above=False):
    """The argparse type of an int or a float in [low, high], or in (low, high] if `above`; never nan, never inf."""
    allowed = f"{'a whole number' if kind is int else 'a number'} {'above' if above else 'from'} {low}"
    allowed += f" to {high}" if high < math.inf else "" if above else " up"

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or value == math.inf or (above and value == low):
            raise argparse.ArgumentTypeError(f"{text} is not allowed: give {allowed}")
        return value
    return parse


class Parser(argparse.ArgumentParser):
    """The options that all scripts share; a script adds its own with `option`."""

    def __init__(self, script, doc):
        super().__init__(prog=f"{script}.py", description=doc, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        self.script = script
        self.option("--epochs", 15, "passes over the training images", type=number(int, 1, 10**6))
        self.option("--batch-size", 128, "images in a step", type=number(int, 1, 10**6))
        self.option("--z-dim", 20, "dimensions of the Gaussian latent z", type=number(int, 1, 1000))
        self.option("--seed", 0, "same seed, machine, threads: the same figures", type=number(int, 0, 2**32 - 1))
        self.option("--device", "auto", "auto: cuda where there is one", choices=["auto", "cpu", "cuda"])
        self.option("--data", "data", "folder of MNIST; it is downloaded where it is missing")
        self.option("--out", "samples", "folder for the pictures and the checkpoint")
        self.option("--load", None, "do not train: redraw every picture from this checkpoint", metavar="FILE")

    def option(self, flag, default, text, **kwargs):
        self.add_argument(flag, default=default, help=f"{text} (default: %(default)s)", **kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def start(parser, argv=None):
    """Refuses what can be refused before any work; returns the options, the data and --load's checkpoint or None.

    Seeds PyTorch and sets the precision of its matrix products, for the whole process.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    args, checkpoint = parser.parse_args(argv), None
    if args.load is not None:
        checkpoint = load_checkpoint(args.load, parser.script)
        saved = [f"--{name.replace('_', '-')}={value}" for name, value in checkpoint["args"].items()
                 if name in vars(args) and value is not None]
        trained, args = parser.parse_args(saved), parser.parse_args(saved + argv)
        for name in checkpoint["args"]:  # --digit only chooses what is drawn, so it may differ
            if name != "digit" and getattr(args, name, None) != getattr(trained, name, None):
                parser.error(f"argument --{name.replace('_', '-')}: {getattr(args, name)} contradicts {args.load}, "
                             f"trained with {getattr(trained, name)}; leave it out")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: cuda is not allowed: PyTorch finds no CUDA device here; give cpu or auto")
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    try:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except OSError as error:
        raise SystemExit(f"{parser.prog}: cannot write to --out {args.out}: {error.strerror}") from None
    data = load_mnist(args.data, device)
    if checkpoint and checkpoint["source"] != data.source:
        raise SystemExit(f"{parser.prog}: {args.load} was trained on {checkpoint['source']}, but --data {args.data} "
                         f"gives {data.source}")
    print(f"{parser.prog} on {device}, 784-400-{args.z_dim}, {data.source}: {len(data.x_train)} training and "
          f"{len(data.x_test)} test images")
    print(" ".join(f"--{name.replace('_', '-')} {value}" for name, value in vars(args).items() if value is not None))
    torch.manual_seed(args.seed)
    # Faster products of float32 matrices, which may round their factors (to bfloat16, at worst).
    torch.set_float32_matmul_precision("medium")
    return args, data, checkpoint


def run(main):
    """Calls a script's main; Ctrl-C before anything could be saved ends with exit code 130 and one line."""
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted; nothing more was written", file=sys.stderr)
        sys.exit(130)


# Data: MNIST as tensors on the device; no loader, no transform per image.

def load_mnist(root="data", device="cpu"):
    """MNIST from `root`, else from a mirror, else scikit-learn's digits with a warning.

    Returns Data: x_train (60000, 784) and x_test (10000, 784) in [0, 1], y_train and y_test (N,), and the data's name.
    Raises SystemExit with one line when a file is damaged and cannot be replaced.
    """
    folder = Path(root) / "MNIST" / "raw"
    tensors, sources = [], set()
    try:
        for name, md5 in MNIST.resources:  # one after the other, so that no more than one lies in memory twice
            array, source = fetch(folder, name, md5)
            tensors.append(to_tensor(array, device))
            sources.add(source)
    except ConnectionError as error:
        tensors, sources = [to_tensor(array, device) for array in embedded_digits()], {EMBEDDED}
        print(f"WARNING: MNIST is not complete in {folder} and cannot be downloaded ({error}); "
              f"training on {EMBEDDED} instead")
    if {OWN, "MNIST"} <= sources:
        raise SystemExit(f"{folder} mixes files of your own with MNIST's; give all four of your own")
    data = Data(*tensors, sources.pop() if len(sources) == 1 else OWN)
    for x, y in ((data.x_train, data.y_train), (data.x_test, data.y_test)):
        if y.ndim != 1 or x.shape != (len(y), 784) or not len(y) or y.max() > 9:
            raise SystemExit(f"{folder}: these are not 28x28 images with labels from 0 to 9; give another --data")
    return data


def to_tensor(array, device):
    """Images (N, 28, 28) of bytes to (N, 784) floats in [0, 1], labels (N,) to integers."""
    if array.ndim == 3:
        return torch.from_numpy(np.divide(array, 255, dtype=np.float32)).flatten(1).to(device)
    return torch.from_numpy(array.astype(np.int64)).to(device)


def fetch(folder, name, md5):
    """The array of one MNIST file and its source: from its archive, else the file unpacked, else a mirror's archive.

    An archive with torchvision's md5 sum is MNIST; any other whole file of the format is taken for the user's own.
    Raises ConnectionError when the file is nowhere to be had.
    """
    archive, unpacked = folder / name, folder / Path(name).stem
    try:
        if archive.is_file():
            content = archive.read_bytes()
            source = "MNIST" if hashlib.md5(content, usedforsecurity=False).hexdigest() == md5 else OWN
            return read_idx(gzip.decompress(content)), source
        if unpacked.is_file():
            return read_idx(unpacked.read_bytes()), "unpacked files"
        folder.mkdir(parents=True, exist_ok=True)
    except (ValueError, EOFError, zlib.error, gzip.BadGzipFile):
        pass  # damaged: a mirror may mend it
    except OSError as error:
        raise SystemExit(f"cannot use {error.filename}: {error.strerror}; give another folder with --data") from None
    if any((folder / Path(other).stem).exists() and not (folder / other).exists() for other, _ in MNIST.resources):
        raise SystemExit(f"{unpacked} is damaged or missing, and MNIST's is not mixed with unpacked files that may be "
                         "your own; delete these, or put a good copy in its place")
    first, *others = MNIST.mirrors  # the second of torchvision's own has been dead for years
    for url in (first, GOOGLE_MIRROR, *others):
        try:
            with urllib.request.urlopen(url + name, timeout=10) as response:  # no mirror may be silent for longer
                content = response.read()
            if hashlib.md5(content, usedforsecurity=False).hexdigest() == md5:
                print(f"downloaded {url}{name}")
                write_whole(archive, content)
                return read_idx(gzip.decompress(content)), "MNIST"
            reason = f"{url}{name} is not the file it should be"
        except (OSError, http.client.HTTPException) as error:
            reason = f"{url}{name}: {error}"
    for damaged in (archive, unpacked):
        if damaged.exists():
            raise SystemExit(f"{damaged} is damaged and cannot be downloaded again ({reason}); "
                             "delete it, or put a good copy in its place")
    raise ConnectionError(reason)


def read_idx(content):
    """The array in the bytes of an idx file, the format of MNIST; ValueError where they are none."""
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError("not an idx file of bytes")
    shape = np.frombuffer(content, ">i4", count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + shape.nbytes).reshape(shape)


def embedded_digits():
    """scikit-learn's 1,797 digits of 8x8 as x_train, y_train, x_test, y_test in bytes, framed like MNIST's.

    MNIST's digits fill a 20x20 box whose centre of mass is the centre of the 28x28 frame: one affine map does both.
    """
    from sklearn.datasets import load_digits  # here, since most runs never need it
    digits = load_digits()
    x = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]                           # (1797, 1, 8, 8)
    at = (torch.arange(8) + 0.5) / 4 - 1                                                         # pixel centres
    mass = torch.stack([(x[:, 0] * at).sum((1, 2)), (x[:, 0] * at[:, None]).sum((1, 2))], 1) / x.sum((1, 2, 3))[:, None]
    theta = torch.cat([torch.eye(2).expand(len(x), 2, 2) * 28 / 20, mass[:, :, None]], 2)        # (1797, 2, 3)
    x = F.grid_sample(x, F.affine_grid(theta, (len(x), 1, 28, 28), align_corners=False), align_corners=False)
    x, y, test = (x[:, 0] * 255).round().byte().numpy(), digits.target, np.arange(len(x)) % 6 == 5
    # Ten times the 1,498 training images: an epoch worth its name, so that 15 of them give recognisable digits.
    return np.tile(x[~test], (10, 1, 1)), np.tile(y[~test], 10), x[test], y[test]


def one_hot(labels, n_classes=10):
    """(N,) integer labels to (N, n_classes) floats on their device; ValueError for a label out of range."""
    if labels.numel() and not 0 <= labels.min() <= labels.max() < n_classes:
        raise ValueError(f"labels go from {labels.min()} to {labels.max()}: not the classes 0 to {n_classes - 1}")
    return F.one_hot(labels.long(), n_classes).float()


# Training's surroundings: noise of its own for the evaluation, and the log.

@contextlib.contextmanager
def fixed_noise(seed, device):
    """Inside, random numbers start from `seed`; outside, nobody notices: evaluating never changes the training."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def until_ctrl_c(history):
    """Inside, Ctrl-C ends the training, not the script, which then evaluates and saves; a second one ends that too."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\ninterrupted in epoch {len(history) + 1}: saving what has been trained; Ctrl-C again leaves at once")


def log_epoch(history, row, args):
    """Appends a row of figures to the history and prints it as one line; SystemExit if one of them is not finite."""
    epoch = len(history) + 1
    if not all(math.isfinite(value) for value in row.values()):
        raise SystemExit(f"training diverged in epoch {epoch}: the loss is not finite. A smaller --lr than {args.lr:g} "
                         "is the likely cure. Nothing was written.")
    history.append(row)
    shown = {name: value for name, value in row.items() if isinstance(value, float)}  # 80 columns hold no more
    if epoch == 1:
        print("epoch " + " ".join(f"{name:>6}" for name in shown))
    left = f"  {row['seconds'] * (args.epochs - epoch):.0f} s left" if sys.stdout.isatty() else ""
    figures = " ".join(f"{value:{max(6, len(name))}.2f}" for name, value in shown.items())
    print(f"{epoch:5d} {figures}{left}", flush=True)


# Pictures.

def figure(width, height, layout="constrained"):
    """An empty matplotlib Figure, in pixels."""
    from matplotlib.figure import Figure  # here, so that training need not carry it
    return Figure(figsize=(width / 100, height / 100), dpi=100, layout=layout)


def show(images, title="", columns=8, row_labels=()):
    """A Figure with (N, 784) images in [0, 1] in a grid, ink on white; N may be any number."""
    grid = make_grid(images.detach().cpu().reshape(-1, 1, 28, 28), nrow=columns, padding=0)[0].numpy()  # (28 R, 28 C)
    height, width = 2 * grid.shape[0], 2 * grid.shape[1]  # two pixels of the screen for one of the digit: crisp
    left, top = 10 + 8 * max(map(len, row_labels), default=0), 30
    full_width, full_height = max(left + width, 8 * len(title)) + 10, top + height + 10
    fig = figure(full_width, full_height, layout="none")  # every place is given to the pixel
    axes = fig.add_axes((left / full_width, 10 / full_height, width / full_width, height / full_height))
    axes.imshow(grid, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([14 + 28 * row for row in range(len(row_labels))], row_labels)
    axes.tick_params(length=0)
    return fig


def plot_reconstruction(x, probs, columns=10):
    """Test digits (N, 784), each above its reconstruction (N, 784)."""
    rows = [F.pad(row, (0, 0, 0, columns - len(row)))                                           # the last may be short
            for pair in zip(x.split(columns), probs.split(columns)) for row in pair]
    return show(torch.cat(rows), "test digits and their reconstructions", columns,
                ["digit", "reconstruction"] * (len(rows) // 2))


@torch.no_grad()
def plot_generation(model, n=64):
    """n samples from the prior: z ~ N(0, I), then the pixel probabilities of p(x|z)."""
    z = torch.randn(n, model.z_dim, device=next(model.parameters()).device)                      # (n, z_dim)
    return show(torch.sigmoid(model.decode(z)), "samples from the prior", math.ceil(math.sqrt(n)))


@torch.no_grad()
def plot_conditional_generation(model, n=8, fix_number=None, name="digit"):
    """A row a class, a column a z ~ N(0, I), the same z down a column; with fix_number n samples of that class."""
    z = torch.randn(n, model.z_dim, device=next(model.parameters()).device)                      # (n, z_dim)
    classes = range(model.n_classes) if fix_number is None else [fix_number]
    probs = [torch.sigmoid(model.decode(z, one_hot(torch.full_like(z[:, 0], k), model.n_classes))) for k in classes]
    if fix_number is not None:
        return show(probs[0], f"samples of {name} {fix_number}", math.ceil(math.sqrt(n)))
    return show(torch.cat(probs), f"a row a {name}, the same z down a column", n, [f"{name} {k}" for k in classes])


@torch.no_grad()
def plot_manifold(model, mu, labels, n=20):
    """For a z of two numbers: the digits decoded over the plane, beside the posterior means mu (N, 2) by label."""
    at = torch.distributions.Normal(0.0, 1.0).icdf(torch.linspace(0.02, 0.98, n)).to(mu.device)
    z = torch.stack([at.repeat(n), at.flip(0).repeat_interleave(n)], 1)                          # (n * n, 2)
    fig = figure(1200, 600)
    plane, means = fig.subplots(1, 2)
    grid = make_grid(torch.sigmoid(model.decode(z)).cpu().view(-1, 1, 28, 28), nrow=n, padding=0)[0].numpy()
    plane.imshow(grid, cmap="gray_r", vmin=0, vmax=1)
    plane.set(title="the digits over the plane of z, even steps in probability", xticks=[], yticks=[])
    for k in range(10):
        means.scatter(*mu[labels == k].cpu().T.numpy(), s=2, color=f"C{k}", label=k)
    means.set(title="posterior means of the test digits", xlim=(-4, 4), ylim=(-4, 4))
    means.legend(title="digit", markerscale=5)
    return fig


def plot_curves(title, unit, curves):
    """One line per epoch figure: curves maps a label to its values, epoch by epoch."""
    fig = figure(600, 400)
    axes = fig.add_subplot(title=title, xlabel="epoch", ylabel=unit)
    for (label, values), colour in zip(curves.items(), ("#0072B2", "#E69F00", "#009E73", "#CC79A7")):  # Okabe and Ito's
        axes.plot(range(1, len(values) + 1), values, marker=".", color=colour, label=label)
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    return fig


# Files: each appears whole or not at all.

def write_whole(path, content):
    """Writes bytes beside `path`, then moves them there in one step; SystemExit with one line where that fails."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        raise SystemExit(f"cannot write {path}: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def save(path, item):
    """Writes a Figure as a PNG, anything else with torch.save."""
    buffer = io.BytesIO()
    if hasattr(item, "savefig"):
        item.savefig(buffer, format="png")
    else:
        torch.save(item, buffer)
    write_whole(Path(path), buffer.getvalue())


def load_checkpoint(path, script):
    """What `finish` saved for this script; SystemExit with one line where it is anything else."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # tensors and plain values, never code
        if checkpoint["script"] != script:
            raise ValueError(f"it was saved by {checkpoint['script']}.py")
        for part, kind in {"args": dict, "state_dict": dict, "history": list, "source": str}.items():
            if not isinstance(checkpoint[part], kind):
                raise ValueError(f"its {part} are damaged")
        if not all(isinstance(row, dict) and {"train", "loss", "seconds"} <= row.keys()
                   for row in checkpoint["history"]):
            raise ValueError("its history is damaged")
        return checkpoint
    except OSError as error:
        raise SystemExit(f"{script}.py: cannot read {path}: {error.strerror}") from None
    except Exception as error:  # torch.load fails in a dozen ways on a file that is no checkpoint
        why = error if isinstance(error, ValueError) else "it is damaged, or no checkpoint at all"
        raise SystemExit(f"{script}.py: cannot use {path}: {why}; give a file that {script}.py has saved") from None


def restore(model, checkpoint):
    """Puts the checkpoint's weights into the model and returns its history; without a checkpoint, an empty one."""
    if not checkpoint:
        return []
    try:
        model.load_state_dict(checkpoint["state_dict"])
    except (RuntimeError, TypeError, AttributeError):
        raise SystemExit("cannot use the checkpoint: its weights do not fit its options, so it is damaged") from None
    return checkpoint["history"]


def finish(script, args, data, model, history, results, pictures):
    """Writes the checkpoint, unless it was loaded, and the pictures; prints what came out."""
    if not all(map(math.isfinite, results.values())):
        raise SystemExit(f"{script}.py: the figures are not finite: training diverged. Nothing was written.")
    files = {f"{script}_{name}.png": figure for name, figure in pictures.items()}
    if args.load is None:
        places = ("load", "out", "data", "device")
        trained_with = {name: value for name, value in vars(args).items() if name not in places}
        if hasattr(model, "n_classes"):
            trained_with["n_classes"] = model.n_classes
        files = {f"{script}.pt": {"script": script, "args": trained_with, "history": history, "source": data.source,
                                  "state_dict": {name: tensor.cpu() for name, tensor in model.state_dict().items()}},
                 **files}
    print("test " + "  ".join(f"{name} {value:.5g}" for name, value in results.items()))
    for name, item in files.items():
        save(Path(args.out) / name, item)
    print("wrote " + " ".join(str(Path(args.out) / name) for name in files))
    if data.source == EMBEDDED:
        print(f"WARNING: these are figures of {data.source}")
