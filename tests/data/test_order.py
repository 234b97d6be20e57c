"""The order: pure in seed and epoch, every item exactly as often as asked, batches that fit together."""

import dataclasses
import subprocess
import sys
import time
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detour import UserError
from detour.config.job import DatasetConfig
from detour.data import order
from detour.data.order import Order, hold_out, make_items, transform_of, validation_order
from detour.data.scan import Picture

SIZES = [(64, 64), (128, 64), (64, 128)]


def pictures(count, dataset=0, captions=("a cat",), offset=0):
    return [
        Picture(
            path=Path(f"/data/{dataset}/{i:06d}.png"),
            key=f"{i:06d}.png",
            dataset=dataset,
            sha256=f"{i + 1000 * dataset + offset:064x}",
            width=SIZES[i % 3][0],
            height=SIZES[i % 3][1],
            captions=tuple(caption.format(i) for caption in captions),
        )
        for i in range(count)
    ]


def config(**options):
    return DatasetConfig(**({"folder_path": Path("/data"), "resolution": [64]} | options))


def make(*sets, batch_size=4, seed=0, trigger=None, lengths=None, multiple=4):
    """An order of (pictures, config) sets."""
    configs = [each[1] for each in sets]
    items = make_items([picture for each in sets for picture in each[0]], configs, 16)
    return Order(items, configs, trigger, seed, batch_size, multiple, lengths)


def words(made, epochs=5):
    """The order with the number of words as the length of each caption."""
    return dataclasses.replace(made, lengths={p: len(p.split()) for p in made.prompts(range(epochs))})


def drawn(batches):
    return Counter(
        (d.item.picture.dataset, d.item.picture.key, d.item.flip_x, d.item.flip_y) for b in batches for d in b.draws
    )


def sequence(batches):
    return [[(d.item.picture.key, d.item.bucket, d.item.flip_x, d.crop, d.prompt) for d in b.draws] for b in batches]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 4), st.booleans(), st.integers(0, 9), st.floats(0, 1))
def test_every_item_is_drawn_exactly_as_often_as_asked(count, batch_size, repeats, flip, epoch, dropout):
    options = config(num_repeats=repeats, flip_x=flip, caption_dropout_rate=dropout)
    made = words(make((pictures(count, captions=("one", "two words")), options), batch_size=batch_size))
    batches = made.epoch(epoch)
    assert set(drawn(batches).values()) == {repeats}
    assert len(drawn(batches)) == count * (1 + flip)
    assert made.count(epoch) == len(batches)
    assert all(1 <= len(batch.draws) <= batch_size for batch in batches)


def test_batches_fit_together():
    captions = ("one", "two words", "these are seven words in a caption")
    made = words(make((pictures(200, captions=captions), config(caption_dropout_rate=0.2)), batch_size=5))
    short = Counter()
    for batch in made.epoch(3):
        assert len({(d.item.bucket.width, d.item.bucket.height) for d in batch.draws}) == 1
        lengths = {-(-made.lengths[d.prompt] // 4) for d in batch.draws}
        assert len(lengths) == 1, "the empty caption counts by its own length"
        short[batch.draws[0].item.bucket.width, batch.draws[0].item.bucket.height, *lengths] += len(batch.draws) < 5
    assert max(short.values()) <= 1, "one short batch a group at most"
    assert len(short) == 3 * 3


def test_order_is_pure_in_seed_and_epoch():
    made = make((pictures(50), config(num_repeats=2)), seed=1)
    again = make((pictures(50), config(num_repeats=2)), seed=1)
    assert sequence(made.epoch(7)) == sequence(again.epoch(7)), "later epochs need no earlier ones"
    assert sequence(made.epoch(7)) != sequence(made.epoch(8))
    assert sequence(made.epoch(7)) != sequence(make((pictures(50), config(num_repeats=2)), seed=2).epoch(7))


def test_order_does_not_depend_on_the_listing():
    made = make((pictures(50, captions=("x {}", "y {}")), config(caption_dropout_rate=0.3)))
    turned = dataclasses.replace(made, items=made.items[::-1])
    assert sequence(made.epoch(2)) == sequence(turned.epoch(2))


def test_order_is_the_same_in_another_process():
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_order as t
made = t.make((t.pictures(9, captions=("a, b, c {{}}",)), t.config(shuffle_tokens=True, caption_dropout_rate=0.3)))
print(t.sequence(made.epoch(3)))
"""
    made = make((pictures(9, captions=("a, b, c {}",)), config(shuffle_tokens=True, caption_dropout_rate=0.3)))
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.strip() == str(sequence(made.epoch(3)))


def test_order_is_this_one():
    """Runs of other days and machines must go on where they were: a change here breaks their resuming."""
    made = make(
        (pictures(7, captions=("{}", "x, y, {}")), config(caption_dropout_rate=0.3, shuffle_tokens=True)), batch_size=2
    )
    names = [[f"{d.item.picture.key[5]}:{d.prompt}" for d in b.draws] for b in made.epoch(1)]
    assert names == [["5:5", "2:2, y, x"], ["6:6"], ["4:4", "1:1"], ["0:0", "3:3"]]


def test_a_new_picture_changes_no_draw_of_the_others():
    options = config(caption_dropout_rate=0.5)
    few = make((pictures(30, captions=("a {}", "b {}", "c {}")), options), batch_size=1)
    more = make((pictures(40, captions=("a {}", "b {}", "c {}")), options), batch_size=1)
    prompts = [{d.item.picture.key: d.prompt for b in made.epoch(4) for d in b.draws} for made in (few, more)]
    assert prompts[0].items() <= prompts[1].items()
    keys = [[b.draws[0].item.picture.key for b in made.epoch(4)] for made in (few, more)]
    assert [key for key in keys[1] if key in keys[0]] == keys[0], "nor their sequence"


def test_shuffling_is_even():
    """Each of 40 pictures comes at each quarter of the epoch about equally often."""
    made = make((pictures(40), config()), batch_size=1)
    quarter = Counter()
    for epoch in range(400):
        for place, batch in enumerate(made.epoch(epoch)):
            quarter[batch.draws[0].item.picture.key, place // 10] += 1
    assert len(quarter) == 160
    assert min(quarter.values()) > 60  # 100 expected, standard deviation 8.7
    assert max(quarter.values()) < 140


def test_partners_in_a_batch_change():
    made = make((pictures(30), config()), batch_size=2)
    pairs = {frozenset(d.item.picture.key for d in b.draws) for epoch in range(30) for b in made.epoch(epoch)}
    assert len(pairs) > 100


def test_caption_variants_and_dropout_have_their_shares():
    made = make((pictures(3000, captions=("a", "b", "c")), config(caption_dropout_rate=0.1)))
    count = Counter(d.prompt for b in made.epoch(0) for d in b.draws)
    assert abs(count[""] - 300) < 60
    assert all(abs(count[caption] - 900) < 100 for caption in "abc")


def test_repeats_draw_their_own_captions():
    made = make((pictures(100, captions=("a", "b")), config(num_repeats=2)))
    seen = {}
    for batch in made.epoch(0):
        for d in batch.draws:
            seen.setdefault(d.item.picture.key, []).append(d.prompt)
    assert 30 < sum(len(set(prompts)) == 2 for prompts in seen.values()) < 70


def test_triggers():
    first, second = config(trigger_word="own"), config()
    made = make((pictures(3), first), (pictures(3, 1), second), (pictures(3, 2), config(is_reg=True)), trigger="both")
    assert {(d.item.picture.dataset, d.prompt) for b in made.epoch(0) for d in b.draws} == {
        (0, "own a cat"), (1, "both a cat"), (2, "a cat"),
    }  # fmt: skip


def test_shuffled_captions_get_their_trigger_in_front():
    made = make((pictures(20, captions=("k, a, b, c",)), config(shuffle_tokens=True, keep_tokens=1)), trigger="t")
    prompts = {d.prompt for b in made.epoch(0) for d in b.draws}
    assert len(prompts) > 3
    assert all(prompt.startswith("t k, ") and sorted(prompt[5:].split(", ")) == ["a", "b", "c"] for prompt in prompts)


def test_crop_variants_come_in_turn():
    made = make((pictures(1), config(crop="random", crop_variants=5, num_repeats=3)))
    crops = [sorted(d.crop for b in made.epoch(epoch) for d in b.draws) for epoch in range(5)]
    assert crops == [[0, 1, 2], [0, 3, 4], [1, 2, 3], [0, 1, 4], [2, 3, 4]]
    assert {d.crop for b in make((pictures(1), config(crop_variants=5))).epoch(3) for d in b.draws} == {0}


def test_resolutions_and_flips():
    items = make_items(pictures(1), [config(resolution=[32, 64, 512], flip_x=True, flip_y=True)], 16)
    assert [(i.bucket.width, i.flip_x, i.flip_y) for i in items[:4]] == [
        (32, False, False), (32, False, True), (32, True, False), (32, True, True),
    ]  # fmt: skip
    assert [i.bucket.width for i in items] == [32] * 4 + [64] * 8, "not larger than it is, and as often"
    assert len({i.number for i in items}) == 12


def test_transform():
    item = make_items([dataclasses.replace(pictures(1)[0], width=100, alpha=True)], [config(flip_x=True)], 16)[1]
    assert item.flip_x
    made = transform_of(item, config(), 0)
    assert (made.scaled_w, made.scaled_h, made.width, made.height, made.left, made.flip_x) == (80, 51, 80, 48, 0, True)
    assert made.flatten
    assert not transform_of(item, config(alpha_mask=True), 0).flatten


class TestRegularisation:
    def test_every_second_place(self):
        made = make((pictures(10), config()), (pictures(50, 1), config(is_reg=True)), batch_size=3)
        batches = made.epoch(0)
        assert [batch.is_reg for batch in batches] == [False, True] * (len(batches) // 2)
        assert made.count(0) == len(batches)
        for batch in batches:
            assert {d.item.picture.dataset for d in batch.draws} == {int(batch.is_reg)}

    def test_main_sets_give_the_length(self):
        alone = make((pictures(10), config()), batch_size=3)
        for count in (1, 10, 200):
            both = make((pictures(10), config()), (pictures(count, 1), config(is_reg=True)), batch_size=3)
            assert both.count(0) == 2 * alone.count(0)
            main = [b.draws for b in both.epoch(0) if not b.is_reg]
            assert main == [b.draws for b in alone.epoch(0)]

    def test_small_sets_go_round_evenly(self):
        made = make((pictures(90), config()), (pictures(4, 1), config(is_reg=True)), batch_size=1)
        counts = Counter(d.item.picture.key for b in made.epoch(0) if b.is_reg for d in b.draws)
        assert sorted(counts.values()) == [22, 22, 23, 23]
        keys = [b.draws[0].item.picture.key for b in made.epoch(0) if b.is_reg]
        assert len({tuple(keys[start : start + 4]) for start in range(0, 88, 4)}) > 5, "each round in another order"

    def test_large_sets_give_each_epoch_another_part(self):
        made = make((pictures(10), config()), (pictures(100, 1), config(is_reg=True)), batch_size=1)
        parts = [{d.item.picture.key for b in made.epoch(e) if b.is_reg for d in b.draws} for e in range(30)]
        assert all(len(part) == 10 for part in parts)
        assert len(set().union(*parts)) > 90

    def test_not_alone(self):
        with pytest.raises(UserError, match="without is_reg"):
            make((pictures(3), config(is_reg=True)))


def test_positions_lead_through_the_epoch():
    batches = make((pictures(10), config()), batch_size=3).epoch(4)
    assert [batch.after for batch in batches] == [(4, i + 1) for i in range(len(batches) - 1)] + [(5, 0)]
    assert {batch.epoch for batch in batches} == {4}


def test_prompts_are_all_that_epochs_ask_for():
    sets = (
        (pictures(6, captions=("x {}", "y {}")), config(caption_dropout_rate=0.5)),
        (pictures(6, 1, captions=("a, b, c, {}",)), config(shuffle_tokens=True)),
        (pictures(6, 2, captions=("reg {}",)), config(is_reg=True)),
    )
    made = make(*sets, trigger="t")
    prompts = made.prompts(range(3))
    asked = {d.prompt for epoch in range(3) for b in made.epoch(epoch) for d in b.draws}
    assert asked <= set(prompts)
    assert set(prompts) - asked <= {f"t x {i}" for i in range(6)} | {f"t y {i}" for i in range(6)} | {
        f"reg {i}" for i in range(6)
    }
    assert "" in prompts
    assert prompts == sorted(prompts)
    assert "" not in make((pictures(1), config()), (pictures(1, 1), config(is_reg=True))).prompts(range(1))


def test_lengths_do_not_change_what_is_asked_for():
    """Prompts are prepared before their lengths are known."""
    made = make((pictures(60, captions=("a {}, b", "c")), config(shuffle_tokens=True, caption_dropout_rate=0.2)))
    with_lengths = words(made)
    for epoch in range(5):
        asked = [sorted(map(str, chain(*sequence(each.epoch(epoch))))) for each in (made, with_lengths)]
        assert asked[0] == asked[1]


def test_prompts_of_shuffled_regularisation_sets_cover_every_turn():
    """With caption lengths the main set falls into more batches, and the regularisation set goes round more often."""
    main = pictures(24, captions=tuple("word " * n for n in (1, 5, 9, 13, 17)))
    reg = pictures(4, 1, captions=("a, b, c, d, e, f",))
    made = make((main, config()), (reg, config(is_reg=True, shuffle_tokens=True)), batch_size=4)
    prompts = made.prompts(range(3))
    with_lengths = dataclasses.replace(made, lengths={p: len(p.split()) for p in prompts})
    assert with_lengths.count(0) > made.count(0)
    asked = {d.prompt for epoch in range(3) for b in with_lengths.epoch(epoch) for d in b.draws}
    assert asked <= set(prompts)


def test_most_epochs_is_enough():
    captions = ("one", "two words here", "a caption of some more words than those")
    made = words(make((pictures(31, captions=captions), config(caption_dropout_rate=0.3)), batch_size=4), 20)
    alike = make((pictures(12), config()), batch_size=4)
    assert alike.most_epochs(2 * alike.count(0)) == 3, "two, and one that is read ahead"
    for total in (1, 5, 50, 100):
        epoch, left = 0, total
        while left > 0:
            left -= made.count(epoch)
            epoch += 1
        assert epoch + (left == 0) <= dataclasses.replace(made, lengths=None).most_epochs(total)


def test_fingerprint():
    base = make((pictures(5), config()))
    same = make((pictures(5), config(folder_path=Path("/moved"), bad_images="skip")))
    assert base.fingerprint == same.fingerprint
    changed = [
        make((pictures(6), config())),
        make((pictures(5, offset=1), config())),
        make((pictures(5, captions=("a dog",)), config())),
        make((pictures(5), config(resolution=[32]))),
        make((pictures(5), config(flip_x=True))),
        make((pictures(5), config(caption_dropout_rate=0.1))),
        make((pictures(5), config(loss_weight=2))),
        make((pictures(5), config()), trigger="t"),
        make(([dataclasses.replace(p, mask_sha256="1") for p in pictures(5)], config())),
    ]
    assert len({made.fingerprint for made in [base, *changed]}) == 10


def test_hold_out():
    copies = [dataclasses.replace(p, key="copy") for p in pictures(1)]
    sets, configs = pictures(40) + copies + pictures(10, 1), [config(), config(is_reg=True)]
    train, held = hold_out(sets, configs, 0.1, 0)
    assert len({p.sha256 for p in held}) == 4
    assert not {p.sha256 for p in held} & {p.sha256 for p in train}
    assert len(train) + len(held) == 51
    assert {p.dataset for p in held} == {0}
    assert hold_out(sets[::-1], configs, 0.1, 0)[1] == held[::-1], "by content, not by place"
    assert hold_out(sets, configs, 0.1, 1)[1] != held
    assert len(hold_out(sets[:2], configs, 0.01, 0)[1]) == len(hold_out(sets[:2], configs, 0.99, 0)[1]) == 1
    with pytest.raises(UserError, match="at least two different pictures"):
        hold_out(copies, configs, 0.5, 0)


def test_validation_order():
    options = config(
        num_repeats=3, flip_x=True, caption_dropout_rate=1, shuffle_tokens=True, crop="random", is_reg=True
    )
    sets = pictures(20, captions=("b, a {}", "other"))
    made = validation_order(sets, [options], "t", seed=0, batch_size=2, max_images=5, divisibility=16)
    draws = [d for b in made.epoch(0) for d in b.draws]
    assert len(draws) == 5
    assert all(d.prompt == f"t b, a {int(d.item.picture.key[:6])}" for d in draws)
    assert not any(d.item.flip_x for d in draws)
    again = validation_order(sets[::-1], [options], "t", seed=0, batch_size=2, max_images=5, divisibility=16)
    assert sequence(again.epoch(0)) == sequence(made.epoch(0))


@pytest.mark.slow
def test_a_hundred_thousand_items_take_about_a_second():
    made = make((pictures(100_000, captions=("caption {}",)), config(caption_dropout_rate=0.1)), batch_size=4)
    made = dataclasses.replace(made, lengths={p: len(p) % 50 for p in made.prompts([])})
    made.epoch(0)
    start = time.process_time()
    batches = made.epoch(1)
    planned = time.process_time() - start
    start = time.process_time()
    assert made.count(1) == len(batches)
    counted = time.process_time() - start
    assert planned < 3, f"{planned:.2f} s"  # 0.7 s on an idle core
    assert counted < 2, f"{counted:.2f} s"


def test_mixed_numbers_are_those_of_splitmix64():
    """First outputs of the reference implementation for the state 0 (it adds the golden ratio first)."""
    golden = 0x9E3779B97F4A7C15
    values = order.np.array([0, golden], dtype=order.np.uint64)
    assert [hex(int(x)) for x in order._mixed(values, golden)] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4"]
