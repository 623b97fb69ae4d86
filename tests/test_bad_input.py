"""Whatever a user can hand over that is wrong: one line that names it and says what would be right, exit status 2, no
traceback, and nothing that was there is lost."""
import io
import os
import shutil
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from conftest import CLASSIFY, TRAIN
from PIL import Image

import test
import train
from images import folders, synthetic
from running import runs


# --------------------------------------------------------------------------------------------- what can be done to data
def manifest(change, name="segmentation.csv"):
    """Changes a manifest by a function of its text, of str or bytes."""
    def damage(at):
        file = (at.tiny if name == "segmentation.csv" else at.coloured) / name
        found = change(file.read_text())
        file.write_bytes(found.encode() if isinstance(found, str) else found)
    return damage


def labels(change):
    return manifest(change, "classification.csv")


def rows(change):
    """Changes the rows of classification.csv, each a list of its three cells."""
    def text(content):
        header, *found = [line.split(",") for line in content.splitlines()]
        return "\n".join(",".join(row) for row in [header, *change(found)]) + "\n"
    return labels(text)


def only(split, count=99):
    """Leaves the rows of one split."""
    return manifest(lambda text: "\n".join(
        ["image,mask,split", *[line for line in text.splitlines() if line.endswith(split)][:count]]))


def write(name, content):
    return lambda at: (at.tiny / name).write_bytes(content)


def cut(name, size):
    return lambda at: (at.tiny / name).write_bytes((at.tiny / name).read_bytes()[:size])


def folder_in_place(name):
    def damage(at):
        (at.tiny / name).unlink()
        (at.tiny / name).mkdir()
    return damage


def array(name, values):
    """Puts a TIFF in place of an image of 40 x 67."""
    def damage(at):
        tifffile.imwrite(at.tiny / "new.tif", values)
        text = (at.tiny / "segmentation.csv").read_text()
        (at.tiny / "segmentation.csv").write_text(text.replace(name, "new.tif"))
    return damage


def huge_png(side=60000):
    """A PNG of a few bytes that claims to be this large."""
    def chunk(kind, content):
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")
    size = side.to_bytes(4, "big")
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + size + b"\x08\0\0\0\0") +
            chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b""))


def huge_tiff(side=60000):
    """A compressed TIFF whose header was made to claim that it is this large."""
    file = io.BytesIO()
    tifffile.imwrite(file, np.zeros((64, 64), np.uint8), compression="zlib", metadata=None, rowsperstrip=64)
    file.seek(0)
    with tifffile.TiffFile(file) as tiff:
        places = [tiff.pages[0].tags[name].valueoffset for name in ("ImageWidth", "ImageLength", "RowsPerStrip")]
    content = bytearray(file.getvalue())
    for place in places:
        content[place:place + 2] = side.to_bytes(2, "little")
    return bytes(content)


def in_the_manifest(content, suffix):
    def damage(at):
        (at.tiny / f"new{suffix}").write_bytes(content)
        text = (at.tiny / "segmentation.csv").read_text()
        (at.tiny / "segmentation.csv").write_text(text.replace("field0.png", f"new{suffix}"))
    return damage


def empty_masks(at):
    for path in at.tiny.glob("labels*.png"):
        Image.new("L", Image.open(path).size).save(path)


def spoil(name, content):
    """Changes a file of the copied runs: content is bytes, a function of the bytes, or None for a folder."""
    def damage(at):
        file = at.tmp / name
        found = content(file.read_bytes()) if callable(content) else content
        file.unlink()
        if found is None:
            file.mkdir()
        else:
            file.write_bytes(found)
    return damage


def blank(name, size=(9, 9), mode="L"):
    return lambda at: Image.new(mode, size).save(at.tiny / name)


# ------------------------------------------------------------------------------------------------------------- the list
# What is run: train on the folders tiny (seg) or coloured (cls) or to resume; test and data by their arguments alone.
# {seg} and {cls} are copies of finished runs, {tiny} and {coloured} data folders, {tmp} is the folder that they lie in.
SEG_FLAGS = [
    ("--epochs", "0", "-3", "1.5", "many", "9" * 400), ("--batch-size", "0", "-1", "x"),
    ("--lr", "0", "nan", "inf", "x"), ("--weight-decay", "-1", "nan"), ("--patience", "-1"),
    ("--class-weights", "1", "a,b", "0,1", "1,2,3,4", "1,nan", ""),
    ("--seed", "-1", "9" * 14, "x"), ("--workers", "-1", "x"), ("--device", "tpu"), ("--amp", "fp8"),
    ("--limit-train", "0"), ("--arch", "segnet"), ("--encoder", "resnet19", ""), ("--depth", "1", "6"),
    ("--app", "both"), ("--app-activation", "sine"), ("--app-weight", "-1", "nan"), ("--tile", "8", "x"),
    ("--nuclei", "both"), ("--recipe", "mine"), ("--task", "both"),
    ("--weights", "no.pth", "{tiny}")]
CLS_FLAGS = [
    ("--model", "resnet81", "resnet18.nonsense"), ("--image-size", "8", "5000"), ("--folds", "0"),
    ("--fold", "-1", "3"), ("--gamma", "-1", "nan"), ("--class-weights", "1,2", "published"),
    ("--arch", "unetpp"), ("--tile", "64"), ("--nuclei", "mask")]
TEST_FLAGS = [("--split", "all"), ("--device", "tpu"), ("--amp", "fp8"), ("--data", "{tmp}/nowhere"),
              ("--images", "{tmp}/no*thing")]

BAD = [
    *[("seg", [flag, value], None, f"{flag}") for flag, *values in SEG_FLAGS for value in values
      if flag not in ("--encoder", "--task")],
    ("seg", ["--encoder", "resnet19"], None, "encoder 'resnet19' is not a timm model; near it: resnet18"),
    ("seg", ["--encoder", ""], None, "encoder '' is not a timm model"),
    ("seg", ["--task", "both"], None, "argument --task: invalid choice: 'both'"),
    ("seg", ["--bogus"], None, "unrecognized arguments: --bogus"),
    ("seg", ["--lr"], None, "argument --lr: expected one"),
    ("seg", ["--depth", "5"], None, "32 is too small for depth 5; take 64"),
    ("seg", ["--model", "resnet34"], None, "unrecognized arguments: --model resnet34"),
    *[("cls", [flag, value], None, flag.strip("-") if flag == "--model" else flag) for flag, *values in CLS_FLAGS
      for value in values],
    ("cls", ["--fold", "3"], None, "argument --fold: 3 is not one of several folds, 0 to 2"),
    ("cls", ["--class-weights", "1,2"], None, "gives 2 weights for blue, green, red; it must be one for each"),
    ("cls", ["--model", "resnet18.nonsense"], None, "model 'resnet18.nonsense' is not a timm model; near it: resnet18"),
    ("cls", ["--model", "coatnet_0_rw_224", "--image-size", "40"], None, "cannot classify images of 40 x 40"),
    *[("test", ["{seg}", flag, value], None, flag) for flag, *values in TEST_FLAGS for value in values],
    ("test", ["{seg}", "--images", "{tiny}/field0.png", "--save-masks", "{tiny}"], None, "holds images or masks"),
    ("test", ["{seg}", "--images", "{tiny}/field0.png", "--save-probabilities", "{seg}/predictions"], None,
     "holds images or masks already"),
    ("test", ["{cls}", "--channel", "DAPI"], None, "is a classification; it takes no --"),
    ("test", ["{seg}", "{seg}", "--save-masks", "{tmp}/masks"], None, "takes one run"),
    ("test", ["{seg}", "--ring", "3"], None, "--ring, --rois or --geojson: is for what --images writes"),
    ("test", ["{seg}", "--rois"], None, "--ring, --rois or --geojson: is for what --images writes"),
    ("test", ["{cls}", "--save-masks", "{tmp}/masks"], None, "is a classification; it takes no --"),
    ("test", ["{cls}", "--images", "{coloured}", "--data", "{coloured}"], None, "not allowed with argument --images"),
    ("test", ["{cls}", "--images", "{coloured}", "{cls}"], None, "is the folder of a run; name runs before --images"),
    ("test", ["{cls}", "--images", "{tmp}/nothing"], None, "names no image file"),
    ("data", ["check", "{tmp}/nowhere"], None, "no such folder"),
    ("data", ["check", "{tiny}/field0.png"], None, "field0.png: no such folder"),
    ("data", ["synthetic", "{tiny}"], None, "segmentation.csv: is there already; give another folder"),
    ("data", ["synthetic", "{tmp}/new", "--seed", "-1"], None, "argument --seed"),
    ("data", ["synthetic", "{tiny}/field0.png/new"], None, "field0.png"),
    ("data", ["dsb2018", "{tmp}/nowhere", "{tmp}/new"], None, "nowhere: holds no folders ID/images"),
    ("data", ["bogus", "{tiny}"], None, "bogus"), ("data", [], None, "command"),

    # folders
    ("seg", ["--data", "{tiny}/nowhere"], None, "no such folder (--data)"),
    ("seg", ["--data", "{tiny}/field0.png"], None, "field0.png: no such folder (--data)"),
    ("seg", ["--data", "{tmp}"], None, "holds neither segmentation.csv"),
    ("cls", ["--data", "{tmp}"], None, "holds no classification.csv (image,labels,split[,patient])"),
    ("seg", [], folder_in_place("segmentation.csv"), "segmentation.csv: Is a directory"),
    ("seg", ["--out", "{tiny}/segmentation.csv"], None, "segmentation.csv: File exists"),
    ("seg", ["--out", "{tiny}/segmentation.csv/run"], None, "segmentation.csv/run: Not a directory"),
    ("seg", ["--out", "/proc/run"], None, "/proc/run: "),
    ("seg", ["--out", "{tiny}"], None, "tiny: contains files already; choose another"),
    ("seg", ["--out", "{seg}"], None, "contains files already; choose another folder"),
    ("cls", ["--out", "{cls}"], None, "contains files already; choose another folder"),
    ("test", ["{seg}", "--save-masks", "{tiny}/field0.png"], None, "field0.png: File exists"),

    # manifests
    ("seg", [], manifest(lambda text: ""), "segmentation.csv: is empty"),
    ("seg", [], manifest(lambda text: text.splitlines()[0]), "segmentation.csv: is empty"),
    ("seg", [], manifest(lambda text: text.replace("image,mask", "picture,mask")), "needs one column 'image'"),
    ("seg", [], manifest(lambda text: text.replace("mask,split", "mask,mask")), "needs one column 'mask'"),
    ("cls", [], labels(lambda text: text.replace("labels", "mask")), "needs one column 'labels'"),
    ("seg", [], manifest(lambda text: text.encode("utf-16")), "is not a CSV file in UTF-8"),
    ("seg", [], manifest(lambda text: text.replace("field0", "f\u00e9ld").encode("cp1252")),
     "spreadsheets save one as \"CSV UTF-8\""),
    ("seg", [], manifest(lambda text: text.replace("field0", '"field0')), "segmentation.csv"),
    ("seg", [], manifest(lambda text: text.replace(",", "|")), "needs one column 'image'"),
    ("cls", [], labels(lambda text: text.replace(",", ";")), "has not as many cells as the first line"),
    ("seg", [], manifest(lambda text: text.replace("labels1.png,", "")), "line 3: has not as many cells"),
    ("seg", [], manifest(lambda text: text.replace("labels1.png", "labels1.png,x")), "line 3: has not as many cells"),
    ("seg", [], manifest(lambda text: text.replace("png,test", "png,exam")), "split 'exam' is none of train, "),
    ("seg", [], manifest(lambda text: text + "./field0.png,labels0.png,test\n"),
     "line 11: image './field0.png' is in line 2 already; give it one row"),
    ("cls", [], rows(lambda found: found + [found[3]]), "line 26: image 'picture3.png' is in line 5 already"),
    ("seg", [], manifest(lambda text: text.replace("field0", "../tiny/field0")), "must be a path below the manifest's"),
    ("seg", [], manifest(lambda text: text.replace("labels0", "/etc/labels0")), "must be a path below the manifest's"),
    ("seg", [], manifest(lambda text: text.replace("field0.png", "")), "image '' is not there"),
    ("seg", [], manifest(lambda text: text.replace("field0", "f" * 300)), "File name too long"),
    ("seg", [], manifest(lambda text: text.replace("field0", "f\0")), "segmentation.csv"),
    ("seg", [], only("test"), "has no images of split train"),
    ("seg", [], only("train", 1), "has one training image and no validation rows; one image cannot be both"),
    ("cls", ["--folds", "1"], rows(lambda found: found[:1]), "has one training image and no validation rows"),
    ("seg", [], blank("field0.png", (67, 40), "RGB"), "field1.png: has 1 channels, field0.png has 3"),
    ("test", ["{seg}", "--data", "{tiny}", "--split", "train"], only("test"), "has no images of split train"),
    ("cls", [], rows(lambda found: [row for row in found if row[2] == "test"]), "has no images of split train"),
    ("cls", [], rows(lambda found: found[:2] + found[-1:]), "--folds 3: the training rows are of 2 patients"),
    ("cls", [], rows(lambda found: [[row[0], "", row[2]] for row in found]), "none of the 24 images has a label"),
    ("test", ["{cls}", "--data", "{coloured}"], rows(lambda found: [*found[:-1], [found[-1][0], "violet", "test"]]),
     "picture23.png: its label 'violet' is none of the run's, blue, green, red"),
    ("test", ["{cls}", "--data", "{tiny}"], None, "holds no classification.csv"),

    # images and masks
    ("seg", [], lambda at: (at.tiny / "field0.png").unlink(), "line 2: image 'field0.png' is not there"),
    ("seg", [], lambda at: (at.tiny / "labels0.png").unlink(), "line 2: mask 'labels0.png' is not there"),
    ("seg", [], folder_in_place("field0.png"), "line 2: image 'field0.png' is not there"),
    *[("seg", [], damage(name, size), f"{name}: cannot be read; is it a whole TIFF, PNG or JPEG file?")
      for name in ("field1.png", "labels1.png")
      for damage, size in ((write, b""), (write, b"no image"), (write, b"GIF89a"), (cut, 20), (cut, 100), (cut, 150))],
    ("cls", [], lambda at: (at.coloured / "picture4.png").write_bytes(b"x"), "picture4.png: cannot be read"),
    ("seg", [], blank("labels4.png"), "labels4.png: the mask has (9, 9) pixels, its image field4.png (60, 55)"),
    ("seg", [], write("field0.png", huge_png()), "field0.png: cannot be read"),
    ("seg", [], write("labels0.png", huge_png(12000)), "labels0.png: cannot be read"),
    ("seg", [], in_the_manifest(huge_tiff(), ".tif"), "new.tif: cannot be read"),
    ("seg", [], array("field0.png", np.full((40, 67), np.nan, np.float32)), "new.tif: holds pixels that are NaN"),
    ("seg", [], lambda at: Image.new("L", (67, 40)).save(at.tiny / "field0.png", "GIF"), "field0.png: cannot be read"),
    ("seg", [], array("field0.png", np.zeros((2, 40, 67), np.uint8)),
     "new.tif: no single page named 'DAPI' (--channel); it has page 0, page 1"),
    ("seg", [], array("labels0.png", np.zeros((2, 40, 67), np.uint8)),
     "new.tif: has 2 pages to choose from; it must be one"),
    ("seg", [], blank("field3.png", (58, 55), "RGB"), "field3.png: has 3 channels, field0.png has 1"),
    ("test", ["{seg}", "--data", "{tiny}"], lambda at: [blank(f"field{i}.png", (67 - 3 * i, 40 + 5 * i), "RGB")(at)
                                                        for i in (6, 7, 8)], "field6.png: has 3 channels"),
    ("seg", [], empty_masks, "none of the 4 training masks holds a nucleus"),
    ("data", ["check", "{tiny}"], write("field1.png", b"x"), "tiny: 1 problems, listed above"),

    # runs
    ("test", [], None, "there is no run with a best.pt"), ("seg", ["--resume"], None, "no run with a config.json"),
    ("test", ["{tmp}"], None, "config.json: No such file"),
    ("test", ["{tmp}/nowhere"], None, "config.json: No such file"),
    ("test", ["{tiny}/field0.png"], None, "field0.png"),
    ("resume", ["--out", "{tmp}/nowhere"], None, "config.json: No such file"),
    ("resume", ["--out", "{seg}", "--arch", "unetpp"], None, "started with unet, not unetpp"),
    ("resume", ["--out", "{seg}", "--app", "none"], None, "--app: "),
    ("resume", ["--out", "{seg}", "--data", "{tiny}"], only("train"), "are not those that"),
    ("resume", ["--task", "cls", "--out", "{cls}", "--data", "{coloured}"],
     rows(lambda found: [[found[0][0], "green", found[0][2]], *found[1:]]), "are not those that"),
    ("resume", ["--task", "cls", "--out", "{cls}", "--model", "resnet34"], None, "argument --model: "),
    ("resume", ["--task", "cls", "--out", "{cls}", "--image-size", "64"], None, "was started with 32, not 64"),
    *[(command, place, spoil("seg/config.json", content), "seg/config.json: is not what this version of train.py")
      for command, place in (("test", ["{seg}"]), ("resume", ["--out", "{seg}"]))
      for content in (b"", b"{", b"\xff\xfe", b"{}", b"[1]", b'{"task": "seg"}')],
    ("test", ["{seg}"], spoil("seg/config.json", None), "seg/config.json: Is a directory"),
    ("resume", ["--out", "{seg}"], spoil("seg/config.json", lambda text: text.replace(b'"lr": 0.002', b'"lr": "x"')),
     "argument --lr: invalid float"),
    *[("test", ["{seg}"], spoil("seg/best.pt", content), f"seg/best.pt: {message}")
      for content, message in ((b"", "is not a checkpoint"), (b"PK\3\4" * 50, "is not a checkpoint"),
                            (lambda text: text[:1000], "is not a checkpoint"), (None, "Is a directory"))],
    *[("resume", ["--out", "{seg}"], spoil("seg/last.pt", content), f"seg/last.pt: {message}")
      for content, message in ((b"", "is not a checkpoint"), (lambda text: text[:-50], "is not a checkpoint"))],
    ("test", ["{cls}"], lambda at: [shutil.rmtree(at.tmp / "cls" / f"fold{k}") for k in range(3)],
     "holds no best.pt"),
    ("test", ["{cls}"], spoil("cls/fold2/best.pt", lambda text: text[:3000]), "fold2/best.pt: is not a checkpoint"),
    ("resume", ["--task", "cls", "--out", "{cls}"], spoil("cls/fold2/last.pt", b"x"), "fold2/last.pt: is not a check"),
]
if not torch.cuda.is_available():
    BAD += [(command, [*place, "--device", "cuda"], None, "--device cuda: there is none here; use cpu")
            for command, place in (("seg", []), ("cls", []), ("test", ["{seg}"]))]


@pytest.mark.parametrize("command, arguments, damage, message", BAD, ids=lambda value: "")
def test_bad_input(tiny, coloured, finished, cross_validated, script, tmp_path, command, arguments, damage, message):
    for name, (run, _) in {"seg": finished, "cls": cross_validated}.items():
        if f"{{{name}}}" in arguments:
            shutil.copytree(run, tmp_path / name)
    at = SimpleNamespace(tmp=tmp_path, tiny=tiny, coloured=coloured)
    if damage:
        damage(at)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if not path.is_symlink() and path.is_file()}
    places = {name: tmp_path / name for name in ("tiny", "coloured", "seg", "cls")}
    arguments = [argument.format(tmp=tmp_path, **places) for argument in arguments]
    if command in ("seg", "cls"):
        folder, settings = (tiny, TRAIN) if command == "seg" else (coloured, CLASSIFY)
        arguments = [*settings, *([] if "--data" in arguments else ["--data", folder]), *arguments]
    if command == "resume":
        arguments = ["--resume", *arguments]
    module = {"test": test, "data": folders}.get(command, train)
    status, _, err = script(module, *arguments)
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and message in err, err
    for path, content in before.items():
        if path.name != "config.json":  # which going on with a run writes anew
            assert path.read_bytes() == content, f"{path} has changed"
    assert not list(runs.RUNS.glob("*/best.pt")) and not list(tmp_path.rglob("*.tmp"))


def test_predicted_masks_do_not_overwrite_the_data(finished, script, tmp_path, tiny):
    (tiny / "labels8.png").rename(tiny / "field8.PNG")
    (tiny / "segmentation.csv").write_text("image,mask,split\nfield8.png,field8.PNG,test\n")
    before = (tiny / "field8.png").read_bytes()
    status, _, err = script(test, finished[0], "--data", tiny, "--save-masks", tiny)
    assert status == 2 and "holds images or masks already" in err and (tiny / "field8.png").read_bytes() == before


def test_an_unknown_stain_is_named(script, monkeypatch):
    monkeypatch.setattr(synthetic, "FIELDS_PER_PATIENT", 1)
    monkeypatch.setattr(synthetic, "PICTURES_PER_PATIENT", 0)
    folders.write_synthetic(runs.SYNTHETIC)
    status, _, err = script(train, *TRAIN, "--channel", "CD8")
    assert status == 2 and "no single page named 'CD8' (--channel); it has CXCR3, " in err


def test_a_place_for_the_synthetic_set_that_cannot_be_written(script, tiny, monkeypatch):
    monkeypatch.setattr(runs, "SYNTHETIC", tiny / "field0.png" / "synthetic")
    status, _, err = script(train, *TRAIN)
    assert status == 2 and err.startswith(f"error: {tiny / 'field0.png'}") and err.count("\n") == 1


@pytest.mark.parametrize("text", [
    lambda text: "\ufeff" + text.replace("\n", "\r\n"), lambda text: text.replace(",", ";"),
    lambda text: text.replace("field", ".\\field").replace("labels", ".\\labels"),
    lambda text: text.replace("\n", ",,\n"), lambda text: text + "\n,,\n\n",
    lambda text: text.replace("field1.png", '"field1.png"')])
def test_manifests_as_spreadsheets_write_them_are_read(tiny, script, tmp_path, text):
    """A byte order mark, CRLF, semicolons, backslashes in paths, empty columns and lines, quotes."""
    file = tiny / "segmentation.csv"
    file.write_bytes(text(file.read_text()).encode())
    assert script(folders, "check", tiny)[0] == 0


def test_leaks_are_reported(tiny, coloured, script, tmp_path):
    """A patient, and an image under another name, in two splits."""
    shutil.copy(tiny / "field0.png", tiny / "field8.png")
    shutil.copy(tiny / "labels0.png", tiny / "labels8.png")
    status, out, err = script(train, "--data", tiny, *TRAIN, "--out", tmp_path / "run")
    warning = (f"{tiny / 'field0.png'} (train) and {tiny / 'field8.png'} (test) are the same image: what is validated "
               f"or tested was trained on")
    assert status == 0 and f"  NOTE: {warning}\n" in out, err
    status, out, _ = script(folders, "check", tiny)
    assert status == 2 and f"PROBLEM {warning}\n" in out
    file = coloured / "classification.csv"
    file.write_text("\n".join(f"{line},{'patient' if not i else f'P{i % 7}'}"
                              for i, line in enumerate(file.read_text().splitlines())) + "\n")
    status, out, _ = script(train, "--data", coloured, *CLASSIFY, "--fold", 0, "--out", tmp_path / "cls")
    assert status == 0 and "(test) are of the same patient: what is validated or tested was trained on" in out
    assert "NOTE: ... 1 more like that" in out


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_leave_to_write(tiny, script, tmp_path):
    (tmp_path / "shut").mkdir(mode=0o500)
    status, _, err = script(train, "--data", tiny, *TRAIN, "--out", tmp_path / "shut" / "run")
    assert status == 2 and "shut/run: Permission denied" in err
