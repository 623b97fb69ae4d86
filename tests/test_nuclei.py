"""Nuclei as objects: what is learnt of label images, decoding, scores, tables, files, pictures."""
import csv
import json
import math
import zipfile

import numpy as np
import pytest
import tifffile
import torch
from conftest import SHARED, TRAIN, needs
from PIL import Image, ImageDraw

import dedl
import test
import train
from images import labels, manifests, reading
from running import figures, nuclei, prediction, runs


def image_of(*rows):
    """A label image from rows of digits; a point is background."""
    return torch.tensor([[int(cell) for cell in row.replace(".", "0")] for row in rows], dtype=torch.int32)


def discs(*circles, size=(60, 80)):
    """A label image of discs (x, y, radius), later ones over earlier ones."""
    y, x = np.mgrid[:size[0], :size[1]]
    found = np.zeros(size, np.int32)
    for number, (cx, cy, radius) in enumerate(circles, 1):
        found[np.hypot(x - cx, y - cy) <= radius] = number
    return torch.from_numpy(found)


def rows_of(file):
    with open(file, newline="") as handle:
        return list(csv.DictReader(handle))


# -------------------------------------------------------------------------------------------------------- label images
def test_what_is_a_label_image():
    two = np.array([[7, 7, 0, 300], [7, 0, 0, 300]])
    found, is_one = labels.as_labels(two)
    assert is_one and found.dtype == torch.int32 and found.tolist() == [[1, 1, 0, 2], [1, 0, 0, 2]]
    touching = np.array([[7, 7, 300, 300]])
    assert labels.as_labels(touching)[0].tolist() == [[1, 1, 2, 2]] and labels.as_labels(touching)[1]
    binary, is_one = labels.as_labels(np.array([[255, 0, 255], [255, 0, 0]], np.uint8))
    assert not is_one and binary.tolist() == [[1, 0, 2], [1, 0, 0]]
    kinds = np.array([[1, 0, 1, 0, 2], [0, 0, 0, 0, 0], [2, 0, 1, 0, 2]])  # of cells: several parts each
    found, is_one = labels.as_labels(kinds)
    assert not is_one and found.max() == 6
    many = np.arange(1, 41).reshape(1, -1) * np.array([[1], [0], [0]])
    many[2, 0] = 40                                                   # one number of forty has two parts
    found, is_one = labels.as_labels(many)
    assert is_one and found.max() == 40 and (found == 40).sum() == 2
    for empty in (np.zeros((3, 4), np.uint8), np.zeros((3, 4), bool)):
        assert labels.as_labels(empty)[0].max() == 0 and not labels.as_labels(empty)[1]


@pytest.mark.parametrize("seed", range(10))
def test_parts_of_a_label_image_are_those_of_each_number(seed):
    ndimage = pytest.importorskip("scipy.ndimage")
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 4, rng.integers(1, 30, 2)).astype(np.int32)
    found = labels.connected_parts(torch.from_numpy(values)).numpy()
    assert ((found > 0) == (values > 0)).all()
    for number in (1, 2, 3):
        own, count = ndimage.label(values == number, np.ones((3, 3)))
        pairs = set(zip(own[own > 0].tolist(), found[own > 0].tolist()))
        assert len(pairs) == count == len({part for _, part in pairs})


def test_border_and_core_of_nuclei():
    found = dedl.nucleus_classes(discs((20, 30, 12), (42, 30, 11), (70, 10, 2)))
    truth = discs((20, 30, 12), (42, 30, 11), (70, 10, 2))
    assert found.dtype == torch.uint8 and torch.equal(found > 0, truth > 0)
    cores = labels.connected_parts(found == 1)
    assert cores.max() == 3                                           # one in each, also in the smallest
    assert found[30, 31] == found[30, 32] == 2                        # where two touch
    assert (found == 1)[truth == 1].float().mean() > 0.18
    assert torch.equal(dedl.nucleus_classes(truth, 2), (truth > 0).byte())
    cut = discs((0, 30, 12))                                          # the image's edge is no border
    assert dedl.nucleus_classes(cut)[30, 0] == 1 and dedl.nucleus_classes(cut)[30, 11] == 2
    assert dedl.nucleus_classes(torch.zeros(5, 6, dtype=torch.int32)).max() == 0
    assert dedl.nucleus_classes(torch.ones(5, 6, dtype=torch.int32)).min() > 0  # no border at all


def test_rings_are_nearly_round_and_end():
    y, x = np.mgrid[:81, :81]
    disc = torch.from_numpy(np.hypot(x - 40, y - 40) <= 30)
    depth = dedl.rings(disc, 100)
    assert depth[40, 40] == depth.max() and torch.equal(depth > 0, disc)
    for angle in np.linspace(0, 6, 30):                               # along a circle within it
        place = round(40 + 15 * math.sin(angle)), round(40 + 15 * math.cos(angle))
        assert abs(depth[place] - 16) <= 2
    assert torch.equal(dedl.rings(disc, 5), depth.clamp(max=5))
    assert dedl.rings(disc, 100, square=True)[50, 50] < depth[50, 50] - 2  # corners of squares reach farther
    assert dedl.rings(torch.ones(4, 6, dtype=torch.bool), 7).unique().tolist() == [7]
    assert torch.equal(dedl.rings(image_of(".....", ".111.", ".111.", ".111.") > 0, 9),
                       image_of(".....", ".111.", ".121.", ".121.").float())  # the image's edge is none


def test_turned_labels_give_turned_classes():
    truth = discs((20, 30, 12), (42, 30, 11), (70, 10, 4))
    for turn in range(4):
        turned = dedl.nucleus_classes(truth.rot90(turn).contiguous())
        assert torch.equal(turned, dedl.nucleus_classes(truth).rot90(turn))


# ------------------------------------------------------------------------------------------------------------ decoding
def perfect(truth):
    """The probabilities of a network that makes no mistake."""
    return torch.nn.functional.one_hot(dedl.nucleus_classes(truth).long(), 3).movedim(2, 0)[1:].float()


USUAL = {"median_diameter": 20.0, "smallest": 0.0}


@pytest.mark.parametrize("classes", [2, 3])
def test_a_perfect_network_gives_every_nucleus_back(classes):
    """Also of two classes, where the shape of the mask alone tells nuclei that touch."""
    truth = discs((20, 30, 12), (42, 30, 11), (44, 52, 9), (70, 10, 4), (79, 59, 8))
    mask, cores = nuclei.mask_and_cores(perfect(truth) if classes == 3 else (truth > 0)[None].float())
    assert connected_number(mask) == 4
    found = nuclei.separate(mask, cores, USUAL)
    assert found.dtype == torch.int32 and found.max() == 5 and torch.equal(found > 0, truth > 0)
    ious, _, _ = dedl.match_nuclei(found, truth)
    assert len(ious) == 5 and ious.min() > 0.85


def connected_number(mask):
    return labels.connected_parts(mask).max()


def test_cores_separate_where_the_mask_does_not():
    """Two halves of one disc, as cells that press against each other."""
    truth = discs((40, 30, 20))
    truth[:, 40:] *= 2
    mask, cores = nuclei.mask_and_cores(perfect(truth))
    found = nuclei.separate(mask, cores, USUAL)
    ious, _, _ = dedl.match_nuclei(found, truth)
    assert found.max() == 2 and ious.min() > 0.9
    assert nuclei.separate(mask, mask, USUAL).max() == 1              # of two classes there is no telling


def test_what_is_one_nucleus_depends_on_the_usual_size():
    two = discs((60, 60, 12), (76, 60, 12), size=(120, 150)) > 0      # or one that is bent
    assert nuclei.separate(two, two, USUAL).max() == 2
    assert nuclei.separate(two, two, {"median_diameter": 200.0, "smallest": 0.0}).max() == 1
    assert nuclei.separate(two, two, {"median_diameter": 400.0, "smallest": 0.0}, scale=2.0).max() == 1


def test_large_nuclei_with_dents_stay_whole():
    y, x = np.mgrid[:160, :160]
    angle = np.arctan2(y - 80, x - 80)
    dented = torch.from_numpy(np.hypot(y - 80, x - 80) < 50 + 4 * np.sin(7 * angle))
    assert nuclei.separate(dented, dented, USUAL).max() == 1          # of 5 times the usual diameter


@pytest.mark.parametrize("rows", [16, 37])
def test_seeds_do_not_depend_on_bands(rows, monkeypatch):
    rng = np.random.default_rng(0)
    truth = discs(*[(*rng.integers(0, 150, 2), rng.integers(3, 25)) for _ in range(40)], size=(150, 150))
    mask, cores = nuclei.mask_and_cores(perfect(truth))
    cores &= torch.from_numpy(rng.random(mask.shape) < 0.9)
    for reach in (1, 2, 4):
        whole = nuclei.find_seeds(mask, cores, reach)
        with monkeypatch.context() as patch:
            patch.setattr(nuclei, "ROWS", rows)
            assert torch.equal(nuclei.find_seeds(mask, cores, reach), whole)


def test_parts_without_a_seed_stay_and_small_ones_go():
    mask = discs((20, 20, 8), (60, 20, 5), (60, 50, 1)) > 0
    cores = discs((20, 20, 2), (60, 50, 1)) > 0
    found = nuclei.separate(mask, cores, USUAL)
    assert found.unique().tolist() == [0, 1, 2, 3]
    assert nuclei.find_seeds(mask, cores, 4)[:30, 50:].sum() == mask[:30, 50:].sum() > 50
    found = nuclei.separate(mask, cores, USUAL | {"smallest": 6.0})
    assert found.unique().tolist() == [0, 1, 2] and not found[50, 60]
    assert nuclei.separate(mask, cores, USUAL | {"smallest": 6.0}, scale=2.0)[50, 60]  # in these pixels it is 1.5
    assert nuclei.separate(mask & False, mask & False, USUAL).max() == 0


SIDES = [[0, 1, 0], [1, 1, 1], [0, 1, 0]]


@pytest.mark.parametrize("seed", range(8))
def test_growth_is_ring_by_ring(seed):
    ndimage = pytest.importorskip("scipy.ndimage")
    rng = np.random.default_rng(seed)
    start = rng.integers(0, 60, (19, 23)).astype(np.int32)
    start[start > 5] = 0
    mask = torch.from_numpy(rng.random((19, 23)) < 0.8)
    earlier = torch.from_numpy(start)
    for rings in (1, 2, 3):
        wider = torch.from_numpy(ndimage.grey_dilation(earlier.numpy(), size=(3, 3), mode="constant"))
        by_sides = torch.from_numpy(ndimage.grey_dilation(earlier.numpy(), footprint=SIDES, mode="constant"))
        found = nuclei.grow(torch.from_numpy(start), mask, rings=rings)
        new = (earlier == 0) & mask & (wider > 0)
        assert torch.equal(found > 0, (earlier > 0) | new) and torch.equal(found[earlier > 0], earlier[earlier > 0])
        for y, x in new.nonzero().tolist():
            near = earlier[max(0, y - 1):y + 2, max(0, x - 1):x + 2]
            if by_sides[y, x]:
                near = torch.cat([earlier[max(0, y - 1):y + 2, x], earlier[y, max(0, x - 1):x + 2]])
            assert found[y, x] in near
        earlier = found


# -------------------------------------------------------------------------------------------------------------- scores
def scores(*pairs):
    return dedl.nucleus_scores([dedl.match_nuclei(found, truth) for found, truth in pairs])


def test_scores_by_hand():
    truth = image_of("1111.2222", "1111.2222")
    assert scores((truth, truth)) == {"ap50": 1, "ap50_mean_image": 1, "ap": 1, "f1_50": 1, "pq": 1, "count_ratio": 1,
                                      "nuclei": 2}
    merged = scores((image_of("111111111", "111111111"), truth))      # one of 18 pixels on two of 8
    assert merged["ap50"] == 0 and merged["f1_50"] == 0 and merged["count_ratio"] == 0.5
    split = scores((image_of("1122.3333", "1122.3333"), truth))       # halves: IoU 0.5 is no match
    assert split["ap50"] == 1 / 4 and split["count_ratio"] == 1.5 and split["f1_50"] == 2 / 5
    off = scores((image_of(".1111.222", ".1111.222"), truth))         # one pixel off: 6 of 10, 6 of 8 shared
    assert off["ap50"] == 1 and off["pq"] == pytest.approx((0.6 + 0.75) / 2)
    # at 0.55 and 0.6 both, up to 0.75 one of the two: TP / (TP + FP + FN) = 1 / 3
    assert off["ap"] == pytest.approx((1 + 2 * 1 + 3 / 3) / 10)
    nothing = truth * 0
    assert scores((nothing, nothing))["ap50_mean_image"] == scores((nothing, nothing))["pq"] == 1
    assert scores((nothing, truth))["ap50"] == scores((truth, nothing))["ap50"] == 0
    both = scores((nothing, nothing), (split_half := image_of("1111....."), image_of("1111.2222")))
    assert both["ap50_mean_image"] == 3 / 4 and both["ap50"] == 1 / 2 and split_half.max() == 1


@pytest.mark.parametrize("seed", range(6))
def test_scores_are_those_of_an_assignment(seed):
    """StarDist's definitions: pairs by the Hungarian method, counted from each threshold on."""
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(3):
        circles = [(rng.integers(80), rng.integers(60), rng.integers(3, 12)) for _ in range(12)]
        moved = [(x + rng.integers(-2, 3), y + rng.integers(-2, 3), r + rng.integers(-2, 3)) for x, y, r in circles[2:]]
        pairs.append((discs(*moved), discs(*circles)))
    expected, pq, of_images = [], 0, []
    for percent in range(50, 100, 5):
        tp = fp = fn = 0
        for found, truth in pairs:
            numbers, true_numbers = found.unique()[1:], truth.unique()[1:]
            ious = np.array([[((found == a) & (truth == b)).sum() / ((found == a) | (truth == b)).sum()
                              for b in true_numbers] for a in numbers])
            right = ious > 0.5 if percent == 50 else ious >= percent / 100
            a, b = optimize.linear_sum_assignment(-(right + ious / 1000))
            own = right[a, b].sum()
            if percent == 50:
                pq += ious[a, b][right[a, b]].sum()
                of_images.append(own / (len(numbers) + len(true_numbers) - own))
            tp, fp, fn = tp + own, fp + len(numbers) - own, fn + len(true_numbers) - own
        expected.append(tp / (tp + fp + fn))
        if percent == 50:
            pq, f1 = pq / (tp + fp / 2 + fn / 2), tp / (tp + fp / 2 + fn / 2)
    found = scores(*pairs)
    assert 0.1 < expected[0] < 1 and found["ap50"] == pytest.approx(expected[0])
    assert found["ap"] == pytest.approx(np.mean(expected)) and found["pq"] == pytest.approx(pq, rel=1e-5)
    assert found["f1_50"] == pytest.approx(f1) and found["ap50_mean_image"] == pytest.approx(np.mean(of_images))


# ------------------------------------------------------------------------------------------------------------ training
def test_auto_separates_where_masks_are_label_images(tiny, script, tmp_path):
    assert script(train, "--data", tiny, *TRAIN, "--out", tmp_path / "labels")[0] == 0
    config = runs.read_config(tmp_path / "labels")
    assert config["setting"]["classes"] == 3 and config["nuclei"] == "auto"
    records = [record for record in manifests.find_records(tiny)[0] if record.split == "train"]
    truth = [manifests.read_field(record).labels for record in records]
    areas = torch.cat([own.flatten().bincount()[1:] for own in truth])
    assert config["nucleus"]["median_area"] == areas[areas > 0].median()
    assert config["nucleus"]["smallest"] == pytest.approx(nuclei.SMALLEST * config["nucleus"]["median_area"])
    for record in manifests.find_records(tiny)[0]:
        values = np.asarray(Image.open(record.mask))
        Image.fromarray((values > 0).astype(np.uint8) * 255).save(record.mask)
    assert script(train, "--data", tiny, *TRAIN, "--out", tmp_path / "binary")[0] == 0
    assert runs.read_config(tmp_path / "binary")["setting"]["classes"] == 2
    status, out, _ = script(train, "--data", tiny, *TRAIN, "--nuclei", "instances", "--out", tmp_path / "asked")
    assert status == 0 and "3 of 4 training masks are no label images" in out
    assert runs.read_config(tmp_path / "asked")["setting"]["classes"] == 3
    assert train.parse_args(["--data", "x", "--recipe", "paper"]).nuclei == "mask"


def test_best_is_the_epoch_that_finds_most(tiny, tmp_path, monkeypatch):
    epochs = iter([0, 1])                                             # the second epoch finds all nuclei
    measure = prediction.measure

    def measured(model, fields, *others):
        seen = next(epochs)
        with monkeypatch.context() as patch:
            patch.setattr(prediction, "predict", lambda model, field, *_: perfect(field.labels) * seen)
            return measure(model, fields, *others)

    monkeypatch.setattr(prediction, "measure", measured)
    train.main(["--data", str(tiny), "--out", str(tmp_path / "run"), *TRAIN, "--epochs", "2"])
    best = torch.load(tmp_path / "run" / "best.pt")
    assert best["epoch"] == 2 and best["val_mean_image_iou"] == best["val_ap50_mean_image"] == 1


@pytest.mark.parametrize("app", ["conv", "linear"])
def test_app_takes_the_classes_of_nuclei(app):
    torch.manual_seed(0)
    module = dedl.build_app(app, 64, classes=3)
    logits = torch.randn(2, 3, 64, 64, requires_grad=True)
    truth = torch.randint(0, 3, (2, 64, 64))
    penalty, own = module(logits, truth, torch.tensor([1.0, 2.0, 2.0]))
    (penalty + own).backward()
    assert logits.grad.abs().sum(dim=(0, 2, 3)).min() > 0
    if app == "linear":                                               # two classes: nucleus and border are one
        merged = torch.stack([logits[:, 0], logits[:, 1:].logsumexp(1)], 1)
        two, _ = module(merged, truth.clamp(max=1), torch.tensor([1.0, 2.0]))
        torch.testing.assert_close(penalty, two)


# ---------------------------------------------------------------------------------------------------- tables and files
@needs("inform")
def test_means_of_all_stains_of_a_real_component_file(tmp_path):
    ndimage = pytest.importorskip("scipy.ndimage")
    file = next((SHARED / "inform").glob("*_component_data.tif"))
    field = manifests.read_field(manifests.Record(file, "test", mask=next((SHARED / "inform").glob("FIHC4*maps.tif"))))
    columns = nuclei.measure(field.labels, file, ring=4)
    count = field.labels.max().item()
    numbers, truth = range(1, count + 1), field.labels.numpy()
    assert count == 270 and list(columns["CellID"]) == [*numbers]
    stains = [name for name in columns if name not in ("CellID", "X_centroid", "Y_centroid", "Area")]
    assert stains[::2] == ["Alexa 594", "Cy3", "Cy5", "DAPI", "FITC"]
    centres = np.array(ndimage.center_of_mass(truth > 0, truth, numbers))
    np.testing.assert_allclose(columns["Y_centroid"], centres[:, 0], rtol=1e-9)
    np.testing.assert_allclose(columns["X_centroid"], centres[:, 1], rtol=1e-9)
    around = nuclei.grow(field.labels, field.labels == 0, rings=4).numpy() * (truth == 0)
    for name in stains[::2]:
        page = reading.read_image(file, (name,))[0][0]
        np.testing.assert_allclose(columns[name], ndimage.mean(page, truth, numbers), rtol=1e-6)
        with np.errstate(all="ignore"):
            own = np.array([page[around == number].mean() if (around == number).any() else math.nan
                            for number in numbers])
        np.testing.assert_allclose(columns[f"{name}_ring"], own, rtol=1e-4)
    # written, with 8 digits at least
    prediction.save_rows(tmp_path / "nuclei.csv", {"a": columns})
    rows = rows_of(tmp_path / "nuclei.csv")
    np.testing.assert_allclose([float(row["DAPI"]) for row in rows], columns["DAPI"], rtol=1e-8)


def test_rgb_is_three_stains_and_tables_take_other_columns(tmp_path):
    truth = discs((20, 30, 12), (50, 30, 9))
    rgb = np.zeros((60, 80, 3), np.uint8)
    rgb[truth == 1] = 10, 20, 30
    Image.fromarray(rgb).save(tmp_path / "a.png")
    Image.fromarray(rgb[..., 1]).save(tmp_path / "b.png")
    colours = nuclei.measure(truth, tmp_path / "a.png")
    assert [colours[name][0] for name in ("red", "green", "blue")] == [10, 20, 30] and colours["red"][1] == 0
    prediction.save_rows(tmp_path / "t.csv", {"a": colours})
    prediction.save_rows(tmp_path / "t.csv", {"b": nuclei.measure(truth, tmp_path / "b.png")})
    rows = rows_of(tmp_path / "t.csv")
    assert [row["image"] for row in rows] == ["a", "a", "b", "b"]
    assert rows[0]["red"] == "10" and rows[0]["grey"] == "" and rows[2]["grey"] == "20" and rows[2]["red"] == "nan"
    assert list(rows[0])[:5] == ["image", "CellID", "X_centroid", "Y_centroid", "Area"]


def test_outlines_enclose_their_pixels():
    ndimage = pytest.importorskip("scipy.ndimage")
    rng = np.random.default_rng(0)
    for _ in range(60):
        found = labels.connected_parts(torch.from_numpy(rng.random(rng.integers(1, 14, 2)) < rng.random() * 0.9))
        outlines = nuclei.outlines(found)
        assert list(outlines) == list(range(1, found.max() + 1))
        for number, corners in outlines.items():
            x, y = np.array(corners).T
            area = abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
            assert area == ndimage.binary_fill_holes(found == number).sum()


def test_pixel_sizes(tmp_path):
    page = np.zeros((20, 30), np.uint8)
    cases = {
        "cm.tif": (dict(resolution=(20000, 20000), resolutionunit="CENTIMETER"), 0.5),
        "print.tif": (dict(resolution=(300, 300), resolutionunit="INCH"), None),
        "none.tif": (dict(), None),
        "zero.tif": (dict(resolution=(0, 0), resolutionunit="CENTIMETER"), None),
        "imagej.tif": (dict(imagej=True, resolution=(4, 4), metadata={"unit": "um"}), 0.25),
        "a.ome.tif": (dict(metadata={"axes": "YX", "PhysicalSizeX": 0.325, "PhysicalSizeXUnit": "µm"}), 0.325),
    }
    for name, (how, expected) in cases.items():
        tifffile.imwrite(tmp_path / name, page, **how)
        assert reading.pixel_size(tmp_path / name) == (expected and pytest.approx(expected)), name
    Image.fromarray(page).save(tmp_path / "a.png")
    assert reading.pixel_size(tmp_path / "a.png") is None


def test_label_images_open_in_imagej(tmp_path):
    truth = discs((20, 30, 12), (50, 30, 9))
    nuclei.save_labels(truth, tmp_path / "a.tif", 0.5)
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        assert tiff.is_imagej and tiff.imagej_metadata["unit"] == "um" and tiff.pages[0].dtype == np.uint16
        assert (tiff.asarray() == truth.numpy()).all()
    assert reading.pixel_size(tmp_path / "a.tif") == 0.5
    assert labels.as_labels(reading.read_mask(tmp_path / "a.tif"))[1]  # and is a mask to train with
    many = torch.arange(70000, dtype=torch.int32).view(200, 350)
    nuclei.save_labels(many, tmp_path / "b.tif", 0.5)
    found = tifffile.imread(tmp_path / "b.tif")
    assert found.dtype == np.uint32 and (found == many.numpy()).all()
    assert reading.pixel_size(tmp_path / "b.tif") == pytest.approx(0.5)
    with tifffile.TiffFile(tmp_path / "b.tif") as tiff:
        assert tiff.pages[0].resolutionunit == tifffile.RESUNIT.CENTIMETER  # which all programs know
    nuclei.save_labels(many, tmp_path / "b.tif", None)
    nuclei.save_labels(truth, tmp_path / "a.tif", None)
    assert reading.pixel_size(tmp_path / "a.tif") is reading.pixel_size(tmp_path / "b.tif") is None


def test_rois(finished, script, tmp_path):
    roifile = pytest.importorskip("roifile")
    truth = discs((20, 30, 12), (50, 30, 9))
    nuclei.save_rois(truth, tmp_path / "RoiSet.zip")
    rois = roifile.roiread(tmp_path / "RoiSet.zip")
    assert [roi.name for roi in rois] == ["1", "2"]
    for number, roi in enumerate(rois, 1):
        drawn = Image.new("L", (80, 60))
        ImageDraw.Draw(drawn).polygon([tuple(point) for point in roi.coordinates()], fill=1)
        assert (np.asarray(drawn, bool) & (truth == number).numpy()).sum() > 0.95 * (truth == number).sum()
    with zipfile.ZipFile(tmp_path / "RoiSet.zip") as zipped:
        assert zipped.namelist() == ["1.roi", "2.roi"]


def test_without_roifile_there_is_a_hint(finished, script, tmp_path, monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "roifile", None)
    status, _, err = script(test, finished[0], "--rois", "--save-masks", tmp_path / "masks")
    assert status == 2 and "pip install roifile" in err


def test_images_in_which_nothing_is_found(finished, tmp_path, script, monkeypatch):
    monkeypatch.setattr(prediction, "one_way", lambda model, image, *_: image.expand(2, -1, -1) * 0)
    for _ in range(2):                                                # the second call finds the first one's tables
        assert script(test, finished[0], "--images", finished[1] / "field0.png", "--ring", 2, "--save-masks",
                      tmp_path / "out")[0] == 0
    assert rows_of(tmp_path / "out" / "nuclei.csv") == []
    table, = rows_of(tmp_path / "out" / "predictions.csv")
    assert table["nuclei"] == table["nucleus_area_fraction"] == "0"
    assert not tifffile.imread(tmp_path / "out" / "field0_labels.tif").any()


# ---------------------------------------------------------------------------------------------------------- other sizes
def test_nuclei_or_pixels_of_another_size_are_reported(tmp_path):
    file = tmp_path / "a.tif"
    tifffile.imwrite(file, np.zeros((60, 80), np.uint8), resolution=(10000, 10000), resolutionunit="CENTIMETER")
    measured = {str(file): nuclei.measure(discs((20, 30, 12), (50, 30, 9)), file)}
    usual = {"median_diameter": 20.0, "pixel_size": 1.0}
    assert nuclei.unlike_training(measured, usual, 1.0) == []
    lines = nuclei.unlike_training(measured, {"median_diameter": 40.0, "pixel_size": 0.5}, 1.0)
    assert len(lines) == 2 and "try --scale 1.9" in lines[0] and f"{file}: pixels are 1 micrometres" in lines[1]
    assert "try --scale 2.00" in lines[1]
    assert nuclei.unlike_training(measured, {"median_diameter": 40.0, "pixel_size": 0.5}, 2.0) == []


def test_scale_resamples_to_and_fro(finished, script, tmp_path):
    run, folder = finished
    for scale in ("0.5", "2"):
        status, _, err = script(test, run, "--images", folder / "field0.png", "--scale", scale, "--save-masks",
                                tmp_path / scale)
        assert status == 0, err
        found = tifffile.imread(tmp_path / scale / "field0_labels.tif")
        assert found.shape == Image.open(folder / "field0.png").size[::-1]
    assert script(test, run, "--scale", "2", "--device", "cpu")[0] == 0
    field = manifests.read_field(manifests.Record(folder / "field0.png", "test"))
    wider = prediction.enlarged(field, 2.0)
    assert wider.shape == (2 * field.shape[0], 2 * field.shape[1])
    assert (wider.window().mean() - field.window().mean()).abs() < 0.02
    assert prediction.enlarged(field, 0.001).shape == (1, 1)


def test_scale_moves_nothing(monkeypatch):
    monkeypatch.setattr(prediction, "one_way", lambda model, image, *_: image)
    image = np.zeros((1, 40, 199), np.float32)
    image[..., 180:] = 1                                              # 199 pixels at 0.3 are 59.7
    field = manifests.Field(None, image, (), np.float32([0, 1]))
    for scale in (0.3, 0.47, 2.3):
        found = prediction.predict(None, field, None, scale=scale)[0, 20]
        assert (found > 0.5).int().argmax().item() in (179, 180, 181), scale


# ------------------------------------------------------------------------------------------------------------ pictures
def test_neighbours_have_other_colours():
    rng = np.random.default_rng(0)
    circles = [(int(x), int(y), 9) for x, y in rng.uniform(0, 150, (90, 2))]
    truth = discs(*circles, size=(150, 150))
    pixels = figures.colour(truth)
    wider = nuclei.grow(truth, truth == 0, rings=1)
    assert (pixels[truth == 0] == 0).all() and (pixels[truth > 0].max(-1) > 0).all()
    colours = {number: tuple(pixels[truth == number][0]) for number in truth.unique()[1:].tolist()}
    assert all((pixels[truth == number] == colour).all() for number, colour in colours.items())
    for one, two in ((wider[1:], wider[:-1]), (wider[:, 1:], wider[:, :-1])):
        for a, b in set(zip(one.flatten().tolist(), two.flatten().tolist())):
            assert not a or not b or a == b or colours[a] != colours[b]


def test_merged_and_split_nuclei_are_marked():
    truth = image_of("1111.2222.3333", "1111.2222.3333")
    found = image_of("111111111.2233", "111111111.2233")
    merged, split = figures.mistakes(found, truth)
    assert merged.tolist() == [1, 2] and split.tolist() == [3]


def test_overlays_are_at_most_2048_pixels_a_side():
    image = np.random.default_rng(0).integers(0, 255, (1, 50, 4500)).astype(np.uint8)
    field = manifests.Field(None, image, ("grey",), reading.find_limits(image))
    pixels = figures.overlay(figures.overview(field), discs((2000, 20, 15), size=(50, 4500)))
    assert pixels.shape == (17, 1500, 3) and pixels.dtype == np.uint8
    assert (pixels.max(-1) != pixels.min(-1)).any()                   # outlines are coloured, the image is grey


def test_scores_of_nuclei_are_written_where_the_truth_has_labels(finished, script):
    run, _ = finished
    status, out, _ = script(test, run, "--device", "cpu")
    measured = json.loads((run / "test.json").read_text())
    for name in ("ap50", "ap50_mean_image", "ap", "f1_50", "pq", "count_ratio", "nuclei"):
        assert name in measured and f"\n  {name} " in out
