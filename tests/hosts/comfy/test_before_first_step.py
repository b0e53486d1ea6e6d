"""What takes long before the first step shows how far it is, and ends when the user cancels; nothing is left behind."""

import pytest
import torch
from training_runs import Made, images, request, run


@pytest.fixture
def said(monkeypatch):
    """What is shown on the node."""
    from tlora_core.hosts.comfy import progress

    lines = []
    monkeypatch.setattr(progress, "say", lambda text, node_id: lines.append(text))
    monkeypatch.setattr(progress, "SAY_EVERY", 0)
    return lines


CASES = [
    ("tlora", "last_weight"),
    ("tlora", "last_random"),
    ("tlora", "last_random_published"),
    ("vanilla_tlora", "last_random"),
    ("svdiff", "last_random"),
    ("gsoft", "last_random"),
]


@pytest.mark.parametrize("method, start", CASES[:2] + CASES[3:])
def test_pictures_and_layers_are_counted_as_they_are_done(base, output, said, method, start):
    run(base, request(1, method=method, start=start), pictures=images(3))
    assert [line.split(",")[0] for line in said[:3]] == [f"picture {i} of 3" for i in (1, 2, 3)]
    layers = [line for line in said if line.startswith("layer ")]
    assert layers[-1] == "layer 88 of 88, making the start, done" and len(said) == 3 + len(layers)
    done = [int(line.split()[1]) for line in layers]
    assert done == sorted(done) and len(done) > 4 and (start != "last_weight" or done == list(range(1, 89)))


def test_what_is_done_at_once_leaves_no_line_on_the_node(base, output, said, monkeypatch):
    from tlora_core.hosts.comfy import progress

    monkeypatch.setattr(progress, "SAY_EVERY", 600)
    run(base, request(1))
    assert said == []


@pytest.mark.parametrize("method, start", CASES)
def test_a_cancel_ends_it_at_the_next_layer_and_leaves_nothing(base, output, monkeypatch, said, method, start):
    import comfy.model_management
    from comfy.model_management import InterruptProcessingException
    from host_models import is_untouched

    from tlora_core.hosts.comfy.training import personalize

    model = base[0].model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    notes, make = Made(), personalize.make_adapters

    def noted(*args, **kwargs):
        with notes:
            return make(*args, **kwargs)

    def cancel(text, node_id):
        said.append(text)
        if text.startswith("layer"):
            comfy.model_management.interrupt_current_processing()

    monkeypatch.setattr("tlora_core.hosts.comfy.progress.say", cancel)
    monkeypatch.setattr(personalize, "make_adapters", noted)
    with pytest.raises(InterruptProcessingException):
        run(base, request(2, method=method, start=start))
    assert sum(text.startswith("layer") for text in said) == 1
    assert len(notes.made) > 1 and notes.alive == []
    assert not list(output.rglob("run.json")) and not comfy.model_management.in_training and is_untouched(base[0])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_cancel_between_pictures_encodes_no_more(base, output, monkeypatch, said):
    import comfy.model_management
    from comfy.model_management import InterruptProcessingException

    _, _, vae = base
    encoded, encode = [], vae.encode

    def cancelled(pixels):
        encoded.append(1)
        if len(encoded) == 2:
            comfy.model_management.interrupt_current_processing()
        return encode(pixels)

    monkeypatch.setattr(vae, "encode", cancelled)
    with pytest.raises(InterruptProcessingException):
        run(base, pictures=images(4))
    assert len(encoded) == 2
