"""The pod's metrics (prefix wardround_)."""

from prometheus_client import Counter, Gauge

LIVE = Gauge("wardround_pod_live", "1 when the pod has passed the high-water check (P-11) and signs, else 0")
CONNECTED = Gauge("wardround_pod_connected", "1 while the pod's Watch stream to the aggregator is open, else 0")
HELD = Gauge("wardround_pod_attempts_held", "Attempts whose round keys are in memory")
ANSWERS = Counter("wardround_pod_answers_total", "Commands answered, by order and outcome", ["order", "outcome"])
REFUSED = Counter("wardround_pod_headers_refused_total", "Hospitals left out of accept lists, by reason", ["reason"])
ALARMS = Counter("wardround_pod_alarms_total", "Things that a sound committee never sees", ["reason"])
