"""The random models that tests and benchmarks stand on."""
import pytest
import torch


@pytest.fixture
def unset_memory_is_nan():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", ["sdxl", "flux", "sd3"])
def test_nothing_is_left_as_memory_was_found(comfy, unset_memory_is_nan, name):
    import random_models as models

    assert torch.empty(1).isnan()
    model = {"sdxl": lambda: models.sdxl(64), "flux": lambda: models.flux(256, (1, 1), 64, 32),
             "sd3": lambda: models.sd3(1, 64, 32)}[name]()
    assert not [key for key, value in model.model.diffusion_model.state_dict().items() if not value.isfinite().all()]
