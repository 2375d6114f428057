"""Ray Serve applications over dataeff artifacts.

Ray Serve reads its settings from the environment of the process that starts Ray. Importing this package sets them, as
`serve run serve.app:model` does before it starts Ray; where `ray start` or KubeRay starts it, they belong in its
environment (README, cluster/rayservice-model.yaml).
"""

import os
import random
import sys

# Ray's high-throughput settings: HAProxy in place of the proxy in Python, which took more time than a small network
# (3 ms of CPU a request against 0.2 ms), and one event loop in each replica in place of two.
RAY_SETTINGS = {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_LOG_TO_STDERR": "1",  # the line above would keep replicas' warnings from the terminal
    # Without HAProxy, which ray[serve] brings along on Linux, the first line would leave nobody to listen on the port.
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
    "RAY_SERVE_ENABLE_HA_PROXY": "1" if sys.platform == "linux" else "0",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",  # a dead proxy is replaced in 5 s and not in 35 s
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",  # one that starts on a busy machine is not taken for dead after 5 s
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",  # at 0.1 the controller takes 7 % of a core with nothing to do
    # How long a replica that is to go still takes requests: until HAProxy no longer sends any.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
}
# Ports of HAProxy's own, of the proxy that answers while there is no replica, and of the replicas: a block by chance
# below the ports that the system gives out itself, so that two clusters on one machine do not meet.
_BLOCK = random.SystemRandom().randrange(20_000, 32_000, 200)
LOCAL_PORTS = {
    "RAY_SERVE_HAPROXY_METRICS_PORT": str(_BLOCK),
    "RAY_SERVE_HAPROXY_STATS_PORT": str(_BLOCK + 1),
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(_BLOCK + 2),
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(_BLOCK + 3),
    "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(_BLOCK + 10),
    "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(_BLOCK + 199),
}

for _name, _value in (RAY_SETTINGS | LOCAL_PORTS).items():
    os.environ.setdefault(_name, _value)
