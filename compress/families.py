"""Which tensor plays which role in a decoder block: one table row per model family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from contracts.errors import UserError


@dataclass(frozen=True)
class LayerRoles:
    """Names of a decoder block's linear layers, relative to the block."""

    block: str
    """Prefix of block `{index}` in the checkpoint."""
    mlp_producers: tuple[str, ...]
    """Layers whose rows are the MLP's neurons."""
    mlp_consumer: str
    """The layer whose columns are the MLP's neurons."""
    attention: tuple[str, ...]

    @property
    def linears(self) -> tuple[str, ...]:
        """Every linear layer of a block, in the order of the forward pass."""
        return (*self.attention, *self.mlp_producers, self.mlp_consumer)


_GATED = LayerRoles(
    block="model.layers.{index}.",
    mlp_producers=("mlp.gate_proj", "mlp.up_proj"),
    mlp_consumer="mlp.down_proj",
    attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
)

FAMILIES: dict[str, LayerRoles] = {"llama": _GATED, "mistral": _GATED, "qwen2": _GATED, "qwen3": _GATED}
"""Layer roles by the `model_type` of config.json."""


def roles_of(config: Mapping[str, Any]) -> LayerRoles:
    """The layer roles of a model's family; UserError lists the families that are known."""
    model_type = config["model_type"]
    if model_type not in FAMILIES:
        raise UserError(
            "model_type", model_type, "is not a family that compress knows", f"supported: {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]
