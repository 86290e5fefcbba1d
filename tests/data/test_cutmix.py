"""CutMix on images that say who they are: image i has the value i / count everywhere."""

import pytest
import torch

from hf_dualmoe.data import cutmix

COUNT, CLASSES = 400, 5


def mixed(**options):
    images = (torch.arange(COUNT) / COUNT).view(-1, 1, 1, 1).expand(COUNT, 3, 14, 10)
    labels = torch.arange(COUNT) % CLASSES
    torch.manual_seed(0)
    return images, labels, *cutmix(images, labels, num_labels=CLASSES, **options)


def test_targets_are_the_shares_of_the_pixels():
    images, labels, found, targets = mixed()
    pasted = found != images
    assert torch.equal(found[pasted], images.roll(1, dims=0)[pasted])  # from the neighbour, and from nobody else
    share = pasted.float().mean(dim=(1, 2, 3))
    rows = torch.arange(COUNT)
    torch.testing.assert_close(targets[rows, labels], 1 - share)
    torch.testing.assert_close(targets[rows, labels.roll(1)], share)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(COUNT))


def test_pieces_are_rectangles_of_all_sizes_up_to_a_half_anywhere():
    images, _, found, _ = mixed()
    pasted = (found != images)[:, 0]
    rows, columns = pasted.any(dim=2), pasted.any(dim=1)
    assert torch.equal(pasted, rows[:, :, None] & columns[:, None, :])
    for lines in (rows, columns):  # without gaps
        assert (lines.int().diff(dim=1).abs().sum(dim=1) <= 2).all()
    share = pasted.float().mean(dim=(1, 2))
    assert share.max() <= 0.5 and share.max() > 0.4 and (share < 0.1).float().mean() > 0.1
    assert (pasted.float().mean(dim=0) > 0.02).all()  # every pixel is covered at times
    whole = (rows.sum(dim=1) > 1) & (rows.sum(dim=1) < 9)
    assert rows[whole, 0].any() and rows[whole, -1].any()  # cut off at the edges


def test_only_a_share_of_the_images_is_mixed():
    images, labels, found, targets = mixed(prob=0.25)
    changed = (found != images).any(dim=(1, 2, 3))
    assert 0.15 < changed.float().mean() < 0.3
    assert torch.equal(targets[~changed].argmax(dim=1), labels[~changed])
    assert (targets[~changed].amax(dim=1) == 1).all()
    images, _, found, _ = mixed(prob=0.0)
    assert torch.equal(found, images)


def test_processes_with_equal_generators_draw_the_parts_of_one_batch():
    images, labels = torch.rand(8, 3, 6, 6), torch.zeros(8, dtype=torch.int64)
    torch.manual_seed(3)
    whole, _ = cutmix(images, labels, num_labels=2)
    half = slice(4, 8)
    torch.manual_seed(3)
    part, _ = cutmix(images[half], labels[half], num_labels=2, shard=(1, 2))
    assert torch.equal(part[1:], whole[half][1:])  # the first has another neighbour


def test_a_probability_is_one():
    with pytest.raises(ValueError, match="prob=1.5 must be in"):
        mixed(prob=1.5)
