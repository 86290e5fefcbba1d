"""Datasets of images that the tests write, offline; sizes differ so that swapped axes fail."""

import logging
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import encode, solid
from PIL import Image
from torch.utils.data import DataLoader

from hf_dualmoe.data import datasets as data
from hf_dualmoe.data import decoding
from hf_dualmoe.data.datasets import (
    DataSplits,
    ImageTensorDataset,
    augment,
    collate,
    load_digits_splits,
    load_splits,
    to_unit_range,
)

COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}  # class -> colour, in label order


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    datasets.disable_progress_bars()


def numbered(i):
    """A 6 x 6 colour image from which the number 0..255 can be read back (as every red value)."""
    return Image.fromarray(np.full((6, 6, 3), (i, 7, 99), np.uint8))


def numbers(dataset):
    return dataset.images[:, 0, 0, 0].tolist()


def write_folder(root, count):
    """`count` images of each class, of its colour alone."""
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            solid(colour).save(root / name / f"{i}.png")


def table(n=40, classes=2, names=None):
    """Columns: numbered images, and labels i % classes as ClassLabel."""
    label = datasets.ClassLabel(names=names or [f"class {c}" for c in range(classes)])
    rows = {"image": [encode(numbered(i)) for i in range(n)], "label": [i % classes for i in range(n)]}
    return datasets.Dataset.from_dict(rows, datasets.Features({"image": datasets.Image(), "label": label}))


def save(tmp_path, **splits):
    folder = tmp_path / "saved"
    datasets.DatasetDict(splits).save_to_disk(folder)
    return str(folder)


def sizes(splits):
    """Numbers of images for training, validation and test."""
    return [len(part or ()) for part in (splits.train, splits.validation, splits.test)]


def tiny(n=13, classes=3):
    images = torch.randint(256, (n, 2, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageTensorDataset(images, torch.arange(n) % classes, [f"c{i}" for i in range(classes)])


# --- ImageTensorDataset, collate, to_unit_range


def test_item_and_batch_access():
    dataset = tiny()
    assert len(dataset) == 13
    item = dataset[4]
    assert item["pixel_values"].shape == (2, 5, 7) and item["labels"].item() == 1 and item["labels"].ndim == 0
    batch = dataset.__getitems__([3, 1, 12])
    assert torch.equal(batch["pixel_values"], dataset.images[[3, 1, 12]])
    assert batch["labels"].tolist() == [0, 1, 0]


def test_subset_and_take():
    dataset = tiny()
    part = dataset.subset([5, 2])
    assert part.labels.tolist() == [2, 2] and torch.equal(part.images, dataset.images[[5, 2]])
    assert part.class_names == dataset.class_names
    assert dataset.rows.tolist() == list(range(13)) and part.subset([1, 0]).rows.tolist() == [2, 5]
    assert torch.bincount(dataset.take(6).labels).tolist() == [2, 2, 2]
    assert torch.equal(dataset.take(6, seed=3).images, dataset.take(6, seed=3).images)
    assert not torch.equal(dataset.take(6, seed=3).images, dataset.take(6, seed=4).images)
    for n in (0, 14):
        with pytest.raises(ValueError, match=f"n={n}, but only 1 to 13 images"):
            dataset.take(n)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(3, 1, 2, 2)}, "images is torch.float32"),
        ({"images": torch.zeros(3, 2, 2, dtype=torch.uint8)}, r"images is torch.uint8 \(3, 2, 2\)"),
        ({"images": torch.zeros(0, 1, 2, 2, dtype=torch.uint8)}, "empty dataset"),
        ({"labels": torch.tensor([0, 1])}, r"labels is torch.int64 \(2,\); expected torch.int64 \(3,\)"),
        ({"labels": torch.tensor([0.0, 1.0, 0.0])}, "labels is torch.float32"),
        ({"labels": torch.tensor([0, 1, 2])}, "labels contains 2; allowed is 0 <= label < 2"),
        ({"labels": torch.tensor([0, -1, 1])}, "labels contains -1; allowed is 0 <= label < 2"),
    ],
)
def test_constructor_refuses(change, message):
    arguments = {
        "images": torch.zeros(3, 1, 2, 2, dtype=torch.uint8),
        "labels": torch.tensor([0, 1, 0]),
        "class_names": ["a", "b"],
    }
    ImageTensorDataset(**arguments)
    with pytest.raises(ValueError, match=message):
        ImageTensorDataset(**(arguments | change))


def test_dataloader_gives_the_same_batches_with_and_without_getitems():
    dataset = tiny()

    class ItemByItem(torch.utils.data.Dataset):
        def __len__(self):
            return len(dataset)

        def __getitem__(self, index):
            return dataset[index]

    def batches(source):
        generator = torch.Generator().manual_seed(1)
        return list(DataLoader(source, 5, shuffle=True, collate_fn=collate, generator=generator))

    fast, slow = batches(dataset), batches(ItemByItem())
    assert [len(batch["labels"]) for batch in fast] == [5, 5, 3]
    for a, b in zip(fast, slow, strict=True):
        assert a.keys() == b.keys() == {"pixel_values", "labels"}
        assert torch.equal(a["pixel_values"], b["pixel_values"]) and torch.equal(a["labels"], b["labels"])
        assert a["labels"].dtype == b["labels"].dtype == torch.int64


def test_collate_accepts_float_images_and_plain_labels():
    batch = collate([{"pixel_values": torch.full((3, 4, 5), v), "labels": i} for i, v in enumerate((0.25, 0.5))])
    assert batch["pixel_values"].shape == (2, 3, 4, 5) and batch["pixel_values"].dtype == torch.float32
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [0.25, 0.5] and batch["labels"].tolist() == [0, 1]


def test_to_unit_range():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    unit = to_unit_range(images)
    assert unit.dtype == torch.float32 and unit.min() == 0 and unit.max() == 1
    assert torch.equal((unit * 255).round().to(torch.uint8), images)
    assert to_unit_range(unit) is unit
    with pytest.raises(ValueError, match="torch.int64"):
        to_unit_range(images.long())


def test_channel_statistics_are_those_of_the_float_images():
    dataset = tiny(600)  # more than are counted at once
    pixels = dataset.images.double().div(255).transpose(0, 1).flatten(1)
    mean, std = dataset.channel_statistics
    torch.testing.assert_close(torch.tensor(mean), pixels.mean(dim=1).float(), rtol=0, atol=1e-7)
    torch.testing.assert_close(torch.tensor(std), pixels.std(dim=1).float(), rtol=0, atol=1e-7)
    digits = load_digits_splits().train
    pixels = digits.images.float().div(255)  # as it was computed when models were published
    assert [round(v[0], 4) for v in digits.channel_statistics] == [
        round(float(v), 4) for v in (pixels.mean(), pixels.std())
    ]


def test_channel_statistics_are_counted_once_and_of_the_first_images_only(monkeypatch):
    monkeypatch.setattr(data, "MOST_FOR_STATISTICS", 5)
    dataset = tiny()
    first = tiny().subset(range(5)).channel_statistics
    assert dataset.channel_statistics == first
    dataset.images = dataset.images * 0
    assert dataset.channel_statistics is dataset.channel_statistics == first


# --- what makes data the same


def three(**changed):
    parts = {role: tiny(n) for role, n in (("train", 13), ("validation", 6), ("test", 7))}
    return DataSplits(**(parts | changed), name="x")


def test_digest_is_the_same_for_equal_data_wherever_it_lies(monkeypatch):
    parts = {role: tiny(20).subset(range(n)) for role, n in (("train", 13), ("validation", 6), ("test", 7))}
    strided = ImageTensorDataset(tiny().images.mT.contiguous().mT, tiny().labels, tiny().class_names)
    digest = three().digest()
    assert len(digest) == 32 and int(digest, 16) >= 0
    assert DataSplits(**parts, name="another").digest() == digest == three(train=strided).digest()
    monkeypatch.setattr(data, "AT_ONCE", 4)
    assert three().digest() == digest
    assert load_digits_splits().digest() == "1f8509f6f87e9202b826a0d6058325b3"  # recorded runs hold it


def changed_digests():
    for role, n in (("train", 13), ("validation", 6), ("test", 7)):
        for key, place in (("images", (-1, -1, -1, -1)), ("labels", (0,))):
            part = tiny(n)
            getattr(part, key)[place] += 1
            yield three(**{role: part}).digest()
    renamed = [tiny(n) for n in (13, 6, 7)]
    for part in renamed:
        part.class_names = ["c1", "c0", "c2"]
    yield DataSplits(*renamed, "x").digest()
    yield three(validation=tiny(7), test=tiny(6)).digest()
    yield three(train=tiny(12)).digest()


def test_digest_changes_with_every_part_of_the_data():
    digests = [three().digest(), *changed_digests()]
    assert len(set(digests)) == len(digests) == 10


# --- augment


def naive_augment(images, padding, top, left, flipped):
    result = []
    for image, t, x, flip in zip(images, top, left, flipped, strict=True):
        padded = torch.nn.functional.pad(image, (padding,) * 4)
        crop = padded[:, t : t + image.shape[1], x : x + image.shape[2]]
        result.append(crop.flip(-1) if flip else crop)
    return torch.stack(result)


def coordinate_images(n, h=9, w=7):
    """Channels row number and column number, from 1, so that shift and mirroring can be read from the centre pixel."""
    rows = torch.arange(1.0, h + 1)[:, None].expand(h, w)
    columns = torch.arange(1.0, w + 1).expand(h, w)
    return torch.stack([rows, columns]).expand(n, 2, h, w).contiguous()


def recovered(augmented, padding):
    """Returns (top, left, flipped) of augmented `coordinate_images`."""
    h, w = augmented.shape[2:]
    flipped = augmented[:, 1, h // 2, w // 2 + 1] < augmented[:, 1, h // 2, w // 2]
    top = augmented[:, 0, h // 2, w // 2] - (h // 2 + 1) + padding
    left = augmented[:, 1, h // 2, w // 2] - (w // 2 + 1) + padding
    return top.long(), left.long(), flipped


def test_augment_equals_a_loop_over_images():
    torch.manual_seed(0)
    images = coordinate_images(64)
    augmented = augment(images, crop_padding=2)
    top, left, flipped = recovered(augmented, 2)
    assert torch.equal(augmented, naive_augment(images, 2, top, left, flipped))
    assert 0 < flipped.sum() < 64 and len(set(top.tolist())) == len(set(left.tolist())) == 5


def test_augment_offsets_are_uniform_and_half_the_images_are_flipped():
    torch.manual_seed(0)
    n, offsets = 20_000, 25
    top, left, flipped = recovered(augment(coordinate_images(n), crop_padding=2), 2)
    counts = torch.bincount((top * 5 + left) * 2 + flipped, minlength=2 * offsets)
    assert len(counts) == 2 * offsets
    chi2 = ((counts - n / 50) ** 2 / (n / 50)).sum().item()
    assert chi2 < 100  # 49 degrees of freedom: mean 49, standard deviation 10
    assert abs(flipped.float().mean() - 0.5) < 0.02


def test_augment_crop_and_flip_can_be_disabled():
    torch.manual_seed(0)
    images = coordinate_images(50)
    assert augment(images, crop_padding=0, flip=False) is images
    assert not recovered(augment(images, crop_padding=2, flip=False), 2)[2].any()
    flipped_only = augment(images, crop_padding=0)
    is_flipped = recovered(flipped_only, 0)[2][:, None, None, None]
    assert torch.equal(flipped_only, torch.where(is_flipped, images.flip(-1), images)) and is_flipped.any()
    with pytest.raises(ValueError, match="crop_padding=-1"):
        augment(images, crop_padding=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_augment_keeps_shape_dtype_and_range(dtype):
    images = (torch.rand(11, 3, 10, 12) * (255 if dtype == torch.uint8 else 1)).to(dtype)
    before = images.clone()
    augmented = augment(images)
    assert augmented.shape == images.shape and augmented.dtype == dtype
    assert augmented.min() >= 0 and augmented.max() <= images.max()
    assert torch.equal(images, before) and not torch.equal(augmented, images)


def test_augment_randomness_follows_the_seed():
    images = torch.rand(16, 3, 8, 8)

    def seeded(seed):
        torch.manual_seed(seed)
        return augment(images)

    assert torch.equal(seeded(1), seeded(1)) and not torch.equal(seeded(1), seeded(2))


# --- digits


def test_digits_sizes_and_pixels():
    from sklearn.datasets import load_digits

    splits = load_digits_splits()
    assert sizes(splits) == [1078, 270, 449]
    assert (splits.num_labels, splits.num_channels, splits.image_size) == (10, 1, 8)
    assert splits.class_names == list("0123456789") and splits.name == "digits" and splits.skipped == {}
    original = load_digits()
    items = [item for part in splits.sets.values() for item in part]
    ours = {(item["pixel_values"].numpy().tobytes(), int(item["labels"])) for item in items}
    scaled = np.round(original.images * 255 / 16).astype(np.uint8)
    assert ours == {(image.tobytes(), int(y)) for image, y in zip(scaled, original.target, strict=True)}
    assert len(ours) == 1797  # all different, so the splits are disjoint


def test_digits_through_load_splits():
    splits = load_splits(max_train_samples=100, max_test_samples=30, image_size=8, num_channels=1)
    assert sizes(splits) == [100, 270, 30]
    assert set(torch.bincount(splits.train.labels).tolist()) <= {9, 10, 11}
    assert not torch.equal(splits.train.images, load_splits(max_train_samples=100, seed=1).train.images)
    for argument, value in (("image_size", 32), ("num_channels", 3), ("config_name", "x"), ("test_split", "test")):
        with pytest.raises(ValueError, match=f"{argument}={value!r} does not fit the embedded digits"):
            load_splits("digits", **{argument: value})
    with pytest.raises(ValueError, match="max_train_samples=1079, but only 1 to 1078"):
        load_splits("digits", max_train_samples=1079)


# --- sources


@pytest.mark.parametrize(("folders", "expected"), [({"train": 10, "test": 4}, [24, 6, 12]), ({".": 10}, [18, 6, 6])])
def test_image_folders_with_and_without_a_test_set(tmp_path, folders, expected):
    for folder, count in folders.items():
        write_folder(tmp_path / "pets" / folder, count)
    splits = load_splits(str(tmp_path / "pets"), validation_fraction=0.2)
    assert sizes(splits) == expected and splits.class_names == list(COLOURS)
    assert (splits.num_labels, splits.num_channels, splits.image_size) == (3, 3, 6)
    for part in splits.sets.values():
        colours = torch.tensor(list(COLOURS.values()), dtype=torch.uint8)[part.labels]
        assert torch.equal(part.images, colours[:, :, None, None].expand(-1, 3, 6, 6))
        assert torch.bincount(part.labels).unique().numel() == 1  # as many of each class


@pytest.mark.parametrize("layout", ["features", "raw struct", "raw bytes"])
def test_parquet_file(tmp_path, layout):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "images.parquet"
    if layout == "features":
        table(40).to_parquet(path)
    else:
        rows = {"image": [encode(numbered(i)) for i in range(40)], "label": [i % 2 for i in range(40)]}
        if layout == "raw bytes":
            rows["image"] = [image["bytes"] for image in rows["image"]]
        pyarrow.parquet.write_table(pyarrow.table(rows), path)
    splits = load_splits(str(path))
    assert sizes(splits) == [32, 4, 4]
    assert splits.class_names == (["class 0", "class 1"] if layout == "features" else ["0", "1"])
    seen = []
    for part in splits.sets.values():
        assert [i % 2 for i in numbers(part)] == part.labels.tolist()
        assert (part.images[:, 1] == 7).all() and (part.images[:, 2] == 99).all()
        seen += numbers(part)
    assert sorted(seen) == list(range(40))


def test_parquet_folder(tmp_path):
    table(30).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    table(10).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    splits = load_splits(str(tmp_path))
    assert sizes(splits) == [27, 3, 10]
    assert numbers(splits.test) == list(range(10)) and splits.test.labels.tolist() == [0, 1] * 5


def test_saved_to_disk(tmp_path, monkeypatch):
    name = save(tmp_path, train=table(20), test=table(6))
    assert sizes(load_splits(name)) == [18, 2, 6]
    table(20).with_format("torch").save_to_disk(tmp_path / "single")
    monkeypatch.chdir(tmp_path)
    assert len(load_splits("single").train) == 16  # relative path that looks like a Hub id


@pytest.mark.parametrize("name", ["./missing", "/missing/folder", "~/missing-folder", "a/b/c", "missing.parquet"])
def test_missing_local_path(name):
    with pytest.raises(FileNotFoundError, match=f"name='{name}' looks like a local path.*does not exist"):
        load_splits(name)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "images.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match="images.csv' is a file; allowed are folders and .parquet files"):
        load_splits(str(tmp_path / "images.csv"))


@pytest.mark.parametrize("empty", ["train", "test"])
def test_empty_split(tmp_path, monkeypatch, empty):
    rows = {"train": table(8), "test": table(8), empty: table(0)}
    for split, content in rows.items():
        content.to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(ValueError, match=f"cannot load '{tmp_path}'; has it an empty split.*{empty}"):
        load_splits(str(tmp_path))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)  # versions that do load it
    with pytest.raises(ValueError, match=f"empty dataset: split '{empty}' has no rows"):
        load_splits(str(tmp_path))


def test_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        load_splits(str(tmp_path))


# --- roles of splits


@pytest.mark.parametrize(
    ("splits", "arguments", "expected"),
    [
        (("train", "validation", "test"), {}, (40, 20, 10)),
        (("train", "validation"), {}, (36, 4, 20)),  # a lone extra split is the test set
        (("train", "validation"), {"validation_split": "validation"}, (36, 20, 4)),
        (("train", "validation", "test"), {"test_split": "validation"}, (36, 4, 20)),
        (("train", "validation", "test"), {"train_split": "validation"}, (18, 2, 10)),
        (("train", "extra", "test"), {}, (36, 4, 10)),
        (("train", "extra", "test"), {"validation_split": "extra"}, (40, 30, 10)),
        (("extra",), {}, (24, 3, 3)),
        (("test",), {"train_split": "test"}, (8, 1, 1)),
        (("extra",), {"needs_train": False}, (24, 3, 3)),
        (("extra",), {"needs_train": False, "test_split": "extra"}, (0, 0, 30)),
        (("validation", "test"), {"needs_train": False}, (0, 20, 10)),
        (("extra", "other"), {"needs_train": False, "test_split": "other"}, (0, 0, 10)),
        (("train", "test"), {"needs_train": False}, (36, 4, 10)),
        (("test",), {"needs_train": False, "train_split": "test"}, (8, 1, 1)),
    ],
)
def test_roles(tmp_path, splits, arguments, expected):
    lengths = {"train": 40, "validation": 20, "test": 10, "extra": 30, "other": 10}
    name = save(tmp_path, **{split: table(lengths[split]) for split in splits})
    assert sizes(load_splits(name, **arguments)) == list(expected)


@pytest.mark.parametrize("split", ["test", "validation", "Eval", "dev"])
def test_a_lone_test_set_is_no_training_data(tmp_path, split):
    """It was taken as train, and a tenth of it measured."""
    name = save(tmp_path, **{split: table(20)})
    for arguments in ({}, {"test_split": split}):
        message = rf"(?s)the only split.*'{split}'.*--train_split {split}" if not arguments else "need train"
        with pytest.raises(ValueError, match=message):
            load_splits(name, **arguments)
        loaded = load_splits(name, needs_train=False, max_train_samples=1, **arguments)
        assert loaded.train is None and loaded.validation is None and numbers(loaded.test) == list(range(20))
        assert loaded.class_names == ["class 0", "class 1"]
        assert (loaded.num_labels, loaded.num_channels, loaded.image_size) == (2, 3, 6)
        assert len(loaded.digest()) == 32


def test_one_class_is_enough_where_no_train_is_needed(tmp_path):
    rows = relabelled(["cat"] * 10)
    for splits in ({"test": rows}, {"train": rows, "test": rows}):
        loaded = load_splits(save(tmp_path / str(len(splits)), **splits), needs_train=False)
        assert loaded.class_names == ["cat"] and len(loaded.test) == 10


def test_a_path_is_a_name(tmp_path):
    name = save(tmp_path, train=table(20), test=table(10))
    loaded = load_splits(Path(name))
    assert loaded.digest() == load_splits(name).digest()
    assert loaded.name == load_splits(name).name == Path(name).name  # reports travel: no place of this machine


def test_held_out_test_set_does_not_depend_on_validation(tmp_path):
    alone = load_splits(save(tmp_path, train=table(40)))
    both = load_splits(save(tmp_path / "b", train=table(40), val=table(10)), validation_split="val")
    assert numbers(alone.test) == numbers(both.test) and not set(numbers(alone.test)) & set(numbers(alone.validation))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"test_split": "tset"}, r"test_split='tset' is not a split of the dataset; available: \['train', 'other'\]"),
        ({"test_split": "train"}, "no split twice"),
        ({"train_split": "other", "test_split": "other"}, "no split twice"),
        ({"validation_fraction": 0.0}, "validation_fraction=0.0; allowed is 0 <"),
        ({"validation_fraction": 0.6}, "cannot hold 6 images out of 4"),
        ({"on_bad_image": "ignore"}, "on_bad_image='ignore'; allowed are 'raise' and 'skip'"),
        ({"num_channels": 2}, "num_channels=2; allowed are 1"),
        ({"image_size": 0}, "image_size=0; allowed is >= 1"),
    ],
)
def test_refused_arguments(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_splits(save(tmp_path, train=table(10), other=table(10)), **arguments)


def test_train_must_be_known(tmp_path):
    with pytest.raises(ValueError, match=r"need train .*\['one', 'two'\]"):
        load_splits(save(tmp_path, one=table(10), two=table(10)))


def test_validation_does_not_depend_on_max_train_samples(tmp_path):
    name = save(tmp_path, train=table(200, classes=4), test=table(8, classes=4))
    whole, some = load_splits(name), load_splits(name, max_train_samples=41)
    assert numbers(whole.validation) == numbers(some.validation)
    assert not set(numbers(whole.train)) & set(numbers(whole.validation))
    assert sorted(numbers(whole.train) + numbers(whole.validation)) == list(range(200))
    assert set(numbers(some.train)) < set(numbers(whole.train))
    assert sorted(torch.bincount(some.train.labels).tolist()) == [10, 10, 10, 11]  # of 45 images each
    assert torch.bincount(whole.validation.labels).tolist() == [5, 5, 5, 5]
    assert numbers(load_splits(name, seed=1).validation) != numbers(whole.validation)
    assert numbers(load_splits(name).validation) == numbers(whole.validation)


def test_limits_are_stratified_random_choices(tmp_path):
    rows = table(200, classes=4)
    rows = rows.select(np.argsort(rows["label"][:], kind="stable"))  # now the first n are one class
    name = save(tmp_path, train=rows, validation=rows, test=rows)
    limits = {"max_train_samples": 40, "max_validation_samples": 20, "max_test_samples": 10}
    splits = load_splits(name, **limits)
    assert torch.bincount(splits.train.labels).tolist() == [10] * 4
    assert torch.bincount(splits.validation.labels).tolist() == [5] * 4
    assert sorted(torch.bincount(splits.test.labels).tolist()) == [2, 2, 3, 3]
    assert [i % 4 for i in numbers(splits.train)] == splits.train.labels.tolist()
    assert numbers(splits.train) == numbers(load_splits(name, **limits).train)
    assert numbers(splits.train) != numbers(load_splits(name, **limits, seed=1).train)
    for role, n in (("train", 201), ("validation", 0), ("test", 1000)):
        with pytest.raises(ValueError, match=f"max_{role}_samples={n}, but only 1 to 200 images"):
            load_splits(name, **{f"max_{role}_samples": n})


# --- columns and labels


def test_columns_given_detected_unknown_and_ambiguous(tmp_path):
    rows = table(20).add_column("other", [7, 8] * 10)
    name = save(tmp_path, train=rows.rename_columns({"image": "photo_x", "label": "kind"}))
    assert load_splits(name).num_labels == 2  # by type, whatever the names
    assert load_splits(name, label_column="other").class_names == ["7", "8"]
    for kind in ("image", "label"):
        with pytest.raises(ValueError, match=rf"{kind}_column='x' does not exist.*\['photo_x', 'kind', 'other'\]"):
            load_splits(name, **{f"{kind}_column": "x"})

    both = datasets.concatenate_datasets([rows, table(20).rename_columns({"image": "b", "label": "fine"})], axis=1)
    name = save(tmp_path / "both", train=both)
    with pytest.raises(ValueError, match="2 columns may hold the label; set label_column.*'fine'"):
        load_splits(name)
    with pytest.raises(ValueError, match="2 columns may hold the image; set image_column.*'b'"):
        load_splits(name, label_column="fine")
    assert load_splits(name, label_column="fine", image_column="b").num_labels == 2

    name = save(tmp_path / "none", train=table(20).remove_columns("label"))
    with pytest.raises(ValueError, match=r"0 columns may hold the label.*\['image'\]"):
        load_splits(name)


def relabelled(values):
    return table(len(values)).remove_columns("label").add_column("label", values)


@pytest.mark.parametrize(
    ("values", "class_names"),
    [(["dog", "cat", "ant", "cat"] * 5, ["ant", "cat", "dog"]), ([10, 2, 7, 2] * 5, ["2", "7", "10"])],
)
def test_text_and_integer_labels(tmp_path, values, class_names):
    splits = load_splits(save(tmp_path, train=relabelled(values), test=relabelled(values[:3])))
    assert splits.class_names == class_names
    assert [class_names[y] for y in splits.test.labels] == [str(v) for v in values[:3]]
    assert [class_names[y] for y in splits.train.labels] == [str(values[i]) for i in numbers(splits.train)]


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (["a", "b"], ["a", "c"], r"split 'test' has the label 'c' in row 1.*2 classes of train: \['a', 'b'\]"),
        (["a", None], ["a"], "split 'train' has the label None in row 1"),
        ([0.5, 1.5], [0.5], "split 'train' has the label 0.5 in row 0: labels must be text, integers or a ClassLabel"),
        ([[0], [1]], [[0]], r"split 'train' has the label \[0\] in row 0"),
    ],
)
def test_unusable_labels(tmp_path, train, test, message):
    with pytest.raises(ValueError, match=message):
        load_splits(save(tmp_path, train=relabelled(train * 5), test=relabelled(test * 5)))


def test_unlabelled_test_split_is_refused(tmp_path):
    unlabelled = table(4).map(lambda row: {"label": -1})
    with pytest.raises(ValueError, match="split 'test' has the label -1 in row 0"):
        load_splits(save(tmp_path, train=table(10), test=unlabelled))


@pytest.mark.parametrize("labels", [[-1] * 10, ["cat"] * 10])
def test_one_class_is_refused(tmp_path, labels):
    rows = relabelled(labels)
    message = rf"all 10 images of split 'train'.* have one label: {labels[0]!r} \(column 'label'\).*at least 2 classes"
    with pytest.raises(ValueError, match=message):
        load_splits(save(tmp_path, train=rows, test=rows))
    with pytest.raises(ValueError, match="all 10 images of split 'train'.*'class 1'.*-1 often stands for hidden"):
        load_splits(save(tmp_path / "b", train=table(20).select(range(1, 20, 2)), test=table(20)))


def test_class_labels_are_matched_by_name(tmp_path):
    swapped = table(6, names=["class 1", "class 0"])
    splits = load_splits(save(tmp_path, train=table(20), test=swapped))
    assert splits.class_names == ["class 0", "class 1"] and splits.test.labels.tolist() == [1, 0] * 3


def test_splits_must_agree():
    a, b = tiny(), tiny(classes=4)
    with pytest.raises(ValueError, match="validation has class names"):
        DataSplits(a, b, a, "x")
    c = ImageTensorDataset(torch.zeros(1, 3, 5, 7, dtype=torch.uint8), torch.tensor([0]), a.class_names)
    with pytest.raises(ValueError, match=r"test images are \(3, 5, 7\), train \(2, 5, 7\)"):
        DataSplits(a, a, c, "x")


# --- bad and mixed images of a split


def with_bad_images(n, bad):
    """Rows of `table(n)` where those in `bad` are truncated, no image, empty or null, in turn."""
    good = [encode(numbered(i)) for i in range(n)]
    damaged = [{"bytes": good[0]["bytes"][:50], "path": None}, {"bytes": b"junk", "path": None}]
    damaged += [{"bytes": b"", "path": None}, None]
    for k, i in enumerate(bad):
        good[i] = damaged[k % 4]
    label = datasets.ClassLabel(names=["even", "odd"])
    features = datasets.Features({"image": datasets.Image(), "label": label})
    return datasets.Dataset.from_dict({"image": good, "label": [i % 2 for i in range(n)]}, features)


def test_bad_images_raise_after_the_whole_split(tmp_path):
    train = table(20, names=["even", "odd"])
    name = save(tmp_path, train=train, test=with_bad_images(20, [3, 6, 9, 19]))
    message = r"split 'test': 4 of 20 images cannot be decoded, in rows \[3, 6, 9, 19\] \(.*on_bad_image='skip'"
    with pytest.raises(ValueError, match=message):
        load_splits(name)
    name = save(tmp_path / "many", train=train, test=with_bad_images(40, range(0, 40, 2)))
    with pytest.raises(ValueError, match=r"20 of 40 .* in rows \[0, 2, 4, 6, 8, 10, 12, 14, 16, 18\] and more \("):
        load_splits(name)


def test_bad_images_are_skipped_and_reported(tmp_path, caplog):
    bad = [0, 5, 8, 17, 30]
    names = ["even", "odd"]
    rows = {"train": with_bad_images(40, bad), "validation": table(8, names=names), "test": table(6, names=names)}
    with caplog.at_level(logging.WARNING, logger="hf_dualmoe.data.datasets"):
        splits = load_splits(save(tmp_path, **rows), on_bad_image="skip", max_train_samples=40)
    assert splits.skipped == {"train": bad}
    assert "5 of 40 images cannot be decoded, in rows [0, 5, 8, 17, 30]" in caplog.text
    kept = [i for i in range(40) if i not in bad]
    assert numbers(splits.train) == kept and splits.train.labels.tolist() == [i % 2 for i in kept]
    assert splits.train.rows.tolist() == kept


def test_skipped_rows_count_in_the_source_split(tmp_path):
    bad = [7, 21, 33]
    splits = load_splits(save(tmp_path, train=with_bad_images(60, bad)), on_bad_image="skip", max_train_samples=40)
    reported = sum(splits.skipped.values(), [])
    assert set(reported) <= set(bad)
    seen = sum((numbers(part) for part in splits.sets.values()), [])
    assert not set(seen) & set(bad) and len(seen) + len(reported) == 40 + 6 + 6
    assert all(part.rows.tolist() == numbers(part) for part in splits.sets.values())  # those held out of train too


def test_all_images_bad(tmp_path):
    name = save(tmp_path, train=table(10, names=["even", "odd"]), test=with_bad_images(4, range(4)))
    with pytest.raises(ValueError, match="split 'test': none of 4 images can be decoded: .*Error"):
        load_splits(name, on_bad_image="skip")


def test_grey_image_first_in_a_later_split(tmp_path):
    features = table(1).features
    test = {"image": [encode(solid(8, mode="L")), encode(numbered(3))], "label": [0, 1]}
    splits = load_splits(save(tmp_path, train=table(20), test=datasets.Dataset.from_dict(test, features)))
    assert splits.test.images[:, :, 0, 0].tolist() == [[8, 8, 8], [3, 7, 99]]


def test_large_splits_go_to_a_temporary_file_with_the_same_result(tmp_path, monkeypatch):
    name = save(tmp_path, train=with_bad_images(40, [4, 9]))
    in_ram = load_splits(name, on_bad_image="skip")
    calls = []
    memmap = np.memmap
    monkeypatch.setattr(decoding.np, "memmap", lambda *args, **kwargs: calls.append(kwargs) or memmap(*args, **kwargs))
    monkeypatch.setattr(decoding, "MAX_RAM_BYTES", 6 * 6 * 3 * 10)
    on_disk = load_splits(name, on_bad_image="skip")
    assert len(calls) == 1  # train only: the 4 images of each held-out set are below the limit
    assert torch.equal(in_ram.train.images, on_disk.train.images) and in_ram.skipped == on_disk.skipped
    assert torch.equal(in_ram.train.labels, on_disk.train.labels)
    assert torch.equal(on_disk.train.__getitems__([2, 0])["pixel_values"], in_ram.train.images[[2, 0]])


# --- real data


@pytest.mark.skipif("HF_DUALMOE_CIFAR10" not in os.environ, reason="HF_DUALMOE_CIFAR10 names no CIFAR-10 folder")
def test_cifar10():
    splits = load_splits(os.environ["HF_DUALMOE_CIFAR10"], max_train_samples=2000, max_test_samples=1000)
    assert sizes(splits) == [2000, 5000, 1000]
    assert (splits.num_labels, splits.num_channels, splits.image_size) == (10, 3, 32)
    assert torch.bincount(splits.train.labels).tolist() == [200] * 10
    mean = to_unit_range(splits.validation.images).mean((0, 2, 3))
    assert torch.allclose(mean, torch.tensor([0.49140, 0.48216, 0.44653]), atol=0.01)
