import json
from pathlib import Path
from typing import cast

import pytest

from slimserve.core.errors import UserError
from slimserve.loadtest.prompts import make_prompts
from slimserve.loadtest.settings import SuiteOptions
from slimserve.workloads.interface import ChatPrompt, ScoringPrompt, SizeDistribution
from slimserve.workloads.recommendation import Recommendation


def candidate_lists(options: SuiteOptions, count: int = 120) -> list[ScoringPrompt]:
    return [cast("ScoringPrompt", prompt) for _, prompt in make_prompts("recommendation", options, count)]


def test_default_candidate_lists_are_those_of_the_workload() -> None:
    assert candidate_lists(SuiteOptions()) == Recommendation().make_prompts("load", 120)


def test_sizes_follow_their_distributions() -> None:
    drawn = candidate_lists(SuiteOptions(history="4..8", candidates="2,6"))
    assert {prompt.query.count("\n") for prompt in drawn} == set(range(4, 9))
    assert {len(prompt.items) for prompt in drawn} == {2, 6}
    assert all(len(prompt.truth) == len(prompt.items) for prompt in drawn)
    assert drawn == candidate_lists(SuiteOptions(history="4..8", candidates="2,6"), 200)[:120], (
        "more prompts do not change the earlier ones"
    )


def test_repeat_visits_send_a_users_earlier_history_with_other_candidates() -> None:
    plain, repeated = candidate_lists(SuiteOptions()), candidate_lists(SuiteOptions(repeat_visits=0.9))
    assert len({prompt.query for prompt in plain}) == len(plain)
    assert len({prompt.query for prompt in repeated}) < len(repeated)
    assert [prompt.items for prompt in repeated] == [prompt.items for prompt in plain]
    by_query: dict[str, set[int]] = {}
    for prompt in repeated:
        by_query.setdefault(prompt.query, set()).add(prompt.group)
    assert all(len(users) == 1 for users in by_query.values())


def test_mixed_prompts_are_those_of_both_suites_in_their_order() -> None:
    options = SuiteOptions(share=0.25, max_tokens="32..64")
    mixed = make_prompts("mixed", options, 80)
    of_kind = {kind: [prompt for name, prompt in mixed if name == kind] for kind in ("recommendation", "reasoning")}
    assert 8 < len(of_kind["recommendation"]) < 34
    for kind, prompts in of_kind.items():
        assert prompts == [prompt for _, prompt in make_prompts(kind, options, len(prompts))]
    assert all(32 <= cast("ChatPrompt", prompt).max_tokens <= 64 for prompt in of_kind["reasoning"])


def test_chats_are_read_as_messages_or_prompts(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
    file.write_text(f"{json.dumps({'messages': messages, 'max_tokens': 7})}\n\n{json.dumps({'prompt': 'Ho'})}\n")
    first, second = (cast("ChatPrompt", prompt) for _, prompt in make_prompts("chat", SuiteOptions(data=str(file)), 9))
    assert (list(first.messages), first.max_tokens) == (messages, 7)
    assert (second.messages, second.max_tokens) == (({"role": "user", "content": "Ho"},), 160)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is missing"),
        ("", "has no conversation"),
        ("{}", ":1' is not a conversation"),
        ('{"prompt": "a"}\n[1]', ":2' is not a JSON object"),
    ],
)
def test_data_without_conversations_is_rejected(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "chats.jsonl"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=message):
        make_prompts("chat", SuiteOptions(data="" if text is None else str(file)), 9)


def test_a_run_starts_at_its_first_prompt_and_wraps_around() -> None:
    everything = candidate_lists(SuiteOptions(), 2000)
    assert candidate_lists(SuiteOptions(first_prompt=100), 50) == everything[100:150]
    assert candidate_lists(SuiteOptions(first_prompt=len(everything) - 10), 30) == everything[-10:] + everything[:20]
    assert candidate_lists(SuiteOptions(prompt_seed=1), 50) != everything[:50]


def test_histories_longer_than_every_users_are_rejected() -> None:
    with pytest.raises(UserError, match="is longer than the history of every user"):
        candidate_lists(SuiteOptions(history="5000"))


@pytest.mark.parametrize("text", ["", "0", "5..2", "a", "1,,2", "-3"])
def test_an_invalid_size_is_rejected(text: str) -> None:
    with pytest.raises(UserError, match="is not a size"):
        SizeDistribution("--candidates", text)


def test_a_workload_without_a_prompt_for_load_is_rejected(tmp_path: Path) -> None:
    file = tmp_path / "none.py"
    file.write_text(
        "from slimserve.workloads.reasoning import Reasoning\n"
        "class Nothing(Reasoning):\n"
        "    name = 'nothing'\n"
        "    def load_prompts(self, options, num_prompts):\n"
        "        return []\n"
        "WORKLOAD = Nothing()\n"
    )
    with pytest.raises(UserError, match="has no prompt for load"):
        make_prompts(str(file), SuiteOptions(), 4)
