"""Optimizer, learning rates, averaged weights and loss scaling, as the arguments say."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

# torchvision's constants of --opt rmsprop.
RMSPROP_EPS, RMSPROP_ALPHA = 0.0316, 0.9


def make_optimizer(
    arguments: Namespace, parameters: Iterable[nn.Parameter]
) -> torch.optim.Optimizer:
    """The optimizer of `--opt` for the parameters that train."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    lr, decay = arguments.lr, arguments.weight_decay
    if arguments.opt == "adamw":
        return torch.optim.AdamW(trained, lr, weight_decay=decay)
    if arguments.opt == "rmsprop":
        return torch.optim.RMSprop(
            trained,
            lr,
            momentum=arguments.momentum,
            weight_decay=decay,
            eps=RMSPROP_EPS,
            alpha=RMSPROP_ALPHA,
        )
    return torch.optim.SGD(
        trained,
        lr,
        momentum=arguments.momentum,
        weight_decay=decay,
        nesterov=arguments.opt == "sgd_nesterov",
    )


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
    images = processes * arguments.batch_size * arguments.model_ema_steps
    forgotten = min(1.0, (1.0 - arguments.model_ema_decay) * images / arguments.epochs)
    return AveragedModel(
        model, multi_avg_fn=get_ema_multi_avg_fn(1.0 - forgotten), use_buffers=True
    )


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
