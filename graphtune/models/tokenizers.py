"""Raw tokenizer files -> fast Hugging Face tokenizers with the same ids.

Model families were published with one of three files: a sentencepiece model (Llama 2, Gemma,
Mistral, Phi 3), tiktoken ranks (Llama 3 and 4, Qwen), or Mistral's tekken JSON. Each is turned
into a `tokenizers` pipeline, which is fast, reports offsets, and saves as `tokenizer.json`.

Both engines merge the neighbours whose union has the best score, leftmost first. `tokenizers`
ranks pairs instead of unions, so every split of a piece becomes a pair, ordered by the piece's
score and then by the longer left part: in a run of spaces, whose pieces may share one score, that
is the leftmost merge too.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from sentencepiece import SentencePieceProcessor
from sentencepiece import sentencepiece_model_pb2 as _pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from graphtune.errors import UserError
from graphtune.models.tokenizer_families import (
    FAMILIES,
    FAMILY_OF_MODEL_TYPE,
    TEKKEN_TOKENS,
    Family,
)

_ModelProto: Any = getattr(_pb2, "ModelProto")  # noqa: B009  # made at run time
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # types of pieces
_BPE = 2  # sentencepiece's TrainerSpec.ModelType
_SPACE = "▁"

_RAW_FILES = ("tekken*.json", "tokenizer.model", "*.tiktoken", "tokenizer.model.v*")


def find_raw_tokenizer(folder: Path) -> Path | None:
    """The raw tokenizer file of a folder that holds no `tokenizer.json`, if there is one."""
    if (folder / "tokenizer.json").is_file():
        return None
    found = [path for pattern in _RAW_FILES for path in sorted(folder.glob(pattern))]
    return found[0] if found else None


def load_raw_tokenizer(path: str | Path, family: str | None = None) -> PreTrainedTokenizerBase:
    """Load a raw tokenizer file as a Hugging Face tokenizer with the family's chat template.

    Ids equal those of sentencepiece or tiktoken. As with every Hugging Face tokenizer, special
    tokens spelled out in the text become their ids; `encode(..., split_special_tokens=True)`
    takes them as plain text. Text after a special token is encoded as text on its own: where a
    sentencepiece model puts a space before text, it does so there too. A symbol that the
    sentencepiece model treats as user-defined gets no such space if it is all of the text.

    Args:
        path: a sentencepiece `.model`, a tiktoken file or a tekken JSON; its content tells which.
        family: one of `FAMILIES`; None tells it from the file and the `config.json` beside it.

    Raises:
        UserError: no such file, a file of another kind, or a family that cannot be told.
    """
    path = Path(path).expanduser()
    if family is not None and family not in FAMILIES:
        raise UserError(f"tokenizer family {family!r} is unknown; use {', '.join(FAMILIES)}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"model.id: cannot read {str(path)!r} ({error.strerror})") from error
    raw = _read(path, content)
    name = family or _guess_family(path, raw)
    settings = FAMILIES[name]
    if bool(settings.pattern) != (raw.kind == "tiktoken"):
        raise UserError(f"model.id: {str(path)!r} is a {raw.kind} file, so not of family {name!r}")
    if raw.kind == "sentencepiece":
        backend = _from_sentencepiece(path, content, settings)
        if name == "mistral":
            settings = replace(settings, template=_mistral_template(backend))
    else:
        backend = _from_ranks(raw, settings)
        if raw.kind == "tekken":
            settings = replace(settings, pad="<pad>", template=raw.template)
    return _wrap(backend, settings, path)


class _Raw(NamedTuple):
    """kind: "sentencepiece", "tiktoken" or "tekken"; the rest is for the latter two.

    ranks: byte strings by order of merging.
    tokens: of tekken: special tokens, whose ids come before rank 0.
    """

    kind: str
    ranks: dict[bytes, int] = {}
    pattern: str = ""
    tokens: Sequence[str] = ()
    template: str = ""


def _read(path: Path, content: bytes) -> _Raw:
    if content.lstrip()[:1] == b"{":
        return _read_tekken(path, content)
    lines = content.split(b"\n")
    if not re.fullmatch(rb"[A-Za-z0-9+/=]+ \d+\r?", lines[0]):
        return _Raw("sentencepiece")
    try:
        pairs = (line.split() for line in lines if line.strip())
        return _Raw("tiktoken", {base64.b64decode(token): int(rank) for token, rank in pairs})
    except (ValueError, binascii.Error) as error:
        raise UserError(f"model.id: {str(path)!r} is a damaged tiktoken file ({error})") from error


def _read_tekken(path: Path, content: bytes) -> _Raw:
    try:
        data = json.loads(content)
        config = data["config"]
        first = config["default_num_special_tokens"]
        entries = data["vocab"][: config["default_vocab_size"] - first]
        ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in entries}
        listed = [entry["token_str"] for entry in data.get("special_tokens") or ()]
        tokens = listed or TEKKEN_TOKENS
        tokens = tokens + [f"<SPECIAL_{i}>" for i in range(len(tokens), first)]
        has_system = int(config["version"].strip("v").partition("m")[0]) >= 7
        template = "mistral_v7" if has_system else "mistral_v3"
        return _Raw("tekken", ranks, config["pattern"], tokens, template)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"model.id: {str(path)!r} is no tekken file ({type(error).__name__}: {error}); a "
            "tokenizer.json loads through its folder"
        ) from error


def _guess_family(path: Path, raw: _Raw) -> str:
    by_size = {128000: "llama3", 200000: "llama4", 151643: "qwen"}
    if raw.kind == "tekken":
        return "mistral"
    if raw.kind == "tiktoken" and len(raw.ranks) in by_size:
        return by_size[len(raw.ranks)]
    if raw.kind == "sentencepiece":
        pieces = _processor(path)
        for mark, name in (("[INST]", "mistral"), ("<start_of_turn>", "gemma")):
            if pieces.piece_to_id(mark) != pieces.unk_id():
                return name
    config = path.parent / "config.json"
    model = str(json.loads(config.read_text()).get("model_type")) if config.is_file() else ""
    if (name := FAMILY_OF_MODEL_TYPE.get(model, model)) in FAMILIES:
        return name
    raise UserError(
        f"model.id: {str(path)!r} does not tell its family, nor does a config.json beside it; "
        f"pass family=, one of {', '.join(FAMILIES)}"
    )


def _processor(path: Path) -> SentencePieceProcessor:
    try:
        return SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"model.id: {str(path)!r} is no sentencepiece, tiktoken or tekken file"
        ) from error


def _from_sentencepiece(path: Path, content: bytes, family: Family) -> Tokenizer:
    processor = _processor(path)
    model: Any = _ModelProto.FromString(content)
    _refuse_unsupported(path, model)
    vocab = {piece.piece: i for i, piece in enumerate(model.pieces)}
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == _NORMAL}
    backend = Tokenizer(
        models.BPE(
            vocab,
            _merges({piece: -score for piece, score in scores.items()}),
            unk_token=processor.id_to_piece(processor.unk_id()),
            fuse_unk=True,
            byte_fallback=model.trainer_spec.byte_fallback,
        )
    )
    special = [piece.piece for piece in model.pieces if piece.type in (_UNKNOWN, _CONTROL)]
    symbols = [piece.piece for piece in model.pieces if piece.type == _USER_DEFINED]
    symbols = [symbol for symbol in symbols if symbol not in family.tokens]
    prefixed = model.normalizer_spec.add_dummy_prefix
    prefix = [_dummy_prefix(symbols)] if prefixed else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    # Symbols match in the text after normalization, spaces being `▁` there, as in sentencepiece.
    backend.add_tokens([AddedToken(symbol, normalized=True) for symbol in symbols])
    _add_special(backend, special)
    _add_special(backend, family.tokens, rstrip=family.strips_right)
    _check_ids(backend, processor, path)
    return backend


def _refuse_unsupported(path: Path, model: Any) -> None:
    normalizer = model.normalizer_spec
    reason = None
    if model.trainer_spec.model_type != _BPE:
        reason = "is not of BPE type"
    elif normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        reason = f"normalizes text ({normalizer.name})"
    elif any(piece.type == _UNUSED for piece in model.pieces):
        reason = "has pieces marked as unused"
    if reason:
        raise UserError(
            f"model.id: the sentencepiece model {str(path)!r} {reason}, which none of "
            f"{', '.join(FAMILIES)} does; load its Hugging Face folder"
        )


def _dummy_prefix(symbols: list[str]) -> normalizers.Normalizer:
    """A space before the text; `tokenizers` normalizes its added tokens too, which need none."""
    if not symbols:
        return normalizers.Prepend(_SPACE)
    alone = "|".join(re.escape(symbol) for symbol in symbols)
    return normalizers.Replace(Regex(rf"\A(?=[\s\S])(?!(?:{alone})\z)"), _SPACE)


_PROBES = (
    "Hello world, it's 1234567 o'clock.\n\n\tdef f(x):\n        return  x  # 3.14",
    ".  In   1984" + " " * 40 + "x\r\n\n\n",
    "héllo e\u0301migré русский 한국어 日本語 ﬁ①\u00a0\u200b😀👩‍👩‍👧‍👦",
)


def _check_ids(backend: Tokenizer, processor: SentencePieceProcessor, path: Path) -> None:
    for text in _PROBES:
        if backend.encode(text, add_special_tokens=False).ids != processor.encode(text):
            raise UserError(
                f"model.id: {str(path)!r} encodes {text[:20]!r}... in a way that its fast form "
                "does not; load the model's Hugging Face folder"
            )


def _from_ranks(raw: _Raw, family: Family) -> Tokenizer:
    """tiktoken's scheme: cut by a pattern, take whole words, else merge bytes by rank."""
    letters = bytes_to_unicode()
    spelled = {"".join(letters[b] for b in token): rank for token, rank in raw.ranks.items()}
    first = len(raw.tokens)
    vocab = {token: i for i, token in enumerate(raw.tokens)}
    vocab |= {token: first + rank for token, rank in spelled.items()}
    backend = Tokenizer(models.BPE(vocab, _merges(spelled), ignore_merges=True))
    if family.composed:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(raw.pattern or family.pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    _add_special(backend, raw.tokens or family.tokens)
    backend.add_tokens([AddedToken(token, normalized=False) for token in family.visible])
    return backend


def _merges(rank: Mapping[str, float]) -> list[tuple[str, str]]:
    """Pairs of pieces whose union is a piece, best (lowest) first; see the module's docstring."""
    pairs = [
        (order, -cut, piece[:cut], piece[cut:])
        for piece, order in rank.items()
        for cut in range(1, len(piece))
        if piece[:cut] in rank and piece[cut:] in rank
    ]
    pairs.sort(key=lambda pair: pair[:2])
    return [(left, right) for _, _, left, right in pairs]


def _add_special(backend: Tokenizer, tokens: Sequence[str], *, rstrip: bool = False) -> None:
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False, rstrip=rstrip) for token in tokens]
    )


def _mistral_template(backend: Tokenizer) -> str:
    """Versions 2 and 3 have a token for `[INST]`, version 7 also one for the system prompt."""
    if backend.token_to_id("[INST]") is None:
        return "mistral"
    return "mistral_v3" if backend.token_to_id("[SYSTEM_PROMPT]") is None else "mistral_v7"


def _wrap(backend: Tokenizer, family: Family, path: Path) -> PreTrainedTokenizerBase:
    from graphtune.data.templates import TEMPLATES, to_jinja  # heavy: brings `datasets`

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=family.bos,
        eos_token=family.eos,
        pad_token=family.pad,
        unk_token="<unk>" if backend.token_to_id("<unk>") is not None else None,
        add_bos_token=family.adds_bos,
        clean_up_tokenization_spaces=False,
        chat_template=to_jinja(TEMPLATES[family.template]),
    )
    tokenizer.name_or_path = str(path)  # as an argument, the hub would be asked for it
    return tokenizer
