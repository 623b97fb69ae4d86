"""The method: Autoencoder Post-Processing (APP) in its two forms, the losses and the metrics.

Singh & Cirrone 2022, "A Data-Efficient Deep Learning Framework for Segmentation and Classification of Histopathology
Images", arXiv 2207.06489.

Shapes: N images, C classes (background, nucleus, of 3 also border), H x W pixels. logits z (N, C, H, W), truth y
(N, H, W) of class indices, IGNORED where nobody annotated, one-hot truth Y (N, C, H, W), class weights w (C,).

The loss of a training step is   L = CE_w(z, y) + dice + app_weight * penalty + own   with (penalty, own) from one of
the forms below. CE_w is the mean over annotated pixels, dice is dice_loss. `--recipe paper` has no dice, and multiplies
L by the pixels' summed weight, as published.

conv (this project's form). A convolutional autoencoder D(E(.)) learns what masks look like; its encoder E says how far
the prediction is from the truth as a *shape*:
    penalty = mean over positions of (d^T S^-1 d) / K,   d = E(softmax z) - E(Y) at a position, of K channels
    own     = CE(D(E(Y)), y)
  where S (K, K) is the running covariance of E(Y).
  - `own` is the only term that trains the autoencoder, and it sees true masks alone. So E and D model nuclei, not the
    network's errors.
  - `penalty` trains the network alone: in it E's weights and E(Y) are constants. If the penalty trained E as well, it
    would be least for an E that maps everything to one point: the embedding would collapse and the penalty vanish.
  - The axes of an embedding are arbitrary (D can undo any linear map), they drift while E learns, and nearly all of its
    variance lies along one: how much of its square of 8 x 8 pixels is nucleus. Hence the Mahalanobis distance, in which
    each direction has variance 1. Whatever the autoencoder, the penalty is 0 for a perfect prediction, about 1 for one
    that embeds to the mean, about 2 for the mask of another image. S is a running mean over about 10 steps, so that a
    batch without a nucleus, whose covariance is 0, does no harm; it starts from 1, so that an embedding that is still
    noise counts little; a thousandth of its mean variance is added to each direction's, so that it can be inverted.
  - `own` and CE share no weights, so no factor between them is needed: app_weight is that of the penalty alone.

linear (as published). A row-wise autoencoder A, a stack of Linear layers along the width, gets the logits themselves
(of 3 classes those of nucleus and border as one, by logsumexp):
    penalty = CE_w(A(z), y)
    own     = 0
  Both networks learn from the sum, from the penalty both by app_weight; A is a post-processor that the saved model
  drops.

In both the autoencoder has an optimizer of its own, as published (app_optimizer, below); the network's (make_parts in
train.py) has none of the autoencoder's weights. Both are used in training only: the saved network and its cost are
those of a network trained without.

Classification has several labels an image: logits z (N, C), truth y (N, C) of 0 and 1, one sigmoid a class; its loss is
FocalLoss, below.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}
BORDER = 0.5  # of a nucleus's depth, see nucleus_classes
IGNORED = 255  # in a truth: pixels that nobody annotated, which neither losses nor scores see
# notebooks of the paper; 14.79 % of the private set's pixels are nucleus
PUBLISHED_CLASS_WEIGHTS = {"background": 0.1479, "nucleus": 0.8521}
PUBLISHED_PHENOTYPE_WEIGHTS = {
    "b": 0.9475,
    "tfh": 0.4934,
    "tfh217": 0.5029,
    "tfhl": 0.2,
    "other": 1.0,
}


# ---------------------------------------------------------------------------------------------------------------- APP
class ConvAutoencoder(nn.Module):
    """A small autoencoder of masks: stride 8, 13 thousand weights.

    encode: class probabilities (N, classes, H, W) -> embedding (N, channels, H/8, W/8), sizes rounded up
    decode: embedding, (H, W) -> logits of the reconstruction (N, classes, H, W)
    forward: both
    """

    def __init__(self, classes: int = 2, channels: int = 16, activation: str = "gelu"):
        super().__init__()
        act = ACTIVATIONS[activation]
        self.encoder = nn.Sequential(
            nn.Conv2d(classes, 16, 4, stride=4),
            act(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            act(),
            nn.Conv2d(32, channels, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            act(),
            nn.ConvTranspose2d(32, 16, 2, stride=2),
            act(),
            nn.ConvTranspose2d(16, classes, 4, stride=4),
        )

    def encode(self, masks):
        height, width = masks.shape[-2:]
        whole = F.pad(masks, (0, -width % 8, 0, -height % 8), mode="replicate")
        return self.encoder(whole)

    def decode(self, embedding, size):
        height, width = size
        return self.decoder(embedding)[..., :height, :width]

    def forward(self, masks):
        return self.decode(self.encode(masks), masks.shape[-2:])


class RowAutoencoder(nn.Module):
    """The published autoencoder, along the width: 480-15360-256-128-64-32-16-32-64-128-256-480 for width 480.

    An activation follows every layer, the last one too, as in the authors' notebook. Other widths keep the published
    ratio of 32 between the second layer and the first.
    forward: logits (N, C, H, width) -> logits (N, C, H, width)
    """

    def __init__(self, width: int = 480, activation: str = "gelu"):
        super().__init__()
        sizes = (width, 32 * width, 256, 128, 64, 32, 16, 32, 64, 128, 256, width)
        layers = []
        for inputs, outputs in zip(sizes, sizes[1:]):
            layers.append(nn.Linear(inputs, outputs))
            layers.append(ACTIVATIONS[activation]())
        self.layers = nn.Sequential(*layers)

    def forward(self, logits):
        return self.layers(logits)


class ConvAPP(nn.Module):
    """The conv form. forward: logits (N, C, H, W), truth (N, H, W) -> penalty, own (scalars, see the file's head).

    class_weights are for the linear form alone: masks are reconstructed unweighted.
    """

    def __init__(self, classes: int = 2, activation: str = "gelu"):
        super().__init__()
        self.autoencoder = ConvAutoencoder(classes, activation=activation)
        channels = self.autoencoder.encoder[-1].out_channels
        self.register_buffer("covariance", torch.eye(channels))

    def forward(self, logits, truth, class_weights=None):
        predicted, one_hot = masks(logits, truth)                                      # (N, C, H, W) each
        embedding = self.autoencoder.encode(one_hot)                                   # (N, K, H/8, W/8)
        reconstruction = self.autoencoder.decode(embedding, truth.shape[-2:])          # (N, C, H, W)
        own = F.cross_entropy(reconstruction.float(), truth, ignore_index=IGNORED)
        target = embedding.detach().float()
        # In this call E's weights are constants, also in the backward pass that comes after they learn again: the
        # gradient passes through E to the logits.
        self.autoencoder.requires_grad_(False)
        apart = self.autoencoder.encode(predicted).float() - target                    # (N, K, H/8, W/8)
        self.autoencoder.requires_grad_(True)
        apart = apart.movedim(1, -1)                                                   # (N, H/8, W/8, K)
        with torch.autocast(logits.device.type, enabled=False):
            penalty = ((apart @ self.precision(target)) * apart).mean()
        return penalty, own

    @torch.no_grad()
    def precision(self, target):
        """Return the inverse (K, K) of the covariance, updated with embeddings (N, K, h, w) of true masks."""
        flat = target.transpose(0, 1).flatten(1)                                       # (K, N h w)
        self.covariance.lerp_(flat.cov(correction=0), 0.1)
        floor = 1e-3 * self.covariance.diagonal().mean().clamp(min=1e-6)
        identity = torch.eye(len(flat), device=flat.device)
        return torch.linalg.inv_ex(self.covariance + floor * identity).inverse  # inv_ex: no wait for the GPU


class LinearAPP(nn.Module):
    """The linear form, of two classes: those of nuclei are taken together.

    forward: logits (N, C, H, width), truth (N, H, width) -> penalty, own = 0.
    """

    def __init__(self, width: int = 480, activation: str = "gelu"):
        super().__init__()
        self.autoencoder = RowAutoencoder(width, activation)

    def forward(self, logits, truth, class_weights=None):
        logits = torch.stack([logits[:, 0], logits[:, 1:].logsumexp(1)], 1)             # (N, 2, H, width)
        weights = None if class_weights is None else class_weights[:2]
        truth = truth.clamp(max=1).masked_fill(truth == IGNORED, IGNORED)
        penalty = F.cross_entropy(self.autoencoder(logits).float(), truth, weights, ignore_index=IGNORED)
        return penalty, torch.zeros_like(penalty)


def build_app(form: str, width: int, classes: int = 2, activation: str = "gelu") -> nn.Module | None:
    """Return the APP module of `form` ("conv" or "linear"; None for "none") for training tiles `width` pixels wide."""
    if form == "none":
        return None
    return ConvAPP(classes, activation) if form == "conv" else LinearAPP(width, activation)


def app_optimizer(app: nn.Module) -> torch.optim.Optimizer:
    """Return the autoencoder's own optimizer, as published and under every recipe: Adam, 1e-3, constant, no weight
    decay."""
    return torch.optim.Adam(app.parameters(), lr=1e-3, fused=True)


# ------------------------------------------------------------------------------------------------------------- losses
def masks(logits: Tensor, truth: Tensor) -> tuple:
    """Return class probabilities and true masks, (N, C, H, W) each in [0, 1], of logits (N, C, H, W) and truth
    (N, H, W). IGNORED pixels are background in both."""
    classes = torch.arange(logits.shape[1], device=truth.device)[:, None, None]
    ignored = truth[:, None] == IGNORED                                                 # (N, 1, H, W)
    one_hot = (truth[:, None].masked_fill(ignored, 0) == classes).float()               # (N, C, H, W)
    return torch.where(ignored, one_hot, logits.softmax(1)), one_hot


def dice_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Return the soft Dice loss (Milletari et al. 2016, arXiv 1606.04797) of logits (N, C, H, W) and truth (N, H, W), a
    scalar in [0, 1]: the mean over images and classes of 1 - 2 * sum(p * Y) / (sum(p) + sum(Y)), sums over pixels.

    In it a class counts as much as another one, however few its pixels. One that an image has not gives no gradient.
    """
    predicted, one_hot = masks(logits, truth)                                           # (N, C, H, W) each
    shared = (predicted * one_hot).sum((2, 3))                                          # (N, C)
    areas = (predicted + one_hot).sum((2, 3))                                           # (N, C)
    return 1 - (2 * shared / areas.clamp(min=1)).mean()


class FocalLoss(nn.Module):
    """Focal loss (Lin et al. 2017, arXiv 1708.02002, eq. 5) of multi-label logits, mean over images and classes:

        alpha * w_c * (1 - p_t)^gamma * -log(p_t),   p_t = sigmoid(z) where y = 1, 1 - sigmoid(z) where y = 0

    gamma takes weight from what is classified well already; gamma 0 is the (weighted) binary cross-entropy.
    class_weights: w (C,), None for 1. forward: logits (N, C), truth (N, C) in [0, 1], float32 -> scalar.

    log(p_t) is logsigmoid(+-z), and (1 - p_t)^gamma is exp(gamma * logsigmoid(-+z)): neither rounds to log(0), nor has
    it an infinite slope, whatever z is.
    """

    def __init__(self, alpha: float = 1.0, gamma: float = 2.0, class_weights=None):
        super().__init__()
        self.alpha = alpha
        self.gamma = gamma
        weights = 1.0 if class_weights is None else class_weights
        self.register_buffer("class_weights", torch.as_tensor(weights, dtype=torch.float32))

    def forward(self, logits, truth):
        yes = F.logsigmoid(logits)                                                      # log p        (N, C)
        no = F.logsigmoid(-logits)                                                      # log(1 - p)   (N, C)
        of_true = -truth * torch.exp(self.gamma * no) * yes
        of_false = -(1 - truth) * torch.exp(self.gamma * yes) * no
        return self.alpha * ((of_true + of_false) * self.class_weights).mean()


def inverse_frequency_weights(counts: list[int]) -> list[float]:
    """Return class weights in [0.2, 1] from how many training images have each class: 1 / count, brought linearly to
    [0.2, 1] (notebooks of the paper). The commonest class gets 0.2, the rarest 1; all 1 if they are equally common.
    A class without an image gets 1 and has no part in the others' weights."""
    inverse = [1 / count for count in counts if count]
    low = min(inverse, default=0)
    high = max(inverse, default=0)
    weights = []
    for count in counts:
        if count and high > low:
            weights.append(0.2 + 0.8 * (1 / count - low) / (high - low))
        else:
            weights.append(1.0)
    return weights


def balanced_class_weights(nucleus_fraction: float) -> list[float]:
    """Return [background, nucleus] weights of the cross-entropy: each class weighs what the other's share of the pixels
    is, in (0, 1).

    That is inverse frequency scaled to sum 1. The published 0.1479, 0.8521 are this formula's for the private set.
    """
    return [nucleus_fraction, 1 - nucleus_fraction]


# ------------------------------------------------------------------------------------------------------------- nuclei
def nucleus_classes(labels: Tensor, classes: int = 3) -> Tensor:
    """Return what a network learns of a label image (H, W): class indices (H, W), uint8.

    0 background, 1 nucleus; of 3 classes 2 is a nucleus's border, BORDER of its depth: so the cores of nuclei that
    touch lie apart, and all have one that are at least 3 pixels wide. Depth is counted from what is not this nucleus,
    see rings.
    """
    truth = (labels > 0).byte()
    if classes == 2:
        return truth
    depth = truth + rings((labels > 0) & ~outline(labels), max(labels.shape), square=True)
    places = labels.long()
    deepest = torch.zeros(int(labels.max()) + 1).scatter_reduce(0, places.flatten(), depth.flatten(), "amax")
    border = (BORDER * deepest).round().clamp(min=1)[places]
    return truth + truth * (depth <= border)


def rings(inside: Tensor, most: int, square: bool = False) -> Tensor:
    """Return how deep each pixel of a mask (H, W) lies in it, float32, in rings of pixels: 1 at its border, up to
    `most`, 0 outside. What lies beyond the image is not known and makes no border.

    Square rings go by the sides and corners of pixels; the others by sides and by both in turn, so that they are nearly
    round.
    """
    depth = inside.float()
    for ring in range(1, most):
        wide = F.pad(inside, (1, 1, 1, 1), value=True)
        column = wide[:-2] & wide[1:-1] & wide[2:]
        sides = column if square or ring % 2 == 0 else wide[1:-1]
        inside = sides[:, :-2] & column[:, 1:-1] & sides[:, 2:]
        if not inside.any():
            break
        depth += inside
    return depth


def outline(labels: Tensor) -> Tensor:
    """Return the pixels (H, W), bool, of nuclei that touch what is not this nucleus, also by a corner."""
    numbers = labels[None].float()                                                      # whole up to 16 million
    unlike = F.max_pool2d(numbers, 3, 1, 1) != -F.max_pool2d(-numbers, 3, 1, 1)
    return unlike[0] & (labels > 0)


def overlaps(found: Tensor, truth: Tensor) -> tuple:
    """Return the pairs of nuclei in two label images (H, W) that share pixels: numbers in `found` (M,) and in `truth`
    (M,), shared pixels (M,); and the pixels of each number in `found` and in `truth`."""
    areas = found.flatten().bincount()
    true_areas = truth.flatten().bincount()
    both = (found > 0) & (truth > 0)
    stretches, lengths = (found[both].long() * len(true_areas) + truth[both]).unique_consecutive(return_counts=True)
    pairs, places = stretches.unique(return_inverse=True)  # sorting all pixels would take several times as long
    shared = torch.zeros_like(pairs).index_add_(0, places, lengths)
    return pairs // len(true_areas), pairs % len(true_areas), shared, areas, true_areas


def annotated(labels: Tensor, known: Tensor) -> Tensor:
    """Return a label image (H, W) without the pixels that are not known (H, W), and without the nuclei of which more
    than half is not."""
    inside = labels[known].bincount(minlength=int(labels.max()) + 1)
    beyond = labels[~known].bincount(minlength=len(inside))
    return labels * (known & (inside >= beyond)[labels])


def match_nuclei(found: Tensor, truth: Tensor, known: Tensor | None = None) -> tuple:
    """Return the IoUs (M,) of at least 0.5 between the nuclei of two label images (H, W), float64, and how many nuclei
    each has. Above 0.5 a nucleus has one partner at most, so that no assignment needs to be solved.

    known: pixels (H, W), bool, that count, see annotated."""
    if known is not None:
        found = annotated(found, known)
        truth = annotated(truth, known)
    numbers, true_numbers, shared, areas, true_areas = overlaps(found, truth)
    ious = shared.double() / (areas[numbers] + true_areas[true_numbers] - shared)
    return ious[ious >= 0.5], areas[1:].count_nonzero().item(), true_areas[1:].count_nonzero().item()


def average_precision(right: int, found: int, true: int) -> float:
    """Return TP / (TP + FP + FN), as the Data Science Bowl 2018 and StarDist count it; 1 where nothing is and nothing
    was found."""
    wanted = found + true - right
    return right / wanted if wanted else 1.0


def image_ap50(matched: tuple) -> float:
    """Return the average_precision of an image at an IoU above 0.5, from what match_nuclei gave."""
    ious, found, true = matched
    return average_precision((ious > 0.5).sum().item(), found, true)


def nucleus_scores(matched: list) -> dict:
    """Return scores of nuclei as objects, from what match_nuclei gave for each image.

    ap50: average_precision of the nuclei of all images, those with an IoU above 0.5 being right; ap50_mean_image: the
    mean of the images' own; ap: the mean over IoUs of at least 0.55, 0.6, ... 0.95 and above 0.5. f1_50; pq: panoptic
    quality (Kirillov et al. 2019, arXiv 1801.00868, eq. 1); count_ratio: found / true. nuclei: the true ones.
    """
    ious = torch.cat([of_image for of_image, _, _ in matched])
    found = sum(number for _, number, _ in matched)
    true = sum(number for _, _, number in matched)
    right = ious[ious > 0.5]
    ap50 = average_precision(len(right), found, true)
    stricter = [average_precision((ious >= percent / 100).sum().item(), found, true) for percent in range(55, 100, 5)]
    mean_number = (found + true) / 2
    return {
        "ap50": ap50,
        "ap50_mean_image": sum(map(image_ap50, matched)) / len(matched),
        "ap": (ap50 + sum(stricter)) / 10,
        "f1_50": len(right) / mean_number if mean_number else 1.0,
        "pq": right.sum().item() / mean_number if mean_number else 1.0,
        "count_ratio": found / true if true else float(found == 0),
        "nuclei": true,
    }


# ------------------------------------------------------------------------------------------------------------ metrics
def confusion(predicted: Tensor, truth: Tensor) -> Tensor:
    """Return pixel counts (tp, fp, fn, tn), int64 (4,), of a predicted and a true mask (H, W), bool."""
    tp = (predicted & truth).sum()
    fp = predicted.sum() - tp
    fn = truth.sum() - tp
    return torch.stack([tp, fp, fn, predicted.numel() - tp - fp - fn])


def image_iou(counts) -> float:
    """Return the IoU, TP / (TP + FP + FN), from pixel counts (tp, fp, fn, tn); 1 for an image rightly left empty."""
    tp, fp, fn, _ = counts
    wanted = tp + fp + fn
    return float(tp / wanted) if wanted else 1.0


def segmentation_scores(counts: Tensor) -> dict:
    """Return scores in [0, 1] of the nucleus class from a table of pixel counts (images, 4): tp, fp, fn, tn.

    All but mean_image_iou pool the pixels of all images, as the paper does. mean_image_iou is the mean of the images'
    own IoUs. Where no nucleus is and none was found, IoU, dice, precision and recall are 1; any other 0 / 0, as the
    precision of finding nothing, is 0.
    """
    table = counts.tolist()
    tp, fp, fn, tn = (sum(column) for column in zip(*table))
    accuracy = (tp + tn) / (tp + fp + fn + tn)
    if tp + fp + fn == 0:
        tp = 1  # rightly left empty
    return {
        "iou": tp / (tp + fp + fn),
        "dice": 2 * tp / (2 * tp + fp + fn),
        "pixel_accuracy": accuracy,
        "precision": tp / max(1, tp + fp),
        "recall": tp / max(1, tp + fn),
        "mean_image_iou": sum(map(image_iou, table)) / len(table),
        "images": len(table),
    }


def classification_scores(predicted: Tensor, truth: Tensor, names: list[str]) -> dict:
    """Return scores in [0, 1] of multi-label predictions: predicted and truth (images, C), bool; names of C classes.

    micro pools the decisions of all classes (the published code's "F1" is recall_micro), macro is the mean over all
    classes. 0 / 0 counts as 0, as in scikit-learn: a class without a single image (support 0) has F1 0 and lowers the
    macro scores. subset_accuracy: the share of images whose labels are all
    right. per_class: {name: {precision, recall, f1, support}}.
    """
    tp = (predicted & truth).sum(0).double()                                            # (C,)
    found = predicted.sum(0).double()
    support = truth.sum(0).double()
    scores = {}
    for name, score in _precision_recall_f1(tp.sum(), found.sum(), support.sum()).items():
        scores[f"{name}_micro"] = score.item()
    of_class = _precision_recall_f1(tp, found, support)                                 # {name: (C,)}
    for name, values in of_class.items():
        scores[f"{name}_macro"] = values.mean().item()
    scores["subset_accuracy"] = (predicted == truth).all(1).double().mean().item()
    scores["images"] = len(truth)
    scores["per_class"] = {}
    for i, name in enumerate(names):
        own = {score: values[i].item() for score, values in of_class.items()}
        scores["per_class"][name] = {**own, "support": int(support[i])}
    return scores


def _precision_recall_f1(tp, found, support):
    """Precision, recall and F1 from counts of right, found and true labels; 0 / 0 is 0."""
    return {
        "precision": tp / found.clamp(min=1),
        "recall": tp / support.clamp(min=1),
        "f1": 2 * tp / (found + support).clamp(min=1),
    }
