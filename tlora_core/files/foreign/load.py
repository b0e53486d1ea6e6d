"""`load_any` detects the kind of a LoRA or T-LoRA file by its keys, and returns a TLoRAFile with a report."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ...errors import TLoRAError
from ...method.adapters import METHODS
from ...method.schedule import RankSchedule
from ..tlora_file import METADATA_KEY, TLoRAFile
from ..untrusted import PHRASE_KEY, Contents, one_line, printable, read_contents, read_metadata, text_of
from .hparams import find_hparams, flag, read_hparams, real, whole
from .kohya import stated_schedule
from .model_description import Matches, ModelDescription, model_of
from .modules import Parts, modules_of
from .orthogonal import Progress, is_orthogonal, read_orthogonal
from .plain import read_plain
from .stacked import recombine

_MASKED = {"lora": "vanilla_tlora", "ortho_lora": "tlora"}
_UNMASKED = {masked: method for method, masked in _MASKED.items()}


@dataclass(frozen=True)
class Loaded:
    """The T-LoRA, the kind of file, the unmatched keys with the reason, and notes for the user.

    schedule: a sentence that names the source of the schedule."""

    tlora: TLoRAFile
    kind: str
    unmatched: Mapping[str, str]
    notes: tuple[str, ...]
    schedule: str

    @property
    def report(self) -> str:
        """A few lines for the user."""
        s = self.tlora.schedule
        lines = [
            f"{self.kind}: {len(self.tlora.layers)} layers matched, rank {s.rank}, min_rank {s.min_rank}, "
            f"{'a curve' if s.points else f'alpha {s.alpha:g}'}."
        ]
        for reason, count in Counter(self.unmatched.values()).most_common():
            example = next(key for key, why in self.unmatched.items() if why == reason)
            lines.append(f"{count} key{'s' if count > 1 else ''} unmatched, for example {example[:200]!r}: {reason}.")
        return "\n".join([*lines, self.schedule, *self.notes])


@dataclass(frozen=True)
class _Settings:
    """A file's schedule and prompt, as far as it or the files beside it state them.

    schedule: replaces min_rank and alpha. unfit: the reason why no schedule can be set, else empty."""

    is_masked: bool
    min_rank: int | None = None
    alpha: float = 1.0
    token: str = ""
    class_word: str = ""
    notes: tuple[str, ...] = ()
    schedule: RankSchedule | None = None
    unfit: str = ""


def load_any(
    path: str | Path,
    model: ModelDescription | None = None,
    min_rank: int | None = None,
    alpha: float | None = None,
    progress: Progress | None = None,
) -> Loaded:
    """Reads an untrusted file of any known kind, without running code from it.

    model: the model it must fit. Without one, names are translated for SD1.5, SD2, SDXL and FLUX.
    min_rank, alpha: the schedule to use; None means the file's own. For a file without one, a note states the
        assumption: half the rank, the paper's min_rank, for kinds that only the reference or LyCORIS writes; no mask
        for a file that may be a plain LoRA.
    progress: called with (done, total), done from 0 on, while a LyCORIS file's base terms are recomputed; it may raise.

    Raises TLoRAError, naming the file, when it is missing, damaged, of an unknown kind, or matches no layer.
    """
    path = Path(path)
    try:
        return _load(path, model, min_rank, alpha, progress)
    except TLoRAError as error:
        message = printable(str(error))
        raise TLoRAError(message if message.startswith(f'"{path.name}"') else f'"{path.name}": {message}') from error
    except OSError as error:
        raise TLoRAError(
            f'"{path.name}": it cannot be read ({one_line(error)}); check the disk and its permissions.'
        ) from error


def _load(
    path: Path, model: ModelDescription | None, min_rank: int | None, alpha: float | None, progress: Progress | None
) -> Loaded:
    if METADATA_KEY in read_metadata(path):
        tlora = TLoRAFile.load(path)
        return Loaded(
            rescheduled(tlora, min_rank, alpha),
            "T-LoRA file",
            {},
            (),
            _origin(tlora.schedule, "the file's own", min_rank, alpha),
        )
    contents = read_contents(path)
    matches = Matches(model)
    matches.reject(contents.non_tensors, "it is not a tensor")
    modules = modules_of(contents.tensors, matches)
    kind, settings = _read(contents, modules, matches, path, progress)
    if not settings.token and not settings.class_word:  # the trigger phrase does not say which words are which
        settings = replace(settings, token=text_of(contents.metadata.get(PHRASE_KEY)).strip())
    _require_match(matches)
    if settings.unfit and not (min_rank is None and alpha is None):
        raise TLoRAError(settings.unfit)
    method = "ortho_lora" if next(iter(matches.layers.values())).group == 2 else "lora"
    tlora = _file(matches, _MASKED[method] if settings.is_masked else method, settings)
    notes = settings.notes if min_rank is None else ()
    source = (
        "from the hparams.yml beside the file"
        if "with hparams.yml" in kind
        else "the file's own"
        if settings.schedule
        else "a default, as the file states none"
    )
    return Loaded(
        rescheduled(tlora, min_rank, alpha),
        kind,
        matches.unmatched,
        notes,
        _origin(tlora.schedule, source, min_rank, alpha),
    )


def _origin(own: RankSchedule, source: str, min_rank: int | None, alpha: float | None) -> str:
    """A sentence on the source of the schedule in use. own: the schedule before the inputs override it."""
    chosen = [
        f"{name} {value:g} in place of {'the curve' if own.points else f'{before:g}'}"
        for name, value, before in (("min_rank", min_rank, own.min_rank), ("alpha", alpha, own.alpha))
        if value is not None
    ]
    return f"The schedule is {source}" + (f", but the node sets {' and '.join(chosen)}." if chosen else ".")


def _read(
    contents: Contents, modules: Mapping[str, Parts], matches: Matches, path: Path, progress: Progress | None
) -> tuple[str, _Settings]:
    """Fills `matches`; returns the kind of file and its settings."""
    orthogonal = any(is_orthogonal(parts) for parts in modules.values())
    if orthogonal:
        read_orthogonal(contents, modules, matches, progress)
    else:
        read_plain(contents, modules, matches, path)
    stacked = 0 if orthogonal else recombine(matches.layers)
    rank = max((layer.rank for layer in matches.layers.values()), default=0)
    if any(".processor." in module for module in modules):
        return _processors(path, rank, orthogonal, model_of(matches.layers)[0])
    kind, settings = _kind(modules, rank, orthogonal, stacked, len(matches.layers))
    if not stacked and _is_exported(contents.metadata):
        note = (
            "It was exported from a T-LoRA of this pack for other programs, which apply all ranks; load that T-LoRA to "
            "have its schedule."
        )
        settings = _Settings(
            is_masked=False,
            notes=(note,),
            unfit=(
                "It was exported from a T-LoRA of this pack, whose ranks are pairs of columns here, so it cannot have "
                "a schedule; set min_rank to -1 and alpha to 0, or load that T-LoRA."
            ),
        )
    stated, note = stated_schedule(contents.metadata, rank)
    if stated is not None and not settings.unfit:
        settings = replace(settings, is_masked=not stated.is_constant, schedule=stated, notes=(note,))
    elif note:
        settings = replace(settings, notes=(*settings.notes, note))
    return kind, settings


def _is_exported(metadata: Mapping[str, str]) -> bool:
    """Whether this pack exported the file from an orthogonal method; see tlora_file.plain_metadata."""
    method = METHODS.get(text_of(metadata.get("modelspec.description")).partition(",")[0])
    return metadata.get("modelspec.tags") == "t-lora" and method is not None and method.is_orthogonal


def _kind(
    modules: Mapping[str, Parts], rank: int, orthogonal: bool, stacked: int, layers: int
) -> tuple[str, _Settings]:
    """The kind of a file that is not the reference's, and its settings inferred from its tensors."""
    if orthogonal:
        lycoris = not any("base_q" in parts for parts in modules.values())
        return (
            ("LyCORIS T-LoRA", _assumed("LyCORIS files do not store it", rank))
            if lycoris
            else ("T-LoRA of a kohya-like trainer", _assumed("its metadata does not state it", rank))
        )
    if not stacked:
        note = "A plain LoRA has no schedule, so all ranks are on at every noise level; set min_rank to give it one."
        return "plain LoRA", _Settings(is_masked=False, notes=(note,))
    if stacked == layers:
        note = (
            "It holds both terms of an orthogonal T-LoRA or Ortho-LoRA, one after the other, which were recombined. It "
            "has no schedule, so all ranks are on at every noise level; set min_rank to give it one (the paper's is "
            f"{_half(rank)}, half the rank)."
        )
        return "plain LoRA made of an orthogonal one", _Settings(is_masked=False, notes=(note,))
    unfit = (
        f"{stacked} of its {layers} layers hold both terms of an orthogonal T-LoRA, one after the other, but the rest "
        "do not, so it cannot have a schedule; set min_rank to -1 and alpha to 0, or load the original T-LoRA."
    )
    note = "It has no schedule, so all ranks are on at every noise level."
    return "plain LoRA, partly made of an orthogonal one", _Settings(is_masked=False, notes=(note,), unfit=unfit)


def _processors(path: Path, rank: int, orthogonal: bool, base_model: str) -> tuple[str, _Settings]:
    """Kind and settings of a file with keys of attention processors: the reference's, or for U-Nets perhaps a plain
    LoRA of diffusers before 0.22."""
    method = "orthogonal" if orthogonal else "plain"
    is_flux = base_model == "flux"
    may_be_plain = not orthogonal and not is_flux
    kind = "plain LoRA of older diffusers, or reference file" if may_be_plain else f"reference file ({method})"
    usual = 16 if is_flux else 1

    def assumed(reason: str) -> tuple[str, _Settings]:
        trainers = f" The trainer's own default is {min(usual, rank)}."
        return kind, _assumed_plain(reason, rank, trainers) if may_be_plain else _assumed(reason, rank, trainers)

    found = find_hparams(path)
    if found is None:
        return assumed("there is no logs/hparams.yml beside its folder")
    hparams = read_hparams(found)
    stored = whole(hparams, "rank" if is_flux else "lora_rank", rank)
    if stored != rank:
        return assumed(f"the hparams.yml beside it is for rank {stored}, not {rank}, and was not used")
    # SDXL's settings have trainer_class; a class without "tlora" in its name has no mask.
    masked = flag(hparams, "tlora", "tlora" in hparams.get("trainer_class", "tlora"))
    settings = _Settings(
        masked,
        whole(hparams, "min_rank", min(usual, rank)) if masked else None,
        real(hparams, "alpha_rank_scale", 1.0) if masked else 1.0,
        _word(hparams.get("placeholder_token", "")),
        _word(hparams.get("class_name", "")),
    )
    return f"reference file ({method}, with hparams.yml)", settings


def _word(text: str) -> str:
    return text if text.isprintable() and text != "null" else ""


def _assumed(reason: str, rank: int, trainers: str = "") -> _Settings:
    """trainers: a sentence on the default of these files' trainer."""
    note = (
        f"The schedule was not found ({reason}), so it is assumed: min_rank {_half(rank)}, half the rank, the paper's "
        f"choice.{trainers} If it was trained with another, set min_rank; at the full rank, {rank}, the mask is off."
    )
    return _Settings(is_masked=True, notes=(note,))


def _assumed_plain(reason: str, rank: int, trainers: str) -> _Settings:
    note = (
        f"No schedule was found ({reason}), so all ranks are on at every noise level, as in a plain LoRA of older "
        "diffusers, which looks the same. If it is a Vanilla T-LoRA of the T-LoRA authors' code, set min_rank; the "
        f"paper's is {_half(rank)}, half the rank.{trainers}"
    )
    return _Settings(is_masked=False, notes=(note,))


def _half(rank: int) -> int:
    """The paper's min_rank."""
    return max(1, rank // 2)


def _require_match(matches: Matches) -> None:
    if matches.layers:
        return
    if not matches.unmatched:
        raise TLoRAError("it holds no tensors; choose a LoRA or T-LoRA file.")
    reasons = Counter(matches.unmatched.values())
    key, reason = next((key, why) for key, why in matches.unmatched.items() if why == reasons.most_common(1)[0][0])
    raise TLoRAError(f"none of its {len(matches.unmatched)} keys fits; for example {key[:200]!r}: {reason}.")


def _file(matches: Matches, method: str, settings: _Settings) -> TLoRAFile:
    layers = {name: layer.balanced() for name, layer in matches.layers.items()}
    for name, layer in layers.items():
        if not layer.is_finite:
            raise TLoRAError(
                f"the update of its layer {name} is too large for float32; train it again with a lower rate."
            )
    rank = max(layer.rank for layer in layers.values())
    masked = METHODS[method].is_masked
    min_rank = rank if not masked else _half(rank) if settings.min_rank is None else settings.min_rank
    model = matches.model
    base_model, num_timesteps, noise_domain = (
        (model.base_model, model.num_timesteps, model.noise_domain) if model else model_of(layers)
    )
    return TLoRAFile(
        layers,
        method,
        settings.schedule or RankSchedule(rank, min_rank, settings.alpha),
        num_timesteps,
        noise_domain,
        base_model,
        settings.token,
        settings.class_word,
        heights={name.path: model.shapes[name.path][0] for name in layers if name.is_part} if model else {},
    )


def rescheduled(tlora: TLoRAFile, min_rank: int | None = None, alpha: float | None = None) -> TLoRAFile:
    """The same layers under another schedule; masked only if min_rank is below the rank. None keeps the T-LoRA's value.
    Setting either replaces a free curve by the formula."""
    if min_rank is None and alpha is None:
        return tlora
    rank = tlora.schedule.rank
    schedule = RankSchedule(
        rank,
        tlora.schedule.min_rank if min_rank is None else min_rank,
        tlora.schedule.alpha if alpha is None else alpha,
    )
    method = _MASKED.get(tlora.method, tlora.method)
    if schedule.is_constant:
        method = _UNMASKED.get(method, method)
    return replace(tlora, method=method, schedule=schedule)
