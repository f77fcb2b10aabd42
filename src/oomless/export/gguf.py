"""GGUF, for llama.cpp and what is made of it: one file with weights, tokenizer and chat template.

Tensors are merged in fp32 and rounded once, to what the file holds; a block of rows is quantized at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from oomless.errors import ConfigError, nearest
from oomless.export import gguf_models, gguf_tokens, hugging_face, k_quants
from oomless.export.changes import blocks, require_range
from oomless.export.formats import Files
from oomless.export.gguf_mixtures import QUANTIZATIONS, Mixture
from oomless.export.merged import Merged, trained_dtype
from oomless.export.source import Source
from oomless.export.stream import Piece, Stream
from oomless.models import build
from oomless.techniques import trainable
from oomless.training.precision import DTYPES

_ALIGNED = 32
_PLAIN = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One tensor of the file, given in fp32 and in parts along its first axis."""

    name: str
    shape: tuple[int, ...]
    kind: str
    """How it is stored, by ggml's name."""

    parts: Callable[[], Iterator[Tensor]]


def files(source: Source, dtype: str | None, quantize: str | None) -> Files:
    """Return the GGUF file of ``source`` with what lies beside it.

    Raises:
        ConfigError: gguf is missing, or what is asked is not made.
        ModelError: llama.cpp does not have the architecture or the tokenizer.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ConfigError("--to gguf needs the package gguf: install oomless[gguf]") from error
    if dtype is not None and quantize is not None:
        raise ConfigError("--dtype and --quantize both say how the numbers of a GGUF file are stored: keep one")
    if quantize is not None and quantize not in QUANTIZATIONS:
        raise ConfigError(
            f"--quantize is one of {', '.join(QUANTIZATIONS)}; got {quantize!r}.{nearest(quantize, QUANTIZATIONS)} Others are made by "
            "llama.cpp's llama-quantize of an export with --dtype fp16"
        )
    gguf_models.architecture(source.base.config.get_text_config())
    merged = Merged(source, torch.float32)
    text = merged.model.config.get_text_config()
    known = gguf_models.architecture(text)
    kind = quantize or _PLAIN[DTYPES[dtype] if dtype is not None else trained_dtype(source)]
    one = trainable.is_tied(merged.model) and known.head != "always"
    mixture = Mixture.of(kind, text, head_is_embedding=one)
    tokenizer = hugging_face.tokenizer_of(source)
    tensors = list(_tensors(merged, text, known, mixture))
    head = _head(source, text, known, tokenizer, tensors, kind)
    name = f"model-{kind}.gguf"

    def describe(folder: Path) -> None:
        (folder / "Modelfile").write_text(_modelfile(name, tokenizer, text), encoding="utf-8")

    return Files(
        streams={name: Stream(head, [_piece(tensor) for tensor in tensors])},
        describe=describe,
        dtype=mixture.described((tensor.kind, tensor.shape) for tensor in tensors),
        parameters=build.parameter_count(source.base),
        loads=known.transformers_reads,
        notes=gguf_tokens.notes(tokenizer),
        config=text if text.model_type != "mistral" else None,  # to transformers llama.cpp's llama is a Llama
    )


def _tensors(merged: Merged, config: Any, known: gguf_models.Architecture, mixture: Mixture) -> Iterator[_Tensor]:
    import gguf

    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == known.name)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, extra in gguf_models.extra_tensors(config).items():
        yield _Tensor(name, tuple(extra.shape), "f32", partial(_whole, extra.clone, None))
    for full, tensor in merged.tensors.items():
        name = full.replace("language_model.", "")
        stack = name.rpartition(".")[2]
        if len(tensor.shape) == 3:
            place = names.get_name(f"{name.removesuffix(stack)}{'gate' if stack == 'gate_up_proj' else 'down'}_proj")
            assert place is not None
            assert tensor.expert is not None
            experts, rows, columns = tensor.shape
            halves = {"gate": slice(0, rows // 2), "up": slice(rows // 2, rows)}
            for part, half in halves.items() if stack == "gate_up_proj" else [("down", slice(0, rows))]:
                shape = (experts, half.stop - half.start, columns)
                parts = partial(_experts, tensor.expert, experts, half)
                place_of_part = f"{place.replace('gate', part)}.weight"
                yield _Tensor(place_of_part, shape, mixture.kind(place_of_part, shape), parts)
            continue
        place = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert place is not None, f"llama.cpp has no place for {name}"
        make = partial(_whole, tensor.make, gguf_models.form_of(name, config, known))
        yield _Tensor(place, tensor.shape, mixture.kind(place, tensor.shape), make)
        if known.head == "always" and place == "token_embd.weight" and config.tie_word_embeddings:
            yield _Tensor("output.weight", tensor.shape, mixture.kind("output.weight", tensor.shape), make)


def _whole(make: Callable[[], Tensor], form: gguf_models.Form | None) -> Iterator[Tensor]:
    tensor = make()
    tensor = tensor if form is None else form(tensor)
    if tensor.ndim == 1:
        yield tensor
    else:
        yield from (tensor[rows] for rows in blocks(*tensor.shape))


def _experts(expert: Callable[[int], Tensor], experts: int, half: slice) -> Iterator[Tensor]:
    return (expert(number)[half] for number in range(experts))


def _type(kind: str) -> Any:
    import gguf

    return gguf.GGMLQuantizationType[kind.upper()]


def _bytes(tensor: _Tensor) -> int:
    import gguf

    rows = torch.Size(tensor.shape[:-1]).numel()
    of_row: int = gguf.quant_shape_to_byte_shape((tensor.shape[-1],), _type(tensor.kind))[0]
    return rows * of_row


def _piece(tensor: _Tensor) -> Piece:
    size = _bytes(tensor)
    return Piece(tensor.name, size + -size % _ALIGNED, partial(_stored, tensor, -size % _ALIGNED))


def _stored(tensor: _Tensor, padding: int) -> Iterator[Any]:
    import gguf

    for part in tensor.parts():
        require_range(tensor.name, part, torch.float32 if tensor.kind in ("f32", "bf16") else torch.float16)
        numbers = part.float().contiguous().numpy()
        if tensor.kind in k_quants.KINDS:
            yield k_quants.quantize(numbers, tensor.kind).data
        else:
            yield gguf.quants.quantize(numbers, _type(tensor.kind)).data
    yield bytes(padding)


def _head(
    source: Source,
    config: Any,
    known: gguf_models.Architecture,
    tokenizer: Any,
    tensors: list[_Tensor],
    kind: str,
) -> bytes:
    """Return what the file begins with: what it says of the model and its tokenizer, and where which tensor lies."""
    import gguf
    import numpy as np

    with TemporaryDirectory() as folder:
        path = Path(folder) / "head.gguf"
        writer = gguf.GGUFWriter(path, known.name)
        writer.add_name(Path(source.run.output_dir).name if source.run is not None else source.folder.name)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(_file_type(kind))
        gguf_models.describe(writer, config, known)
        gguf_tokens.describe(writer, tokenizer, config.vocab_size)
        for tensor in tensors:
            writer.add_tensor_info(
                tensor.name, tensor.shape, np.dtype(np.float32), _bytes(tensor), raw_dtype=_type(tensor.kind)
            )
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        head = path.read_bytes()
    return head + bytes(-len(head) % _ALIGNED)


def _file_type(kind: str) -> Any:
    import gguf

    return gguf.LlamaFileType.ALL_F32 if kind == "f32" else gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"]


def _modelfile(name: str, tokenizer: Any, config: Any) -> str:
    """Return Ollama's description of the model, which takes the chat template from the file."""
    lines = [f"FROM ./{name}"]
    if not tokenizer.chat_template:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    if tokenizer.eos_token:
        lines.append(f'PARAMETER stop "{tokenizer.eos_token}"')
    lines.append(f"PARAMETER num_ctx {min(config.max_position_embeddings, 8192)}")
    return "\n".join(lines) + "\n"
