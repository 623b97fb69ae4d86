"""Trial: other forms of the conv APP, trained by train.py with one of them in place of --app conv.

    python benchmarks/forms.py FORM --data DIR --out RUN [train.py's flags]

Writes RUN/app.csv: at some steps the penalty's gradient in ratio to the cross-entropy's, and what the embeddings are.
"""
import csv
import sys
from pathlib import Path

import harness
import torch
import torch.nn.functional as F

import data
import dedl
import train

AT = (0, 3, 10, 30, 60, 100, 150, 200, 250, 299)
PRETRAINING = 300
seen = {}


class Trial(dedl.ConvAPP):
    """form: embed, the distance of embeddings; recon, the cross-entropy of the prediction's reconstruction, the
    autoencoder learning from true masks alone; joint, the same with the autoencoder learning from it; denoise, as embed
    with an autoencoder that restores damaged masks; white, the distance with all directions of the embedding scaled to
    variance 1 (Mahalanobis); nolag, as embed with the variance of this batch alone; percept, the distance of all maps
    of the encoder; project, the cross-entropy of the logits against the reconstruction of the prediction by that.
    pretrained: the autoencoder has learnt before, and learns no more."""

    def __init__(self, form, pretrained):
        super().__init__()
        self.form, self.pretrained, self.step = form, pretrained, 0
        self.register_buffer("covariance", torch.eye(16))
        if pretrained:
            crops = seen["crops"]
            optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3)
            for step in range(PRETRAINING):
                truth = torch.stack([crops[step * 8 + i][1] for i in range(8)])
                optimizer.zero_grad()
                self.learn(self.one_hot(truth), truth).backward()
                optimizer.step()

    def one_hot(self, truth):
        return F.one_hot(truth, 2).permute(0, 3, 1, 2).float()

    def learn(self, one_hot, truth):
        source = damaged(one_hot) if self.form in ("denoise", "project") else one_hot
        return dedl.cross_entropy(self.autoencoder(source).float(), truth)

    def forward(self, logits, truth, class_weights=None):
        one_hot = self.one_hot(truth)
        own = torch.zeros(()) if self.pretrained else self.learn(one_hot, truth)
        with torch.no_grad():
            target = self.autoencoder.encode(one_hot).float()
            self.variance.lerp_(target.var((0, 2, 3)).mean(), 0.1)
        self.autoencoder.requires_grad_(self.form == "joint")
        probabilities = logits.softmax(1)
        predicted = self.autoencoder.encode(probabilities).float()
        distance = ((predicted - target) ** 2).mean() / self.variance.clamp(min=1e-6)
        again = self.autoencoder.decode(predicted, truth.shape[-2:]).float()
        if self.form in ("embed", "denoise"):
            penalty = distance
        elif self.form == "white":
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                flat = (target - target.mean((0, 2, 3), keepdim=True)).permute(1, 0, 2, 3).flatten(1)
                self.covariance.lerp_(flat @ flat.T / flat.shape[1], 0.1)
                floor = 1e-3 * self.covariance.trace() / len(self.covariance)
                inverse = torch.linalg.inv(self.covariance + floor * torch.eye(len(self.covariance)))
            apart = (predicted - target).permute(0, 2, 3, 1)                                # (N, H/8, W/8, E)
            with torch.autocast("cpu", enabled=False):
                penalty = ((apart @ inverse) * apart).mean()
        elif self.form == "nolag":
            penalty = ((predicted - target) ** 2).mean() / target.var((0, 2, 3)).mean().clamp(min=1e-3 * self.variance)
        elif self.form == "percept":
            x = torch.cat([probabilities, one_hot])
            penalty, n = 0, len(logits)
            down, right = -x.shape[-2] % 8, -x.shape[-1] % 8
            x = F.pad(x, (0, right, 0, down), mode="replicate")
            for layer in self.autoencoder.encoder:
                x = layer(x)
                if not isinstance(layer, torch.nn.GELU):
                    p, t = x.float().split(n)
                    t = t.detach()
                    penalty = penalty + ((p - t) ** 2).mean() / t.var((0, 2, 3)).mean().clamp(min=1e-6) / 3
        elif self.form in ("recon", "joint"):
            penalty = dedl.cross_entropy(again, truth, class_weights)
        elif self.form == "project":
            penalty = F.cross_entropy(logits, again.detach().softmax(1))
        self.autoencoder.requires_grad_(True)
        if self.step in AT and logits.requires_grad:
            note(self, logits, truth, class_weights, penalty, target, again, one_hot)
        self.step += 1
        return penalty, own


def damaged(one_hot):
    """Masks with patches from elsewhere, blurred and with noise: soft, as predictions are."""
    nucleus = one_hot[:, 1:]
    coarse = torch.rand(len(nucleus), 1, 8, 8)
    where = F.interpolate((coarse < 0.15).float(), nucleus.shape[-2:], mode="nearest")
    nucleus = torch.where(where > 0, nucleus.roll(1, 0), nucleus)
    nucleus = F.avg_pool2d(F.pad(nucleus, (2, 2, 2, 2), mode="replicate"), 5, 1)
    nucleus = (nucleus + 0.1 * torch.randn_like(nucleus)).clamp(0, 1)
    return torch.cat([1 - nucleus, nucleus], 1)


def note(app, logits, truth, class_weights, penalty, target, again, one_hot):
    of_penalty, = torch.autograd.grad(penalty, logits, retain_graph=True)
    entropy = dedl.cross_entropy(logits, truth, class_weights)
    of_entropy, = torch.autograd.grad(entropy, logits, retain_graph=True)
    spectrum = torch.linalg.svdvals(target.permute(0, 2, 3, 1).flatten(0, 2) - target.mean((0, 2, 3))) ** 2
    true_again = app.autoencoder(one_hot).argmax(1) if isinstance(app, Trial) else None
    row = {"step": app.step, "cross_entropy": entropy.item(), "penalty": penalty.item(),
           "gradient_ratio": (of_penalty.norm() / of_entropy.norm()).item(),
           "cosine": F.cosine_similarity(of_penalty.flatten(), of_entropy.flatten(), 0).item(),
           "variance": app.variance.item(), "dimensions": (spectrum.sum() ** 2 / (spectrum ** 2).sum()).item(),
           "truth_again": iou(true_again, truth), "prediction": iou(logits.argmax(1), truth),
           "prediction_again": iou(again.argmax(1), truth)}
    file = seen["out"] / "app.csv"
    new = not file.exists()
    with open(file, "a", newline="") as handle:
        writer = csv.DictWriter(handle, row)
        if new:
            writer.writeheader()
        writer.writerow(row)


def iou(found, truth):
    found, truth = found.bool(), truth.bool()
    return ((found & truth).sum() / (found | truth).sum().clamp(min=1)).item()


def main():
    form, *flags = sys.argv[1:]
    if form not in ("none", "linear", "conv"):
        of_crops = data.Crops.__init__

        def keep(self, *how):
            of_crops(self, *how)
            seen["crops"] = self
        data.Crops.__init__ = keep
        seen["out"] = Path(flags[flags.index("--out") + 1])
        dedl.build_app = lambda *how, **more: Trial(form.removeprefix("pre-"), form.startswith("pre-"))
    train.main([*flags, "--app", form if form in ("none", "linear") else "conv"])


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] == "--help":
        print(__doc__)
    else:
        harness.runs.command(lambda _: main())
