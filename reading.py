"""Reading of image files: TIFF stacks with named stains (inForm), PNG, JPEG; masks; intensities brought to [0, 1]."""
import ctypes
import logging
import warnings
import xml.etree.ElementTree as ET
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image, UnidentifiedImageError

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


class DataError(ValueError):
    """Something about the user's data is wrong; the message is one line that names the file and what would be right."""


def read_image(path, channels=("DAPI",)):
    """Raw image (C, H, W) float32 of a TIFF, PNG or JPEG file, and the names of its channels.

    Of a TIFF with several pages those named in `channels` are taken, in that order; a number names a page by its place,
    from 0. Single pages and pictures are taken whole, 1 channel if grey, 3 if coloured (alpha is dropped).
    Raises DataError.
    """
    path = Path(path)
    if path.suffix.lower() in TIFF:
        with _reading(path), tifffile.TiffFile(path) as tiff:
            pages = _stain_pages(path, tiff)
            if len(pages) == 1 and not pages[0][1]:
                chosen = [("page 0", pages[0][0])]
            else:
                chosen = [(name, _find_page(path, pages, name)) for name in channels]
            arrays = [_page_array(path, page) for _, page in chosen]
        names = tuple(name for name, _ in chosen)
    else:
        arrays, names = [decode_picture(path)], ("grey",)
    with np.errstate(over="ignore"):  # of what float32 cannot hold infinity remains
        image = np.concatenate([channels_first(array) for array in arrays]).astype(np.float32)
    if len(arrays) == 1 and len(image) == 3:
        names = ("red", "green", "blue")
    _refuse_not_finite(path, image)
    return image, names                                                                                   # (C, H, W)


def read_mask(path):
    """Mask (H, W) bool of a PNG or TIFF file: True wherever the file is not 0 (labels are fine).

    Of inForm's _binary_seg_maps.tif the page of the compartment Nucleus is taken. Raises DataError.
    """
    path = Path(path)
    if path.suffix.lower() in (".jpg", ".jpeg"):
        raise DataError(f"{path}: a mask must be PNG or TIFF: JPEG blurs its values")
    if path.suffix.lower() in TIFF:
        with _reading(path), tifffile.TiffFile(path) as tiff:
            compartments = [_description(page).get("CompartmentType") for page in tiff.pages]
            pages = [page for page in tiff.pages if page.shape == tiff.pages[0].shape]
            if "Nucleus" in compartments:
                pages = [tiff.pages[compartments.index("Nucleus")]]
            elif any(compartments):
                has = ", ".join(filter(None, compartments))
                raise DataError(f"{path}: no page of compartment Nucleus; it has {has}")
            if len(pages) != 1:
                raise DataError(f"{path}: holds {len(pages)} pages; a mask must be one, or have one named Nucleus")
            mask = _page_array(path, pages[0], palette_colours=False)
    else:
        mask = decode_picture(path, palette_index=True)
    _refuse_not_finite(path, mask)
    return (channels_first(mask) != 0).any(0)                                                            # (H, W)


def read_picture(path):
    """The picture that is classified, uint8 (3, H, W): of an inForm component file its RGB thumbnail (the paper's
    "autofluorescence" image), else a TIFF, PNG or JPEG of one page, grey repeated for the three colours.

    Values that are not 8 bits deep are brought to [0, 255] by the channels' percentiles. Raises DataError.
    """
    path = Path(path)
    if path.suffix.lower() in TIFF:
        with _reading(path), tifffile.TiffFile(path) as tiff:
            pages = [page for page in tiff.pages if _description(page).get("ImageType") == "Thumbnail"] or tiff.pages
            if len(pages) != 1:
                raise DataError(f"{path}: holds {len(pages)} pages and no RGB thumbnail; a picture to classify is one "
                                f"page, or inForm's component file with its thumbnail")
            array = _page_array(path, pages[0])
    else:
        array = decode_picture(path)
    picture = channels_first(array)
    if len(picture) not in (1, 3):
        raise DataError(f"{path}: has {len(picture)} channels; a picture to classify is grey or RGB")
    if picture.dtype != np.uint8:
        with np.errstate(over="ignore"):
            picture = picture.astype(np.float32)
        _refuse_not_finite(path, picture)
        picture = (normalise(picture) * 255).round().astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(picture, (3, *picture.shape[1:])))                        # (3, H, W)


def normalise(image):
    """Brings each channel of an image (C, H, W) to [0, 1]: its percentiles 1 and 99.8 become 0 and 1.

    The 99.8th percentile of a channel that is dark nearly everywhere can equal the 1st: then its largest value is used.
    A constant channel becomes 0.
    """
    low, high = np.percentile(image, PERCENTILES, axis=(1, 2), keepdims=True).astype(np.float32)          # (C, 1, 1)
    high = np.where(high > low, high, image.max((1, 2), keepdims=True))
    if max(abs(low).max(), abs(high).max()) > 1e37:  # else high - low could be more than float32 holds
        return normalise(image * np.float32(1e-9))
    return ((image - low) / np.where(high > low, high - low, 1)).clip(0, 1)


def channel_names(text):
    """The value of --channel as names: "DAPI,CD4" -> ("DAPI", "CD4"). Raises DataError if it holds none."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise DataError(f"--channel {text!r}: names no page; give one or more, as in DAPI,CD4")
    return names


def _refuse_too_large(path, height, width, samples=1):
    size = path.stat().st_size
    if height * width * samples > min(MAX_PIXELS, MAX_RATIO * size):
        raise DataError(f"{path}: claims to be {height}x{width} pixels, with {size} bytes; it is no whole image, or "
                        f"must be cut into fields")


def _refuse_not_finite(path, array):
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise DataError(f"{path}: holds pixels that are NaN or infinite; write it again with finite values")


@contextmanager
def _reading(path):
    """Turns whatever a decoder raises into a DataError that names the file."""
    if not path.is_file():
        raise DataError(f"{path}: is a folder, not an image file" if path.is_dir() else f"{path}: no such file")
    try:
        yield
    except (DataError, MemoryError):
        raise
    except Exception as error:  # decoders raise nearly every kind
        detail = " ".join(str(error).split())[:120] or type(error).__name__
        raise DataError(f"{path}: cannot be read; is it a whole TIFF, PNG or JPEG file? ({detail})") from error


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
        raise DataError(f"{path}: holds no page at full resolution")
    size = described[0][0].shape[:2]
    return [(page, xml.get("Name")) for page, xml in described if page.shape[:2] == size]


def _find_page(path, pages, name):
    names = [found for _, found in pages]
    if name in names:
        return pages[names.index(name)][0]
    if name.isdecimal() and int(name) < len(pages):
        return pages[int(name)][0]
    if any(names):
        raise DataError(f"{path}: no page named {name!r} (--channel); it has {', '.join(filter(None, names))}")
    raise DataError(f"{path}: its {len(pages)} pages have no names, so {name!r} (--channel) is not found; "
                    f"give their numbers, 0 to {len(pages) - 1}")


def _page_array(path, page, palette_colours=True):
    if page.photometric in (tifffile.PHOTOMETRIC.SEPARATED, tifffile.PHOTOMETRIC.CIELAB):
        raise DataError(f"{path}: is {page.photometric.name}; save it as grey or RGB")
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
        if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and array.dtype.kind in "bu":
            array = ~array
    except (ValueError, ImportError) as error:
        if "imagecodecs" not in str(error):
            raise
        array = _page_by_pillow(path, page)
    if array.shape[:2] != (page.imagelength, page.imagewidth) or array.dtype.kind not in "buif" or not array.size:
        raise ValueError(f"its header says {page.imagelength}x{page.imagewidth}, its pixels are {array.shape}")
    if array.ndim == 3:
        array = array[..., :array.shape[-1] - len(page.extrasamples)]
        array = array[..., 0] if array.shape[-1] == 1 else array
    if page.photometric == tifffile.PHOTOMETRIC.PALETTE and palette_colours:
        array = (np.moveaxis(np.asarray(page.colormap)[:, array], 0, -1) >> 8).astype(np.uint8)
    return array                                                                                # (H, W) or (H, W, C)


def _page_by_pillow(path, page):
    """LZW, which inForm writes, and other codecs need imagecodecs in tifffile; Pillow knows the usual ones itself."""
    try:
        with Image.open(path) as picture:
            picture.seek(page.index)
            return np.asarray(picture)
    except UnidentifiedImageError as error:
        raise DataError(f"{path}: its compression {page.compression.name} needs one more package: "
                        f"pip install imagecodecs") from error


def decode_picture(path, palette_index=False):
    with _reading(path), Image.open(path, formats=("PNG", "JPEG")) as picture:
        _refuse_too_large(path, picture.height, picture.width)
        if picture.mode == "P" and not palette_index:
            picture = picture.convert("RGBA" if "transparency" in picture.info else "RGB")
        elif picture.mode in ("CMYK", "YCbCr", "HSV", "LAB"):
            picture = picture.convert("RGB")
        array = np.asarray(picture)
    has_alpha = array.ndim == 3 and array.shape[-1] in (2, 4)
    return array[..., :-1] if has_alpha else array                                              # (H, W) or (H, W, C)


def channels_first(array):
    return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
