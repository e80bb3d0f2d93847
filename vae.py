"""The variational auto-encoder (VAE): a model of MNIST's digits with hidden causes, trained by maximising the ELBO.

A digit x is drawn by p(x, z) = p(z) p(x|z): the code z ~ N(0, I) has 20 numbers, and a decoder network turns it into
784 Bernoulli probabilities, one per pixel. The posterior p(z|x) is out of reach, so an encoder network approximates it
by q(z|x) = N(mu(x), diag(sigma^2(x))). Both are trained to maximise the evidence lower bound (ELBO),

    log p(x) >= E_q(z|x)[ log p(x|z) ] - KL( q(z|x) || p(z) ),

that is, to minimise -ELBO = reconstruction + KL, here in nats per image. (MNIST's pixels are grey: x stands for any
black-and-white image drawn from them.) The codes of real digits do not cover N(0, I), so samples from it often are not
digits. After training, a mixture of Gaussians fitted to the codes replaces it.

    Kingma and Welling 2013, Auto-Encoding Variational Bayes, arXiv:1312.6114
    Ghosh et al. 2020, From Variational to Deterministic Autoencoders, arXiv:1903.12436, section 4 (the fitted prior)

    python vae.py  # half a minute on two cores: test -ELBO 101.65 ± 0.12 nats, with the fitted prior 97.09 ± 0.06
"""
import argparse
import math
import time

import torch
import torch.nn.functional as F
from sklearn.mixture import GaussianMixture
from torch import nn
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal

import common


class VAE(nn.Module):
    """784-400-20 and back: encoder q(z|x), decoder p(x|z)."""

    def __init__(self, image_size=784, h_dim=400, z_dim=20):
        super().__init__()
        self.z_dim = z_dim
        self.to_hidden = nn.Linear(image_size, h_dim)
        self.to_mu = nn.Linear(h_dim, z_dim)
        self.to_log_var = nn.Linear(h_dim, z_dim)
        self.from_latent = nn.Linear(z_dim, h_dim)
        self.to_logits = nn.Linear(h_dim, image_size)

    def encode(self, x):
        """x (N, 784) to mu and log_var (N, z_dim): the Gaussian posterior q(z|x)."""
        h = F.relu(self.to_hidden(x))                                  # (N, h_dim)
        return self.to_mu(h), self.to_log_var(h)

    def decode(self, z):
        """z (N, z_dim) to Bernoulli logits (N, 784); torch.sigmoid of them is the picture."""
        return self.to_logits(F.relu(self.from_latent(z)))


def reparameterize(mu, log_var):
    """z = mu + sigma * noise (N, z_dim), so that gradients reach mu and sigma. Kingma and Welling 2013, section 2.4."""
    return mu + torch.exp(log_var / 2) * torch.randn_like(mu)


def reconstruction(logits, x):
    """-log p(x|...) of Bernoulli pixels, from logits for stability: summed over pixels, averaged over images; nats."""
    return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)


def gaussian_kl(mu, log_var):
    """KL(q(z|x) || N(0, I)): summed over latents, averaged over images; nats. Kingma and Welling 2013, appendix B."""
    return 0.5 * (mu.pow(2) + log_var.exp() - 1 - log_var).sum() / len(mu)


def train(model, data, epochs=15, batch_size=128, lr=8e-3, beta=1.0, seed=0):
    """Minimises reconstruction + beta * KL; returns the history, a dict of metrics for each epoch.

    Ctrl-C ends it early, without an error. Raises FloatingPointError if the loss diverges.
    """
    n, device, history = len(data.x_train), data.x_train.device, []
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
                x = data.x_train[batch]                                # (B, 784)
                mu, log_var = model.encode(x)                          # (B, z_dim), (B, z_dim)
                logits = model.decode(reparameterize(mu, log_var))     # (B, 784)
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
    total, standard = 0, Normal(0.0, 1.0)
    with torch.random.fork_rng(devices=[data.x_test.device] if data.x_test.is_cuda else []):
        torch.manual_seed(seed)
        for x in data.x_test.split(500):
            mu, log_var = model.encode(x)
            z = reparameterize(mu, log_var)
            terms = [reconstruction(model.decode(z), x), gaussian_kl(mu, log_var)]
            if prior is not None:
                log_prior = prior.log_prob(z)                          # (B,)
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
def fit_prior(model, data, n_components=100, seed=0):
    """A prior that fits: a mixture of n_components Gaussians (fewer if under 100 codes each) over training codes.

    Each image gives one z ~ q(z|x). Held-out codes gain only 0.1 nats from 200 components. Ghosh et al. 2020.
    """
    model.eval()
    z = torch.cat([reparameterize(*model.encode(x)) for x in data.x_train.split(500)])           # (N, z_dim)
    n_components = max(1, min(n_components, len(z) // 100))
    floor = 1e-5 * z.var().item()  # the least variance: single precision is stable with it, whatever the scale
    fit = GaussianMixture(n_components, tol=1.0, reg_covar=floor, random_state=seed).fit(z.cpu().numpy())
    parameters = fit.weights_, fit.means_, fit.covariances_
    return mixture(*[torch.as_tensor(value, dtype=z.dtype, device=z.device) for value in parameters])


@torch.no_grad()
def draw(model, data, prior, history):
    """The pictures of this script: a dict of Figures by name."""
    x = data.x_test[:12]
    probs = torch.sigmoid(model.decode(reparameterize(*model.encode(x))))
    standard = Normal(torch.zeros(model.z_dim, device=x.device), 1.0)
    figures = {"reconstruction": common.plot_reconstruction(x, probs),
               "generation": common.plot_generation(model, standard, "samples from the prior N(0, I)"),
               "fitted": common.plot_generation(model, prior, "samples from the fitted prior"),
               "loss": common.plot_curves("-ELBO = reconstruction + KL", "nats per image", history, {
                   "train": "-ELBO, train", "loss": "-ELBO, test", "recon": "reconstruction, test", "kl": "KL, test"})}
    if model.z_dim == 2:  # the whole latent space fits on a page
        figures["manifold"] = common.plot_manifold(model, reparameterize(*model.encode(data.x_test)), data.y_test)
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
    add("--beta", type=number(float, 0, 1e6), default=1.0, help="weight of the KL in training; 1 is the ELBO")
    add("--h-dim", type=number(int, 1, 10**5), default=400, help="units in each hidden layer")
    add("--z-dim", type=number(int, 1, 1000), default=20, help="dimensions of the Gaussian latent z")
    add("--seed", type=number(int, 0, 10**9), default=0, help="random seed")
    add("--device", choices=devices, default=devices[0], help="where to compute")
    add("--data", default="data", help="folder of MNIST; downloaded if missing")
    add("--out", default="samples", help="folder for the pictures and the checkpoint")
    add("--load", metavar="FILE", help="a checkpoint: redraw its pictures instead of training")
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
        model, checkpoint = common.load_checkpoint(args.load, VAE, args.device)
    else:
        print(*[f"--{name.replace('_', '-')} {value}" for name, value in vars(args).items() if value is not None])
        model = VAE(h_dim=args.h_dim, z_dim=args.z_dim).to(args.device)
        model.to_logits.bias.data = torch.logit(data.x_train.mean(0), eps=1e-3)  # the mean image; helps short runs
        history = train(model, data, epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, beta=args.beta,
                        seed=args.seed)
        checkpoint = {"args": vars(args), "data": data.source, "history": history, "state_dict": model.state_dict()}
        common.save(out / "vae.pt", checkpoint)  # at once, so that no later failure loses it
    if "prior" not in checkpoint:  # trained just now, or saved by a run that ended before the fit
        prior = fit_prior(model, data, seed=args.seed)
        weights, gaussians = prior.mixture_distribution.probs, prior.component_distribution
        checkpoint["prior"] = {"weights": weights, "means": gaussians.loc, "covariances": gaussians.covariance_matrix}
    prior, history = mixture(**checkpoint["prior"]), checkpoint["history"]
    results = {**evaluate(model, data, prior, args.seed), "train_seconds": sum(row["seconds"] for row in history)}
    print("test " + "  ".join(f"{name} {value:.5g}" for name, value in results.items()))

    torch.manual_seed(args.seed)  # with the same --seed, --load draws the same pictures again
    files = {} if args.load else {"vae.pt": checkpoint}
    files.update({f"vae_{name}.png": figure for name, figure in draw(model, data, prior, history).items()})
    print("wrote", *[common.save(out / name, item) for name, item in files.items()])
    return results


if __name__ == "__main__":
    common.run(main)
