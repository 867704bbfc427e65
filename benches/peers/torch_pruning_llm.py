"""Prune one Llama-like model with torch-pruning, for `make bench-prune`. The script runs in its own environment.

    python torch_pruning_llm.py MODEL TOKENS.jsonl OUTPUT {magnitude,taylor} MLP_FRAC NUM_KV_GROUPS

`magnitude` is the importance of torch-pruning's LLM example (`examples/LLMs/prune_llm.py`): the mean L2 norm of a
group's layers. `taylor` is its first-order importance, with gradients of the language-model loss on the given tokens.
`MetaPruner` removes the same number of MLP neurons from every block. It keeps every KV head of a grouped-query model,
so this script removes KV groups with torch-pruning's functions. NUM_KV_GROUPS is the number of groups to remove per
block. The script removes those with the lowest importance, which is the mean over the group's query heads.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

_MULTIPLE = 32


def main() -> None:
    model_directory, tokens_file, output, importance_name, mlp_frac, num_kv_groups = sys.argv[1:]
    import torch
    import torch_pruning
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # torch-pruning traces the autograd graph, in which fused attention hides its operations.
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32, attn_implementation="eager")
    model.config.use_cache = False
    rows = [json.loads(line)["input_ids"] for line in Path(tokens_file).read_text(encoding="utf-8").splitlines()]
    if importance_name == "taylor":
        importance = torch_pruning.importance.GroupTaylorImportance(group_reduction="mean")
        for row in rows:
            tokens_1T = torch.tensor([row])
            (model(input_ids=tokens_1T, labels=tokens_1T).loss / len(rows)).backward()
    else:
        importance = torch_pruning.importance.GroupMagnitudeImportance(p=2, group_reduction="mean")
    attentions = [block.self_attn for block in model.model.layers]
    pruner = torch_pruning.pruner.MetaPruner(
        model,
        example_inputs=torch.tensor([rows[0][:8]]),
        output_transform=lambda output: output.logits,
        importance=importance,
        pruning_ratio=0.0,
        pruning_ratio_dict={block.mlp.gate_proj: float(mlp_frac) for block in model.model.layers},
        ignored_layers=[model.lm_head, model.model.embed_tokens, *attentions],
        round_to=_MULTIPLE,
    )
    if int(num_kv_groups):
        for attention in attentions:
            _remove_kv_groups(pruner.DG, importance, attention, model.config, int(num_kv_groups))
    if float(mlp_frac):
        pruner.step()

    config, block = model.config, model.model.layers[0]
    head_dim = block.self_attn.head_dim
    config.head_dim = head_dim
    config.intermediate_size = block.mlp.gate_proj.out_features
    config.num_attention_heads = block.self_attn.q_proj.out_features // head_dim
    config.num_key_value_heads = block.self_attn.k_proj.out_features // head_dim
    config.use_cache = True
    model.to(torch.bfloat16).save_pretrained(output)
    AutoTokenizer.from_pretrained(model_directory).save_pretrained(output)


def _remove_kv_groups(graph: Any, importance: Any, attention: Any, config: Any, num_removed: int) -> None:
    import torch
    import torch_pruning

    consumer, head_dim = attention.o_proj, attention.head_dim
    coupled = graph.get_pruning_group(
        consumer, torch_pruning.prune_linear_in_channels, list(range(consumer.in_features))
    )
    num_groups = config.num_key_value_heads
    score_G = importance(coupled).view(num_groups, -1).mean(dim=1)
    removed_G = torch.argsort(score_G)[:num_removed]

    def channels(width: int) -> list[int]:
        """Return the channels of the removed groups in a layer that has `width` channels per group."""
        return [int(group) * width + channel for group in removed_G for channel in range(width)]

    query_width = consumer.in_features // num_groups
    torch_pruning.prune_linear_in_channels(consumer, channels(query_width))
    torch_pruning.prune_linear_out_channels(attention.q_proj, channels(query_width))
    torch_pruning.prune_linear_out_channels(attention.k_proj, channels(head_dim))
    torch_pruning.prune_linear_out_channels(attention.v_proj, channels(head_dim))


if __name__ == "__main__":
    main()
