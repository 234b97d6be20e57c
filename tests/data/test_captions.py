"""Captions: trigger word, shuffling, and the files they are read from."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from detour import UserError
from detour.data.caption_files import read_caption, read_table
from detour.data.captions import shuffled, variants, with_trigger


@pytest.mark.parametrize(
    ("caption", "trigger", "expected"),
    [
        ("a man", "p3rs0n", "p3rs0n a man"),
        ("a p3rs0n, smiling", "p3rs0n", "a p3rs0n, smiling"),
        ("[trigger] on a hill, [trigger] asleep", "p3rs0n", "p3rs0n on a hill, p3rs0n asleep"),
        ("a catalogue", "cat", "cat a catalogue"),  # not the word itself
        ("a cat", "Cat", "Cat a cat"),
        ("", "p3rs0n", "p3rs0n"),
        ("a man", None, "a man"),
        ("a man", "", "a man"),
        ("x", "a+b", "a+b x"),
        ("an a+b here", "a+b", "an a+b here"),
    ],
)
def test_trigger(caption, trigger, expected):
    assert with_trigger(caption, trigger) == expected


@given(st.text())
def test_without_trigger_captions_stay_byte_for_byte(caption):
    assert variants((caption,), None) == (caption,)


@given(
    st.lists(st.text("abc xyz", min_size=1).map(str.strip).filter(bool), min_size=1), st.integers(0, 5), st.integers(0)
)
def test_shuffle_keeps_the_first_and_loses_nothing(parts, keep, draw):
    result = shuffled(", ".join(parts), keep, draw).split(", ")
    assert result[:keep] == parts[:keep]
    assert sorted(result) == sorted(parts)
    assert shuffled(", ".join(parts), keep, draw).split(", ") == result


def test_shuffle_reaches_every_order():
    assert len({shuffled("a, b, c", 0, draw) for draw in range(100)}) == 6


def test_text_file_keeps_inner_newlines_and_loses_the_bom(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf  one,  two\n\nthree \xe2\x98\x83 \n")
    assert read_caption(path) == "one,  two\n\nthree ☃"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("hé".encode("latin-1"), r"a\.txt is not UTF-8 text \(byte 2 is no UTF-8\); save it again as UTF-8"),
        ("hé".encode("utf-16"), "UTF-16"),
        (b"a\0b", "zero bytes"),
    ],
)
def test_text_file_that_is_none(tmp_path, data, message):
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_caption(path)


def table(tmp_path, name, text, keys=("a.png", "sub/b.png")):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return read_table(path, tmp_path, keys)


def test_jsonl(tmp_path):
    rows = [
        {"file": "a.png", "caption": " one\ntwo "},
        {"file": "sub\\b.png", "caption": ["x", "y"]},
        {"file": "./a.png", "caption": "three", "score": 3},
        {"file": "c.png", "caption": "nowhere"},
    ]
    result = table(tmp_path, "m.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n")
    assert result.captions == {"a.png": ("one\ntwo", "three"), "sub/b.png": ("x", "y")}
    assert result.missing == {"c.png": 4}


def test_absolute_names_and_names_taken_apart(tmp_path):
    composed, apart = "caf\u00e9.png", "cafe\u0301.png"
    rows = [{"file": str(tmp_path / "a.png"), "caption": "1"}, {"file": composed, "caption": "2"}]
    result = table(tmp_path, "m.jsonl", "\n".join(map(json.dumps, rows)), keys=("a.png", apart))
    assert result.captions == {"a.png": ("1",), apart: ("2",)}


def test_csv(tmp_path):
    text = '\ufefffile, caption,x\na.png,"one, ""two""\nthree",1\nsub/b.png,four,2\na.png,again,3\n'
    result = table(tmp_path, "m.csv", text)
    assert result.captions == {"a.png": ('one, "two"\nthree', "again"), "sub/b.png": ("four",)}


@pytest.mark.parametrize(
    ("name", "text", "messages"),
    [
        ("m.jsonl", '{"file": "a.png", "text": "x"}', ["line 1: has no 'caption' (it has 'file', 'text')"]),
        ("m.jsonl", "\n[1]\n{oops", ["line 2: is not an object", "line 3: is not JSON"]),
        ("m.jsonl", '{"file": "a.png", "caption": 3}', ["line 1: file and caption must be text"]),
        ("m.jsonl", '{"file": "a.png", "caption": []}', ["line 1: file and caption must be text"]),
        ("m.csv", "name,text\n1,2", ["has no column 'file' and no column 'caption' (it has 'name', 'text')"]),
        (
            "m.csv",
            "file,caption\na.png,a cat, asleep",
            ["line 2: has not 2 columns; a caption with a comma needs quotes"],
        ),
        ("m.csv", "file,caption\na.png", ["line 2: has not 2 columns"]),
        ("m.csv", 'file,caption\na.png,"open', ["is not CSV"]),
        ("m.csv", "", ["it has nothing"]),
        ("m.yaml", "", ["ends in .jsonl or .csv, not '.yaml'"]),
        ("m.jsonl", "\n".join(["x"] * 30), ["line 20:", "and 10 more"]),
    ],
)
def test_broken_tables(tmp_path, name, text, messages):
    with pytest.raises(UserError) as caught:
        table(tmp_path, name, text)
    for message in messages:
        assert message in str(caught.value)


def test_missing_table(tmp_path):
    with pytest.raises(UserError, match=r"m\.csv cannot be read: no such file"):
        read_table(tmp_path / "m.csv", tmp_path, [])
