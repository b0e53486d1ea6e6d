"""Nodes that save or combine the weights of a model with a T-LoRA: a sentence, and no file or model without the
T-LoRA."""

import pytest
import torch
from graphs import TinyGraph, error_of, files_below

WORDS = "This node saves or combines a model's weights, which do not include the T-LoRA"
CASES = {
    "checkpoint": ("CheckpointSave", "model", {"filename_prefix": "tests/wrong"}),
    "model file": ("ModelSave", "model", {"filename_prefix": "tests/wrong"}),
    "extracted LoRA": (
        "LoraSave",
        "model_diff",
        {"filename_prefix": "tests/wrong", "rank": 2, "lora_type": "standard", "bias_diff": False},
    ),
    "merge into it": ("ModelMergeSimple", "model1", {"ratio": 0.5}),
    "merge of it": ("ModelMergeSimple", "model2", {"ratio": 0.5}),
    "blocks of it": ("ModelMergeBlocks", "model2", {"input": 0.5, "middle": 0.5, "out": 0.5}),
    "difference": ("ModelMergeSubtract", "model2", {"multiplier": 1.0}),
    "sum": ("ModelMergeAdd", "model2", {}),
    "scaled attention": ("UNetSelfAttentionMultiply", "model", {"q": 0.5, "k": 1.0, "v": 1.0, "out": 1.0}),
}


def test_nodes_of_the_host_that_save_or_combine_weights_stop_with_a_sentence(server, trained):
    folder = server.workspace / "output"
    for case, (class_type, name, inputs) in CASES.items():
        graph = TinyGraph()
        adapted = graph.add("TLoRALoad", file=trained[0], strength=1.0, model=graph.model)[0]
        # The output of another node refuses as well.
        adapted = graph.add("RescaleCFG", model=adapted, multiplier=0.7)[0]
        others = {"model1": graph.model, "model2": graph.model} if name in ("model1", "model2") else {}
        if class_type == "CheckpointSave":
            others = {"clip": graph.clip, "vae": graph.vae}
        node = graph.add(class_type, **{**others, **inputs, name: adapted})
        if not class_type.endswith("Save"):
            graph.add("ModelSave", model=node[0], filename_prefix="tests/wrong")
        before = files_below(folder)
        message = error_of(server, graph)
        assert message.startswith(WORDS) and "with Bake T-LoRA" in message, case
        assert files_below(folder) == before, case


def test_model_with_strength_zero_or_merged_before_can_be_saved(server, trained):
    graph = TinyGraph()
    merged = graph.add("ModelMergeSimple", model1=graph.model, model2=graph.model, ratio=0.5)[0]
    graph.picture(graph.add("TLoRALoad", file=trained[0], strength=1.0, model=merged)[0])
    bare = graph.add("TLoRALoad", file=trained[0], strength=0.0, model=graph.model)[0]
    graph.add("ModelSave", model=bare, filename_prefix="tests/right")
    server.run(graph)
    assert [*(server.workspace / "output" / "tests").glob("right*")]


@pytest.fixture
def adapted(unet, tlora):
    from tlora_core.hosts.comfy.sampling import apply_tlora

    return apply_tlora(unet, tlora)


def test_nodes_that_only_add_or_read_weights_are_let_through(unet, adapted):
    from comfy.model_patcher import ModelPatcher

    key = next(key for key in unet.model.state_dict() if key.endswith("attn1.to_q.weight"))
    assert adapted.add_patches({key: (torch.ones(1),)}, 0.5) == [key] and key in adapted.clone().patches
    assert isinstance(adapted.clone(), ModelPatcher) and type(adapted).__name__ == type(unet).__name__
    # The host's hooks call them like this.
    assert adapted.model_state_dict().keys() == unet.model_state_dict().keys() == adapted.get_key_patches().keys()
    assert type(unet) is ModelPatcher and unet.state_dict_for_saving() and unet.get_key_patches("diffusion_model.")


def test_patchers_with_a_class_of_their_own_refuse_too(unet, tlora):
    from comfy.model_patcher import ModelPatcher

    from tlora_core import TLoRAError
    from tlora_core.hosts.comfy.sampling import apply_tlora

    class Own(ModelPatcher):
        def clone(self, *args, **kwargs):  # as those for GGUF files do it
            before, self.__class__ = self.__class__, Own
            made = super().clone(*args, **kwargs)
            made.__class__, self.__class__ = Own, before
            return made

    own = unet.clone()
    own.__class__ = Own
    twice = apply_tlora(apply_tlora(own, tlora).clone(), tlora).clone()
    assert isinstance(twice, Own) and type(own) is Own
    for refused in (
        twice.state_dict_for_saving,
        lambda: twice.get_key_patches("diffusion_model."),
        lambda: twice.add_patches({}, 0.5, 0.5),
        lambda: twice.model_state_dict("diffusion_model."),
    ):
        with pytest.raises(TLoRAError, match=WORDS):
            refused()
