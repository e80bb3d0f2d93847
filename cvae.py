"""The conditional beta-VAE: the decoder is told the label, so that we can ask for a digit.

A digit x of class y is drawn by p(x, z|y) = p(z) p(x|z, y): the label says which digit, and
z ~ N(0, I) only has to say how it is written. The decoder gets the one-hot label alongside z; the
encoder q(z|x) does not see it. The bound is

    log p(x|y) >= E_q(z|x)[ log p(x|z, y) ] - KL( q(z|x) || p(z) ),

and the loss weights its KL: reconstruction + beta * KL. At beta = 1, z still holds the digit, and a
random z usually contradicts the label. A beta of 10 makes everything in z expensive, so the decoder
takes the digit from the label, which is free. At 1, a prior p(z|y) fitted to each digit's codes
cures it too, and moves a code from one digit to another: ten digits in a given digit's handwriting.

    Higgins et al. 2017, beta-VAE, ICLR, equation 4
    Sohn, Lee and Yan 2015, Learning Structured Output Representation using Deep Conditional
        Generative Models, NIPS
    Kingma et al. 2014, Semi-supervised Learning with Deep Generative Models, arXiv:1406.5298
    Ghosh et al. 2020, From Variational to Deterministic Autoencoders, arXiv:1903.12436, section 4

    python cvae.py --beta 10 --epochs 15  # the defaults; under a minute on two cores:
                             # test -ELBO 137.65 ± 0.20 nats (seeds 0 to 4)
    python cvae.py --beta 1  # 99.39 ± 0.08 nats, 94.97 ± 0.09 with the fitted prior
"""
import argparse
import math
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal

import common


class CVAE(nn.Module):
    """784-400-20 and back: encoder q(z|x), decoder p(x|z, y)."""

    def __init__(self, image_size=784, h_dim=400, z_dim=20, n_classes=10, mean=0.13):
        super().__init__()
        self.z_dim, self.n_classes = z_dim, n_classes
        self.to_hidden = nn.Linear(image_size, h_dim)
        self.to_mu = nn.Linear(h_dim, z_dim)
        self.to_log_var = nn.Linear(h_dim, z_dim)
        self.from_latent = nn.Linear(z_dim + n_classes, h_dim)
        self.to_logits = nn.Linear(h_dim, image_size)
        # Start from the mean pixel or, better, the mean image: 0.5 nats less after three epochs.
        self.to_logits.bias.data.copy_(torch.logit(torch.as_tensor(mean), eps=1e-3))

    def encode(self, x):
        """x (N, 784) to mu and log_var (N, z_dim): the Gaussian posterior q(z|x)."""
        h = F.relu(self.to_hidden(x))  # (N, h_dim)
        return self.to_mu(h), self.to_log_var(h)

    def decode(self, z, y):
        """z (N, z_dim), one-hot y (N, n_classes) to Bernoulli logits (N, 784)."""
        return self.to_logits(F.relu(self.from_latent(torch.cat([z, y], dim=1))))

    def forward(self, x, y):
        """x, one-hot y to logits (N, 784), by one sampled z each, and mu, log_var (N, z_dim)."""
        mu, log_var = self.encode(x)
        return self.decode(reparameterize(mu, log_var), y), mu, log_var


def reparameterize(mu, log_var):
    """z = mu + sigma * noise (N, z_dim): gradients reach mu and sigma. Kingma and Welling, 2.4."""
    return mu + torch.exp(log_var / 2) * torch.randn_like(mu)


def reconstruction(logits, x):
    """-log p(x|...) of Bernoulli pixels: summed over pixels, averaged over images; nats."""
    return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)


def gaussian_kl(mu, log_var):
    """KL(q(z|x) || N(0, I)): summed over latents, averaged over images; nats. Ibid., appendix B."""
    return 0.5 * (mu.pow(2) + log_var.exp() - 1 - log_var).sum() / len(mu)


def train(model, data, epochs=15, batch_size=128, lr=8e-3, beta=10.0, history=None):
    """Minimises reconstruction + beta * KL.

    Returns the history, a list with one dict of metrics per epoch; a list handed in is continued,
    and keeps them even if Ctrl-C ends the training. Raises FloatingPointError if it diverges.
    """
    n, device, history = len(data.x_train), data.x_train.device, [] if history is None else history
    labels = common.one_hot(data.y_train, model.n_classes)  # (N, n_classes)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    step, steps = 0, epochs * math.ceil(n / batch_size)
    for epoch in range(1, epochs + 1):
        model.train()
        start, total = time.perf_counter(), torch.zeros((), device=device)
        for batch in torch.randperm(n, device=device).split(batch_size):
            # For 15 % of the steps the learning rate climbs to lr, and the weight of the KL from 1
            # to beta (after Bowman et al. 2015); then the rate falls to nearly zero.
            climb, fall = min(1, step / (0.15 * steps)), (steps - step) / (0.85 * steps)
            optimizer.param_groups[0]["lr"] = lr * min(climb + 1 / steps, fall)
            weight = 1 + (beta - 1) * climb
            x, y = data.x_train[batch], labels[batch]  # (B, 784), (B, n_classes)
            logits, mu, log_var = model(x, y)  # (B, 784), (B, z_dim) twice
            recon, kl = reconstruction(logits, x), gaussian_kl(mu, log_var)  # each in nats
            optimizer.zero_grad()
            (recon + weight * kl).backward()
            optimizer.step()
            step += 1
            total += (recon + kl).detach() * len(x)  # stays on the device: no step waits for it
        metrics = {"train": total.item() / n, "seconds": time.perf_counter() - start}
        history.append({**metrics, **evaluate(model, data)})
        common.log_epoch(epoch, history[-1])
    return history


@torch.no_grad()
def evaluate(model, data, prior=None, seed=0):
    """The test metrics, in nats per image; loss is the -ELBO, whatever beta was.

    Each image has one sampled z, by noise that is the same on every device and for every training.
    With a prior, loss_fitted is the -ELBO of the model that has it in place of N(0, I). Raises
    FloatingPointError if the training has diverged.
    """
    model.eval()
    generator, total = torch.Generator().manual_seed(seed), 0
    labels = common.one_hot(data.y_test, model.n_classes)  # (N, n_classes)
    for x, y in zip(data.x_test.split(500), labels.split(500)):
        mu, log_var = model.encode(x)  # (B, z_dim), (B, z_dim)
        noise = torch.randn(mu.shape, generator=generator).to(mu.device)
        z = mu + torch.exp(log_var / 2) * noise  # (B, z_dim)
        terms = [reconstruction(model.decode(z, y), x), gaussian_kl(mu, log_var)]
        if prior is not None:
            log_standard = Normal(0.0, 1.0).log_prob(z).sum(1)  # (B,)
            log_prior = prior.log_prob(z[:, None])[y == 1]  # (B,): of each image's class
            terms.append((log_standard - log_prior).mean())  # nats; negative if it fits better
        total += len(x) * torch.stack(terms)
    recon, kl, *change = (total / len(data.x_test)).tolist()
    if not math.isfinite(recon + kl + sum(change)):
        raise FloatingPointError("the training diverged: the loss is not finite; try a smaller lr")
    results = {"recon": recon, "kl": kl, "loss": recon + kl}
    return results if prior is None else {**results, "loss_fitted": recon + kl + change[0]}


# After training: a prior that fits the codes, and the pictures.

@torch.no_grad()
def fit_prior(model, data, n_components=10):
    """A prior p(z|y) that fits: for each class, a mixture of Gaussians over its training codes.

    Held-out codes gain only 0.1 nats from 20 components. Returns what common.mixture takes.
    """
    model.eval()
    z = [reparameterize(*model.encode(x)) for x in data.x_train.split(500)]
    return common.fit_mixtures(torch.cat(z), data.y_train, model.n_classes, n_components)


@torch.no_grad()
def draw(model, data, fitted, history, setting="", digit=None):
    """This script's pictures: a dict of Figures by name; `setting` ends their titles."""
    x, y, prior = data.x_test[:12], data.y_test[:12], common.mixture(**fitted)
    standard = Normal(torch.zeros(model.z_dim, device=x.device), 1.0)
    probs = torch.sigmoid(model(x, common.one_hot(y, model.n_classes))[0])
    codes = common.transfer(model.encode(x)[0], y, **fitted)  # (12, n_classes, z_dim)
    figures = {"reconstruction": common.plot_reconstruction(x, probs),
               "handwriting": common.plot_handwriting(model, x, codes, setting),
               "loss": common.plot_curves(history)}
    for name, z in ("generation", standard), ("fitted", prior):
        title = f", z ~ {'N(0, I)' if z is standard else 'fitted prior'}{setting}"
        figures[name] = common.plot_conditional_generation(model, z, title)
        if digit is not None:  # beside the picture of all digits
            figures[f"{name}_{digit}"] = common.plot_conditional_generation(
                model, z, title, 64, digit)
    return figures


def options():
    """The parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, number = parser.add_argument, common.in_range
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    add("--epochs", type=number(int, 1, 10**6), default=15, help="passes over the training images")
    add("--batch-size", type=number(int, 1, 10**6), default=128, help="images per step")
    add("--lr", type=number(float, 1e-9, 1e3), default=8e-3, help="peak learning rate of Adam")
    add("--beta", type=number(float, 0, 1e6), default=10.0, help="weight of the KL; 1: the ELBO")
    add("--h-dim", type=number(int, 1, 10**5), default=400, help="units in each hidden layer")
    add("--z-dim", type=number(int, 1, 1000), default=20, help="dimensions of the latent z")
    add("--seed", type=number(int, 0, 10**9), default=0, help="random seed")
    add("--device", choices=devices, default=devices[0], help="where to compute")
    add("--data", default="data", help="folder of MNIST; downloaded if missing")
    add("--out", default="samples", help="folder for the pictures and the checkpoint")
    add("--load", metavar="FILE", help="a checkpoint to redraw instead of training")
    add("--digit", type=number(int, 0, 9), metavar="D", help="draw samples of this digit alone")
    return parser


def main(argv=None):
    """Trains (or loads), evaluates, draws and saves; returns the test metrics."""
    args = options().parse_args(argv)
    out = common.writable_folder(args.out)
    data = common.load_mnist(args.data, args.device)
    torch.manual_seed(args.seed)
    print(data.source, f"{len(data.x_train)} training and {len(data.x_test)} test images", sep=": ")
    if args.load:
        model, checkpoint = common.load_checkpoint(args.load, CVAE, args.device)
    else:
        sizes = {"h_dim": args.h_dim, "z_dim": args.z_dim}
        model = CVAE(**sizes, mean=data.x_train.mean(0)).to(args.device)
        checkpoint = {"args": vars(args), "data": data.source, "history": []}
    chosen, history = checkpoint["args"], checkpoint["history"]
    print(*[f"--{name.replace('_', '-')} {value}" for name, value in chosen.items()
            if value is not None])
    if not args.load:
        try:
            train(model, data, epochs=args.epochs, batch_size=args.batch_size, lr=args.lr,
                  beta=args.beta, history=history)
        except KeyboardInterrupt:
            print("\ninterrupted: what was learned is kept; Ctrl-C again quits")
        checkpoint["state_dict"] = model.state_dict()
        common.save(out / "cvae.pt", checkpoint)  # at once: no later failure loses it
    if "prior" not in checkpoint:  # trained just now, or stopped before the fit
        print("fitting the prior to the codes ...", flush=True)
        checkpoint["prior"] = fit_prior(model, data)
    results = evaluate(model, data, common.mixture(**checkpoint["prior"]))
    results["train_seconds"] = sum(epoch["seconds"] for epoch in history)
    print("test " + "  ".join(f"{name} {value:.5g}" for name, value in results.items()))

    torch.manual_seed(args.seed)  # with the same --seed, --load draws the same pictures again
    files = {} if args.load else {"cvae.pt": checkpoint}
    setting = f", beta {chosen['beta']:g}"
    figures = draw(model, data, checkpoint["prior"], history, setting, args.digit)
    files.update({f"cvae_{name}.png": figure for name, figure in figures.items()})
    print("wrote", *[common.save(out / name, item) for name, item in files.items()])
    return results


if __name__ == "__main__":
    common.run(main)
