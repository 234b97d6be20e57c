"""Changes to the text of a YAML file: one value changes, every other line stays, or the change is refused."""

from difflib import SequenceMatcher
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detour import UserError
from detour.config import edit
from detour.config.document import JobError, parse

ROOT = Path(__file__).parents[2]
EXAMPLES = {path.name: path.read_text() for path in sorted((ROOT / "examples").glob("*.yaml"))}
PROCESS = ("config", "process", 0)
MODEL = "    model: {arch: zimage, names: [1, 2,], }"

TEXT = """\
config:
  # above the name
  output_name: "a b"  # behind the name
  process:
  - type: train   # a list that is not indented
    model: {arch: zimage, names: [1, 2,], }
    empty:
    nothing: ~
    block: |
      first

      second

    # below the block
    datasets:
      # the first
      - folder_path: a

      # the second
      - folder_path: b
        deep:
          x: 1
          # inside
      # behind the list
    folded: several
      lines
    none: {}
    no_list: []
    "a name" : 'it''s'
meta: {a: 1}
# the end
"""


def changed(text, new):
    """The lines that went, and those that came."""
    old_lines, new_lines = text.splitlines(), new.splitlines()
    went, came = [], []
    for kind, a, b, c, d in SequenceMatcher(None, old_lines, new_lines, autojunk=False).get_opcodes():
        if kind != "equal":
            went += old_lines[a:b]
            came += new_lines[c:d]
    return went, came


@pytest.mark.parametrize(
    ("key", "value", "went", "came"),
    [
        (("config", "output_name"), "c", ['  output_name: "a b"  # behind the name'],
         ['  output_name: "c"  # behind the name']),
        ((*PROCESS, "model", "arch"), "sdxl", [MODEL],
         ["    model: {arch: sdxl, names: [1, 2,], }"]),
        ((*PROCESS, "model", "new"), {"a": True}, [MODEL],
         ["    model: {arch: zimage, names: [1, 2,], new: {a: true}, }"]),
        ((*PROCESS, "empty"), 5, ["    empty:"], ["    empty: 5"]),
        ((*PROCESS, "empty", "deep", "er"), [1, 2], [], ["      deep:", "        er: [1, 2]"]),
        ((*PROCESS, "nothing", "lr"), 1e-5, ["    nothing: ~"], ["    nothing:", "      lr: 1.0e-05"]),
        ((*PROCESS, "block"), "one\nline", ["    block: |", "      first", "", "      second"],
         ['    block: "one\\nline"']),
        ((*PROCESS, "datasets", 1, "deep", "y"), True, [], ['          "y": true']),
        ((*PROCESS, "datasets", 0, "flip_x"), True, [], ["        flip_x: true"]),
        ((*PROCESS, "datasets", 2), {"folder_path": None}, [], ["      - folder_path: null"]),
        ((*PROCESS, "folded"), "x", ["    folded: several", "      lines"], ["    folded: x"]),
        ((*PROCESS, "none", "prompts", 0), "a cat", ["    none: {}"], ['    none: {prompts: ["a cat"]}']),
        ((*PROCESS, "no_list", 0), {"a": 1}, ["    no_list: []"], ["    no_list:", "      - a: 1"]),
        ((*PROCESS, "new", "list", 0), "x", [], ["    new:", "      list:", "        - x"]),
        (("meta", "b"), "no", ["meta: {a: 1}"], ['meta: {a: 1, b: "no"}']),
        (("other",), 1, [], ["other: 1"]),
    ],
)  # fmt: skip
def test_setting_a_value_changes_its_line_alone(key, value, went, came):
    assert changed(TEXT, edit.put(TEXT, key, value)) == (went, came)


@pytest.mark.parametrize(
    ("key", "went", "came"),
    [
        ((*PROCESS, "folded"), ["    folded: several", "      lines"], []),
        ((*PROCESS, "type"), ["  - type: train   # a list that is not indented", MODEL], ["  - " + MODEL.strip()]),
        ((*PROCESS, "datasets", 0, "folder_path"), ["      - folder_path: a"], ["      - {}"]),
        ((*PROCESS, "model", "names"), [MODEL], ["    model: {arch: zimage, }"]),
        ((*PROCESS, "model", "arch"), [MODEL], ["    model: {names: [1, 2,], }"]),
        (("meta", "a"), ["meta: {a: 1}"], ["meta: {}"]),
    ],
)  # fmt: skip
def test_taking_an_option_out(key, went, came):
    assert changed(TEXT, edit.unset(TEXT, key)) == (went, came)


def test_an_option_behind_a_dash_leaves_the_comment_below_it():
    text = "a:\n  - b: 1\n    # about c\n    c: 2\n"
    assert edit.unset(text, ("a", 0, "b")) == "a:\n  -\n    # about c\n    c: 2\n"


def test_entries_go_and_move_with_the_comments_above_them():
    without = edit.remove(TEXT, (*PROCESS, "datasets"), 0)
    assert changed(TEXT, without) == (["      # the first", "      - folder_path: a"], [])
    moved = edit.move(TEXT, (*PROCESS, "datasets"), 0, 1)
    assert sorted(moved.splitlines()) == sorted(TEXT.splitlines())
    lines = [line.strip() for line in moved.splitlines()]
    assert (
        lines.index("# the second")
        < lines.index("# inside")
        < lines.index("# the first")
        < lines.index("- folder_path: a")
    )
    assert edit.move(moved, (*PROCESS, "datasets"), 1, 0) == TEXT
    assert "[2, 1,]" in edit.move(TEXT, (*PROCESS, "model", "names"), 1, 0)


def test_a_list_goes_with_its_last_entry():
    text = edit.remove(edit.remove(TEXT, (*PROCESS, "datasets"), 1), (*PROCESS, "datasets"), 0)
    assert "datasets" not in parse(text, "x").data["config"]["process"][0]


def test_a_short_form_is_written_out():
    text = "a:\n  - some words  # said\n  - 'b: c'\nd: [e f]\n"
    text = edit.wrap(edit.wrap(text, ("a", 0), "prompt"), ("d", 0), "prompt")
    assert text == "a:\n  - prompt: some words  # said\n  - 'b: c'\nd: [{prompt: e f}]\n"


def test_a_new_option_stands_where_the_order_says():
    order = {("a",): ["one", "two", "three"]}
    text = "a:\n  one: 1\n  # about three\n  three: 3\n"
    assert (
        edit.put(text, ("a", "two"), 2, lambda key: order[key])
        == "a:\n  one: 1\n  two: 2\n  # about three\n  three: 3\n"
    )


@pytest.mark.parametrize("text", ["", "# a comment\n", "# a comment"])
def test_an_empty_text_gets_its_first_section(text):
    new = edit.put(text, ("config", "process", 0, "type"), "train")
    assert new.startswith(text)
    assert parse(new, "x").data == {"config": {"process": [{"type": "train"}]}}


def test_lines_end_as_in_the_file():
    text = TEXT.replace("\n", "\r\n")
    new = edit.put(text, (*PROCESS, "datasets", 0, "flip_x"), True)
    assert new == edit.put(TEXT, (*PROCESS, "datasets", 0, "flip_x"), True).replace("\n", "\r\n")
    assert edit.put("a:\n  b: 1", ("a", "c"), 2) == "a:\n  b: 1\n  c: 2\n"


ALIASES = """\
base: &base {lr: 1}
a: &x val
b: *x
c:
  <<: *base
  steps: 2
d: [*x, other]
e:
  - &y {k: 1}
  - *y
"""


@pytest.mark.parametrize(
    ("change"),
    [
        lambda: edit.put(ALIASES, ("a",), "new"),
        lambda: edit.put(ALIASES, ("base", "lr"), 2),
        lambda: edit.put(ALIASES, ("e", 1, "k"), 2),
        lambda: edit.put(ALIASES, ("e", 0, "k"), 2),
        lambda: edit.unset(ALIASES, ("c", "lr")),
        lambda: edit.unset(ALIASES, ("a",)),
        lambda: edit.remove(ALIASES, ("e",), 0),
        lambda: edit.put("a: 1\na: 2\nb: [[1]]\n", ("b", 0, "c"), 1),
        lambda: edit.put("a: text\n", ("a", "b"), 1),
        lambda: edit.put("a: [1]\n", ("a", 3), 1),
        lambda: edit.remove("a: [1]\n", ("a",), 3),
        lambda: edit.move("a: [1]\n", ("a",), 0, 3),
        lambda: edit.unset("a: 1\n", ("b",)),
    ],
)  # fmt: skip
def test_what_would_change_something_else_is_refused(change):
    with pytest.raises(UserError, match=r"YAML|not in the file"):
        change()


def test_an_alias_itself_can_be_replaced_and_a_merge_overridden():
    assert "b: new\n" in edit.put(ALIASES, ("b",), "new")
    assert "d: [mine, other]" in edit.put(ALIASES, ("d", 0), "mine")
    text = edit.put(ALIASES, ("c", "lr"), 5)
    assert parse(text, "x").data["c"] == {"lr": 5, "steps": 2}


def test_a_text_that_is_no_yaml_is_said_to_be_none():
    with pytest.raises(JobError, match=":1: not YAML"):
        edit.put("a: [", ("a",), 1)


def test_a_comment_behind_a_value_is_seen():
    assert edit.has_comment(TEXT, ("config", "output_name"))
    assert not edit.has_comment(TEXT, (*PROCESS, "model"))
    assert not edit.has_comment(TEXT, (*PROCESS, "missing"))


def places(value, key=()):
    """Every place in the values."""
    yield key
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for part, content in inner:
        yield from places(content, (*key, part))


plain = st.one_of(
    st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=20), st.none(),
    st.lists(st.text(max_size=5), max_size=3),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_value_of_any_example_can_be_replaced(data):
    text = EXAMPLES[data.draw(st.sampled_from(sorted(EXAMPLES)))]
    key = data.draw(st.sampled_from([place for place in places(parse(text, "x").data) if place]))
    value = data.draw(plain)
    new = edit.put(text, key, value)
    here = parse(new, "x").data
    for part in key:
        here = here[part]
    assert here == value
    comments = [line for line in text.splitlines() if line.strip().startswith("#")]
    if not isinstance(_at(text, key), dict | list):
        assert [line for line in new.splitlines() if line.strip().startswith("#")] == comments
        assert len(changed(text, new)[0]) <= 1


def _at(text, key):
    here = parse(text, "x").data
    for part in key:
        here = here[part]
    return here


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_option_of_any_example_can_be_taken_out(data):
    text = EXAMPLES[data.draw(st.sampled_from(sorted(EXAMPLES)))]
    keys = [place for place in places(parse(text, "x").data) if place and isinstance(place[-1], str)]
    key = data.draw(st.sampled_from(keys))
    new = edit.unset(text, key)
    assert key not in set(places(parse(new, "x").data))
    if not isinstance(_at(text, key), dict | list):
        outside = [line for line in text.splitlines() if line.strip().startswith("#")]
        assert [line for line in new.splitlines() if line.strip().startswith("#")] == outside
