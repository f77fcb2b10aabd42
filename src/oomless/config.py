"""What a user may say: frozen dataclasses, filled from YAML and the command line.

Every field's docstring is its help text on the command line; there is no second description. A setting that would
have no effect is an error, so the fields that belong to one choice (LoRA's rank, say) are ``None`` until that choice
is made, and get their defaults then.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any, Literal

from oomless.config_values import DataSource as DataSource
from oomless.config_values import coerce, sources
from oomless.errors import ConfigError, nearest

Scheduler = Literal["cosine", "linear", "constant", "wsd"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Packing = Literal["documents", "best_fit", "concatenate"]
TiedWeights = Literal["shared", "untied"]
BadLossPolicy = Literal["stop", "skip", "rewind"]


LORA_DEFAULTS: dict[str, Any] = {
    "lora_r": 16,
    "lora_alpha": 32.0,
    "lora_dropout": 0.0,
    "lora_target_modules": "all-linear",
    "use_rslora": False,
    "use_dora": False,
}
_ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}
OPTIMIZER_DEFAULTS: dict[str, dict[str, Any]] = {
    "adamw": _ADAM,
    "adamw_8bit": _ADAM,
    "adafactor": {},
    "sgd": {"momentum": 0.9},
    "apollo": _ADAM,
    "apollo_mini": _ADAM,
    "galore": _ADAM,
    "muon": {**_ADAM, "momentum": 0.95},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Everything that decides a run. ``save`` writes it as YAML, and that YAML reproduces the run."""

    # Model and data
    model: str
    """Folder with config.json and safetensors weights, or a Hugging Face name."""

    data: tuple[DataSource, ...]
    """Text to learn: files, folders or globs (.txt .md, source code, .jsonl, .parquet, each also .gz or .zst)."""

    output_dir: str
    """The run folder: config, metrics, checkpoints and the final model."""

    tokenizer: str | None = None
    """Tokenizer folder or name, where it is not the model's."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you trust its author."""

    eval_data: tuple[DataSource, ...] = ()
    """Text to evaluate on, instead of text held out from `data`."""

    eval_fraction: float | None = None
    """Share of the tokens of each source held out for evaluation: whole documents, and the end of one where they are few.
    [default: 0.01, or 0 with eval_data]"""

    max_seq_length: int = 1024
    """Tokens in a block."""

    packing: Packing = "documents"
    """documents: packed end to end, none attends to another; best_fit: the same, cut as little as possible, padded;
    concatenate: one plain stream, attention over whole blocks."""

    shuffle: bool = True
    """Shuffle the blocks, the same way for the same seed."""

    encoding_errors: Literal["strict", "replace"] = "strict"
    """What invalid UTF-8 is: an error that names file and offset, or replaced by U+FFFD."""

    cache_dir: str | None = None
    """Where tokenised text is kept between runs. [default: `token-cache` in output_dir]"""

    # What trains
    trainable: str = "full"
    """full, lm_head, embed_tokens, lora, or module-name patterns such as `model.layers.3.*`; join several by +."""

    tied_weights: TiedWeights | None = None
    """For a model whose embed_tokens and lm_head are one matrix: train it as one (shared), or part them (untied)."""

    trainable_rows: str | None = None
    """Of the embed_tokens and lm_head that train, train only these rows: token ids and ranges, such as 5,128000-128007.
    [default: all]"""

    lora_r: int | None = None
    """LoRA rank. [default: 16]"""

    lora_alpha: float | None = None
    """LoRA scale. [default: 32]"""

    lora_dropout: float | None = None
    """Dropout before LoRA's first matrix. [default: 0]"""

    lora_target_modules: str | None = None
    """Linear layers that get LoRA: all-linear, or name endings joined by commas. [default: all-linear]"""

    use_rslora: bool | None = None
    """Scale LoRA by alpha / sqrt(r) instead of alpha / r. [default: off]"""

    use_dora: bool | None = None
    """Train magnitude and direction apart (DoRA). [default: off]"""

    # Batch and length of the run
    per_device_train_batch_size: int = 1
    """Blocks in one forward and backward pass, of each GPU."""

    gradient_accumulation_steps: int = 1
    """Passes in one optimizer step, of each GPU; the loss is normalised by the tokens of the whole step."""

    tokens_per_step: int | None = None
    """Tokens in one step of all GPUs, a multiple of max_seq_length; gradient_accumulation_steps follows from it."""

    per_device_eval_batch_size: int | None = None
    """Blocks in one evaluation pass. [default: per_device_train_batch_size]"""

    max_steps: int | None = None
    """Length of the run in optimizer steps."""

    num_train_epochs: float | None = None
    """Length of the run in passes over the data. [default: 1, where neither steps nor tokens are given]"""

    max_tokens: int | None = None
    """Length of the run as a budget of training tokens."""

    # Optimizer
    optimizer: str = "adamw"
    """adamw, adamw_8bit, adafactor, sgd, apollo, apollo_mini, galore or muon (experimental); docs/optimizers.md compares
    them."""

    learning_rate: float = 2e-5
    """Peak learning rate."""

    embedding_learning_rate: float | None = None
    """Peak learning rate of embed_tokens and lm_head. [default: learning_rate]"""

    lr_scheduler_type: Scheduler = "cosine"
    """How the rate falls after warm-up; wsd holds it and falls in the last fifth."""

    warmup_ratio: float = 0.0
    """Share of the steps in which the rate rises."""

    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; norms and biases get none."""

    max_grad_norm: float | None = None
    """Global gradient norm above which gradients are scaled down; 0 turns it off. [default: 1, or 0 with
    optimizer_in_backward]"""

    label_smoothing_factor: float = 0.0
    """Share of each target spread evenly over the vocabulary in training; evaluation is without."""

    z_loss: float = 0.0
    """Weight of the squared logarithm of the softmax's denominator, added to the training loss: keeps logits small."""

    adam_beta1: float | None = None
    """First decay rate of Adam and its kin. [default: 0.9]"""

    adam_beta2: float | None = None
    """Second decay rate of Adam and its kin. [default: 0.999]"""

    adam_epsilon: float | None = None
    """Epsilon of Adam and its kin. [default: 1e-8]"""

    momentum: float | None = None
    """Momentum of sgd and muon. [default: 0.9, muon 0.95]"""

    # Precision and memory
    dtype: Precision = "auto"
    """Weights and arithmetic. auto: bf16 or fp16 by what the GPU can do, fp32 on a CPU."""

    quantization: Literal["nf4", "int8"] | None = None
    """Store the frozen linear layers in 4 bits (nf4, double quantisation) or 8 (int8), quantised while loading; needs
    the extra `quantize`. [default: 16 bits]"""

    stream_frozen: bool = False
    """Keep the frozen linear layers in pinned host memory, each on the GPU while it is used: the last resort."""

    weight_precision: Literal["master", "correction", "stochastic", "plain"] | None = None
    """How trainable 16-bit weights keep small updates: an fp32 master copy, 8 bits of correction, stochastic rounding,
    or not at all. [default: master]"""

    fp32_residual: bool | None = None
    """Keep what flows between the layers in fp32, around 16-bit matrix products. [default: on for Gemma in fp16, which
    overflows without, else off]"""

    gpu: str = "auto"
    """auto, cpu, cuda, cuda:1, or a virtual GPU on the CPU such as virtual:256MiB; to plan, also T4 or 2xT4."""

    gradient_checkpointing: bool = False
    """Keep only each layer's input and compute the rest again in backward."""

    checkpointed_layers: int | None = None
    """Checkpoint only this many layers, the first that backward runs through. [default: all]"""

    offload_activations: bool = False
    """Keep the inputs of checkpointed layers in host memory between forward and backward; at most two are on the GPU."""

    cheap_recompute: bool = False
    """Compute norms and gated products again in backward instead of keeping them, which costs next to no time."""

    mlp_tiles: int | None = None
    """Run each MLP over the tokens in this many parts, of which one at a time takes memory. [default: whole]"""

    optimizer_in_backward: bool = False
    """Update each weight as soon as its gradient is complete, and free the gradient: the model's gradients never exist
    together. Rules out max_grad_norm."""

    offload_optimizer: bool = False
    """Keep the optimizer's state in pinned host memory; slices of it come to the GPU and go back at every step."""

    loss_chunk_bytes: int = 64 << 20
    """Most bytes that the loss holds of the logits at once."""

    recover_from_oom: bool = True
    """On a GPU: run a step, evaluation or save that ran out of memory again with less memory and the same result, instead
    of ending the run."""

    undo_updates: bool = False
    """Copy weights and state to host memory before each update, so that running out of memory after the first one of a step
    costs no step, where the run otherwise goes back to its last checkpoint; all of them cross the bus once a step."""

    allow_leaner_optimizer: bool = False
    """Where nothing else helps against running out of memory, keep AdamW's moments in 8 bits from then on; this alone changes
    the result."""

    # Running
    seed: int = 0
    """Seed of shuffling, held-out documents, LoRA's start and dropout."""

    logging_steps: int = 1
    """Steps between lines of metrics."""

    eval_steps: int | None = None
    """Steps between evaluations; one at the start and one at the end are always made. [default: none between]"""

    save_steps: int | None = None
    """Steps between checkpoints; one at the end is always made. [default: none between]"""

    save_total_limit: int = 2
    """Checkpoints kept; the oldest go first."""

    on_bad_loss: BadLossPolicy = "stop"
    """What a step is whose loss or gradient is not finite: the end of the run; a step that changes nothing; or the way back to
    the last checkpoint, from where its blocks are left out. Five in a row always end the run."""

    bad_loss_factor: float | None = None
    """A step is bad as well where its loss or gradient norm reaches this many times the median of the last 100 steps.
    [default: only where not finite]"""

    preemption_grace_s: float | None = None
    """Seconds between SIGTERM and SIGKILL: where the step in progress might not leave enough of them to save, it is
    abandoned. [default: it is finished]"""

    host_reserve_bytes: int | None = None
    """Host memory that must stay available, or the run writes a checkpoint and stops; 0: it is not watched. [default: a
    fiftieth of what the machine or its control group has, and twice the largest tensor]"""

    resume: bool = False
    """Go on from the newest good checkpoint in output_dir."""

    tensorboard: bool = False
    """Write TensorBoard event files to output_dir/tensorboard."""

    def __post_init__(self) -> None:
        self._check_ranges()
        self._fill_choice("LoRA", LORA_DEFAULTS, used="lora" in self.trainable_parts)
        if self.quantization is not None and "full" in self.trainable_parts:
            raise ConfigError("quantization is for frozen layers, and trainable: full freezes none: remove one of them")
        if self.stream_frozen and "full" in self.trainable_parts:
            raise ConfigError(
                "stream_frozen is for frozen layers, and trainable: full freezes none: remove one of them"
            )
        if self.stream_frozen and (self.quantization is not None or self.use_dora):
            raise ConfigError("stream_frozen cannot be joined with quantization or use_dora: remove one of them")
        if self.quantization is not None and self.use_dora:
            raise ConfigError(
                "use_dora needs the norms of the weights that it adapts, which quantization rounds: remove one"
            )
        if self.weight_precision is not None and self.dtype == "fp32":
            raise ConfigError("weight_precision has no effect on fp32 weights: remove it, or choose dtype bf16 or fp16")
        if self.optimizer not in OPTIMIZER_DEFAULTS:
            known = ", ".join(OPTIMIZER_DEFAULTS)
            raise ConfigError(
                f"optimizer must be one of {known}; got {self.optimizer!r}."
                + nearest(self.optimizer, OPTIMIZER_DEFAULTS)
            )
        for name, defaults in OPTIMIZER_DEFAULTS.items():
            if name != self.optimizer:
                shared = OPTIMIZER_DEFAULTS[self.optimizer]
                others = {key: value for key, value in defaults.items() if key not in shared}
                self._fill_choice(f"the optimizer {name}", others, used=False)
        self._fill_choice(f"the optimizer {self.optimizer}", OPTIMIZER_DEFAULTS[self.optimizer], used=True)
        if self.on_bad_loss == "skip" and self.optimizer_in_backward:
            raise ConfigError(
                "on_bad_loss: skip needs the whole gradient before the first update, which optimizer_in_backward never has: "
                "choose rewind or stop"
            )
        if self.on_bad_loss == "rewind" and self.save_steps is None:
            raise ConfigError("on_bad_loss: rewind goes back to the last checkpoint: set save_steps")
        if self.max_grad_norm is None:
            self._set("max_grad_norm", 0.0 if self.optimizer_in_backward else 1.0)
        elif self.max_grad_norm and self.optimizer_in_backward:
            raise ConfigError(
                "optimizer_in_backward cannot clip by the global norm, which is known only after the first weights have been "
                f"updated; got max_grad_norm {self.max_grad_norm}: leave it out, or choose adafactor, which clips each update"
            )
        if self.undo_updates and not self.recover_from_oom:
            raise ConfigError(
                "undo_updates has no effect without recover_from_oom: turn that on, or remove undo_updates"
            )
        if self.allow_leaner_optimizer and not self.recover_from_oom:
            raise ConfigError(
                "allow_leaner_optimizer has no effect without recover_from_oom: turn that on, or remove it"
            )
        for name in ("checkpointed_layers", "offload_activations"):
            if getattr(self, name) and not self.gradient_checkpointing:
                raise ConfigError(
                    f"{name} has no effect without gradient_checkpointing: turn that on, or remove {name}"
                )
        lengths = [n for n in ("max_steps", "num_train_epochs", "max_tokens") if getattr(self, n) is not None]
        if len(lengths) > 1:
            raise ConfigError(f"the run's length is given once; got {' and '.join(lengths)}: keep one")
        if not lengths:
            self._set("num_train_epochs", 1.0)
        if self.eval_fraction is None:
            self._set("eval_fraction", 0.0 if self.eval_data else 0.01)
        elif self.eval_data and self.eval_fraction:
            raise ConfigError("give eval_data or eval_fraction, not both: eval_data replaces the held-out documents")
        if self.tokens_per_step is not None:
            self._set_accumulation(self.tokens_per_step)
        if self.per_device_eval_batch_size is None:
            self._set("per_device_eval_batch_size", self.per_device_train_batch_size)

    @property
    def trainable_parts(self) -> tuple[str, ...]:
        """The parts of ``trainable``, in the order given."""
        return tuple(part.strip() for part in self.trainable.split("+"))

    @property
    def blocks_per_step(self) -> int:
        """Blocks in one optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def _set_accumulation(self, tokens: int) -> None:
        pass_tokens = self.per_device_train_batch_size * self.max_seq_length
        if tokens % pass_tokens:
            raise ConfigError(
                "tokens_per_step must be a multiple of per_device_train_batch_size x max_seq_length, "
                f"{self.per_device_train_batch_size} x {self.max_seq_length}; got {tokens}: use "
                f"{max(1, round(tokens / pass_tokens)) * pass_tokens}"
            )
        if self.gradient_accumulation_steps not in (1, tokens // pass_tokens):
            raise ConfigError(
                f"gradient_accumulation_steps follows from tokens_per_step: {tokens} are {tokens // pass_tokens} passes of "
                f"{pass_tokens}; got {self.gradient_accumulation_steps}: remove one of the two"
            )
        self._set("gradient_accumulation_steps", tokens // pass_tokens)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _fill_choice(self, choice: str, defaults: dict[str, Any], *, used: bool) -> None:
        for name, default in defaults.items():
            if used and getattr(self, name) is None:
                self._set(name, default)
            elif not used and getattr(self, name) is not None:
                raise ConfigError(f"{name} belongs to {choice}, which this run does not use: remove {name}")

    def _check_ranges(self) -> None:
        if not self.data:
            raise ConfigError("data is empty: name at least one file, folder or glob")
        if not all(self.trainable_parts):
            raise ConfigError(f"trainable is parts joined by +; got {self.trainable!r}")
        if "full" in self.trainable_parts and len(self.trainable_parts) > 1:
            raise ConfigError(f"trainable: full already trains everything; got {self.trainable!r}: write full alone")
        at_least: dict[str, float] = dict.fromkeys(
            (
                "per_device_train_batch_size",
                "gradient_accumulation_steps",
                "per_device_eval_batch_size",
                "max_steps",
                "checkpointed_layers",
            )
            + (
                "tokens_per_step",
                "max_tokens",
                "lora_r",
                "logging_steps",
                "eval_steps",
                "save_steps",
                "save_total_limit",
            ),
            1,
        )
        at_least |= {"max_seq_length": 2, "loss_chunk_bytes": 1 << 16, "mlp_tiles": 2}
        at_least |= dict.fromkeys(("weight_decay", "max_grad_norm", "lora_dropout", "seed", "momentum", "z_loss"), 0)
        at_least["host_reserve_bytes"] = 0
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ConfigError(f"{name} must be at least {least}; got {value}")
        for name in (
            "learning_rate",
            "embedding_learning_rate",
            "num_train_epochs",
            "adam_epsilon",
            "lora_alpha",
            "preemption_grace_s",
        ):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{name} must be a number above 0; got {value}")
        for name in (
            "eval_fraction",
            "warmup_ratio",
            "adam_beta1",
            "adam_beta2",
            "lora_dropout",
            "momentum",
            "label_smoothing_factor",
        ):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ConfigError(f"{name} must be at least 0 and below 1; got {value}")

        if self.bad_loss_factor is not None and not 1 < self.bad_loss_factor < float("inf"):
            raise ConfigError(f"bad_loss_factor must be a number above 1; got {self.bad_loss_factor}")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings that are set, as plain values for YAML or JSON."""
        plain = dataclasses.asdict(self)
        for key in ("data", "eval_data"):
            plain[key] = [{k: v for k, v in source.items() if v is not None} for source in plain[key]]
        return {key: value for key, value in plain.items() if value is not None and value != []}

    def to_yaml(self) -> str:
        """Return the settings as YAML that ``from_mapping`` reads back to an equal config."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    @classmethod
    def from_mapping(cls, mapping: dict[str, Any]) -> TrainConfig:
        """Return a config from plain values, as YAML or the command line give them.

        Raises:
            ConfigError: a key is unknown or missing, a value has the wrong type, or two settings contradict.
        """
        values: dict[str, Any] = {}
        kinds = typing.get_type_hints(cls)
        for key, value in mapping.items():
            if key not in kinds:
                raise ConfigError(f"unknown setting {key!r}.{nearest(str(key), kinds)}")
            if value is None:
                continue
            values[key] = sources(key, value) if key in ("data", "eval_data") else coerce(key, value, kinds[key])
        if values.get("gradient_accumulation_steps") == 1 and values.get("tokens_per_step"):
            size = values.get("per_device_train_batch_size", 1)
            length = values.get("max_seq_length", cls.__dataclass_fields__["max_seq_length"].default)
            if size * length != values["tokens_per_step"]:
                raise ConfigError(
                    f"gradient_accumulation_steps 1 makes steps of {size} x {length} tokens, and tokens_per_step is "
                    f"{values['tokens_per_step']}: remove one of the two"
                )
        missing = [f.name for f in dataclasses.fields(cls) if _required(f) and values.get(f.name) is None]
        if missing:
            raise ConfigError(f"{', '.join(missing)} must be given, in the YAML or as --{missing[0].replace('_', '-')}")
        return cls(**values)


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
