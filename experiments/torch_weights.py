"""Weights of the flax models as tensors for experiments/torch_models.py. Import this file only where PyTorch is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]

from coalesce.models import Model
from coalesce.models.mobilenet import MobileNet
from coalesce.models.recurrent import Recurrent
from coalesce.models.resnet import ResNet
from coalesce.models.transformer import Bert
from coalesce.models.vit import ViT


def tensor(x: Any, device: str) -> Any:
    """An array of JAX as a tensor; bfloat16, which NumPy lacks, travels as float32 without loss."""
    dtype = getattr(torch, str(x.dtype))
    wide = np.float32 if str(x.dtype) == "bfloat16" else x.dtype
    return torch.tensor(np.asarray(x, wide)).to(device, dtype)


def convert(variables: Any, device: str) -> dict[str, Any]:
    """Linen variables, batch statistics included, as one tree of tensors in PyTorch's shapes, by flax's names."""
    return subtree("", merged(variables["params"], variables.get("batch_stats", {})), device)


def merged(one: Any, other: Any) -> Any:
    """Two trees of dicts in one."""
    if not (isinstance(one, Mapping) and isinstance(other, Mapping)):
        raise ValueError("a parameter and a batch statistic have one name")
    both = {key: merged(one[key], other[key]) for key in one.keys() & other.keys()}
    return {**one, **other, **both}


def subtree(name: str, node: Mapping[str, Any], device: str) -> dict[str, Any]:
    if "ii" in node:
        return lstm_cell(node, device)
    return {
        key: subtree(key, value, device) if isinstance(value, Mapping) else leaf(name, key, tensor(value, device))
        for key, value in node.items()
    }


def leaf(module: str, name: str, x: Any) -> Any:
    """A parameter of the module of that name, as torch.nn.functional takes it."""
    if name == "bias":
        return x.flatten()  # attention has one for each head
    if name != "kernel":
        return x
    if x.ndim == 4:  # height, width, in, out
        return x.permute(3, 2, 0, 1).contiguous(memory_format=torch.channels_last)
    if x.ndim == 3:  # attention: in, heads, size; on the way out heads, size, out
        x = x.flatten(0, 1) if module == "out" else x.flatten(1)
    return x.T.contiguous()


def lstm_cell(node: Mapping[str, Any], device: str) -> dict[str, Any]:
    """The kernels of the four gates side by side, in PyTorch's order."""

    def gates(side: str, leaf: str) -> Any:
        return torch.cat([tensor(node[side + gate][leaf], device).t() for gate in "ifgo"])

    cell = {"input": gates("i", "kernel"), "hidden": gates("h", "kernel"), "bias": gates("h", "bias")}
    return {name: x.contiguous() for name, x in cell.items()}


def variants(model: Model, traced: bool = False) -> tuple[str, ...]:
    """The forms of a model's weights: as converted, and prepared where that makes a difference. `traced`: those that
    vmap and torch.compile can read, to which cuDNN's LSTM is closed."""
    network = model.network
    prepares = isinstance(network, ResNet | MobileNet | Bert | ViT) or (isinstance(network, Recurrent) and not traced)
    return ("plain", "prepared") if prepares else ("plain",)


def prepare(tree: Mapping[str, Any]) -> dict[str, Any]:
    """What may be worked out ahead: batch normalisation folded into convolutions, LSTM weights as cuDNN lays them, and
    the weights of attention's query, key and value as those of one product."""
    done = {key: prepare(value) if isinstance(value, Mapping) else value for key, value in tree.items()}
    if "BatchNorm_0" in done and "Conv_0" in done:
        return {"Conv_0": folded(done["Conv_0"]["kernel"], done["BatchNorm_0"])}
    if done.keys() >= {"query", "key", "value"}:
        return {"joined": joined([done[name] for name in ("query", "key", "value")]), "out": done["out"]}
    cells = [done.pop(f"OptimizedLSTMCell_{i}") for i in range(sum(key.startswith("OptimizedLSTM") for key in done))]
    return done | {"flat": flat_lstm(cells)} if cells else done


def folded(kernel: Any, norm: Mapping[str, Any]) -> dict[str, Any]:
    scale = norm["scale"] * torch.rsqrt(norm["var"] + 1e-5)
    weight = (kernel.float() * scale[:, None, None, None]).to(kernel.dtype)
    bias = (norm["bias"] - norm["mean"] * scale).to(kernel.dtype)
    return {"kernel": weight.contiguous(memory_format=torch.channels_last), "bias": bias}


def joined(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: torch.cat([layer[name] for layer in layers]) for name in ("kernel", "bias")}


def flat_lstm(cells: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Layer by layer the weights and biases of torch.lstm; on a GPU all of them lie in one buffer."""
    first = cells[0]["input"]
    hidden, features = cells[0]["hidden"].shape[1], first.shape[1]
    module = torch.nn.LSTM(features, hidden, len(cells), batch_first=True, device=first.device, dtype=first.dtype)
    with torch.no_grad():
        for i, cell in enumerate(cells):
            getattr(module, f"weight_ih_l{i}").copy_(cell["input"])
            getattr(module, f"weight_hh_l{i}").copy_(cell["hidden"])
            getattr(module, f"bias_ih_l{i}").zero_()
            getattr(module, f"bias_hh_l{i}").copy_(cell["bias"])
    module.flatten_parameters()
    return [weight.detach() for weight in module._flat_weights]
