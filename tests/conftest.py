"""What every test shares: one thread, and hypothesis without a clock.

Tests run two and more at a time on small machines, so nothing here or below asserts seconds. Fixtures
that only one folder needs live in that folder.
"""

import hypothesis
import torch

torch.set_num_threads(1)

hypothesis.settings.register_profile(
    "bitsmith",
    deadline=None,
    derandomize=True,  # the same examples on every machine: a red test is red for everybody
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("bitsmith")
