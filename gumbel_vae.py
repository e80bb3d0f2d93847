"""The Gumbel VAE: a categorical latent c beside z, with which the model sorts the digits by itself, without a label.

A digit is drawn by p(x, z, c) = p(c) p(z) p(x|z, c), with c uniform over ten clusters; q(z|x) q(c|x) infers z and c.
The Gumbel-softmax samples a one-hot c and can pass the decoder's gradient on to q(c|x). By default, though, it only
samples: taught by the decoder, c would group digits that merely look alike. The gradient of the `clustering` term alone
finds the clusters, and the VAE learns to draw them. The bound has one term more than the VAE's,

    -ELBO = reconstruction + KL(z) + KL(c),    KL(c) = KL( q(c|x) || p(c) ) = I(x; c) + KL( q(c) || p(c) ) on average,

with q(c) the average of q(c|x), and I the mutual information. --objective chooses what becomes of KL(c):

    elbo      It stays. The bound charges for what c knows of x, z can say the same at the same price, and in practice c
              ends up knowing next to nothing.
    capacity  Both KLs are held at capacities. Now c must be sure, but nothing says of what: slant or width will do.
    mi        I(x; c) changes its sign, and c must stay the same when x is warped to Tx: KL(c) becomes
              KL( q(c|x) || q(c|Tx) ) + 0.1 H(c|x) - 0.5 H(c) = KL( q(c|x) || q(c|Tx) ) - 0.1 I(x; c) - 0.4 H(c).
              After a third of the epochs there are two warps of each image, and the codes get a say: in the KL, the
              left q(c|x) is multiplied by p(z|c)^0.3, where p(z|c) is a prior fitted to each cluster.

    Jang, Gu and Poole 2016, Categorical Reparameterization with Gumbel-Softmax, arXiv:1611.01144
    Dupont 2018, Learning Disentangled Joint Continuous and Discrete Representations, arXiv:1804.00104, equation 7
    Hu et al. 2017, Learning Discrete Representations via Information Maximizing Self-Augmented Training (IMSAT),
    arXiv:1702.08720
    Ghosh et al. 2020, From Variational to Deterministic Autoencoders, arXiv:1903.12436, section 4 (the fitted prior)

    python gumbel_vae.py  # a minute on two cores: ACC 0.9850 ± 0.0006, NMI 0.960 ± 0.001 (seeds 0 to 4)
"""
import argparse
import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix
from sklearn.mixture import GaussianMixture
from torch import nn
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal

import common


class GumbelVAE(nn.Module):
    """784-400-20 and back, with 784-400-10 for the cluster: encoder q(z|x) q(c|x), decoder p(x|z, c)."""

    def __init__(self, image_size=784, h_dim=400, z_dim=20, n_classes=10):
        super().__init__()
        self.z_dim, self.n_classes = z_dim, n_classes
        self.to_hidden = nn.Linear(image_size, h_dim)
        self.to_mu = nn.Linear(h_dim, z_dim)
        self.to_log_var = nn.Linear(h_dim, z_dim)
        self.to_cluster_hidden = nn.Linear(image_size, h_dim)
        self.to_cluster_logits = nn.Linear(h_dim, n_classes)
        self.from_latent = nn.Linear(z_dim + n_classes, h_dim)
        self.to_logits = nn.Linear(h_dim, image_size)

    def encode(self, x):
        """x (N, 784) to mu and log_var (N, z_dim), the Gaussian q(z|x), and log_p (N, n_classes), log q(c|x)."""
        h = F.relu(self.to_hidden(x))                                  # (N, h_dim)
        return self.to_mu(h), self.to_log_var(h), self.cluster(x)

    def cluster(self, x):
        """x (N, 784) to log q(c|x) (N, n_classes), by a network of its own."""
        return F.log_softmax(self.to_cluster_logits(F.relu(self.to_cluster_hidden(x))), dim=1)

    def decode(self, z, c):
        """z (N, z_dim), one-hot c (N, n_classes) to Bernoulli logits (N, 784); torch.sigmoid of them is the picture."""
        return self.to_logits(F.relu(self.from_latent(torch.cat([z, c], dim=1))))


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


def categorical_kl(log_p):
    """KL(q(c|x) || uniform) = log K - H(c|x) of log_p (N, K): averaged over images; nats per image."""
    return math.log(log_p.shape[1]) + (log_p.exp() * log_p).sum(1).mean()


def capacity(kl, target, gamma=30.0):
    """gamma |KL - target|, which holds a KL at a target, both in nats per image. Dupont 2018, equation 7."""
    return gamma * (kl - target).abs()


def clustering(log_p, log_p_warped, opinion):
    """KL(target || q(c|Tx)) + 0.1 H(c|x) - 0.5 H(c): a scalar in nats. After Hu et al. 2017.

    log_p (N, n_classes) is log q(c|x), and log_p_warped (M N, n_classes) is log q(c|Tx) for M warps of all images. The
    target is q(c|x) exp(opinion), normalised. H(c) is estimated from one batch, which biases it low.
    """
    target = F.log_softmax(log_p.detach() + opinion, dim=1)            # x teaches Tx, not the reverse
    target = target.repeat(len(log_p_warped) // len(log_p), 1)         # (M N, n_classes)
    invariance = (target.exp() * (target - log_p_warped)).sum(1).mean()
    h_c_given_x = -(log_p.exp() * log_p).sum(1).mean()
    log_q = log_p.logsumexp(0) - math.log(len(log_p))                  # (n_classes,): the aggregate log q(c)
    h_c = -(log_q.exp() * log_q).sum()
    return invariance + 0.1 * h_c_given_x - 0.5 * h_c


def warp(x, strength=1.0):
    """Tx (N, 784): each image stretched, slanted, turned, shifted and bent, by too little to change the digit."""
    centres = (torch.arange(28, device=x.device) + 0.5) / 14 - 1       # (28,): of pixels, in [-1, 1]
    ones = torch.ones(784, device=x.device)
    plane = torch.stack([centres.repeat(28), centres.repeat_interleave(28), ones])                       # (3, 784)
    bumps = F.interpolate(torch.eye(16, device=x.device).view(16, 1, 4, 4), size=28, mode="bicubic", align_corners=True)
    stretch_x, stretch_y, shear, turn, right, down = strength * (2 * torch.rand(6, len(x), device=x.device) - 1)
    affine = torch.stack([1 + 0.1 * stretch_x, 0.2 * shear - 0.26 * turn, -right / 7,  # by up to 10 %, 15 degrees
                          0.26 * turn, 1 + 0.1 * stretch_y, -down / 7], 1).view(-1, 2, 3)  # and 2 pixels: (N, 2, 3)
    bend = 0.05 * strength * torch.randn(len(x), 2, 16, device=x.device)  # (N, 2, 16): 0.7 pixels (sd) at 4x4 places
    grid = affine @ plane + bend @ bumps.view(16, 784)                 # (N, 2, 784): where each pixel comes from
    grid = grid.view(-1, 2, 28, 28).permute(0, 2, 3, 1)                # (N, 28, 28, 2)
    return F.grid_sample(x.view(-1, 1, 28, 28), grid, align_corners=False).view(-1, 784)


def mixture(weights, means, covariances):
    """Mixtures of K Gaussians for each of C classes, as a distribution over z of batch shape (C,).

    weights (C, K), means (C, K, z_dim), covariances (C, K, z_dim, z_dim).
    """
    return MixtureSameFamily(Categorical(weights), MultivariateNormal(means, covariances))


@torch.no_grad()
def fit_prior(model, data, n_components=10, seed=0):
    """A prior p(z|c) that fits: for each cluster a mixture of Gaussians over the codes of its training images.

    Each image gives one z ~ q(z|x) to the cluster argmax q(c|x). There is one component for every 100 codes of the
    smallest cluster, at least one and at most n_components; a cluster with fewer than 100 codes shares those of all.
    Ghosh et al. 2020, section 4.
    """
    with torch.random.fork_rng(devices=[data.x_train.device] if data.x_train.is_cuda else []):
        torch.manual_seed(seed)
        mu, log_var, log_p = (torch.cat(parts) for parts in zip(*map(model.encode, data.x_train.split(500))))
        z = reparameterize(mu, log_var)                                # (N, z_dim)
    groups = [z[log_p.argmax(1) == k] for k in range(model.n_classes)]
    n_components = max(1, min(n_components, min(map(len, groups)) // 100))
    groups = [codes if len(codes) >= 100 else z for codes in groups]
    fits = [GaussianMixture(n_components, tol=1.0, random_state=seed).fit(codes.cpu().numpy()) for codes in groups]
    parameters = [np.stack([getattr(fit, name) for fit in fits]) for name in ("weights_", "means_", "covariances_")]
    return mixture(*[torch.as_tensor(value, dtype=z.dtype, device=z.device) for value in parameters])


@torch.no_grad()
def second_opinion(model, data, weight=0.3, seed=0):
    """What the codes say about c: weight * log p(z|c) at z = mu(x) of each training image (N, n_classes); nats.

    p(z|c) is the prior fitted to the clusters as they are.
    """
    prior = fit_prior(model, data, seed=seed)
    return weight * torch.cat([prior.log_prob(model.encode(x)[0][:, None]) for x in data.x_train.split(500)])


def train(model, data, epochs=15, batch_size=128, lr=4e-3, beta=1.0, objective="mi", tau=0.5, seed=0):
    """Minimises the objective; returns the history, a dict of metrics for each epoch.

    Ctrl-C ends it early, without an error. Raises FloatingPointError if the loss diverges.
    """
    n, device, history = len(data.x_train), data.x_train.device, []
    opinion, n_warps = torch.zeros(n, model.n_classes, device=device), 1         # none at first: (N, n_classes)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    steps = epochs * math.ceil(n / batch_size)
    # The learning rate climbs to lr during the first 15 % of the steps, then falls in a straight line to nearly zero.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1, pct_start=0.15,
                                                   anneal_strategy="linear", cycle_momentum=False)
    try:
        for epoch in range(1, epochs + 1):
            start, total = time.perf_counter(), torch.zeros((), device=device)
            if objective == "mi" and epoch > math.ceil(epochs / 3):    # by now there are clusters to fit
                opinion, n_warps = second_opinion(model, data, seed=seed), 2     # two warps: less noise
            for batch in torch.randperm(n, device=device).split(batch_size):
                x = data.x_train[batch]                                # (B, 784)
                mu, log_var, log_p = model.encode(x)                   # (B, z_dim), (B, z_dim), (B, n_classes)
                # A one-hot sample of q(c|x). Its gradient would let the decoder teach c, which under "mi" it must not.
                c = F.gumbel_softmax(log_p.detach() if objective == "mi" else log_p, tau, hard=True)
                logits = model.decode(reparameterize(mu, log_var), c)  # (B, 784)
                recon, kl, kl_c = reconstruction(logits, x), gaussian_kl(mu, log_var), categorical_kl(log_p)  # nats
                if objective == "elbo":
                    loss = recon + kl + kl_c                           # exactly, without a weight
                elif objective == "capacity":
                    progress = min(1, 2 * schedule.last_epoch / steps)  # the schedule counts steps; 1 from half-time on
                    loss = recon + capacity(kl, 2.0 * progress) + capacity(kl_c, math.log(model.n_classes) * progress)
                else:
                    log_p_warped = model.cluster(warp(x.repeat(n_warps, 1)))     # (n_warps * B, n_classes)
                    loss = recon + beta * kl + clustering(log_p, log_p_warped, opinion[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += (recon + kl + kl_c).detach() * len(x)         # stays on the device, so no step waits for it
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
    nmi and acc, from 0 to 1, compare the clusters argmax q(c|x) with the labels, which are used here and nowhere else.
    """
    total, log_ps = 0, []
    with torch.random.fork_rng(devices=[data.x_test.device] if data.x_test.is_cuda else []):
        torch.manual_seed(seed)
        for x in data.x_test.split(500):
            mu, log_var, log_p = model.encode(x)
            z, c = reparameterize(mu, log_var), F.gumbel_softmax(log_p, hard=True)
            terms = [reconstruction(model.decode(z, c), x), gaussian_kl(mu, log_var), categorical_kl(log_p)]
            if prior:
                terms.append(sampled_kl(mu, log_var, z, (prior.log_prob(z[:, None]) * c).sum(1)))
            total += len(x) * torch.stack(terms)
            log_ps.append(log_p)
    recon, kl, kl_c, *kl_fitted = (total / len(data.x_test)).tolist()
    if not math.isfinite(recon + kl + kl_c):
        raise FloatingPointError("the training diverged, and the loss is not finite; try a smaller lr")
    p = torch.cat(log_ps).exp()                                        # (N, n_classes)
    results = {"recon": recon, "kl": kl, "kl_c": kl_c, "loss": recon + kl + kl_c,
               "h_c": torch.special.entr(p.mean(0)).sum().item(),      # log K if all clusters are used equally
               **score(data.y_test.cpu(), p.argmax(1).cpu())}
    return {**results, "loss_fitted": recon + kl_fitted[0] + kl_c} if prior else results


def score(labels, clusters):
    """Compares two (N,) lists of integers: NMI, and accuracy under the best one-to-one matching (Hungarian method)."""
    counts = contingency_matrix(labels, clusters)
    return {"nmi": float(normalized_mutual_info_score(labels, clusters)),
            "acc": counts[linear_sum_assignment(-counts)].sum().item() / len(labels),
            "clusters_used": counts.shape[1]}


@torch.no_grad()
def draw(model, data, prior, history):
    """The pictures of this script: a dict of Figures by name."""
    x = data.x_test[:40]
    mu, log_var, log_p = model.encode(x)
    probs = torch.sigmoid(model.decode(reparameterize(mu, log_var), F.gumbel_softmax(log_p, hard=True)))
    standard = Normal(torch.zeros_like(mu[0]), 1.0)
    figures = {"reconstruction": common.plot_reconstruction(x, probs),
               "generation": common.plot_conditional_generation(model, standard, "z ~ N(0, I)", name="cluster"),
               "fitted": common.plot_conditional_generation(model, prior, "z ~ fitted prior", name="cluster"),
               "nmi": common.plot_curves("How well the clusters match the digits", "test set", {
                   "NMI": [row["nmi"] for row in history], "ACC": [row["acc"] for row in history]})}
    return figures


def options():
    """The parser of the command line; each option shows its default under --help."""
    parser = argparse.ArgumentParser(prog="gumbel_vae.py", description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, number = parser.add_argument, common.in_range
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    add("--epochs", type=number(int, 1, 10**6), default=15, help="passes over the training images")
    add("--batch-size", type=number(int, 1, 10**6), default=128, help="images per step")
    add("--lr", type=number(float, 1e-9, 1e3), default=4e-3, help="peak learning rate of Adam")
    add("--beta", type=number(float, 0, 1e6), default=1.0, help="weight of KL(z) under --objective mi")
    add("--h-dim", type=number(int, 1, 10**5), default=400, help="units in each hidden layer")
    add("--z-dim", type=number(int, 1, 1000), default=20, help="dimensions of the Gaussian latent z")
    add("--seed", type=number(int, 0, 10**9), default=0, help="random seed")
    add("--device", choices=devices, default=devices[0], help="where to compute")
    add("--data", default="data", help="folder of MNIST; downloaded if missing")
    add("--out", default="samples", help="folder for the pictures and the checkpoint")
    add("--load", metavar="FILE", help="a checkpoint: redraw the pictures from it instead of training")
    add("--objective", choices=["elbo", "capacity", "mi"], default="mi",
        help="KL(c) is kept, held at a capacity (with KL(z)), or replaced by the clustering term")
    add("--tau", type=number(float, 1e-3, 1e3), default=0.5,
        help="temperature of the Gumbel-softmax; no effect under --objective mi")
    add("--n-classes", type=number(int, 2, 100), default=10, help="number of clusters")
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
        model, checkpoint = common.load_checkpoint(args.load, GumbelVAE)
        model.to(args.device)
    else:
        chosen = {name.replace("_", "-"): value for name, value in vars(args).items() if value is not None}
        print(" ".join(f"--{name} {value}" for name, value in chosen.items()))
        model = GumbelVAE(h_dim=args.h_dim, z_dim=args.z_dim, n_classes=args.n_classes).to(args.device)
        model.to_logits.bias.data = torch.logit(data.x_train.mean(0), eps=1e-3)  # start from the mean image, not grey
        history = train(model, data, args.epochs, args.batch_size, args.lr, args.beta, args.objective, args.tau,
                        args.seed)
        start = time.perf_counter()
        prior = fit_prior(model, data, seed=args.seed)
        print(f"fitted the prior in {time.perf_counter() - start:.1f} seconds")
        checkpoint = {"args": vars(args), "history": history,
                      "state_dict": {name: value.cpu() for name, value in model.state_dict().items()},
                      "prior": {"weights": prior.mixture_distribution.probs.cpu(),
                                "means": prior.component_distribution.loc.cpu(),
                                "covariances": prior.component_distribution.covariance_matrix.cpu()}}
    prior, history = mixture(*[value.to(args.device) for value in checkpoint["prior"].values()]), checkpoint["history"]
    results = {**evaluate(model, data, prior, args.seed), "train_seconds": sum(row["seconds"] for row in history)}
    print("test " + "  ".join(f"{name} {value:.5g}" for name, value in results.items()))

    torch.manual_seed(args.seed)  # so that --load draws the same pictures again
    files = {} if args.load else {"gumbel_vae.pt": checkpoint}
    files.update({f"gumbel_vae_{name}.png": figure for name, figure in draw(model, data, prior, history).items()})
    for name, item in files.items():
        common.save(out / name, item)
    print("wrote " + " ".join(str(out / name) for name in files))
    if data.source != "MNIST":
        print(f"WARNING: these are metrics of {data.source}")
    return results


if __name__ == "__main__":
    common.run(main)
