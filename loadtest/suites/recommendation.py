"""Slates of candidates behind a member's history, scored in one request each."""

from typing import cast

from locust import task

from loadtest.user import WorkloadUser, register
from workloads.interface import ScoringPrompt


class RecommendationUser(WorkloadUser):
    workload = "recommendation"

    @task
    def rank(self) -> None:
        prompt = cast("ScoringPrompt", self.run_state.next_prompt())
        row = self.client.score(self.run_state.model, prompt.query, prompt.items, prompt.labels)
        self.report("/generative_scoring", row)


register(RecommendationUser)
