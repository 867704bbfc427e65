"""A decoder that runs on transformers' own modules while its tensors come from the checkpoint, one layer at a time.

The model class of the config is built on the meta device, so it holds no weights. A decoder layer runs with the tensors
of a block that the caller holds. Each linear layer and each sublayer asks the current `Visit` what to do: show its
input, take a known input, or return a known output. Compression therefore needs no forward pass of its own, and an
architecture that transformers adds needs no code here.

Shape suffixes: B sequences; T tokens; D hidden size; I input features of a layer; V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from slimserve.compress.experts import LinearExperts, expert_role, is_router, replace_experts, unusable
from slimserve.core.errors import UserError

Block = dict[str, Tensor]
"""Tensors of one decoder layer by their names relative to the layer."""

KeyValueHook = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Gets keys and values `[B, heads, T, features]` as they enter the cache; returns those that attention reads."""

_PROBE_TOKENS = 4
_NUM_CONTEXTS = 2
"""Numbers of tokens whose masks and rotary tables are kept; calibration has sequences of two lengths."""
_ADDS_TOLERANCE = 1e-3
"""Largest difference, relative to the change of the hidden states by a layer, that float32 explains."""
_FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, AssertionError)
"""Exceptions that transformers' modules raise for settings that do not fit each other."""


@dataclass(frozen=True)
class Sublayer:
    """The linear layers of one module of a decoder layer, such as attention or MLP, in the order of the forward pass.

    Linear layers that lie in the decoder layer itself, as the MLP of OPT does, have the path `""`.
    """

    path: str
    """Path of the module in the decoder layer; empty if the linear layers lie in the decoder layer itself."""
    stages: tuple[tuple[tuple[str, ...], ...], ...]
    """Groups of layers that read the same input. The groups of a stage do not depend on each other."""
    is_attention: bool
    consumer: str | None
    """The layer whose output is the module's output, if it is the only one of the last stage."""
    has_experts: bool
    norm: str | None = None
    """The module whose output is the input of the first group and of no other linear layer, if it has a weight."""

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of all linear layers, in the order of the forward pass."""
        return tuple(layer for stage in self.stages for group in stage for layer in group)

    @property
    def producers(self) -> tuple[str, ...]:
        """Names of the layers before the consumer."""
        return tuple(layer for layer in self.linears if layer != self.consumer)

    @property
    def fused(self) -> tuple[tuple[str, ...], ...]:
        """Layers that engines compute as one; all experts of a layer are one kernel."""
        if self.has_experts:
            return (self.linears,)
        return tuple(group for stage in self.stages for group in stage)


@dataclass
class Visit:
    """Instructions to the linear layers and sublayers for one run of a decoder layer, and the tensors it leaves."""

    shown: frozenset[str] = frozenset()
    """Layers whose inputs are given to `show`."""
    show: Callable[[str, Tensor], None] | None = None
    stops_after: str | None = None
    """Path of the sublayer after which the run ends; without it, a run that shows inputs ends after the last."""
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    """Known inputs by layer, which replace the computed ones."""
    outputs: Mapping[str, Tensor] = field(default_factory=dict)
    """Known outputs by path of the sublayer, which is then not computed."""
    roundings: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    """The engine's rounding of the inputs, by layer."""
    on_key_value: KeyValueHook | None = None
    """Hook of the KV cache; None for a cache in the dtype of the hidden states."""
    kept: dict[str, Tensor] = field(default_factory=dict)
    """Outputs of sublayers, by path, and of the layers in `inputs`, by name; filled by the run."""
    called: list[tuple[str, Tensor, Tensor]] | None = None
    """Set to a list, it gets name, input and output of each linear layer, which returns zeros without computing."""


class _HookedCache:
    """Stands for transformers' KV cache: gives new keys and values to a hook, and keeps none."""

    def __init__(self, hook: KeyValueHook) -> None:
        self._hook = hook

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return self._hook(key, value)


class _StopRun(Exception):  # noqa: N818 - not an error
    """Ends a forward pass whose rest is not needed."""

    def __init__(self, value: Any = None) -> None:
        self.value = value


class Decoder:
    """The modules of one model. It holds buffers such as rotary frequencies, but no weights."""

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        """Build the model class of the config; hidden states have `dtype` and are on `device`.

        Raises UserError if transformers has no such decoder-only model, or its layers cannot run one by one.
        """
        self.config = dict(config)
        self.dtype, self.device = dtype, torch.device(device)
        self._visit = Visit()
        self._contexts: dict[int, list[dict[str, Any]]] = {}
        self.model = _build(config)
        self.layers_path, self._layers = _find_layers(self.model)
        self.block = f"{self.layers_path}.{{index}}."
        self._renamings = _renamings(self.model)
        for layer in self._layers:
            replace_experts(layer, self.model)
        self._restore_buffers()
        self._wrap_outer()
        self._returns_tuple = False
        self.sublayers: list[tuple[Sublayer, ...]] = []
        try:
            traces: dict[Any, tuple[tuple[Sublayer, ...], dict[str, int]]] = {}
            for index, layer in enumerate(self._layers):
                for name, module in layer.named_modules():
                    if isinstance(module, nn.Linear):
                        module.forward = self._linear(name, module)
                kind = tuple((name, type(one).__name__) for name, one in layer.named_modules())
                if kind not in traces:
                    traces[kind] = self._trace(index)
                self._wrap_sublayers(index, *traces[kind])
                self.sublayers.append(traces[kind][0])
        except _FAILURES as error:
            raise unusable(config, f"its layers cannot be run one by one ({type(error).__name__}: {error})") from error

    # Names ------------------------------------------------------------------------------------------------------------

    def module_name(self, stored: str) -> str:
        """Return the name in transformers' modules of a tensor in a checkpoint."""
        for renaming in self._renamings:
            stored = renaming.rename_source_key(stored)[0]
        return stored

    def stored_name(self, name: str) -> str:
        """Return the name in a checkpoint, which other engines know, of a tensor in transformers' modules."""
        for renaming in reversed(self._renamings):
            name = renaming.reverse_transform().rename_source_key(name)[0]
        return name

    @cached_property
    def embedding(self) -> str:
        """Name of the embedding's weight."""
        return f"{_path_of(self.model, self.model.get_input_embeddings())}.weight"

    @cached_property
    def head(self) -> str:
        """Name of the output layer's weight; a checkpoint with tied embeddings has none."""
        return f"{self.head_module}.weight"

    @cached_property
    def head_module(self) -> str:
        return _path_of(self.model, self.model.get_output_embeddings())

    @property
    def hidden_size(self) -> int:
        """Features of the hidden states between the layers."""
        size: int = self.model.config.hidden_size
        return size

    @property
    def is_tied(self) -> bool:
        """Tell whether the output layer is the embedding."""
        return self.model.get_output_embeddings().weight is self.model.get_input_embeddings().weight

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors that a checkpoint of the model holds, by name."""
        state = self.model.state_dict()
        if self.is_tied:
            state.pop(self.head, None)
        return {name: tuple(tensor.shape) for name, tensor in state.items()}

    def block_shapes(self, index: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a layer's tensors, by their names relative to the layer."""
        prefix = self.block.format(index=index)
        return {name.removeprefix(prefix): shape for name, shape in self.shapes.items() if name.startswith(prefix)}

    @cached_property
    def outer_names(self) -> list[str]:
        """Names of the tensors outside the layers."""
        return [name for name in self.shapes if not name.startswith(f"{self.layers_path}.")]

    @cached_property
    def dense_modules(self) -> list[str]:
        """Modules that quantization leaves as they are although loaders may see linear layers in them.

        These are the output layer, projections around the layers, and the routers of experts.
        """
        outside = [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and not name.startswith(f"{self.layers_path}.")
        ]
        for index, sublayers in enumerate(self.sublayers):
            quantized = {layer for sublayer in sublayers for layer in sublayer.linears}
            for name, shape in self.block_shapes(index).items():
                module = name.rpartition(".")[0]
                if len(shape) == 2 and name.endswith(".weight") and module not in quantized:
                    outside.append(self.block.format(index=index) + module)
        return outside

    def linears(self, index: int) -> tuple[str, ...]:
        """Return the names of the linear layers of a layer that can be quantized."""
        return tuple(layer for sublayer in self.sublayers[index] for layer in sublayer.linears)

    # Running ----------------------------------------------------------------------------------------------------------

    def embed(self, outer: Mapping[str, Tensor], tokens_BT: Tensor) -> Tensor:
        """Return the hidden states before the first layer, `[B, T, D]`; `outer` are the tensors outside the layers."""

        def stop(*arguments: Any, **options: Any) -> None:
            raise _StopRun(_hidden_of(arguments, options))

        with self._layers_do(stop):
            try:
                self._run_model(outer, tokens_BT)
            except _StopRun as stopped:
                states: Tensor = stopped.value
        return states.to(self.dtype)

    def run(self, index: int, block: Mapping[str, Tensor], x_BTD: Tensor, visit: Visit | None = None) -> Tensor | None:
        """Return the hidden states after layer `index`, `[B, T, D]`, or None if the visit ends the run before that."""
        self._visit = visit or Visit()
        self._seen = 0
        options = self._options(x_BTD.shape[1])[index]
        if self._visit.on_key_value is not None:
            cache = _HookedCache(self._visit.on_key_value)
            options = {**options, **{key: cache for key in ("past_key_values", "layer_past") if key in options}}
        layer = self._layers[index]
        linears = self._linears_of[index]
        tensors = {
            name: tensor if name.rpartition(".")[0] in linears else tensor.to(self.dtype)
            for name, tensor in block.items()
        }
        try:
            output = functional_call(layer, tensors, (x_BTD,), options)
        except _StopRun:
            return None
        finally:
            self._visit = Visit()
        return _first(output)

    def adds_outputs(self, index: int, block: Mapping[str, Tensor]) -> bool:
        """Tell whether layer `index` returns its input plus the outputs of its sublayers, without a norm or a factor.

        It is tried on random hidden states.
        """
        generator = torch.Generator().manual_seed(0)
        x_1TD = torch.randn(1, _PROBE_TOKENS, self.hidden_size, generator=generator).to(self.device, self.dtype)
        visit = Visit()
        change_1TD = self.run(index, block, x_1TD, visit) - x_1TD
        outputs = [visit.kept[one.path] for one in self.sublayers[index] if one.path in visit.kept]
        if len(outputs) < len(self.sublayers[index]):
            return False
        return float((change_1TD - sum(outputs)).norm()) <= _ADDS_TOLERANCE * float(change_1TD.norm())

    def logits(self, outer: Mapping[str, Tensor], x_BTD: Tensor, round_inputs: Any = None) -> Tensor:
        """Return the logits `[B, T, V]` of the hidden states after the last layer.

        `round_inputs` is the engine's rounding of the output layer's inputs.
        """

        def replace(*_: Any, **__: Any) -> Any:
            return (x_BTD,) if self._returns_tuple else x_BTD

        self._visit = Visit(roundings={self.head_module: round_inputs} if round_inputs else {})
        with self._layers_do(replace):
            tokens_BT = torch.zeros(x_BTD.shape[:2], dtype=torch.int64, device=x_BTD.device)
            output = self._run_model(outer, tokens_BT, self.model)
        self._visit = Visit()
        logits_BTV: Tensor = output.logits
        return logits_BTV

    def _run_model(self, outer: Mapping[str, Tensor], tokens_BT: Tensor, model: Any = None) -> Any:
        model = model or self.model.base_model
        prefix = "" if model is self.model else f"{self.model.base_model_prefix}."
        tensors = {
            name.removeprefix(prefix): tensor if self._is_wide(name) else tensor.to(self.dtype)
            for name, tensor in outer.items()
            if name.startswith(prefix)
        }
        return functional_call(model, tensors, (tokens_BT,), {"use_cache": False})

    def _is_wide(self, name: str) -> bool:
        return name in (self.embedding, self.head)

    @contextmanager
    def _layers_do(self, forward: Callable[..., Any]) -> Iterator[None]:
        """Replace what every layer does for a moment."""
        for layer in self._layers:
            layer.forward = forward
        try:
            yield
        finally:
            for layer in self._layers:
                del layer.forward

    def _options(self, num_tokens: int) -> list[dict[str, Any]]:
        """Return the arguments that the model gives to each layer, such as masks and rotary tables."""
        if num_tokens not in self._contexts:
            seen: list[dict[str, Any]] = []

            def record(*arguments: Any, **options: Any) -> Any:
                seen.append({key: value for key, value in options.items() if key != "hidden_states"})
                if len(seen) == len(self._layers):
                    raise _StopRun
                states = _hidden_of(arguments, options)
                return (states,) if self._returns_tuple else states

            # The arguments depend on the shape of the input only.
            outer = {name: self._zeros(self.shapes[name]) for name in self.outer_names}
            tokens_1T = torch.zeros(1, num_tokens, dtype=torch.int64, device=self.device)
            with self._layers_do(record), suppress(_StopRun):
                self._run_model(outer, tokens_1T)
            if len(self._contexts) == _NUM_CONTEXTS:
                del self._contexts[next(iter(self._contexts))]
            self._contexts[num_tokens] = seen
        return self._contexts[num_tokens]

    def _zeros(self, shape: tuple[int, ...]) -> Tensor:
        """Return zeros that take no memory."""
        return torch.zeros(1, dtype=self.dtype, device=self.device).expand(shape)

    # Preparing the modules --------------------------------------------------------------------------------------------

    def _restore_buffers(self) -> None:
        """Compute the buffers that the meta device lost, such as rotary frequencies, with transformers' own rule."""
        for module in self.model.modules():
            lost = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
            if not module._non_persistent_buffers_set.intersection(lost):
                continue  # the checkpoint has the others
            for name in lost:
                module._buffers[name] = torch.empty_like(module._buffers[name], device=self.device)
            with torch.no_grad():
                self.model._init_weights(module)
        self.model.eval()

    def _wrap_outer(self) -> None:
        """Make embeddings and the output layer compute in the dtype of the hidden states."""
        for name, module in self.model.named_modules():
            if name.startswith(f"{self.layers_path}."):
                continue
            if module is self.model.get_input_embeddings():
                module.forward = _in_dtype(module, self)
            elif isinstance(module, nn.Linear):
                module.forward = self._linear(name, module)

    def _linear(self, name: str, module: nn.Linear) -> Callable[[Tensor], Tensor]:
        """Return the forward pass of a linear layer: the visit may see, replace or round its input."""

        def forward(x: Tensor) -> Tensor:
            visit = self._visit
            if visit.called is not None:
                output = x.new_zeros(*x.shape[:-1], module.out_features)
                visit.called.append((name, x, output))
                return output
            if name in visit.inputs:
                x = visit.inputs[name].reshape(*x.shape[:-1], -1)
            if name in visit.shown and visit.show is not None:
                visit.show(name, x)
                self._seen += 1
                if self._seen >= len(visit.shown) and visit.stops_after is None:
                    raise _StopRun
            if name in visit.roundings:
                x = visit.roundings[name](x)
            bias = None if module.bias is None else module.bias.to(x.dtype)
            output = functional.linear(x, module.weight.to(x.dtype), bias)
            if name in visit.inputs:
                visit.kept[name] = output
            return output

        return forward

    def _wrap_sublayer(self, module: nn.Module, sublayer: Sublayer, num_returned: int) -> None:
        """Let the visit replace the output of a sublayer, or remember it."""
        original = module.forward
        consumer = (
            None
            if sublayer.consumer is None
            else module.get_submodule(sublayer.consumer.removeprefix(f"{sublayer.path}."))
        )

        def forward(*arguments: Any, **options: Any) -> Any:
            visit = self._visit
            if sublayer.path in visit.outputs:
                output = visit.outputs[sublayer.path]
            elif consumer is not None and sublayer.consumer is not None and sublayer.consumer in visit.inputs:
                output = consumer(visit.inputs[sublayer.consumer])
            else:
                returned = original(*arguments, **options)
                visit.kept[sublayer.path] = _first(returned)
                if visit.stops_after == sublayer.path:
                    raise _StopRun
                return returned
            visit.kept[sublayer.path] = output
            if visit.stops_after == sublayer.path:
                raise _StopRun
            return (output, *[None] * (num_returned - 1)) if num_returned else output

        module.forward = forward

    def _trace(self, index: int) -> tuple[tuple[Sublayer, ...], dict[str, int]]:
        """Run a layer without computing its linear layers, to learn which of them it calls in which order.

        Return its sublayers, and how many values each of their modules returns if it returns a tuple, else 0.
        """
        layer = self._layers[index]
        linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
        routers = {name for name in linears if is_router(layer, name)}
        returned: dict[str, Any] = {}
        norms: list[tuple[str, Tensor]] = []
        tops = {name.partition(".")[0] for name in linears if "." in name}
        handles = [
            module.register_forward_hook(lambda _, __, out, name=name: norms.append((name, out)))
            for name, module in layer.named_modules()
            if name not in linears and getattr(module, "weight", None) is not None
        ]
        handles += [
            layer.get_submodule(top).register_forward_hook(lambda _, __, out, top=top: returned.update({top: out}))
            for top in tops
        ]
        called: list[tuple[str, Tensor, Tensor]] = []
        self._visit = Visit(called=called)
        experts = [module for module in layer.modules() if isinstance(module, LinearExperts)]
        for one in experts:
            one.runs_all = True
        options = self._options(_PROBE_TOKENS)[index]
        states = torch.zeros(1, _PROBE_TOKENS, self.hidden_size, dtype=self.dtype, device=self.device)
        tensors = {name: self._zeros(shape) for name, shape in self.block_shapes(index).items()}
        try:
            with torch.no_grad():
                output = functional_call(layer, tensors, (states,), options)
        finally:
            self._visit = Visit()
            for one in experts:
                one.runs_all = False
            for handle in handles:
                handle.remove()
        self._returns_tuple = isinstance(output, tuple)
        sublayers = _sublayers(layer, called, returned, routers, norms)
        sizes = {path: len(result) if isinstance(result, tuple) else 0 for path, result in returned.items()}
        return sublayers, sizes

    def _wrap_sublayers(self, index: int, sublayers: tuple[Sublayer, ...], sizes: Mapping[str, int]) -> None:
        layer = self._layers[index]
        for sublayer in sublayers:
            if sublayer.path:
                self._wrap_sublayer(layer.get_submodule(sublayer.path), sublayer, sizes[sublayer.path])

    @cached_property
    def _linears_of(self) -> list[set[str]]:
        """Names of the modules of each layer whose weights are converted only while they compute."""
        return [
            {name for name, module in layer.named_modules() if isinstance(module, nn.Linear)} for layer in self._layers
        ]


def _sublayers(
    layer: nn.Module,
    called: Sequence[tuple[str, Tensor, Tensor]],
    returned: Mapping[str, Any],
    routers: set[str],
    norms: Sequence[tuple[str, Tensor]],
) -> tuple[Sublayer, ...]:
    """Group the calls of linear layers: by module, and by the input that they share."""
    groups: dict[str, list[list[str]]] = {}
    inputs = {name: x for name, x, _ in called}
    keys: dict[str, list[tuple[int, str]]] = {}
    outputs = {}
    for name, x, output in called:
        top, dot, _ = name.partition(".")
        path = top if dot else ""
        outputs[name] = output
        if name in routers or any(name in group for group in groups.get(path, [])):
            continue
        key = (id(x), name.rpartition(".")[0])
        if key in keys.setdefault(path, []):
            groups[path][keys[path].index(key)].append(name)
        else:
            keys[path].append(key)
            groups.setdefault(path, []).append([name])
    sublayers = []
    for path, of_path in groups.items():
        stages = _stages(of_path)
        last = stages[-1]
        is_consumer = len(last) == 1 and len(last[0]) == 1
        consumer: str | None = last[0][0] if is_consumer else None
        if consumer is not None and path and outputs[consumer] is not _first(returned[path]):
            consumer = None
        module = layer.get_submodule(path) if path else None
        first = {layer for group in stages[0] for layer in group} if len(stages[0]) == 1 else set()
        readers = ((norm, {name for name, x in inputs.items() if x is output}) for norm, output in norms)
        sublayers.append(
            Sublayer(
                path=path,
                stages=stages,
                is_attention=module is not None and "attention" in type(module).__name__.lower(),
                consumer=consumer,
                has_experts=module is not None and any(isinstance(one, LinearExperts) for one in module.modules()),
                norm=next((norm for norm, names in readers if first and names == first), None),
            )
        )
    return tuple(sublayers)


def _stages(groups: Sequence[Sequence[str]]) -> tuple[tuple[tuple[str, ...], ...], ...]:
    """Return the groups in order; those of different experts that have the same role form one stage."""
    stages: list[list[tuple[str, ...]]] = []
    of_role: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for group in groups:
        role = tuple(expert_role(name) for name in group)
        if role != tuple(group) and role in of_role:
            of_role[role].append(tuple(group))
            continue
        of_role[role] = [tuple(group)]
        stages.append(of_role[role])
    return tuple(tuple(stage) for stage in stages)


def _renamings(model: Any) -> list[Any]:
    """Return transformers' rules for tensors that have another name in checkpoints than in its modules."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    return [one for one in get_model_conversion_mapping(model, add_legacy=False) if isinstance(one, WeightRenaming)]


def _build(config: Mapping[str, Any]) -> Any:
    """Return the causal language model of a config on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = config.get("model_type")
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            "model_type",
            model_type,
            "is not a supported model family: transformers has no decoder-only model of this type",
            "give a model that transformers' AutoModelForCausalLM loads without code of its own",
        )
    known = {key: value for key, value in config.items() if key not in {"quantization_config", "model_type"}}
    parsed = AutoConfig.for_model(model_type, **known)
    # PyTorch's fused attention has no cap of the logits, and transformers then leaves the cap out.
    attention = "eager" if getattr(parsed, "attn_logit_softcapping", None) else "sdpa"
    try:
        with torch.device("meta"), no_init_weights():
            try:
                model = AutoModelForCausalLM.from_config(parsed, attn_implementation=attention)
            except ValueError:  # a model without fused attention
                model = AutoModelForCausalLM.from_config(parsed, attn_implementation="eager")
    except _FAILURES as error:
        raise UserError(
            "config.json",
            model_type,
            f"describes no model that transformers can build ({type(error).__name__}: {error})",
            "write the values of the original model",
        ) from error
    model.tie_weights()
    return model


def _find_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """Return the path and the list of the decoder layers: the first list with as many modules as the config states."""
    num_layers = getattr(model.config, "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return name, module
    raise unusable(model.config.to_dict(), "transformers' class has no list of decoder layers")


def _in_dtype(module: nn.Embedding, decoder: Decoder) -> Callable[[Tensor], Tensor]:
    """Return an embedding's forward pass that converts only the rows it reads, and scales them in the same dtype."""
    original = module.forward

    def forward(tokens: Tensor) -> Tensor:
        rows, local = tokens.unique(return_inverse=True)
        full, padding = module._parameters["weight"], module.padding_idx
        assert full is not None
        module._parameters["weight"] = full[rows].to(decoder.dtype)
        module.padding_idx = None
        try:
            return original(local)
        finally:
            module._parameters["weight"], module.padding_idx = full, padding

    return forward


def _path_of(model: nn.Module, module: nn.Module) -> str:
    path: str = next(name for name, one in model.named_modules() if one is module)
    return path


def _hidden_of(arguments: Sequence[Any], options: Mapping[str, Any]) -> Tensor:
    states: Tensor = arguments[0] if arguments else options["hidden_states"]
    return states


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


@lru_cache(maxsize=24)
def _decoder(config: str, dtype: torch.dtype, device: str) -> Decoder:
    return Decoder(json.loads(config), dtype, device)


def decoder_of(
    config: Mapping[str, Any], dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Decoder:
    """Return the decoder of a config; equal arguments share one, because building it takes a part of a second."""
    dense = {key: value for key, value in config.items() if key != "quantization_config"}
    return _decoder(json.dumps(dense), dtype, str(device))
