"""What a network costs: arithmetic and memory, counted without either.

The network is run forward and backward on fake tensors, which have a shape, a dtype and a device but no values:
what is counted are the kernels that the device would be given and the tensors that autograd would keep. The costs c
of batches of two and of three images give what each image adds, and what a step costs besides:

    an image = c(3) - c(2),    a step = c(2) - 2 (c(3) - c(2))

(A batch of one is another case for some networks, as those with batch normalisation.)

FLOPs are those of convolutions, matrix products and attention, a multiply-add counted as two:

    linear      2 C_in C_out a position           convolution    2 C_in C_out k² / groups an output position
    attention   4 T² C a sequence of T positions, and 10 T² C backward, where the weights are computed again

Transposed convolutions take as many of an input position. The backward pass of a linear layer or a convolution
takes twice its forward pass, less where the input needs no gradient. All the rest (normalisation, activations,
resizing) is not counted: it is limited by memory, not by arithmetic.

"Kept" are the tensors that the forward pass leaves for the backward pass, each storage once, without parameters and
buffers. The peak of a training step is more, by the gradients of activations and the work space of kernels.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class Layer:
    """A part of a network: its place and class, and what one image costs there.

    ``shape`` is its output's, without the batch; None if it is not called, or returns no tensor.
    """

    name: str
    kind: str
    shape: tuple[int, ...] | None
    parameters: int
    forward_flops: int
    kept_bytes: int


@dataclass(frozen=True)
class Account:
    """What a network costs; FLOPs and kept bytes are those of one image.

    Attributes:
        layers: the modules of the network and the members of its ModuleLists, in order; their costs add up to the
            totals here, with a last layer "(itself)" for what the network does outside of them, if it costs anything.
        parameters: numbers to learn, or to leave, shared ones counted once.
        forward_flops: of the forward pass.
        backward_flops: of the backward pass, with what checkpointing computes again.
        kept_bytes: kept for the backward pass.
        kept_bytes_a_step: kept besides, whatever the batch: under autocast, the weights in its dtype.
        weight_bytes: parameters and buffers.
        gradient_bytes: of the parameters that are trained.
        moment_bytes: AdamW's two of each gradient.
        average_bytes: the exponential moving average of the weights.
    """

    layers: tuple[Layer, ...]
    parameters: int
    forward_flops: int
    backward_flops: int
    kept_bytes: int
    kept_bytes_a_step: int
    weight_bytes: int
    gradient_bytes: int
    moment_bytes: int
    average_bytes: int

    @property
    def training_bytes(self) -> int:
        """What training holds all the time: weights, gradients, AdamW's moments and the average."""
        return self.weight_bytes + self.gradient_bytes + self.moment_bytes + self.average_bytes

    def kept_bytes_of(self, batch_size: int) -> int:
        """Bytes kept for the backward pass of a batch."""
        return self.kept_bytes_a_step + batch_size * self.kept_bytes

    def table(self) -> str:
        """The layers, a line each, and their total."""
        flop, flop_prefix = _prefix(self.forward_flops)
        byte, byte_prefix = _prefix(self.kept_bytes)
        rows = [("layer", "class", "output", "parameters", f"{flop_prefix}FLOP", f"kept {byte_prefix}B")]
        total = Layer("total", "", None, self.parameters, self.forward_flops, self.kept_bytes)
        for layer in (*self.layers, total):
            shape = "" if layer.shape is None else " x ".join(map(str, layer.shape))
            costs = (f"{layer.forward_flops / flop:,.3f}", f"{layer.kept_bytes / byte:,.3f}")
            rows.append((layer.name, layer.kind, shape, f"{layer.parameters:,}", *costs))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        aligned = [
            [text.ljust(width) if column < 3 else text.rjust(width) for column, (text, width) in enumerate(cells)]
            for cells in (zip(row, widths, strict=True) for row in rows)
        ]
        return "\n".join("  ".join(row) for row in aligned)


def account(
    network: nn.Module,
    data_shape: Sequence[int] | None = None,
    *,
    autocast: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Account:
    """Count what a network costs, in seconds, without computing anything or taking memory for it.

    The network is neither called nor changed: a copy of it without values is, in training mode. A network of which
    nothing is trained, as ``load`` returns it, is counted as if everything was.

    Args:
        network: a module called as network(x, t) with x (B, *data_shape) and t (B,); with label= (B,) int64 if
            its attribute ``classes`` is not 0, and with vector= (B, V) if its attribute ``vector`` is V, not 0. Its
            parameters may be on the device "meta".
        data_shape: shape of one image; None for the network's attribute of that name.
        autocast: dtype of ``torch.autocast``, for training in bfloat16; None for none.
        device: whose kernels are counted; None for that of the parameters, or the CPU for those on "meta".

    Raises:
        ValueError: for a data_shape that is missing or no shape, a network that does not return a tensor, and one
            that looks at values, which the copy has not.
    """
    data_shape = _checked_shape(network, data_shape)
    parameters = list(network.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad] or parameters
    weight_bytes = _bytes([*parameters, *network.buffers()])

    two, three = (_Pass(network, data_shape, batch_size, autocast, device) for batch_size in (2, 3))
    # A Counter's minus leaves out what is not positive, which then reads as 0.
    added = {name: three.costs[name] - two.costs[name] for name in two.costs}
    return Account(
        layers=tuple(_layers(network, added, two.shapes)),
        parameters=sum(parameter.numel() for parameter in parameters),
        forward_flops=added[""]["forward"],
        backward_flops=added[""]["backward"],
        kept_bytes=added[""]["kept"],
        kept_bytes_a_step=two.costs[""]["kept"] - 2 * added[""]["kept"],
        weight_bytes=weight_bytes,
        gradient_bytes=_bytes(trained),
        moment_bytes=2 * _bytes(trained),
        average_bytes=weight_bytes,
    )


def quantity(value: float, unit: str) -> str:
    """A number and its unit with a decimal prefix: 12443713536 and "FLOP" to "12.44 GFLOP"."""
    factor, prefix = _prefix(value)
    return f"{value / factor:.4g} {prefix}{unit}"


def _prefix(value: float) -> tuple[float, str]:
    """The largest decimal prefix that leaves the value at least 1, as a factor and by its symbol."""
    prefixes = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
    return next(((factor, prefix) for factor, prefix in prefixes if value >= factor), (1.0, ""))


def _checked_shape(network: nn.Module, data_shape: Sequence[int] | None) -> tuple[int, ...]:
    if data_shape is None:
        data_shape = getattr(network, "data_shape", None)
    if data_shape is None:
        raise ValueError(f"data_shape is missing: a {type(network).__name__} has no such attribute")
    if not all(isinstance(size, int) and size > 0 for size in data_shape):
        raise ValueError(f"data_shape = {tuple(data_shape)}: must be positive whole numbers")
    return tuple(data_shape)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _parts(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Its modules by name, each once; of those that only hold others, and are never called, their members."""
    opened = {""}
    for name, module in network.named_modules():
        if name and name.rpartition(".")[0] in opened:
            if isinstance(module, nn.ModuleList | nn.ModuleDict):
                opened.add(name)
            else:
                yield name, module


def _layers(network: nn.Module, added: dict[str, Counter[str]], shapes: dict[str, tuple[int, ...]]) -> Iterator[Layer]:
    """The parts of a network, then the network itself for what is left."""
    rest, listed = Counter(added[""]), set[nn.Parameter]()
    for name, part in _parts(network):
        own = set(part.parameters()) - listed
        listed |= own
        rest.subtract(added[name])
        size = sum(parameter.numel() for parameter in own)
        yield Layer(name, type(part).__name__, shapes.get(name), size, added[name]["forward"], added[name]["kept"])
    size = sum(parameter.numel() for parameter in set(network.parameters()) - listed)
    if size or rest["forward"] or rest["kept"]:
        yield Layer("(itself)", type(network).__name__, shapes.get(""), size, rest["forward"], rest["kept"])


class _Pass:
    """A batch's way forward and back through a copy of the network, and what it cost each part.

    Attributes:
        costs: "forward" and "kept", by the part's name; "" is the whole network, which has "backward" too. What a part
            calls counts for it alone.
        shapes: of the outputs, without the batch, by the part's name.
    """

    def __init__(
        self,
        network: nn.Module,
        data_shape: tuple[int, ...],
        batch_size: int,
        autocast: torch.dtype | None,
        device: torch.device | str | None,
    ) -> None:
        """Arguments and errors as for ``account``."""
        self.costs: dict[str, Counter[str]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._forward = FlopCounterMode(display=False, custom_mapping=FLOPS)
        backward = FlopCounterMode(display=False, custom_mapping=FLOPS)
        example = next(network.parameters(), torch.empty(0))
        if device is None:
            device = "cpu" if example.is_meta else example.device
        device = torch.device(device)
        try:
            # A tensor that the network holds without registering it has values; it is made a fake one where it is used.
            with FakeTensorMode(allow_non_fake_inputs=True):
                fake = fake_copy(network, device)
                self._kept = {tensor.untyped_storage()._cdata: 0 for tensor in [*fake.parameters(), *fake.buffers()]}
                x = torch.empty(batch_size, *data_shape, dtype=example.dtype, device=device)
                arguments = (x, x.new_empty(batch_size))
                with torch.autocast(device.type, autocast, enabled=autocast is not None):
                    output = self._call(fake, arguments, conditions(network, x))
                if output.requires_grad:
                    with backward:
                        output.backward(torch.empty_like(output))
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ValueError(
                f"network cannot be counted without values, on which its course depends: {error}"
            ) from error
        self.costs[""]["backward"] = backward.get_total_flops()

    def _call(self, network: nn.Module, arguments: tuple[Tensor, Tensor], conditions: dict[str, Tensor]) -> Tensor:
        """Call the network, counting."""
        with ExitStack() as stack:
            # The hooks are gone before the backward pass, in which checkpointed parts are called again.
            for handle in self._watch(network):
                stack.callback(handle.remove)
            for context in (torch.enable_grad(), saved_tensors_hooks(self._keep, lambda tensor: tensor), self._forward):
                stack.enter_context(context)
            output = network(*arguments, **conditions)
        if not isinstance(output, Tensor):
            raise ValueError(f"network must return a tensor; got {type(output).__name__}")
        self.costs[""], self.shapes[""] = Counter(self._read()), tuple(output.shape[1:])
        return output

    def _keep(self, tensor: Tensor) -> Tensor:
        # Autograd holds the storages until the backward pass, so that no address stands for two.
        storage = tensor.untyped_storage()
        self._kept.setdefault(storage._cdata, storage.nbytes())
        return tensor

    def _read(self) -> dict[str, int]:
        return {"forward": self._forward.get_total_flops(), "kept": sum(self._kept.values())}

    def _watch(self, network: nn.Module) -> Iterator[RemovableHandle]:
        """Count what happens between the entry of a module and its exit for the part that it belongs to."""
        parts = {part: name for name, part in _parts(network)}
        self.costs = {name: Counter() for name in parts.values()}
        # The network may call a module of a part on its own; of several parts, it belongs to the first.
        owners = {module: name for part, name in reversed(parts.items()) for module in part.modules()}
        entered: list[nn.Module] = []

        def enter(module: nn.Module, _: Any) -> None:
            if not entered:
                self.costs[owners[module]].subtract(self._read())
            entered.append(module)

        def leave(module: nn.Module, _: Any, output: Any) -> None:
            entered.pop()
            if not entered:
                self.costs[owners[module]].update(self._read())
            if module in parts and isinstance(output, Tensor):
                self.shapes[parts[module]] = tuple(output.shape[1:])

        for module in owners:
            yield module.register_forward_pre_hook(enter)
            yield module.register_forward_hook(leave)


def fake_copy(network: nn.Module, device: torch.device) -> nn.Module:
    """A copy to train, whose parameters and buffers have no values; to be made within a FakeTensorMode."""
    is_frozen = not any(parameter.requires_grad for parameter in network.parameters())

    def like(tensor: Tensor) -> Tensor:
        empty = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
        return nn.Parameter(empty, is_frozen or tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty

    # deepcopy takes what the memo holds for copied: the weights' memory is not taken a second time.
    memo: dict[int, Any] = {id(tensor): like(tensor) for tensor in [*network.parameters(), *network.buffers()]}
    return copy.deepcopy(network, memo).train()


def conditions(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What the network is called with besides x (B, *data_shape) and t."""
    conditions = {}
    if getattr(network, "classes", 0):
        conditions["label"] = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    if size := getattr(network, "vector", 0):
        conditions["vector"] = x.new_empty(len(x), size)
    return conditions


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward_flops(
    gradient: Sequence[int], query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


def _convolution_backward_flops(gradient: list[int], x: list[int], weight: list[int], *options: Any, **_: Any) -> int:
    """The gradients by input and by weight each take what the forward pass takes."""
    _bias, _stride, _padding, _dilation, transposed, _output_padding, _groups, wanted = options
    return sum(wanted[:2]) * conv_flop_count(x, weight, gradient, transposed)


# For FlopCounterMode(custom_mapping=): what torch does not count on a CPU, and the gradient by the weight, which it
# counts as often as there are groups.
FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    torch.ops.aten.convolution_backward: _convolution_backward_flops,
}
