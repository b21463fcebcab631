"""Draws memory_transformer.png and .pdf: peak memory of one task's meta-gradient of a Transformer by depth, width,
length and inner steps together, every panel on one scale."""

from pathlib import Path

from drawing import draw_alone
from figure_memory_deep import draw_panels


def draw(folder: Path) -> None:
    sizes, title = ("depth", "width"), "{:g} blocks,\nwidth {:g}"
    draw_panels(folder, "memory_transformer", sizes, "dataset.dimension", "sequence length", title)


if __name__ == "__main__":
    draw_alone(draw)
