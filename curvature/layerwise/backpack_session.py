"""BackPACK on a double of the model: same values, nothing shared that it writes to.

`backpack.extend` registers hooks for good, and a pass leaves inputs, outputs and results as attributes of modules and
parameters. So it never sees the user's model: a session copies the tree of modules, with new parameters that share the
storage of the user's (no copy of weights), and throws the copy away. There is then nothing to restore, whatever happens
in between. Activations used at several places, identities and in-place layers are straightened out on the way; models
that are no plain chains go through BackPACK's converter, and are used only if what comes out is made of known layers
and computes the same outputs.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import backpack
import torch
from backpack.context import CTX
from backpack.custom_module.branching import Parallel, SumModule, _Branch
from backpack.custom_module.permute import Permute
from backpack.custom_module.reduce_tuple import ReduceTuple
from backpack.custom_module.scale_module import ScaleModule
from torch import Tensor, nn

from curvature.engine.evaluation import _seeded
from curvature.environment.autocast import as_around
from curvature.environment.lock import one_at_a_time
from curvature.environment.precision import tf32_in_use, tf32_off
from curvature.layerwise.backpack_rules import EXTENSIONS
from curvature.layerwise.pull_back import same_outputs
from curvature.layerwise.support import Leaves, Quantity, UnsupportedError, features, layer_refusal, user_hooks

__all__ = ["BackpackSession"]

_CURVED_ACTIVATIONS = (nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.ELU, nn.SELU)
_CONVERTED = (SumModule, ScaleModule, _Branch, Parallel, Permute, ReduceTuple)


class BackpackSession:
    """A model's double, extended.

    Args:
        model: the user's; read, never written.
        chosen: the parameters of interest by name.
        quantity: what will be asked for.

    Raises:
        UnsupportedError: if BackPACK is not to be trusted with the model; the message names the first offender.
    """

    def __init__(self, model: nn.Module, chosen: Mapping[str, Tensor], quantity: Quantity) -> None:
        self.quantity = quantity
        double, self._copies = _double(model, chosen, quantity)
        self.net, self.layers = _chain(double, quantity) or _converted(double, quantity)
        self._device = next(iter(chosen.values())).device
        self.parameters = {name: self._copies[id(tensor)] for name, tensor in chosen.items()}
        _refuse_shared(self.layers, self.parameters)
        self._sizes: list[tuple[nn.Module, int, int, bool]] = []
        _extend(self.net)

    @property
    def has_convolutions(self) -> bool:
        """Whether any layer is one."""
        return any(isinstance(layer, nn.modules.conv._ConvNd) for _, layer in self.layers)

    @property
    def is_piecewise_linear(self) -> bool:
        """Whether no activation curves: each diagonal block of the Hessian is then that of the Gauss-Newton matrix."""
        return not any(isinstance(layer, _CURVED_ACTIVATIONS) for _, layer in self.layers)

    def outputs(self, inputs: Any, seed: int) -> Tensor:
        """Return the double's outputs, with their graph, under the random state that the objective gives the batch.

        Raises:
            UnsupportedError: if dropout meets exact zeros: BackPACK takes those for dropped.
        """
        with _seeded(seed, self._device):
            outputs = self.net(inputs)
        before: nn.Module | None = None
        for _, layer in self.layers:
            if isinstance(layer, nn.Dropout) and layer.training and not isinstance(before, nn.ReLU):
                zeros = (layer.input0 == 0).any() if isinstance(layer.input0, Tensor) else True
                if bool(zeros):
                    raise UnsupportedError("zeros enter a Dropout in train mode, where BackPACK takes them for dropped")
            before = layer
        return outputs

    def run(
        self,
        inputs: Any,
        seed: int,
        leaves: Leaves,
        gradient: Tensor,
        root: Any,
        *,
        expected: Tensor,
    ) -> dict[str, Any]:
        """Return what an extension leaves on each chosen parameter, None where it did not come by.

        Args:
            inputs: of the model.
            seed: random state of the batch.
            leaves: what BackPACK is to leave on the parameters.
            gradient: of the loss in the outputs, (N, ...).
            root: what is propagated back from the outputs, in place of a rule for the loss; None for first order.
            expected: outputs of the user's model.

        Raises:
            UnsupportedError: if the double computes other outputs.
        """
        node = _Outlet(gradient, root)
        make, outlet = EXTENSIONS[leaves]
        extension = make()
        if outlet is not None:
            extension.set_module_extension(_Outlet, outlet())
        _extend(node)
        with self._surroundings():
            outputs = self.outputs(inputs, seed)
            same_outputs(outputs.detach(), expected)
            with backpack.backpack(extension):
                node(outputs).backward()
        results = {}
        for name, parameter in self.parameters.items():
            results[name] = parameter.__dict__.pop(extension.savefield, None)
            parameter.grad = None
        return results

    def measure(self, inputs: Any) -> None:
        """Note the sizes of inputs and outputs of all layers on one example, for `bytes_per_example`."""
        self._sizes = []

        def note(layer: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor) and isinstance(arguments[0], Tensor):
                flat = isinstance(layer, nn.Linear) and arguments[0].ndim == 2
                self._sizes.append((layer, features(arguments[0]), features(output), flat))

        handles = [layer.register_forward_hook(note) for _, layer in self.layers]
        try:
            with torch.no_grad(), backpack.disable(), _seeded(0, self._device):
                self.net(inputs)
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def watched(self, inputs: list[Tensor]) -> Iterator[None]:
        """Append the inputs of the linear layers that hold chosen parameters, in order, as the model runs."""
        chosen = {id(p) for p in self.parameters.values()}
        handles = [
            layer.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].detach()))
            for _, layer in self.layers
            if any(id(p) in chosen for p in layer.parameters(recurse=False))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def bytes_per_example(self, num_columns: int, itemsize: int) -> int:
        """Return what a pass holds for one example at its widest layer."""
        if self.quantity == "diag_hessian":
            num_columns += sum(2 * out for layer, _, out, _ in self._sizes if isinstance(layer, _CURVED_ACTIVATIONS))
        widest = 1
        for layer, size_in, size_out, flat in self._sizes:
            weights = 0 if flat else sum(p.numel() for p in layer.parameters(recurse=False))
            widest = max(widest, 3 * (size_in + size_out) + 2 * weights)
        return itemsize * num_columns * widest

    @contextlib.contextmanager
    def _surroundings(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(one_at_a_time)
            stack.enter_context(as_around())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(warnings.catch_warnings())
            stack.enter_context(_seeded(0, self._device))  # its pooling rules initialise layers of their own
            warnings.simplefilter("ignore")  # BackPACK warns of hooks on inputs without gradient, which do fire
            stack.enter_context(_default_dtype(next(iter(self.parameters.values())).dtype))
            if tf32_in_use():
                stack.enter_context(tf32_off())
            yield


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """BackPACK makes the kernels of pooling and one-hot codes in torch's default dtype, whatever the model's is."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _Outlet(nn.modules.loss._Loss):
    """Stands for the loss: its gradient and the root of its Hessian in the outputs are given."""

    def __init__(self, gradient: Tensor, root: Any) -> None:
        super().__init__()
        self.gradient, self.root = gradient, root

    def forward(self, outputs: Tensor) -> Tensor:
        return (outputs * self.gradient).sum()


def _double(
    model: nn.Module, chosen: Mapping[str, Tensor], quantity: Quantity
) -> tuple[nn.Module, dict[int, nn.Parameter]]:
    """Copy the tree of modules; parameters are new objects on the same storage."""
    for name, module in model.named_modules():
        if user_hooks(module):
            raise UnsupportedError(f"{name or 'the model'} ({type(module).__name__}) has hooks")
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            why = layer_refusal(name, module, quantity)
            if why is not None:
                raise UnsupportedError(why)
    wanted = {id(tensor) for tensor in chosen.values()}
    memo: dict[int, Any] = {}
    every = {id(p): p for p in [*model.parameters(), *chosen.values()]}
    for key, p in every.items():
        memo[key] = nn.Parameter(p.detach(), requires_grad=key in wanted)
    copies = {key: memo[key] for key in every}
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().clone()
    for module in model.modules():
        for value in _left_by_backpack(module).values():
            memo.setdefault(id(value), value.detach())  # part of the user's graph, which cannot be copied
    try:
        double = copy.deepcopy(model, memo)
    except Exception as error:  # attributes of any kind may hang on a model
        raise UnsupportedError(f"the model's modules cannot be copied ({type(error).__name__}: {error})") from error
    for module in double.modules():
        for store in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(module, store).clear()  # BackPACK's own, where the user had extended the model
        for left in _left_by_backpack(module):
            delattr(module, left)
        module.__dict__.pop("_backpack_extend", None)
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
        if isinstance(getattr(module, "padding", None), str):
            _spell_out_padding(module)
    return double, copies


def _left_by_backpack(module: nn.Module) -> dict[str, Tensor]:
    """Return the inputs and outputs that a forward pass leaves on a module that the user has extended."""
    if not getattr(module, "_backpack_extend", False):
        return {}
    names = [key for key in vars(module) if key == "output" or key.removeprefix("input").isdigit()]
    return {key: vars(module)[key] for key in names if isinstance(vars(module)[key], Tensor)}


def _spell_out_padding(conv: Any) -> None:
    """Replace padding="same" and "valid" by numbers, where numbers say the same."""
    spans = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    if conv.padding == "valid":
        conv.padding = tuple(0 for _ in spans)
    elif all(span % 2 == 0 for span in spans):
        conv.padding = tuple(span // 2 for span in spans)


def _chain(model: nn.Module, quantity: Quantity) -> tuple[nn.Module, list[tuple[str, nn.Module]]] | None:
    """Return the model as one flat chain of known layers, or None if it is none."""
    layers: list[tuple[str, nn.Module]] = []

    def collect(name: str, module: nn.Module) -> bool:
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            if "forward" in vars(module):
                return False
            return all(
                collect(f"{name}.{key}" if name else key, child) for key, child in module._modules.items() if child
            )
        if any(True for _ in module.children()):
            return False
        layers.append((name, module))
        return True

    if not collect("", model):
        return None
    for name, layer in layers:
        if type(layer) is nn.Identity and not user_hooks(layer):
            continue
        if why := layer_refusal(name, layer, quantity):
            raise UnsupportedError(why)
    kept = []
    for name, layer in layers:
        if type(layer) is nn.Identity or (type(layer) is nn.Dropout and not layer.training):
            continue
        free = next(layer.parameters(), None) is None
        kept.append((name, copy.deepcopy(layer) if free else layer))  # one activation may stand at several places
    return nn.Sequential(*(layer for _, layer in kept)), kept


def _converted(model: nn.Module, quantity: Quantity) -> tuple[nn.Module, list[tuple[str, nn.Module]]]:
    """Return the model as BackPACK's converter rewrites it (branches, sums, reshapes become modules)."""
    if quantity not in ("diag_ggn", "first_order"):
        raise UnsupportedError(f"the model ({type(model).__name__}) is no chain of layers")
    for name, layer in model.named_modules():
        leaf = next(layer.children(), None) is None
        owns = next(layer.parameters(recurse=False), None) is not None
        why = layer_refusal(name, layer, quantity) if leaf and not isinstance(layer, nn.Identity) else None
        if why is None and owns and not leaf:
            why = f"{name or 'the model'} ({type(layer).__name__}) owns parameters beside its layers"
        if why is not None and (owns or isinstance(layer, nn.Dropout) or leaf):
            raise UnsupportedError(why)
    held = {id(p) for p in model.parameters()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # it warns of nodes that break second-order rules
            net = _extend(model, use_converter=True)
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        raise UnsupportedError(
            f"BackPACK's converter cannot take the model apart ({type(error).__name__}: {first})"
        ) from error
    layers = []
    for name, layer in net.named_modules():
        if next(layer.children(), None) is not None or layer is net or isinstance(layer, (*_CONVERTED, nn.Identity)):
            continue
        if why := layer_refusal(name, layer, quantity):
            raise UnsupportedError(f"after conversion, {why}")
        layers.append((name, layer))
    if stray := [name for name, p in net.named_parameters() if id(p) not in held]:
        raise UnsupportedError(f"a module is called more than once ({stray[0]} after conversion)")
    return net, layers


def _refuse_shared(layers: list[tuple[str, nn.Module]], chosen: Mapping[str, Tensor]) -> None:
    """Refuse parameters that two layers use: the columns of both would have to be added before they are squared."""
    owner: dict[int, str] = {}
    wanted = {id(p): name for name, p in chosen.items()}
    for layer_name, layer in layers:
        for p in layer.parameters(recurse=False):
            if id(p) in owner and id(p) in wanted:
                raise UnsupportedError(f"{wanted[id(p)]} is used twice, by {owner[id(p)]} and {layer_name}")
            owner[id(p)] = layer_name


def _extend(module: nn.Module, **settings: bool) -> nn.Module:
    """Extend, and take the hooks off BackPACK's global list, which would hold them for ever."""
    before = len(CTX.hook_handles)
    try:
        extended: nn.Module = backpack.extend(module, **settings)
        return extended
    finally:
        del CTX.hook_handles[before:]
