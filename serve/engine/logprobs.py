"""Log-probabilities of label reads in full precision, and correct `logprobs` for completions in the same step.

vLLM 0.32's sampler returns one tensor of log-probabilities per step. `register` changes it in two ways:

- Label tokens get log-probabilities from logits that are not rounded to the engine's bfloat16 (label_logits.py). In a
  step that computes no other logits, they are log-probabilities over the labels of the request.
- If any request of the step reads labels, vLLM's tensor holds label tokens for every request. A completion that asked
  for its most likely tokens then gets token 0 with a log-probability of minus infinity instead. Requests without
  labels get their most likely tokens here, as in a step of their own.

Both are in one method of the sampler that CPU engines and vLLM's first GPU model runner use.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from slimserve.serve.engine import label_logits
from slimserve.serve.engine.label_logits import HeadProduct, exact_logits, refine, take_product


def register() -> None:
    """Make vLLM's sampler refine label log-probabilities and keep other requests' most likely tokens."""
    from vllm.v1.outputs import LogprobsTensors
    from vllm.v1.sample.sampler import Sampler

    label_logits.register()
    if hasattr(Sampler, "vllm_methods"):
        return
    vllm_forward, vllm_gather = Sampler.forward, Sampler.gather_specific_token_logprobs

    def forward(self: Any, logits: Tensor, sampling_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        self.num_most_likely = sampling_metadata.max_num_logprobs
        product = self.head_product = take_product(logits)
        if product is not None and product.is_left_out:
            output = _compare_labels(product, sampling_metadata.logprob_token_ids or {})
            if output is not None:
                return output
            self.head_product = product.computed()
            logits = self.head_product.logits_BV
        return vllm_forward(self, logits, sampling_metadata, *args, **kwargs)

    def gather(self: Any, logprobs: Tensor, logprob_token_ids: dict[int, list[int]], sampled: Tensor) -> Any:
        labels = vllm_gather(self, logprobs, logprob_token_ids, sampled)
        product, self.head_product = getattr(self, "head_product", None), None
        if labels is not None and product is not None and self.logprobs_mode == "raw_logprobs":
            _refine(labels, logprob_token_ids, product)
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
    Sampler.vllm_methods = {"forward": vllm_forward, "gather_specific_token_logprobs": vllm_gather}


def _rows_by_labels(
    logprob_token_ids: dict[int, list[int]], device: torch.device
) -> Iterator[tuple[tuple[int, ...], Tensor, Tensor]]:
    """Yield each list of labels, the same as a tensor, and the rows that read them."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, tokens in logprob_token_ids.items():
        groups.setdefault(tuple(tokens), []).append(row)
    for labels, rows in groups.items():
        yield labels, torch.tensor(labels, device=device), torch.tensor(rows, device=device)


def _compare_labels(product: HeadProduct, logprob_token_ids: dict[int, list[int]]) -> Any:
    """Return the sampler's output from the labels' logits alone; None if their rows are not available.

    The sampled token is the best label, or 0 for a request without labels.
    """
    from vllm.v1.outputs import LogprobsTensors, SamplerOutput

    num_rows, device = len(product.hidden_BD), product.hidden_BD.device
    width = 1 + max(map(len, logprob_token_ids.values()), default=0)
    tokens = torch.zeros(num_rows, width, dtype=torch.int32, device=device)
    logprobs = torch.full((num_rows, width), -torch.inf, device=device)
    for labels, tokens_L, rows_R in _rows_by_labels(logprob_token_ids, device):
        exact_RL = exact_logits(product, rows_R, tokens_L)
        if exact_RL is None:
            return None
        values_RL = exact_RL.log_softmax(-1)
        best_R = values_RL.argmax(-1)
        columns = torch.arange(1, len(labels) + 1, device=device)
        tokens[rows_R[:, None], columns] = tokens_L.int()
        logprobs[rows_R[:, None], columns] = values_RL.float()
        tokens[rows_R, 0] = tokens_L[best_R].int()
        logprobs[rows_R, 0] = values_RL.amax(-1).float()
    ranks = torch.ones(num_rows, dtype=torch.int64, device=device)
    found = LogprobsTensors(logprob_token_ids=tokens, logprobs=logprobs, selected_token_ranks=ranks)
    return SamplerOutput(
        sampled_token_ids=tokens[:, :1].contiguous(), logprobs_tensors=found if logprob_token_ids else None
    )


def _refine(labels: Any, logprob_token_ids: dict[int, list[int]], product: HeadProduct) -> None:
    """Replace the log-probabilities of labels, one group of requests with the same labels at a time."""
    device = product.logits_BV.device
    for labels_of_group, tokens_L, rows_R in _rows_by_labels(logprob_token_ids, device):
        exact_RL = exact_logits(product, rows_R, tokens_L)
        if exact_RL is None:
            return
        rounded_RL = product.logits_BV[rows_R[:, None], tokens_L].double()
        is_first = [token not in labels_of_group[:index] for index, token in enumerate(labels_of_group)]
        columns_L = torch.arange(1, len(labels_of_group) + 1, device=device)
        place = (rows_R[:, None], columns_L)
        refined_RL = refine(labels.logprobs[place], rounded_RL, exact_RL, torch.tensor(is_first, device=device))
        labels.logprobs[place] = refined_RL
        # Column 0 has the sampled token, which may be a label.
        is_sampled_RL = labels.logprob_token_ids[place] == labels.logprob_token_ids[rows_R, :1]
        sampled_R = torch.where(is_sampled_RL, refined_RL, -torch.inf).amax(-1)
        labels.logprobs[rows_R, 0] = torch.where(is_sampled_RL.any(-1), sampled_R, labels.logprobs[rows_R, 0])
