"""The conditional beta-VAE: the decoder is told the label ("cheating"), so that a digit can be asked for.

A digit x of class y is drawn by p(x, z|y) = p(z) p(x|z, y): the label says which digit, and z ~ N(0, I) need only say
how it is written. The decoder gets the one-hot label beside z; the encoder q(z|x) does not see it. The bound is

    log p(x|y) >= E_q(z|x)[ log p(x|z, y) ] - KL( q(z|x) || p(z) ),

and the loss weighs its KL: reconstruction + beta * KL. A large beta makes every nat in z expensive, so that z leaves to
the label what the label already says: at beta = 1 many samples are not the digit that was asked for, at beta = 10
hardly any, but they are smoother and less varied.

    Higgins et al. 2017, beta-VAE, ICLR, equation 4
    Sohn, Lee and Yan 2015, Learning Structured Output Representation using Deep Conditional Generative Models, NIPS

    python cvae.py --beta 10 --epochs 15  # 1.6 s an epoch on two cores: test -ELBO 143.1 ± 0.3 nats (seeds 0 to 4)
"""
import math
import time

import torch
import torch.nn.functional as F
from torch import nn

import common


class CVAE(nn.Module):
    """784-400-20 and back: encoder q(z|x), decoder p(x|z, y)."""

    def __init__(self, image_size=784, h_dim=400, z_dim=20, n_classes=10):
        super().__init__()
        self.z_dim, self.n_classes = z_dim, n_classes
        self.to_hidden = nn.Linear(image_size, h_dim)
        self.to_mu = nn.Linear(h_dim, z_dim)
        self.to_log_var = nn.Linear(h_dim, z_dim)
        self.from_latent = nn.Linear(z_dim + n_classes, h_dim)
        self.to_logits = nn.Linear(h_dim, image_size)

    def encode(self, x):
        """x (N, 784) to mu and log_var (N, z_dim): the Gaussian posterior q(z|x)."""
        h = F.relu(self.to_hidden(x))                                  # (N, h_dim)
        return self.to_mu(h), self.to_log_var(h)

    def reparameterize(self, mu, log_var):
        """z = mu + sigma * noise (N, z_dim), so that gradients reach mu and sigma. Kingma and Welling, section 2.4."""
        return mu + torch.exp(log_var / 2) * torch.randn_like(mu)

    def decode(self, z, y):
        """z (N, z_dim), one-hot y (N, n_classes) to Bernoulli logits (N, 784); torch.sigmoid of them is the picture."""
        return self.to_logits(F.relu(self.from_latent(torch.cat([z, y], dim=1))))

    def forward(self, x, y):
        """x (N, 784), y (N, n_classes) to logits (N, 784), mu, log_var (N, z_dim), through one sample of z an image."""
        mu, log_var = self.encode(x)
        return self.decode(self.reparameterize(mu, log_var), y), mu, log_var


def reconstruction(logits, x):
    """-log p(x|...) of Bernoulli pixels, from logits (stable): summed over pixels, averaged over images; in nats."""
    return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)


def gaussian_kl(mu, log_var):
    """KL(q(z|x) || N(0, I)): summed over latents, averaged over images; nats. Kingma and Welling 2013, appendix B."""
    return 0.5 * (mu.pow(2) + log_var.exp() - 1 - log_var).sum() / len(mu)


def train(model, data, args, history):
    """Minimises reconstruction + beta * KL; appends a row of figures to the history after every epoch."""
    n, device = len(data.x_train), data.x_train.device
    labels = common.one_hot(data.y_train, model.n_classes)             # (N, n_classes)
    if not history:  # at first the decoder draws the mean image, not grey, which helps short runs; a later call goes on
        with torch.no_grad():
            model.to_logits.bias.copy_(torch.logit(data.x_train.mean(0), eps=1e-3))
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)
    steps = args.epochs * math.ceil(n / args.batch_size)
    # The learning rate climbs for a tenth of the steps, then falls in a straight line to zero.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(10 * (step + 1) / steps, (1 - step / steps) / 0.9))
    for _ in range(args.epochs):
        start, total = time.perf_counter(), torch.zeros((), device=device)
        for batch in torch.randperm(n, device=device).split(args.batch_size):
            x, y = data.x_train[batch], labels[batch]                  # (B, 784), (B, n_classes)
            logits, mu, log_var = model(x, y)                          # (B, 784), (B, z_dim), (B, z_dim)
            recon, kl = reconstruction(logits, x), gaussian_kl(mu, log_var)  # each in nats
            optimizer.zero_grad()
            (recon + args.beta * kl).backward()
            optimizer.step()
            schedule.step()
            total += (recon + kl).detach() * len(x)                    # stays on the device, so no step waits for it
        train_loss = total.item() / n
        seconds = time.perf_counter() - start
        common.log_epoch(history, {"train": train_loss, **evaluate(model, data, args), "seconds": seconds}, args)


@torch.no_grad()
def evaluate(model, data, args):
    """The test figures, in nats per image, with one posterior sample an image; loss is the -ELBO, whatever beta."""
    total, labels = 0, common.one_hot(data.y_test, model.n_classes)
    with common.fixed_noise(args.seed, data.x_test.device):
        for x, y in zip(data.x_test.split(500), labels.split(500)):
            logits, mu, log_var = model(x, y)
            total += torch.stack([reconstruction(logits, x), gaussian_kl(mu, log_var)]) * len(x)
    recon, kl = (total / len(data.x_test)).tolist()
    return {"recon": recon, "kl": kl, "loss": recon + kl}


@torch.no_grad()
def draw(model, data, args, history):
    """The pictures of this script, by name."""
    x, y = data.x_test[:40], common.one_hot(data.y_test[:40], model.n_classes)
    pictures = {"reconstruction": common.plot_reconstruction(x, torch.sigmoid(model(x, y)[0])),
                "generation": common.plot_conditional_generation(model, 10 if args.digit is None else 64, args.digit),
                "loss": common.plot_curves("-ELBO = reconstruction + KL", "nats per image", {
                    "-ELBO, training": [row["train"] for row in history],
                    "-ELBO, test": [row["loss"] for row in history],
                    "reconstruction, test": [row["recon"] for row in history],
                    "KL, test": [row["kl"] for row in history]})}
    return pictures


def options():
    """The parser of the command line: the shared options, and this script's own."""
    parser = common.Parser("cvae", __doc__)
    parser.option("--lr", 8e-3, "peak of Adam's learning rate", type=common.number(float, 0, above=True))
    parser.option("--beta", 10.0, "weight of the KL in training; 1 is the ELBO", type=common.number(float, 0))
    parser.option("--digit", None, "draw samples of this digit alone", type=common.number(int, 0, 9), metavar="D")
    return parser


def main(argv=None):
    """Trains (or loads), evaluates, draws, saves; returns the final test figures."""
    parser = options()
    args, data, checkpoint = common.start(parser, argv)
    model = CVAE(z_dim=args.z_dim).to(data.x_train.device)
    history = common.restore(model, checkpoint)
    if not checkpoint:
        with common.until_ctrl_c(history):
            train(model, data, args, history)
    data = data._replace(x_train=None, y_train=None)  # the largest thing in memory has done its work
    results = {**evaluate(model, data, args), "train_seconds": sum(row["seconds"] for row in history)}
    torch.manual_seed(args.seed)  # the pictures have noise of their own: --load redraws them to the last bit
    common.finish(parser.script, args, data, model, history, results, draw(model, data, args, history))
    return results


if __name__ == "__main__":
    common.run(main)
