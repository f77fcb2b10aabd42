"""DeepSpeed's ZeRO in the doctor: what one GPU holds is what its source asks for, and what a message names is found."""

import pytest
import transformers

from oomless.config import TrainConfig
from oomless.diagnosis.explain import explain
from oomless.diagnosis.first_answer import first_answer
from oomless.diagnosis.plain_step import PlainRun, rehearse_plain
from oomless.diagnosis.zero import Zero
from oomless.models.spec import resolve_for_plan
from oomless.planning.plan import target_for

GPUS, BUCKET = 4, 1 << 20
SHAPE = dict(
    vocab_size=32768, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=8, max_position_embeddings=256, tie_word_embeddings=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    transformers.LlamaConfig(**SHAPE).save_pretrained(folder)
    return resolve_for_plan(str(folder))


def most_of(spec, **how):
    config = TrainConfig.from_mapping(
        dict(model=spec.name, data="-", output_dir="-", max_seq_length=64, dtype="bf16", gradient_accumulation_steps=2)
    )
    zero = Zero(gpus=GPUS, bucket=BUCKET, **how)
    run = PlainRun(spec=spec, config=config, zero=zero, gpus=GPUS if zero.stage == 3 else 1, adapters_in_fp32=False)
    outcome = rehearse_plain(run, target_for("A10"), limited=False)
    return {name: max(sizes) for name, sizes in outcome.device.profile().timeline.bytes_by_category.items()}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_stage_holds_what_deepspeed_asks_for(spec, stage):
    """2 bytes a weight; 12 a parameter of this GPU's part; gradients whole, or the part's; buckets; 6 a parameter of the part in the step."""
    text = spec.config
    layer = 4 * text.hidden_size**2 + 3 * text.hidden_size * text.intermediate_size + 2 * text.hidden_size
    count = text.vocab_size * text.hidden_size + text.num_hidden_layers * layer + text.hidden_size
    part, held = count // GPUS, most_of(spec, stage=stage)
    assert held["optimizer state"] == pytest.approx(12 * part, abs=4096)
    whole = 2 * count if stage < 3 else 2 * part
    assert whole <= held["weights"] <= 1.01 * whole
    embedding = 2 * text.vocab_size * text.hidden_size
    in_the_step = 2 * part + 4 * part  # flat, and in fp32, beside those that were kept
    most = {
        1: 2 * count + in_the_step,
        2: max(2 * part + in_the_step, 2 * part + 2 * BUCKET + embedding),
        3: 2 * part + in_the_step + 2 * 2 * BUCKET,
    }[stage]
    assert held["gradients"] == pytest.approx(most, rel=0.02)


def test_an_offloaded_optimizer_holds_nothing_here(spec):
    held = most_of(spec, stage=2, offloads=True)
    assert held["optimizer state"] == 0
    assert held["gradients"] <= 2 * BUCKET + 2 * SHAPE["vocab_size"] * SHAPE["hidden_size"] + 4096


PARAMETERS = 8_030_261_248
SAID = {
    "2, 3.74 GiB": "gradients of this GPU's part in 16 bits",
    "2, 14.96 GiB": "all trained weights in 16 bits, made flat",
    "2, 7.48 GiB": "fp32 copy of this GPU's part of the weights",
    "3, 1002.00 MiB": "gathered weight in 16 bits",
}


@pytest.mark.parametrize("case", SAID)
def test_what_zero_makes_is_named(case):
    stage, _, size = case.partition(", ")
    frames = {
        "gradients of this GPU's part in 16 bits": ("stage_1_and_2.py", "copy_grads_in_partition", "self.grads_in_partition = torch.empty(int(total_size),"),
        "all trained weights in 16 bits, made flat": ("stage_1_and_2.py", "_configure_zero_optimizer", "self.flatten_dense_tensors_aligned("),
        "fp32 copy of this GPU's part of the weights": ("stage_1_and_2.py", "_configure_zero_optimizer", "weights_partition = partition.detach().clone().float()"),
        "gathered weight in 16 bits": ("partition_parameters.py", "forward", "flat_tensor = torch.empty(tensor_size, dtype=param.ds_tensor.dtype)"),
    }  # fmt: skip
    path, name, code = frames[SAID[case]]
    backward = "    loss.backward()\n" if "gradients" in SAID[case] else ""
    text = (
        f"deepspeed --num_gpus {GPUS} train.py --deepspeed ds_zero{stage}.json --model_name_or_path meta-llama/Llama-3.1-8B --bf16\n"
        f'Traceback (most recent call last):\n  File "train.py", line 3, in <module>\n    {backward or "trainer.train()"}\n'
        f'  File "/lib/python3.11/site-packages/deepspeed/runtime/zero/{path}", line 700, in {name}\n    {code}\n'
        f"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {size}. GPU 0 has a total capacity of 79.15 GiB of which 0.90 GiB is free."
    )
    assert first_answer(text).suspects[0].tensor.kind == SAID[case]


def test_a_shared_out_training_is_rehearsed_and_cured(spec):
    text = (
        f"deepspeed --num_gpus {GPUS} train.py --deepspeed ds_zero2.json --per_device_train_batch_size 8 --max_length 256 --bf16\n"
        '"reduce_bucket_size": 1e6, TrainingArguments\n'
        "CUDA out of memory. Tried to allocate 256.00 MiB. GPU 0 has a total capacity of 1.60 GiB of which 0.10 GiB is free."
    )
    answer = explain(text, {"model": spec.name})
    assert answer.not_rehearsed is None
    assert answer.stops
    assert answer.suspects[0].size_bytes == 8 * 256 * 32768 * 4
    assert "buckets of 1,000,000 numbers" in " ".join(answer.first.situation.notes)
    first = answer.cures.fitting[0]
    assert first.saved_bytes > 0
    assert not {"half", "adamw_8bit"} & set(first.changes)
