"""Reading of image files: TIFF stacks with named stains (inForm), PNG, JPEG; masks; intensities brought to [0, 1]."""
import ctypes
import logging
import re
import warnings
import xml.etree.ElementTree as ET
from functools import partial
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from running.process import InputError, one_line

# a damaged file is reported in one line, here, not by the decoders
for library in ("tifffile", "PIL"):
    logging.getLogger(library).setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", module="PIL")
for file in Path(Image.__file__).parents[1].glob("pillow.libs/libtiff*"):  # as wheels for Linux bring it
    ctypes.CDLL(str(file)).TIFFSetErrorHandler(None)
Image.MAX_IMAGE_PIXELS = 1 << 29  # Pillow refuses images of twice as many

TIFF = (".tif", ".tiff")
IMAGES = (*TIFF, ".png", ".jpg", ".jpeg")
GREY = ("grey",)              # the channels of files without named stains
COLOURED = ("red", "green", "blue")
PERCENTILES = (1, 99.8)       # become 0 and 1, as in StarDist
SAMPLE = 50_000_000           # pixels a channel; of larger images the percentiles are those of an even sample
LARGE = 1 << 28               # bytes of a page
MICROMETRE = ("um", "µm", "\\u00B5m", "micron")  # as OME and ImageJ write it
LARGEST_PIXEL = 10            # micrometres; larger ones are a resolution for printing
LARGEST = 1e37                # of float values, so that float32 can hold the difference of two


def read_image(path: Path | str, channels: tuple = ("DAPI",)) -> tuple[np.ndarray, tuple]:
    """Return the image (C, H, W) of a TIFF, PNG or JPEG file, as it is stored, and the names of its channels.

    channels: the pages to take from a TIFF of several, by their stains' names or by number, from 0. A page without a
    name of its own is called by its number. A file of one page is taken
    whole: 1 channel if grey, 3 if coloured; alpha is dropped. Of z-stacks and time series only pages with names are
    taken. Types wider than 4 bytes become float32. Raises InputError.
    """
    image, names = _read(path, partial(_stain_pages, channels=channels))
    if len(names) == 1 and len(image) == 3:
        names = COLOURED
    if names in (GREY, COLOURED) and len(channels) > 1:
        raise InputError(f"{path}: is one page, without stains to take {', '.join(channels)} (--channel) from")
    if image.dtype == bool:
        image = image.astype(np.uint8)
    return image, names                                             # (C, H, W)


def read_mask(path: Path | str) -> np.ndarray:
    """Return the values (H, W) that a mask, a PNG or TIFF file, holds: 0 is background, anything else nucleus.

    Of inForm's _binary_seg_maps.tif the page of the nuclei is taken; of coloured masks, True where a pixel is not
    black. Raises InputError.
    """
    if Path(path).suffix.lower() in (".jpg", ".jpeg"):
        raise InputError(f"{path}: a mask must be PNG or TIFF: JPEG blurs its values")
    values, _ = _read(
        path,
        partial(_single_page, tag="CompartmentType", wanted="Nucleus"),
        palette=False
    )
    return values[0] if len(values) == 1 else values.any(0)         # (H, W)


def read_rgb(path: Path | str) -> np.ndarray:
    """Return the image to classify, uint8 (3, H, W): the RGB thumbnail of an inForm component file, or an image file.

    Grey is repeated for the three colours. Values of other types than 8 bits are normalised. Raises InputError.
    """
    image, _ = _read(
        path,
        partial(_single_page, tag="ImageType", wanted="Thumbnail")
    )
    if len(image) not in (1, 3):
        raise InputError(f"{path}: has {len(image)} channels; an image to classify is grey or RGB")
    return as_rgb(image)


def as_channels(image: np.ndarray) -> np.ndarray:
    """Return an image (H, W), (C, H, W) or (H, W, 1, 3 or 4) as (C, H, W), without alpha."""
    image = np.asarray(image)
    if image.ndim == 3 and image.shape[2] in (1, 3, 4):
        return np.moveaxis(image, 2, 0)[:3]
    return image.reshape(-1, *image.shape[-2:])


def as_rgb(image: np.ndarray) -> np.ndarray:
    """Return an image (1 or 3, H, W) of any type as uint8 (3, H, W), see read_rgb."""
    if image.dtype != np.uint8:
        unit = normalise(image, find_limits(image))
        image = (unit * 255).round().astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(image, (3, *image.shape[1:])))


def stain_names(path: Path | str) -> list:
    """Return the names by which read_image finds each page of a file that can be read."""
    if Path(path).suffix.lower() not in TIFF:
        return [*GREY]
    with tifffile.TiffFile(path) as tiff:
        known, _ = _named_pages(tiff)
    return list(filter(None, known))


def pixel_size(path: Path | str) -> float | None:
    """Return the width of a pixel in micrometres, by OME's, ImageJ's or the TIFF's own metadata, None without these."""
    if Path(path).suffix.lower() not in TIFF:
        return None
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        pixels = page.get_resolution("MICROMETER")[0]
        if (tiff.imagej_metadata or {}).get("unit") in MICROMETRE:
            pixels = page.resolution[0]
        size = 1 / (pixels or 1e-9)                                 # some files say 0
        for told in _xml(tiff.ome_metadata or "").iterfind("{*}Image[1]/{*}Pixels[@PhysicalSizeX]"):
            if told.get("PhysicalSizeXUnit", "um") in MICROMETRE:
                size = float(told.get("PhysicalSizeX"))
    return size if size < LARGEST_PIXEL else None


def find_limits(image: np.ndarray) -> tuple:
    """Return the percentiles 1 and 99.8 of each channel of an image (C, H, W): two arrays (C, 1, 1), float32.

    Above SAMPLE pixels they are estimated from every second, third, ... pixel. In a channel so dark that both are
    equal, the second is the largest value.
    """
    pixels = image.reshape(len(image), -1)                          # (C, H * W)
    step = 1 + pixels.shape[1] // SAMPLE
    sample = pixels[:, ::step].astype(np.float32)
    limits = np.percentile(sample, PERCENTILES, axis=1)             # (2, C)
    low, high = limits[..., None, None].astype(np.float32)          # (C, 1, 1) each
    largest = image.max((1, 2), keepdims=True).astype(np.float32)
    return low, np.where(high > low, high, largest)


def normalise(image: np.ndarray, limits: tuple) -> np.ndarray:
    """Return an image, or a part of it, as float32 in [0, 1]: the image's limits become 0 and 1."""
    low, high = limits
    image = image.astype(np.float32, copy=False).clip(low, high)
    return (image - low) / np.where(high > low, high - low, 1)      # (C, H, W)


def channel_names(text: str) -> tuple:
    """Return the names of --channel: "DAPI,CD4" -> ("DAPI", "CD4")."""
    return tuple(filter(None, map(str.strip, text.split(","))))


# ------------------------------------------------------------------------------------------------------------- decoding
def _read(path, choose, palette=True):
    """Values (C, H, W) of an image file and the names of its pages.

    choose: takes a TiffFile, returns [(name, page)]. palette: colours in place of numbers where there is a palette.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise InputError("no such file")
        if path.suffix.lower() in TIFF:
            with tifffile.TiffFile(path) as tiff:
                len(tiff.pages)  # ends where the pages of a damaged file form a circle; a loop over them would not
                names, pages = zip(*choose(tiff))
                values = [_page_values(path, page, palette) for page in pages]
                image = values[0]
                if len(values) > 1:
                    shape = (sum(map(len, values)), *image.shape[1:])
                    whole = tifffile.create_output(_place(image), shape, np.result_type(*values))
                    image = np.concatenate(values, out=whole)
        else:
            names = GREY
            with Image.open(path, formats=("PNG", "JPEG")) as opened:
                image = _pillow_values(opened, palette)
        if image.dtype.itemsize > 4:
            image = image.astype(np.float32)
        if image.dtype.kind == "f" and not max(image.max(), -image.min()) < LARGEST:
            raise InputError(f"holds pixels that are NaN or infinite (or above {LARGEST}); save it with finite values")
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except Exception as error:  # decoders raise nearly every kind
        raise InputError(f"{path}: cannot be read; is it a whole TIFF, PNG or JPEG file? Rare compressions need pip "
                         f"install imagecodecs ({one_line(error, 120)})") from error
    return image, names


def _place(values):
    """Where tifffile puts the pixels of a page or array: large ones stay on the disk, mapped into memory. Compressed
    ones are unpacked there piece by piece, into a temporary file."""
    return "memmap" if values.nbytes > LARGE else None


def _page_values(path, page, palette):
    """Values (C, H, W) of a page of a TIFF, without alpha."""
    if page.photometric <= tifffile.PHOTOMETRIC.RGB:
        if len(page.dataoffsets) < np.prod(page.chunked) and not page.is_contiguous:
            raise ValueError("strips are missing")
        try:
            array = page.asarray(out=_place(page), squeeze=False).squeeze(1)  # (planes, H, W, samples)
        except (ValueError, ImportError) as error:
            if "imagecodecs" not in str(error):
                raise
        else:
            array = np.moveaxis(array, -1, 1).reshape(-1, *array.shape[1:3])  # (planes * samples, H, W)
            if page.photometric == tifffile.PHOTOMETRIC.RGB:
                return array[:3]
            alpha = np.count_nonzero(page.extrasamples)
            return array[:len(array) - alpha]
    # Pillow knows palettes, other colour spaces and LZW, which inForm writes
    with Image.open(path) as opened:
        opened.seek(page.index)
        array = _pillow_values(opened, palette)
    # stored values count, also where 0 is shown as white; Pillow inverts those of 8 bits or less
    inverted = page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and array.itemsize == 1
    return ~array if inverted else array


def _pillow_values(opened, palette):
    """Values (C, H, W) of an opened image, without alpha."""
    if opened.mode in ("CMYK", "YCbCr", "LAB") or palette and opened.mode in ("P", "PA"):
        opened = opened.convert("RGB")
    array = np.atleast_3d(np.asarray(opened))                                 # (H, W, C)
    if opened.mode.endswith("A"):
        array = array[..., :-1]
    return np.moveaxis(array, -1, 0)


# ------------------------------------------------------------------------------------------------------- pages of TIFFs
def _stain_pages(tiff, channels):
    """[(name, page)] of the stains `channels`, in this order."""
    known, stack = _named_pages(tiff)
    if list(known) == [*GREY]:
        return [*known.items()]
    return [_find_page(known, name, stack) for name in channels]


def _named_pages(tiff):
    """{name: page} of a file's stains, and what is wrong with it if it is a stack."""
    pages = [
        page
        for page in tiff.pages
        if _tag(page, "ImageType") in ("", "FullResolution")
    ]
    pages = [page for page in pages if page.shape[:2] == pages[0].shape[:2]]
    names = _imagej_labels(tiff) or _ome_names(tiff)
    if len(pages) == 1 or len(names) != len(pages):
        names = [_tag(page, "Name") for page in pages]
    stack = _stack(tiff)
    if names == [""] and not stack:
        return {GREY[0]: pages[0]}, stack
    capitals = [name.upper() for name in names]
    known = {}
    for place, page in enumerate(pages):
        name = names[place]
        if not name or capitals.count(name.upper()) > 1:  # by such a name it would not be found again
            name = "" if stack else f"page {place}"
        known[name] = page
    return known, stack


def _find_page(known, wanted, stack):
    """(name, page) of the page with this name, in capitals or not, or with this number."""
    for place, name in enumerate(known):
        if wanted.upper() == name.upper():
            return wanted, known[name]
        if wanted == str(place) and not stack:
            return name, known[name]
    has = ", ".join(known)
    raise InputError(stack or f"no single page named {wanted!r} (--channel); it has {has}; or give a number, from 0")


def _single_page(tiff, tag, wanted):
    """The page whose tag says this, or else the only page without this tag."""
    pages = [
        page
        for page in tiff.pages
        if _tag(page, tag) == wanted
    ] or [
        page
        for page in tiff.pages
        if not _tag(page, tag)
    ]
    pages = [page for page in pages if page.shape == pages[0].shape]
    if len(pages) != 1:
        raise InputError(f"has {len(pages)} pages to choose from; it must be one, or one of {tag} {wanted}")
    if stack := _stack(tiff):
        raise InputError(stack)
    return [(wanted, pages[0])]


def _stack(tiff):
    """What is wrong with a z-stack or time series, or a large ImageJ file, whose one header stands for all pages."""
    series = tiff.series[0]
    size = dict(zip(series.axes, series.shape))
    flat = size.get("Z", 1) == size.get("T", 1) == 1
    if flat and series.size <= len(tiff.pages) * tiff.pages[0].size:
        return None
    axes = " x ".join(f"{count} {axis}" for axis, count in size.items())
    return f"is a stack, {axes}; save a projection, with one page a stain"


def _tag(page, name):
    """What inForm's XML in a page's description says under this name."""
    return _xml(page.description).findtext(name, "").strip()


def _ome_names(tiff):
    channels = _xml(tiff.ome_metadata or "").iterfind("{*}Image[1]//{*}Channel")
    return [channel.get("Name", "").strip() for channel in channels]


def _xml(text):
    """The root of an XML text; of other texts an empty one."""
    try:
        return ET.fromstring(text.strip("\0 \n"))
    except ET.ParseError:
        return ET.Element("other")


def _imagej_labels(tiff):
    """The labels of an ImageJ file's pages, unless they number slices or name files, as in "c:1/3 - a.czi"."""
    labels = (tiff.imagej_metadata or {}).get("Labels", [])
    names = [label.partition("\n")[0].strip() for label in np.atleast_1d(labels)]
    no_stain = re.compile(r"^\d*$|\b[czt]:\d+/\d+|\.(tiff?|czi|nd2|lif|lsm|png|jpe?g)\b", re.IGNORECASE)
    return [] if any(map(no_stain.search, names)) else names
