"""Networks as functions of inputs and parameters, so that everyone computes with the same ones."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .case import Function

Parameters = dict[str, Tensor]


def parameters_of(build: Callable[[], nn.Module], generator: torch.Generator) -> Parameters:
    """The initial state of a network on the generator's device; parameters require grad."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        network = build()
    trained = {name for name, _ in network.named_parameters()}
    state = {name: tensor.to(generator.device, copy=True) for name, tensor in network.state_dict().items()}
    return {name: tensor.requires_grad_(name in trained) for name, tensor in state.items()}


def functional(network: nn.Module, amp: torch.dtype | None = None) -> Callable[..., Any]:
    """`network` in training mode as a function of (parameters, *inputs), under autocast where asked for."""
    # Its own parameters are never read, so they need not exist.
    network = network.to("meta").train()

    def run(parameters: Parameters, *inputs: Any) -> Any:
        device = inputs[0].device.type
        with torch.autocast(device, amp) if amp is not None else nullcontext():
            return torch.func.functional_call(network, parameters, inputs)

    return run


def count_flops(network: nn.Module, *shape: int) -> int:
    """FLOPs of convolutions and matrix products of a forward pass; nothing is computed."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        network.to("meta")(torch.empty(shape, device="meta"))
    return counter.get_total_flops()


def checkpointed(function: Function) -> Function:
    """Recomputes everything in backward."""
    from torch.utils.checkpoint import checkpoint

    def run(**inputs: Any) -> Any:
        return checkpoint(function, use_reentrant=False, **inputs)

    return run
