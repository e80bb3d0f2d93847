"""The conditional beta-VAE: the decoder is told the label, so that we can ask for a digit.

A digit x of class y is drawn from p(x|z, y): the label y names the digit, so z ~ N(0, I) only has
to say how it is written. The encoder q(z|x) does not see y. At beta = 1, the loss is minus the
evidence lower bound, the ELBO:

    log p(x|y) >= E_q(z|x)[ log p(x|z, y) ] - KL( q(z|x) || N(0, I) ),

and in general the loss is reconstruction + beta * KL, in nats per image. At beta = 1, z holds the
digit, too, and a drawing from a random z may contradict its label. At beta = 10 the KL is small:
drawings follow the label, but most of the handwriting is lost. If z comes from the label's own
prior, fitted to the codes of that digit, there are few contradictions even at beta = 1.

    Higgins et al. 2017, beta-VAE, ICLR, equation 4
    Sohn et al. 2015, Learning Structured Output Representation, NIPS; its encoder sees y, too
    Kingma and Welling 2013, Auto-Encoding Variational Bayes, arXiv:1312.6114
    Ghosh et al. 2020, From Variational to Deterministic Autoencoders, arXiv:1903.12436, section 4

    python cvae.py --beta 10 --epochs 15  # the defaults; test -ELBO 137.64 ± 0.29 nats
    python cvae.py --beta 1 --out samples/beta1  # 99.45 ± 0.13; fitted priors: 94.90 ± 0.09
"""
import argparse
import math
import time

import torch
import torch.nn.functional as F
from torch import nn

import common


class CVAE(nn.Module):
    """784-400-20 for z, 30-400-784 for the picture; each network has one hidden layer."""

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
        """Maps x (N, 784) to mu and log_var (N, z_dim) of q(z|x), the approximate posterior."""
        h = F.relu(self.to_hidden(x))  # (N, h_dim)
        return self.to_mu(h), self.to_log_var(h)

    def logits(self, z, y):
        """Maps z (N, z_dim) and one-hot y (N, n_classes) to pixel logits (N, 784)."""
        return self.to_logits(F.relu(self.from_latent(torch.cat([z, y], dim=1))))

    def decode(self, z, y):
        """Maps z and y to the picture (N, 784): each pixel's probability of ink."""
        return torch.sigmoid(self.logits(z, y))

    def forward(self, x, y):
        """Returns x_reconst (N, 784), mu and log_var; one sampled z per image is decoded."""
        mu, log_var = self.encode(x)
        return self.decode(reparameterize(mu, log_var), y), mu, log_var


def reparameterize(mu, log_var):
    """Draws z = mu + sigma * noise (N, z_dim), and lets gradients pass. Kingma and Welling, 2.4."""
    return mu + torch.exp(log_var / 2) * torch.randn_like(mu)


def reconstruction(logits, x):
    """Returns -log p(x|...) of Bernoulli pixels in nats: a sum over pixels, a mean over images."""
    return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)


def gaussian_kl(mu, log_var):
    """Returns KL(q(z|x) || N(0, I)), in nats per image. Kingma and Welling, appendix B."""
    return 0.5 * (mu.pow(2) + log_var.exp() - 1 - log_var).sum() / len(mu)


def train(model, data, epochs=15, batch_size=128, lr=8e-3, beta=10.0):
    """Minimises reconstruction + beta * KL; returns the history: a list with a dict per epoch.

    Each call is a whole schedule: the learning rate climbs to lr, and then falls to zero.
    """
    if data.y_train is None or data.y_test is None:
        raise ValueError("a conditional VAE needs y_train and y_test: a label for each image")
    common.check_data(data, model.n_classes)
    n = len(data.x_train)
    y_train = common.one_hot(data.y_train, model.n_classes)  # (N, n_classes)
    # fused=True updates all weights in one kernel, which saves a tenth of the time, or more.
    optimizer = torch.optim.Adam(model.parameters(), lr, fused=True)
    history = []
    step = 0
    steps = epochs * math.ceil(n / batch_size)
    for epoch in range(1, epochs + 1):
        model.train()
        start = time.perf_counter()
        total = 0.0
        for batch in torch.randperm(n, device=data.x_train.device).split(batch_size):
            # The learning rate climbs to lr over a quarter of the steps, then falls to zero.
            climb = min(1, (step + 1) / (0.25 * steps))
            fall = (steps - step) / (0.75 * steps)
            optimizer.param_groups[0]["lr"] = lr * min(climb, fall)
            # The weight of the KL climbs from 1 to beta; at beta = 10, this lowers -ELBO by 2.4.
            kl_weight = 1 + (beta - 1) * climb  # after Bowman et al. 2015, arXiv:1511.06349

            x = data.x_train[batch]  # (B, 784)
            y = y_train[batch]  # (B, n_classes)
            mu, log_var = model.encode(x)  # (B, z_dim), (B, z_dim)
            z = reparameterize(mu, log_var)  # (B, z_dim)
            recon = reconstruction(model.logits(z, y), x)  # nats per image
            kl = gaussian_kl(mu, log_var)  # nats per image
            loss = recon + kl_weight * kl
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            total += (recon + kl).detach() * len(x)  # .item() here would wait for the GPU
        metrics = {"nelbo_train": total.item() / n, "seconds": time.perf_counter() - start}
        history.append({**metrics, **evaluate(model, data)})
        print(f"epoch {epoch:3}", *(f" {name} {value:.3f}" for name, value in history[-1].items()))
    return history


@torch.no_grad()
def evaluate(model, data, prior=None):
    """Scores test images with one z each, in nats per image; leaves the model in eval mode.

    Raises FloatingPointError if a score is not finite.
    """
    model.eval()
    y = common.one_hot(data.y_test, model.n_classes)  # (N, n_classes)
    mu, log_var = model.encode(data.x_test)  # (N, z_dim), (N, z_dim)
    generator = torch.Generator("cpu").manual_seed(0)  # the same draws on any device
    noise = torch.randn(mu.shape, generator=generator, device="cpu").to(mu.device)
    z = mu + torch.exp(log_var / 2) * noise  # (N, z_dim)
    recon = reconstruction(model.logits(z, y), data.x_test).item()
    kl = gaussian_kl(mu, log_var).item()
    common.check_finite(recon + kl)
    metrics = {"recon": recon, "kl": kl, "nelbo": recon + kl}  # nelbo is the -ELBO
    if prior is not None:
        # In the bound, log r(z) of the fitted prior r takes the place of log N(z; 0, I).
        log_normal = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum()
        log_r = torch.stack([mixture.log_prob(z) for mixture in prior])  # (n_classes, N)
        log_prior = log_r.gather(0, data.y_test[None]).sum()  # each z under its label's prior
        metrics["nelbo_fitted"] = recon + kl + (log_normal - log_prior).item() / len(z)
    return metrics


# After training: fit a prior to the codes, and draw the pictures.

@torch.no_grad()
def fit_prior(model, data, n_components=10):
    """For each label y, fits a mixture r(z|y) to the codes of its images; returns a list."""
    codes = torch.cat([reparameterize(*model.encode(x)) for x in data.x_train.split(10000)])
    groups = [codes[data.y_train == k] for k in range(model.n_classes)]
    return [common.fit_mixture(z, n_components, f"prior of y = {k}") for k, z in enumerate(groups)]


@torch.no_grad()
def make_figures(model, data, prior, history):
    """Returns this script's pictures: a dict from name to figure."""
    x = data.x_test[:12]
    y = common.one_hot(data.y_test[:12], model.n_classes)
    plot = common.plot_conditional_generation
    return {
        "reconstruction": common.plot_reconstruction(model, x, y),
        "generation": plot(model, title="z ~ N(0, I), one per column"),
        "fitted": plot(model, prior=prior, title="z ~ fitted prior of the label"),
        "handwriting": common.plot_handwriting(
            model, x, prior, data.y_test[:12], "input, then its mu moved to each y"),
        "loss": common.plot_curves(history)}


def options():
    """The command-line parser, with every option of this script."""
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--epochs", type=common.positive_int, default=15, help="passes over the training images")
    add("--batch-size", type=common.positive_int, default=128, help="images per step")
    add("--lr", type=common.positive_float, default=8e-3, help="peak learning rate")
    add("--beta", type=common.nonnegative_float, default=10.0, help="weight of the KL")
    add("--z-dim", type=common.positive_int, default=20, help="dimensions of z")
    add("--seed", type=int, default=0, help="random seed")
    add("--device", choices=devices, default=devices[0], help="device to run on")
    add("--data", default="data", help="folder for MNIST, downloaded if missing")
    add("--out", default="samples", help="folder for the weights and pictures")
    return parser


def main(argv=()):
    """Trains, saves the weights, fits the prior, evaluates, draws; returns the test metrics."""
    args = options().parse_args(argv)
    out = common.results_folder(args.out)
    data = common.load_mnist(args.data, args.device)
    print(f"{data.source}: {len(data.x_train):,} training and {len(data.x_test):,} test images, "
          f"on {args.device}; minimising reconstruction + {args.beta:g} * KL")
    torch.manual_seed(args.seed)
    n_classes = 1 + max(data.y_train.max(), data.y_test.max()).item()
    model = CVAE(data.x_train.shape[1], z_dim=args.z_dim, n_classes=n_classes).to(args.device)
    history = train(model, data, args.epochs, args.batch_size, args.lr, args.beta)
    common.save(model.state_dict(), out / "cvae.pt")  # before anything else can fail
    print("fitting the prior")
    prior = fit_prior(model, data)
    metrics = evaluate(model, data, prior)
    print("test", *(f" {name} {value:.3f}" for name, value in metrics.items()))
    print("drawing the pictures")
    for name, figure in make_figures(model, data, prior, history).items():
        figure.savefig(out / f"cvae_{name}.png")
        print("wrote", out / f"cvae_{name}.png")
    return metrics


if __name__ == "__main__":
    common.run(main)
