"""The QC picture: three planes through all organs, then three planes through every organ, the small ones first."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .checkpoint import Model
from .data.images import Volume
from .data.organs import organ_color
from .inference import Segmentation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WINDOW_HU = (-160.0, 240.0)
DPI = 80
WIDTH = 14.4
"""Inches, as are the others."""
OVERVIEW, CLOSE_UP, TITLE = WIDTH / 3, WIDTH / 6, 0.3
MARGIN_MM = 15.0
PLANES = ("axial", "coronal", "sagittal")
#: Of each plane, what lies at its left, right, top and bottom: the network's grid runs along the patient's axes.
_EDGES = (("R", "L", "A", "P"), ("R", "L", "S", "I"), ("A", "P", "S", "I"))
_BAR_MM = 10.0

Sides = list[tuple[float, float]]


def draw_qc(path: Path, image: Volume, result: Segmentation, model: Model) -> None:
    """Draw outlines on `image` (HU on the network's grid) and save a PNG.

    Of a small organ, a cross marks the heat map's peak and a dashed box the ROI; the title warns of a low peak.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = _Drawing(image, result, model)
    values = [*model.small_labels, *(v for v, organ in enumerate(model.plan.organs, start=1) if not organ.small)]
    values = [value for value in values if drawing.center(value) is not None]
    rows = -(-len(values) // 2)
    height = TITLE + OVERVIEW + rows * (TITLE + CLOSE_UP)
    figure = Figure(figsize=(WIDTH, height), facecolor="black")
    FigureCanvasAgg(figure)
    middle = drawing.middle()
    for axis, plane in enumerate(PLANES):
        ax = _axes(figure, axis * OVERVIEW, TITLE, OVERVIEW)
        ax.set_title(plane, color="white", fontsize=9, pad=3)
        drawing.plane(ax, axis, middle, drawing.whole())
        _name_edges(ax, axis)
    for number, value in enumerate(values):
        left = (number % 2) * 3 * CLOSE_UP
        top = TITLE + OVERVIEW + (number // 2) * (TITLE + CLOSE_UP) + TITLE
        light = [(1 + part) / 2 for part in drawing.colors[value]]
        figure.text((left + 0.05) / WIDTH, 1 - (top - 0.04) / height, drawing.title(value), color=light, fontsize=10)
        for axis in range(3):
            drawing.close_up(_axes(figure, left + axis * CLOSE_UP, top, CLOSE_UP), axis, value)
    figure.savefig(path, dpi=DPI, format="png")


class _Drawing:
    """What all panels of one picture share."""

    def __init__(self, image: Volume, result: Segmentation, model: Model) -> None:
        from scipy.ndimage import find_objects

        self.image, self.result, self.model = image, result, model
        self.labels = result.labels.cpu().numpy()
        names = model.plan.organ_names
        self.colors = {value: [part / 255 for part in organ_color(name)] for value, name in enumerate(names, start=1)}
        self.boxes = dict(enumerate(find_objects(self.labels, max_label=len(names)), start=1))
        peaks = zip(model.small_labels, result.peaks.tolist(), result.peak_values.tolist())
        self.peaks = {value: (peak, height) for value, peak, height in peaks}
        self.rois = dict(zip(model.small_labels, model.network.roi_sizes))

    def whole(self) -> Sides:
        return [(-0.5, n - 0.5) for n in self.labels.shape]

    def middle(self) -> list[int]:
        """Through the middle of all organs, or of the volume."""
        boxes = [box for box in self.boxes.values() if box is not None] or [
            tuple(slice(0, n) for n in self.labels.shape)
        ]
        return [
            (min(box[axis].start for box in boxes) + max(box[axis].stop for box in boxes)) // 2 for axis in range(3)
        ]

    def center(self, value: int) -> list[int] | None:
        """Of the organ, or its peak where it was not found; None if there is neither."""
        box = self.boxes[value]
        if box is None:
            return self.peaks[value][0] if value in self.peaks else None
        mask = self.labels[box] == value
        return [int(c) + side.start for c, side in zip(np.argwhere(mask).mean(axis=0).round(), box)]

    def title(self, value: int) -> str:
        name = self.model.plan.organ_names[value - 1]
        found = "" if self.boxes[value] is not None else "  NOT FOUND"
        if value not in self.peaks:
            return name + found
        height = self.peaks[value][1]
        low = "  LOW PEAK" if height < self.model.config.predict.min_peak else ""
        return f"{name}{found}  peak {height:.2f}{low}"

    def close_up(self, ax: "Axes", axis: int, value: int) -> None:
        center = self.center(value)
        assert center is not None
        spacing, sides = np.array(self.image.grid.spacing), self._around(value)
        # a cube, so that the three planes have one scale
        half = max((high - low) * step for (low, high), step in zip(sides, spacing)) / 2
        middles = [(low + high) / 2 for low, high in sides]
        self.plane(ax, axis, center, [(m - half / step, m + half / step) for m, step in zip(middles, spacing)])
        if value in self.peaks:
            self._draw_roi(ax, axis, value)
        if axis == 0:
            self._draw_bar(ax)

    def plane(self, ax: "Axes", axis: int, center: list[int], sides: Sides) -> None:
        """Draw the part between `sides` of the plane across `axis` through `center`."""
        shape = self.labels.shape
        index = min(max(center[axis], 0), shape[axis] - 1)
        rows, columns = (other for other in range(3) if other != axis)
        part = tuple(
            slice(max(0, int(low)), min(n, int(high) + 2)) for n, (low, high) in zip(shape, sides)
        )  # a voxel more, which the limits cut
        hu = self.image.array.take(index, axis)[part[rows], part[columns]]
        plane = self.labels.take(index, axis)[part[rows], part[columns]]
        top, left = part[rows].start, part[columns].start
        extent = (left - 0.5, left + plane.shape[1] - 0.5, top - 0.5, top + plane.shape[0] - 0.5)
        aspect = self.image.grid.spacing[rows] / self.image.grid.spacing[columns]
        low, high = WINDOW_HU
        if hu.size:
            ax.imshow(hu, cmap="gray", vmin=low, vmax=high, origin="lower", extent=extent, aspect=aspect)
        y, x = (np.arange(-1, n + 1) + start for n, start in zip(plane.shape, (top, left)))
        for value in np.unique(plane[plane > 0]):
            # with a rim, so that outlines close at the volume's faces and a plane one voxel thin has them too
            ax.contour(x, y, np.pad(plane == value, 1), levels=[0.5], colors=[self.colors[value]], linewidths=1.2)
        ax.set_xlim(*sides[columns])
        ax.set_ylim(*(sides[rows][::-1] if axis == 0 else sides[rows]))
        ax.set_aspect(aspect)

    def _around(self, value: int) -> Sides:
        """The organ's box with a margin; of a small organ, its ROI too."""
        sides: Sides = []
        if (box := self.boxes[value]) is not None:
            margins = [MARGIN_MM / step for step in self.image.grid.spacing]
            sides = [(side.start - 0.5 - m, side.stop - 0.5 + m) for side, m in zip(box, margins)]
        if value in self.peaks:
            roi = self._roi(value)
            sides = [(min(a, c), max(b, d)) for (a, b), (c, d) in zip(sides or roi, roi)]
        return sides

    def _roi(self, value: int) -> Sides:
        peak, size = self.peaks[value][0], self.rois[value]
        return [(p - n // 2 - 0.5, p - n // 2 + n - 0.5) for p, n in zip(peak, size)]

    def _draw_roi(self, ax: "Axes", axis: int, value: int) -> None:
        peak, roi = self.peaks[value][0], self._roi(value)
        (top, bottom), (left, right) = (side for other, side in enumerate(roi) if other != axis)
        y, x = (p for other, p in enumerate(peak) if other != axis)
        ax.plot([left, right, right, left, left], [top, top, bottom, bottom, top], "w--", linewidth=0.8)
        ax.plot(x, y, "w+", markersize=8)

    def _draw_bar(self, ax: "Axes") -> None:
        long = _BAR_MM / self.image.grid.spacing[2]
        (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
        x, y = left + 0.04 * (right - left), bottom + 0.04 * (top - bottom)
        ax.plot([x, x + long], [y, y], color="white", linewidth=2)
        ax.text(x, y + 0.02 * (top - bottom), f"{_BAR_MM:g} mm", color="white", fontsize=7, va="bottom")


def _axes(figure: "Figure", left: float, top: float, size: float) -> "Axes":
    width, height = figure.get_size_inches()
    gap = 0.03
    ax = figure.add_axes(
        (left / width + gap / width, 1 - (top + size) / height, (size - 2 * gap) / width, (size - 2 * gap) / height)
    )
    ax.set_axis_off()
    return ax


def _name_edges(ax: "Axes", axis: int) -> None:
    places: tuple[dict[str, Any], ...] = (
        {"x": 0.01, "y": 0.5, "ha": "left", "va": "center"},
        {"x": 0.99, "y": 0.5, "ha": "right", "va": "center"},
        {"x": 0.5, "y": 0.99, "ha": "center", "va": "top"},
        {"x": 0.5, "y": 0.01, "ha": "center", "va": "bottom"},
    )
    for letter, place in zip(_EDGES[axis], places):
        ax.text(s=letter, transform=ax.transAxes, color="white", fontsize=9, **place)
