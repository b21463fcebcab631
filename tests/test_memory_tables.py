"""What the tables of memory by several sizes say, and that each number of inner steps has a panel."""

from itertools import product

import figure_memory_deep
import figure_memory_transformer

from fobmaml.files import write_csv

OF_ONE_STEP = {"symmetric": 2.0, "tangent": 1.0, "imaml": 1.5, "maml_checkpoint": 1.2, "maml": 3.0}


def _table(folder, name, growth, of_maml=1.0):
    """Memory as depth × width; MAML's grows with the steps, symmetric's as ``growth`` says."""
    rows = []
    for depth, width, length, steps, estimator in product((2, 4), (8, 16), (10, 20), (5, 10), OF_ONE_STEP):
        grown = {"maml": of_maml * steps, "symmetric": growth if steps == 10 else 1.0}.get(estimator, 1.0)
        size = {"estimator": estimator, "depth": depth, "width": width, "dataset.dimension": length}
        bytes_taken = depth * width * length * OF_ONE_STEP[estimator] * grown
        rows.append(size | {"solver.steps": steps, "memory/peak_bytes": bytes_taken})
    write_csv(folder / f"{name}.csv", rows)


def test_panels(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(figure_memory_deep, "save", lambda figure, _, name: drawn.setdefault(name, figure))
    for name in ("memory_deep", "memory_transformer"):
        _table(tmp_path, name, 1.0)
    figure_memory_deep.draw(tmp_path)
    figure_memory_transformer.draw(tmp_path)
    assert {name: len(figure.axes) for name, figure in drawn.items()} == {"memory_deep": 4, "memory_transformer": 8}
    for figure in drawn.values():
        assert len({ax.get_ylim() for ax in figure.axes}) == 1  # on one scale
        assert all(len(ax.lines) == len(OF_ONE_STEP) for ax in figure.axes)
