"""Damaged files: bit flips, truncations and worse of real and made files end in one clear line or a sound result."""
import io
import shutil
import warnings
import zlib

import numpy as np
import pytest
import tifffile
from conftest import SHARED, write_folder, write_pictures
from PIL import Image

from images import manifests, reading
from running import runs
from running.process import InputError

CASES = 500  # of each kind of file


def damaged(content, rng):
    """The bytes with something wrong: bits flipped, an end or a part cut off, a part overwritten or doubled. Most of it
    hits the first and last kilobyte, where headers and directories are."""
    content = bytearray(content)
    size = len(content)

    def place():
        near = int(rng.integers(min(size, 1024)))
        return (near, size - 1 - near, int(rng.integers(size)))[rng.integers(3)]

    kind = rng.integers(6)
    if kind <= 1:
        for _ in range(1 if kind else int(rng.integers(1, 30))):
            content[place()] ^= 1 << int(rng.integers(8))
    elif kind == 2:
        del content[place():]
    elif kind == 3:
        start = place()
        del content[start:start + int(rng.integers(1, 200))]
    elif kind == 4:
        start = place()
        part = content[start:start + 8]
        content[start:start + 8] = bytes([(0, 255, 127, 128)[rng.integers(4)]]) * len(part)
    else:
        start = place()
        content[start:start] = content[place():][:int(rng.integers(1, 200))]
    return bytes(content)


def made_files():
    """{name: bytes} of small files of each kind that is read."""
    rng = np.random.default_rng(0)
    grey, colour = rng.integers(0, 255, (40, 50), dtype=np.uint8), rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)
    files = {}
    for name, array in (("grey.png", grey), ("colour.png", colour), ("deep.png", grey.astype(np.uint16) * 200),
                        ("colour.jpg", colour)):
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "JPEG" if name.endswith("jpg") else "PNG")
        files[name] = buffer.getvalue()
    buffer = io.BytesIO()
    Image.fromarray(grey).convert("P").save(buffer, "PNG")
    files["palette.png"] = buffer.getvalue()
    for compression in (None, "zlib", "lzw"):
        buffer = io.BytesIO()
        if compression == "lzw":  # tifffile cannot write it
            pages = [Image.fromarray(grey.astype(np.float32) * k) for k in (1, 2)]
            pages[0].save(buffer, "TIFF", save_all=True, append_images=pages[1:], compression="tiff_lzw")
        else:
            with tifffile.TiffWriter(buffer) as tiff:
                for stain in ("CD4", "DAPI"):
                    text = f"<P><Name>{stain}</Name><ImageType>FullResolution</ImageType></P>"
                    tiff.write(grey.astype(np.float32) * 3, compression=compression, description=text, metadata=None)
        files[f"{compression}.tif"] = buffer.getvalue()
    return files


def real_files():
    """{name: bytes} of real ones, as far as ../shared/data is there."""
    patterns = ("dsb2018/images/*.png", "dsb2018/masks/*.png", "bccd/images/*.jpg", "inform/*_component_data.tif",
                "inform/FIHC4*_binary_seg_maps.tif")
    found = [path for pattern in patterns for path in sorted(SHARED.glob(pattern))[:1]]
    return {f"{path.parent.parent.name}/{path.name}": path.read_bytes() for path in found}


def with_right_checksums(content):
    """A PNG file whose chunks have the checksums that they should: else few errors get past Pillow's first look."""
    content, at = bytearray(content), 8
    while at + 12 <= len(content):
        size = int.from_bytes(content[at:at + 4], "big")
        if at + 12 + size <= len(content):
            content[at + 8 + size:at + 12 + size] = zlib.crc32(content[at + 4:at + 8 + size]).to_bytes(4, "big")
        at += 12 + size
    return bytes(content)


MADE, REAL = made_files(), real_files()


@pytest.mark.parametrize("name", [*MADE, *REAL])
def test_damaged_images(name, tmp_path, capfd):
    content = {**MADE, **REAL}[name]
    file = tmp_path / name.replace("/", "-")
    rng = np.random.default_rng(len(content))
    for case in range(CASES if name in MADE else CASES // 8):
        broken = damaged(content, rng)
        file.write_bytes(with_right_checksums(broken) if case % 2 and name.endswith("png") else broken)
        for read in (reading.read_image, reading.read_mask, reading.read_rgb):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                warnings.simplefilter("error", RuntimeWarning)  # of numpy: overflow, NaN
                try:
                    found = read(file)
                except InputError as error:
                    assert str(error).startswith(str(file)) and "\n" not in str(error)
                    continue
                if read is reading.read_image:
                    image = reading.normalise(found[0], reading.find_limits(found[0]))
                    assert image.ndim == 3 and np.isfinite(image).all() and 0 <= image.min() <= image.max() <= 1
                else:
                    assert found.size and (found.ndim == 2 or found.dtype == np.uint8)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("task", ["seg", "cls"])
def test_damaged_manifests(task, tmp_path):
    folder = (write_folder if task == "seg" else write_pictures)(tmp_path / "folder")
    manifest = folder / manifests.MANIFESTS[task][0]
    content, rng = manifest.read_bytes(), np.random.default_rng(1)
    for _ in range(CASES):
        manifest.write_bytes(damaged(content, rng))
        try:
            records, _ = manifests.find_records(folder, task=task)
        except InputError as error:
            assert str(manifest) in str(error) and "\n" not in str(error)
            continue
        assert records
        for record in records:
            assert record.split in manifests.SPLITS and record.image.is_file() and record.image.parent == folder


def test_damaged_checkpoints(cross_validated, tmp_path):
    """A checkpoint has what is looked for in it, or is refused."""
    content, rng = (cross_validated[0] / "fold0" / "last.pt").read_bytes(), np.random.default_rng(2)
    file = tmp_path / "last.pt"
    for _ in range(CASES):
        file.write_bytes(damaged(content, rng))
        try:
            assert {"model", "state"} <= runs.load_checkpoint(file, "model", "state").keys()
        except InputError as error:
            assert str(error).startswith(str(file)) and "\n" not in str(error)


def test_damaged_settings_of_a_run(cross_validated, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(cross_validated[0], run)
    file = run / "config.json"
    content = file.read_bytes()
    rng = np.random.default_rng(3)
    for _ in range(CASES):
        file.write_bytes(damaged(content, rng))
        try:
            assert "task" in runs.read_config(run)
        except InputError as error:
            assert str(file) in str(error) and "\n" not in str(error)
