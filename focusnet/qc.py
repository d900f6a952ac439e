"""The QC picture: three planes with outlines, then a close-up of every small organ with its ROI."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .checkpoint import Model
from .data.images import Volume
from .inference import Segmentation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WINDOW_HU = (-160.0, 240.0)
COLUMNS = 3


def draw_qc(path: Path, image: Volume, result: Segmentation, model: Model) -> None:
    """Draw outlines on `image` (HU on the network's grid) and save a PNG.

    A cross marks the heat map's peak and a dashed box the ROI of a small organ; the title warns of a low peak.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels, names = result.labels.cpu().numpy(), model.plan.organ_names
    small = model.plan.small_organs[: len(result.peaks)]
    rows = 1 + -(-len(small) // COLUMNS)
    figure = Figure(figsize=(4.5 * COLUMNS, 4.5 * rows + 0.5), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = np.atleast_2d(figure.subplots(rows, COLUMNS))
    colors = _colors(len(names))
    middle = _middle(labels)
    for axis, title in enumerate(("axial", "coronal", "sagittal")):
        _draw_plane(axes[0, axis], image, labels, axis, middle[axis], colors, title)
    for ax, organ in zip(axes[1:].flat, range(len(small)), strict=False):
        _draw_close_up(ax, image, labels, result, model, organ, colors)
    for ax in axes[1:].flat[len(small) :]:
        ax.set_visible(False)
    present = [value for value in range(1, len(names) + 1) if (labels == value).any()]
    handles = [_line(colors[value - 1]) for value in present]
    figure.legend(handles, [names[value - 1] for value in present], loc="outside lower center", ncols=6, fontsize=8)
    figure.savefig(path, dpi=80, format="png")


def _draw_close_up(
    ax: "Axes", image: Volume, labels: np.ndarray, result: Segmentation, model: Model, organ: int, colors: Any
) -> None:
    name, size = model.plan.small_organs[organ], model.network.roi_sizes[organ]
    z, y, x = result.peaks[organ].tolist()
    height = float(result.peak_values[organ])
    mask = labels == model.small_labels[organ]
    index = round(float(np.argwhere(mask)[:, 0].mean())) if mask.any() else z
    warning = "" if height >= model.config.predict.min_peak else "  LOW PEAK"
    _draw_plane(ax, image, labels, 0, index, colors, f"{name}, peak {height:.2f}{warning}")
    top, left = y - size[1] // 2, x - size[2] // 2
    corners_x = np.array([left, left + size[2], left + size[2], left, left]) - 0.5
    corners_y = np.array([top, top, top + size[1], top + size[1], top]) - 0.5
    ax.plot(corners_x, corners_y, "w--", linewidth=0.8)
    ax.plot(x, y, "w+", markersize=8)
    margin = max(size[1:]) * 0.75
    ax.set_xlim(max(-0.5, x - margin), min(labels.shape[2] - 0.5, x + margin))
    ax.set_ylim(min(labels.shape[1] - 0.5, y + margin), max(-0.5, y - margin))


def _draw_plane(ax: "Axes", image: Volume, labels: np.ndarray, axis: int, index: int, colors: Any, title: str) -> None:
    spacing = [s for other, s in enumerate(image.grid.spacing) if other != axis]
    hu, plane = image.array.take(index, axis), labels.take(index, axis)
    origin: Literal["upper", "lower"] = "upper" if axis == 0 else "lower"
    aspect = spacing[0] / spacing[1]
    ax.imshow(hu, cmap="gray", vmin=WINDOW_HU[0], vmax=WINDOW_HU[1], origin=origin, aspect=aspect)
    rows, columns = (np.arange(-1, n + 1) for n in plane.shape)
    for value in np.unique(plane[plane > 0]):
        # with a rim, so that outlines close at the volume's faces and a plane one voxel thin has them too
        ax.contour(columns, rows, np.pad(plane == value, 1), levels=[0.5], colors=[colors[value - 1]], linewidths=1.0)
    ax.set_xlim(-0.5, plane.shape[1] - 0.5)
    ax.set_ylim(*((plane.shape[0] - 0.5, -0.5) if axis == 0 else (-0.5, plane.shape[0] - 0.5)))
    ax.set_title(title, fontsize=9)
    ax.set_axis_off()


def _middle(labels: np.ndarray) -> list[int]:
    """The planes through the middle of all organs, or of the volume."""
    voxels = np.argwhere(labels > 0)
    if not len(voxels):
        return [n // 2 for n in labels.shape]
    return [int(v) for v in (voxels.min(axis=0) + voxels.max(axis=0)) // 2]


def _colors(count: int) -> Any:
    from matplotlib import colormaps

    return colormaps["hsv"](np.linspace(0, 1, count, endpoint=False))


def _line(color: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color)
