"""The conditional beta-VAE: the decoder is told the label, so that we can ask for a digit.

A digit x of class y is drawn from p(x|z, y): the label y names the digit, and z ~ N(0, I) only has
to say how it is written. The encoder q(z|x) does not see y. The loss is reconstruction + beta * KL,

    log p(x|y) >= E_q(z|x)[ log p(x|z, y) ] - KL( q(z|x) || N(0, I) ),

in nats per image. At beta = 1, z holds the digit too, and a random z may contradict the label. At
10, the KL is small: the label is followed, and most of the handwriting is lost. At 1, priors fitted
to the codes of each digit leave few contradictions and holes.

    Higgins et al. 2017, beta-VAE, ICLR, equation 4
    Sohn et al. 2015, Learning Structured Output Representation, NIPS; its encoder sees y
    Kingma and Welling 2013, Auto-Encoding Variational Bayes, arXiv:1312.6114
    Ghosh et al. 2020, From Variational to Deterministic Autoencoders, arXiv:1903.12436, section 4

    python cvae.py --beta 10 --epochs 15  # the defaults; test -ELBO 137.67 ± 0.41 nats
    python cvae.py --beta 1               # 99.47 ± 0.13 nats, 94.92 ± 0.08 with the fitted prior
"""
import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import common


class CVAE(nn.Module):
    """784-400-20 and back: an encoder and a decoder of one hidden layer each."""

    def __init__(self, image_size=784, h_dim=400, z_dim=20, n_classes=10):
        super().__init__()
        self.z_dim = z_dim
        self.n_classes = n_classes
        self.to_hidden = nn.Linear(image_size, h_dim)
        self.to_mu = nn.Linear(h_dim, z_dim)
        self.to_log_var = nn.Linear(h_dim, z_dim)
        self.from_latent = nn.Linear(z_dim + n_classes, h_dim)
        self.to_logits = nn.Linear(h_dim, image_size)
        nn.init.constant_(self.to_logits.bias, -1.9)  # the logit of MNIST's mean pixel, 0.13

    def encode(self, x):
        """x (N, 784) to mu and log_var (N, z_dim): the Gaussian posterior q(z|x)."""
        h = F.relu(self.to_hidden(x))  # (N, h_dim)
        return self.to_mu(h), self.to_log_var(h)

    def logits(self, z, y):
        """z (N, z_dim), one-hot y (N, n_classes) to Bernoulli logits (N, 784), for the loss."""
        return self.to_logits(F.relu(self.from_latent(torch.cat([z, y], dim=1))))

    def decode(self, z, y):
        """The same as probabilities (N, 784): the picture."""
        return torch.sigmoid(self.logits(z, y))

    def forward(self, x, y):
        """x_reconst (N, 784), by one sampled z each, and mu, log_var (N, z_dim)."""
        mu, log_var = self.encode(x)
        return self.decode(reparameterize(mu, log_var), y), mu, log_var


def reparameterize(mu, log_var):
    """z = mu + sigma * noise (N, z_dim): gradients reach mu and sigma. Kingma and Welling, 2.4."""
    return mu + torch.exp(log_var / 2) * torch.randn_like(mu)


def reconstruction(logits, x):
    """-log p(x|...), Bernoulli pixels: summed over them, averaged over images; nats per image."""
    return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)


def gaussian_kl(mu, log_var):
    """KL(q(z|x) || N(0, I)), nats per image. Kingma and Welling, appendix B."""
    return 0.5 * (mu.pow(2) + log_var.exp() - 1 - log_var).sum() / len(mu)


def train(model, data, epochs=15, batch_size=128, lr=8e-3, beta=10.0):
    """Minimises reconstruction + beta * KL; returns the history, a dict of metrics per epoch."""
    if data.y_train is None or data.y_test is None:
        raise ValueError("a conditional VAE needs y_train and y_test: a label for each image")
    n = len(data.x_train)
    y_train = common.one_hot(data.y_train, model.n_classes)  # (N, n_classes)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    history = []
    step = 0
    steps = epochs * math.ceil(n / batch_size)
    for epoch in range(1, epochs + 1):
        model.train()
        start = time.perf_counter()
        total = 0.0
        for batch in torch.randperm(n, device=data.x_train.device).split(batch_size):
            # For a quarter of the steps the learning rate climbs to lr, then it falls to zero.
            climb = min(1, (step + 1) / (0.25 * steps))
            fall = (steps - step) / (0.75 * steps)
            optimizer.param_groups[0]["lr"] = lr * min(climb, fall)
            weight = 1 + (beta - 1) * climb  # of the KL; after Bowman et al. 2015, arXiv:1511.06349

            x = data.x_train[batch]  # (B, 784)
            y = y_train[batch]  # (B, n_classes)
            mu, log_var = model.encode(x)  # (B, z_dim), (B, z_dim)
            z = reparameterize(mu, log_var)  # (B, z_dim)
            recon = reconstruction(model.logits(z, y), x)  # nats per image
            kl = gaussian_kl(mu, log_var)  # nats per image
            loss = recon + weight * kl
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            total += (recon + kl).detach() * len(x)  # on the device: no step waits
        metrics = {"nelbo_train": total.item() / n, "seconds": time.perf_counter() - start}
        history.append({**metrics, **evaluate(model, data)})
        print(f"epoch {epoch:3}", *(f" {name} {value:.3f}" for name, value in history[-1].items()))
    return history


@torch.no_grad()
def evaluate(model, data, prior=None, seed=0):
    """Test metrics, nats per image, by one z each; FloatingPointError if not finite."""
    model.eval()
    y = common.one_hot(data.y_test, model.n_classes)  # (N, n_classes)
    mu, log_var = model.encode(data.x_test)  # (N, z_dim), (N, z_dim)
    generator = torch.Generator("cpu").manual_seed(seed)  # the same draws on any device
    noise = torch.randn(mu.shape, generator=generator, device="cpu").to(mu.device)
    z = mu + torch.exp(log_var / 2) * noise  # (N, z_dim)
    recon = reconstruction(model.logits(z, y), data.x_test).item()
    kl = gaussian_kl(mu, log_var).item()
    if not math.isfinite(recon + kl):
        raise FloatingPointError("the training diverged: the loss is not finite; try a smaller lr")
    metrics = {"recon": recon, "kl": kl, "nelbo": recon + kl}  # nelbo is the -ELBO
    if prior is not None:  # in place of N(0, I)
        log_normal = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum()
        log_prior = sum(own.log_prob(z[data.y_test == k]).sum() for k, own in enumerate(prior))
        metrics["nelbo_fitted"] = recon + kl + (log_normal - log_prior).item() / len(z)
    return metrics


# After training: a prior that fits the codes, and the pictures.

@torch.no_grad()
def fit_prior(model, data, n_components=10):
    """A prior p(z|y) that fits: a list of mixtures, one over the codes of each label's images."""
    codes = torch.cat([reparameterize(*model.encode(x)) for x in data.x_train.split(10000)])
    groups = [codes[data.y_train == k] for k in range(model.n_classes)]
    return [common.fit_mixture(z, n_components) for z in groups]


@torch.no_grad()
def make_figures(model, data, prior, history):
    """This script's pictures: a dict of figures by name."""
    x = data.x_test[:12]
    y = common.one_hot(data.y_test[:12], model.n_classes)
    plot = common.plot_conditional_generation
    return {
        "reconstruction": common.plot_reconstruction(model, x, y),
        "generation": plot(model, title="z ~ N(0, I), the same down a column"),
        "fitted": plot(model, prior=prior, title="z ~ fitted prior of the label"),
        "handwriting": common.plot_handwriting(model, x),
        "loss": common.plot_curves(history)}


def options():
    """The parser of the command line: what this script can be told."""
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--epochs", type=common.count, default=15, help="passes over the training images")
    add("--batch-size", type=common.count, default=128, help="images per step")
    add("--lr", type=common.positive, default=8e-3, help="peak learning rate")
    add("--beta", type=common.weight, default=10.0, help="weight of the KL; 1: the ELBO")
    add("--z-dim", type=common.count, default=20, help="dimensions of z")
    add("--seed", type=int, default=0, help="random seed")
    add("--device", choices=devices, default=devices[0], help="where to compute")
    add("--data", default="data", help="folder of MNIST; downloaded if missing")
    add("--out", default="samples", help="folder for the weights and pictures")
    return parser


def main(argv=()):
    """Trains, saves the weights, fits the prior, evaluates, draws; returns the test metrics."""
    args = options().parse_args(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    data = common.load_mnist(args.data, args.device)
    print(f"{data.source}, {len(data.x_train):,} + {len(data.x_test):,} images, on {args.device}: "
          f"minimises reconstruction + {args.beta:g} * KL")
    torch.manual_seed(args.seed)
    model = CVAE(z_dim=args.z_dim).to(args.device)
    history = train(model, data, args.epochs, args.batch_size, args.lr, args.beta)
    common.save(model.state_dict(), out / "cvae.pt")  # before anything can fail
    prior = fit_prior(model, data)
    metrics = evaluate(model, data, prior)
    print("test", *(f" {name} {value:.3f}" for name, value in metrics.items()))
    for name, figure in make_figures(model, data, prior, history).items():
        figure.savefig(out / f"cvae_{name}.png")
        print("wrote", out / f"cvae_{name}.png")
    return metrics


if __name__ == "__main__":
    common.run(main)
