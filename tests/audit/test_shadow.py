import pytest
import torch

from unpoison.audit.shadow import generated_images
from unpoison.errors import ConfigError


def test_generated_images_are_always_the_same_and_unlike_each_other():
    one, two = generated_images(70, 16), generated_images(70, 16)
    assert torch.equal(one.pixels, two.pixels) and one.ids == two.ids
    assert one.pixels.shape == (70, 3, 16, 16) and len(set(one.ids)) == 70
    assert len({bytes(pixels.numpy()) for pixels in one.pixels.contiguous()}) == 70
    values = one.pixels.float()
    assert 80 < float(values.mean()) < 175
    assert float(values.std(dim=(1, 2, 3)).min()) > 10


def test_they_have_edges_and_flat_parts_as_photographs_do():
    steps = generated_images(64, 32).pixels.float().diff(dim=3).abs()
    assert float((steps < 8).float().mean()) > 0.5  # flat
    assert float((steps > 64).float().mean()) > 0.02  # edges


@pytest.mark.parametrize(("count", "size"), [(0, 32), (1, 4)])
def test_numbers_too_small_are_refused(count, size):
    with pytest.raises(
        ConfigError, match=f"{count} generated images of {size} pixels: expected at least 1 image of 8 pixels"
    ):
        generated_images(count, size)
