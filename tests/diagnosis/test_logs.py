"""Where errors arose, and the settings that logs print."""

import pytest

from oomless.diagnosis.frames import libraries
from oomless.diagnosis.hardware_names import named_gpus
from oomless.diagnosis.logs import clean, read
from oomless.diagnosis.model_names import named_model
from oomless.diagnosis.settings import read_settings

ERROR = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1002.00 MiB."
PACKAGES = "/usr/local/lib/python3.11/dist-packages"


def traceback(*frames):
    lines = ["Traceback (most recent call last):"]
    for path, name, code in frames:
        lines += [f'  File "{path}", line 12, in {name}', f"    {code}", "    ^^^^^^^^^^"]
    return "\n".join([*lines, ERROR])


TRAIN = [
    ("train.py", "<module>", "trainer.train()"),
    (f"{PACKAGES}/transformers/trainer.py", "_inner_training_loop", "tr_loss_step = self.training_step(model, inputs)"),
]
FORWARD = [
    (f"{PACKAGES}/transformers/trainer.py", "compute_loss", "outputs = model(**inputs)"),
    (f"{PACKAGES}/torch/nn/modules/module.py", "_call_impl", "return forward_call(*args, **kwargs)"),
    (f"{PACKAGES}/transformers/models/llama/modeling_llama.py", "forward", "outputs = self.model("),
]
LLAMA = f"{PACKAGES}/transformers/models/llama/modeling_llama.py"
PLACES = [
    ("forward", "mlp", [*TRAIN, *FORWARD, (LLAMA, "forward", "down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))")]),
    ("forward", "lm_head", [*TRAIN, *FORWARD, (LLAMA, "forward", "logits = self.lm_head(hidden_states[:, slice_indices, :])")]),
    ("forward", "self_attn", [*TRAIN, *FORWARD, (LLAMA, "eager_attention_forward", "attn_weights = torch.matmul(query, key_states.transpose(2, 3)) * scaling")]),
    ("loss", None, [*TRAIN, *FORWARD, (f"{PACKAGES}/transformers/loss/loss_utils.py", "ForCausalLMLoss", "logits = logits.float()")]),
    ("loss", None, [*TRAIN, *FORWARD, (LLAMA, "forward", "shift_logits = logits[..., :-1, :].contiguous()")]),
    ("backward", None, [*TRAIN, (f"{PACKAGES}/accelerate/accelerator.py", "backward", "loss.backward(**kwargs)"),
                        (f"{PACKAGES}/torch/autograd/graph.py", "_engine_run_backward", "return Variable._execution_engine.run_backward(")]),
    ("backward", "mlp", [*TRAIN, (f"{PACKAGES}/torch/_tensor.py", "backward", "torch.autograd.backward("),
                         (f"{PACKAGES}/torch/utils/checkpoint.py", "backward", "outputs = ctx.run_function(*detached_inputs)"),
                         (LLAMA, "forward", "hidden_states = self.mlp(hidden_states)")]),
    ("optimizer", None, [*TRAIN, (f"{PACKAGES}/torch/optim/adamw.py", "_init_group", 'state["exp_avg_sq"] = torch.zeros_like(')]),
    ("optimizer", None, [("a.py", "main", "optimizer.step()"), (f"{PACKAGES}/bitsandbytes/optim/optimizer.py", "step", "self.init_state(group, p, gindex, pindex)")]),
    ("evaluation", "lm_head", [*TRAIN, (f"{PACKAGES}/transformers/trainer.py", "evaluation_loop", "losses, logits, labels = self.prediction_step("), *FORWARD, (LLAMA, "forward", "logits = self.lm_head(hidden_states)")]),
    ("load", None, [("t.py", "<module>", "model = AutoModelForCausalLM.from_pretrained(name)"), (f"{PACKAGES}/transformers/modeling_utils.py", "from_pretrained", "cls._load_pretrained_model("),
                    (f"{PACKAGES}/torch/nn/modules/module.py", "_apply", "param_applied = fn(param)")]),
    ("load", None, [("t.py", "<module>", 'model.to("cuda")'), (f"{PACKAGES}/torch/nn/modules/module.py", "convert", "return t.to(")]),
    ("save", None, [*TRAIN, (f"{PACKAGES}/transformers/trainer.py", "_save_checkpoint", "self.save_model(output_dir)"), (f"{PACKAGES}/torch/x.py", "state_dict", "x.clone()")]),
]  # fmt: skip


@pytest.mark.parametrize(("phase", "module", "frames"), PLACES)
def test_phase_and_module(phase, module, frames):
    place = read(traceback(*frames)).first.place
    assert (place.phase, place.module) == (phase, module)
    assert place.code == frames[-1][2]
    assert place.recomputing == any("checkpoint" in path for path, *_ in frames)


def test_a_notebook_traceback():
    text = (
        "OutOfMemoryError                          Traceback (most recent call last)\n"
        "Cell In[5], line 1\n----> 1 trainer.train()\n\n"
        f"File {PACKAGES}/transformers/trainer.py:2240, in Trainer.train(self, resume)\n   2239     try:\n-> 2240     return loop()\n\n"
        f"{PACKAGES}/transformers/models/llama/modeling_llama.py in forward(self, x)\n    240 \n--> 241  x = self.mlp(x)\n    242\n\n"
        + ERROR
    )
    place = read(text).first.place
    assert (place.phase, place.module, place.code) == ("forward", "mlp", "x = self.mlp(x)")


def test_no_traceback_says_nothing():
    place = read(ERROR).first.place
    assert (place.phase, place.module, place.frames) == (None, None, ())


@pytest.mark.parametrize(
    ("text", "tool"),
    [
        (f'File "{PACKAGES}/unsloth/models/llama.py"', "unsloth"),
        (f'File "{PACKAGES}/axolotl/train.py"', "axolotl"),
        (f'File "{PACKAGES}/trl/trainer/sft_trainer.py"\nFile "{PACKAGES}/transformers/trainer.py"', "trl"),
        (f'File "{PACKAGES}/transformers/trainer.py"\nFile "{PACKAGES}/accelerate/accelerator.py"', "trainer"),
        (f'File "{PACKAGES}/accelerate/accelerator.py"', "accelerate"),
        (f'File "{PACKAGES}/peft/peft_model.py"', "peft"),
        ('File "mine.py"', None),
    ],
)
def test_tools(text, tool):
    assert libraries(text)[0] == tool


BANNERS = {
    "trainer": (
        "***** Running training *****\n  Num examples = 1,000\n  Instantaneous batch size per device = 8\n  Total train batch "
        "size (w. parallel, distributed & accumulation) = 32\n  Gradient Accumulation steps = 4\n  Number of trainable "
        "parameters = 1,235,814,400\n",
        dict(per_device_train_batch_size=8, gradient_accumulation_steps=4),
        1_235_814_400,
    ),
    "unsloth": (
        "==((====))==  Unsloth 2024.11: Fast Llama patching.\n   \\\\   /|    GPU: Tesla T4. Max memory: 14.748 GB.\n"
        "O^O/ \\_/ \\    Batch size per device = 2 | Gradient Accumulation steps = 4\n"
        ' "-____-"     Number of trainable parameters = 24,313,856\nunsloth/Llama-3.2-1B-bnb-4bit\n',
        dict(per_device_train_batch_size=2, gradient_accumulation_steps=4, quantization="nf4", trainable="lora",
             gradient_checkpointing=True),
        24_313_856,
    ),
    "peft": (
        "trainable params: 11,272,192 || all params: 1,247,086,592 || trainable%: 0.9039\nLoraConfig(r=16)",
        dict(trainable="lora"),
        11_272_192,
    ),
    "axolotl": (
        "base_model: meta-llama/Llama-3.1-8B\nsequence_len: 4096\nmicro_batch_size: 2\ngradient_accumulation_steps: 8\n"
        "optimizer: adamw_bnb_8bit\nbf16: true\ngradient_checkpointing: true\n",
        dict(max_seq_length=4096, per_device_train_batch_size=2, gradient_accumulation_steps=8, optimizer="adamw_8bit",
             gradient_checkpointing=True),
        None,
    ),
    "arguments": (
        "TrainingArguments(per_device_train_batch_size=4, optim='adafactor', gradient_checkpointing=False, fp16=True)\n"
        "AutoModelForCausalLM.from_pretrained(x, torch_dtype=torch.bfloat16, attn_implementation='eager')",
        dict(per_device_train_batch_size=4, optimizer="adafactor", dtype="bf16"),
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BANNERS)
def test_settings(name):
    text, values, trainable = BANNERS[name]
    found = read_settings(text)
    assert found.values == values
    assert found.trainable_parameters == trainable
    if name == "axolotl":
        assert (found.model, found.mixed_precision) == ("meta-llama/Llama-3.1-8B", "bf16")
    if name == "arguments":
        assert (found.mixed_precision, found.attention) == ("fp16", "eager")
    if name == "unsloth":
        assert (found.tool, found.gpus[0], found.model) == ("unsloth", "T4", "meta-llama/Llama-3.2-1B")


@pytest.mark.parametrize(
    ("text", "model"),
    [
        ("Llama 3.2 1B, continued pretraining, T4, batch 1", "meta-llama/Llama-3.2-1B"),
        ("i try Llama-3.2-3B-Instruct here", "meta-llama/Llama-3.2-3B"),
        ("gemma 7b raw text", "google/gemma-7b"),
        ("from_pretrained('Qwen/Qwen2.5-0.5B')", "Qwen/Qwen2.5-0.5B"),
        ("my own model", None),
    ],
)
def test_models_by_name(text, model):
    assert (named_model(text) and named_model(text).known) == model


@pytest.mark.parametrize(
    ("text", "gpu"),
    [
        ("on a T4 in Colab", "T4"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("RTX4090", "RTX 4090"),
        ("V100", None),
        ("ART4", None),
    ],
)
def test_gpus_by_name(text, gpu):
    found = named_gpus(text)
    assert (found[0] if len(found) == 1 else None) == gpu


def test_steps_and_what_was_held():
    lines = [f"step {step}: loss 2.1 memory allocated: {10 + step / 100:.2f} GiB" for step in range(0, 100, 10)]
    reading = read("\n".join([*lines, ERROR]))
    assert reading.steps_done == 90
    assert [step for step, _ in reading.held] == list(range(0, 100, 10))
    assert reading.held[0][1] == 10 << 30
    assert read(f" 12%|#2   | 120/1000 [05:00<36:00]\n{ERROR}").steps_done == 120


def test_a_notebook_file():
    import json

    cells = [
        {"source": ["x = 1\n"], "outputs": [{"traceback": ["\x1b[31mTraceback (most recent call last)\x1b[0m", ERROR]}]}
    ]
    assert read(json.dumps({"cells": cells})).first.message.requested.text == "1002.00 MiB"
    assert clean('{"cells": 3}') == '{"cells": 3}'


def test_a_long_log_keeps_its_end_and_its_beginning():
    text = "base_model: meta-llama/Llama-3.2-1B\n" + "some line of a long log\n" * 200_000 + ERROR
    reading = read(text)
    assert reading.first is not None
    assert reading.settings.model == "meta-llama/Llama-3.2-1B"


@pytest.mark.parametrize(
    "text",
    [
        "GKDTrainer --model_name_or_path Qwen/Qwen2.5-0.5B --teacher_model_name_or_path Qwen/Qwen2.5-1.5B",
        "GKDConfig\nteacher_model: Qwen/Qwen2.5-1.5B\nmodel: Qwen/Qwen2.5-0.5B",
        'teacher_model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-1.5B")\n'
        'model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-0.5B")\nGKDTrainer(model, teacher_model)',
    ],
)
def test_the_teacher_is_not_the_student(text):
    settings = read_settings(text)
    assert settings.method == "gkd"
    assert settings.others["teacher_model"] == "Qwen/Qwen2.5-1.5B"
    assert settings.named.text == "Qwen/Qwen2.5-0.5B"
