"""The pictures that train.py and test.py write into a run's folder: PNG sheets of images with truth and prediction."""
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from images import reading
from images.reading import COLOURED
from running import process

# contours in colours that colour-blind people tell apart (Okabe & Ito)
CAPTION = 330  # pixels that a picture's column may be widened to for its caption
TRUTH, PREDICTED, BOTH = (86, 180, 233), (230, 159, 0), (255, 255, 255)


def save_samples(fields, masks, file, most=4, side=256):
    """input | truth | prediction of up to `most` fields that have a mask (each process has those of its own fields),
    evenly taken, the middle side x side pixels of each."""
    rows, found = [], [i for i, mask in enumerate(masks) if mask is not None]
    for place in np.linspace(0, len(found) - 1, min(most, len(found))).round().astype(int):
        i = found[place]
        window = middle(fields[i].shape, side)
        image = as_picture(fields[i].window(*window))
        truth, predicted = (np.repeat(mask.numpy()[window][..., None] * np.uint8(255), 3, 2)
                            for mask in (fields[i].mask, masks[i]))
        zoom = max(1, side // max(truth.shape))  # small fields grow
        rows.append([(caption, enlarge(picture, zoom)) for caption, picture in
                     ((fields[i].record.image.stem, image), ("truth", truth), ("prediction", predicted))])
    save_grid(rows, file)


def save_sheet(shown, file, side=320):
    """Fields, as (caption, Field, np.packbits(predicted mask, 1)): as they are, and with the contours of truth and
    prediction. They may come one at a time: their middles alone are kept."""
    rows = []
    for caption, field, bits in shown:
        height, width = field.shape
        window = middle((height, width), side)
        predicted = np.unpackbits(bits[window[0]], 1, width)[:, window[1]].astype(bool)
        shown_height, shown_width = predicted.shape
        zoom = max(2, 2 * side // max(predicted.shape))  # contours stay thin, small fields grow
        image = enlarge(as_picture(field.window(*window)), zoom)
        truth, predicted = (border(enlarge(mask, zoom)) for mask in (field.mask[window].numpy(), predicted))
        part = f", middle {shown_height} x {shown_width}" if (shown_height, shown_width) != field.shape else ""
        lines = image.mean(2, keepdims=True).astype(np.uint8).repeat(3, 2)  # grey, on which all contours are seen
        lines[truth], lines[predicted], lines[truth & predicted] = TRUTH, PREDICTED, BOTH
        rows.append([(f"{caption}  {field.record.image.stem} ({height} x {width}{part}){colours_of(field)}", image),
                     ("contours: blue truth, orange prediction, white both", lines)])
        del field  # before the next is read
    save_grid(rows, file)


def save_labels(records, probabilities, truth, classes, file, most=12, columns=4, width=240):
    """Up to `most` pictures, evenly taken from the best to the worst classified (by likelihood), with true labels and
    those found (above 0.5) with their probabilities. Frame: blue where all labels are right, orange where not."""
    likelihood = np.log(np.where(truth, probabilities, 1 - probabilities).clip(1e-9)).sum(1)
    order = np.argsort(-likelihood, kind="stable")
    cells = []
    for i in order[np.linspace(0, len(order) - 1, min(most, len(order))).round().astype(int)]:
        picture = Image.fromarray(np.moveaxis(reading.read_picture(records[i].image), 0, -1))
        height = min(max(width // 8, round(width * picture.height / picture.width)), 2 * width)  # strips stay legible
        colour = TRUTH if ((probabilities[i] > 0.5) == truth[i]).all() else PREDICTED
        framed = Image.new("RGB", (width, height), colour)
        framed.paste(picture.resize((width - 8, height - 8)), (4, 4))
        ranked = sorted(zip(probabilities[i], classes), reverse=True)
        found = ", ".join(f"{name} {p:.2f}" for p, name in ranked if p > 0.5)
        found = found or "none ({1} {0:.2f})".format(*ranked[0])
        wanted = ", ".join(name for name, is_true in zip(classes, truth[i]) if is_true) or "none"
        cells.append((f"truth: {wanted}\nfound: {found}", np.asarray(framed)))
    save_grid([cells[i:i + columns] for i in range(0, len(cells), columns)], file, strip=36)


def save_curves(history, file):
    """Loss, score and learning rate by epoch, from the rows of metrics.csv. Returns a hint where matplotlib, which
    draws them, is not installed, else ""."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        return "no curves.png: pip install matplotlib to have it drawn"
    name, title = ("val_iou", "validation IoU") if "val_iou" in history[0] else ("val_f1_micro", "validation F1")
    best = max(history, key=lambda row: row[name])
    panels = {"loss": {"train_loss": "training", "val_loss": "validation"},
              f"{title}, best {best[name]:.4f} in epoch {best['epoch']}":
                  {"val_iou": ""} if name == "val_iou" else {"val_f1_micro": "micro", "val_f1_macro": "macro"},
              "learning rate": {"lr": ""}}
    figure = Figure((11, 3.2), dpi=110, layout="constrained")
    epochs = [row["epoch"] for row in history]
    for axes, (title, columns) in zip(figure.subplots(1, 3), panels.items()):
        for (column, label), colour, marker in zip(columns.items(), (TRUTH, PREDICTED), "os"):
            axes.plot(epochs, [row[column] for row in history], marker=marker, markersize=3, label=label,
                      color=np.array(colour) / 255)
        if len(columns) > 1:
            axes.legend(frameon=False)
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(0)  # of the learning rate
    with process.replacing(file) as handle:
        figure.savefig(handle, format="png")
    return ""


def as_picture(image):
    """Image (C, H, W) in [0, 1] -> uint8 (H, W, 3); one channel becomes grey, of many the first three are shown."""
    image = image.numpy()
    shown = np.concatenate([image, np.zeros_like(image[:1])])[:3] if len(image) > 1 else image.repeat(3, 0)
    return (shown.transpose(1, 2, 0) * 255).round().astype(np.uint8)


def colours_of(field):
    """Which stain as_picture shows in which colour, where there are several."""
    if len(field.channels) < 2 or field.channels == COLOURED:
        return ""
    return "  " + ", ".join(map(" ".join, zip(COLOURED, field.channels)))


def enlarge(picture, zoom):
    return picture.repeat(zoom, 0).repeat(zoom, 1)


def middle(shape, side):
    return tuple(slice(max(0, (size - side) // 2), max(0, (size - side) // 2) + side) for size in shape)


def border(mask):
    """The pixels of a mask (H, W) that touch its outside."""
    around = np.pad(mask, 1, "edge")
    return mask & ~(around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:])


def save_grid(rows, file, gap=6, strip=20):
    """A PNG of rows of (caption, uint8 (H, W, 3)), the caption in a strip above its picture."""
    font = ImageFont.load_default(13)
    widths = [max(max(cell.shape[1], *(min(CAPTION, int(font.getlength(line[:CAPTION])) + 1)
                                       for line in caption.split("\n")))
                  for caption, cell in (row[c] for row in rows if c < len(row))) + gap for c in range(len(rows[0]))]
    heights = [max(cell.shape[0] for _, cell in row) + strip + gap for row in rows]
    canvas = Image.new("RGB", (sum(widths) + gap, sum(heights) + gap), (24, 24, 24))
    draw = ImageDraw.Draw(canvas)
    for r, row in enumerate(rows):
        for c, (caption, cell) in enumerate(row):
            x, y = gap + sum(widths[:c]), gap + sum(heights[:r])
            for number, line in enumerate(caption.split("\n")):
                line = line[:widths[c] // 2]  # no more letters fit, so that the next lines need not take long
                while len(line) > 3 and draw.textlength(line, font) > widths[c] - gap:
                    line = line[:-4] + "..."
                draw.text((x, y + 16 * number), line, (230, 230, 230), font)
            canvas.paste(Image.fromarray(cell), (x, y + strip))
    with process.replacing(file) as handle:  # whoever is looking at the old picture sees it whole
        canvas.save(handle, "PNG")
