"""The conditional beta-VAE: the decoder is told the label, so that we can ask for a digit.

A digit x of class y is drawn from p(x|z, y): the label y names the digit, and z ~ N(0, I) only has
to say how it is written. The encoder q(z|x) does not see y. The loss is reconstruction + beta * KL,

    log p(x|y) >= E_q(z|x)[ log p(x|z, y) ] - KL( q(z|x) || N(0, I) ),

in nats per image. At beta = 1, z holds the digit too, and a random z may contradict the label. At
10, z is dear: the label is followed, and most of the handwriting is lost. At 1, priors fitted to
the codes of each digit avoid the contradiction, and holes.

    Higgins et al. 2017, beta-VAE, ICLR, equation 4
    Sohn et al. 2015, Learning Structured Output Representation, NIPS; its encoder sees y
    Kingma and Welling 2013, Auto-Encoding Variational Bayes, arXiv:1312.6114
    Ghosh et al. 2020, From Variational to Deterministic Autoencoders, arXiv:1903.12436, section 4

    python cvae.py --beta 10 --epochs 15  # the defaults; test -ELBO 137.65 ± 0.20 nats
    python cvae.py --beta 1               # 99.39 ± 0.08 nats, 94.97 ± 0.08 with the fitted prior
"""
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal

import common


class CVAE(nn.Module):
    """784-400-20 and back: an encoder and a decoder of one hidden layer each."""

    def __init__(self, image_size=784, h_dim=400, z_dim=20, n_classes=10, mean=0.13):
        super().__init__()
        self.z_dim, self.n_classes = z_dim, n_classes
        self.to_hidden = nn.Linear(image_size, h_dim)
        self.to_mu = nn.Linear(h_dim, z_dim)
        self.to_log_var = nn.Linear(h_dim, z_dim)
        self.from_latent = nn.Linear(z_dim + n_classes, h_dim)
        self.to_logits = nn.Linear(h_dim, image_size)
        # Start from the mean pixel or, better, the mean image (vae.py, 3 epochs: 0.5 nats less).
        self.to_logits.bias.data.copy_(torch.logit(torch.as_tensor(mean), eps=1e-3))

    def encode(self, x):
        """x (N, 784) to mu and log_var (N, z_dim): the Gaussian posterior q(z|x)."""
        h = F.relu(self.to_hidden(x))  # (N, h_dim)
        return self.to_mu(h), self.to_log_var(h)

    def logits(self, z, y):
        """z (N, z_dim), one-hot y (N, n_classes) to Bernoulli logits (N, 784), for the loss."""
        return self.to_logits(F.relu(self.from_latent(torch.cat([z, y], dim=1))))

    def decode(self, z, y):
        """The same as probabilities (N, 784): the picture."""
        return torch.sigmoid(self.logits(z, y))

    def forward(self, x, y):
        """x_reconst (N, 784), by one sampled z each, and mu, log_var (N, z_dim)."""
        mu, log_var = self.encode(x)
        return self.decode(reparameterize(mu, log_var), y), mu, log_var


def reparameterize(mu, log_var):
    """z = mu + sigma * noise (N, z_dim): gradients reach mu and sigma. Kingma and Welling, 2.4."""
    return mu + torch.exp(log_var / 2) * torch.randn_like(mu)


def reconstruction(logits, x):
    """-log p(x|...), Bernoulli pixels: summed over them, averaged over images; nats per image."""
    return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)


def gaussian_kl(mu, log_var):
    """KL(q(z|x) || N(0, I)), nats per image. Kingma and Welling, appendix B."""
    return 0.5 * (mu.pow(2) + log_var.exp() - 1 - log_var).sum() / len(mu)


def train(model, data, epochs=15, batch_size=128, lr=8e-3, beta=10.0):
    """Minimises reconstruction + beta * KL; returns the history, a dict of metrics per epoch."""
    n, device, history = len(data.x_train), data.x_train.device, []
    labels = common.one_hot(data.y_train, model.n_classes)  # (N, n_classes)
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

            x, y = data.x_train[batch], labels[batch]  # (B, 784), (B, n_classes)
            mu, log_var = model.encode(x)  # (B, z_dim), (B, z_dim)
            z = reparameterize(mu, log_var)  # (B, z_dim)
            recon = reconstruction(model.logits(z, y), x)  # nats per image
            kl = gaussian_kl(mu, log_var)  # nats per image
            loss = recon + weight * kl
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            total += (recon + kl).detach() * len(x)  # stays on the device: no step waits for it
        metrics = {"train": total.item() / n, "seconds": time.perf_counter() - start}
        history.append({**metrics, **evaluate(model, data)})
        print(f"epoch {epoch:3}", *(f" {name} {value:.2f}" for name, value in history[-1].items()))
    return history


@torch.no_grad()
def evaluate(model, data, prior=None, seed=0):
    """The metrics of the test images, by one z each, in nats per image; loss is the -ELBO.

    With a prior in place of N(0, I), it is loss_fitted. Raises FloatingPointError if not finite.
    """
    model.eval()
    x, generator = data.x_test, torch.Generator("cpu").manual_seed(seed)
    y = common.one_hot(data.y_test, model.n_classes)  # (N, n_classes)
    mu, log_var = model.encode(x)  # (N, z_dim), (N, z_dim)
    noise = torch.randn(mu.shape, generator=generator, device="cpu").to(mu.device)
    z = mu + torch.exp(log_var / 2) * noise  # (N, z_dim)
    recon, kl = reconstruction(model.logits(z, y), x).item(), gaussian_kl(mu, log_var).item()
    if not math.isfinite(recon + kl):
        raise FloatingPointError("the training diverged: the loss is not finite; try a smaller lr")
    metrics = {"recon": recon, "kl": kl, "loss": recon + kl}
    if prior is not None:
        log_prior = torch.cat([prior.log_prob(part[:, None]) for part in z.split(1000)])[y == 1]
        change = Normal(0.0, 1.0).log_prob(z).sum(1) - log_prior  # (N,)
        metrics["loss_fitted"] = recon + kl + change.mean().item()
    return metrics


# After training: a prior that fits the codes, and the pictures.

@torch.no_grad()
def fit_prior(model, data, n_components=10):
    """A prior p(z|y) that fits: a mixture for each class, over the codes of its training images."""
    codes = [reparameterize(*model.encode(x)) for x in data.x_train.split(10000)]
    return common.fit_mixture(torch.cat(codes), n_components, data.y_train, model.n_classes)


@torch.no_grad()
def draw(model, data, prior, history):
    """This script's pictures: a dict of figures by name."""
    x, y, plot = data.x_test[:12], data.y_test[:12], common.plot_conditional_generation
    return {
        "reconstruction": common.plot_reconstruction(model, x, common.one_hot(y, model.n_classes)),
        "generation": plot(model, title="z ~ N(0, I), the same down a column"),
        "fitted": plot(model, prior=prior, title="z ~ fitted prior of the class"),
        "handwriting": common.plot_handwriting(model, x),
        "loss": common.plot_curves(history)}


def options():
    """The parser of the command line."""
    parser = common.options(__doc__)
    parser.add_argument("--lr", type=float, default=8e-3, help="peak learning rate")
    parser.add_argument("--beta", type=float, default=10.0, help="weight of the KL; 1: the ELBO")
    parser.add_argument("--digit", type=int, choices=range(10), help="draw 64 of this digit, too")
    return parser


def main(argv=()):
    """Trains (or loads), fits the prior, evaluates, draws, saves; returns the test metrics."""
    args = options().parse_args(argv)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    data = common.load_mnist(args.data, args.device)
    torch.manual_seed(args.seed)
    if args.load:
        model, history = common.load_checkpoint(args.load, CVAE, args.device)
    else:
        model = CVAE(z_dim=args.z_dim, mean=data.x_train.mean(0)).to(args.device)
        history = train(model, data, args.epochs, args.batch_size, args.lr, args.beta)
    torch.manual_seed(args.seed)  # so that --load draws the same pictures
    prior = fit_prior(model, data)
    metrics = evaluate(model, data, prior)
    print("test", *(f" {name} {value:.2f}" for name, value in metrics.items()))
    figures = draw(model, data, prior, history)
    if args.digit is not None:
        figures["digit"] = common.plot_conditional_generation(model, 64, args.digit)
    common.save(args, "cvae", figures, model, history, data.source)
    return metrics


if __name__ == "__main__":
    common.run(main)
