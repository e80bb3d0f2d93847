"""The conditional beta-VAE: the decoder is told the label, so that we can ask for a digit.

A digit x of class y is drawn by p(x, z|y) = p(z) p(x|z, y): the label says which digit, and z ~ N(0, I) only has to say
how it is written. The decoder gets the one-hot label alongside z; the encoder q(z|x) does not see it. The bound is

    log p(x|y) >= E_q(z|x)[ log p(x|z, y) ] - KL( q(z|x) || p(z) ),

and the loss weights its KL: reconstruction + beta * KL. At beta = 1, z still holds the digit, which costs it at most
log 10 = 2.3 nats; a beta of 10 makes this expensive. At 1, a prior p(z|y) fitted to each digit's codes helps too.

    Higgins et al. 2017, beta-VAE, ICLR, equation 4
    Sohn, Lee and Yan 2015, Learning Structured Output Representation using Deep Conditional Generative Models, NIPS
    Ghosh et al. 2020, From Variational to Deterministic Autoencoders, arXiv:1903.12436, section 4 (the fitted prior)

    python cvae.py --beta 10 --epochs 15  # half a minute on two cores: test -ELBO 137.84 ± 0.47 nats (seeds 0 to 4)
    python cvae.py --beta 1               # 99.40 ± 0.07 nats, with the fitted prior 94.96 ± 0.07
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


def train(model, data, epochs=15, batch_size=128, lr=8e-3, beta=10.0, seed=0):
    """Minimises reconstruction + beta * KL; returns the history, a dict of metrics for each epoch.

    Ctrl-C ends it early, without an error. Raises FloatingPointError if the loss diverges.
    """
    n, device, history = len(data.x_train), data.x_train.device, []
    labels = common.one_hot(data.y_train, model.n_classes)             # (N, n_classes)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    steps = epochs * math.ceil(n / batch_size)
    # During the first 15 % of the steps the learning rate climbs to lr, and the weight of the KL from 1 (the ELBO) to
    # beta (after Bowman et al. 2015, arXiv:1511.06349). Then the rate falls in a straight line to nearly zero.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1, pct_start=0.15,
                                                   anneal_strategy="linear", cycle_momentum=False)
    try:
        for epoch in range(1, epochs + 1):
            model.train()
            start, total = time.perf_counter(), torch.zeros((), device=device)
            for batch in torch.randperm(n, device=device).split(batch_size):
                x, y = data.x_train[batch], labels[batch]              # (B, 784), (B, n_classes)
                mu, log_var = model.encode(x)                          # (B, z_dim), (B, z_dim)
                logits = model.decode(reparameterize(mu, log_var), y)  # (B, 784)
                recon, kl = reconstruction(logits, x), gaussian_kl(mu, log_var)  # each in nats
                weight = 1 + (beta - 1) * min(1, schedule.last_epoch / (0.15 * steps))  # last_epoch counts the steps
                optimizer.zero_grad()
                (recon + weight * kl).backward()
                optimizer.step()
                schedule.step()
                total += (recon + kl).detach() * len(x)                # stays on the device, so no step waits for it
            metrics = {"train": total.item() / n, "seconds": time.perf_counter() - start}
            history.append({**metrics, **evaluate(model, data, seed=seed)})
            common.log_epoch(epoch, history[-1])
    except KeyboardInterrupt:
        print(f"\ninterrupted in epoch {epoch}: keeping what has been learned; Ctrl-C again quits at once")
    return history


@torch.no_grad()
def evaluate(model, data, prior=None, seed=0):
    """The test metrics, in nats per image, from one z per image sampled with `seed`; loss is the -ELBO for any beta.

    With a prior, such as fit_prior's, loss_fitted is the -ELBO of the model that has it in place of N(0, I). The global
    random state is restored afterwards. Raises FloatingPointError if the training has diverged.
    """
    model.eval()
    total, standard, labels = 0, Normal(0.0, 1.0), common.one_hot(data.y_test, model.n_classes)
    with torch.random.fork_rng(devices=[data.x_test.device] if data.x_test.is_cuda else []):
        torch.manual_seed(seed)
        for x, y in zip(data.x_test.split(500), labels.split(500)):
            mu, log_var = model.encode(x)
            z = reparameterize(mu, log_var)
            terms = [reconstruction(model.decode(z, y), x), gaussian_kl(mu, log_var)]
            if prior is not None:
                log_prior = (prior.log_prob(z[:, None]) * y).sum(1)    # (B,): of each image's own class
                terms.append((standard.log_prob(z).sum(1) - log_prior).mean())  # nats; negative if it fits better
            total += len(x) * torch.stack(terms)
    recon, kl, *change = (total / len(data.x_test)).tolist()
    if not math.isfinite(recon + kl + sum(change)):
        raise FloatingPointError("the training diverged, and the loss is not finite; try a smaller lr")
    results = {"recon": recon, "kl": kl, "loss": recon + kl}
    return results if prior is None else {**results, "loss_fitted": recon + kl + change[0]}


# After training: a prior that fits the codes, and the pictures.

def mixture(weights, means, covariances):
    """A mixture of K Gaussians as a distribution over z; any dimensions in front of K are a batch of mixtures.

    weights (..., K), means (..., K, z_dim), covariances (..., K, z_dim, z_dim).
    """
    covariances = (covariances + covariances.mT) / 2  # PyTorch rejects what rounding left a little asymmetric
    return MixtureSameFamily(Categorical(weights), MultivariateNormal(means, covariances))


@torch.no_grad()
def fit_prior(model, data, n_components=10, seed=0):
    """A prior p(z|y) that fits: for each digit a mixture of Gaussians over the codes of its training images.

    There are n_components per digit, fewer if under 100 codes each. Held-out codes gain only 0.1 nats from 20.
    """
    model.eval()
    z = torch.cat([reparameterize(*model.encode(x)) for x in data.x_train.split(500)])           # (N, z_dim)
    groups = [z[data.y_train == k].cpu().numpy() for k in range(model.n_classes)]
    n_components = max(1, min(n_components, min(map(len, groups)) // 100))
    floor = 1e-5 * z.var().item()  # the least variance: single precision is stable with it, whatever the scale
    fits = [GaussianMixture(n_components, tol=1.0, reg_covar=floor, random_state=seed).fit(codes) for codes in groups]
    parameters = [np.stack([getattr(fit, name) for fit in fits]) for name in ("weights_", "means_", "covariances_")]
    return mixture(*[torch.as_tensor(value, dtype=z.dtype, device=z.device) for value in parameters])


@torch.no_grad()
def draw(model, data, prior, history, digit=None):
    """The pictures of this script: a dict of Figures by name."""
    x, y, n = data.x_test[:12], common.one_hot(data.y_test[:12], model.n_classes), 10 if digit is None else 64
    probs = torch.sigmoid(model.decode(reparameterize(*model.encode(x)), y))
    standard = Normal(torch.zeros(model.z_dim, device=x.device), 1.0)
    figures = {"reconstruction": common.plot_reconstruction(x, probs),
               "generation": common.plot_conditional_generation(model, standard, "z ~ N(0, I)", n, digit),
               "fitted": common.plot_conditional_generation(model, prior, "z ~ fitted prior", n, digit),
               "loss": common.plot_curves("-ELBO = reconstruction + KL", "nats per image", history, {
                   "train": "-ELBO, train", "loss": "-ELBO, test", "recon": "reconstruction, test", "kl": "KL, test"})}
    return figures


def options():
    """The parser of the command line; each option shows its default under --help."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
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
    add("--load", metavar="FILE", help="a checkpoint: redraw its pictures instead of training")
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
        model, checkpoint = common.load_checkpoint(args.load, CVAE, args.device)
    else:
        print(*[f"--{name.replace('_', '-')} {value}" for name, value in vars(args).items() if value is not None])
        model = CVAE(h_dim=args.h_dim, z_dim=args.z_dim).to(args.device)
        model.to_logits.bias.data = torch.logit(data.x_train.mean(0), eps=1e-3)  # the mean image; helps short runs
        history = train(model, data, epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, beta=args.beta,
                        seed=args.seed)
        checkpoint = {"args": vars(args), "data": data.source, "history": history, "state_dict": model.state_dict()}
        common.save(out / "cvae.pt", checkpoint)  # at once, so that no later failure loses it
    if "prior" not in checkpoint:  # trained just now, or saved by a run that ended before the fit
        prior = fit_prior(model, data, seed=args.seed)
        weights, gaussians = prior.mixture_distribution.probs, prior.component_distribution
        checkpoint["prior"] = {"weights": weights, "means": gaussians.loc, "covariances": gaussians.covariance_matrix}
    prior, history = mixture(**checkpoint["prior"]), checkpoint["history"]
    results = {**evaluate(model, data, prior, args.seed), "train_seconds": sum(row["seconds"] for row in history)}
    print("test " + "  ".join(f"{name} {value:.5g}" for name, value in results.items()))

    torch.manual_seed(args.seed)  # with the same --seed, --load draws the same pictures again
    files = {} if args.load else {"cvae.pt": checkpoint}
    files.update({f"cvae_{name}.png": figure for name, figure in draw(model, data, prior, history, args.digit).items()})
    print("wrote", *[common.save(out / name, item) for name, item in files.items()])
    return results


if __name__ == "__main__":
    common.run(main)
