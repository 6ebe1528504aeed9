"""The operators of densenet_fast run by the CUDA launchers and kernels, on CPU tensors.

`EmulatedOps(library)` has one method for every operator, with the operator's own signature, so that
it can stand in for the compiled operators anywhere, whole networks included.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import Structure, addressof, byref, c_char_p, c_double, c_int, c_int64, c_uint64
from ctypes import c_void_p as pointer
from typing import Any

import torch
from emulated_arguments import (
    NormArgument,
    NormBackward,
    RunningUpdate,
    coefficients,
    image_of,
    norm_of,
    pair,
    weight_gradient,
    weight_of,
)
from torch import Tensor

DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}


class EmulatedOps:
    """All operators, run under the emulator."""

    def __init__(self, library: ctypes.CDLL, *, allow_tf32: bool = False) -> None:
        """Call into `library`, built from csrc/cuda and kernels_api.cpp."""
        self.library = library
        self.allow_tf32 = allow_tf32

    def _call(self, op: str, like: Tensor, *arguments: object) -> None:
        function = getattr(self.library, f"df_{op}")
        function.restype = c_char_p
        passed = [byref(a) if isinstance(a, Structure) else a for a in arguments]
        error = function(c_int(DTYPES[like.dtype]), c_int(self.allow_tf32), *passed)
        if error is not None:
            raise RuntimeError(error.decode())

    def channel_statistics(self, features: Tensor, mean: Tensor, var: Tensor) -> None:
        self._call("channel_statistics", features, image_of(features), pair(mean, var))

    def norm_coefficients(
        self,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        scale: Tensor,
        shift: Tensor,
        rstd: Tensor,
    ) -> None:
        norm = coefficients(mean, var, weight, bias, eps, scale, shift, rstd)
        self._call("norm_coefficients", mean, norm, c_int64(1))

    def statistics_and_norm(
        self, features: Tensor, mean: Tensor, var: Tensor, *others: Any
    ) -> None:
        norm = coefficients(mean, var, *others)
        found = pair(*(t[-features.shape[-1] :] for t in (mean, var)))
        found.next = addressof(norm)
        self._call("channel_statistics", features, image_of(features), found)

    def update_running_statistics_(
        self,
        statistics: Tensor,
        running: Sequence[Tensor],
        counters: Sequence[Tensor],
        places: Sequence[int],
        momenta: Sequence[float],
        count: int,
    ) -> None:
        updates = (RunningUpdate * len(momenta))()
        for index, momentum in enumerate(momenta):
            mean, var, total, channels = places[4 * index : 4 * index + 4]
            at = [None if p < 0 else statistics[p:].data_ptr() for p in (mean, var, total)]
            buffers = [t.data_ptr() for t in running[2 * index : 2 * index + 2]]
            updates[index] = RunningUpdate(channels, *at, count, momentum, *buffers)
        ones = (pointer * len(counters))(*(counter.data_ptr() for counter in counters))
        sizes = c_int64(len(updates)), c_int64(len(ones))
        name = "update_running_statistics_"
        self._call(name, statistics, updates, sizes[0], ones, sizes[1])

    def norm_grad_coefficients(
        self,
        scale: Tensor,
        mean: Tensor,
        rstd: Tensor,
        grad_gamma: Tensor | None,
        grad_beta: Tensor | None,
        count: int,
        coefficients: Tensor,
    ) -> None:
        norm = NormArgument(scale.data_ptr(), None, mean.data_ptr(), rstd.data_ptr())
        values = 0 if grad_gamma is None else count
        next = NormBackward(scale.numel(), norm, values, coefficients.data_ptr())
        self._call("norm_grad_coefficients", scale, next, pair(grad_gamma, grad_beta))

    def _forward(
        self,
        op: str,
        features: Tensor,
        scale: Tensor,
        shift: Tensor,
        weight: Tensor,
        out: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        linear: bool = False,
    ) -> None:
        act = NormArgument(scale.data_ptr(), shift.data_ptr(), None, None, linear)
        statistics = pair(mean, var)
        self._call(
            op,
            features,
            image_of(features),
            act,
            weight_of(weight),
            image_of(out),
            statistics,
        )

    def conv1x1_forward(self, *arguments: Tensor) -> None:
        self._forward("conv1x1_forward", *arguments)

    def conv3x3_forward(self, *arguments: Tensor) -> None:
        self._forward("conv3x3_forward", *arguments)

    def transition_forward(self, *arguments: Any) -> None:
        self._forward("transition_forward", *arguments)

    def conv1x1_backward(
        self,
        grad_norm: Tensor,
        bottleneck: Tensor,
        coefficients: Tensor,
        features: Tensor,
        scale: Tensor,
        shift: Tensor,
        mean: Tensor,
        rstd: Tensor,
        weight: Tensor,
        grad_features: Tensor | None,
        grad_gamma: Tensor | None,
        grad_beta: Tensor | None,
        grad_weight: Tensor | None,
    ) -> None:
        self._call(
            "conv1x1_backward",
            features,
            image_of(grad_norm),
            image_of(bottleneck),
            pointer(coefficients.data_ptr()),
            image_of(features),
            norm_of(scale, shift, mean, rstd),
            weight_of(weight),
            image_of(grad_features),
            pair(grad_gamma, grad_beta),
            weight_gradient(grad_weight),
        )

    def _backward(
        self,
        op: str,
        grad: Tensor,
        features: Tensor,
        scale: Tensor,
        shift: Tensor,
        mean: Tensor,
        rstd: Tensor,
        weight: Tensor,
        grad_features: Tensor | None,
        grad_gamma: Tensor | None,
        grad_beta: Tensor | None,
        grad_weight: Tensor | None,
        flag: bool = False,
    ) -> None:
        accumulates = op == "conv3x3_backward"
        self._call(
            op,
            features,
            image_of(grad),
            image_of(features),
            norm_of(scale, shift, mean, rstd, linear=flag and not accumulates),
            weight_of(weight),
            image_of(grad_features),
            pair(grad_gamma, grad_beta),
            weight_gradient(grad_weight),
            *([c_int(flag)] if accumulates else []),
        )

    def conv3x3_backward(self, *arguments: Any) -> None:
        self._backward("conv3x3_backward", *arguments)

    def transition_backward(self, *arguments: Any) -> None:
        self._backward("transition_backward", *arguments)

    def dropout_(self, growth: Tensor, seed: int, p: float, channels: bool = False) -> None:
        seed %= 1 << 64
        probability = c_double(p)
        self._call(
            "dropout_", growth, image_of(growth), c_uint64(seed), probability, c_int(channels)
        )

    def finish_gradient(
        self,
        features: Tensor,
        grad_features: Tensor,
        mean: Tensor,
        sum_grad: Tensor,
        sum_grad_x: Tensor,
        out: Tensor,
    ) -> None:
        vectors = [pointer(v.data_ptr()) for v in (mean, sum_grad, sum_grad_x)]
        images = image_of(features), image_of(grad_features)
        self._call("finish_gradient", features, *images, *vectors, image_of(out))

    def norm_relu_avgpool_forward(
        self, features: Tensor, scale: Tensor, shift: Tensor, out: Tensor
    ) -> None:
        act = NormArgument(scale.data_ptr(), shift.data_ptr(), None, None)
        result = pointer(out.data_ptr())
        self._call("norm_relu_avgpool_forward", features, image_of(features), act, result)

    def norm_relu_avgpool_backward(
        self,
        grad_out: Tensor,
        features: Tensor,
        scale: Tensor,
        shift: Tensor,
        mean: Tensor,
        rstd: Tensor,
        grad_features: Tensor,
        grad_gamma: Tensor,
        grad_beta: Tensor,
    ) -> None:
        self._call(
            "norm_relu_avgpool_backward",
            features,
            pointer(grad_out.data_ptr()),
            image_of(features),
            norm_of(scale, shift, mean, rstd),
            image_of(grad_features),
            pair(grad_gamma, grad_beta),
        )

    def sums_and_backward(
        self,
        grad_out: Tensor,
        features: Tensor,
        scale: Tensor,
        shift: Tensor,
        mean: Tensor,
        rstd: Tensor,
        grad_features: Tensor,
        grad_gamma: Tensor,
        grad_beta: Tensor,
        count: int,
        *results: Tensor,
    ) -> None:
        norm, sums = norm_of(scale, shift, mean, rstd), pair(grad_gamma, grad_beta)
        next = NormBackward(len(scale), norm, count, *(t.data_ptr() for t in results))
        sums.next = addressof(next)
        self._call(
            "norm_relu_avgpool_backward",
            features,
            pointer(grad_out.data_ptr()),
            image_of(features),
            norm,
            image_of(grad_features),
            sums,
        )

    def norm_relu_maxpool_forward(
        self, input: Tensor, scale: Tensor, shift: Tensor, out: Tensor, argmax: Tensor
    ) -> None:
        act = NormArgument(scale.data_ptr(), shift.data_ptr(), None, None)
        codes = pointer(argmax.data_ptr())
        self._call(
            "norm_relu_maxpool_forward",
            input,
            image_of(input),
            act,
            image_of(out),
            codes,
        )

    def norm_relu_maxpool_backward(
        self,
        grad_out: Tensor,
        argmax: Tensor,
        input: Tensor,
        scale: Tensor,
        shift: Tensor,
        mean: Tensor,
        rstd: Tensor,
        batch_statistics: bool,
        grad_input: Tensor,
        grad_gamma: Tensor,
        grad_beta: Tensor,
    ) -> None:
        self._call(
            "norm_relu_maxpool_backward",
            input,
            image_of(grad_out),
            pointer(argmax.data_ptr()),
            image_of(input),
            norm_of(scale, shift, mean, rstd),
            c_int(batch_statistics),
            image_of(grad_input),
            pair(grad_gamma, grad_beta),
        )
