"""The variational auto-encoder (VAE): digits with hidden causes, learned by maximising the ELBO.

A digit x is drawn by p(x, z) = p(z) p(x|z): a decoder network turns the code z ~ N(0, I), of 20
numbers, into 784 Bernoulli probabilities, one per pixel. The posterior p(z|x) is out of reach, so
an encoder network approximates it by q(z|x) = N(mu(x), diag(sigma^2(x))). Both are trained to
maximise the evidence lower bound (ELBO),

    log p(x) >= E_q(z|x)[ log p(x|z) ] - KL( q(z|x) || p(z) ),

that is, to minimise -ELBO = reconstruction + KL, in nats per image. The codes of real digits do not
cover N(0, I), so samples from it often are not digits. After training, a mixture of Gaussians
fitted to the codes takes its place.

    Kingma and Welling 2013, Auto-Encoding Variational Bayes, arXiv:1312.6114
    Ghosh et al. 2020, From Variational to Deterministic Autoencoders, arXiv:1903.12436, section 4

    python vae.py  # under a minute on two cores: test -ELBO 101.78 ± 0.09 nats, 97.19 ± 0.03 with
                   # the fitted prior (seeds 0 to 4)
"""
import argparse
import math
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal

import common


class VAE(nn.Module):
    """784-400-20 and back: encoder q(z|x), decoder p(x|z)."""

    def __init__(self, image_size=784, h_dim=400, z_dim=20, mean=0.13):
        super().__init__()
        self.z_dim = z_dim
        self.to_hidden = nn.Linear(image_size, h_dim)
        self.to_mu = nn.Linear(h_dim, z_dim)
        self.to_log_var = nn.Linear(h_dim, z_dim)
        self.from_latent = nn.Linear(z_dim, h_dim)
        self.to_logits = nn.Linear(h_dim, image_size)
        # Start from the mean pixel or, better, the mean image: 0.5 nats less after three epochs.
        self.to_logits.bias.data.copy_(torch.logit(torch.as_tensor(mean), eps=1e-3))

    def encode(self, x):
        """x (N, 784) to mu and log_var (N, z_dim): the Gaussian posterior q(z|x)."""
        h = F.relu(self.to_hidden(x))  # (N, h_dim)
        return self.to_mu(h), self.to_log_var(h)

    def decode(self, z):
        """z (N, z_dim) to Bernoulli logits (N, 784); torch.sigmoid of them is the picture."""
        return self.to_logits(F.relu(self.from_latent(z)))

    def forward(self, x):
        """x (N, 784) to logits (N, 784), by one sampled z each, and mu, log_var (N, z_dim)."""
        mu, log_var = self.encode(x)
        return self.decode(reparameterize(mu, log_var)), mu, log_var


def reparameterize(mu, log_var):
    """z = mu + sigma * noise (N, z_dim): gradients reach mu and sigma. Kingma and Welling, 2.4."""
    return mu + torch.exp(log_var / 2) * torch.randn_like(mu)


def reconstruction(logits, x):
    """-log p(x|...) of Bernoulli pixels: summed over pixels, averaged over images; nats."""
    return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)


def gaussian_kl(mu, log_var):
    """KL(q(z|x) || N(0, I)): summed over latents, averaged over images; nats. Ibid., appendix B."""
    return 0.5 * (mu.pow(2) + log_var.exp() - 1 - log_var).sum() / len(mu)


def train(model, data, epochs=15, batch_size=128, lr=8e-3, beta=1.0, history=None):
    """Minimises reconstruction + beta * KL.

    Returns the history, a list with one dict of metrics per epoch; a list handed in is continued,
    and keeps them even if Ctrl-C ends the training. Raises FloatingPointError if it diverges.
    """
    n, device, history = len(data.x_train), data.x_train.device, [] if history is None else history
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
            x = data.x_train[batch]  # (B, 784)
            logits, mu, log_var = model(x)  # (B, 784), (B, z_dim) twice
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
    for x in data.x_test.split(500):
        mu, log_var = model.encode(x)  # (B, z_dim), (B, z_dim)
        noise = torch.randn(mu.shape, generator=generator).to(mu.device)
        z = mu + torch.exp(log_var / 2) * noise  # (B, z_dim)
        terms = [reconstruction(model.decode(z), x), gaussian_kl(mu, log_var)]
        if prior is not None:
            log_standard, log_prior = Normal(0.0, 1.0).log_prob(z).sum(1), prior.log_prob(z)  # (B,)
            terms.append((log_standard - log_prior).mean())  # nats; negative if it fits better
        total += len(x) * torch.stack(terms)
    recon, kl, *change = (total / len(data.x_test)).tolist()
    if not math.isfinite(recon + kl + sum(change)):
        raise FloatingPointError("the training diverged: the loss is not finite; try a smaller lr")
    results = {"recon": recon, "kl": kl, "loss": recon + kl}
    return results if prior is None else {**results, "loss_fitted": recon + kl + change[0]}


# After training: a prior that fits the codes, and the pictures.

@torch.no_grad()
def fit_prior(model, data, n_components=100):
    """A prior that fits: a mixture of Gaussians over one sampled code of each training image.

    Held-out codes gain only 0.1 nats from 200 components. Returns what common.mixture takes.
    """
    model.eval()
    z = [reparameterize(*model.encode(x)) for x in data.x_train.split(500)]
    return common.fit_mixtures(torch.cat(z), n_components=n_components)


@torch.no_grad()
def draw(model, data, fitted, history, setting=""):
    """This script's pictures: a dict of Figures by name; `setting` ends their titles."""
    x, prior = data.x_test[:12], common.mixture(**fitted)
    standard = Normal(torch.zeros(model.z_dim, device=x.device), 1.0)
    figures = {
        "reconstruction": common.plot_reconstruction(x, torch.sigmoid(model(x)[0])),
        "generation": common.plot_generation(model, standard, f"z ~ N(0, I){setting}"),
        "fitted": common.plot_generation(model, prior, f"z ~ fitted prior{setting}"),
        "loss": common.plot_curves(history)}
    if model.z_dim == 2:  # the whole latent space fits on a page
        codes = reparameterize(*model.encode(data.x_test))  # (N, 2)
        figures["manifold"] = common.plot_manifold(model, codes, data.y_test)
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
    add("--beta", type=number(float, 0, 1e6), default=1.0, help="weight of the KL; 1: the ELBO")
    add("--h-dim", type=number(int, 1, 10**5), default=400, help="units in each hidden layer")
    add("--z-dim", type=number(int, 1, 1000), default=20, help="dimensions of the latent z")
    add("--seed", type=number(int, 0, 10**9), default=0, help="random seed")
    add("--device", choices=devices, default=devices[0], help="where to compute")
    add("--data", default="data", help="folder of MNIST; downloaded if missing")
    add("--out", default="samples", help="folder for the pictures and the checkpoint")
    add("--load", metavar="FILE", help="a checkpoint to redraw instead of training")
    return parser


def main(argv=None):
    """Trains (or loads), evaluates, draws and saves; returns the test metrics."""
    args = options().parse_args(argv)
    out = common.writable_folder(args.out)
    data = common.load_mnist(args.data, args.device)
    torch.manual_seed(args.seed)
    print(data.source, f"{len(data.x_train)} training and {len(data.x_test)} test images", sep=": ")
    if args.load:
        model, checkpoint = common.load_checkpoint(args.load, VAE, args.device)
    else:
        sizes = {"h_dim": args.h_dim, "z_dim": args.z_dim}
        model = VAE(**sizes, mean=data.x_train.mean(0)).to(args.device)
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
        common.save(out / "vae.pt", checkpoint)  # at once: no later failure loses it
    if "prior" not in checkpoint:  # trained just now, or stopped before the fit
        print("fitting the prior to the codes ...", flush=True)
        checkpoint["prior"] = fit_prior(model, data)
    results = evaluate(model, data, common.mixture(**checkpoint["prior"]))
    results["train_seconds"] = sum(epoch["seconds"] for epoch in history)
    print("test " + "  ".join(f"{name} {value:.5g}" for name, value in results.items()))

    torch.manual_seed(args.seed)  # with the same --seed, --load draws the same pictures again
    files = {} if args.load else {"vae.pt": checkpoint}
    setting = f", beta {chosen['beta']:g}"
    figures = draw(model, data, checkpoint["prior"], history, setting)
    files.update({f"vae_{name}.png": figure for name, figure in figures.items()})
    print("wrote", *[common.save(out / name, item) for name, item in files.items()])
    return results


if __name__ == "__main__":
    common.run(main)
