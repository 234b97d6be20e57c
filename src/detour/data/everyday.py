"""Prompts of everyday subjects, for whoever needs many different ones and has none: a subject, a place, a look.

The lengths of the lists have no common divisor, so that going round all three at once meets every combination once.
Three places are empty, for prompts that are short.
"""

from __future__ import annotations

SUBJECTS = (
    "a dog", "an old man with a beard", "a bowl of fruit", "a red bicycle", "a sleeping cat", "a young woman laughing",
    "a sailing ship", "a cup of coffee", "two children playing", "a vintage car", "an owl", "a stack of books",
    "a man in a suit", "a slice of cake", "a horse", "a violin", "a robot", "a woman with red hair", "a pair of boots",
    "a wooden chair", "a steam train", "a group of friends", "a lighthouse", "a plate of pasta", "an astronaut",
    "a bunch of sunflowers", "a little girl with a kite", "a typewriter", "a fox", "a street musician",
    "a stone bridge", "a glass bottle", "a knight in armour", "a basket of apples", "an elderly couple", "a parrot",
    "a leather bag", "a construction worker", "a small house", "a chef", "a shop sign that says \"OPEN\"",
)  # fmt: skip
PLACES = (
    "", "on a beach", "in a city street at night", "in a forest in autumn", "on a kitchen table", "",
    "in front of a brick wall", "in the snow", "in a cafe", "on a mountain meadow", "in an empty white room",
    "beside a lake at sunrise", "in heavy rain", "", "in a library", "on a market", "in a desert under a blue sky",
    "at a window with soft light", "in a garden full of flowers", "on a dark background", "in a workshop",
    "at a busy station", "under a starry sky",
)  # fmt: skip
LOOKS = (
    "{}", "a photo of {}", "{}, photorealistic", "a watercolour of {}", "a close-up photo of {}",
    "an oil painting of {}", "{}, 35 mm film photo with grain", "a pencil drawing of {}", "{}, cinematic light",
    "a flat vector illustration of {}", "{}, black and white photo", "a 3D render of {}", "{}, seen from above",
    "an anime drawing of {}", "{}, macro shot with a blurred background", "a wide shot of {}", "{}, pastel colours",
)  # fmt: skip
COUNT = len(SUBJECTS) * len(PLACES) * len(LOOKS)


def prompt(index: int) -> str:
    """The prompt by that number. Below `COUNT` no combination comes twice."""
    scene = f"{SUBJECTS[index % len(SUBJECTS)]} {PLACES[index % len(PLACES)]}".rstrip()
    return LOOKS[index % len(LOOKS)].format(scene)
