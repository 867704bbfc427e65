"""Share the last, partly filled block of a common prefix: a KV connector for vLLM.

vLLM's prefix cache hands on whole blocks of (here) 32 tokens. Candidates that follow a history of 1,000 tokens
would each compute its last 8 tokens again; behind one of 600 tokens it would be 24, as much as a candidate itself.
Blocks are laid out by position, so the block in which the prefix ends can be copied whole: its first slots hold the
prefix, and what else it holds is overwritten by the request that gets the copy.

A request names how many of its tokens are shared in `kv_transfer_params = {"shared_prefix_tokens": P}`. The first
one with a new prefix computes it and, at the end of the step that reaches P, has its last block kept. The others
wait until then (at most the prefix's own prefill, which they need anyway), then load the copy. Copies are found by
content (the chained hash of the full blocks, which includes LoRA and cache salt, and the tokens after them), so a
request can never read what another prompt made.

Enable it with

    --kv-transfer-config '{"kv_connector": "PartialPrefixConnector",
                           "kv_connector_module_path": "slimserve.serve.engine.partial_prefix", "kv_role": "kv_both"}'
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

SHARED_PREFIX_TOKENS = "shared_prefix_tokens"
"""The key of `kv_transfer_params` that counts a request's leading tokens that others have too."""
_MAX_KEPT = 64
_MAX_KEPT_BYTES = 2**28
"""Of kept blocks; one of 32 tokens has 0.7 MiB in SmolLM2-135M and 4 MiB in an 8B model with 8 KV heads."""

_Tail = Hashable
"""What a kept block holds: the hash of the blocks before it, and the prefix's tokens inside it."""


@dataclass
class _Step(KVConnectorMetadata):
    """What the worker does around one engine step."""

    load: dict[int, list[int]] = field(default_factory=dict)
    """Kept slot → blocks to be overwritten with it before the step."""
    save: dict[int, int] = field(default_factory=dict)
    """Kept slot → block to be copied into it after the step."""


@dataclass
class _Leader:
    """The request that computes a prefix for the others."""

    request: Request
    num_prefix_tokens: int


class PartialPrefixConnector(KVConnectorBase_V1, SupportsHMA):
    """See the module. The scheduler's instance decides, the worker's copies; both are made by vLLM."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._block_size = vllm_config.cache_config.block_size
        # Several groups of caches (sliding windows, state-space layers) lay out blocks in other ways.
        self._active = len(kv_cache_config.kv_cache_groups) == 1 and vllm_config.cache_config.enable_prefix_caching
        self._slots: OrderedDict[_Tail, int] = OrderedDict()
        self._leaders: dict[_Tail, _Leader] = {}
        self._step = _Step()
        self._num_blocks = kv_cache_config.num_blocks
        first = kv_cache_config.kv_cache_groups[0]
        block_bytes = first.kv_cache_spec.page_size_bytes * len(first.layer_names)
        self._num_slots = max(1, min(_MAX_KEPT, _MAX_KEPT_BYTES // block_bytes))
        self._caches: list[torch.Tensor] = []
        self._kept: dict[int, list[torch.Tensor]] = {}

    @property
    def requires_kv_delivery(self) -> bool:
        """A block that was not kept is only computed again."""
        return False

    # --- the scheduler's side ---

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens of the last block that a kept copy saves; None: another request computes them now, ask later."""
        num_prefix_tokens = self._num_prefix_tokens(request)
        first_in_block = num_prefix_tokens - num_prefix_tokens % self._block_size
        if num_prefix_tokens == first_in_block or num_computed_tokens > first_in_block:
            return 0, False
        tail = self._tail(request, num_prefix_tokens)
        if tail in self._slots and num_computed_tokens == first_in_block:
            return num_prefix_tokens - first_in_block, False
        leader = self._leaders.setdefault(tail, _Leader(request, num_prefix_tokens))
        return (0 if leader.request.request_id == request.request_id else None), False

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Note which block of `request` is to be loaded."""
        if num_external_tokens:
            num_prefix_tokens = self._num_prefix_tokens(request)
            tail = self._tail(request, num_prefix_tokens)
            block = blocks.blocks[0][num_prefix_tokens // self._block_size]
            self._step.load.setdefault(self._slots[tail], []).append(block.block_id)
            self._slots.move_to_end(tail)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """What this step loads, and what it saves of leaders that reach the end of their prefix in it."""
        assert self._kv_cache_manager is not None
        for tail, leader in list(self._leaders.items()):
            request = leader.request
            scheduled = scheduler_output.num_scheduled_tokens.get(request.request_id, 0)
            if scheduled and request.num_computed_tokens + scheduled >= leader.num_prefix_tokens:
                blocks = self._kv_cache_manager.get_block_ids(request.request_id)[0]
                slot = self._free_slot()
                self._step.save[slot] = blocks[leader.num_prefix_tokens // self._block_size]
                self._slots[tail] = slot
                del self._leaders[tail]
        step, self._step = self._step, _Step()
        return step

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Let another request lead where this one ended before its prefix was computed."""
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """As `request_finished`."""
        for tail, leader in list(self._leaders.items()):
            if leader.request.request_id == request.request_id:
                del self._leaders[tail]
        return False, None

    def reset_cache(self) -> bool:
        """Forget all kept blocks, as the prefix cache forgets its own."""
        self._slots.clear()
        return True

    def _num_prefix_tokens(self, request: Request) -> int:
        """Shared tokens of a request that can be loaded: 0 where it names none, or not fewer than it has."""
        wanted = (request.kv_transfer_params or {}).get(SHARED_PREFIX_TOKENS, 0)
        usable = self._active and isinstance(wanted, int) and 0 < wanted < request.num_prompt_tokens
        return wanted if usable and request.prompt_token_ids is not None else 0

    def _tail(self, request: Request, num_prefix_tokens: int) -> _Tail:
        num_blocks = num_prefix_tokens // self._block_size
        assert request.prompt_token_ids is not None
        tokens = tuple(request.prompt_token_ids[num_blocks * self._block_size : num_prefix_tokens])
        if num_blocks:
            return request.block_hashes[num_blocks - 1], tokens
        adapter = request.lora_request.lora_int_id if request.lora_request else None
        return request.cache_salt, adapter, tokens

    def _free_slot(self) -> int:
        """A slot that holds nothing, or the one that was not used for longest."""
        used = set(self._slots.values())
        if len(used) < self._num_slots:
            return next(slot for slot in range(self._num_slots) if slot not in used)
        return self._slots.popitem(last=False)[1]

    # --- the worker's side ---

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Take the paged caches, one tensor a layer, each seen with its blocks first."""
        self._caches = [cache.movedim(cache.shape.index(self._num_blocks), 0) for cache in kv_caches.values()]

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Copy kept blocks to where this step's requests will read them."""
        for slot, blocks in self._metadata().load.items():
            for cache, kept in zip(self._caches, self._kept[slot], strict=True):
                for block in blocks:  # one indexed assignment to all of them takes many times as long on a CPU
                    cache[block].copy_(kept)

    def wait_for_save(self) -> None:
        """Keep copies of the blocks in which this step's prefixes end."""
        for slot, block in self._metadata().save.items():
            self._kept[slot] = [cache[block].clone() for cache in self._caches]

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: `start_load_kv` has copied all layers."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: `wait_for_save` copies all layers."""

    def _metadata(self) -> _Step:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, _Step)
        return metadata
