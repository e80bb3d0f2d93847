"""The Gumbel VAE: a categorical latent c beside z, with which the model sorts the digits by itself, without a label.

A digit is drawn by p(x, z, c) = p(c) p(z) p(x|z, c), c uniform over ten clusters, and inferred by q(z|x) q(c|x);
c is sampled by the Gumbel-softmax. The bound has one more term:

    -ELBO = reconstruction + KL(z) + KL(c),    KL(c) = KL( q(c|x) || p(c) ) = I(x; c) + KL( q(c) || p(c) ) on average,

with q(c) the average of q(c|x), and I the mutual information. Three ways to treat KL(c), by --objective:

    elbo      as it is: the bound charges for whatever c knows of x, so c ends up knowing next to nothing
    capacity  both KLs are held at capacities: c must be sure, but nothing makes that the digit
    mi        KL(c) turned around: c should know x, use every cluster, and not change when x is warped to Tx,
              KL( q(c|x) || q(c|Tx) ) + 0.1 H(c|x) - 0.5 H(c) = KL( q(c|x) || q(c|Tx) ) - 0.1 I(x; c) - 0.4 H(c).
              No gradient of the decoder reaches c: this term alone finds the clusters, and the VAE, with beta * KL(z),
              learns to draw them

    Jang, Gu and Poole 2016, Categorical Reparameterization with Gumbel-Softmax, arXiv:1611.01144
    Dupont 2018, Learning Disentangled Joint Continuous and Discrete Representations, arXiv:1804.00104, equation 7
    Hu et al. 2017, Learning Discrete Representations via Information Maximizing Self-Augmented Training (IMSAT),
    arXiv:1702.08720

    python gumbel_vae.py  # 15 epochs of 3 s on two cores: ACC 0.982 ± 0.001, NMI 0.953 ± 0.003 (seeds 0 to 4)
"""
import math
import time

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix
from torch import nn

import common


class GumbelVAE(nn.Module):
    """784-400-20 and back, with 784-400-10 for the cluster: encoder q(z|x) q(c|x), decoder p(x|z, c)."""

    def __init__(self, image_size=784, h_dim=400, z_dim=20, n_classes=10, tau=0.5):
        super().__init__()
        self.z_dim, self.n_classes, self.tau = z_dim, n_classes, tau
        self.to_hidden = nn.Linear(image_size, h_dim)
        self.to_mu = nn.Linear(h_dim, z_dim)
        self.to_log_var = nn.Linear(h_dim, z_dim)
        self.to_cluster_hidden = nn.Linear(image_size, h_dim)
        self.to_log_p = nn.Linear(h_dim, n_classes)
        self.from_latent = nn.Linear(z_dim + n_classes, h_dim)
        self.to_logits = nn.Linear(h_dim, image_size)

    def encode(self, x):
        """x (N, 784) to mu and log_var (N, z_dim), the Gaussian q(z|x), and log_p (N, n_classes), log q(c|x)."""
        h = F.relu(self.to_hidden(x))                                  # (N, h_dim)
        return self.to_mu(h), self.to_log_var(h), self.cluster(x)

    def cluster(self, x):
        """x (N, 784) to log q(c|x) (N, n_classes), by a network of its own."""
        return F.log_softmax(self.to_log_p(F.relu(self.to_cluster_hidden(x))), dim=1)

    def reparameterize(self, mu, log_var):
        """z = mu + sigma * noise (N, z_dim), so that gradients reach mu and sigma. Kingma and Welling, section 2.4."""
        return mu + torch.exp(log_var / 2) * torch.randn_like(mu)

    def decode(self, z, c):
        """z (N, z_dim), one-hot c (N, n_classes) to Bernoulli logits (N, 784); torch.sigmoid of them is the picture."""
        return self.to_logits(F.relu(self.from_latent(torch.cat([z, c], dim=1))))

    def forward(self, x, teach_c=True):
        """x (N, 784) to logits (N, 784), mu, log_var (N, z_dim), log_p (N, n_classes), through a sample of z and c."""
        mu, log_var, log_p = self.encode(x)
        # A one-hot sample of q(c|x), with a gradient all the same, by which the decoder teaches c unless told not to.
        c = F.gumbel_softmax(log_p if teach_c else log_p.detach(), tau=self.tau, hard=True)
        return self.decode(self.reparameterize(mu, log_var), c), mu, log_var, log_p


def reconstruction(logits, x):
    """-log p(x|...) of Bernoulli pixels, from logits (stable): summed over pixels, averaged over images; in nats."""
    return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)


def gaussian_kl(mu, log_var):
    """KL(q(z|x) || N(0, I)): summed over latents, averaged over images; nats. Kingma and Welling 2013, appendix B."""
    return 0.5 * (mu.pow(2) + log_var.exp() - 1 - log_var).sum() / len(mu)


def categorical_kl(log_p):
    """KL(q(c|x) || uniform) = log K - H(c|x) of log_p (N, K): averaged over images; nats per image."""
    return math.log(log_p.shape[1]) + (log_p.exp() * log_p).sum(1).mean()


def capacity(kl, target, gamma=30.0):
    """Holds a KL at a target that rises during training, both in nats per image. Dupont 2018, equation 7."""
    return gamma * (kl - target).abs()


def clustering(log_p, log_p_warped):
    """KL(q(c|x) || q(c|Tx)) + 0.1 H(c|x) - 0.5 H(c) of two (N, n_classes): a scalar in nats. After Hu et al. 2017."""
    target = log_p.detach()                                            # q(c|x) teaches q(c|Tx), not the reverse
    invariance = (target.exp() * (target - log_p_warped)).sum(1).mean()
    h_c_given_x = -(log_p.exp() * log_p).sum(1).mean()
    log_q = log_p.logsumexp(0) - math.log(len(log_p))                  # (n_classes,): the aggregate log q(c)
    h_c = -(log_q.exp() * log_q).sum()
    return invariance + 0.1 * h_c_given_x - 0.5 * h_c


def smooth_fields(device):
    """(19, 784): what warps are mixed from, as values over the image: x, y, 1, and a bump at each of 4x4 places."""
    at = (torch.arange(28) + 0.5) / 14 - 1                             # pixel centres in [-1, 1]
    bumps = F.interpolate(torch.eye(16).view(16, 1, 4, 4), size=28, mode="bicubic", align_corners=True).view(16, 784)
    return torch.cat([at.repeat(28)[None], at.repeat_interleave(28)[None], torch.ones(1, 784), bumps]).to(device)


def warp(x, fields):
    """Tx (N, 784): each image stretched, sheared, turned, shifted and bent, by too little to change the digit."""
    stretch_x, stretch_y, shear, turn, right, down = 2 * torch.rand(6, len(x), device=x.device) - 1  # (N,) each
    affine = torch.stack([1 + 0.1 * stretch_x, 0.2 * shear - 0.26 * turn, right / 7,  # to 10 %, 15 degrees, 2 pixels
                          0.26 * turn, 1 + 0.1 * stretch_y, down / 7], 1).view(-1, 2, 3)                    # (N, 2, 3)
    bend = 0.05 * torch.randn(len(x), 2, 16, device=x.device)          # (N, 2, 16): 0.7 pixels (sd) at 4x4 places
    grid = (torch.cat([affine, bend], 2) @ fields).view(-1, 2, 28, 28).permute(0, 2, 3, 1)  # (N, 28, 28, 2)
    return F.grid_sample(x.view(-1, 1, 28, 28), grid, align_corners=False).view(-1, 784)


def train(model, data, args, history):
    """Minimises the objective; appends a row of figures to the history after every epoch."""
    n, device = len(data.x_train), data.x_train.device
    fields = smooth_fields(device)                                     # (19, 784)
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
            x = data.x_train[batch]                                    # (B, 784)
            logits, mu, log_var, log_p = model(x, teach_c=args.objective != "mi")  # log_p: (B, n_classes)
            recon, kl, kl_c = reconstruction(logits, x), gaussian_kl(mu, log_var), categorical_kl(log_p)  # each in nats
            if args.objective == "elbo":
                loss = recon + kl + kl_c                               # exactly, without a weight
            elif args.objective == "capacity":
                progress = min(1, 2 * schedule.last_epoch / steps)     # the schedule counts steps; full at half-time
                loss = recon + capacity(kl, 2.0 * progress) + capacity(kl_c, math.log(model.n_classes) * progress)
            else:
                loss = recon + args.beta * kl + clustering(log_p, model.cluster(warp(x, fields)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += (recon + kl + kl_c).detach() * len(x)             # stays on the device, so no step waits for it
        train_loss = total.item() / n
        seconds = time.perf_counter() - start
        common.log_epoch(history, {"train": train_loss, **evaluate(model, data, args), "seconds": seconds}, args)


@torch.no_grad()
def evaluate(model, data, args):
    """The test figures, in nats per image, with one posterior sample an image; loss is the -ELBO, whatever beta.

    The labels score the clusters argmax q(c|x), here and nowhere else.
    """
    total, log_ps = 0, []
    with common.fixed_noise(args.seed, data.x_test.device):
        for x in data.x_test.split(500):
            logits, mu, log_var, log_p = model(x)
            total += torch.stack([reconstruction(logits, x), gaussian_kl(mu, log_var), categorical_kl(log_p)]) * len(x)
            log_ps.append(log_p)
    recon, kl, kl_c = (total / len(data.x_test)).tolist()
    p = torch.cat(log_ps).exp()                                        # (N, n_classes)
    return {"recon": recon, "kl": kl, "kl_c": kl_c, "loss": recon + kl + kl_c,
            "h_c": torch.special.entr(p.mean(0)).sum().item(),         # of the aggregate: log K when all are used alike
            **score(data.y_test.cpu(), p.argmax(1).cpu())}


def score(labels, clusters):
    """Compares two (N,) lists of integers: NMI, and accuracy under the best one-to-one matching (Hungarian method)."""
    counts = contingency_matrix(labels, clusters)
    return {"nmi": float(normalized_mutual_info_score(labels, clusters)),
            "acc": counts[linear_sum_assignment(-counts)].sum().item() / len(labels),
            "clusters_used": counts.shape[1]}


@torch.no_grad()
def draw(model, data, args, history):
    """The pictures of this script, by name."""
    x = data.x_test[:40]
    pictures = {"reconstruction": common.plot_reconstruction(x, torch.sigmoid(model(x)[0])),
                "generation": common.plot_conditional_generation(model, 10, name="cluster"),
                "nmi": common.plot_curves("How well the clusters match the digits", "NMI, test", {
                    f"--objective {args.objective}": [row["nmi"] for row in history]})}
    return pictures


def options():
    """The parser of the command line: the shared options, and this script's own."""
    parser = common.Parser("gumbel_vae", __doc__)
    parser.option("--lr", 5e-3, "peak of Adam's learning rate", type=common.number(float, 0, above=True))
    parser.option("--beta", 4.0, "weight of KL(z) under --objective mi; 1 is the ELBO's", type=common.number(float, 0))
    parser.option("--objective", "mi", "how KL(c) is treated", choices=["elbo", "capacity", "mi"])
    parser.option("--tau", 0.5, "temperature of the Gumbel-softmax", type=common.number(float, 0, above=True))
    parser.option("--n-classes", 10, "clusters", type=common.number(int, 2, 1000))
    return parser


def main(argv=None):
    """Trains (or loads), evaluates, draws, saves; returns the final test figures."""
    parser = options()
    args, data, checkpoint = common.start(parser, argv)
    model = GumbelVAE(z_dim=args.z_dim, n_classes=args.n_classes, tau=args.tau).to(data.x_train.device)
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
