"""A KV connector for vLLM that shares the last, partly filled block of a common prefix.

vLLM's prefix cache shares only full blocks, here of 32 tokens. Items that follow a history of 1,000 tokens would
each compute its last 8 tokens again. After a history of 600 tokens it would be 24, as many as an item itself has.
Blocks are laid out by position, so the block in which the prefix ends can be copied completely. Its first slots hold
the prefix, and the request that gets the copy overwrites the rest.

A request states its number of shared tokens P in `kv_transfer_params = {"shared_prefix_tokens": P}`. The first
request with a new prefix computes it; at the end of the step that reaches P, its last block is saved. The others
wait until then, at most for the prefill of the prefix, which they need anyway, and load the copy. The key of a copy
is its content: the chained hash of the full blocks, which includes LoRA and cache salt, and the tokens after them.
A request can therefore never read the cache of another prompt.

Enable it with:

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
"""Key of `kv_transfer_params` with the number of leading tokens that a request shares with others."""
_MAX_SAVED_BLOCKS = 64
_MAX_SAVED_BYTES = 2**28
"""Maximum bytes of saved blocks; 32 tokens take 0.7 MiB in SmolLM2-135M and 4 MiB in an 8B model with 8 KV heads."""

_Tail = Hashable
"""Content of a saved block: the hash of the blocks before it, and the tokens of the prefix inside it."""


@dataclass
class _StepCopies(KVConnectorMetadata):
    """The copies that the worker makes before and after one engine step."""

    load: dict[int, list[int]] = field(default_factory=dict)
    """Saved slot → blocks that are overwritten with it before the step."""
    save: dict[int, int] = field(default_factory=dict)
    """Saved slot → block that is copied into it after the step."""


@dataclass
class _Leader:
    """The request that computes a prefix on behalf of the others."""

    request: Request
    num_prefix_tokens: int


class PartialPrefixConnector(KVConnectorBase_V1, SupportsHMA):
    """The connector that the module describes.

    vLLM creates two instances: the scheduler's decides which blocks to copy, and the worker's copies them.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._block_size = vllm_config.cache_config.block_size
        # Models with several cache groups (sliding windows, state-space layers) lay out blocks in other ways.
        self._active = len(kv_cache_config.kv_cache_groups) == 1 and vllm_config.cache_config.enable_prefix_caching
        self._slots: OrderedDict[_Tail, int] = OrderedDict()
        self._leaders: dict[_Tail, _Leader] = {}
        self._step = _StepCopies()
        self._num_blocks = kv_cache_config.num_blocks
        first = kv_cache_config.kv_cache_groups[0]
        block_bytes = first.kv_cache_spec.page_size_bytes * len(first.layer_names)
        self._num_slots = max(1, min(_MAX_SAVED_BLOCKS, _MAX_SAVED_BYTES // block_bytes))
        self._caches: list[torch.Tensor] = []
        self._saved: dict[int, list[torch.Tensor]] = {}

    @property
    def requires_kv_delivery(self) -> bool:
        """Return False: a block that was not saved is computed again."""
        return False

    # --- methods of the scheduler's instance ---

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Return the number of tokens that a saved block provides; None if another request is computing it now."""
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
        """Record which block of `request` must be loaded."""
        if num_external_tokens:
            num_prefix_tokens = self._num_prefix_tokens(request)
            tail = self._tail(request, num_prefix_tokens)
            block = blocks.blocks[0][num_prefix_tokens // self._block_size]
            self._step.load.setdefault(self._slots[tail], []).append(block.block_id)
            self._slots.move_to_end(tail)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """Return the copies of this step: blocks to load, and blocks to save of leaders whose prefix ends in it."""
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
        step, self._step = self._step, _StepCopies()
        return step

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Let another request compute the prefix if this one ended before it was complete."""
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Do the same as `request_finished`, for all cache groups."""
        for tail, leader in list(self._leaders.items()):
            if leader.request.request_id == request.request_id:
                del self._leaders[tail]
        return False, None

    def reset_cache(self) -> bool:
        """Forget all saved blocks when the prefix cache is reset."""
        self._slots.clear()
        return True

    def _num_prefix_tokens(self, request: Request) -> int:
        """Return the number of shared tokens that can be loaded; 0 if the request names none or all of its tokens."""
        requested = (request.kv_transfer_params or {}).get(SHARED_PREFIX_TOKENS, 0)
        usable = self._active and isinstance(requested, int) and 0 < requested < request.num_prompt_tokens
        return requested if usable and request.prompt_token_ids is not None else 0

    def _tail(self, request: Request, num_prefix_tokens: int) -> _Tail:
        num_blocks = num_prefix_tokens // self._block_size
        assert request.prompt_token_ids is not None
        tokens = tuple(request.prompt_token_ids[num_blocks * self._block_size : num_prefix_tokens])
        if num_blocks:
            return request.block_hashes[num_blocks - 1], tokens
        adapter = request.lora_request.lora_int_id if request.lora_request else None
        return request.cache_salt, adapter, tokens

    def _free_slot(self) -> int:
        """Return an unused slot, or the least recently used one."""
        used = set(self._slots.values())
        if len(used) < self._num_slots:
            return next(slot for slot in range(self._num_slots) if slot not in used)
        return self._slots.popitem(last=False)[1]

    # --- methods of the worker's instance ---

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Keep the paged caches, one tensor per layer, with the block dimension first."""
        self._caches = [cache.movedim(cache.shape.index(self._num_blocks), 0) for cache in kv_caches.values()]

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Copy saved blocks to the blocks that this step's requests read."""
        for slot, blocks in self._metadata().load.items():
            for cache, saved in zip(self._caches, self._saved[slot], strict=True):
                for block in blocks:  # on a CPU, one indexed assignment to all blocks takes many times as long
                    cache[block].copy_(saved)

    def wait_for_save(self) -> None:
        """Save the blocks in which this step's prefixes end."""
        for slot, block in self._metadata().save.items():
            self._saved[slot] = [cache[block].clone() for cache in self._caches]

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing: `start_load_kv` has copied all layers."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Do nothing: `wait_for_save` copies all layers."""

    def _metadata(self) -> _StepCopies:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, _StepCopies)
        return metadata
