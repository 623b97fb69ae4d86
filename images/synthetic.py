"""The built-in synthetic set: stained nuclei like those that a Vectra scanner images, as inForm writes them.

Each phenotype is a set of markers in a ring around a nucleus. Images have up to five phenotypes, haze, photon noise,
and stains whose strength differs from patient to patient.
"""
import math

import numpy as np
import tifffile
import torch
from numpy.random import Generator
from torchvision.transforms.v2.functional import gaussian_blur

# Pages in this order: as in real inForm files, DAPI is not the first.
STAINS = {  # name: colour in the thumbnail
    "CXCR3": (80, 0, 135),
    "CD19": (255, 0, 60),
    "CXCR5": (160, 0, 0),
    "DAPI": (0, 0, 150),
    "PD1": (0, 80, 120),
    "CD4": (0, 160, 0),
    "CD27": (200, 0, 0),
    "Autofluorescence": (30, 30, 20),
}
PHENOTYPES = {  # name: markers around a nucleus
    "b": ("CD19",),
    "tfh": ("CD4", "CXCR5", "PD1", "CXCR3"),
    "tfh217": ("CD4", "CXCR5", "PD1"),
    "tfhl": ("CD4", "PD1"),
    "other": ("CD4", "CD27"),
}
SIZE = (256, 320)
BRIGHT = 28                 # the intensity that the thumbnail shows at full colour; brighter pixels lose their hue
PATIENTS = ["train"] * 8 + ["validation"] * 2 + ["test"] * 2  # the split of each, from number 1 on
FIELDS_PER_PATIENT = 8      # component files with masks, to segment and to classify
PICTURES_PER_PATIENT = 16   # further images of which the thumbnail alone is kept, to classify


def draw_field(patient_rng: Generator, rng: Generator) -> tuple:
    """Draw an image: stains {name: (H, W) float32, in inForm's units}, labels (H, W) uint16, its phenotypes.

    patient_rng draws what a patient's images share: how strong each stain is, how large the nuclei are, how crowded.
    """
    strengths = patient_rng.lognormal(0, 0.15, len(STAINS))
    mean_radius = patient_rng.uniform(7.5, 10)
    crowd = patient_rng.integers(70, 120)
    chromatin = _blur(rng.standard_normal(SIZE, np.float32), 1.2) * 3     # texture within nuclei, sd ~ 1
    phenotypes, cells = _draw_phenotypes(rng)
    stains = {name: np.zeros(SIZE, np.float32) for name in STAINS}
    labels = np.zeros(SIZE, np.uint16)
    nuclei = _place_nuclei(rng, crowd, mean_radius)
    cells += [()] * crowd                                                 # the rest has no markers
    for number, (nucleus, markers) in enumerate(zip(nuclei, cells), 1):
        window, inside = _draw_shape(rng, *nucleus)
        nucleus = (inside + 0.5).clip(0, 1)
        labels[window][nucleus > 0.5] = number
        stains["DAPI"][window] += (
            rng.lognormal(0, 0.45)
            * nucleus
            * (1 + 0.2 * chromatin[window]).clip(0)
        )
        ring = (inside + 4).clip(0, 1) * (1 - 0.7 * nucleus)              # cytoplasm and membrane
        for marker in markers:
            stains[marker][window] += rng.lognormal(0, 0.2) * ring
    for name, strength in zip(STAINS, strengths):
        stains[name] = _expose(rng, stains[name], strength)
    return stains, labels, phenotypes


def _draw_phenotypes(rng):
    """The phenotypes of an image, and the markers of each cell that has some."""
    phenotypes = [name for name in PHENOTYPES if rng.random() < 0.4]
    phenotypes = phenotypes or [str(rng.choice(list(PHENOTYPES)))]
    cells = []
    for name in phenotypes:
        cells += [PHENOTYPES[name]] * rng.integers(6, 14)
    return phenotypes, cells


def _place_nuclei(rng, count, mean_radius):
    """(y, x, radius) of nuclei, half of them in clusters; they may overlap by a third of their radii."""
    clusters = rng.uniform(0, SIZE, (4, 2))
    placed = np.empty((0, 3))
    for _ in range(4 * count):
        radius = mean_radius * rng.lognormal(0, 0.18)
        centre = rng.uniform(0, SIZE)
        if rng.random() < 0.5:
            centre = clusters[rng.integers(4)] + rng.normal(0, 28, 2)
        distance = np.hypot(*(placed[:, :2] - centre).T)
        free = distance > 0.7 * (placed[:, 2] + radius)
        inside = (centre >= 0) & (centre < SIZE)
        if inside.all() and free.all():
            placed = np.vstack([placed, [*centre, radius]])
        if len(placed) == count:
            break
    return placed


def _draw_shape(rng, y, x, radius):
    """A window around a nucleus, an ellipse, and how many pixels inside its border each pixel of the window lies."""
    height, width = SIZE
    reach = int(2 * radius) + 6
    rows = slice(max(0, int(y) - reach), int(y) + reach)
    columns = slice(max(0, int(x) - reach), int(x) + reach)
    dy = np.arange(height)[rows, None] - y                                # (h, 1)
    dx = np.arange(width)[columns] - x                                    # (w,)
    angle = rng.uniform(0, math.pi)
    stretch = rng.uniform(1, 1.3)
    along = (dx * math.cos(angle) + dy * math.sin(angle)) / stretch
    across = (dy * math.cos(angle) - dx * math.sin(angle)) * stretch
    inside = radius - np.hypot(along, across)
    return (rows, columns), inside


def _expose(rng, stain, strength):
    """What the camera sees of a stain (H, W), in inForm's units."""
    clean = _blur(stain, 1.0) * strength + 0.1                            # some haze everywhere
    noisy = clean + np.sqrt(clean / 40) * rng.standard_normal(SIZE, np.float32)  # of 40 photons at brightness 1
    steps = np.round(noisy.clip(0) * 20 * 16)                             # few digits: they compress well
    return (steps / 16).astype(np.float32)


def _blur(image, sigma):
    size = 2 * math.ceil(3 * sigma) + 1
    return gaussian_blur(torch.from_numpy(image)[None], size, sigma)[0].numpy()


def thumbnail(stains: dict) -> np.ndarray:
    """Return inForm's RGB thumbnail, uint8 (H / 4, W / 4, 3): the stains in their colours."""
    rgb = 0
    for name, stain in stains.items():
        small = stain.reshape(len(stain) // 4, 4, -1, 4).mean((1, 3))
        colour = np.array(STAINS[name], np.float32)
        rgb = rgb + small[..., None] / BRIGHT * colour
    return rgb.clip(0, 255).astype(np.uint8)


def write_inform(path, slide: str, stains: dict) -> None:
    """Write a component file as inForm does: a page a stain, named in its XML, and the thumbnail as the last page."""
    with tifffile.TiffWriter(path) as tiff:
        for name, stain in stains.items():
            colour = ",".join(map(str, STAINS[name]))
            tiff.write(
                stain,
                compression="zlib",
                compressionargs={"level": 1},
                metadata=None,
                description=_xml("FullResolution", slide, f"  <Name>{name}</Name>\n  <Color>{colour}</Color>\n"),
            )
        tiff.write(
            thumbnail(stains),
            photometric="rgb",
            compression="zlib",
            metadata=None,
            description=_xml("Thumbnail", slide),
        )


def _xml(kind, slide, more=""):
    return f"""<?xml version="1.0" encoding="utf-16"?>
<PerkinElmer-QPI-ImageDescription>
  <ImageType>{kind}</ImageType>
  <SlideID>{slide}</SlideID>
{more}</PerkinElmer-QPI-ImageDescription>"""
