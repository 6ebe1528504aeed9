"""Optimizer, learning rates, averaged weights and loss scaling, as the arguments say."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

# torchvision's constants of --opt rmsprop.
RMSPROP_EPS, RMSPROP_ALPHA = 0.0316, 0.9
_NORMS = (_BatchNorm, nn.GroupNorm, nn.LayerNorm)


def make_optimizer(arguments: Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of `--opt` for the parameters that train."""
    groups, lr = _groups(arguments, model), arguments.lr
    if arguments.opt == "adamw":
        return torch.optim.AdamW(groups, lr)
    if arguments.opt == "rmsprop":
        return torch.optim.RMSprop(
            groups, lr, momentum=arguments.momentum, eps=RMSPROP_EPS, alpha=RMSPROP_ALPHA
        )
    nesterov = arguments.opt == "sgd_nesterov"
    return torch.optim.SGD(groups, lr, momentum=arguments.momentum, nesterov=nesterov)


def _groups(arguments: Namespace, model: nn.Module) -> list[dict[str, Any]]:
    """Parameters by weight decay, as torchvision has it: biases first, then those of norms."""
    decays = {
        "other": arguments.weight_decay,
        "norm": arguments.norm_weight_decay,
        "bias": arguments.bias_weight_decay,
    }
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in decays}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            kind = "norm" if isinstance(module, _NORMS) else "other"
            kind = "bias" if name == "bias" and decays["bias"] is not None else kind
            if parameter.requires_grad:
                groups[kind if decays[kind] is not None else "other"].append(parameter)
    return [
        {"params": groups[name], "weight_decay": decay}
        for name, decay in decays.items()
        if groups[name]
    ]


def lr_factor(arguments: Namespace) -> Callable[[int], float]:
    """By what --lr is multiplied in an epoch: the values of torchvision's sequence of schedulers.

    A function of the epoch alone, and no scheduler with a state of its own: what PyTorch's restore
    of theirs would keep the old --epochs when training is resumed with others.
    """

    def factor(epoch: int) -> float:
        warmup = arguments.lr_warmup_epochs
        if epoch < warmup:
            decay: float = arguments.lr_warmup_decay
            if arguments.lr_warmup_method == "linear":
                return decay + (1 - decay) * epoch / warmup
            return decay
        at = epoch - warmup
        if arguments.lr_scheduler == "cosineannealinglr":
            least = arguments.lr_min / arguments.lr
            share = at / (arguments.epochs - warmup)
            return least + (1 - least) * (1 + math.cos(math.pi * share)) / 2
        gamma: float = arguments.lr_gamma
        if arguments.lr_scheduler == "steplr":
            return gamma ** (at // arguments.lr_step_size)
        return gamma**at

    return factor


def make_average(arguments: Namespace, model: nn.Module, processes: int) -> AveragedModel | None:
    """The average of weights and statistics, or None without --model-ema.

    As torchvision has it, --model-ema-decay is of a run of as many updates as epochs: with more
    images in them, an update forgets more.
    """
    if not arguments.model_ema:
        return None
    decay = average_decay(arguments, processes)
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def average_decay(arguments: Namespace, processes: int) -> float:
    """What an update of the average keeps of it."""
    images = processes * step_images(arguments) * arguments.model_ema_steps
    return 1.0 - min(1.0, (1.0 - arguments.model_ema_decay) * images / arguments.epochs)


def step_images(arguments: Namespace) -> int:
    """Images of a process in a step."""
    return arguments.batch_size * arguments.grad_accum_steps


def make_scaler(arguments: Namespace, device: torch.device) -> torch.amp.GradScaler:
    """Scales losses whose gradients float16 could not hold; otherwise does nothing."""
    needed = arguments.amp and arguments.amp_dtype == "float16"
    return torch.amp.GradScaler(device.type, enabled=needed)


def amp_type(arguments: Namespace) -> torch.dtype | None:
    """The type of autocast, or None."""
    if not arguments.amp:
        return None
    return torch.float16 if arguments.amp_dtype == "float16" else torch.bfloat16


def kept(arguments: Namespace) -> tuple[str, ...]:
    """What the optimizer keeps of a parameter's size for it, by PyTorch's names."""
    if arguments.opt == "adamw":
        return "exp_avg", "exp_avg_sq"
    momentum = ("momentum_buffer",) if arguments.momentum > 0 else ()
    return ("square_avg", *momentum) if arguments.opt == "rmsprop" else momentum


def counts_steps(arguments: Namespace) -> bool:
    """Whether the optimizer counts the steps of each parameter."""
    return arguments.opt in ("adamw", "rmsprop")
