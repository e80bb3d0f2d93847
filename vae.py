"""The variational auto-encoder (VAE): it explains digits by hidden causes, the codes z.

A digit x is drawn in two steps: first a code z of 20 numbers from N(0, I), then 784 pixels from
p(x|z), which a decoder network computes. The posterior p(z|x), the distribution of the codes
that x may come from, has no formula; an encoder network approximates it by q(z|x) = N(mu(x),
diag(sigma^2(x))). Both networks are trained to maximise the evidence lower bound, the ELBO,

    log p(x) >= E_q(z|x)[ log p(x|z) ] - KL( q(z|x) || N(0, I) ),

that is, to minimise -ELBO = reconstruction + KL, in nats per image. The codes of digits are not
spread like N(0, I), and a z from N(0, I) often decodes to no digit. A mixture of Gaussians,
fitted to the codes after training (the fitted prior), follows them more closely.

    Kingma and Welling 2013, Auto-Encoding Variational Bayes, arXiv:1312.6114
    Ghosh et al. 2020, From Variational to Deterministic Autoencoders, arXiv:1903.12436, section 4

    python vae.py  # test -ELBO 101.69 ± 0.12 nats, 96.97 ± 0.09 with the fitted prior
"""
import argparse
import math
import time

import torch
import torch.nn.functional as F
from torch import nn

import common


class VAE(nn.Module):
    """784-400-20 and back: an encoder and a decoder with one hidden layer each."""

    def __init__(self, image_size=784, h_dim=400, z_dim=20):
        super().__init__()
        self.z_dim = z_dim
        self.to_hidden = nn.Linear(image_size, h_dim)
        self.to_mu = nn.Linear(h_dim, z_dim)
        self.to_log_var = nn.Linear(h_dim, z_dim)
        self.from_latent = nn.Linear(z_dim, h_dim)
        self.to_logits = nn.Linear(h_dim, image_size)
        nn.init.constant_(self.to_logits.bias, -1.9)  # the logit of MNIST's mean pixel, 0.13

    def encode(self, x):
        """Maps x (N, 784) to mu and log_var (N, z_dim) of q(z|x), the approximate posterior."""
        h = F.relu(self.to_hidden(x))  # (N, h_dim)
        return self.to_mu(h), self.to_log_var(h)

    def logits(self, z):
        """Maps z (N, z_dim) to pixel logits (N, 784), for the loss."""
        return self.to_logits(F.relu(self.from_latent(z)))

    def decode(self, z):
        """Maps z to the picture (N, 784): each pixel's probability of ink, sigmoid(logits)."""
        return torch.sigmoid(self.logits(z))

    def forward(self, x):
        """Returns x_reconst (N, 784), mu and log_var; one sampled z per image is decoded."""
        mu, log_var = self.encode(x)
        return self.decode(reparameterize(mu, log_var)), mu, log_var


def reparameterize(mu, log_var):
    """Draws z = mu + sigma * noise (N, z_dim), and lets gradients pass. Kingma and Welling, 2.4."""
    return mu + torch.exp(log_var / 2) * torch.randn_like(mu)


def reconstruction(logits, x):
    """Returns -log p(x|...) of Bernoulli pixels in nats: a sum over pixels, a mean over images."""
    return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)


def gaussian_kl(mu, log_var):
    """Returns KL(q(z|x) || N(0, I)), in nats per image. Kingma and Welling, appendix B."""
    return 0.5 * (mu.pow(2) + log_var.exp() - 1 - log_var).sum() / len(mu)


def train(model, data, epochs=15, batch_size=128, lr=8e-3):
    """Minimises reconstruction + KL; returns the history: a list with a dict per epoch.

    Each call is a whole schedule: the learning rate climbs to lr, and then falls to zero.
    """
    common.check_data(data)
    n = len(data.x_train)
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

            x = data.x_train[batch]  # (B, 784)
            mu, log_var = model.encode(x)  # (B, z_dim), (B, z_dim)
            z = reparameterize(mu, log_var)  # (B, z_dim)
            recon = reconstruction(model.logits(z), x)  # nats per image
            kl = gaussian_kl(mu, log_var)  # nats per image
            loss = recon + kl
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
    mu, log_var = model.encode(data.x_test)  # (N, z_dim), (N, z_dim)
    generator = torch.Generator("cpu").manual_seed(0)  # the same draws on any device
    noise = torch.randn(mu.shape, generator=generator, device="cpu").to(mu.device)
    z = mu + torch.exp(log_var / 2) * noise  # (N, z_dim)
    recon = reconstruction(model.logits(z), data.x_test).item()
    kl = gaussian_kl(mu, log_var).item()
    common.check_finite(recon + kl)
    metrics = {"recon": recon, "kl": kl, "nelbo": recon + kl}  # nelbo is the -ELBO
    if prior is not None:
        # In the bound, log r(z) of the fitted prior r takes the place of log N(z; 0, I).
        log_normal = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum()
        log_prior = sum(prior.log_prob(part).sum() for part in z.split(1000))  # to save memory
        metrics["nelbo_fitted"] = recon + kl + (log_normal - log_prior).item() / len(z)
    return metrics


# After training: fit a prior to the codes, and draw the pictures.

@torch.no_grad()
def fit_prior(model, data, n_components=150):
    """Fits a prior r(z), a mixture of Gaussians, to one sampled code per training image."""
    codes = torch.cat([reparameterize(*model.encode(x)) for x in data.x_train.split(10000)])
    return common.fit_mixture(codes, n_components)


@torch.no_grad()
def make_figures(model, data, prior, history):
    """Returns this script's pictures: a dict from name to figure."""
    x = data.x_test[:12]
    figures = {
        "reconstruction": common.plot_reconstruction(model, x),
        "generation": common.plot_generation(model, n=64, title="z ~ N(0, I)"),
        "fitted": common.plot_generation(model, n=64, prior=prior, title="z ~ fitted prior"),
        "loss": common.plot_curves(history)}
    if model.z_dim == 2:  # the whole latent space fits on a page
        codes = reparameterize(*model.encode(data.x_test))  # (N, 2)
        figures["manifold"] = common.plot_manifold(model, codes, data.y_test)
    return figures


def options():
    """The command-line parser, with every option of this script."""
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--epochs", type=common.positive_int, default=15, help="passes over the training images")
    add("--batch-size", type=common.positive_int, default=128, help="images per step")
    add("--lr", type=common.positive_float, default=8e-3, help="peak learning rate")
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
          f"on {args.device}; minimising reconstruction + KL")
    torch.manual_seed(args.seed)
    model = VAE(data.x_train.shape[1], z_dim=args.z_dim).to(args.device)
    history = train(model, data, args.epochs, args.batch_size, args.lr)
    common.save(model.state_dict(), out / "vae.pt")  # before anything else can fail
    print("fitting the prior")
    prior = fit_prior(model, data)
    metrics = evaluate(model, data, prior)
    print("test", *(f" {name} {value:.3f}" for name, value in metrics.items()))
    print("drawing the pictures")
    for name, figure in make_figures(model, data, prior, history).items():
        figure.savefig(out / f"vae_{name}.png")
        print("wrote", out / f"vae_{name}.png")
    return metrics


if __name__ == "__main__":
    common.run(main)
