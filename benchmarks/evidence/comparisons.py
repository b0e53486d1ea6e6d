"""What is compared with what: the paper's claims, as pairs of trainings that differ in one respect."""

from tlora_core.method.starts import DEFAULT_START

from .study import ALPHAS, FREE, PAPERS_STARTS, PUBLISHED_START, RANK, RANKS, SMALL

LORA, TLORA, VANILLA, ORTHO = ({"method": name} for name in ("lora", "tlora", "vanilla_tlora", "ortho_lora"))
SEVERAL_SEEDS = (TLORA, VANILLA, ORTHO)
SLOW_LORA = {"method": "lora", "pace": 0.5}
FLOW = {"base": "flow"}


def comparisons():
    """(text, ours, others): ours follows prompts better at equal IS."""
    yield from _tables_1_to_4()
    yield from _table_5()
    yield from _figures()
    yield from _beyond_the_paper()


def _tables_1_to_4():
    yield f"Tables 1, 2: T-LoRA follows prompts better than LoRA (rank {RANK})", TLORA, LORA
    for rank in RANKS[-2::-1]:
        yield (
            f"Table 1: T-LoRA follows prompts better than LoRA (rank {rank})",
            {**TLORA, "rank": rank},
            {**LORA, "rank": rank},
        )
    yield (
        f"Table 1: Vanilla T-LoRA (mask without start) follows prompts better than LoRA (rank {RANK})",
        VANILLA,
        LORA,
    )
    yield "Tables 1, 2: T-LoRA follows prompts better than LoRA at half its learning rate", TLORA, SLOW_LORA
    yield (
        "Table 1: Vanilla T-LoRA follows prompts better than LoRA at half its learning rate, which is about Vanilla's",
        VANILLA,
        SLOW_LORA,
    )
    yield "Table 3: T-LoRA follows prompts better than Vanilla T-LoRA at the highest rank", TLORA, VANILLA
    yield (
        "Table 3, figure 6: T-LoRA follows prompts better than Ortho-LoRA (start without mask; r_min 100%)",
        TLORA,
        ORTHO,
    )
    for other in ("oft", "gsoft", "svdiff"):
        yield f"Table 2: T-LoRA follows prompts better than {other.upper()}", TLORA, {"method": other}
    yield "Table 4: T-LoRA with one picture follows prompts better than LoRA with two", TLORA, {**LORA, "images": 2}
    yield "Table 4: T-LoRA with one picture follows prompts better than LoRA with three", TLORA, {**LORA, "images": 3}


def _table_5():
    for rank in (RANK, *SMALL):
        lora = {**LORA, **FLOW, "rank": rank}
        yield (
            f"Table 5: T-LoRA follows prompts better than LoRA on a flow-matching base (rank {rank})",
            {**TLORA, **FLOW, "rank": rank},
            lora,
        )
        yield (
            f"Table 5: Vanilla T-LoRA follows prompts better than LoRA on a flow-matching base (rank {rank})",
            {**VANILLA, **FLOW, "rank": rank},
            lora,
        )
    yield (
        "Table 5, figure 6: T-LoRA with r_min 0% follows prompts better than LoRA on a flow-matching base",
        {**TLORA, **FLOW, "min_share": 0.0},
        {**LORA, **FLOW},
    )


def _figures():
    yield (
        "Figure 2: LoRA trained on t < 500 alone follows prompts better than on all t",
        {**LORA, "noise_to": 0.5},
        LORA,
    )
    yield (
        "Figure 2: LoRA trained on t < 800 alone follows prompts better than on all t",
        {**LORA, "noise_to": 0.8},
        LORA,
    )
    yield (
        "Figure 2: LoRA trained on t >= 800 alone follows prompts worse than on all t",
        LORA,
        {**LORA, "noise_from": 0.8},
    )
    yield (
        "Figure 2: LoRA trained on t < 500 alone follows prompts better than on all t, on a flow-matching base",
        {**LORA, **FLOW, "noise_to": 0.5},
        {**LORA, **FLOW},
    )
    for start in PAPERS_STARTS:
        if start != DEFAULT_START:
            yield f"Figure 5: {DEFAULT_START} follows prompts better than {start}", ORTHO, {**ORTHO, "start": start}
    yield "Figure 6: r_min 50% follows prompts better than 0%", TLORA, {**TLORA, "min_share": 0.0}
    yield "Figure 6: r_min 50% follows prompts better than 25%", TLORA, {**TLORA, "min_share": 0.25}


def _beyond_the_paper():
    yield (
        f"Beyond the paper: T-LoRA from {PUBLISHED_START} follows prompts better than from {DEFAULT_START}",
        {**TLORA, "start": PUBLISHED_START},
        TLORA,
    )
    for alpha in ALPHAS:
        yield (
            f"Beyond the paper: r(t) with alpha {alpha:g} follows prompts better than with 1",
            {**TLORA, "alpha": alpha},
            TLORA,
        )
    for curve in FREE:
        yield (
            f"Beyond the paper: r(t) as {curve} follows prompts better than the paper's",
            {**TLORA, "curve": curve},
            TLORA,
        )


def comparisons_at_the_end():
    """(text, ours, others, value): value is higher for ours after the last step."""
    for part, changes in (("t < 800", {"noise_to": 0.8}), ("t < 500", {"noise_to": 0.5})):
        yield (
            f"Figure 2: LoRA trained on {part} alone is less like the concept in the end (IS) than on all t",
            LORA,
            {**LORA, **changes},
            lambda point: point.is_,
        )
    for rank in (RANK, 8):
        yield (
            f"Figure 4: B has a higher effective rank in Ortho-LoRA than in LoRA (rank {rank})",
            {**ORTHO, "rank": rank},
            {**LORA, "rank": rank},
            lambda point: point.effective_rank,
        )


def copying():
    """(text, ours, others): ours copies less often."""
    for who, ours in (
        ("T-LoRA", TLORA),
        ("the mask alone (Vanilla)", VANILLA),
        ("the start alone (Ortho-LoRA)", ORTHO),
    ):
        yield f"{who} copies it less than LoRA", ours, LORA
        yield f"{who} copies it less than LoRA at half its learning rate", ours, SLOW_LORA
    yield "LoRA at half its learning rate copies it less than LoRA", SLOW_LORA, LORA
    for rank in RANKS[-2::-1]:
        yield f"T-LoRA copies it less than LoRA at rank {rank}", {**TLORA, "rank": rank}, {**LORA, "rank": rank}
    yield "T-LoRA with r_min 0% copies it less than T-LoRA with 50%", {**TLORA, "min_share": 0.0}, TLORA
    yield (
        "T-LoRA with r_min 0% copies it less than LoRA at half its learning rate",
        {**TLORA, "min_share": 0.0},
        SLOW_LORA,
    )
    for part, changes in (("t < 800", {"noise_to": 0.8}), ("t < 500", {"noise_to": 0.5})):
        yield f"LoRA trained on {part} alone copies it less than LoRA trained on all t", {**LORA, **changes}, LORA
    yield (
        "LoRA trained on all t copies it less than LoRA trained on t >= 800 alone",
        LORA,
        {**LORA, "noise_from": 0.8},
    )
    for rank in (RANK, *SMALL):
        for who, ours in (("T-LoRA", TLORA), ("Vanilla T-LoRA", VANILLA)):
            yield (
                f"on the flow-matching base, {who} copies it less than LoRA at rank {rank}",
                {**ours, **FLOW, "rank": rank},
                {**LORA, **FLOW, "rank": rank},
            )
    yield (
        "on the flow-matching base, T-LoRA with r_min 0% copies it less than LoRA",
        {**TLORA, **FLOW, "min_share": 0.0},
        {**LORA, **FLOW},
    )
    yield (
        "on the flow-matching base, LoRA trained on t < 500 alone copies it less than LoRA trained on all t",
        {**LORA, **FLOW, "noise_to": 0.5},
        {**LORA, **FLOW},
    )


def comparisons_by_likeness():
    """(text, ours, others)."""
    for base, fields in (("", {}), (", flow-matching base", FLOW)):
        lora = {**LORA, **fields}
        yield f"T-LoRA - LoRA{base}", {**TLORA, **fields}, lora
        yield f"Vanilla T-LoRA - LoRA{base}", {**VANILLA, **fields}, lora
        yield f"T-LoRA with r_min 0% - LoRA{base}", {**TLORA, **fields, "min_share": 0.0}, lora
    yield "Ortho-LoRA - LoRA", ORTHO, LORA
    yield "T-LoRA - Ortho-LoRA", TLORA, ORTHO
    yield "LoRA at half its learning rate - LoRA", SLOW_LORA, LORA
    yield "T-LoRA - LoRA at half its learning rate", TLORA, SLOW_LORA
