"""TorchScript and torch.fx of converted networks: what they make of the library's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from library_networks import LIBRARIES, NETWORKS, TOLERANCE, images, make
from torch import Tensor, nn

from densenet_fast import convert
from densenet_fast.conversion.parts import is_converted


class Around(nn.Module):
    """A model with a DenseNet inside, as segmentation networks have."""

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x).mean((2, 3))


def scripted(model: nn.Module, symbolically: bool) -> Any:
    return torch.jit.script(torch.fx.symbolic_trace(model) if symbolically else model)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("around", [False, True], ids=["whole", "inside another"])
@pytest.mark.parametrize("symbolically", [False, True], ids=["script", "symbolic trace, script"])
@pytest.mark.parametrize("name", NETWORKS)
def test_converted_networks_script_as_before(name: str, symbolically: bool, around: bool) -> None:
    model: Any = make(name)
    if around:
        model = Around(model.features)
    try:
        expected = scripted(copy.deepcopy(model), symbolically)
        expected(images()).square().sum().backward()
    except Exception as error:  # TorchScript's, torch.fx's and Python's
        pytest.skip(f"not the library's own either: {type(error).__name__}")
    convert(model)
    before = [type(part) for part in model.modules()]
    program = scripted(model, symbolically)
    assert [type(part) for part in model.modules()] == before  # still converted
    program(images()).square().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    wanted = [p.grad for p in expected.parameters() if p.grad is not None]
    for one, other in zip(gradients, wanted, strict=True):
        close(one, other)
    close(program.eval()(images()), expected.eval()(images()))


@pytest.mark.parametrize("library", LIBRARIES)
def test_converted_modules_go_by_the_librarys_names(library: str) -> None:
    model = make(library)
    names = [type(part).__name__ for part in model.modules()]
    text = repr(model)
    convert(model)
    assert any(is_converted(part) for part in model.modules())
    assert [type(part).__name__ for part in model.modules()] == names
    assert repr(model) == text


@pytest.mark.parametrize("library", LIBRARIES)
def test_wrong_calls_get_the_librarys_error(library: str) -> None:
    model = make(library)
    messages = []
    for _ in range(2):
        for args, kwargs in (((), {}), ((images(), 1), {}), ((images(),), {"y": 1})):
            with pytest.raises(TypeError) as error:
                model.features.denseblock1(*args, **kwargs)
            messages.append(str(error.value))
        if len(messages) == 3:
            convert(model)
    assert messages[:3] == messages[3:]
