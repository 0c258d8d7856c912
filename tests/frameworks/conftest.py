"""Before JAX starts: four devices on the CPU, so that shardings have something to shard over."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
