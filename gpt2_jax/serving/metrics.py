"""What a server counts, for Prometheus."""

import dataclasses

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)
STEP_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)


@dataclasses.dataclass(frozen=True)
class ModelMetrics:
  """The counters of `Metrics`, of one model."""

  prompt_tokens: Counter
  new_tokens: Counter
  slots: Gauge
  used: Gauge
  queued: Gauge
  first: Histogram
  step: Histogram


class Metrics:
  """The counters of one server. Names begin with gpt2_jax_; times are in seconds."""

  def __init__(self):
    self.registry = CollectorRegistry()

    def counter(name: str, says: str, *labels: str) -> Counter:
      return Counter(f'gpt2_jax_{name}', says, labels, registry=self.registry)

    def gauge(name: str, says: str) -> Gauge:
      return Gauge(f'gpt2_jax_{name}', says, ['model'], registry=self.registry)

    def histogram(name: str, says: str, label: str, buckets: tuple[float, ...]) -> Histogram:
      return Histogram(f'gpt2_jax_{name}', says, [label], registry=self.registry, buckets=buckets)

    self.requests = counter('requests', 'Answered requests.', 'route', 'status')
    self.duration = histogram(
      'request_seconds', 'From a request to the end of its answer.', 'route', SECONDS
    )
    self.prompt_tokens = counter('prompt_tokens', 'Tokens of prompts that were read.', 'model')
    self.new_tokens = counter('completion_tokens', 'Tokens that were written.', 'model')
    self.finished = counter('texts', 'Texts that ended, by why.', 'model', 'reason')
    self.slots = gauge('slots', 'Texts that can be written at a time.')
    self.used = gauge('slots_used', 'Texts that are being written.')
    self.queued = gauge('queue_length', 'Texts that wait for a slot.')
    self.first = histogram(
      'time_to_first_token_seconds', "From a request to a text's first token.", 'model', SECONDS
    )
    self.step = histogram(
      'step_seconds', 'One token for every text that is being written.', 'model', STEP_SECONDS
    )

  def of(self, model: str) -> ModelMetrics:
    """The counters of a model, by its name."""
    names = [field.name for field in dataclasses.fields(ModelMetrics)]
    return ModelMetrics(**{name: getattr(self, name).labels(model) for name in names})
