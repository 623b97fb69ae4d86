import hashlib

import numpy as np
import pytest
import tifffile
import torch
import torch.nn.functional as F
from conftest import SHARED, TRAIN, blobs, needs, write_folder, write_pictures
from PIL import Image

import data
import train
from images import folders, manifests, reading, synthetic
from running.process import InputError

REAL = SHARED / "inform" / "FIHC4__0929309_HP_IM3_2_component_data.tif"


def inform_file(path, names=("CD4", "DAPI"), size=(24, 32), compression="zlib"):
    """A small inForm-style file; page k holds the value k + 1 in its left half."""
    stains = {name: np.zeros(size, np.float32) for name in names}
    for k, stain in enumerate(stains.values(), 1):
        stain[:, :size[1] // 2] = k
    with tifffile.TiffWriter(path) as tiff:
        for name, stain in stains.items():
            tiff.write(stain, photometric="minisblack", metadata=None, compression=compression,
                       description=f"<?xml version='1.0' encoding='utf-16'?><Q><ImageType>FullResolution</ImageType>"
                                   f"<Name>{name}</Name><Inner><Name>not this</Name></Inner></Q>")
        tiff.write(np.zeros((size[0] // 4, size[1] // 4, 3), np.uint8), photometric="rgb", metadata=None,
                   description="<Q><ImageType>Thumbnail</ImageType></Q>")
    return path


# -------------------------------------------------------------------------------------------------------------- reading
def test_pages_are_found_by_name_wherever_they_are(tmp_path):
    for names in (("CD4", "DAPI"), ("DAPI", "CD4")):
        image, found = reading.read_image(inform_file(tmp_path / "a.tif", names))
        assert found == ("DAPI",) and image.shape == (1, 24, 32) and image.max() == names.index("DAPI") + 1
    image, found = reading.read_image(tmp_path / "a.tif", ("CD4", "DAPI"))
    assert found == ("CD4", "DAPI") and image.max((1, 2)).tolist() == [2, 1]
    with pytest.raises(InputError, match="no single page named 'CD8'.*it has DAPI, CD4"):
        reading.read_image(tmp_path / "a.tif", ("CD8",))


def test_pages_without_names_are_taken_by_number(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.arange(3 * 64, dtype=np.uint16).reshape(3, 8, 8), photometric="minisblack")
    with pytest.raises(InputError, match="it has page 0, page 1, page 2"):
        reading.read_image(tmp_path / "a.tif")
    image, names = reading.read_image(tmp_path / "a.tif", ("2",))
    assert image.min() == 128 and names == ("page 2",)
    with pytest.raises(InputError, match="no single page named '3'"):
        reading.read_image(tmp_path / "a.tif", ("3",))


@needs("inform")
def test_the_real_component_file_without_imagecodecs(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(tifffile.tifffile, "imagecodecs", tifffile._imagecodecs)  # what stands in where it is missing
    image, names = reading.read_image(REAL)
    assert names == ("DAPI",) and image.shape == (1, 260, 348) and image.dtype == np.float32
    with Image.open(REAL) as picture:
        picture.seek(3)
        assert (image[0] == np.asarray(picture)).all()
    mask = reading.read_mask(str(REAL).replace("component_data", "binary_seg_maps")) > 0
    assert mask.shape == (260, 348) and image[0][mask].mean() > 2 * image[0][~mask].mean()  # nuclei are bright in DAPI
    with pytest.raises(InputError, match="it has Alexa 594, .*DAPI"):
        reading.read_image(REAL, ("Alexa",))
    for share in (0.2, 0.5, 0.9):  # cut off within its pages
        (tmp_path / "short.tif").write_bytes(REAL.read_bytes()[:int(share * REAL.stat().st_size)])
        with pytest.raises(InputError, match="short.tif"):
            reading.read_image(tmp_path / "short.tif")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("array, kind, shape", [
    (np.full((9, 7), 5, np.uint8), "png", (1, 9, 7)), (np.full((9, 7), 40000, np.uint16), "png", (1, 9, 7)),
    (np.full((9, 7, 3), 5, np.uint8), "png", (3, 9, 7)), (np.full((9, 7, 4), 5, np.uint8), "png", (3, 9, 7)),
    (np.full((9, 7, 3), 5, np.uint8), "jpg", (3, 9, 7)), (np.full((9, 7), 5, np.float32), "tif", (1, 9, 7)),
    (np.full((9, 7), 40000, np.uint16), "tiff", (1, 9, 7)), (np.full((9, 7, 3), 5, np.uint8), "tif", (3, 9, 7))])
def test_depths_and_colours(tmp_path, array, kind, shape):
    path = tmp_path / f"image.{kind}"
    if kind.startswith("tif"):
        tifffile.imwrite(path, array)
    else:
        Image.fromarray(array).save(path)
    image, _ = reading.read_image(path)
    assert image.shape == shape and image.dtype == array.dtype and (image == array.max()).all()


def test_masks_of_every_kind(tmp_path):
    labels = np.zeros((24, 32), np.uint16)
    labels[3:9, 4:20] = 300
    Image.fromarray(labels).save(tmp_path / "labels.png")
    Image.fromarray((labels > 0).astype(np.uint8) * 255).save(tmp_path / "binary.png")
    Image.fromarray(np.dstack([(labels > 0) * np.uint8(255)] * 3 + [np.full_like(labels, 255, np.uint8)])).save(
        tmp_path / "rgba.png")  # its opaque alpha is no nucleus
    tifffile.imwrite(tmp_path / "S_[1,2]_component_data.tifMask.tif", labels)
    with tifffile.TiffWriter(tmp_path / "S_binary_seg_maps.tif") as tiff:
        for compartment, page in (("Cytoplasm", 1 - (labels > 0)), ("Nucleus", labels)):
            tiff.write(page.astype(np.uint16), metadata=None,
                       description=f"<S><CompartmentType>{compartment}</CompartmentType></S>")
    for path in tmp_path.iterdir():
        assert ((reading.read_mask(path) != 0) == (labels > 0)).all(), path.name
    Image.fromarray(labels.astype(np.uint8)).save(tmp_path / "mask.jpg")
    with pytest.raises(InputError, match="PNG or TIFF"):
        reading.read_mask(tmp_path / "mask.jpg")


@pytest.mark.parametrize("name", ["image.png", "image.jpg", "image.tif", "zip.tif", "lzw.tif"])
def test_broken_files_are_named(tmp_path, name, capfd):
    path = tmp_path / name
    array = np.random.default_rng(0).integers(0, 255, (200, 200), np.uint8)
    if name == "zip.tif":
        tifffile.imwrite(path, array, compression="zlib")
    elif name == "lzw.tif":
        Image.fromarray(array).save(path, compression="tiff_lzw")
    elif name == "image.tif":
        tifffile.imwrite(path, array)
    else:
        Image.fromarray(array).save(path)
    whole = path.read_bytes()
    for content in (whole[:len(whole) // 2], b"", b"not an image at all"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=name):
            reading.read_image(path)
    with pytest.raises(InputError, match="no such file"):
        reading.read_image(tmp_path / "missing.png")
    with pytest.raises(InputError, match="no such file"):  # a folder
        reading.read_image(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_tiff_variants(tmp_path):
    grey = np.arange(63, dtype=np.uint8).reshape(9, 7)
    planes = np.stack([grey, grey + 1, grey + 2, grey + 3])
    tifffile.imwrite(tmp_path / "rgba.tif", planes, photometric="rgb", planarconfig="separate",
                     extrasamples=["unassalpha"])
    assert (reading.read_image(tmp_path / "rgba.tif")[0] == planes[:3]).all()
    tifffile.imwrite(tmp_path / "volume.tif", np.zeros((16, 32, 32), np.uint8), volumetric=True, tile=(16, 16, 16),
                     photometric="minisblack")
    for read in (reading.read_image, reading.read_mask, reading.read_rgb):
        with pytest.raises(InputError, match="volume.tif: is a stack, 16 Z x 32 Y x 32 X; save a projection"):
            read(tmp_path / "volume.tif")
    tifffile.imwrite(tmp_path / "two.tif", planes[:2], photometric="minisblack")
    with pytest.raises(InputError, match="has 2 pages to choose from; it must be one, or one of Compart.* Nucleus"):
        reading.read_mask(tmp_path / "two.tif")
    tifffile.imwrite(tmp_path / "CD4.tif", grey, metadata=None, description="<Q><Name>CD4</Name></Q>")
    with pytest.raises(InputError, match="no single page named 'DAPI'"):
        reading.read_image(tmp_path / "CD4.tif")


@pytest.mark.parametrize("kind", [bool, np.uint8, np.uint16])
@pytest.mark.parametrize("compression", [None, "tiff_deflate", "tiff_lzw"])
def test_stored_values_count_where_0_is_shown_white(tmp_path, monkeypatch, kind, compression):
    """Fiji saves masks so, 255 for nucleus, with an inverting lookup table."""
    labels = np.zeros((24, 32), np.uint8)
    labels[3:9, 4:20] = 1
    stored = labels.astype(kind) * kind({bool: 1, np.uint8: 255, np.uint16: 60000}[kind])
    path = tmp_path / "mask.tif"
    monkeypatch.setattr(tifffile.tifffile, "imagecodecs", tifffile._imagecodecs)  # so Pillow decodes LZW
    Image.fromarray(stored).save(path, compression=compression)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tiff.pages[0].tags["PhotometricInterpretation"].overwrite(0)
    assert ((reading.read_mask(path) != 0) == (labels > 0)).all()
    assert (reading.read_image(path)[0] == stored).all()


def test_a_tiff_without_some_of_its_strips_is_refused(tmp_path):
    """Else they would be whatever is in memory, and as many as the header tells."""
    path = tmp_path / "strips.tif"
    tifffile.imwrite(path, np.ones((64, 64), np.uint8), compression="zlib", rowsperstrip=16, metadata=None)
    assert reading.read_image(path)[0].shape == (1, 64, 64)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tiff.pages[0].tags["ImageLength"].overwrite(1 << 22, dtype="I")
    for read in (reading.read_image, reading.read_mask, reading.read_rgb):
        with pytest.raises(InputError, match="strips.tif: cannot be read.*strips are missing"):
            read(path)


def test_images_of_too_many_pixels_are_refused(tmp_path, monkeypatch):
    Image.new("L", (60, 40)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match="a.png: cannot be read.*2400 pixels.* exceeds limit"):
        reading.read_image(tmp_path / "a.png")


def test_wide_types_become_float32(tmp_path):
    for kind in (np.float64, np.int64, bool):
        array = np.arange(12).reshape(3, 4).astype(kind)
        tifffile.imwrite(tmp_path / "a.tif", array)
        image, _ = reading.read_image(tmp_path / "a.tif")
        assert image.dtype == (np.uint8 if kind is bool else np.float32) and (image == array).all()


def test_pixels_that_are_no_numbers_are_refused(tmp_path):
    tifffile.imwrite(tmp_path / "nan.tif", np.array([[1, np.nan], [2, 3]], np.float32))
    with pytest.raises(InputError, match="NaN"):
        reading.read_image(tmp_path / "nan.tif")


def normalised(image):
    return reading.normalise(image, reading.find_limits(image))


def test_normalise():
    image = np.stack([np.linspace(0, 1000, 10000), np.zeros(10000), np.zeros(10000)]).reshape(3, 100, 100)
    image[2, 0, :5] = 7  # so few bright pixels that both percentiles are 0
    out = normalised(image.astype(np.float32))
    assert out.min() == 0 and out.max() == 1
    inner = (image[0] > 10) & (image[0] < 998)
    np.testing.assert_allclose(out[0][inner], ((image[0] - 10) / 988)[inner], atol=1e-3)
    assert (out[1] == 0).all() and (out[2] == (image[2] > 0)).all()
    np.testing.assert_allclose(normalised(image.astype(np.float32) * 60 + 5), out, atol=1e-4)  # any unit


# ------------------------------------------------------------------------------------------------------------ manifests
def inform_folder(folder, slides, fields=2):
    folder.mkdir()
    for slide in slides:
        for i in range(fields):
            path = inform_file(folder / f"{slide}_[{i},7]_component_data.tif")
            tifffile.imwrite(f"{path}Mask.tif", np.ones((24, 32), np.uint8))
    return folder


def splits(records):
    return {split: sorted({r.patient for r in records if r.split == split}) for split in manifests.SPLITS}


def test_the_published_patients_are_split_as_published(tmp_path):
    records, said = manifests.find_records(inform_folder(tmp_path / "in", manifests.PUBLISHED_SPLIT))
    assert {record.patient: record.split for record in records} == manifests.PUBLISHED_SPLIT
    assert len(records) == 14 and "as in the paper" in " ".join(said)


def test_other_patients_are_split_whole_by_seed(tmp_path):
    folder = inform_folder(tmp_path / "in", [f"P{i}" for i in range(8)])
    inform_file(folder / "P9_[1,1]_component_data.tif")
    records, said = manifests.find_records(folder, seed=1)
    found = splits(records)
    assert sum(map(len, found.values())) == 8 and all(found.values())
    assert "no test rows" in " ".join(said) and "no validation rows" in " ".join(said)
    assert "16 of 17 inForm component files have a mask" in " ".join(said)
    assert splits(manifests.find_records(folder, seed=1)[0]) == found
    assert any(splits(manifests.find_records(folder, seed=seed)[0]) != found for seed in range(2, 6))


def test_a_single_inform_file_is_found(tmp_path):
    records, _ = manifests.find_records(inform_folder(tmp_path / "in", ["P1"], fields=1))
    assert [record.split for record in records] == ["train"]


def test_validation_is_taken_from_train_where_none_is_named(tmp_path):
    folder = write_folder(tmp_path / "in", ("train",) * 10 + ("test",) * 2)
    records, said = manifests.find_records(folder)
    assert [sum(r.split == s for r in records) for s in manifests.SPLITS] == [8, 2, 2]
    assert "2 of 10 training images became it, by whole images" in said[-1]


@pytest.mark.parametrize("text, said", [
    ("", "is empty"), ("image,mask,split\n", "is empty"), ("image,split\na.png,train\n", "needs one column 'mask'"),
    ("image,mask,mask,split\na.png,b.png,c.png,train\n", "needs one column 'mask'"),
    ("image,mask,split\nfield0.png,labels0.png,training\n", "line 2: split 'training' is none of"),
    ("image,mask,split\nfield0.png,labels0.png,train\nnope.png,labels0.png,test\n", "line 3: image 'nope.png' is not"),
    ("image,mask,split\nfield0.png,,train\n", "mask '' is not there"),
    ("image,mask,split\n\n../tiny/field0.png,labels0.png,train\n", "line 3: .*must be a path below")])
def test_manifests_that_cannot_be_used(tiny, text, said):
    (tiny / "segmentation.csv").write_text(text)
    with pytest.raises(InputError, match=said):
        manifests.find_records(tiny)


def test_a_large_patient_does_not_become_validation(tiny):
    rows = [f"field{i}.png,labels{i}.png,train,{'B' if i else 'A'}" for i in range(9)]
    (tiny / "segmentation.csv").write_text("\n".join(["image,mask,split,patient", *rows]))
    for seed in range(4):
        assert splits(manifests.find_records(tiny, seed)[0]) == {"train": ["B"], "validation": ["A"], "test": []}


def test_masks_of_files_of_one_name_are_those_beside_them(tmp_path):
    for name in ("one", "two"):
        inform_folder(tmp_path / name, ["P1"], fields=1)
    records, _ = manifests.find_records(tmp_path)
    assert len(records) == 2 and all(r.mask.parent == r.image.parent for r in records)


def test_a_manifest_from_a_spreadsheet(tiny):
    text = (tiny / "segmentation.csv").read_text()
    (tiny / "segmentation.csv").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert len(manifests.find_records(tiny)[0]) == 9


def test_sizes_and_channels_must_fit(tiny):
    records, _ = manifests.find_records(tiny)
    records[1].mask = records[2].mask
    with pytest.raises(InputError, match=r"labels2.png: .* has \(50, 61\) pixels, its image field1.png \(45, 64\)"):
        data.read_fields(records)
    Image.new("RGB", (67, 40)).save(tiny / "field0.png")
    with pytest.raises(InputError, match="channels"):
        data.read_fields(manifests.find_records(tiny)[0])


# ----------------------------------------------------------------------------------------------- crops and augmentation
def test_pages_in_a_circle_end(tmp_path):
    path = tmp_path / "circle.tif"
    inform_file(path)
    with tifffile.TiffFile(path) as tiff:
        places = [page.offset + 2 + 12 * len(page.tags) for page in tiff.pages]  # each page's pointer to the next
    content = bytearray(path.read_bytes())
    content[places[-1]:places[-1] + 4] = content[4:8]                            # that to the first
    path.write_bytes(content)
    assert reading.read_image(path, ("CD4",))[0].shape == (1, 24, 32)


def field_of(image, mask):
    """A Field of an image (C, H, W) whose values are 0 to 1 already."""
    image = np.asarray(image, np.float32)
    limits = (np.zeros((len(image), 1, 1), np.float32), np.ones((len(image), 1, 1), np.float32))
    mask = torch.as_tensor(mask)
    return manifests.Field(None, image, ("grey",), limits, mask.int())


@pytest.mark.parametrize("recipe", ["short", "paper"])
def test_image_and_mask_go_through_the_same_draw(recipe, monkeypatch):
    monkeypatch.setattr(data, "EMPTY", 0)
    monkeypatch.setattr(data, "NOISE", 0)
    y, x = torch.meshgrid(torch.arange(90), torch.arange(70), indexing="ij")
    mask = ((y // 9 + x // 7) % 3 == 0) & (x > 20)
    crops = data.Crops([field_of(mask[None], mask)], 40, seed=3, recipe=recipe, passes=20)
    turned = 0
    for index in range(60):
        image, cut = crops[index]
        assert image.shape == (1, 40, 40) and cut.shape == (40, 40)
        turned += bool(((image > 0) & (image < 1)).any())  # interpolated: a small rotation
        assert ((image[0] > 0.5) == cut.bool()).float().mean() > 0.98  # equal but for ties at the borders
    assert 20 < turned < 40 or recipe == "paper"


def test_crops_come_from_everywhere_in_every_orientation(monkeypatch):
    monkeypatch.setattr(data, "NOISE", 0)
    image = torch.arange(50 * 60).reshape(1, 50, 60) / 3000
    crops, seen, turns = data.Crops([field_of(image, image[0] > 0)], 16, passes=50), set(), set()
    for index in range(500):
        values = crops[index][0] * 3000
        corners = values[0, 0, 0], values[0, 0, -1], values[0, -1, 0]
        if torch.allclose(values, values.round(), atol=1e-2):  # not rotated: the values are the image's own
            turns.add((round(float(corners[1] - corners[0])), round(float(corners[2] - corners[0]))))
            seen |= set(values.round().flatten().int().tolist())
    assert len(turns) == 8 and len(seen) > 0.97 * image.numel()


def test_an_image_smaller_than_the_tile_is_mirrored():
    image = (torch.arange(6.0) / 6).reshape(1, 1, 6).repeat(1, 6, 1)
    crops = data.Crops([field_of(image, image[0] > 0.4)], 32)
    image, mask = crops[0]
    assert image.shape == (1, 32, 32) and ((image[0] > 0.42) == mask.bool()).float().mean() > 0.9
    for size in (1, 4):
        index = data.mirrored_window(size, 30, margin=3)
        assert len(index) == 36 and set(index.tolist()) == set(range(size))
        assert (index.diff().abs() == min(1, size - 1)).all()  # back and forth, never a jump


@pytest.mark.parametrize("recipe", ["short", "paper"])
def test_tiles_get_noise_each_its_own(recipe, monkeypatch):
    monkeypatch.setattr(data, "EMPTY", 0)
    crops = data.Crops([field_of(np.full((1, 40, 40), 0.5), np.eye(40))], 40, recipe=recipe, passes=50)
    deviations = [crops[index][0][:, 12:-12, 12:-12].std().item() for index in range(len(crops))]
    if recipe == "paper":
        assert max(deviations) == 0
    else:
        assert min(deviations) < 0.2 * data.NOISE and 0.8 * data.NOISE < max(deviations) < 1.2 * data.NOISE


def test_some_tiles_are_made_to_hold_no_nucleus(monkeypatch):
    monkeypatch.setattr(data, "NOISE", 0)
    rng = np.random.default_rng(0)
    image, labels = blobs(rng, 90, 70)
    field = field_of(image[None] / 255, labels.astype(np.int32))
    crops = data.Crops([field], 32, passes=100)
    tiles = [crops[index] for index in range(len(crops))]
    empty = [image for image, truth in tiles if not truth.any() and image.max() == 1 and image.min() == 0]
    assert 0.3 * data.EMPTY < len(empty) / len(tiles) < 3 * data.EMPTY
    image, truth = torch.rand(2, 40, 40), torch.zeros(40, 40).long()
    image[:, 10:20, 10:20], truth[10:20, 10:20] = 50, 1               # no pixel of a nucleus is taken
    means, unevenness = [], []
    torch.manual_seed(0)
    for _ in range(30):
        noise, nothing = data.emptied(image, truth)
        assert noise.shape == image.shape and noise.dtype == torch.float32 and not nothing.any()
        assert noise.min() == 0 and noise.max() == 1
        means.append(noise.mean())
        unevenness.append(F.avg_pool2d(noise, 10).std())
    assert 0.35 < sum(means) / 30 < 0.65
    assert min(unevenness) < 0.07 and max(unevenness) > 0.2           # noise alone, and light alone
    full = data.Crops([field_of(np.zeros((1, 40, 40)), np.ones((40, 40)))], 32, passes=200)
    assert all(full[index][1].all() for index in range(len(full)))    # there is no background to take


def test_crops_do_not_depend_on_workers_and_change_with_the_epoch(tiny):
    fields = data.read_fields(manifests.find_records(tiny)[0])
    crops = data.Crops(fields, 32, seed=5)
    assert len(crops) == sum(-(-f.mask.numel() // 1024) for f in fields)

    def draw(epoch, workers):
        crops.epoch = epoch
        return torch.cat([image for image, _ in torch.utils.data.DataLoader(crops, 4, num_workers=workers)])
    assert torch.equal(draw(1, 0), draw(1, 2))
    assert not torch.equal(draw(1, 0), draw(2, 0))
    count, crops.passes = len(crops), 2
    first, again = crops[3], crops[3 + count]  # a further pass: the same image, another crop
    assert len(crops) == 2 * count
    assert not torch.equal(first[0], again[0])


# -------------------------------------------------------------------------------------- synthetic set, import and check
def test_the_synthetic_set(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(synthetic, "FIELDS_PER_PATIENT", 1)
    monkeypatch.setattr(synthetic, "PICTURES_PER_PATIENT", 1)
    digests = []
    for name in ("a", "b"):
        folders.write_synthetic(tmp_path / name)
        files = sorted((tmp_path / name).iterdir())
        digests.append([(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files])
    assert digests[0] == digests[1]
    folders.check(tmp_path / "a")
    out = capsys.readouterr().out
    assert "no problems found" in out and "train: 8 images, 8 patients" in out
    first = sorted((tmp_path / "a").glob("*_component_data.tif"))[0]
    with tifffile.TiffFile(first) as tiff:
        assert len(tiff.pages) == 9 and tiff.pages[-1].shape == (64, 80, 3)
        assert [reading._tag(page, "Name") for page in tiff.pages] == [*synthetic.STAINS, ""]
        assert reading._tag(tiff.pages[0], "Name") != "DAPI"
    image, mask = reading.read_image(first)[0][0], reading.read_mask(f"{first}Mask.tif") > 0
    assert 0.1 < mask.mean() < 0.5 and image[mask].mean() > 3 * image[~mask].mean()
    pictures, _ = manifests.find_records(tmp_path / "a", task="cls")
    assert len(pictures) == 24 and len({record.patient for record in pictures}) == 12
    assert {reading.read_rgb(record.image).shape for record in pictures} == {(3, 64, 80)}
    assert set(manifests.class_names(pictures)) <= set(synthetic.PHENOTYPES)
    with pytest.raises(InputError, match="is there already"):
        folders.write_synthetic(tmp_path / "a")


def test_synthetic_labels_follow_from_the_markers():
    for seed in range(12):
        stains, labels, kinds = synthetic.draw_field(np.random.default_rng(1), np.random.default_rng(seed))
        for marker in set(synthetic.STAINS) - {"DAPI", "Autofluorescence"}:
            expected = any(marker in synthetic.PHENOTYPES[kind] for kind in kinds)
            bright = (stains[marker] > 15).mean() > 0.01  # rings of at least six cells
            assert bright == expected, (seed, marker, kinds)


@needs("dsb2018_raw_sample")
def test_the_dsb2018_import_gives_the_shared_masks(tmp_path, script):
    source = SHARED / "dsb2018_raw_sample" / "stage1_train"
    assert script(folders, "dsb2018", source, tmp_path / "out")[0] == 0
    records, _ = manifests.find_records(tmp_path / "out")
    assert len(records) == 10 and len({r.split for r in records}) == 3
    for record in records:
        field = manifests.read_field(record)
        raw = sorted((source / record.image.stem / "masks").glob("*.png"))
        assert field.mask.sum() == np.any([np.asarray(Image.open(p)) > 0 for p in raw], axis=0).sum()
        assert len(np.unique(np.asarray(Image.open(record.mask)))) == len(raw) + 1
    status, _, err = script(folders, "dsb2018", source, tmp_path / "out")
    assert status == 2 and "segmentation.csv: is there already" in err


def test_a_mask_of_another_size_is_named_by_the_import(tmp_path, script):
    for name, size in (("images/a", (9, 9)), ("masks/0", (9, 9)), ("masks/1", (8, 9))):
        path = tmp_path / "train" / "a" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", size, 9).save(path)
    status, _, err = script(folders, "dsb2018", tmp_path / "train", tmp_path / "out")
    assert status == 2 and "masks/1.png: must have the size of its image, (9, 9) pixels" in err
    Image.new("L", (9, 9), 9).save(path)
    assert script(folders, "dsb2018", tmp_path / "train", tmp_path / "out")[0] == 0  # again, after mending
    assert manifests.find_records(tmp_path / "out")[0][0].split == "train"


@pytest.mark.parametrize("arguments", [["check"], ["check", "a", "b"], ["dsb2018", "a"], ["bogus", "a"], []])
def test_commands_that_are_none(script, arguments):
    status, _, err = script(folders, *arguments)
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and "see --help" in err


def test_check_names_each_problem(tiny, script):
    status, out, _ = script(folders, "check", tiny)
    assert status == 0 and "train: 4 images" in out and "no problems found" in out
    Image.new("L", (67, 40)).save(tiny / "labels0.png")                      # empty mask
    Image.new("L", (10, 10)).save(tiny / "labels1.png")                      # other size
    (tiny / "field2.png").write_bytes((tiny / "field2.png").read_bytes()[:200])
    with open(tiny / "segmentation.csv", "a") as file:
        file.write("field8.png,labels8.png,train\n")                         # a test image in training
        file.write("nowhere.png,labels8.png,train\n")
    status, out, err = script(folders, "check", tiny)
    assert status == 2 and err == f"error: {tiny}: 5 problems, listed above\n"
    for said in ("line 12: image 'nowhere.png' is not there",
                 "labels0.png: the mask is empty", "(10, 10)", "field2.png: cannot be read",
                 "line 11: image 'field8.png' is in line 10 already; give it one row"):
        assert said in out


# ------------------------------------------------------------------------------------------------------ classification
def test_the_picture_of_a_component_file_is_its_thumbnail(tmp_path):
    path = inform_file(tmp_path / "a_component_data.tif")
    assert reading.read_rgb(path).shape == (3, 6, 8)
    tifffile.imwrite(tmp_path / "stack.tif", np.zeros((4, 9, 9), np.float32), photometric="minisblack")
    with pytest.raises(InputError, match="has 4 pages to choose from; it must be one, or one of ImageType Thumbnail"):
        reading.read_rgb(tmp_path / "stack.tif")


@needs("inform")
def test_the_real_thumbnail():
    assert reading.read_rgb(REAL).shape == (3, 65, 87)


def test_pictures_of_other_depths_become_bytes(tmp_path):
    deep = np.linspace(0, 4000, 12 * 9 * 3).astype(np.uint16).reshape(12, 9, 3)
    tifffile.imwrite(tmp_path / "deep.tif", deep, photometric="rgb")
    picture = reading.read_rgb(tmp_path / "deep.tif")
    assert picture.dtype == np.uint8 and picture.shape == (3, 12, 9) and picture.min() == 0 and picture.max() == 255
    Image.fromarray(np.full((5, 7), 80, np.uint8)).save(tmp_path / "grey.png")
    assert (reading.read_rgb(tmp_path / "grey.png") == 80).all()  # 8 bits stay as they are
    assert reading.read_rgb(tmp_path / "grey.png").shape == (3, 5, 7)
    tifffile.imwrite(tmp_path / "nan.tif", np.full((5, 7), np.nan, np.float32))
    with pytest.raises(InputError, match="NaN"):
        reading.read_rgb(tmp_path / "nan.tif")


def test_labels_are_read_and_trimmed(coloured):
    lines = (coloured / "classification.csv").read_text().splitlines()
    lines[1:3] = ["picture0.png, red ; blue;red;,train", "picture1.png,,train"]
    (coloured / "classification.csv").write_text("\n".join(lines))
    records, _ = manifests.find_records(coloured, task="cls", needs_validation=False)
    assert records[0].labels == ("red", "blue") and records[1].labels == ()
    assert manifests.class_names(records) == ["blue", "green", "red"]
    labelled = data.read_labelled(records[:2], ["blue", "green", "red"], 16)
    assert labelled.truth.tolist() == [[True, False, True], [False, False, False]]
    with pytest.raises(InputError, match="its label 'red' is none of the run's, blue"):
        data.read_labelled(records, ["blue"], 16)


def test_augmentation_does_not_depend_on_workers_or_on_other_draws(coloured):
    records, _ = manifests.find_records(coloured, task="cls")
    labelled = data.read_labelled(records, manifests.class_names(records), 24)

    def draw(workers, epoch, chosen=(5, 2, 9)):
        pictures = data.AugmentedImages(labelled, chosen, 3, "paper")
        pictures.epoch = epoch
        torch.rand(workers + epoch)  # other users of the generator
        return next(iter(torch.utils.data.DataLoader(pictures, len(chosen), num_workers=workers)))

    (a, truth), (b, _) = draw(0, 1), draw(2, 1)
    assert torch.equal(a, b) and a.dtype == torch.uint8 and not torch.equal(a, draw(0, 2)[0])
    assert torch.equal(truth, labelled.truth[[5, 2, 9]].float())
    assert torch.equal(draw(0, 1, (9, 5))[0], a[[2, 0]])             # a picture's draw is its own
    state = torch.get_rng_state()
    draw(0, 0)
    torch.manual_seed(1)
    before = torch.rand(3)
    torch.manual_seed(1)
    data.AugmentedImages(labelled, (0,), 1, "paper")[0]
    assert torch.equal(torch.rand(3), before)                        # it leaves torch's generator alone
    torch.set_rng_state(state)


def records_of(labels, patients=None):
    return [manifests.Record(f"{i}.png", "train", patients[i] if patients else "", labels=tuple(names))
            for i, names in enumerate(labels)]


def test_folds_are_alike():
    rng = np.random.default_rng(0)
    labels = [["common"] if rng.random() < 0.6 else ["other", "common"] if rng.random() < 0.3 else ["other"]
              for _ in range(114)] + [["rare"]] * 6
    folds = data.make_folds(records_of(labels), 6, seed=1)
    assert sorted(i for fold in folds for i in fold) == list(range(120))
    for name in ("common", "other", "rare"):
        counts = [sum(name in labels[i] for i in fold) for fold in folds]
        assert max(counts) - min(counts) <= 1, (name, counts)
    sets = [sum(labels[i] == ["other", "common"] for i in fold) for fold in folds]
    assert max(sets) - min(sets) <= 1 and max(map(len, folds)) - min(map(len, folds)) <= 2
    assert folds == data.make_folds(records_of(labels), 6, seed=1) != data.make_folds(records_of(labels), 6, seed=2)


def test_folds_do_not_split_patients():
    rng = np.random.default_rng(0)
    patients = [f"P{rng.integers(9)}" for _ in range(80)]
    labels = [["a"] if rng.random() < 0.5 else ["b"] for _ in range(80)]
    folds = data.make_folds(records_of(labels, patients), 4)
    of_fold = [{patients[i] for i in fold} for fold in folds]
    assert sum(map(len, of_fold)) == len(set.union(*of_fold)) == 9 and max(map(len, folds)) <= 30
    with pytest.raises(InputError, match="--folds 10: the training rows are of 9 patients, which are never split"):
        data.make_folds(records_of(labels, patients), 10)
    with pytest.raises(InputError, match="--folds 6: the training rows are of 4 patients"):
        data.make_folds(records_of(labels[:4]), 6)


@needs("bccd")
def test_folds_of_real_data():
    records, _ = manifests.find_records(SHARED / "bccd", task="cls", needs_validation=False)
    train = [record for record in records if record.split == "train"]
    for name in manifests.class_names(records):
        counts = [sum(name in train[i].labels for i in fold) for fold in data.make_folds(train, 6)]
        assert max(counts) - min(counts) <= 1, (name, counts)


def test_rows_without_a_patient_are_their_own_groups():
    labels, patients = [["a"], ["b"]] * 10, ["P1"] * 4 + [""] * 16
    folds = data.make_folds(records_of(labels, patients), 5)
    assert sorted(map(len, folds)) == [4] * 5 and sum(set(range(4)) <= set(fold) for fold in folds) == 1
    with pytest.raises(InputError, match="of 1 patients"):
        data.make_folds(records_of(labels, ["P1"] * 20), 2)


def test_a_palette_is_seen_by_its_colours(tmp_path):
    picture = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8), "P")
    picture.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    picture.save(tmp_path / "palette.png")
    picture.save(tmp_path / "palette.tif")
    assert np.abs(reading.read_rgb(tmp_path / "palette.png").astype(int) - reading.read_rgb(
        tmp_path / "palette.tif")).max() <= 1


def test_check_of_a_classification_folder(tmp_path, script):
    folder = write_pictures(tmp_path / "coloured", patients=7)
    status, out, err = script(folders, "check", folder)
    assert status == 2 and "picture18.png (test) are of the same patient: what" in out  # they go round
    folder = write_pictures(tmp_path / "sound")
    status, out, _ = script(folders, "check", folder)
    assert status == 0 and "train: 18 images" in out and "blue 9, green 10, red 10" in out and "no problems" in out
    Image.new("RGB", (20, 20), (9, 9, 9)).save(folder / "picture0.png")
    (folder / "picture1.png").write_bytes(b"x")
    with open(folder / "classification.csv", "a") as file:
        file.write("picture2.png,red,test\npicture3.png/../picture3.png,red,train\nnew.png,violet,test\n")
    Image.fromarray(np.eye(9, dtype=np.uint8)).save(folder / "new.png")
    status, out, err = script(folders, "check", folder)
    assert status == 2 and "4 problems" in err
    for said in ("line 26: image 'picture2.png' is in line 4 already", "must be a path below",
                 "picture0.png: the image is constant", "picture1.png: cannot be read"):
        assert said in out


def test_check_takes_what_training_does_without_for_no_problem(tiny, tmp_path, script):
    """Validation rows are drawn, test rows are not needed to train."""
    write_folder(tmp_path / "train", ("train",) * 4)
    status, out, err = script(folders, "check", tmp_path / "train")
    assert status == 0 and "no problems found" in out, err
    assert script(train, "--data", tmp_path / "train", *TRAIN, "--out", tmp_path / "run")[0] == 0


def test_check_names_the_first_odd_image(tiny, script):
    for i, shape in ((0, (40, 67, 3)), (5, (65, 52, 3))):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)).save(tiny / f"field{i}.png")
    status, out, _ = script(folders, "check", tiny)
    assert status == 2 and out.count("PROBLEM") == 1
    assert f"PROBLEM {tiny / 'field5.png'}: has 3 channels, field1.png has 1; a network takes one number" in out


def test_images_are_found_by_file_folder_and_pattern(tmp_path):
    for name in ("b.png", "a.TIF", "note.txt"):
        (tmp_path / name).write_bytes(b"x")
    assert [path.name for path in data.find_images([tmp_path])] == ["a.TIF", "b.png"]
    assert data.find_images([f"{tmp_path}/*.png"]) == [tmp_path / "b.png"]
    with pytest.raises(InputError, match="names no image file"):
        data.find_images([tmp_path / "nothing*"])


def test_one_bit_and_palettes_do_not_depend_on_compression(tmp_path):
    mask = np.zeros((40, 56), bool)
    mask[5:12, 6:20] = True
    for compression in (None, "packbits", "tiff_deflate", "tiff_lzw", "group4"):
        for photometric in (0, 1):  # white is 0, black is 0
            file = tmp_path / f"{compression}-{photometric}.tif"
            Image.fromarray(mask).save(file, compression=compression, tiffinfo={262: photometric})
            # Pillow has turned the values to store where white is 0
            assert (reading.read_mask(file) == (mask if photometric else ~mask)).all(), file
    picture = Image.fromarray(np.arange(40 * 56, dtype=np.uint8).reshape(40, 56)).convert("RGB").quantize(64)
    colours = np.asarray(picture.convert("RGB"))
    for name, options in (("raw.tif", {}), ("lzw.tif", {"compression": "tiff_lzw"}), ("palette.png", {})):
        picture.save(tmp_path / name, **options)
        image, _ = reading.read_image(tmp_path / name)
        assert image.shape == (3, 40, 56) and (image == np.moveaxis(colours, -1, 0)).all(), name
    picture.convert("PA").save(tmp_path / "alpha.tif")
    assert reading.read_rgb(tmp_path / "alpha.tif").shape == (3, 40, 56)
    for kind in ("tif", "jpg"):
        Image.new("CMYK", (56, 40), (0, 255, 255, 0)).save(tmp_path / f"cmyk.{kind}")
        image = reading.read_rgb(tmp_path / f"cmyk.{kind}")
        assert image.shape == (3, 40, 56) and image[0].min() > 250 and image[1:].max() < 5  # red
