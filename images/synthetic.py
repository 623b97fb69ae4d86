"""The built-in synthetic set: fields of stained nuclei like those of a Vectra scanner, as inForm writes them.

Each phenotype is a set of markers in a ring around a nucleus; fields have up to five phenotypes, uneven light, haze,
fibres, debris, out-of-focus glow, photon noise, and stains whose strength differs from patient to patient.
"""
import math

import numpy as np
import tifffile

# Pages in this order: as in real inForm files, DAPI is not the first. A phenotype is a set of markers around a nucleus.
STAINS = {"CXCR3": (80, 0, 135), "CD19": (255, 0, 60), "CXCR5": (160, 0, 0), "DAPI": (0, 0, 150), "PD1": (0, 80, 120),
          "CD4": (0, 160, 0), "CD27": (200, 0, 0), "Autofluorescence": (30, 30, 20)}  # name: colour in the thumbnail
PHENOTYPES = {"b": ("CD19",), "tfh": ("CD4", "CXCR5", "PD1", "CXCR3"), "tfh217": ("CD4", "CXCR5", "PD1"),
              "tfhl": ("CD4", "PD1"), "other": ("CD4", "CD27")}
SIZE = (256, 320)
BRIGHT = 28                 # the intensity that the thumbnail shows at full colour; brighter pixels lose their hue
PATIENTS = {"train": range(1, 9), "validation": range(9, 11), "test": range(11, 13)}
FIELDS_PER_PATIENT = 8      # component files with masks, to segment and to classify
PICTURES_PER_PATIENT = 16   # further fields of which the thumbnail alone is kept, to classify


def draw_field(patient_rng, rng):
    """One field: stains {name: (H, W) float32, in inForm's units}, labels (H, W) uint16, its phenotypes.

    patient_rng draws what a patient's fields share: how strong each stain is, how large the nuclei are, how crowded.
    """
    height, width = SIZE
    strength = dict(zip(STAINS, patient_rng.lognormal(0, 0.15, len(STAINS))))
    mean_radius, crowd = patient_rng.uniform(7.5, 10), int(patient_rng.integers(70, 120))
    stains = {name: np.zeros((height, width), np.float32) for name in STAINS}
    labels = np.zeros((height, width), np.uint16)
    chromatin = _blur(rng.standard_normal((height, width), np.float32), 1.2) * 3        # texture within nuclei, sd ~ 1
    wanted = [name for name in PHENOTYPES if rng.random() < 0.4] or [list(PHENOTYPES)[rng.integers(len(PHENOTYPES))]]
    kinds = [name for name in wanted for _ in range(rng.integers(6, 14))]               # one a cell; the rest have none
    for number, (y, x, radius) in enumerate(_place_nuclei(rng, crowd, mean_radius), 1):
        reach = int(2 * radius) + 6
        rows, columns = slice(max(0, int(y) - reach), int(y) + reach), slice(max(0, int(x) - reach), int(x) + reach)
        dy, dx = np.ogrid[rows.start:min(rows.stop, height), columns.start:min(columns.stop, width)]
        dy, dx = (dy - y).astype(np.float32), (dx - x).astype(np.float32)
        angle, stretch = rng.uniform(0, math.pi), rng.uniform(1, 1.3)
        along = (dx * math.cos(angle) + dy * math.sin(angle)) / stretch
        across = (dy * math.cos(angle) - dx * math.sin(angle)) * stretch
        turn = np.arctan2(across, along)
        waves = sum(rng.uniform(0, 0.07) * np.cos(k * turn + rng.uniform(0, 2 * math.pi)) for k in (2, 3, 5))
        inside = radius * (1 + waves) - np.hypot(along, across)                         # pixels inside the border
        nucleus = (inside + 0.5).clip(0, 1)
        stains["DAPI"][rows, columns] += rng.lognormal(0, 0.45) * nucleus * (1 + 0.2 * chromatin[rows, columns]).clip(0)
        labels[rows, columns][nucleus > 0.5] = number
        if number <= len(kinds):
            ring = (inside + 4).clip(0, 1) * (1 - 0.7 * nucleus)                        # cytoplasm and membrane
            for marker in PHENOTYPES[kinds[number - 1]]:
                stains[marker][rows, columns] += rng.lognormal(0, 0.2) * ring
    _add_debris(rng, stains["DAPI"])
    fibres = np.exp(-(_clouds(rng, 7) / 0.12) ** 2) * _clouds(rng, 4).clip(0)           # lines where a cloud crosses 0
    for name in STAINS:
        uneven = 1 + 0.3 * _clouds(rng, 3)                                              # illumination
        haze = 0.08 + 0.12 * _clouds(rng, 4).clip(0) + (0.5 if name == "Autofluorescence" else 0.2) * fibres
        signal = _blur(stains[name], 1.0)
        glow = _enlarge(_blur(signal[::4, ::4], 2.5))                                   # light from out of focus
        clean = ((signal + 0.4 * glow) * strength[name] * uneven + haze).clip(0)
        photons = 40.0                                                                  # a pixel of brightness 1
        noisy = clean + np.sqrt(clean / photons) * rng.standard_normal(clean.shape, np.float32)
        noisy += 0.01 * rng.standard_normal(clean.shape, np.float32)                    # read noise
        stains[name] = (np.round(noisy.clip(0) * 20 * 16) / 16).astype(np.float32)      # few digits: they compress well
    return stains, labels, wanted


def _place_nuclei(rng, count, mean_radius):
    """(y, x, radius) of nuclei, half of them in clusters; they may overlap by a third of their radii."""
    height, width = SIZE
    clusters = rng.uniform((0, 0), (height, width), (4, 2))
    placed = np.empty((0, 3))
    for _ in range(4 * count):
        radius = mean_radius * rng.lognormal(0, 0.18)
        centre = rng.uniform((0, 0), (height, width))
        if rng.random() < 0.5:
            centre = clusters[rng.integers(len(clusters))] + rng.normal(0, 28, 2)
        distance = np.hypot(*(placed[:, :2] - centre).T)
        inside = (centre >= 0).all() and (centre < (height, width)).all()
        if inside and (distance > 0.7 * (placed[:, 2] + radius)).all():
            placed = np.vstack([placed, [*centre, radius]])
        if len(placed) == count:
            break
    return placed


def _add_debris(rng, stain):
    """Bright specks too small to be nuclei."""
    for y, x in rng.uniform((3, 3), np.array(stain.shape) - 4, (8, 2)).astype(int):
        stain[y:y + rng.integers(1, 4), x:x + rng.integers(1, 4)] += rng.uniform(0.5, 2)


def _blur(image, sigma):
    """Gaussian blur (H, W), the border repeated."""
    reach = math.ceil(3 * sigma)
    kernel = np.exp(-np.arange(-reach, reach + 1) ** 2 / (2 * sigma ** 2)).astype(np.float32)
    kernel /= kernel.sum()
    for _ in range(2):  # along the rows, then, turned, along the columns
        padded = np.pad(image, ((reach, reach), (0, 0)), "edge")
        image = sum(weight * padded[i:i + len(image)] for i, weight in enumerate(kernel)).T
    return np.ascontiguousarray(image)


def _clouds(rng, cells):
    """Smooth noise (H, W) about within [-1, 1], with `cells` random values along each axis."""
    return _enlarge(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))


def _enlarge(grid):
    """A small array drawn out to the field's size, smoothly: along each axis a cubic step from value to value."""
    for size in SIZE:  # along the rows, then, turned, along the columns
        place = np.linspace(0, len(grid) - 1, size, dtype=np.float32)
        before = np.minimum(place.astype(int), len(grid) - 2)
        step = place - before
        step = (step * step * (3 - 2 * step))[:, None]
        grid = ((1 - step) * grid[before] + step * grid[before + 1]).T
    return grid


def thumbnail(stains):
    """The picture that inForm shows of a field, uint8 (H, W, 3): the stains in their colours at a quarter of the size.
    """
    colours = 0
    for name, stain in stains.items():
        small = stain.reshape(stain.shape[0] // 4, 4, stain.shape[1] // 4, 4).mean((1, 3))
        colours = colours + small[..., None] / BRIGHT * np.array(STAINS[name], np.float32)
    return colours.clip(0, 255).astype(np.uint8)


def write_inform(path, slide, stains):
    def description(kind, extra=""):
        return (f'<?xml version="1.0" encoding="utf-16"?>\n<PerkinElmer-QPI-ImageDescription>\n'
                f"  <ImageType>{kind}</ImageType>\n  <SlideID>{slide}</SlideID>\n{extra}"
                f"</PerkinElmer-QPI-ImageDescription>")

    with tifffile.TiffWriter(path) as tiff:
        for name, stain in stains.items():
            colour = ",".join(map(str, STAINS[name]))
            extra = f"  <Name>{name}</Name>\n  <Color>{colour}</Color>\n"
            tiff.write(stain, photometric="minisblack", compression="zlib", compressionargs={"level": 1}, metadata=None,
                       description=description("FullResolution", extra))
        tiff.write(thumbnail(stains), photometric="rgb", compression="zlib", metadata=None,
                   description=description("Thumbnail"))
