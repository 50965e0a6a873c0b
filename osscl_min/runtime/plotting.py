"""What every figure shares: palette, panels, legends, pictures, saving.

Drawn without pyplot, so that nothing stays open and no display is needed. Colours are Okabe and Ito's and
matplotlib's perceptually uniform maps, which colour-blind readers can tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from osscl_min.runtime.files import replacing

BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, BLACK = COLOURS = (
    "#0072B2 #E69F00 #009E73 #D55E00 #CC79A7 #56B4E9 #000000".split()
)
GREY = "#777777"
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e4e4e4"}


def panels(
    title: str, synthetic: bool, names: Sequence[str], columns: int = 3, size=(3.6, 2.9), **shared: Any
) -> tuple[Figure, list[Axes]]:
    """A figure with a panel of `size` (inches) for each name; `shared` goes to `Figure.subplots`."""
    rows = math.ceil(len(names) / columns)
    columns = math.ceil(len(names) / rows)
    with matplotlib.rc_context(STYLE):
        figure = Figure((max(6.5, size[0] * columns), size[1] * rows + 0.8), layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False, **shared).flat)
    figure.get_layout_engine().set(h_pad=0.08)
    figure.suptitle(title + (" (synthetic data)" if synthetic else ""), fontsize=13)
    for ax, name in zip(axes, names, strict=False):
        ax.set_title(name, fontsize=10.5)
        ax.set_axisbelow(True)
        ax.tick_params(labelbottom=True)
    for ax in axes[len(names) :]:
        ax.remove()
    return figure, axes[: len(names)]


def legend(figure: Figure, axes: Sequence[Axes], place: str = "lower center", **look: Any) -> None:
    """One legend for several panels, outside them, in a few columns; a label that they share appears once."""
    found = {label: line for ax in axes for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    look = {"ncols": 4 if figure.get_figwidth() > 9 else 2} | look
    figure.legend(found.values(), found.keys(), loc=f"outside {place}", frameon=False, **look)


def picture(
    ax: Axes, values: np.ndarray, colours: str, limits: Sequence[float], extent: Sequence[float]
) -> AxesImage:
    """Draw rows of values, the first at the bottom, as colours between two limits; returns the image."""
    image = ax.imshow(values, colours, aspect="auto", origin="lower", extent=extent, interpolation="nearest")
    image.set_clim(*limits)
    ax.grid(False)
    return image


def signed(ax: Axes, values: np.ndarray, extent: Sequence[float], label: str, most: float = 0) -> None:
    """The same for values of both signs, white at 0, with a colour bar; `most` by default their largest."""
    most = most or np.abs(values).max() or 1.0
    image = picture(ax, values, "RdBu_r", (-most, most), extent)
    ax.figure.colorbar(image, ax=ax, pad=0.02, label=label)


def save(figure: Figure, path: Path | str) -> None:
    """Write a figure, replacing the file as a whole; its suffix gives the format, by default PNG."""
    path = Path(path)
    with replacing(path, "wb") as file:
        figure.savefig(file, format=path.suffix[1:] or "png", dpi=130)


def save_all(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Write figures into a folder by their names, as PNG and PDF; returns the PNG files."""
    for name, figure in figures.items():
        for ending in ("png", "pdf"):
            save(figure, folder / f"{name}.{ending}")
            figure.set_layout_engine("none")  # computed once: it takes as long as drawing
    return [folder / f"{name}.png" for name in figures]
