"""Local folders of images: which file is of which split and class; what is left out and named; what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from conftest import encode, solid
from PIL import features

from hf_dualmoe.data import image_folders
from hf_dualmoe.data.datasets import load_splits


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    datasets.disable_progress_bars()


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    return folder


def write(folder, n=12, pattern="{}.png"):
    """`n` different images in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        solid((i, len(folder.name), sum(folder.name.encode()) % 256)).save(folder / pattern.format(i))


def write_classes(root, labels="ab", n=10):
    """A folder of `n` images for each class."""
    for label in labels:
        write(root / label, n)


def load(folder):
    """Sizes of train, validation and test, and the class names."""
    splits = load_splits(str(folder))
    return [len(splits.train), len(splits.validation), len(splits.test)], splits.class_names


def table(colour):
    """20 rows of one colour and two classes."""
    rows = {"image": [encode(solid((colour,) * 3))] * 20, "label": ["a", "b"] * 10}
    return datasets.Dataset.from_dict(
        rows, datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    )


def total(folder):
    return sum(load(folder)[0])


# --- read as meant ---------------------------------------------------------------------------------------------------


def test_names_of_files_say_nothing_about_splits(root):
    write(root / "cat", 60, "cat_{:03}.png")
    write(root / "cat", 9, "cat_test_{}.png")
    write(root / "dog", 69, "train-{}.PNG")
    assert load(root) == ([110, 14, 14], ["cat", "dog"])


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [
        ("train", "valid", "test"),
        ("Training", None, "Testing"),
        ("TRAIN", "Val", "Eval"),
        ("train", "dev", "evaluation"),
        ("training", "VALIDATION", "TEST"),
    ],
)
def test_split_folders_of_any_usual_name(root, train, validation, test):
    for name, n in ((train, 20), (validation, 6), (test, 4)):
        if name:
            write_classes(root / name, n=n)
    sizes = [40, 12, 8] if validation else [36, 4, 8]
    assert load(root) == (sizes, ["a", "b"])


def test_a_pattern_in_a_name_is_a_name(root):
    for name, labels in (("photos[1]", "ab"), ("photos1", "cd")):
        write_classes(root / name, labels)
    assert load(root / "photos[1]")[1] == ["a", "b"]
    for name, colour in (("tables[1]", 7), ("tables1", 99)):
        (root / name).mkdir()
        table(colour).to_parquet(root / name / "[1].parquet")
        table(99).to_parquet(root / name / "1.parquet")
    with pytest.raises(ValueError, match=r"tables\[1\]': `datasets` would take its name for a pattern; rename it"):
        load_splits(str(root / "tables[1]"))
    assert load_splits(str(root / "tables[1]" / "[1].parquet")).train.images.unique().tolist() == [7]


def test_current_folder(root, monkeypatch):
    write_classes(root)
    monkeypatch.chdir(root)
    assert load(".") == ([16, 2, 2], ["a", "b"])
    assert load("../photos") == load("./") == load(".")
    (root / "tables").mkdir()
    table(7).to_parquet(root / "tables" / "train.parquet")
    monkeypatch.chdir(root / "tables")
    assert load(".") == ([16, 2, 2], ["a", "b"])


def test_links_are_followed_but_not_in_a_circle(root, caplog):
    write(root.parent / "elsewhere", 10)
    write(root / "a", 9)
    (root / "b").symlink_to(root.parent / "elsewhere")
    (root / "a" / "linked.png").symlink_to(root.parent / "elsewhere" / "3.png")
    for place, target in (("up", root), ("top", "/"), ("a/self", root / "a"), ("a/gone.png", root / "nothing")):
        (root / place).symlink_to(target)
    assert load(root) == ([16, 2, 2], ["a", "b"])
    assert "links in a circle: 3 (a/self, top, up)" in caplog.text
    assert "no regular files: 1 (a/gone.png)" in caplog.text


def test_a_class_may_be_called_train(root):
    write_classes(root, ("bus", "car", "train"))
    assert load(root) == ([24, 3, 3], ["bus", "car", "train"])


def test_order_is_that_of_names(root):
    write_classes(root, ("b", "a", "c d"))
    splits = load_splits(str(root))
    assert splits.class_names == ["a", "b", "c d"]
    for label, image in zip(splits.train.labels, splits.train.images, strict=True):
        assert image[2, 0, 0] == sum(splits.class_names[label].encode()) % 256


# --- left out and named ----------------------------------------------------------------------------------------------


def test_what_is_left_out_is_counted_and_named(root, caplog):
    write_classes(root)
    extra = ["a/._1.png", ".DS_Store", "__MACOSX/a/1.png", "a/x.heic", "a/y.HEIC", "labels.csv", "b/notes", "a/1.xml"]
    for name in [*extra, "annotations/1.json", ".git/x.png"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    write(root, 1, "test.png")
    (root / "empty").mkdir()
    os.mkfifo(root / "a" / "pipe.png")
    (root / "b" / os.fsdecode(b"\xff.png")).write_bytes(b"")
    assert load(root) == ([16, 2, 2], ["a", "b"])
    for part in (
        f"left out of {root}: ",
        "hidden: 4 (.DS_Store, .git, __MACOSX, ...)",
        ".heic files, not read as images: 2 (a/x.heic, a/y.HEIC)",
        ".csv files, not read as images: 1 (labels.csv)",
        ".xml files, not read as images: 1 (a/1.xml)",
        "files without an ending: 1 (b/notes)",
        "images outside class folders: 1 (test.png)",
        "folders without an image: 2 (annotations, empty)",
        "no regular files: 1 (a/pipe.png)",
        r"names that are no UTF-8: 1 (b/\udcff.png)",
    ):
        assert part in caplog.text


def test_nothing_is_said_where_nothing_is_left_out(root, caplog):
    write_classes(root)
    assert total(root) == 20 and caplog.text == ""


@pytest.mark.slow  # an import in a process of its own
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are text")
def test_class_names_in_a_c_locale(root):
    write_classes(root, ("Küken", "鸡"))
    code = (
        "import sys; from hf_dualmoe.data.datasets import load_splits; assert sys.getfilesystemencoding() != 'utf-8'; "
        "s = load_splits(sys.argv[1]); print(ascii(s.class_names), len(s.train), len(s.validation), len(s.test))"
    )
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", code, str(root.rename(root.with_name("bïrds")))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == ascii(["Küken", "鸡"]) + " 16 2 2", done.stderr


@pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")
def test_avif_is_read_where_pillow_reads_it(root):
    write(root / "a", 10, "{}.avif")
    write(root / "b", 10)
    assert total(root) == 20


def test_splits_without_a_role_are_named(root, caplog):
    for split in ("train", "test", "extra"):
        write_classes(root / split)
    write(root, 1, "logo.png")
    (root / "docs").mkdir()
    assert load(root)[0] == [18, 2, 20]
    assert "splits that are not used: ['extra']" in caplog.text
    assert "folders without an image: 1 (docs); images outside class folders: 1 (logo.png)" in caplog.text
    splits = load_splits(str(root), validation_split="extra")
    assert len(splits.validation) == 20


# --- refused, with what was found and what was expected --------------------------------------------------------------

EXPECTED = "; expected CLASS/IMAGE, or train/CLASS/IMAGE and test/CLASS/IMAGE, with at least 2 classes."
CLASSES = "was read as one folder per class"
REFUSED = {
    "no class folders": (["1.png", "2.png"], f"{CLASSES} (none; 2 images lie beside them), but that is 0 classes"),
    "a lone class": (["cat/1.png"], f"{CLASSES} (cat/ with 1 image), but that is 1 class;"),
    "a lone class called train": (
        ["train/1.png"],
        "was read as split folders (train/ with 1 image), but there are no",
    ),
    "flat splits": (["train/1.png", "test/1.png"], "was read as split folders (test/ with 1 image, train/ with 1 im"),
    "flat splits and more": (["train/1.png", "test/1.png", "x/1.png"], "but there are no class folders in them"),
    "a flat test split": (
        ["train/a/1.png", "train/b/1.png", "test/1.png"],
        "was read as split folders (test, train), but test/ with 1 image without class folders has no labels; move it",
    ),
    "classes beside splits": (
        ["train/a/1.png", "train/b/1.png", "c/1.png"],
        "was read as split folders (c, train), but c/ with 1 image without class folders has no labels",
    ),
    "a split twice": (
        ["train/a/1.png", "Training/a/1.png"],
        "was read as split folders, but Training and train are both the train split",
    ),
    "classes at two depths": (
        ["cat/1.png", "dogs/pug/1.png", "dogs/boxer/1.png"],
        f"{CLASSES} (cat/ with 1 image, dogs/ with 0 images), but dogs/boxer/ with 1 image lies one folder too deep",
    ),
    "a folder around": (["all/a/1.png", "all/b/1.png"], "too deep; are the classes in '{root}/all'?"),
    "a folder around splits": (["all/train/a/1.png", "all/train/b/1.png"], "are the classes in '{root}/all'?"),
    "classes of a split at two depths": (
        ["train/a/1.png", "train/b/1.png", "train/a/more/1.png"],
        "but train/a/more/ with 1 image lies one folder too deep; are the classes in '{root}/train/a'?",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_how_it_was_read_and_what_was_expected(root, name):
    files, message = REFUSED[name]
    for file in map(Path, files):
        write(root / file.parent, 1, file.name)
    (root / "labels.csv").write_text("")
    with pytest.raises(ValueError) as error:
        load_splits(str(root))
    text = str(error.value)
    assert text.startswith(f"dataset folder {str(root)!r} was read as ") and EXPECTED in text
    assert message.format(root=root) in text
    assert " Left out: .csv files, not read as images: 1 (labels.csv)" in text


def test_a_configuration_is_of_the_hub(root):
    write(root / "a", 2)
    with pytest.raises(ValueError, match="config_name='x' does not fit a folder of images"):
        load_splits(str(root), config_name="x")


def test_a_folder_of_other_files_names_them(root):
    for i in range(3):
        (root / f"{i}.heic").write_bytes(b"")
    with pytest.raises(
        FileNotFoundError, match=r"holds no image that Pillow reads here; left out: \.heic files.*: 3 \("
    ):
        load_splits(str(root))


def test_images_and_tables_in_one_folder(root):
    rows = {"image": [{"path": "x"}], "label": [0]}
    datasets.Dataset.from_dict(rows).to_parquet(root / "labels.parquet")
    write_classes(root, n=2)
    with pytest.raises(ValueError, match=r"holds images \(.*/a, .*/b\) and also \.parquet files; give the path"):
        load_splits(str(root))


def test_a_folder_that_may_not_be_read(root, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(image_folders.os, "scandir", refuse)
    with pytest.raises(ValueError, match="folder '.*photos' may not be read: Permission denied"):
        load_splits(str(root))
