"""How fast an encoder is."""

from __future__ import annotations

from toys import planted_encoder
from unpoison.encoders.rate import measure_rate


def test_timing_a_batch_leaves_the_count_alone() -> None:
    encoder = planted_encoder()
    rate = measure_rate(encoder, 16)
    assert rate.images_per_second > 0 and rate.features == 55 and rate.memory is None
    assert encoder.images_shown == 0
