"""Correct `logprobs` for completions that share an engine step with a label read.

vLLM 0.32's sampler returns one tensor of log-probabilities per step. If any request of the step reads chosen label
tokens, the tensor holds those tokens for every request. A completion that asked for its most likely tokens then gets
token 0 with a log-probability of minus infinity instead. `register` completes the tensor: requests without labels get
their most likely tokens, as in a step of their own.

The change is one method of the sampler that CPU engines and vLLM's first GPU model runner use.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def register() -> None:
    """Make vLLM's sampler keep the most likely tokens of requests that read no labels."""
    from vllm.v1.outputs import LogprobsTensors
    from vllm.v1.sample.sampler import Sampler

    if getattr(Sampler, "keeps_most_likely_tokens", False):
        return
    vllm_forward, vllm_gather = Sampler.forward, Sampler.gather_specific_token_logprobs

    def forward(self: Any, logits: Tensor, sampling_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        self.num_most_likely = sampling_metadata.max_num_logprobs
        return vllm_forward(self, logits, sampling_metadata, *args, **kwargs)

    def gather(self: Any, logprobs: Tensor, logprob_token_ids: dict[int, list[int]], sampled: Tensor) -> Any:
        labels = vllm_gather(self, logprobs, logprob_token_ids, sampled)
        count = getattr(self, "num_most_likely", None)
        if labels is None or count is None or len(logprob_token_ids) == len(logprobs):
            return labels
        count = logprobs.shape[-1] if count == -1 else count
        likely = self.gather_logprobs(logprobs, count, token_ids=sampled)
        reads_labels_B = torch.zeros(len(logprobs), dtype=torch.bool)
        reads_labels_B[list(logprob_token_ids)] = True
        reads_labels_B1 = reads_labels_B.to(logprobs.device)[:, None]
        width = max(labels.logprobs.shape[1], likely.logprobs.shape[1])

        def merged(label_values_BL: Tensor, likely_values_BK: Tensor, padding: float) -> Tensor:
            sides = [
                torch.nn.functional.pad(values, (0, width - values.shape[1]), value=padding)
                for values in (label_values_BL, likely_values_BK)
            ]
            return torch.where(reads_labels_B1, *sides)

        return LogprobsTensors(
            logprob_token_ids=merged(labels.logprob_token_ids, likely.logprob_token_ids, 0),
            logprobs=merged(labels.logprobs, likely.logprobs, float("-inf")),
            selected_token_ranks=labels.selected_token_ranks,
        )

    Sampler.forward = forward
    Sampler.gather_specific_token_logprobs = gather
    Sampler.keeps_most_likely_tokens = True
    Sampler.vllm_methods = {"forward": vllm_forward, "gather_specific_token_logprobs": vllm_gather}
