"""Checkpoints: weights, configuration and plan in one file that loads without executing code."""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .config import Backend, Config
from .data.plan import Plan
from .errors import FocusNetError
from .files import atomic_write
from .model import FocusNet

FORMAT = 1
PARTS = ("snet", "sol", "sos")
_MOST_NODES = 1_000_000


@dataclass
class Model:
    """A network with everything prediction needs.

    Attributes:
        network: The network.
        config: Its configuration.
        plan: The plan of the data it was trained on: organs, ROI sizes, spacing.
        parts: The parts trained so far, of "snet", "sol", "sos".
    """

    network: FocusNet
    config: Config
    plan: Plan
    parts: tuple[str, ...]

    @property
    def small_labels(self) -> list[int]:
        """Label value of every small organ, in the order of the heat maps."""
        return [self.plan.organ_names.index(name) + 1 for name in self.plan.small_organs]


def build_network(config: Config, plan: Plan) -> FocusNet:
    """A network with fresh weights for the organs of `plan`."""
    sizes = [organ.roi_size for organ in plan.organs if organ.small and organ.roi_size is not None]
    network = FocusNet(config.model, len(plan.organs), sizes)
    # the layout in which 3D convolutions are fastest, on CPUs and GPUs alike; activations follow the weights
    return network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]


def save_checkpoint(path: Path, model: Model, training: dict[str, Any]) -> None:
    """Write `model` and the state of training (tensors, numbers, strings and containers of them) atomically.

    Raises:
        FocusNetError: the file cannot be written (read-only, disk full); what `path` held before is still there.
    """
    state = {
        "format": FORMAT,
        "config": model.config.to_dict(),
        "plan": model.plan.to_dict(),
        "parts": list(model.parts),
        "weights": model.network.state_dict(),
        "training": training,
    }
    with atomic_write(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:
            if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
                raise
            # all that torch's writer says of a failing disk is where in its own code it noticed
            raise OSError("its data could not be written whole; is the disk full?") from error


def load_checkpoint(path: Path, device: torch.device, backend: Backend | None = None) -> tuple[Model, dict[str, Any]]:
    """Read a checkpoint; only tensors and plain data are unpickled.

    Args:
        path: What `save_checkpoint` wrote.
        device: Where the network shall be.
        backend: In place of `model.backend` of the run.

    Raises:
        FocusNetError: `path` is missing, truncated or not a checkpoint of FocusNet.
    """
    if not path.is_file():
        raise FocusNetError(f"{path}: no such checkpoint")
    try:
        _check_archive(path)
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise FocusNetError(f"{path}: not a checkpoint, or damaged ({type(error).__name__})") from error
    version = state.get("format") if isinstance(state, dict) else None
    if type(version) is not int or version != FORMAT:
        raise FocusNetError(f"{path}: not a FocusNet checkpoint of format {FORMAT}")
    try:
        if sum(tensor.nbytes for tensor in _tensors(state)) > path.stat().st_size:
            raise ValueError("its tensors are larger than the file")
        if any(True for _ in _tensors([state["config"], state["plan"]])):
            raise ValueError("tensors in its configuration or plan")
        config, plan = Config.from_dict(state["config"]), Plan.from_dict(state["plan"])
        if backend is not None:
            config.model = replace(config.model, backend=backend)
        _check_weights(config, plan, state["weights"])
        network = build_network(config, plan).to(device)
        network.load_state_dict(state["weights"])
        parts, training = state["parts"], state["training"]
        if not isinstance(parts, list) or not set(parts) <= set(PARTS) or not isinstance(training, dict):
            raise ValueError("parts or the state of training are missing")
    except Exception as error:  # strange values may fail anywhere
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise FocusNetError(f"{path}: damaged checkpoint: {reason[:300]}") from error
    return Model(network, config, plan, tuple(parts)), training


def _check_archive(path: Path) -> None:
    """Check what torch does not: that the parts' checksums are right, and that they hold no more than the file."""
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
            raise zipfile.BadZipFile("torch stores, and does not compress")
        if sum(part.file_size for part in parts) > path.stat().st_size or archive.testzip() is not None:
            raise zipfile.BadZipFile("damaged")


def _tensors(state: Any) -> Iterator[torch.Tensor]:
    """All tensors in containers, which may share parts and so be far larger than what is stored of them."""
    nodes, seen = [state], 0
    while nodes:
        node, seen = nodes.pop(), seen + 1
        if isinstance(node, torch.Tensor):
            yield node
        elif isinstance(node, (dict, list, tuple)):
            nodes += node.values() if isinstance(node, dict) else node
        if seen + len(nodes) > _MOST_NODES:
            raise ValueError(f"it has more than {_MOST_NODES} values")


def _check_weights(config: Config, plan: Plan, weights: dict[str, torch.Tensor]) -> None:
    """Check that the weights are those of the configuration before a network of that size is built."""
    if config.model.dilated_blocks + len(plan.organs) > len(weights):
        raise ValueError(f"{len(weights)} tensors are too few for its configuration")
    with torch.device("meta"):
        expected = build_network(config, plan).state_dict()
    for name, tensor in expected.items():
        if name not in weights or weights[name].shape != tensor.shape:
            raise ValueError(f"its configuration asks for {name} of shape {tuple(tensor.shape)}")
