"""Splits of data sets that are drawn or read from packages, without files."""

import numpy as np

from subquad.lra.data import catalogue, store
from subquad.lra.data.listops import expressions
from subquad.lra.data.offline import corpora
from subquad.lra.data.pathfinder import pictures


def draw_pictures(config: pictures.Config, split: str) -> list[pictures.Example]:
    drawings = pictures.draw(config, pictures.split_range(config, split))
    return [pictures.Example(one.image, one.label) for one in drawings]


def generate(name: str) -> dict[str, store.Split]:
    found = catalogue.find_dataset(name)
    stored = {
        "lra_listops": lambda split: (
            {"inputs": np.frombuffer(one.tokens, np.uint8), "label": one.label}
            for one in expressions.generate(expressions.CONFIGS[found.config], split)
        ),
        "lra_pathfinder": lambda split: (
            {"image": one.image[..., None], "label": one.label}
            for one in draw_pictures(pictures.CONFIGS[found.config], split)
        ),
        "offline": lambda split: corpora.examples(found.config, split),
    }[found.builder]
    return {split: store.Split(list(stored(split)), found.encode) for split in found.slices}
