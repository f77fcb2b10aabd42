"""Where an error arose: from stack frames to the phase of training, the part of the model and the library.

Frames are read from plain tracebacks (``File "...", line 3, in forward``) and from notebooks' (``/path/x.py in
forward(...)`` or ``File /path/x.py:3, in forward``). The phase is that of the innermost frame that stands for one;
what a backward pass computes again (checkpointing) stays backward, and what an evaluation runs stays evaluation.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oomless.memory.device import Phase

_PLAIN = re.compile(r'^[ \t]*File "(?P<path>[^"\n]+)", line (?P<line>\d+), in (?P<name>[^\n]+)$', re.MULTILINE)
_NOTEBOOK = re.compile(
    r"^(?:File )?(?P<path>(?:[~/.<]|[A-Za-z]:\\)[^\s:]*?\.pyx?|/tmp/ipython-input\S*|<ipython-input[^>]*>)"
    r"(?::(?P<line>\d+))?,? in (?P<name>[\w.<>]+)[^\n]*$",
    re.MULTILINE,
)
_ERROR = re.compile(r"[\w.]*(?:Error|Exception)\b")
_NUMBERED = re.compile(r"^\s*(?:-+>)?\s*\d+\s")
_CODE = re.compile(r"^(?:return |with |for |\w[\w.]*(?:, \w+)* = |\w+(?:\.\w+)+\()(?=.*[(\[])|\.(?:backward|step)\(")
_SETS_UP = re.compile(
    r"from_pretrained\(|(?:Trainer|Config|Arguments|Args)\(|load_dataset\(|get_peft_model\(|\bpipeline\("
)
"""Lines of a script that is pasted beside its error, which say nothing of where it arose."""

_ARROW = re.compile(r"^-+>\s*\d+ (?P<code>.*)$", re.MULTILINE)
_OUTER: tuple[tuple[Phase, re.Pattern[str], re.Pattern[str] | None], ...] = tuple(
    (phase, re.compile(where), re.compile(code) if code else None)  # type: ignore[misc]
    for phase, where, code in (
        (
            "evaluation",
            r"\b(evaluation_loop|prediction_loop|prediction_step|evaluate|_evaluate|validate|validation_step|nested_concat|"
            r"pad_and_concatenate|torch_pad_and_concatenate|gather_for_metrics|preprocess_logits_for_metrics|compute_metrics)$",
            None,
        ),
        (
            "save",
            r"\b(save_pretrained|save_pretrained_merged|save_model|_save_checkpoint|save_checkpoint|save_state|merge_and_unload|_merge_lora|"
            r"merge_lora|merge_adapter|export_model|_save|get_state_dict|_get_full_state_dict|get_full_model_state_dict|"
            r"_full_post_state_dict_hook|_zero3_consolidated_16bit_state_dict|unsloth_save_model)$",
            None,
        ),
        (
            "load",
            r"\b(from_pretrained|_load_pretrained_model|load_state_dict|dispatch_model|_load_state_dict_into_\w+|"
            r"_configure_(?:bf16|fp16|zero)_optimizer|_create_fp32_partitions|_create_fp16_partitions\w*|_materialize_copy|prepare_model|create_quantized_param|set_module_tensor_to_device|load_model|load_checkpoint\w*|"
            r"load_checkpoint_and_dispatch|_configure_distributed_model|_move_states_to_device|_init_sharded_param|_broadcast_model|resize_token_embeddings|_init_weights|"
            r"initialize_missing_keys|_load_optimizer_and_scheduler|_load_from_checkpoint|init_flat_param|_init_param_handle_from_\w+|"
            r"_convert_to_fp32|prepare_model_for_kbit_training|cast_mixed_precision_params)$",
            None,
        ),
        (
            "load",
            r"torch/serialization\.py:|torch/nn/parallel/distributed\.py:__init__$|safetensors/torch\.py:load_file$",
            None,
        ),
        ("load", r".", r"^(?:\w+\s*=\s*)?(?:self\.)?\w*model\w*\.(?:to|cuda|half|float)\(|\.from_pretrained\("),
        ("load", r"torch/nn/modules/module\.py:(?:_apply|to|cuda|convert|half|float|<lambda>)$", None),
        ("backward", r"torch/(?:_tensor|autograd/__init__|autograd/graph)\.py:|:(?:_engine_run_backward)$", None),
        ("backward", r":backward$", None),
        ("backward", r".", r"[\w)]\.backward\("),
        (
            "optimizer",
            r"torch/optim/|bitsandbytes/optim/|/optim(?:izer)?s?/[^:]*:.*(?:step|init_state|_init_group)|"
            r"zero/stage\w*\.py:(?:step|initialize_optimizer_states|_optimizer_step)|:optimizer_step$",
            None,
        ),
        ("optimizer", r"clip_grad", None),
        ("optimizer", r".", r"\b(?:optimizer|optim|opt|scaler)\.step\(|\bexp_avg|\bdenom\b|torch\._foreach_"),
    )
)
_LOSS = re.compile(
    r"cross_entropy|CrossEntropyLoss|logsumexp|jsd_loss|loss_utils\.py|nn/modules/loss\.py|log_softmax|logits\.float\(\)|logits = logits\.to\("
    r"|shift_logits|upcast_logits|self\.loss_function\(|loss_fct\("
)
_FORWARD = re.compile(
    r"modeling_\w+\.py:|:forward$|:_?call_impl$|:compute_loss$|integrations/sdpa_attention|peft_model\.py"
)
_MODULES = (
    ("lm_head", re.compile(r"\bself\.(?:lm_head|output_layer|embed_out)\(")),
    (
        "mlp",
        re.compile(
            r"\bself\.(?:mlp|gate_proj|up_proj|down_proj|act_fn|gate_up_proj|c_fc|fc1|fc2|dense_h_to_4h|experts?)\b"
        ),
    ),
    (
        "self_attn",
        re.compile(
            r"\bself\.(?:self_attn|attn|attention|q_proj|k_proj|v_proj|o_proj|qkv_proj|c_attn|query_key_value)\b"
            r"|attention_interface\(|attn_weights|scaled_dot_product_attention|(?<!log_)softmax\(|apply_rotary_pos_emb"
        ),
    ),
    (
        "embed_tokens",
        re.compile(r"\bself\.(?:embed_tokens|wte|embed_in|word_embeddings)\(|F\.embedding\(|torch\.embedding\("),
    ),
    (
        "norm",
        re.compile(
            r"\bself\.(?:input_layernorm|post_attention_layernorm|norm|ln_\w+)\(|hidden_states\.to\(torch\.float32\)"
        ),
    ),
    ("lora", re.compile(r"\blora_[AB]\b")),
)
_FILES_OF_MODULES = (
    ("self_attn", re.compile(r"integrations/sdpa_attention|flash_attn|xformers|integrations/(?:flash|flex|eager)")),
    ("lora", re.compile(r"peft/tuners/lora")),
    ("quantisation", re.compile(r"bitsandbytes/(?:functional|autograd|nn)")),
)
_VISION = re.compile(
    r"\bself\.(?:visual|vision_tower|vision_model|image_encoder)\(|cu_seqlens|pixel_values|vision_transformer|siglip|clip_vision|vl\w*\.py \S+ .*attention\(q(?:\.unsqueeze\(0\))?, k",
    re.IGNORECASE,
)
_KEPT = re.compile(r":(?:nested_concat|(?:torch_)?pad_and_concatenate)$|trainer_pt_utils\.py:add$")
_GATHERS = re.compile(r"/zero/partition\w*\.py:_*all_?gather\w*$")
_STRIDED = re.compile(r"empty_strided_\w+\(\(([\d, ]{1,80})\), \([\d, ]*\), torch\.(\w+)\)")
_ITEM_BYTES = {"float32": 4, "int64": 8, "float64": 8, "int32": 4, "bool": 1, "uint8": 1, "int8": 1, "float8_e4m3fn": 1}
LIBRARIES = (
    (
        "llamafactory",
        re.compile(
            r"llama[-_]?factory|\bllmtuner\b|src[/\\]train_(?:bash|web)\.py|finetuning_type\b|\bcutoff_len\b",
            re.IGNORECASE,
        ),
    ),
    (
        "ms-swift",
        re.compile(
            r"\bswift[/\\](?:llm|trainers|cli|megatron|pipelines)\b|\bms[-_]swift\b|(?<![\w-])swift (?:sft|rlhf|pt|export)\b"
        ),
    ),
    ("verl", re.compile(r"(?<![A-Za-z])verl(?:[/\\.]|\b)|actor_rollout_ref\b")),
    ("torchtune", re.compile(r"\btorchtune\b|\btune run\b")),
    (
        "nemo",
        re.compile(r"\bnemo[/\\]|\bNeMo\b|megatron_gpt_finetuning|\bnemo_run\b|\bmegatron[/\\]core\b|\bMegatron\b"),
    ),
    ("litgpt", re.compile(r"\blit[-_]?gpt\b", re.IGNORECASE)),
    ("unsloth", re.compile(r"\bunsloth(?:_zoo)?[/\\.]|\bUnsloth\b")),
    ("axolotl", re.compile(r"\baxolotl\b")),
    (
        "trl",
        re.compile(
            r"\btrl[/\\]|\btrl (?:sft|dpo|grpo)\b|\b(?:SFT|DPO|GRPO|PPO|ORPO|KTO|GKD|Reward)(?:Trainer|Config)\b"
        ),
    ),
    ("oomless", re.compile(r"\boomless[/\\](?:training|cli|demo)|\boomless train\b")),
    (
        "trainer",
        re.compile(
            r"transformers[/\\]trainer\.py|\bTrainer\(|TrainingArguments|\bper_device_train_batch_size\b|\*\*\*\*\* Running training"
        ),
    ),
    ("accelerate", re.compile(r"\baccelerate[/\\]|\bAccelerator\(|accelerator\.backward|\baccelerate launch\b")),
    ("peft", re.compile(r"\bpeft[/\\]|\b(?:with|using|用) peft\b|\bpeft で|\bget_peft_model\b|\bLoraConfig\b")),
)
"""Tools by what they leave in a log, the one closest to the user first."""

_LAST = ("deepspeed", re.compile(r"deepspeed", re.IGNORECASE))
"""A tool only where no other is there."""

EXTRAS = (
    ("deepspeed", re.compile(r"(?<![A-Za-z])deepspeed(?![A-Za-z])", re.IGNORECASE)),
    ("vllm", re.compile(r"(?<![A-Za-z])vllm(?![A-Za-z])", re.IGNORECASE)),
    ("fsdp", re.compile(r"fully_shard|FullyShardedDataParallel|\bfsdp\b", re.IGNORECASE)),
    ("bitsandbytes", re.compile(r"\bbitsandbytes\b")),
    ("flash_attn", re.compile(r"\bflash_attn\b")),
    ("torch.compile", re.compile(r"torch[/\\]_(?:dynamo|inductor)")),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """One line of a traceback: where, in what function, and the code if it is shown."""

    path: str
    name: str
    code: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where an error arose. Fields are ``None`` or empty where the text does not say."""

    phase: Phase | None = None
    module: str | None = None
    """The part of the model: lm_head, mlp, self_attn, embed_tokens, norm, lora."""

    code: str = ""
    """The innermost line of code that says what was computed."""

    frames: tuple[Frame, ...] = ()

    generating: bool = False
    """Whether text was being generated."""

    asked_bytes: int | None = None
    """What the code itself asks for, where it says the shape and the dtype: compiled code does."""

    in_vision: bool = False
    """Whether it was the part of a model that reads pictures."""

    in_engine: bool = False
    """Whether it was an inference engine (vLLM) that asked."""

    gathers: bool = False
    """Whether ZeRO-3 was gathering weights."""

    keeps_outputs: bool = False
    """Whether an evaluation was adding a batch's outputs to those of all batches before."""

    in_managed_memory: bool = False
    """Whether it was managed memory, of a paged optimizer, that was asked for."""

    recomputing: bool = False
    """Whether a backward pass was computing a checkpointed forward again."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"phase": self.phase, "module": self.module, "code": self.code}


def place_of(text: str, position: int) -> Place:
    """Return where the error at ``position`` of ``text`` arose, by the traceback above it."""
    return place_of_frames(_frames_before(text, position))


def place_of_frames(frames: tuple[Frame, ...]) -> Place:
    """Return the place that ``frames``, outermost first, stand for."""
    if not frames:
        return Place()
    phase: Phase | None = None
    inner: Phase | None = None
    for frame in frames:
        where = f"{frame.path}:{frame.name}".replace("\\", "/")
        for outer, pattern, shown in _OUTER:
            if pattern.search(where) and (shown is None or shown.search(frame.code)):
                # What a backward pass or an evaluation runs belongs to it; anything else is what came last.
                if phase not in ("evaluation", "load", "save"):
                    phase = outer
                break
        if _LOSS.search(f"{where} {frame.code}"):
            inner = "loss"
        elif (_FORWARD.search(where) and "loss" not in where) or (
            not frame.path and re.search(r"\bself\.\w+\(", frame.code)
        ):
            inner = "forward"
    module, code = _module(frames)
    recomputing = phase == "backward" and inner is not None and any("checkpoint" in f.path for f in frames)
    return Place(
        phase=phase or inner,
        module=module,
        code=code,
        frames=frames,
        recomputing=recomputing,
        generating=any(f.name in ("generate", "_sample", "_generate", "_prefill") for f in frames),
        in_vision=any(_VISION.search(f"{f.path} {f.name} {f.code}") for f in frames[-6:]),
        in_engine=re.search(r"(?<![A-Za-z])vllm[/\\]", frames[-1].path) is not None,
        gathers=any(_GATHERS.search(f"{f.path}:{f.name}".replace("\\", "/")) for f in frames[-4:]),
        keeps_outputs=any(_KEPT.search(f"{f.path}:{f.name}") for f in frames),
        in_managed_memory=any(f.name == "get_paged" or "get_managed" in f.code for f in frames),
        asked_bytes=_strided_bytes(frames[-1].code),
    )


def _strided_bytes(code: str) -> int | None:
    """Return the size of ``empty_strided_cuda((54080, 4096), (4096, 1), torch.bfloat16)``."""
    match = _STRIDED.search(code)
    if match is None:
        return None
    sizes = [int(part) for part in match[1].split(",") if part.strip()]
    return math.prod(sizes) * _ITEM_BYTES.get(match[2], 2) if sizes else None


def _frames_before(text: str, position: int) -> tuple[Frame, ...]:
    """Return the frames of the last traceback that begins before ``position``."""
    start = max(text.rfind("Traceback (most recent call last)", 0, position), 0)
    window = text[max(start, position - 60_000) : position]
    found = sorted([*_PLAIN.finditer(window), *_NOTEBOOK.finditer(window)], key=lambda match: match.start())
    frames = []
    for match, following in zip_longest(found, found[1:]):
        below = window[match.end() : following.start() if following else match.end() + 2000]
        arrow = _ARROW.search(below)
        lines = [line.strip() for line in below.split("\n") if line.strip() and not set(line.strip()) <= set("^~")]
        lines = [line for line in lines if not _ERROR.match(line)]
        code = arrow["code"].strip() if arrow is not None else lines[0] if lines and match.re is _PLAIN else ""
        frames.append(Frame(path=match["path"], name=match["name"].strip().rpartition(".")[2], code=code[:300]))
    return tuple(frames) or _code_alone(text[max(0, position - 2000) : position])


def _code_alone(text: str) -> tuple[Frame, ...]:
    """Return the lines of code that stand right above an error whose frames were left out."""
    found: list[Frame] = []
    for line in reversed(text.split("\n")[-12:]):
        code = _NUMBERED.sub("", line).strip(" `>")
        if _CODE.search(code) and not _SETS_UP.search(code):
            found.insert(0, Frame(path="", name="", code=code[:300]))
    return tuple(found)


def _module(frames: tuple[Frame, ...]) -> tuple[str | None, str]:
    for frame in reversed(frames):
        path = frame.path.replace("\\", "/")
        for name, pattern in _FILES_OF_MODULES:
            if pattern.search(path):
                return name, frame.code
        for name, pattern in _MODULES:
            if pattern.search(frame.code):
                return name, frame.code
        if _LOSS.search(frame.code):
            return None, frame.code
    return None, frames[-1].code


def libraries(text: str) -> tuple[str | None, tuple[str, ...]]:
    """Return the tool that the log came from, and what else it names."""
    tool = next((name for name, pattern in (*LIBRARIES, _LAST) if pattern.search(text)), None)
    return tool, tuple(name for name, pattern in EXTRAS if pattern.search(text))
