"""Parts of the patch search's story that need no whole scan."""

from __future__ import annotations

import torch

from unpoison import patch_pipeline
from unpoison.functional.windows import paste_windows
from unpoison.records import ImageSet, TriggerFinding


def test_a_flagged_image_is_listed_under_the_trigger_that_it_shows() -> None:
    """Both triggers lead to the same cluster, which says nothing of the images in it."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(0, 256, (2, 3, 8, 8), generator=generator).to(torch.uint8)
    pixels = torch.randint(60, 190, (12, 3, 24, 24), generator=generator).to(torch.uint8)
    shows = torch.tensor([1, 2] * 6)
    pixels = paste_windows(pixels, patterns[shows - 1], torch.randint(0, 16, (12, 2), generator=generator))
    images = ImageSet(tuple(f"{row}.png" for row in range(12)), pixels)
    flagged = torch.arange(12) < 10

    def finding(*sources: str) -> TriggerFinding:
        return TriggerFinding(
            target_cluster=0,
            target_clusters=(0,),
            flip_rate=1.0,
            control_rate=0.0,
            p_value=0.0,
            n_sources=len(sources),
            source_ids=sources,
            boxes=(),
            patches=patterns[:1],
        )

    both = (finding("0.png"), finding("1.png"))
    carried = patch_pipeline._carried(images, flagged, both, [patterns[:1], patterns[1:]])
    assert carried.tolist() == [*shows[:10].tolist(), 0, 0]
    alone = patch_pipeline._carried(images, flagged, both[:1], [patterns[:1]])
    assert alone.tolist() == [1] * 10 + [0, 0]
    assert patch_pipeline._carried(images, flagged, (), []).sum() == 0
