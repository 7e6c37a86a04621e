"""What will an audit cost? Encoder passes per stage, from the settings alone."""

from __future__ import annotations

from unpoison.audit.decree import DecreeConfig, passes_of_extent, passes_of_scout, passes_of_start
from unpoison.audit.ssl_cleanse import SslCleanseConfig, passes_of_cleanse
from unpoison.records import Cost, StageCost

__all__ = ["audit_cost"]


def audit_cost(config: DecreeConfig, n_images: int, image_size: int, *, second_opinion: bool = False) -> Cost:
    """The cost of an audit. A step, forward and backward, counts as three passes.

    `expected` reaches the collapse, takes every step for the smallest mask, and every step for the whole extent of its
    trigger; `most` never reaches it, and looks again at the relaxed gain instead, if that is dearer. Patience may end a
    start earlier.

    Args:
        config: how hard to look.
        n_images: readable images, generated ones too.
        image_size: side of the encoder's input, pixels.
        second_opinion: whether SSL-Cleanse is asked, too.
    """
    held_out = n_images // 4
    searched = n_images - held_out
    windows, scouting = passes_of_scout(config, searched, image_size)
    start = passes_of_start(config, searched, image_size)
    stages = [StageCost("clean", 2 * n_images, 2 * n_images)]
    if config.faithful:
        stages.append(StageCost("start", start, start))
    else:
        starts, extent = config.restarts * start, passes_of_extent(config, searched, image_size)
        stages += [
            StageCost("scout", scouting, scouting),
            StageCost("start", starts, starts),
            StageCost("extent or relaxed", extent, max(extent, starts)),
        ]
    stages.append(StageCost("measure", held_out, held_out))
    if second_opinion:
        asked = passes_of_cleanse(SslCleanseConfig(), searched, windows)
        stages.append(StageCost("clusters", asked, asked))
    return Cost(stages=tuple(stages))
