"""The random models that tests and benchmarks stand on."""

import pytest
import torch


@pytest.fixture
def unset_memory_is_nan():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def test_nothing_is_left_as_memory_was_found(comfy, unset_memory_is_nan):
    import random_models as models

    assert torch.empty(1).isnan()
    makers = {
        "sdxl": lambda: models.sdxl(64, context=64),
        **{name: lambda name=name: models.small(name) for name in models.SMALL},
    }
    for name, make in makers.items():
        weights = make().model.diffusion_model.state_dict()
        assert not [(name, key) for key, value in weights.items() if not value.isfinite().all()]
