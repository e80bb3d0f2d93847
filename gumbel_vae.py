"""The Gumbel VAE: beside z a categorical c, with which the model clusters digits without a label.

A digit is drawn from p(x|z, c): c, uniform over ten clusters, is to name the digit, z ~ N(0, I) the
handwriting. The Gumbel-softmax draws a one-hot c from q(c|x), and passes a gradient. The bound is

    log p(x) >= E_q[ log p(x|z, c) ] - KL( q(z|x) || N(0, I) ) - KL( q(c|x) || uniform ),

and --objective says what becomes of its KLs:

    elbo        Both stay, KL(z) weighted by beta. At beta = 1, c stays nearly empty.
    capacity    Both are pulled to capacities, with --beta 30. c must be sure, but of what?
    clustering  KL(z) stays. c must be the same for a warped x, sure, and use all clusters: this
                finds the digits, but the decoder often disobeys c. --beta 4 is a dear cure,
                read_back a cheap one: what is drawn for c must be read as c.

    Jang et al. 2016, Categorical Reparameterization with Gumbel-Softmax, arXiv:1611.01144
    Dupont 2018, arXiv:1804.00104; Hu et al. 2017 (IMSAT), arXiv:1702.08720
    Chen et al. 2016 (InfoGAN), arXiv:1606.03657, equation 5

    python gumbel_vae.py  # ACC 0.984 ± 0.001, NMI 0.958 ± 0.002, test -ELBO 103.6 ± 0.1 nats
"""
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment  # scipy comes with scikit-learn
from sklearn.metrics import normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix
from torch import nn

import common


class GumbelVAE(nn.Module):
    """784-400-20 and back, and 784-400-10 for c: each of one hidden layer."""

    def __init__(self, image_size=784, h_dim=400, z_dim=20, n_classes=10, mean=0.13):
        super().__init__()
        self.z_dim, self.n_classes = z_dim, n_classes
        self.to_hidden = nn.Linear(image_size, h_dim)
        self.to_mu = nn.Linear(h_dim, z_dim)
        self.to_log_var = nn.Linear(h_dim, z_dim)
        self.to_cluster_hidden = nn.Linear(image_size, h_dim)
        self.to_cluster_logits = nn.Linear(h_dim, n_classes)
        self.from_latent = nn.Linear(z_dim + n_classes, h_dim)
        self.to_logits = nn.Linear(h_dim, image_size)
        # Start from the mean pixel or, better, the mean image (vae.py, 3 epochs: 0.5 nats less).
        self.to_logits.bias.data.copy_(torch.logit(torch.as_tensor(mean), eps=1e-3))

    def encode(self, x):
        """x (N, 784) to mu and log_var (N, z_dim): the Gaussian posterior q(z|x)."""
        h = F.relu(self.to_hidden(x))  # (N, h_dim)
        return self.to_mu(h), self.to_log_var(h)

    def cluster(self, x):
        """x (N, 784) to log q(c|x) (N, n_classes)."""
        return F.log_softmax(self.to_cluster_logits(F.relu(self.to_cluster_hidden(x))), dim=1)

    def logits(self, z, c):
        """z (N, z_dim), one-hot c (N, n_classes) to Bernoulli logits (N, 784), for the loss."""
        return self.to_logits(F.relu(self.from_latent(torch.cat([z, c], dim=1))))

    def decode(self, z, c):
        """The same as probabilities (N, 784): the picture."""
        return torch.sigmoid(self.logits(z, c))

    def forward(self, x, tau=0.5):
        """x_reconst (N, 784), by one sampled z and c each, mu, log_var (N, z_dim), log q(c|x)."""
        (mu, log_var), log_q = self.encode(x), self.cluster(x)
        c = F.gumbel_softmax(log_q, tau, hard=True)  # (N, n_classes): one-hot, with a gradient
        return self.decode(reparameterize(mu, log_var), c), mu, log_var, log_q


def reparameterize(mu, log_var):
    """z = mu + sigma * noise (N, z_dim): gradients reach mu and sigma. Kingma and Welling, 2.4."""
    return mu + torch.exp(log_var / 2) * torch.randn_like(mu)


def reconstruction(logits, x):
    """-log p(x|...), Bernoulli pixels: summed over them, averaged over images; nats per image."""
    return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)


def gaussian_kl(mu, log_var):
    """KL(q(z|x) || N(0, I)), nats per image. Kingma and Welling, appendix B."""
    return 0.5 * (mu.pow(2) + log_var.exp() - 1 - log_var).sum() / len(mu)


def categorical_kl(log_q):
    """KL(q(c|x) || uniform) of log_q (N, K), nats per image."""
    return math.log(log_q.shape[1]) + (log_q.exp() * log_q).sum(1).mean()


def clustering(log_q, log_q_warped):
    """KL(q(c|x) || q(c|Tx)) + 0.1 H(c|x) - 0.5 H(c), nats per image. After Hu et al. 2017."""
    target = log_q.detach().repeat(2, 1)  # (2 N, K), for two warps Tx of each x: x teaches Tx
    invariance = F.kl_div(log_q_warped, target, reduction="batchmean", log_target=True)
    h_c_given_x = -(log_q.exp() * log_q).sum(1).mean()
    log_marginal = log_q.logsumexp(0) - math.log(len(log_q))  # (K,): of this batch
    h_c = -(log_marginal.exp() * log_marginal).sum()
    return invariance + 0.1 * h_c_given_x - 0.5 * h_c


def read_back(model, z, k):
    """-log q(k|Tx), nats per image, of x drawn for z (N, z_dim) and k (N,). After Chen et al."""
    drawn = model.decode(z, common.one_hot(k, model.n_classes))  # (N, 784)
    reader = nn.ModuleList([model.to_cluster_hidden, model.to_cluster_logits]).requires_grad_(False)
    loss = F.nll_loss(model.cluster(warp(drawn)), k)
    reader.requires_grad_(True)  # it only read: the decoder learns to be read
    return loss


def warp(x):
    """Tx (N, 784): square images, each a little stretched, slanted, turned, shifted and bent."""
    n, side, device = len(x), math.isqrt(x.shape[1]), x.device
    # Where a pixel comes from is a sum of its column, its row, 1, and 16 bumps, each weighted.
    line = torch.linspace(1 / side - 1, 1 - 1 / side, side, device=device)  # (28,), in (-1, 1)
    ones, bump = torch.ones_like(line), torch.eye(4, device=device)[None, None]
    bump = F.interpolate(bump, (4, side), mode="bicubic", align_corners=True)[0, 0]  # (4, 28)
    basis = torch.cat([torch.kron(ones, line)[None], torch.kron(line, ones)[None],
                       torch.kron(ones, ones)[None], torch.kron(bump, bump)])  # (19, 784)
    # Stretch by up to 10 %, slant by 11 degrees, turn by 15, shift by 2 pixels of 28:
    stretch_x, stretch_y, slant, turn, right, down = 2 * torch.rand(6, n, device=device) - 1
    affine = torch.stack([1 + 0.1 * stretch_x, 0.2 * slant - 0.26 * turn, -right / 7,
                          0.26 * turn, 1 + 0.1 * stretch_y, -down / 7], 1).view(n, 2, 3)
    bend = 0.05 * torch.randn(n, 2, 16, device=device)  # 0.7 pixels (sd)
    grid = (torch.cat([affine, bend], 2) @ basis).view(n, 2, side, side).permute(0, 2, 3, 1)
    return F.grid_sample(x.view(n, 1, side, side), grid, align_corners=False).flatten(1)


def train(model, data, epochs=15, batch_size=128, lr=6e-3, beta=1.0,
          objective="clustering", gamma=400.0, read_weight=25.0, tau=0.5):
    """Minimises the objective's loss; returns the history, a dict of metrics per epoch."""
    if objective not in ("elbo", "capacity", "clustering"):
        raise ValueError(f"the objective {objective!r} is none of elbo, capacity, clustering")
    n, device, history = len(data.x_train), data.x_train.device, []
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    step, steps = 0, epochs * math.ceil(n / batch_size)
    for epoch in range(1, epochs + 1):
        model.train()
        start, total = time.perf_counter(), torch.zeros((), device=device)
        for batch in torch.randperm(n, device=device).split(batch_size):
            # For 15 % of the steps the learning rate climbs to lr, then it falls to nearly zero.
            climb, fall = min(1, step / (0.15 * steps)), (steps - step) / (0.85 * steps)
            optimizer.param_groups[0]["lr"] = lr * min(climb + 1 / steps, fall)
            weight = 1 + (beta - 1) * climb  # of the KL; after Bowman et al. 2015, arXiv:1511.06349

            x = data.x_train[batch]  # (B, 784)
            views = torch.cat([x, warp(x.repeat(2, 1))]) if objective == "clustering" else x
            mu, log_var = model.encode(x)  # (B, z_dim), (B, z_dim)
            log_q, log_q_warped = model.cluster(views).tensor_split([len(x)])  # (B, n_classes)
            c = F.gumbel_softmax(log_q, tau, hard=True)  # (B, n_classes): one-hot, with a gradient
            z = reparameterize(mu, log_var)  # (B, z_dim)
            recon = reconstruction(model.logits(z, c), x)  # nats per image
            kl, kl_c = gaussian_kl(mu, log_var), categorical_kl(log_q)  # nats per image
            if objective == "elbo":
                loss = recon + weight * kl + kl_c
            elif objective == "capacity":
                progress, most = min(1, 2 * step / steps), math.log(model.n_classes)
                pulls = (kl - 2.0 * progress).abs() + (kl_c - most * progress).abs()
                loss = recon + beta * pulls  # Dupont 2018, equation 7
            else:
                codes = z[::8].detach()  # and as many from N(0, I), each with a random k
                codes = torch.cat([codes, torch.randn_like(codes)])
                k = torch.randint(model.n_classes, (len(codes),), device=device)
                loss = recon + weight * kl + gamma * clustering(log_q, log_q_warped)
                loss += read_weight * climb * read_back(model, codes, k)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            total += (recon + kl + kl_c).detach() * len(x)
        metrics = {"train": total.item() / n, "seconds": time.perf_counter() - start}
        history.append({**metrics, **evaluate(model, data)})
        print(f"epoch {epoch:3}", *(f" {name} {value:.2f}" for name, value in history[-1].items()))
    return history


@torch.no_grad()
def evaluate(model, data, seed=0):
    """The metrics of the test images, by one z and c each, in nats per image; loss is the -ELBO.

    Labels are used here only. Raises FloatingPointError if the loss is not finite.
    """
    model.eval()
    x, generator = data.x_test, torch.Generator("cpu").manual_seed(seed)
    (mu, log_var), log_q = model.encode(x), model.cluster(x)  # ..., (N, n_classes)
    noise = torch.randn(mu.shape, generator=generator, device="cpu").to(mu.device)
    z = mu + torch.exp(log_var / 2) * noise  # (N, z_dim)
    exponential = torch.empty(log_q.shape, device="cpu").exponential_(generator=generator)
    c = (log_q - exponential.to(mu.device).log()).argmax(1)  # (N,): the Gumbel-max trick
    logits = model.logits(z, common.one_hot(c, model.n_classes))  # (N, 784)
    recon, kl = reconstruction(logits, x).item(), gaussian_kl(mu, log_var).item()
    kl_c = categorical_kl(log_q).item()
    if not math.isfinite(recon + kl + kl_c):
        raise FloatingPointError("the training diverged: the loss is not finite; try a smaller lr")
    h_c = torch.special.entr(log_q.exp().mean(0)).sum().item()
    i_c = kl_c + h_c - math.log(model.n_classes)  # I(x; c)
    metrics = {"recon": recon, "kl": kl, "kl_c": kl_c, "i_c": i_c, "loss": recon + kl + kl_c}
    if data.y_test is not None:
        metrics.update(score(data.y_test.cpu(), log_q.argmax(1).cpu()))
    return metrics


def score(labels, clusters):
    """NMI of labels and clusters (N,), and ACC, by one cluster per label: 20 pure ones have 0.5."""
    counts = contingency_matrix(labels, clusters)
    return {"nmi": float(normalized_mutual_info_score(labels, clusters)),
            "acc": counts[linear_sum_assignment(-counts)].sum().item() / len(labels)}


# After training: the pictures.

@torch.no_grad()
def draw(model, data, history):
    """This script's pictures: a dict of figures by name."""
    x, plot = data.x_test[:12], common.plot_conditional_generation
    return {
        "reconstruction": common.plot_reconstruction(model, x),
        "generation": plot(model, title="a cluster per row, z ~ N(0, I) the same down a column"),
        "handwriting": common.plot_handwriting(model, x),
        "loss": common.plot_curves(history)}


def options():
    """The parser of the command line."""
    parser = common.options(__doc__)
    parser.add_argument("--lr", type=float, default=6e-3, help="peak learning rate")
    parser.add_argument("--beta", type=float, default=1.0, help="weight of KL(z); of capacity")
    parser.add_argument("--objective", choices=["elbo", "capacity", "clustering"],
                        default="clustering", help="what becomes of the KL terms")
    parser.add_argument("--gamma", type=float, default=400.0, help="weight of clustering")
    parser.add_argument("--read-weight", type=float, default=25.0, help="weight of read_back")
    parser.add_argument("--n-classes", type=common.positive, default=10, help="clusters; ACC: 10")
    return parser


def main(argv=()):
    """Trains (or loads), evaluates, draws, saves; returns the test metrics."""
    args = options().parse_args(argv)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    data = common.load_mnist(args.data, args.device)
    torch.manual_seed(args.seed)
    if args.load:
        model, history = common.load_checkpoint(args.load, GumbelVAE, args.device)
    else:
        model = GumbelVAE(z_dim=args.z_dim, n_classes=args.n_classes,
                          mean=data.x_train.mean(0)).to(args.device)
        history = train(model, data, args.epochs, args.batch_size, args.lr, args.beta,
                        args.objective, args.gamma, args.read_weight)
    torch.manual_seed(args.seed)  # so that --load draws the same pictures
    metrics = evaluate(model, data)
    print("test", *(f" {name} {value:.3f}" for name, value in metrics.items()))
    figures = draw(model, data, history)
    common.save(args, "gumbel_vae", figures, model, history, data.source)
    return metrics


if __name__ == "__main__":
    common.run(main)
