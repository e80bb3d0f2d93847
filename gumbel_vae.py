"""The Gumbel VAE: a categorical latent c alongside z, with which the model sorts the digits by itself, without a label.

A digit is drawn by p(x, z, c) = p(c) p(z) p(x|z, c), with c uniform over ten clusters; q(z|x) q(c|x) infers z and c.
The Gumbel-softmax draws a one-hot c from q(c|x), and lets the decoder's gradient through as if c were soft. Now

    -ELBO = reconstruction + KL(z) + KL(c),    KL(c) = KL( q(c|x) || p(c) ),

and --objective chooses what becomes of KL(c):

    elbo      It stays. z learns first, while c is noise to the decoder; later c has nothing left to say.
    capacity  Both KLs are held at capacities. Now c must be sure, but nothing says of what: slant or width will do.
    mi        gamma * `clustering` replaces it: c must stay the same when x is warped to Tx, be sure of each image, and
              use all clusters. With gamma = 100, this term says which images belong together, and the decoder learns
              to draw what c names. Its gradient reaches c too: outweighed, it helps a little (ACC 0.982 without it).

    Jang, Gu and Poole 2016, Categorical Reparameterization with Gumbel-Softmax, arXiv:1611.01144
    Dupont 2018, Learning Disentangled Joint Continuous and Discrete Representations, arXiv:1804.00104, equation 7
    Hu et al. 2017, Learning Discrete Representations via Information Maximizing Self-Augmented Training (IMSAT), ICML
    Ghosh et al. 2020, From Variational to Deterministic Autoencoders, arXiv:1903.12436, section 4 (the fitted prior)

    python gumbel_vae.py  # a minute on two cores: ACC 0.9847 ± 0.0007, NMI 0.959 ± 0.002 (seeds 0 to 4)
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
        """x (N, 784) to mu and log_var (N, z_dim): the Gaussian posterior q(z|x)."""
        h = F.relu(self.to_hidden(x))                                  # (N, h_dim)
        return self.to_mu(h), self.to_log_var(h)

    def cluster(self, x):
        """x (N, 784) to log q(c|x) (N, n_classes), the categorical posterior, by a network of its own."""
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


def categorical_kl(log_q):
    """KL(q(c|x) || uniform) = log K - H(c|x) of log_q (N, K): averaged over images; nats per image."""
    return math.log(log_q.shape[1]) + (log_q.exp() * log_q).sum(1).mean()


def capacity(kl, target, gamma=30.0):
    """gamma |KL - target|, which holds a KL at a target, both in nats per image. Dupont 2018, equation 7."""
    return gamma * (kl - target).abs()


def clustering(log_q, log_q_warped):
    """KL(q(c|x) || q(c|Tx)) + 0.1 H(c|x) - 0.5 H(c): a scalar in nats. After Hu et al. 2017.

    log_q (N, K) is log q(c|x), and log_q_warped (M N, K) is log q(c|Tx) for M warps of all images.
    """
    target = log_q.detach().repeat(len(log_q_warped) // len(log_q), 1)  # x teaches Tx, not the reverse
    invariance = F.kl_div(log_q_warped, target, reduction="batchmean", log_target=True)
    h_c_given_x = -(log_q.exp() * log_q).sum(1).mean()
    log_marginal = log_q.logsumexp(0) - math.log(len(log_q))           # (K,): log q(c), the average over the batch
    h_c = -(log_marginal.exp() * log_marginal).sum()
    return invariance + 0.1 * h_c_given_x - 0.5 * h_c


def warp(x, strength=1.0):
    """Tx (N, 784): each image stretched, slanted, turned, shifted and bent, too little to change the digit."""
    stretch_x, stretch_y, shear, turn, right, down = strength * (2 * torch.rand(6, len(x), device=x.device) - 1)
    # Stretched by up to 10 %, leaning by up to 25 degrees (15 of them turned), and shifted by up to 2 pixels.
    affine = torch.stack([1 + 0.1 * stretch_x, 0.2 * shear - 0.26 * turn, -right / 7,
                          0.26 * turn, 1 + 0.1 * stretch_y, -down / 7], 1).view(-1, 2, 3)        # (N, 2, 3)
    # Bent by random shifts of 0.7 pixels (sd) at 4x4 places. The 16 bumps that spread them over the image are the same
    # for all images: interpolating each image's own shifts takes more than twice as long.
    bumps = F.interpolate(torch.eye(16, device=x.device).view(16, 1, 4, 4), size=28, mode="bicubic", align_corners=True)
    bend = 0.05 * strength * torch.randn(len(x), 2, 16, device=x.device) @ bumps.view(16, 784)   # (N, 2, 784)
    grid = F.affine_grid(affine, (len(x), 1, 28, 28), align_corners=False)  # where each pixel comes from, in [-1, 1]
    grid = grid + bend.view(-1, 2, 28, 28).permute(0, 2, 3, 1)         # (N, 28, 28, 2)
    return F.grid_sample(x.view(-1, 1, 28, 28), grid, align_corners=False).view(-1, 784)


def train(model, data, epochs=15, batch_size=128, lr=6e-3, beta=1.0, objective="mi", gamma=100.0, tau=0.5, seed=0):
    """Minimises the objective; returns the history, a dict of metrics for each epoch.

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
                log_q = model.cluster(x)                               # (B, n_classes)
                c = F.gumbel_softmax(log_q, tau, hard=True)            # (B, n_classes): one-hot, with a gradient
                logits = model.decode(reparameterize(mu, log_var), c)  # (B, 784)
                recon, kl, kl_c = reconstruction(logits, x), gaussian_kl(mu, log_var), categorical_kl(log_q)  # nats
                weight = 1 + (beta - 1) * min(1, schedule.last_epoch / (0.15 * steps))  # last_epoch counts the steps
                if objective == "elbo":
                    loss = recon + kl + kl_c                           # exactly, from the first step
                elif objective == "capacity":
                    progress = min(1, 2 * schedule.last_epoch / steps)  # 1 from halfway on
                    loss = recon + capacity(kl, 2.0 * progress) + capacity(kl_c, math.log(model.n_classes) * progress)
                else:
                    log_q_warped = model.cluster(warp(x.repeat(2, 1)))  # (2 B, n_classes): two warps of each image
                    loss = recon + weight * kl + gamma * clustering(log_q, log_q_warped)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += (recon + kl + kl_c).detach() * len(x)         # stays on the device, so no step waits for it
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
    nmi and acc, from 0 to 1, compare the clusters argmax q(c|x) with the labels, which are used here and nowhere else.
    """
    model.eval()
    total, standard = 0, Normal(0.0, 1.0)
    log_q = torch.cat([model.cluster(x) for x in data.x_test.split(500)])                        # (N, n_classes)
    with torch.random.fork_rng(devices=[data.x_test.device] if data.x_test.is_cuda else []):
        torch.manual_seed(seed)
        clusters = F.gumbel_softmax(log_q, hard=True)                  # (N, n_classes): exact samples, whatever tau is
        for x, c in zip(data.x_test.split(500), clusters.split(500)):
            mu, log_var = model.encode(x)
            z = reparameterize(mu, log_var)
            terms = [reconstruction(model.decode(z, c), x), gaussian_kl(mu, log_var)]
            if prior is not None:
                log_prior = (prior.log_prob(z[:, None]) * c).sum(1)    # (B,): of each image's sampled cluster
                terms.append((standard.log_prob(z).sum(1) - log_prior).mean())  # nats; negative if it fits better
            total += len(x) * torch.stack(terms)
    recon, kl, *change = (total / len(data.x_test)).tolist()
    if not math.isfinite(recon + kl + sum(change)):
        raise FloatingPointError("the training diverged, and the loss is not finite; try a smaller lr")
    kl_c = categorical_kl(log_q).item()
    results = {"recon": recon, "kl": kl, "kl_c": kl_c, "loss": recon + kl + kl_c,
               "h_c": torch.special.entr(log_q.exp().mean(0)).sum().item(),  # log K if all clusters are used equally
               **score(data.y_test.cpu(), log_q.argmax(1).cpu())}
    return results if prior is None else {**results, "loss_fitted": recon + kl + kl_c + change[0]}


def score(labels, clusters):
    """Compares two (N,) lists of integers: NMI, and accuracy under the best one-to-one matching (Hungarian method)."""
    counts = contingency_matrix(labels, clusters)
    return {"nmi": float(normalized_mutual_info_score(labels, clusters)),
            "acc": counts[linear_sum_assignment(-counts)].sum().item() / len(labels),
            "clusters_used": counts.shape[1]}


# After training: a prior that fits the codes, and the pictures.

def mixture(weights, means, covariances):
    """A mixture of K Gaussians as a distribution over z; any dimensions in front of K are a batch of mixtures.

    weights (..., K), means (..., K, z_dim), covariances (..., K, z_dim, z_dim).
    """
    covariances = (covariances + covariances.mT) / 2  # PyTorch rejects what rounding left a little asymmetric
    return MixtureSameFamily(Categorical(weights), MultivariateNormal(means, covariances))


@torch.no_grad()
def fit_prior(model, data, n_components=10, seed=0):
    """A prior p(z|c) that fits: for each cluster a mixture of Gaussians over the codes of its training images.

    There are n_components per cluster; a cluster with under 100 codes for each of them shares the codes of all.
    """
    model.eval()
    z = torch.cat([reparameterize(*model.encode(x)) for x in data.x_train.split(500)])           # (N, z_dim)
    clusters = torch.cat([model.cluster(x) for x in data.x_train.split(500)]).argmax(1)          # (N,)
    n_components = max(1, min(n_components, len(z) // 100))
    groups = [z[clusters == k].cpu().numpy() for k in range(model.n_classes)]
    groups = [codes if len(codes) >= 100 * n_components else z.cpu().numpy() for codes in groups]
    floor = 1e-5 * z.var().item()  # the least variance: single precision is stable with it, whatever the scale
    fits = [GaussianMixture(n_components, tol=1.0, reg_covar=floor, random_state=seed).fit(codes) for codes in groups]
    parameters = [np.stack([getattr(fit, name) for fit in fits]) for name in ("weights_", "means_", "covariances_")]
    return mixture(*[torch.as_tensor(value, dtype=z.dtype, device=z.device) for value in parameters])


@torch.no_grad()
def draw(model, data, prior, history):
    """The pictures of this script: a dict of Figures by name."""
    x, c = data.x_test[:12], F.gumbel_softmax(model.cluster(data.x_test[:12]), hard=True)
    probs = torch.sigmoid(model.decode(reparameterize(*model.encode(x)), c))
    standard = Normal(torch.zeros(model.z_dim, device=x.device), 1.0)
    figures = {"reconstruction": common.plot_reconstruction(x, probs),
               "generation": common.plot_conditional_generation(model, standard, "z ~ N(0, I)", name="cluster"),
               "fitted": common.plot_conditional_generation(model, prior, "z ~ fitted prior", name="cluster"),
               "nmi": common.plot_curves("How well the clusters match the digits", "test set", history, {
                   "nmi": "NMI", "acc": "ACC"})}
    return figures


def options():
    """The parser of the command line; each option shows its default under --help."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, number = parser.add_argument, common.in_range
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    add("--epochs", type=number(int, 1, 10**6), default=15, help="passes over the training images")
    add("--batch-size", type=number(int, 1, 10**6), default=128, help="images per step")
    add("--lr", type=number(float, 1e-9, 1e3), default=6e-3, help="peak learning rate of Adam")
    add("--beta", type=number(float, 0, 1e6), default=1.0, help="weight of KL(z) under --objective mi")
    add("--h-dim", type=number(int, 1, 10**5), default=400, help="units in each hidden layer")
    add("--z-dim", type=number(int, 1, 1000), default=20, help="dimensions of the Gaussian latent z")
    add("--seed", type=number(int, 0, 10**9), default=0, help="random seed")
    add("--device", choices=devices, default=devices[0], help="where to compute")
    add("--data", default="data", help="folder of MNIST; downloaded if missing")
    add("--out", default="samples", help="folder for the pictures and the checkpoint")
    add("--load", metavar="FILE", help="a checkpoint: redraw its pictures instead of training")
    add("--objective", choices=["elbo", "capacity", "mi"], default="mi", help="what becomes of KL(c)")
    add("--gamma", type=number(float, 0, 1e6), default=100.0, help="weight of the clustering; at 1 the decoder wins")
    add("--tau", type=number(float, 1e-3, 1e3), default=0.5, help="temperature of the Gumbel-softmax")
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
        model, checkpoint = common.load_checkpoint(args.load, GumbelVAE, args.device)
    else:
        print(*[f"--{name.replace('_', '-')} {value}" for name, value in vars(args).items() if value is not None])
        model = GumbelVAE(h_dim=args.h_dim, z_dim=args.z_dim, n_classes=args.n_classes).to(args.device)
        model.to_logits.bias.data = torch.logit(data.x_train.mean(0), eps=1e-3)  # the mean image; helps short runs
        history = train(model, data, epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, beta=args.beta,
                        objective=args.objective, gamma=args.gamma, tau=args.tau, seed=args.seed)
        checkpoint = {"args": vars(args), "data": data.source, "history": history, "state_dict": model.state_dict()}
        common.save(out / "gumbel_vae.pt", checkpoint)  # at once, so that no later failure loses it
    if "prior" not in checkpoint:  # trained just now, or saved by a run that ended before the fit
        prior = fit_prior(model, data, seed=args.seed)
        weights, gaussians = prior.mixture_distribution.probs, prior.component_distribution
        checkpoint["prior"] = {"weights": weights, "means": gaussians.loc, "covariances": gaussians.covariance_matrix}
    prior, history = mixture(**checkpoint["prior"]), checkpoint["history"]
    results = {**evaluate(model, data, prior, args.seed), "train_seconds": sum(row["seconds"] for row in history)}
    print("test " + "  ".join(f"{name} {value:.5g}" for name, value in results.items()))

    torch.manual_seed(args.seed)  # with the same --seed, --load draws the same pictures again
    files = {} if args.load else {"gumbel_vae.pt": checkpoint}
    files.update({f"gumbel_vae_{name}.png": figure for name, figure in draw(model, data, prior, history).items()})
    print("wrote", *[common.save(out / name, item) for name, item in files.items()])
    return results


if __name__ == "__main__":
    common.run(main)
