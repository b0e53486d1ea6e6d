"""Folders with tiny CLIP and DINO models, as transformers writes them."""

import json

import torch

WORDS = ["<unk>", "<s>", "</s>", "a", "photo", "of", "dog", "in", "the", "snow", "at", "night"]
PREPARATION = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}


def write_clip(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={
            **size,
            "vocab_size": len(WORDS),
            "max_position_embeddings": 8,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vision_config={**size, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="</s>").save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPARATION))


def write_dino(folder):
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(1)
    config = ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    ViTModel(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPARATION))


def pictures(count, seed, height=20, width=24):
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(seed))
