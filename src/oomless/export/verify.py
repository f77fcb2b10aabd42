"""Whether what was written is what was trained: read back byte by byte, and loaded by the programs that it is for.

``sample`` reads every tensor back and compares it with what is made anew of the run. ``full`` also loads the export with the library that
it is for (transformers, peft), and compares its logits on real text with those of the model that was trained, adapters beside their
matrices and not merged.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from oomless.errors import ModelError
from oomless.export import adapter, card, stream
from oomless.export.changes import Replaced, Rows
from oomless.export.hugging_face import tokenizer_of
from oomless.export.merged import HOST
from oomless.export.source import Source
from oomless.models import build, experts, form
from oomless.models.make import sees
from oomless.models.spec import most_positions
from oomless.models.verify import quiet
from oomless.techniques import trainable

if TYPE_CHECKING:
    from oomless.export.plan import Plan

TOLERANCE = {
    "float32": 1e-3,
    "bfloat16": 5e-2,
    "float16": 1e-2,
    "f32": 1e-3,
    "bf16": 5e-2,
    "f16": 1e-2,
    "q8": 5e-2,
    "q6": 1e-1,
    "q5": 2e-1,
    "q4": 5e-1,
    "q3": 7e-1,
    "q2": 1.0,
}
"""By how much the logits of half of the tokens may be off, as a share of their length. The rounding of each format, in a deep model."""

_TOKENS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """How an export was checked."""

    how: str
    error: float | None = None
    """By how much the logits of half of the tokens are off."""

    tolerance: float | None = None

    @staticmethod
    def of(record: Mapping[str, Any]) -> Checked:
        """Return what ``to_dict`` made."""
        return Checked(**record)

    def to_dict(self) -> dict[str, Any]:
        """Return all of this."""
        return asdict(self)


def check(plan: Plan, folder: Path, say: Callable[[str, float], None]) -> Checked:
    """Check the export in ``folder`` as ``plan`` says.

    Raises:
        ModelError: it is not what was trained.
    """
    if plan.verify == "none":
        return Checked(how="none")
    done = 0

    def progress(more: int) -> None:
        nonlocal done
        done += more
        say("reading back", done / plan.disk_bytes)

    for name, contents in plan.files.streams.items():
        different = stream.first_difference(folder / name, contents, progress)
        if different is not None:
            raise ModelError(f"{different} in {name} is not what was written")
    if plan.verify == "sample":
        return Checked(how="sample")
    say("comparing logits", 1.0)
    return _compare_logits(plan, folder)


@torch.no_grad()
def _compare_logits(plan: Plan, folder: Path) -> Checked:
    ids = _ids(plan)
    live = trained_logits(plan.source, ids)
    with quiet(), redirect_stderr(StringIO()):  # a bar of transformers' that its switch does not reach
        found = _load(plan, folder)(input_ids=ids, use_cache=False).logits.float()
    errors = (found - live).norm(dim=-1) / live.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    error = float(errors.median())
    form = plan.files.dtype.split(",")[0] if plan.quantize is None else plan.quantize[:2]
    tolerance = TOLERANCE.get(form, TOLERANCE["float32"])
    if not error <= tolerance:
        raise ModelError(
            f"the logits of the export are off by {error:.1%} of their length, more than the {tolerance:.1%} of its form"
        )
    return Checked(how="full", error=error, tolerance=tolerance)


def _ids(plan: Plan) -> Tensor:
    """Return the first tokens of the model card, [1, T]."""
    ids = tokenizer_of(plan.source)(card.text(plan), add_special_tokens=False)["input_ids"]
    longest = most_positions(plan.source.base.config) or _TOKENS
    return torch.tensor([ids[: min(_TOKENS, longest)]])


def trained_logits(source: Source, ids: Tensor) -> Tensor:
    """Return the logits of the model that was trained, as it trained: adapters beside their matrices, in fp32."""
    model = trained_model(source)
    logits: Tensor = model(input_ids=ids, use_cache=False).logits.float()
    return logits


def trained_model(source: Source) -> Any:
    """Return the model that was trained, on the host and in fp32."""
    spec = source.base
    model = build.build(spec, device=HOST, dtype=torch.float32, form=form.Form(attention=form.OWN_ATTENTION))
    build.load_weights(model, spec, device=HOST)
    if source.kind == "model":
        return model.eval()
    if source.run is not None and source.run.tied_weights == "untied":
        trainable.untie(model, HOST)
    if source.kind == "adapter":
        return _with_adapter(model, source.folder)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, change in adapter.changes(source, model).items():
        place = parameters[name].data
        if isinstance(change, Rows):
            place[change.ids] = change.new().float()
        else:
            assert isinstance(change, Replaced)
            place.copy_(change.new())
    return model.eval()


def _load(plan: Plan, folder: Path) -> Any:
    """Return the model in ``folder`` as the library that it is for loads it, in fp32."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto = AutoModelForImageTextToText if sees(plan.source.base.config) else AutoModelForCausalLM
    trust = {"trust_remote_code": plan.source.base.trust_remote_code}
    if plan.to == "adapter":
        base = auto.from_pretrained(plan.source.base.folder, dtype=torch.float32, **trust)
        return _with_adapter(base, folder)
    of_gguf: dict[str, Any] = {}
    if plan.to == "gguf":
        auto = AutoModelForCausalLM
        of_gguf = {"gguf_file": next(iter(plan.files.streams)), "config": copy.deepcopy(plan.files.config)}
    model, report = auto.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation=form.OWN_ATTENTION,
        output_loading_info=True,
        **of_gguf,
        **trust,
    )
    if faults := [*report["missing_keys"], *report["mismatched_keys"], *report["unexpected_keys"]]:
        raise ModelError(
            f"transformers finds {', '.join(sorted(map(str, faults))[:5])} missing, unknown or of another shape"
        )
    return model.eval()


def _with_adapter(model: Any, folder: Path) -> Any:
    """Return ``model`` with the adapter in ``folder`` beside its matrices, as peft loads it.

    Raises:
        ModelError: peft cannot, with what ``adapter_config.json`` says.
    """
    from peft import PeftModel

    experts.put_behind_interface(model, there=False)  # peft reads how their matrices lie from their own class
    with warnings.catch_warnings():
        # Of a head and an embedding that are one matrix peft holds two copies, and says so: both are in the adapter.
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", "`lora_bias=True` was passed but the targeted layer")  # it is not merged
        warnings.simplefilter("ignore", FutureWarning)  # of a name that transformers is giving up
        try:
            return PeftModel.from_pretrained(model, str(folder)).eval()
        except (TypeError, ValueError, AttributeError, LookupError, ImportError, RuntimeError) as error:
            raise ModelError(
                f"peft cannot load this adapter with what its adapter_config.json says: {error}"
            ) from error
