"""Datasets of images, decoded once into uint8 tensors.

In: the id of a dataset on the Hub, a local copy, or a folder of images. Out: `DataSplits`: training, held-out and test
images with labels and class names; and the augmentation of whole batches.

Calls: no other room.
"""

from .cutmix import cutmix
from .datasets import DataSplits, ImageTensorDataset, augment, collate, load_digits_splits, load_splits, to_unit_range
from .decoding import decode_images
from .image_folders import read_image_folder

__all__ = [
    "DataSplits",
    "ImageTensorDataset",
    "augment",
    "collate",
    "cutmix",
    "decode_images",
    "load_digits_splits",
    "load_splits",
    "read_image_folder",
    "to_unit_range",
]
