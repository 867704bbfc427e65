"""Experts of a mixture as single linear layers, as checkpoints and engines have them.

Shape suffixes: N tokens; D hidden size; E experts; H inner size of an expert; I its inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slimserve.core.errors import UserError


def expert_role(name: str) -> str:
    """Return a layer's name with `*` in place of the number of its expert, `mlp.experts.*.up_proj`."""
    before, experts, after = name.partition(".experts.")
    return f"{before}{experts}*.{after.partition('.')[2]}" if experts else name


class LinearExperts(nn.Module):
    """Experts as single linear layers, in place of transformers' stacked parameters.

    Checkpoints and engines have one tensor per expert and layer, and each expert is quantized on the tokens that the
    router sends to it.
    """

    def __init__(self, stacked: nn.Module, names: tuple[str, str, str]) -> None:
        """Take the sizes and the activation of `stacked`; `names` are those of gate, up and down in checkpoints."""
        super().__init__()
        gate_up_EIH, down_EHI = stacked.gate_up_proj, stacked.down_proj
        self._names = names
        self.runs_all = False
        """True runs every expert on the first token; to learn the order of the layers."""
        self.act_fn: Any = stacked.act_fn
        num_experts, double, hidden = gate_up_EIH.shape
        with torch.device("meta"):
            for number in range(int(num_experts)):
                expert = nn.Module()
                expert.add_module(names[0], nn.Linear(int(hidden), int(double) // 2, bias=False))
                expert.add_module(names[1], nn.Linear(int(hidden), int(double) // 2, bias=False))
                expert.add_module(names[2], nn.Linear(int(down_EHI.shape[2]), int(down_EHI.shape[1]), bias=False))
                self.add_module(str(number), expert)
        self.num_experts = int(num_experts)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs, shaped as `hidden_states` `[N, D]`."""
        total = torch.zeros_like(hidden_states)
        for number in range(self.num_experts):
            expert = self.get_submodule(str(number))
            gate, up, down = (expert.get_submodule(name) for name in self._names)
            token_N, place_N = torch.where(top_k_index == number)
            if self.runs_all:
                token_N = place_N = torch.zeros(1, dtype=torch.int64, device=hidden_states.device)
            elif not len(token_N):
                continue
            x = hidden_states[token_N]
            output = down(self.act_fn(gate(x)) * up(x)) * top_k_weights[token_N, place_N, None]
            total.index_add_(0, token_N, output.to(total.dtype))
        return total


def replace_experts(layer: nn.Module, model: Any) -> None:
    """Replace transformers' stacked experts by linear layers, named as in checkpoints."""
    for path, module in list(layer.named_modules()):
        gate_up, down = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
        if not (isinstance(gate_up, nn.Parameter) and isinstance(down, nn.Parameter) and gate_up.dim() == 3):
            continue
        is_plain = gate_up.shape[1] == 2 * down.shape[2] and gate_up.shape[2] == down.shape[1]
        names = _expert_names(model)
        if not is_plain or names is None or len(list(module.parameters(recurse=False))) != 2:
            raise unusable(
                model.config.to_dict(), f"its experts ({type(module).__name__}) are not stored as gate, up and down"
            )
        parent, _, child = path.rpartition(".")
        setattr(layer.get_submodule(parent), child, LinearExperts(module, names))


def _expert_names(model: Any) -> tuple[str, str, str] | None:
    """Return the names of an expert's gate, up and down in checkpoints, by transformers' rules of conversion."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    found: dict[str, list[str]] = {}
    for transform in get_model_conversion_mapping(model, add_legacy=False):
        for target in transform.target_patterns:
            sources = [
                source.removesuffix(".weight").rpartition(".")[2] for source in transform._original_source_patterns
            ]
            found.setdefault(target.rpartition(".")[2], sources)
    gate_up, down = found.get("gate_up_proj", []), found.get("down_proj", [])
    return (gate_up[0], gate_up[1], down[0]) if len(gate_up) == 2 and len(down) == 1 else None


def is_router(layer: nn.Module, name: str) -> bool:
    """Tell whether a linear layer beside experts chooses among them or weighs a shared one."""
    parent = layer.get_submodule(name.rpartition(".")[0])
    experts = [child for child in parent.children() if isinstance(child, LinearExperts)]
    module = layer.get_submodule(name)
    return bool(experts) and isinstance(module, nn.Linear) and module.out_features in {1, experts[0].num_experts}


def unusable(config: Mapping[str, Any], reason: str) -> UserError:
    """Return the error for a model whose layers cannot run one by one."""
    return UserError(
        "model_type", config.get("model_type"), f"cannot be compressed: {reason}", "use a plain decoder-only model"
    )
