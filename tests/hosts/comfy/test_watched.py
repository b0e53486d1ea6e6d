"""What a model's linear layers do, seen in its evaluation: on a model made for it, whose layers' names say nothing."""

import pytest
import torch
from torch import nn

WIDTH, HEADS, PICTURE, TEXT = 8, 2, 4, 3


def heads(tokens, count=HEADS):
    return tokens.unflatten(-1, (count, -1)).transpose(1, 2)


def attend(query, key, value, **options):
    found = nn.functional.scaled_dot_product_attention(query, key, value, **options)
    return found.transpose(1, 2).flatten(-2)


class Block(nn.Module):
    """Joint attention over text and picture, as FLUX has it: queries, keys and values of each in one layer; the keys
    and values have one head, and the queries a norm."""

    def __init__(self):
        super().__init__()
        width = 2 * WIDTH  # of queries, then a head of keys and one of values
        self.a, self.b = nn.Linear(WIDTH, width), nn.Linear(WIDTH, width)
        self.c, self.d = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.e, self.f = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)
        self.h, self.j = nn.Linear(1, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.i = nn.Linear(WIDTH, WIDTH)
        self.k, self.l = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.g = nn.RMSNorm(WIDTH // HEADS)

    def forward(self, picture, text, level):
        picture = self.i(picture)
        both = torch.cat((self.b(text), self.a(picture)), 1)
        query, key, value = both.split((WIDTH, WIDTH // 2, WIDTH // 2), -1)
        given = attend(self.g(heads(query)), heads(key, 1), heads(value, 1), enable_gqa=True)
        text = text + self.d(given[:, :TEXT])
        picture = picture + self.c(given[:, TEXT:])
        text = text + self.l(nn.functional.gelu(self.k(text)))
        gate = self.j(nn.functional.gelu(self.h(level)))
        return picture + gate * self.f(nn.functional.gelu(self.e(picture))), text


class Model(nn.Module):
    """first: reads the text alone. others: blocks over picture and text. crossed: looks from the picture at the
    text."""

    def __init__(self):
        super().__init__()
        self.first = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(4)])
        self.enter = nn.Conv1d(1, WIDTH, 1)
        self.others = nn.ModuleList([Block(), Block()])
        self.crossed = nn.ModuleDict({name: nn.Linear(WIDTH, WIDTH) for name in "qkvo"})
        self.draw = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))])
        self.leave = nn.Linear(WIDTH, 1)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.requires_grad_(False).copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, picture, text, level):
        q, k, v, o = self.first
        text = text + o(attend(*(heads(each(text)) for each in (q, k, v))))
        tokens = self.enter(picture).transpose(1, 2)
        for block in self.others:
            tokens, text = block(tokens, text, level)
        q, k, v, o = self.crossed.values()
        tokens = tokens + o(attend(heads(q(tokens)), heads(k(text)), heads(v(text))))
        return self.leave(self.draw[0](tokens))


def seen(model, change=lambda picture, number: picture):
    from tlora_core.hosts.comfy.model.watched import watched

    text = torch.randn(1, TEXT, WIDTH, generator=torch.Generator().manual_seed(9))

    def evaluate(number):
        picture = torch.randn(1, 1, PICTURE, generator=torch.Generator().manual_seed(number))
        model(change(picture, number), text, torch.ones(1, 1, 1))

    linear = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    return watched(model, linear, list(model.others), evaluate)


@pytest.fixture(scope="module")
def found(comfy):
    return {(part.path, part.row): (part.rows, part.role) for part in seen(Model()).parts}


def test_rows_of_queries_keys_and_values_are_told_apart_whatever_lies_between(found):
    for index in range(2):
        for layer in "ab":
            path = f"others.{index}.{layer}"
            assert [(row, *found[path, row]) for row in (0, 8, 12)] == [
                (0, 8, "query"),
                (8, 4, "key"),
                (12, 4, "value"),
            ]


def test_what_goes_back_to_the_picture_is_trained_and_what_goes_back_to_the_text_is_not(found):
    assert found["others.0.c", 0] == found["crossed.o", 0] == (8, "output")
    assert not any(path.endswith(".d") for path, _ in found)


def test_attention_of_the_text_alone_is_left_out_but_not_its_keys_for_the_picture(found):
    assert not any(path.startswith("first") for path, _ in found)
    assert [found[f"crossed.{each}", 0][1] for each in "qkv"] == ["query", "key", "value"]


def test_feed_forward_layers_are_pairs_beside_an_attention_and_not_those_of_the_noise_level_or_the_stream(found):
    assert {path for (path, _), (_, role) in found.items() if role == "feed-forward"} == {
        f"others.{i}.{layer}" for i in range(2) for layer in "efkl"
    }
    assert not any(path.startswith(("leave", "draw")) for path, _ in found)


def test_an_attention_without_linear_layers_is_named(comfy):
    class Plain(Block):
        def forward(self, picture, text, level):
            given = attend(*(heads(each) for each in (picture, picture, self.e(picture)[..., :WIDTH])))
            return picture + self.c(given), text

    model = Model()
    model.others[1] = Plain()
    assert seen(model).unreached == ["others.1"]


def test_rows_between_one_another_make_one_layer(comfy):
    class Woven(Block):
        def forward(self, picture, text, level):
            query, key, value = self.e(picture).unflatten(-1, (WIDTH, 3)).unbind(-1)
            return picture + self.c(attend(heads(query), heads(key), heads(value))), text

    model = Model()
    model.others[1] = Woven()
    assert [(p.row, p.rows) for p in seen(model).parts if p.path == "others.1.e"] == [(0, 3 * WIDTH)]


def test_the_model_is_as_before(comfy):
    model = Model()
    text, level = torch.ones(1, TEXT, WIDTH), torch.ones(1, 1, 1)
    before = model(torch.ones(1, 1, PICTURE), text, level)
    seen(model)
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert torch.equal(model(torch.ones(1, 1, PICTURE), text, level), before) and not hooks
