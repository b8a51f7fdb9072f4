"""The server's counters, in Prometheus' form at `/metrics`."""

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from pointillist.inference.metrics import ImageMetrics


class EngineMetrics:
    """One registry a server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        counter = self._counter
        self._prompts = counter("pointillist_prompts_prefilled", "Distinct prompts that were read")
        self._prompt_tokens = counter("pointillist_prompt_tokens_prefilled", "Tokens of distinct prompts")
        self._completions = counter("pointillist_completions_started", "Completions that share those prompts")
        self._tokens = counter("pointillist_tokens_sampled", "Sampled tokens")
        self.images = ImageMetrics(self.registry)
        self.refused = counter("pointillist_requests_refused", "Requests answered with an error")
        self._running = Gauge("pointillist_running", "Sequences being decoded", registry=self.registry)
        self._waiting = Gauge("pointillist_waiting", "Requests waiting for room", registry=self.registry)
        self.weight_version = Gauge("pointillist_weight_version", "Weights that serve", registry=self.registry)

    def prefilled(self, prompts: int, tokens: int, completions: int) -> None:
        """Counts one prefill."""
        self._prompts.inc(prompts)
        self._prompt_tokens.inc(tokens)
        self._completions.inc(completions)

    def sampled(self, tokens: int) -> None:
        """Counts one decoding step."""
        self._tokens.inc(tokens)

    def queues(self, running: int, waiting: int) -> None:
        """Sets the queue lengths."""
        self._running.set(running)
        self._waiting.set(waiting)

    def exposition(self) -> bytes:
        """The metrics as Prometheus reads them."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, registry=self.registry)
