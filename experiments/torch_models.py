"""The models of coalesce.models in PyTorch, as functions of their weights: `network(model)(convert(params), *inputs)`.

Inputs and outputs are those of the flax model (images `[batch, height, width, 3]`), and what runs in float32 there does
here too. Convolutions see channels-last tensors, which cuDNN likes best. Import this file only where PyTorch is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]

from coalesce.models import Model
from coalesce.models.mlp import MLP
from coalesce.models.mobilenet import MobileNet
from coalesce.models.recurrent import Recurrent
from coalesce.models.resnet import BasicBlock, ResNet
from coalesce.models.transformer import Bert
from coalesce.models.vgg import VGG
from coalesce.models.vit import ViT

Tensors = Mapping[str, Any]  # a tree of tensors, by flax's names
HEADS = ("query", "key", "value")
Apply = Callable[..., Any]


def network(model: Model) -> Apply | None:
    """(tensors, *inputs) -> outputs, or None for a model that has no PyTorch form here."""
    match model.network:
        case MLP() as net:
            return partial(mlp, net.layers)
        case ResNet() as net:
            return partial(resnet, net.stages, net.block is BasicBlock)
        case VGG() as net:
            return partial(vgg, tuple(map(len, net.stages)))
        case MobileNet() as net:
            return partial(mobilenet, net.stages)
        case Bert() as net:
            return partial(bert, net.layers, net.heads)
        case ViT() as net:
            return partial(vit, net.layers, net.heads)
        case Recurrent() as net if net.cell.__name__ == "OptimizedLSTMCell":
            return partial(lstm, net.layers)
    return None


def dense(p: Tensors, x: Any) -> Any:
    return F.linear(x, p["kernel"], p["bias"])


def layer_norm(p: Tensors, x: Any, eps: float) -> Any:
    return F.layer_norm(x.float(), x.shape[-1:], p["scale"], p["bias"], eps).to(x.dtype)


def conv_norm(p: Tensors, x: Any, stride: int = 1, groups: int = 1) -> Any:
    """A convolution and its batch normalisation, which `prepare` may have folded into it."""
    weight = p["Conv_0"]["kernel"]
    x = F.conv2d(x, weight, p["Conv_0"].get("bias"), stride, weight.shape[-1] // 2, groups=groups)
    norm = p.get("BatchNorm_0")
    return x if norm is None else F.batch_norm(x, norm["mean"], norm["var"], norm["scale"], norm["bias"], eps=1e-5)


def mlp(layers: int, p: Tensors, x: Any) -> Any:
    for layer in range(layers):
        x = dense(p[f"Dense_{layer}"], x if layer == 0 else F.relu(x))
    return x


def resnet(stages: tuple[int, ...], basic: bool, p: Tensors, x: Any) -> Any:
    x = F.relu(conv_norm(p["ConvNorm_0"], x.permute(0, 3, 1, 2), 2))
    x = F.max_pool2d(x, 3, 2, 1)
    strides = [2 if stage and not block else 1 for stage, blocks in enumerate(stages) for block in range(blocks)]
    for i, stride in enumerate(strides):
        x = basic_block(p[f"BasicBlock_{i}"], x, stride) if basic else bottleneck(p[f"Bottleneck_{i}"], x, stride)
    return dense(p["Dense_0"], x.mean((2, 3)))


def basic_block(p: Tensors, x: Any, stride: int) -> Any:
    y = conv_norm(p["ConvNorm_1"], F.relu(conv_norm(p["ConvNorm_0"], x, stride)))
    return F.relu(y + (conv_norm(p["shortcut"], x, stride) if "shortcut" in p else x))


def bottleneck(p: Tensors, x: Any, stride: int) -> Any:
    y = F.relu(conv_norm(p["ConvNorm_0"], x))
    y = conv_norm(p["ConvNorm_2"], F.relu(conv_norm(p["ConvNorm_1"], y, stride)))
    return F.relu(y + (conv_norm(p["shortcut"], x, stride) if "shortcut" in p else x))


def vgg(stages: tuple[int, ...], p: Tensors, x: Any) -> Any:
    x, conv = x.permute(0, 3, 1, 2), 0
    for convs in stages:
        for _ in range(convs):
            x = F.relu(F.conv2d(x, p[f"Conv_{conv}"]["kernel"], p[f"Conv_{conv}"]["bias"], padding=1))
            conv += 1
        x = F.max_pool2d(x, 2, 2)
    x = x.permute(0, 2, 3, 1).flatten(1)  # flax's order: channels last
    x = F.relu(dense(p["Dense_1"], F.relu(dense(p["Dense_0"], x))))
    return dense(p["Dense_2"], x)


def mobilenet(stages: tuple[tuple[int, int, int, int], ...], p: Tensors, x: Any) -> Any:
    x = F.relu6(conv_norm(p["ConvNorm_0"], x.permute(0, 3, 1, 2), 2))
    blocks = [(expand, stride if i == 0 else 1) for expand, _, count, stride in stages for i in range(count)]
    for i, (expand, stride) in enumerate(blocks):
        convs = p[f"InvertedResidual_{i}"]
        y = F.relu6(conv_norm(convs["ConvNorm_0"], x)) if expand > 1 else x
        first = int(expand > 1)
        y = F.relu6(conv_norm(convs[f"ConvNorm_{first}"], y, stride, groups=y.shape[1]))
        y = conv_norm(convs[f"ConvNorm_{first + 1}"], y)
        x = x + y if x.shape == y.shape else y
    x = F.relu6(conv_norm(p["ConvNorm_1"], x))
    return dense(p["Dense_0"], x.mean((2, 3)))


def attention(p: Tensors, heads: int, x: Any, mask: Any = None) -> Any:
    """`prepare` may have made one product of three."""
    joined = dense(p["joined"], x).chunk(3, -1) if "joined" in p else [dense(p[name], x) for name in HEADS]
    query, key, value = (y.unflatten(-1, (heads, -1)).transpose(-3, -2) for y in joined)
    y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return dense(p["out"], y.transpose(-3, -2).flatten(-2))


def bert(layers: int, heads: int, p: Tensors, tokens: Any, mask: Any) -> Any:
    x = F.embedding(tokens, p["token_embed"]["embedding"])
    x = x + p["position_embed"]["embedding"][: tokens.shape[-1]] + p["segment_embed"]["embedding"][0]
    x = layer_norm(p["LayerNorm_0"], x, 1e-12)
    for i in range(layers):
        layer = p[f"EncoderLayer_{i}"]
        y = attention(layer["MultiHeadDotProductAttention_0"], heads, x, mask[:, None, None, :])
        x = layer_norm(layer["LayerNorm_0"], x + y, 1e-12)
        y = dense(layer["Dense_1"], F.gelu(dense(layer["Dense_0"], x)))
        x = layer_norm(layer["LayerNorm_1"], x + y, 1e-12)
    x = torch.tanh(dense(p["pooler"], x[:, 0]))
    return dense(p["classifier"], x) if "classifier" in p else x


def vit(layers: int, heads: int, p: Tensors, x: Any) -> Any:
    patches = p["Conv_0"]
    x = F.conv2d(x.permute(0, 3, 1, 2), patches["kernel"], patches["bias"], stride=patches["kernel"].shape[-1])
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([p["class_token"].expand(x.shape[0], -1, -1), x], 1) + p["positions"]
    for i in range(layers):
        block = p[f"Block_{i}"]
        x = x + attention(block["MultiHeadDotProductAttention_0"], heads, layer_norm(block["LayerNorm_0"], x, 1e-6))
        y = F.gelu(dense(block["Dense_0"], layer_norm(block["LayerNorm_1"], x, 1e-6)), approximate="tanh")
        x = x + dense(block["Dense_1"], y)
    return dense(p["Dense_0"], layer_norm(p["LayerNorm_0"], x, 1e-6)[:, 0])


def lstm(layers: int, p: Tensors, x: Any) -> Any:
    """The steps one by one, or cuDNN's kernel if `prepare` laid the weights out for it."""
    if "flat" in p:
        zero = x.new_zeros(layers, x.shape[0], p["flat"][1].shape[1])
        x = torch._VF.lstm(x, (zero, zero), p["flat"], True, layers, 0.0, False, False, True)[0]  # its own loop
        return dense(p["Dense_0"], x[:, -1])
    for layer in range(layers):
        cell = p[f"OptimizedLSTMCell_{layer}"]
        gates, steps = F.linear(x, cell["input"]), []
        h = c = x.new_zeros(x.shape[0], cell["hidden"].shape[1])
        for step in range(x.shape[1]):
            i, f, g, o = (gates[:, step] + F.linear(h, cell["hidden"], cell["bias"])).chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            steps.append(h)
        x = torch.stack(steps, 1)
    return dense(p["Dense_0"], x[:, -1])
