"""Whole images of any size, new images, stains by name, nuclei counted, figures of the training, runs compared."""
import csv
import json
import shutil
import sys
import weakref

import numpy as np
import pytest
import tifffile
import torch
from conftest import TRAIN, blobs
from PIL import Image

import data
import dedl
import models
import test
import train
from images import manifests, reading, synthetic
from running import compute, nuclei, prediction, runs
from running.figures import save_curves
from running.process import InputError


def rows_of(file):
    with open(file, newline="") as handle:
        return list(csv.DictReader(handle))


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run, to be written into."""
    folder = tmp_path / "a_run"
    folder.mkdir()
    for name in ("config.json", "best.pt"):
        (folder / name).write_bytes((finished[0] / name).read_bytes())
    return folder


# ---------------------------------------------------------------------------------------------------------- new images
def test_new_images_get_masks_maps_and_a_table(run, tiny, script, tmp_path):
    new = tmp_path / "new"
    (new / "deeper").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.tif", "deeper/c.png", "broken.png")):
        image = Image.open(tiny / f"field{i}.png")
        image.save(new / name)
    (new / "broken.png").write_bytes(b"not an image")
    (new / "text.txt").write_text("left alone")
    status, out, err = script(test, run, "--images", f"{new}/**/*.png", new / "b.tif", "--save-probabilities",
                              tmp_path / "maps")
    assert status == 2 and err.startswith(f"error: --images: 1 of 4 cannot be predicted; {new / 'broken.png'}: "), err
    table = run / "predictions" / "predictions.csv"
    assert f"{table}: 3 images, their nuclei in nuclei.csv beside it\n" in out
    rows = {row["image"]: row for row in rows_of(table)}
    assert set(rows) == {str(new / name) for name in ("a.png", "b.tif", "deeper/c.png")}
    for name, field in (("a", "field0"), ("b", "field1"), ("c", "field2")):
        mask = np.asarray(Image.open(run / "predictions" / f"{name}.png"))
        probability = np.asarray(Image.open(tmp_path / "maps" / f"{name}.png"))
        assert mask.shape == Image.open(tiny / f"{field}.png").size[::-1] and set(np.unique(mask)) <= {0, 255}
        assert probability.dtype == np.uint16 and ((probability > 32768) == (mask > 0))[probability != 32768].all()
        row = next(row for image, row in rows.items() if f"{name}." in image)
        assert (int(row["height"]), int(row["width"])) == mask.shape
        assert float(row["nucleus_area_fraction"]) == pytest.approx((mask > 0).mean(), abs=1e-6)
        labels = tifffile.imread(run / "predictions" / f"{name}_labels.tif")
        assert int(row["nuclei"]) == labels.max() and not labels[mask == 0].any()
    # the same masks as those of measured images
    assert script(test, run, "--data", tiny, "--split", "train", "--save-masks", tmp_path / "masks")[0] == 0
    assert (tmp_path / "masks" / "field0.png").read_bytes() == (run / "predictions" / "a.png").read_bytes()


def test_images_that_cannot_be_predicted_do_not_stop_the_others(run, tiny, script):
    (tiny / "field1.png").write_bytes(b"not an image")
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(tiny / "field2.png")
    status, out, err = script(test, run, "--images", *(tiny / f"field{i}.png" for i in (1, 0, 2, 3)))
    assert status == 2 and "error: --images: 2 of 4 cannot be predicted" in err and "field1.png" in err
    assert "field2.png: has 3 channels" in out and len(rows_of(run / "predictions/predictions.csv")) == 2
    assert script(test, run, "--images", tiny / "field1.png")[::2][1].count("\n") == 1


def test_a_page_that_cannot_be_measured_does_not_stop_the_others(run, tiny, script, tmp_path):
    pages = np.random.default_rng(0).random((2, 40, 50)).astype(np.float32)
    pages[1, 3, 4] = np.nan                                           # of a stain that the network does not see
    tifffile.imwrite(tmp_path / "a.tif", pages, imagej=True, metadata={"axes": "CYX", "Labels": ["DAPI", "CD4"]})
    status, out, err = script(test, run, "--images", tmp_path / "a.tif", tiny / "field0.png")
    assert status == 2 and f"1 of 2 cannot be predicted; {tmp_path / 'a.tif'}: holds pixels that are NaN" in err
    assert [row["image"] for row in rows_of(run / "predictions" / "predictions.csv")] == [str(tiny / "field0.png")]


def test_images_of_one_stem_get_files_of_their_own(run, tiny, script, tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    (other / "field0.png").write_bytes((tiny / "field3.png").read_bytes())
    found, table = run / "predictions", run / "predictions" / "predictions.csv"
    assert script(test, run, "--images", tiny / "field0.png")[0] == 0
    first = rows_of(table)
    status, out, _ = script(test, run, "--images", other / "field0.png", tiny / "field1.png")
    assert status == 0 and "predictions.csv: 2 images, their nuclei in nuclei.csv beside it\n" in out
    assert {path.name for path in found.glob("*.tif")} == {
        "field0_labels.tif", "other_field0_labels.tif", "field1_labels.tif"}
    assert rows_of(table)[0] == first[0] and len(rows_of(table)) == 3
    monkeypatch.chdir(tiny)                                           # the same image by a relative path
    twice = "field1.png", tiny / "field1.png"
    assert script(test, run, "--images", *twice)[0] == 0 and len(rows_of(table)) == 3
    both = tmp_path / "both"
    assert script(test, run, "--images", tiny / "field0.png", other / "field0.png", "--save-masks", both)[0] == 0
    assert {path.name for path in both.glob("*.png")} == {
        f"{folder}_field0{end}.png" for folder in ("tiny", "other") for end in ("", "_overlay")}
    (tmp_path / "deeper" / "other").mkdir(parents=True)
    shutil.copy(other / "field0.png", tmp_path / "deeper" / "other")
    status, _, err = script(test, run, "--images", other, tmp_path / "deeper" / "other", "--save-masks", tmp_path / "x")
    assert status == 2 and "2 images would go into other_field0.png" in err
    files = {path.name: path.read_bytes() for path in found.iterdir()}
    status, _, err = script(test, run, "--images", tmp_path / "deeper" / "other")  # nor into an earlier one's file
    assert status == 2 and "2 images would go into other_field0.png" in err
    assert files == {path.name: path.read_bytes() for path in found.iterdir()}
    for name in ("nuclei.csv", "predictions.csv"):
        for text in ("picture,height\na.png,3\n", ""):               # somebody else's
            (both / name).write_text(text)
            status, out, err = script(test, run, "--images", tiny / "field0.png", "--save-masks", both)
            assert status == 2 and f"{name}: has no column image" in err and (both / name).read_text() == text
        (both / name).unlink()


def test_an_interruption_keeps_the_table_of_what_is_done(run, tiny, script, monkeypatch):
    whole, calls = prediction.predict, []

    def predict(*inputs, **how):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(*inputs, **how)

    monkeypatch.setattr(prediction, "predict", predict)
    status, _, err = script(test, run, "--images", f"{tiny}/field*.png")
    table = run / "predictions" / "predictions.csv"
    assert status == 130 and err == f"interrupted; 2 of 9 images are in {table}\n"
    assert len(rows_of(table)) == len(list((run / "predictions").glob("*_labels.tif"))) == 2


def test_an_image_whose_files_are_not_written_gets_no_rows(run, tiny, script, monkeypatch):
    whole = test.save_nuclei

    def save(mask, labels, view, record, name, args):
        if name == "field1":
            raise KeyboardInterrupt
        whole(mask, labels, view, record, name, args)

    monkeypatch.setattr(test, "save_nuclei", save)
    monkeypatch.setattr(prediction, "one_way", lambda model, image, *_: image.expand(2, -1, -1) / 2)
    assert script(test, run, "--images", tiny / "field0.png", tiny / "field1.png")[0] == 130
    for name in ("predictions.csv", "nuclei.csv"):
        assert {row["image"] for row in rows_of(run / "predictions" / name)} == {str(tiny / "field0.png")}, name


@pytest.mark.parametrize("seed", range(30))
def test_connected_parts_are_those_of_scipy(seed):
    ndimage = pytest.importorskip("scipy.ndimage")
    rng = np.random.default_rng(seed)
    mask = rng.random(rng.integers(1, 40, 2)) < rng.random()
    labels = nuclei.connected_parts(torch.from_numpy(mask))
    assert labels.dtype == torch.int32
    np.testing.assert_array_equal(labels, ndimage.label(mask, np.ones((3, 3)))[0])


def test_connected_parts_by_hand():
    snake = torch.zeros(41, 40, dtype=torch.bool)
    snake[::2] = True
    snake[1::4, -1] = snake[3::4, 0] = True
    assert torch.equal(nuclei.connected_parts(snake), snake.int())
    snake[20] = False
    assert nuclei.connected_parts(snake)[[18, 22], 5].tolist() == [1, 2]
    assert nuclei.connected_parts(torch.eye(9).bool()).max() == 1  # touching by corners
    assert nuclei.connected_parts(torch.zeros(5, 5, dtype=torch.bool)).max() == 0


# -------------------------------------------------------------------------------------------------------- large images
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
def test_limits_of_large_images_are_about_the_same(monkeypatch, kind):
    rng = np.random.default_rng(3)
    image = (rng.normal(30, 20, (2, 700, 300)).clip(0) if kind != np.float32 else rng.normal(0, 1e3, (2, 700, 300)))
    image = image.astype(kind)
    image[1, :, :290] = 0  # both percentiles of many equal values
    whole = reading.find_limits(image)
    monkeypatch.setattr(reading, "SAMPLE", 50_000)  # every fifth pixel
    for sampled, exact in zip(reading.find_limits(image), whole):
        assert sampled.shape == (2, 1, 1) and sampled.dtype == np.float32
        np.testing.assert_allclose(sampled, exact, atol=0.05 * np.ptp(image))


def test_new_images_are_read_one_after_another(run, tiny, script, tmp_path, monkeypatch):
    """However many there are: while one is read, no more than the one before is held."""
    whole_read, whole_predict, images, probabilities = manifests.read_field, prediction.predict, [], []

    def held(references):
        return sum(reference() is not None for reference in references)

    def read_field(*inputs):
        assert held(images) <= 1 and held(probabilities) <= 1
        field = whole_read(*inputs)
        images.append(weakref.ref(field))
        return field

    def predict(*inputs, **how):
        result = whole_predict(*inputs, **how)
        probabilities.append(weakref.ref(result))
        return result

    monkeypatch.setattr(manifests, "read_field", read_field)
    monkeypatch.setattr(prediction, "predict", predict)
    status, _, err = script(test, run, "--images", f"{tiny}/field?.png", "--save-probabilities", tmp_path / "maps")
    assert status == 0 and len(images) == len(probabilities) == 9, err


def test_a_window_is_a_part_of_the_normalised_image(tiny):
    field = manifests.read_field(manifests.find_records(tiny)[0][0])
    whole = field.window()
    assert field.image.dtype == np.uint8 and field.shape == (40, 67)
    assert whole.dtype == torch.float32 and (whole.min(), whole.max()) == (0, 1)
    rows, columns = np.array([3, 2, 2, 39]), torch.tensor([66, 0, 5])
    assert torch.equal(field.window(slice(3, 20), slice(5, 9)), whole[:, 3:20, 5:9])
    assert torch.equal(field.window(rows, columns), whole[:, rows[:, None], columns])
    assert torch.equal(field.window(torch.from_numpy(rows), slice(5, 9)), whole[:, rows, 5:9])


def test_an_image_does_not_change_much_where_tiles_fall(run):
    """The network of a run, an image of several tiles against the same image whole."""
    on_cpu = compute.Compute(torch.device("cpu"), "off")
    model = runs.load_best(run, models.build_segmenter, on_cpu)
    image = np.concatenate([np.concatenate([blobs(np.random.default_rng(i + 3 * j), 50, 50)[0] for i in range(3)])
                            for j in range(3)], 1)[None]
    field = manifests.Field(None, image, ("grey",), reading.find_limits(image))
    with torch.inference_mode():
        def probability(**how):
            return prediction.predict(model, field, on_cpu, **how)
        whole, cut, blended = probability(), probability(tile=64, overlap=0), probability(tile=64, overlap=32)
    assert (blended - whole).abs().mean() < 0.9 * (cut - whole).abs().mean()


# -------------------------------------------------------------------------------------------------------------- stains
def write_stacks(folder, orders):
    """A data folder of inForm-like TIFFs of three stains each, their pages in these orders."""
    folder.mkdir()
    rows = ["image,mask,split"]
    for i, order in enumerate(orders):
        image, labels = blobs(np.random.default_rng(i), 48, 64)
        stains = {"CD19": image[::-1].astype(np.float32), "DAPI": image.astype(np.float32), "PD1": 250.0 - image}
        synthetic.write_inform(folder / f"stack{i}.tif", "S", {name: stains[name] for name in order})
        Image.fromarray(labels).save(folder / f"labels{i}.png")
        rows.append(f"stack{i}.tif,labels{i}.png,{('train', 'train', 'validation', 'test')[i]}")
    (folder / "segmentation.csv").write_text("\n".join(rows) + "\n")
    return folder


ORDER = ("CD19", "DAPI", "PD1")


@pytest.mark.parametrize("channel", ["dapi,CD19", "1,0"])  # of a page that is named by its place the name is remembered
def test_stains_are_found_by_name_in_any_order(script, tmp_path, channel):
    folder = write_stacks(tmp_path / "stacks", [ORDER] * 3 + [("PD1", "CD19", "DAPI")])
    same = write_stacks(tmp_path / "same", [ORDER] * 4)
    run = tmp_path / "run"
    status, _, err = script(train, "--data", folder, "--out", run, *TRAIN, "--channel", channel)
    config = runs.read_config(run)
    assert status == 0 and config["setting"]["in_channels"] == 2, err
    assert [name.upper() for name in config["channels"]] == ["DAPI", "CD19"]
    found = []
    for where, more in ((folder, ()), (same, ()), (same, ("--channel", "DAPI,PD1"))):
        assert script(test, run, "--data", where, "--save-probabilities", tmp_path / "maps", *more)[0] == 0
        found.append((tmp_path / "maps" / "stack3.png").read_bytes())
    assert found[0] == found[1] != found[2]


def test_files_without_stains_have_none_to_remember(tiny):
    with Image.open(tiny / "field1.png") as image:
        image.save(tiny / "field1.tif")
    (tiny / "segmentation.csv").write_text((tiny / "segmentation.csv").read_text().replace("field1.png", "field1.tif"))
    fields = data.read_fields(manifests.find_records(tiny)[0], ("0",))
    assert {data.stains({"channel": "0", "channels": field.channels}) for field in fields} == {("0",)}
    assert data.stains({"channel": "1,PD1", "channels": ["CD4", "PD1"]}) == ("CD4", "PD1")


def imagej_stack(path, axes="CYX", count=3, **metadata):
    """An ImageJ file of so many pages; page k holds about 100 k."""
    shape = {"CYX": (count, 40, 50), "ZYX": (count, 40, 50), "ZCYX": (4, count // 4, 40, 50), "TYX": (count, 40, 50),
             "TZCYX": (2, 2, count // 4, 40, 50)}[axes]
    pixels = np.random.default_rng(0).integers(0, 99, (count, 40, 50)) + 100 * np.arange(count)[:, None, None]
    tifffile.imwrite(path, pixels.astype(np.uint16).reshape(shape), imagej=True, metadata={"axes": axes, **metadata})
    return path


def test_labels_of_imagej_are_names(tmp_path):
    path = imagej_stack(tmp_path / "a.tif", Labels=["CD4", "DAPI", "CD8"])
    image, names = reading.read_image(path, ("CD8", "dapi"))
    assert names == ("CD8", "dapi") and image.mean((1, 2)).round(-2).tolist() == [200, 100]
    with pytest.raises(InputError, match="no single page named 'PD1'.*it has CD4, DAPI, CD8"):
        reading.read_image(path, ("PD1",))
    assert reading.read_image(path, ("2",))[1] == ("CD8",)               # remembered by its name


def test_a_run_by_number_finds_its_pages_in_other_files(script, tmp_path):
    """Where pages have no names their number is all that tells of another panel."""
    for kind, metadata in (("named", {"Labels": ["CD4", "DAPI", "CD8"]}), ("nameless", {})):
        folder = tmp_path / kind
        folder.mkdir()
        rows = ["image,mask,split"]
        for i, split in enumerate(("train", "train", "validation", "test")):
            imagej_stack(folder / f"{i}.tif", **metadata)
            Image.fromarray(np.eye(40, 50, dtype=np.uint8)).save(folder / f"{i}.png")
            rows.append(f"{i}.tif,{i}.png,{split}")
        (folder / "segmentation.csv").write_text("\n".join(rows))
        status, _, err = script(train, "--data", folder, "--out", folder / "run", *TRAIN, "--channel", "1")
        assert status == 0 and script(test, folder / "run")[0] == 0, err
    other = imagej_stack(tmp_path / "other.tif", count=4)
    status, _, err = script(test, tmp_path / "nameless" / "run", "--images", other)
    assert status == 0, err
    imagej_stack(other, Labels=["DAPI", "CD4", "CD8"])                # another order: found by name
    assert json.loads((tmp_path / "named" / "run" / "config.json").read_text())["channels"] == ["DAPI"]
    assert script(test, tmp_path / "named" / "run", "--images", other)[0] == 0


@pytest.mark.parametrize("axes, said", [("ZCYX", "4 Z x 3 C"), ("ZYX", "12 Z"), ("TYX", "12 T"),
                                        ("TZCYX", "2 T x 2 Z x 3 C")])
def test_stacks_are_refused(tmp_path, axes, said):
    for channel in ("0", "DAPI"):
        with pytest.raises(InputError, match=f"stack.tif: is a stack, {said} x 40 Y x 50 X; save a projection"):
            reading.read_image(imagej_stack(tmp_path / "stack.tif", axes, 12), (channel,))
    tifffile.imwrite(tmp_path / "stack.ome.tif", np.zeros((4, 3, 40, 50), np.uint16), photometric="minisblack",
                     metadata={"axes": "ZCYX", "Channel": {"Name": ["DAPI", "CD4", "CD8"]}})
    with pytest.raises(InputError, match="is a stack, 4 Z x 3 C"):
        reading.read_image(tmp_path / "stack.ome.tif", ("DAPI",))


@pytest.mark.parametrize("labels", [["c:1/3 - {}.czi", "c:2/3 - {}.czi", "c:3/3 - {}.czi"], ["1", "2", "3"],
                                    ["C1-{}.tif", "C2-{}.tif", "C3-{}.tif"], "DAPI"])
def test_labels_that_tell_of_slices_or_files_are_no_names(tmp_path, labels):
    """As Bio-Formats and Fiji write them: they differ from file to file. Pages are then taken by their number."""
    for name in ("a", "b"):
        named = labels if isinstance(labels, str) else [label.format(name) for label in labels]
        path = imagej_stack(tmp_path / f"{name}.tif", Labels=named)
        image, names = reading.read_image(path, ("1",))
        assert names == ("page 1",) and image.mean().round(-2) == 100


def test_large_files_of_imagej_are_refused(tmp_path):
    """They describe one page, behind which the others lie; the first alone was read, as grey."""
    pixels = np.zeros((3, 40, 50), np.uint16)
    tifffile.imwrite(tmp_path / "large.tif", pixels, imagej=True, truncate=True)
    for read in (reading.read_image, reading.read_mask):
        with pytest.raises(InputError, match="large.tif: is a stack, 3 C x"):
            read(tmp_path / "large.tif")


def test_a_labelled_slice_is_taken_by_its_label_alone(tmp_path):
    """Fiji's "Images to Stack" makes slices of stains."""
    path = imagej_stack(tmp_path / "a.tif", "ZYX", Labels=["CD4", "DAPI", "CD8"])
    assert reading.read_image(path, ("DAPI",))[0].mean().round(-2) == 100
    with pytest.raises(InputError, match="is a stack, 3 Z"):
        reading.read_image(path, ("1",))


def test_names_of_ome_tiffs(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 99, (3, 20, 30)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.ome.tif", pixels, photometric="minisblack",
                     metadata={"axes": "CYX", "Channel": {"Name": ["CD4", "DAPI", "CD8"]}})
    image, names = reading.read_image(tmp_path / "a.ome.tif", ("CD8", "dapi"))
    assert names == ("CD8", "dapi") and np.array_equal(image, pixels[[2, 1]])
    tifffile.imwrite(tmp_path / "b.ome.tif", pixels[0], metadata={"axes": "YX", "Channel": {"Name": "Hoechst"}})
    assert reading.read_image(tmp_path / "b.ome.tif")[0].shape == (1, 20, 30)  # a single page is taken whole


def test_a_name_of_two_pages_is_no_name(tmp_path):
    synthetic_stain = np.ones((8, 8), np.float32)
    synthetic.write_inform(tmp_path / "a.tif", "S", {"DAPI": synthetic_stain})
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        text = tiff.pages[0].description
    with tifffile.TiffWriter(tmp_path / "b.tif") as tiff:
        for _ in range(2):
            tiff.write(synthetic_stain, metadata=None, description=text)
    with pytest.raises(InputError, match="no single page named 'DAPI'.*it has page 0, page 1"):
        reading.read_image(tmp_path / "b.tif")
    image, names = reading.read_image(tmp_path / "b.tif", ("1",))
    assert image.shape == (1, 8, 8) and names == ("page 1",)  # by its name it would not be found again


def test_stains_are_not_dropped(tmp_path):
    planes = np.random.default_rng(0).integers(0, 99, (2, 8, 9)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", planes, planarconfig="separate", photometric="minisblack")
    np.testing.assert_array_equal(reading.read_image(tmp_path / "a.tif")[0], planes)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "b.png")
    for name in ("a.tif", "b.png"):
        with pytest.raises(InputError, match="without stains to take DAPI, CD4"):
            reading.read_image(tmp_path / name, ("DAPI", "CD4"))


# ------------------------------------------------------------------------------------------------------------- figures
def test_a_run_ends_with_its_curves(finished, cross_validated, tmp_path, monkeypatch, capfd):
    pytest.importorskip("matplotlib")
    for folder in (finished[0], cross_validated[0] / "fold1"):
        with Image.open(folder / "curves.png") as figure:
            assert figure.width > 2 * figure.height > 400
    history = [{"epoch": e, "train_loss": 1 / e, "val_loss": 1 / e, "val_iou": 0.1 * e, "lr": 0.1} for e in (1, 2)]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    hint = save_curves(history, tmp_path / "curves.png") or capfd.readouterr().out
    assert "pip install matplotlib" in hint and not (tmp_path / "curves.png").exists()


# ---------------------------------------------------------------------------------------------------------- comparison
def test_several_runs_are_compared_in_one_table(run, tiny, script, tmp_path, monkeypatch):
    config = json.loads((run / "config.json").read_text())
    ious = {"a": 0.8, "b": 0.6, "c": 0.9}
    for name in (*ious, "no_run"):
        (tmp_path / name).mkdir()
        if name in ious:
            (tmp_path / name / "best.pt").write_bytes((run / "best.pt").read_bytes())
            (tmp_path / name / "config.json").write_text(json.dumps({**config, "data": str(tiny)}))
    order, whole = iter(ious.values()), dedl.segmentation_scores
    monkeypatch.setattr(dedl, "segmentation_scores", lambda counts: {**whole(counts), "iou": next(order)})
    status, out, err = script(test, *(tmp_path / name for name in (*ious, "no_run")))
    assert status == 2 and err.startswith("error: 1 of 4 runs cannot be measured") and "no_run" in err
    header, *lines = out.strip().splitlines()[-4:]
    assert header.split() == ["iou", "mean_image_iou", "ap50", "ap50_mean_image", "count_ratio", "run"]
    assert [line.split()[::5] for line in lines] == [
        [f"{ious[name]:.4f}", str(tmp_path / name)] for name in ("c", "a", "b")]
    # settings are chosen: the test rows stay unseen, unless they are asked for
    assert all((tmp_path / name / "validation.json").is_file() for name in ious) and "on the validation split of" in out
    assert not list(tmp_path.glob("*/test.*"))
    monkeypatch.setattr(dedl, "segmentation_scores", whole)
    status, out, err = script(test, tmp_path / "a", tmp_path / "c", "--split", "test")
    assert status == 0 and out.count("on the test split of") == 2 and (tmp_path / "c" / "test.json").is_file(), err


def test_cross_validations_are_compared_on_the_validation_parts_of_their_folds(cross_validated, script, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(cross_validated[0], run, ignore=shutil.ignore_patterns("test.*"))
    right = labels = found = 0
    for fold in range(3):
        with open(run / f"fold{fold}" / "validation.csv", newline="") as file:
            for row in csv.DictReader(file):
                truth = set(row["labels"].split(";"))
                guess = {name for name in ("blue", "green", "red") if float(row[name]) > 0.5}
                right, labels, found = right + len(truth & guess), labels + len(truth), found + len(guess)
    status, out, err = script(test, run, run)
    assert status == 0 and not list(run.glob("test.*")), err
    assert f"{run} on the validation parts of its 3 folds: f1_micro {2 * right / (labels + found):.4f}\n" in out
    assert out.splitlines()[-1].split()[0] == f"{2 * right / (labels + found):.4f}"
    status, out, err = script(test, run, run, "--split", "test")
    assert status == 0 and "on the test split of" in out and (run / "test.json").is_file(), err
