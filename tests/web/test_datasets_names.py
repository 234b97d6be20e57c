"""Names of datasets and files: honest ones pass, nothing else gets through, and nothing is guessed."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from detour import UserError, files
from detour.web import dataset_names

HONEST = [
    "a", "cats", "my cat 2", "a..b.png", "a...b", "x" * 200, "猫の写真.jpg", "고양이", "Jürgen", "🐈.png",
    "👨\u200d👩\u200d👧.png", "🩷",
    "می\u200cخواهم.txt", "50% off!.png", "a;b$(c)`d`&e", "it's", "-rf", "_", "~", "$HOME", "%2e%2e%2f",
    "console.png", "com.png", "nullable", "．．／etc", "a\u2215b", "#1", "{name}", "[trigger].txt", "a+b=c", "tmp-1",
]  # fmt: skip
DISHONEST = [
    "", " ", "\u00a0", ".", "..", "...", ".hidden", "../x", "..\\x", "a/b", "a\\b", "/etc/passwd", "C:\\x", "C:x",
    "\\\\server\\share", "\\\\?\\C:\\x", "a:b", "a*", "a?", 'a"', "<a>", "a|b", "a\0b", "a\nb", "a\rb", "a\x7f",
    "a\x1bb",
    "\ud800", "a\u202ecod.exe", "\ufeffa", "a\u200b", "a\u2028b", " a", "a ", "a.", "a\u3000", "CON", "con", "Aux.png",
    "nul.txt.png", "COM1", "lpt9.png", "COM¹", "con .png", "CONOUT$", "x" * 221, "猫" * 74,
    "a.png.tmp-abcdef-12-12345678", "a.old-abcdef-12-12345678",
]  # fmt: skip


@pytest.mark.parametrize("name", HONEST)
def test_honest_names_pass_unchanged(name, tmp_path):
    assert dataset_names.checked(name) == unicodedata.normalize("NFC", name)
    (tmp_path / name).write_text("here")
    files.write_bytes(tmp_path / name, b"and with a temporary beside it")


@pytest.mark.parametrize("name", DISHONEST)
def test_other_names_are_refused_with_a_sentence(name):
    with pytest.raises(UserError, match="the name: ") as caught:
        dataset_names.checked(name, "the name")
    said = str(caught.value)
    assert said.isprintable(), "nothing of it may change what a terminal shows"
    assert len(said) < 250
    said.encode()


@given(st.text(max_size=300) | st.from_regex(r"[./\\: a-cA-C\x00%~;-]{1,12}", fullmatch=True))
def test_what_passes_is_one_plain_component_of_a_path(text):
    try:
        name = dataset_names.checked(text)
    except UserError:
        return
    root = Path("/data/datasets")
    assert Path(name).parts == (name,)
    assert (root / name).resolve() == root / name
    assert not Path(name).is_absolute()
    assert dataset_names.checked(name) == name, "checked again it is the same"
    assert len(name.encode()) + len(".tmp-abcdef-4194304-12345678") <= 255
    assert not name.startswith(".")


@given(st.text(max_size=20))
def test_names_that_some_file_system_takes_for_the_same_fold_to_the_same(text):
    same = [text, unicodedata.normalize("NFC", text), unicodedata.normalize("NFD", text)]
    assert len({dataset_names.folded(one) for one in same}) == 1
    assert dataset_names.folded(dataset_names.folded(text)) == dataset_names.folded(text)


def test_capitals_do_not_tell_names_apart():
    for one, other in [("CAT.png", "cat.PNG"), ("Straße", "STRASSE"), ("É", "e\u0301"), ("İx".lower(), "İX")]:
        assert dataset_names.folded(one) == dataset_names.folded(other), (one, other)
    assert dataset_names.folded("cat") != dataset_names.folded("cats")
