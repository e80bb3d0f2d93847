"""The conditional beta-VAE: the decoder is told the label, so that we can ask for a digit.

A digit x of class y is drawn by p(x, z|y) = p(z) p(x|z, y): the label says which digit, and z ~ N(0, I) only has to say
how it is written. The decoder gets the one-hot label beside z; the encoder q(z|x) does not see it. The bound is

    log p(x|y) >= E_q(z|x)[ log p(x|z, y) ] - KL( q(z|x) || p(z) ),

and the loss weights its KL: reconstruction + beta * KL. A large beta makes every nat in z expensive, so z leaves to the
label what the label already says: at beta = 1 many samples are not the digit we asked for, at beta = 10 hardly any,
but they are smoother and less varied. A prior p(z|y), fitted to each digit's codes after training, needs no large beta.

    Higgins et al. 2017, beta-VAE, ICLR, equation 4
    Sohn, Lee and Yan 2015, Learning Structured Output Representation using Deep Conditional Generative Models, NIPS
    Ghosh et al. 2020, From Variational to Deterministic Autoencoders, arXiv:1903.12436, section 4 (the fitted prior)

    python cvae.py --beta 10 --epochs 15  # half a minute on two cores: test -ELBO 140.35 ± 0.14 nats (seeds 0 to 4)
    python cvae.py --beta 1               # 99.42 ± 0.10 nats, with the fitted prior 94.97 ± 0.12
"""
import argparse
import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.mixture import GaussianMixture
from torch import nn
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal

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

    def decode(self, z, y):
        """z (N, z_dim), one-hot y (N, n_classes) to Bernoulli logits (N, 784); torch.sigmoid of them is the picture."""
        return self.to_logits(F.relu(self.from_latent(torch.cat([z, y], dim=1))))


def reparameterize(mu, log_var):
    """z = mu + sigma * noise (N, z_dim), so that gradients reach mu and sigma. Kingma and Welling 2013, section 2.4."""
    return mu + torch.exp(log_var / 2) * torch.randn_like(mu)


def reconstruction(logits, x):
    """-log p(x|...) of Bernoulli pixels, from logits for stability: summed over pixels, averaged over images; nats."""
    return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)


def gaussian_kl(mu, log_var):
    """KL(q(z|x) || N(0, I)): summed over latents, averaged over images; nats. Kingma and Welling 2013, appendix B."""
    return 0.5 * (mu.pow(2) + log_var.exp() - 1 - log_var).sum() / len(mu)


def sampled_kl(mu, log_var, z, log_prior):
    """log q(z|x) - log p(z), which estimates the KL to any p from one z per image: averaged over images; nats.

    z (N, z_dim) is drawn from q(z|x), and log_prior (N,) is its log p(z).
    """
    return (Normal(mu, torch.exp(log_var / 2)).log_prob(z).sum(1) - log_prior).mean()


def mixture(weights, means, covariances):
    """Mixtures of K Gaussians for each of C classes, as a distribution over z of batch shape (C,).

    weights (C, K), means (C, K, z_dim), covariances (C, K, z_dim, z_dim).
    """
    return MixtureSameFamily(Categorical(weights), MultivariateNormal(means, covariances))


@torch.no_grad()
def fit_prior(model, data, n_components=10, seed=0):
    """A prior p(z|y) that fits: for each digit a mixture of Gaussians over the codes of its training images.

    Each image gives one z ~ q(z|x). There is one component for every 100 codes of the rarest digit, at least one and at
    most n_components; a digit with fewer than 100 codes shares those of all. (On training codes that were held out, 20
    components gain only 0.1 nats over 10.) Ghosh et al. 2020, section 4.
    """
    with torch.random.fork_rng(devices=[data.x_train.device] if data.x_train.is_cuda else []):
        torch.manual_seed(seed)
        z = torch.cat([reparameterize(*model.encode(x)) for x in data.x_train.split(500)])       # (N, z_dim)
    groups = [z[data.y_train == k] for k in range(model.n_classes)]
    n_components = max(1, min(n_components, min(map(len, groups)) // 100))
    groups = [codes if len(codes) >= 100 else z for codes in groups]
    fits = [GaussianMixture(n_components, tol=1.0, random_state=seed).fit(codes.cpu().numpy()) for codes in groups]
    parameters = [np.stack([getattr(fit, name) for fit in fits]) for name in ("weights_", "means_", "covariances_")]
    return mixture(*[torch.as_tensor(value, dtype=z.dtype, device=z.device) for value in parameters])


def train(model, data, epochs=15, batch_size=128, lr=8e-3, beta=10.0, seed=0):
    """Minimises reconstruction + beta * KL; returns the history, a dict of metrics for each epoch.

    Ctrl-C ends it early, without an error. Raises FloatingPointError if the loss diverges.
    """
    n, device, history = len(data.x_train), data.x_train.device, []
    labels = common.one_hot(data.y_train, model.n_classes)             # (N, n_classes)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    steps = epochs * math.ceil(n / batch_size)
    # The learning rate climbs to lr during the first 15 % of the steps, then falls in a straight line to nearly zero.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1, pct_start=0.15,
                                                   anneal_strategy="linear", cycle_momentum=False)
    try:
        for epoch in range(1, epochs + 1):
            start, total = time.perf_counter(), torch.zeros((), device=device)
            for batch in torch.randperm(n, device=device).split(batch_size):
                x, y = data.x_train[batch], labels[batch]              # (B, 784), (B, n_classes)
                mu, log_var = model.encode(x)                          # (B, z_dim), (B, z_dim)
                logits = model.decode(reparameterize(mu, log_var), y)  # (B, 784)
                recon, kl = reconstruction(logits, x), gaussian_kl(mu, log_var)  # each in nats
                optimizer.zero_grad()
                (recon + beta * kl).backward()
                optimizer.step()
                schedule.step()
                total += (recon + kl).detach() * len(x)                # stays on the device, so no step waits for it
            train_loss = total.item() / n
            seconds = time.perf_counter() - start
            history.append({"train": train_loss, **evaluate(model, data, seed=seed), "seconds": seconds})
            common.log_epoch(epoch, history[-1])
    except KeyboardInterrupt:
        print(f"\ninterrupted in epoch {epoch}: keeping what has been learned; Ctrl-C again quits at once")
    return history


@torch.no_grad()
def evaluate(model, data, prior=None, seed=0):
    """The test metrics, in nats per image, from one z per image sampled with `seed`; loss is the -ELBO for any beta.

    With a prior, such as fit_prior's, loss_fitted is the -ELBO of the model that has it in place of N(0, I).
    The global random state is restored afterwards. Raises FloatingPointError if the training has diverged.
    """
    total, labels = 0, common.one_hot(data.y_test, model.n_classes)
    with torch.random.fork_rng(devices=[data.x_test.device] if data.x_test.is_cuda else []):
        torch.manual_seed(seed)
        for x, y in zip(data.x_test.split(500), labels.split(500)):
            mu, log_var = model.encode(x)
            z = reparameterize(mu, log_var)
            terms = [reconstruction(model.decode(z, y), x), gaussian_kl(mu, log_var)]
            if prior:
                terms.append(sampled_kl(mu, log_var, z, (prior.log_prob(z[:, None]) * y).sum(1)))
            total += len(x) * torch.stack(terms)
    recon, kl, *kl_fitted = (total / len(data.x_test)).tolist()
    if not math.isfinite(recon + kl):
        raise FloatingPointError("the training diverged, and the loss is not finite; try a smaller lr")
    results = {"recon": recon, "kl": kl, "loss": recon + kl}
    return {**results, "loss_fitted": recon + kl_fitted[0]} if prior else results


@torch.no_grad()
def draw(model, data, prior, history, digit=None):
    """The pictures of this script: a dict of Figures by name; with a digit, samples of it alone."""
    x, y, n = data.x_test[:40], common.one_hot(data.y_test[:40], model.n_classes), 10 if digit is None else 64
    mu, log_var = model.encode(x)
    probs = torch.sigmoid(model.decode(reparameterize(mu, log_var), y))
    standard = Normal(torch.zeros_like(mu[0]), 1.0)
    figures = {"reconstruction": common.plot_reconstruction(x, probs),
               "generation": common.plot_conditional_generation(model, standard, "z ~ N(0, I)", n, digit),
               "fitted": common.plot_conditional_generation(model, prior, "z ~ fitted prior", n, digit),
               "loss": common.plot_curves("-ELBO = reconstruction + KL", "nats per image", {
                   "-ELBO, training": [row["train"] for row in history],
                   "-ELBO, test": [row["loss"] for row in history],
                   "reconstruction, test": [row["recon"] for row in history],
                   "KL, test": [row["kl"] for row in history]})}
    return figures


def options():
    """The parser of the command line; each option shows its default under --help."""
    parser = argparse.ArgumentParser(prog="cvae.py", description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, number = parser.add_argument, common.in_range
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    add("--epochs", type=number(int, 1, 10**6), default=15, help="passes over the training images")
    add("--batch-size", type=number(int, 1, 10**6), default=128, help="images per step")
    add("--lr", type=number(float, 1e-9, 1e3), default=8e-3, help="peak learning rate of Adam")
    add("--beta", type=number(float, 0, 1e6), default=10.0, help="weight of the KL in training; 1 is the ELBO")
    add("--h-dim", type=number(int, 1, 10**5), default=400, help="units in each hidden layer")
    add("--z-dim", type=number(int, 1, 1000), default=20, help="dimensions of the Gaussian latent z")
    add("--seed", type=number(int, 0, 10**9), default=0, help="random seed")
    add("--device", choices=devices, default=devices[0], help="where to compute")
    add("--data", default="data", help="folder of MNIST; downloaded if missing")
    add("--out", default="samples", help="folder for the pictures and the checkpoint")
    add("--load", metavar="FILE", help="a checkpoint: redraw the pictures from it instead of training")
    add("--digit", type=number(int, 0, 9), metavar="D", help="draw samples of this digit alone")
    return parser


def main(argv=None):
    """Trains (or loads), evaluates, draws and saves; returns the final test metrics."""
    args = options().parse_args(argv)
    out = common.writable_folder(args.out)
    data = common.load_mnist(args.data, args.device)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("medium")  # matrix products may round to bfloat16: much faster
    print(f"{data.source}: {len(data.x_train)} training and {len(data.x_test)} test images, on {args.device}")
    if args.load:
        model, checkpoint = common.load_checkpoint(args.load, CVAE)
        model.to(args.device)
    else:
        chosen = {name.replace("_", "-"): value for name, value in vars(args).items() if value is not None}
        print(" ".join(f"--{name} {value}" for name, value in chosen.items()))
        model = CVAE(h_dim=args.h_dim, z_dim=args.z_dim).to(args.device)
        model.to_logits.bias.data = torch.logit(data.x_train.mean(0), eps=1e-3)  # start from the mean image, not grey
        history = train(model, data, args.epochs, args.batch_size, args.lr, args.beta, args.seed)
        start = time.perf_counter()
        prior = fit_prior(model, data, seed=args.seed)
        print(f"fitted the prior in {time.perf_counter() - start:.1f} seconds")
        checkpoint = {"args": {**vars(args), "n_classes": model.n_classes}, "history": history,
                      "state_dict": {name: value.cpu() for name, value in model.state_dict().items()},
                      "prior": {"weights": prior.mixture_distribution.probs.cpu(),
                                "means": prior.component_distribution.loc.cpu(),
                                "covariances": prior.component_distribution.covariance_matrix.cpu()}}
    prior, history = mixture(*[value.to(args.device) for value in checkpoint["prior"].values()]), checkpoint["history"]
    results = {**evaluate(model, data, prior, args.seed), "train_seconds": sum(row["seconds"] for row in history)}
    print("test " + "  ".join(f"{name} {value:.5g}" for name, value in results.items()))

    torch.manual_seed(args.seed)  # so that --load draws the same pictures again
    files = {} if args.load else {"cvae.pt": checkpoint}
    files.update({f"cvae_{name}.png": figure for name, figure in draw(model, data, prior, history, args.digit).items()})
    for name, item in files.items():
        common.save(out / name, item)
    print("wrote " + " ".join(str(out / name) for name in files))
    if data.source != "MNIST":
        print(f"WARNING: these are metrics of {data.source}")
    return results


if __name__ == "__main__":
    common.run(main)
