"""Reading of image files: TIFF stacks with named stains (inForm), PNG, JPEG; masks; intensities brought to [0, 1]."""
import ctypes
import logging
import math
import re
import warnings
import xml.etree.ElementTree as ET
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image, UnidentifiedImageError

from running.process import InputError

# of broken files one clear line is said, here, instead of what the decoders print
logging.getLogger("tifffile").setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", module="PIL")
Image.MAX_IMAGE_PIXELS = None  # see _refuse_too_large
for library in Path(Image.__file__).parents[1].glob("pillow.libs/libtiff*"):  # as wheels for Linux bring it
    ctypes.CDLL(str(library)).TIFFSetErrorHandler(None)

TIFF = (".tif", ".tiff")
IMAGES = (*TIFF, ".png", ".jpg", ".jpeg")
MAX_PIXELS = 1 << 30          # of an image; more are refused, and more than MAX_RATIO a byte of its file:
MAX_RATIO = 300_000           # a white fax of 32,000 pixels a row has nearly so many, all else far fewer
PERCENTILES = (1, 99.8)       # brought to 0 and 1, as StarDist does
GREY, COLOURED = ("grey",), ("red", "green", "blue")  # channels of files without stains, which are taken whole
LARGE = 1 << 26               # pixels; larger images are read and normalised with no copy of their size


def read_image(path, channels=("DAPI",), dtype=np.float32):
    """Raw image (C, H, W) of a TIFF, PNG or JPEG file, float32 or, with dtype None, as it is there; and its channels'
    names.

    Of a TIFF with several pages those named in `channels` are taken, in that order; a number names a page by its place,
    from 0. A page without a name of its own is called "0 of 3", by which it is found in files of 3 pages alone. Of
    z-stacks and time series no page is taken by its place. Single pages and pictures are taken whole, 1 channel if
    grey, 3 if coloured (alpha is dropped).
    Raises InputError.
    """
    path = Path(path)
    if path.suffix.lower() in TIFF:
        with _reading(path), tifffile.TiffFile(path) as tiff:
            pages, stack = _stain_pages(path, tiff), _stack(tiff)
            if len(pages) == 1 and not pages[0][1] and not stack and not any(" of " in name for name in channels):
                chosen = [(*GREY, pages[0][0])]
            else:
                chosen = [_find_page(path, pages, name, stack) for name in channels]
            arrays = [_page_array(path, page) for _, page in chosen]
        names = tuple(name for name, _ in chosen)
    else:
        arrays, names = [decode_picture(path)], GREY
    arrays = [channels_first(array) for array in arrays]
    image = np.concatenate(arrays) if len(arrays) > 1 else arrays[0]
    if dtype or image.dtype.itemsize > 4:
        with np.errstate(over="ignore"):  # of what float32 cannot hold infinity remains
            image = image.astype(np.float32, copy=False)
    if len(names) == 1 and len(image) == 3:
        names = COLOURED
    if names in (GREY, COLOURED) and len(channels) > 1:
        raise InputError(f"{path}: is one page, without stains to take {', '.join(channels)} (--channel) from")
    _refuse_not_finite(path, image)
    return image, names                                                                                   # (C, H, W)


def read_mask(path):
    """Mask (H, W) bool of a PNG or TIFF file: True wherever the stored value is not 0 (labels are fine).

    Of inForm's _binary_seg_maps.tif the page of the compartment Nucleus is taken. Raises InputError.
    """
    path = Path(path)
    if path.suffix.lower() in (".jpg", ".jpeg"):
        raise InputError(f"{path}: a mask must be PNG or TIFF: JPEG blurs its values")
    if path.suffix.lower() in TIFF:
        with _reading(path), tifffile.TiffFile(path) as tiff:
            compartments = [_description(page).get("CompartmentType") for page in tiff.pages]
            pages = [page for page in tiff.pages if page.shape == tiff.pages[0].shape]
            if "Nucleus" in compartments:
                pages = [tiff.pages[compartments.index("Nucleus")]]
            elif any(compartments):
                has = ", ".join(filter(None, compartments))
                raise InputError(f"{path}: no page of compartment Nucleus; it has {has}")
            if len(pages) != 1:
                raise InputError(f"{path}: holds {len(pages)} pages; a mask must be one, or have one named Nucleus")
            if stack := _stack(tiff):
                raise InputError(f"{path}: {stack}; a mask must be one page")
            mask = _page_array(path, pages[0], palette_colours=False)
    else:
        mask = decode_picture(path, palette_index=True)
    _refuse_not_finite(path, mask)
    return (channels_first(mask) != 0).any(0)                                                            # (H, W)


def read_picture(path):
    """The picture that is classified, uint8 (3, H, W): of an inForm component file its RGB thumbnail (the paper's
    "autofluorescence" image), else a TIFF, PNG or JPEG of one page, grey repeated for the three colours.

    Values that are not 8 bits deep are brought to [0, 255] by the channels' percentiles. Raises InputError.
    """
    path = Path(path)
    if path.suffix.lower() in TIFF:
        with _reading(path), tifffile.TiffFile(path) as tiff:
            pages = [page for page in tiff.pages if _description(page).get("ImageType") == "Thumbnail"] or tiff.pages
            if len(pages) != 1:
                raise InputError(f"{path}: holds {len(pages)} pages and no RGB thumbnail; a picture to classify is one "
                                f"page, or inForm's component file with its thumbnail")
            array = _page_array(path, pages[0])
    else:
        array = decode_picture(path)
    picture = channels_first(array)
    if len(picture) not in (1, 3):
        raise InputError(f"{path}: has {len(picture)} channels; a picture to classify is grey or RGB")
    if picture.dtype != np.uint8:
        with np.errstate(over="ignore"):
            picture = picture.astype(np.float32)
        _refuse_not_finite(path, picture)
        picture = (normalise(picture) * 255).round().astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(picture, (3, *picture.shape[1:])))                        # (3, H, W)


def pixels_of(path):
    """The number of pixels that the header of an image file tells; 0 where it cannot be read."""
    try:
        if not path.is_file():
            return 0
        if path.suffix.lower() in TIFF:
            with tifffile.TiffFile(path) as tiff:
                return tiff.pages[0].imagelength * tiff.pages[0].imagewidth
        with Image.open(path) as picture:
            return picture.height * picture.width
    except Exception:  # whoever reads the pixels says what is wrong
        return 0


def normalise(image, limits=None):
    """Brings each channel of an image (C, H, W), or of a part of it, to [0, 1], float32: `limits`, those of the whole
    image by find_limits, become 0 and 1."""
    image = image.astype(np.float32, copy=False)
    low, high = find_limits(image) if limits is None else limits
    if max(abs(low).max(), abs(high).max()) > 1e37:  # else high - low could be more than float32 holds
        image, low, high = (values * np.float32(1e-9) for values in (image, low, high))
    return ((image - low) / np.where(high > low, high - low, 1)).clip(0, 1)


def find_limits(image):
    """The percentiles 1 and 99.8 of each channel of an image (C, H, W): two arrays (C, 1, 1) float32.

    The 99.8th of a channel that is dark nearly everywhere can equal the 1st: then it is the largest value. Both are the
    same where a channel is constant.
    """
    found = [_percentiles_of_large(channel, PERCENTILES) if channel.size > LARGE else
             np.percentile(channel.astype(np.float32, copy=False), PERCENTILES) for channel in image]
    low, high = np.array(found, np.float32).T[..., None, None]                                            # (C, 1, 1)
    return low, np.where(high > low, high, image.max((1, 2), keepdims=True).astype(np.float32))


def _percentiles_of_large(channel, percentiles):
    """np.percentile, which would sort a copy, in a few passes over the rows: of float32 numbers, ordered as integers,
    first the upper then the lower 16 bits are counted. Exact, and no further memory is needed."""
    def keys(rows):
        bits = np.ascontiguousarray(rows, np.float32).view(np.uint32)
        return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31)).ravel()  # negative ones: all bits turned

    def count(of_key):
        return sum(np.bincount(of_key(keys(channel[y:y + 256])), minlength=1 << 16)
                   for y in range(0, len(channel), 256))

    def value(rank):
        upper = int(np.searchsorted(upper_counts, rank, "right"))
        if upper not in lower_counts:
            lower_counts[upper] = count(lambda key: key[key >> 16 == upper] & 0xFFFF).cumsum()
        before = upper_counts[upper - 1] if upper else 0
        key = np.uint32(upper << 16 | int(np.searchsorted(lower_counts[upper], rank - before, "right")))
        return float((key & np.uint32(0x7FFFFFFF) if key >> 31 else ~key).view(np.float32))

    upper_counts, lower_counts = count(lambda key: key >> 16).cumsum(), {}
    found = []
    for percentile in percentiles:
        rank = percentile / 100 * (channel.size - 1)
        low, high = value(int(rank)), value(min(int(rank) + 1, channel.size - 1))
        found.append(low + (high - low) * (rank - int(rank)))
    return found


def channel_names(text):
    """The value of --channel as names: "DAPI,CD4" -> ("DAPI", "CD4"). Raises InputError if it holds none."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if len({name.lower() for name in names}) < len(names):
        raise InputError(f"--channel {text!r}: names a page twice")
    if not names:
        raise InputError(f"--channel {text!r}: names no page; give one or more, as in DAPI,CD4")
    return names


def _refuse_too_large(path, height, width, samples=1):
    size = path.stat().st_size
    if height * width * samples > min(MAX_PIXELS, MAX_RATIO * size):
        raise InputError(f"{path}: claims to be {height}x{width} pixels, with {size} bytes; it is no whole image, or "
                        f"must be cut into fields")


def _refuse_not_finite(path, array):
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InputError(f"{path}: holds pixels that are NaN or infinite; write it again with finite values")


@contextmanager
def _reading(path):
    """Turns whatever a decoder raises into a InputError that names the file."""
    if not path.is_file():
        raise InputError(f"{path}: is a folder, not an image file" if path.is_dir() else f"{path}: no such file")
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:  # decoders raise nearly every kind
        detail = " ".join(str(error).split())[:120] or type(error).__name__
        raise InputError(f"{path}: cannot be read; is it a whole TIFF, PNG or JPEG file? ({detail})") from error


def _description(page):
    """The elements directly under the root of the XML that inForm writes in a page's ImageDescription: {tag: text}."""
    text = page.description.strip("\0 \n")
    try:
        root = ET.fromstring("" if "<!" in text else text)  # inForm declares no entities; a bomb of XML does
    except ET.ParseError:
        return {}  # nothing, or another program's text
    return {element.tag: (element.text or "").strip() for element in root}


def _stain_pages(path, tiff):
    """[(page, stain's name or None)] of the pages at full resolution, without thumbnail or pages of another size."""
    described = [(page, _description(page)) for page in tiff.pages]
    described = [(page, xml) for page, xml in described if xml.get("ImageType", "FullResolution") == "FullResolution"]
    if not described:
        raise InputError(f"{path}: holds no page at full resolution")
    size = described[0][0].shape[:2]
    pages = [(page, xml.get("Name")) for page, xml in described if page.shape[:2] == size]
    names = _imagej_labels(tiff) or _ome_names(tiff)
    return [(page, name) for (page, _), name in zip(pages, names)] if len(names) == len(pages) > 1 else pages


def _ome_names(tiff):
    """The names of the channels in the metadata of an OME-TIFF; [] where it has others."""
    text = (tiff.ome_metadata or "") if tiff.is_ome else ""
    try:
        first = ET.fromstring("" if "<!" in text else text).find("{*}Image")
    except ET.ParseError:
        return []
    return [(found.get("Name") or "").strip() for found in first.iterfind(".//{*}Channel")] if first is not None else []


def _imagej_labels(tiff):
    """The labels of an ImageJ file's pages; [] where they tell slices or files, as "c:1/3 - a.czi" does, not stains."""
    labels = (tiff.imagej_metadata or {}).get("Labels") or [] if tiff.is_imagej else []
    labels = [label.partition("\n")[0].strip() for label in ([labels] if isinstance(labels, str) else labels)]
    return [] if any(re.search(r"^\d*$|\b[czt]:\d+/\d+|\.(tiff?|czi|nd2|lif|lsm|png|jpe?g)\b", label, re.IGNORECASE)
                     for label in labels) else labels


def _stack(tiff):
    """"12 pages = 4 z x 3 channels" of a z-stack or time series, and of a large file of ImageJ, whose only page holds
    them all; "" of other files."""
    if len(tiff.pages) == 1 and not tiff.is_imagej:
        return ""
    size = dict(zip(tiff.series[0].axes, tiff.series[0].shape))
    count = math.prod(number for axis, number in size.items() if axis not in "YXS")
    deep = [f"{size[axis]} {axis.lower()} x " for axis in "TZ" if size.get(axis, 1) > 1]
    return f"{count} pages = {''.join(deep)}{size.get('C', 1)} channels" if deep or count > len(tiff.pages) else ""


def _find_page(path, pages, name, stack=""):
    """(stain's name, page): the page with this name, in capitals or not, or else at this place. stack: see _stack."""
    names = [found for _, found in pages]
    alike = [i for i, found in enumerate(names) if found == name] or \
            [i for i, found in enumerate(names) if (found or "").lower() == name.lower()]
    if stack and len(alike) != 1:
        raise InputError(f"{path}: {stack}; save a projection, and stains as channels, not as a stack")
    place = re.fullmatch(r"(\d+)( of (\d+))?", name)
    if not alike and place:
        if place[3] and int(place[3]) != len(pages):
            raise InputError(f"{path}: has {len(pages)} pages; page {place[1]} is wanted, of {place[3]} without names: "
                            f"it may be another stain here; say by --channel which page it is")
        alike = [int(place[1])] if int(place[1]) < len(pages) else []
    if len(alike) == 1:
        page, found = pages[alike[0]]
        # by a name that two pages have it would not be found again
        unique = found and sum((other or "").lower() == found.lower() for other in names) == 1
        return found if unique else f"{alike[0]} of {len(pages)}", page
    if len(alike) > 1:
        raise InputError(f"{path}: {len(alike)} of its pages are named {name!r} (--channel); give their numbers, "
                        f"{', '.join(map(str, alike))}")
    if any(names):
        raise InputError(f"{path}: no page named {name!r} (--channel); it has {', '.join(filter(None, names))}")
    raise InputError(f"{path}: its {len(pages)} pages have no names, so {name!r} (--channel) is not found; "
                    f"give their numbers, 0 to {len(pages) - 1}")


def _page_array(path, page, palette_colours=True):
    if page.photometric in (tifffile.PHOTOMETRIC.SEPARATED, tifffile.PHOTOMETRIC.CIELAB):
        raise InputError(f"{path}: is {page.photometric.name}; save it as grey or RGB")
    _refuse_too_large(path, page.imagelength, page.imagewidth, page.samplesperpixel)
    if page.axes not in ("YX", "YXS", "SYX"):
        raise ValueError(f"a page must be a plane, this one has the axes {page.axes}")
    size = path.stat().st_size
    if any(start + count > size for start, count in zip(page.dataoffsets, page.databytecounts)):
        raise ValueError("the file ends before its pixels do")
    try:
        array = page.asarray()
        if page.axes == "SYX":
            array = np.moveaxis(array, 0, -1)
    except (ValueError, ImportError) as error:
        if "imagecodecs" not in str(error):
            raise
        array = _page_by_pillow(path, page)
    if array.shape[:2] != (page.imagelength, page.imagewidth) or array.dtype.kind not in "buif" or not array.size:
        raise ValueError(f"its header says {page.imagelength}x{page.imagewidth}, its pixels are {array.shape}")
    if array.ndim == 3:
        # what a grey page has beside its first sample may be further stains; alpha is none, nor what follows RGB
        extra = [kind for kind in page.extrasamples if kind or page.photometric != tifffile.PHOTOMETRIC.MINISBLACK]
        array = array[..., :array.shape[-1] - len(extra)]
        array = array[..., 0] if array.shape[-1] == 1 else array
    if page.photometric == tifffile.PHOTOMETRIC.PALETTE and palette_colours:
        array = (np.moveaxis(np.asarray(page.colormap)[:, array], 0, -1) >> 8).astype(np.uint8)
    return array                                                                                # (H, W) or (H, W, C)


def _page_by_pillow(path, page):
    """LZW, which inForm writes, and other codecs need imagecodecs in tifffile; Pillow knows the usual ones itself."""
    try:
        with Image.open(path) as picture:
            picture.seek(page.index)
            array = _pixels(picture)
    except UnidentifiedImageError as error:
        raise InputError(f"{path}: its compression {page.compression.name} needs one more package: "
                        f"pip install imagecodecs") from error
    # values count as they are stored, also where 0 is to be shown white; Pillow has inverted those of 8 bits or less
    return ~array if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and array.itemsize == 1 else array


def decode_picture(path, palette_index=False):
    with _reading(path), Image.open(path, formats=("PNG", "JPEG")) as picture:
        _refuse_too_large(path, picture.height, picture.width)
        if picture.mode == "P" and not palette_index:
            picture = picture.convert("RGBA" if "transparency" in picture.info else "RGB")
        elif picture.mode in ("CMYK", "YCbCr", "HSV", "LAB"):
            picture = picture.convert("RGB")
        array = _pixels(picture)
    has_alpha = array.ndim == 3 and array.shape[-1] in (2, 4)
    return array[..., :-1] if has_alpha else array                                              # (H, W) or (H, W, C)


def _pixels(picture):
    """np.asarray(picture); of a large one in strips, for Pillow would hold two more copies meanwhile."""
    if picture.height * picture.width <= LARGE:
        return np.asarray(picture)
    strips = (np.asarray(picture.crop((0, y, picture.width, min(y + 256, picture.height))))
              for y in range(0, picture.height, 256))
    first = next(strips)
    array = np.empty((picture.height, *first.shape[1:]), first.dtype)
    array[:len(first)] = first
    for number, strip in enumerate(strips, 1):
        array[256 * number:256 * number + len(strip)] = strip
    return array


def channels_first(array):
    return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
