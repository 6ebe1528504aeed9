"""What converted modules have in common, whichever library they come from.

A converted module keeps its `__dict__`, and so its parameters, buffers, hooks and children. Only
its class is exchanged, for one of `adapters` that inherits from the library's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from densenet_fast import chain, eligibility, synchronized
from densenet_fast.conversion import subclasses
from densenet_fast.dense_block import backward_reads
from densenet_fast.graphs import refuse_scripting, routed
from densenet_fast.layers import FusedBlock
from densenet_fast.layers import Transition as FusedTransition
from densenet_fast.steps import Step


def _run(
    module: ConvertedBlock | ConvertedTransition, fused: Callable[[Tensor], Tensor], input: Tensor
) -> Tensor:
    """`fused`, our own module's run, of any input that the library's module takes.

    Ours refuse what holds nothing; the libraries' need not.
    """
    if isinstance(input, Tensor) and not input.numel():
        output: Tensor = module.converted_from.forward(module, input)
        return output
    return subclasses.restored(fused(subclasses.plain(input)), input)


class ConvertedBlock(FusedBlock):
    """A library's dense block, run as ours. The layers stay what they are.

    Its adapters are `class Block(ConvertedBlock, TheirBlock)`.
    """

    converted_from: type[nn.Module]

    def run(self, input: Tensor) -> Tensor:
        """The forward outside any graph, checked and fused where nothing is in the way."""
        return _run(self, super().run, input)

    def plain(self, input: Tensor) -> Tensor:
        """The library's own forward."""
        output: Tensor = self.converted_from.forward(self, input)
        return output


class ConvertedSequentialBlock(ConvertedBlock):
    """The same where the library's block is a Sequential, whose forward names its argument so."""

    def forward(self, input: Tensor) -> Tensor:
        """`input` [N, C, H, W] and the features of all layers behind it."""
        return super().forward(input)


class ConvertedTransition(FusedTransition):
    """A library's transition, run as ours.

    Its adapters are `class Transition(ConvertedTransition, TheirTransition)`.
    """

    converted_from: type[nn.Module]

    def run(self, input: Tensor) -> Tensor:
        """The forward outside any graph, checked and fused if nothing is in the way."""
        return _run(self, super().run, input)


class ConvertedFeatures(nn.Sequential):
    """A network's chain of stem, blocks and transitions, fused across their borders."""

    converted_from: type[nn.Module] = nn.Sequential

    def forward(self, input: Tensor) -> Tensor:
        """What the modules give one after another: [N, C, H, W] to [N, C', H', W']."""
        return routed(self, input, super().forward)

    __prepare_scriptable__ = refuse_scripting

    def run(self, input: Tensor) -> Tensor:
        """The same outside any graph."""
        images = subclasses.plain(input)
        planned = self._planned(images, None)
        if planned is None:
            return _writable(super().forward(input))
        return subclasses.restored(_writable(chain.run(planned[0], images)), input)

    def pooled(self, input: Tensor, final: chain.FinalObstacle) -> Tensor | None:
        """[N, C']: the features behind ReLU and the average over all pixels.

        None, and nothing computed, where the last norm is not fused with these two.
        """
        images = subclasses.plain(input)
        steps, pooled = self._planned(images, final) or ([], False)
        return subclasses.restored(chain.run(steps, images), input) if pooled else None

    def _planned(
        self, input: Tensor, final: chain.FinalObstacle | None
    ) -> tuple[list[Step], bool] | None:
        """What `chain.steps` says, or None where the modules must be called one by one."""
        if not isinstance(input, Tensor) or eligibility.input(input) is not None:
            return None
        synchronized.check_modules(self, input.device)
        modules: list[Any] = list(self._modules.values())
        return chain.steps(modules, eligibility.parameter_type(input), input.device, final=final)


def _writable(features: Tensor) -> Tensor:
    # The ReLU of the libraries' heads works in place, also behind a last norm that was taken out.
    return features.clone() if backward_reads(features) else features


class ConvertedNetwork(nn.Module):
    """A library's network whose head is known to be ReLU, average over all pixels, and the rest.

    Its adapters are `class Network(ConvertedNetwork, TheirNetwork)`.
    """

    converted_from: type[nn.Module]
    final: chain.FinalObstacle = staticmethod(chain.final_norm_obstacle)

    def forward(self, x: Tensor) -> Tensor:
        """What the library's own forward gives."""
        return routed(self, x, self.plain)

    def plain(self, input: Tensor) -> Tensor:
        """The library's own forward."""
        output: Tensor = self.converted_from.forward(self, input)
        return output

    __prepare_scriptable__ = refuse_scripting

    def run(self, input: Tensor) -> Tensor:
        """The same outside any graph."""
        pooled = self.pooled(input)
        return self.plain(input) if pooled is None else self.head(pooled)

    def pooled(self, input: Tensor) -> Tensor | None:
        """The pooled features [N, C], or None where the library's forward must make them."""
        features = self._modules.get("features")
        if not isinstance(features, ConvertedFeatures) or eligibility.touched(features):
            return None
        if not self.head_is_known():
            return None
        return features.pooled(input, self.final)

    def head_is_known(self) -> bool:
        """Whether the modules between the features and what `head` does are what they were."""
        return True

    def head(self, pooled: Tensor) -> Tensor:
        """The library's forward behind the pooling."""
        raise NotImplementedError


# Attributes of a converted module that its library's class does not have.
OWN_ATTRIBUTES = ("_checkpoint",)


def is_converted(module: nn.Module) -> bool:
    """Whether the module's exact class is one of the adapters."""
    return "converted_from" in type(module).__dict__
