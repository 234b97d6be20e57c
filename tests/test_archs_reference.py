"""The page of architectures is what the specs say."""

from pathlib import Path

from detour import archs
from detour.archs import reference

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"


def test_the_page_is_what_the_specs_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference.markdown(), f"run: {reference.COMMAND}"


def test_every_variant_has_a_row() -> None:
    text = reference.markdown()
    for name in archs.built():
        for variant in archs.spec(name).variants:
            assert f"| `{name}:{variant}` |" in text
