"""Buckets: sizes, covering, cropping."""

from math import sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from detour.data.buckets import Bucket, crop, plan

SIDES = st.integers(1, 20_000)
SIZES = st.tuples(SIDES, SIDES)
RESOLUTIONS = st.integers(32, 2048)
DIVISORS = st.sampled_from([8, 16, 32, 64])


@given(SIZES, RESOLUTIONS, DIVISORS, st.booleans())
def test_sides_are_divisible_and_the_area_is_bounded(size, resolution, divisibility, upscale):
    bucket = plan(*size, resolution, divisibility, upscale)
    assert bucket.width % divisibility == bucket.height % divisibility == 0
    assert min(bucket.width, bucket.height) >= divisibility
    assert bucket.width * bucket.height <= max(resolution, divisibility) ** 2


@given(SIZES, RESOLUTIONS, DIVISORS, st.booleans())
def test_the_scaled_picture_covers_the_bucket_and_keeps_its_proportions(size, resolution, divisibility, upscale):
    bucket = plan(*size, resolution, divisibility, upscale)
    assert bucket.scaled_w >= bucket.width
    assert bucket.scaled_h >= bucket.height
    assert bucket.scaled_w == bucket.width or bucket.scaled_h == bucket.height, "no more than needed"
    exact_h = bucket.scaled_w * size[1] / size[0]
    exact_w = bucket.scaled_h * size[0] / size[1]
    assert abs(exact_h - bucket.scaled_h) <= 1 or abs(exact_w - bucket.scaled_w) <= 1


@given(SIZES, RESOLUTIONS, DIVISORS)
def test_never_upscaled_unless_a_side_is_shorter_than_one_multiple(size, resolution, divisibility):
    bucket = plan(*size, resolution, divisibility)
    if min(size) >= divisibility:
        assert bucket.scaled_w <= size[0]
        assert bucket.scaled_h <= size[1]


@given(SIZES, RESOLUTIONS, DIVISORS, st.booleans())
def test_not_much_smaller_than_asked(size, resolution, divisibility, upscale):
    area = resolution**2 if upscale else min(resolution**2, size[0] * size[1])
    ideal = sqrt(area * size[0] / size[1]), sqrt(area * size[1] / size[0])
    if min(ideal) >= 2 * divisibility:
        bucket = plan(*size, resolution, divisibility, upscale)
        # Rounding down costs at most a third of each side here; the best choice costs no more.
        assert bucket.width * bucket.height >= area * 4 / 9 * 2 / 3


@given(SIZES, RESOLUTIONS, DIVISORS, st.booleans())
def test_turning_the_picture_turns_the_bucket(size, resolution, divisibility, upscale):
    bucket = plan(*size, resolution, divisibility, upscale)
    turned = plan(*size[::-1], resolution, divisibility, upscale)
    assert bucket.width * bucket.height == turned.width * turned.height


@pytest.mark.parametrize(
    ("size", "resolution", "expected"),
    [
        ((1024, 1024), 1024, Bucket(1024, 1024, 1024, 1024)),
        ((4000, 4000), 1024, Bucket(1024, 1024, 1024, 1024)),
        ((6000, 4000), 1024, Bucket(1248, 832, 1248, 832)),
        ((4000, 6000), 1024, Bucket(832, 1248, 832, 1248)),
        ((600, 600), 1024, Bucket(576, 576, 576, 576)),
        ((1030, 1000), 1024, Bucket(1024, 992, 1024, 994)),
        ((20_000, 40), 1024, Bucket(20_000 // 32 * 32, 32, 20_000, 40 * 32 // 40 + 8)),
    ],
)
def test_examples(size, resolution, expected):
    assert plan(*size, resolution, 32) == expected


def test_upscale_reaches_the_resolution():
    assert plan(600, 600, 1024, 32, upscale=True) == Bucket(1024, 1024, 1024, 1024)


def test_sizes_must_be_positive():
    with pytest.raises(ValueError, match="positive"):
        plan(0, 5, 64, 32)


@given(
    SIZES,
    st.text("0123456789abcdef", min_size=8, max_size=8),
    st.integers(0, 63),
    st.sampled_from(["center", "random"]),
)
def test_crops_lie_inside(size, content, variant, mode):
    bucket = plan(*size, 512, 32)
    left, top = crop(bucket, mode, content, variant)
    assert 0 <= left <= bucket.scaled_w - bucket.width
    assert 0 <= top <= bucket.scaled_h - bucket.height
    assert crop(bucket, mode, content, variant) == (left, top)


def test_random_crops_differ_between_variants_and_pictures():
    bucket = Bucket(64, 64, 640, 64)
    places = {crop(bucket, "random", content, variant)[0] for content in ("a", "b") for variant in range(20)}
    assert len(places) > 30
    assert min(places) < 100
    assert max(places) > 476
    assert crop(bucket, "center", "a", 3) == (288, 0)
