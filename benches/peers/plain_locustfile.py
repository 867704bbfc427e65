"""A Locust user as its documentation describes it: about five requests per second, each after the previous answer.

locust -f benches/peers/plain_locustfile.py --headless --users 4 --host URL
"""

from locust import HttpUser, constant_throughput, task


class PlainUser(HttpUser):
    wait_time = constant_throughput(5)

    @task
    def send_chat_request(self) -> None:
        body = {"model": "mock", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
        self.client.post("/v1/chat/completions", json=body)
