"""Programs that know nothing of oomless, rehearsed; where they can run for real, beside a real run in the same books."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import oomless
from oomless.memory.virtual_gpu import VirtualGPU

MiB = 1 << 20
HERE = Path(__file__).parent


class Net(nn.Module):
    def __init__(self, words=512, width=128):
        super().__init__()
        self.embed_tokens = nn.Embedding(words, width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(3)
        )
        self.lm_head = nn.Linear(width, words, bias=False)

    def forward(self, tokens):
        hidden = self.embed_tokens(tokens)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return self.lm_head(hidden)


def plain_loop(device, *, optimizer="adamw", steps=3, clip=True, keep=None):
    torch.manual_seed(0)
    with torch.device(device):
        net = Net()
        tokens = torch.randint(0, 512, (4, 65))
    kinds = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    stepper = kinds[optimizer](net.parameters(), lr=1e-3, foreach=True)
    for _ in range(steps):
        logits = net(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        stepper.step()
        stepper.zero_grad()
        if keep is not None:
            keep.append(loss)
    return loss.item()


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_plain_loop_holds_what_it_holds_in_a_real_run(optimizer):
    real = VirtualGPU(1 << 30, record_history=True)
    with real.active():
        plain_loop("cpu", optimizer=optimizer)
    gc.collect()
    with oomless.rehearsal("virtual:1GiB") as gpu:
        plain_loop("cuda", optimizer=optimizer)
    # AdamW counts its steps in a host tensor for each parameter, which a real run in these books has on the device.
    counters = 512 * len(list(Net().parameters())) if optimizer == "adamw" else 0
    assert gpu.profile.peak_allocated_bytes == real.profile().peak_allocated_bytes - counters
    assert gpu.needed_bytes == real.usage().peak_reserved_bytes


def test_it_stops_where_a_real_run_stops():
    """At every size, in the same line, with the same request."""
    for mebibytes in (3, 5, 7, 9):
        real = VirtualGPU(mebibytes * MiB, record_history=True)
        with real.active(), pytest.raises(torch.OutOfMemoryError) as in_reality:
            plain_loop("cpu")
        with pytest.raises(torch.OutOfMemoryError) as rehearsed, oomless.rehearsal(f"virtual:{mebibytes}MiB"):
            plain_loop("cuda")
        lines = [
            [entry.lineno for entry in caught.traceback if Path(str(entry.path)).name == "test_programs.py"][-1]
            for caught in (in_reality, rehearsed)
        ]
        assert lines[0] == lines[1]
        assert str(in_reality.value) == str(rehearsed.value)


def test_torch_is_as_it_was_afterwards():
    before = [torch.cuda.is_available(), torch.version.cuda, torch.save, Net().lm_head.weight.device]
    with oomless.rehearsal("T4"):
        assert torch.cuda.is_available()
        assert torch.cuda.get_device_name() == "T4"
        assert torch.cuda.get_device_capability() == (7, 5)
    assert [torch.cuda.is_available(), torch.version.cuda, torch.save, Net().lm_head.weight.device] == before
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")


def test_a_leak_shows():
    needed = []
    for steps in (2, 12):
        with oomless.rehearsal("virtual:1GiB") as gpu:
            kept = []
            torch.cuda.reset_peak_memory_stats()
            plain_loop("cuda", steps=steps, keep=kept)
            del kept
        needed.append(gpu.profile.peak_allocated_bytes)
    assert needed[0] < needed[1]


def test_values_that_are_known_are_known():
    """Masks and counts follow from the data; what follows from weights gets a plausible answer."""
    with oomless.rehearsal("T4"):
        tokens = torch.tensor([[5, 6, 0, 0], [7, 0, 0, 0]]).to("cuda")
        mask = tokens != 0
        assert int(mask.sum()) == 3
        assert not mask.all()
        assert tokens[mask].shape == (3,)
        places = torch.nonzero(mask[0]).view(-1)
        assert places.device.type == "cuda"
        assert tokens[0].index_select(0, places).shape == (2,)
        assert tokens.cpu().tolist() == [[5, 6, 0, 0], [7, 0, 0, 0]]
        assert torch.arange(4, device="cuda").cumsum(0)[-1].item() == 6
        positions = torch.zeros(4, dtype=torch.int64, device="cuda")
        positions += 2
        assert positions.tolist() == [2, 2, 2, 2]
        hidden = torch.empty(4, device="cuda", dtype=torch.float16)
        weight = nn.Linear(4, 4, device="cuda", dtype=torch.float16)
        assert weight(hidden).sum().item() == 1.0
        assert f"{weight(hidden).sum():.2f}" == "1.00"
        assert not torch.isnan(weight(hidden)).any()


def test_host_and_gpu_do_not_mix():
    """As on CUDA: an operator takes tensors of one device, but for single values and indices."""
    with oomless.rehearsal("T4"):
        there, here = torch.ones(4, device="cuda"), torch.ones(4)
        for mix in (lambda: there + here, lambda: here * there, lambda: torch.cat([there, here])):
            with pytest.raises(RuntimeError, match="same device"):
                mix()
        assert (there * torch.tensor(2.0)).device.type == "cuda"
        assert there[torch.tensor([0, 1])].device.type == "cuda"
        with pytest.raises(TypeError, match="can't convert cuda"):
            there.numpy()


def test_automatic_casting_keeps_its_copies_of_weights():
    """One 16-bit copy of each weight until the region ends, whole bytes counted."""
    with oomless.rehearsal("virtual:1GiB"):
        first, second = (nn.Linear(512, 512, bias=False, device="cuda") for _ in range(2))
        x = torch.ones(256, 512, device="cuda")
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", dtype=torch.float16):
            y = second(first(x))
            assert y.dtype is torch.float16
            assert F.softmax(y, -1).dtype is torch.float32
            inside = torch.cuda.memory_allocated()
        # two copies of weights, the cast input, two results
        assert inside - before == 2 * 512 * 512 * 2 + 256 * 512 * 2 + 2 * 256 * 512 * 2
        y.sum().backward()
        assert first.weight.grad.dtype is torch.float32
        del x, y
        first.weight.grad = second.weight.grad = None
        assert torch.cuda.memory_allocated() == 2 * 512 * 512 * 4


def test_kernels_are_those_of_cuda():
    """One kernel where the CPU takes an operator apart: a dropout keeps a mask of one byte, an RMSNorm its input."""
    with oomless.rehearsal("virtual:1GiB"):
        x = torch.ones(256, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        weight = torch.ones(512, device="cuda", dtype=torch.bfloat16)
        before = torch.cuda.memory_allocated()
        y = F.dropout(x, 0.1)
        assert torch.cuda.memory_allocated() - before == 256 * 512 * (2 + 1)
        z = F.rms_norm(x, (512,), weight)
        assert torch.cuda.memory_allocated() - before == 256 * 512 * (2 + 1) + 256 * 512 * 2 + 256 * 4
        (y + z).sum().backward()


@pytest.mark.parametrize("softmax", [F.softmax, torch.softmax, Tensor.softmax])
def test_a_softmax_of_half_in_float_copies_nothing_and_its_backward_makes_a_product(softmax):
    elements = 256 * 512
    with oomless.rehearsal("virtual:1GiB"):
        x = torch.ones(256, 512, device="cuda", dtype=torch.float16, requires_grad=True)
        gradient = torch.ones(256, 512, device="cuda")
        before = torch.cuda.memory_allocated()
        y = softmax(x, -1, dtype=torch.float32)
        assert torch.cuda.max_memory_allocated() - before == torch.cuda.memory_allocated() - before == elements * 4
        y.backward(gradient)
        assert torch.cuda.memory_allocated() - before == elements * (4 + 2)
        assert torch.cuda.max_memory_allocated() - before == elements * (4 + 2 + 4)


ADAPTED = """
import sys, torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
F = torch.nn.functional
plain = F.scaled_dot_product_attention
def expanded(query, key, value, *args, **how):
    groups = query.size(-3) // key.size(-3)
    if groups > 1:
        key, value = (t.repeat_interleave(groups, dim=-3) for t in (key, value))
        how.pop("enable_gqa", None)
    return plain(query, key, value, *args, **how)
F.scaled_dot_product_attention = expanded
model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M", dtype=torch.float16).cuda()
model.config.use_cache = False
model = get_peft_model(model, LoraConfig(r=32, lora_alpha=64, task_type="CAUSAL_LM",
                                         target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
model.enable_input_require_grads()
model.train()
resident = torch.cuda.memory_allocated()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
tokens = torch.randint(0, 1000, (2, 512), device="cuda")
def step():
    optimizer.zero_grad(set_to_none=True)
    out = model(input_ids=tokens, labels=tokens)
    out.loss.backward()
    optimizer.step()
step()
torch.cuda.reset_peak_memory_stats()
step()
print(resident / 2**20, torch.cuda.max_memory_allocated() / 2**20, torch.cuda.max_memory_reserved() / 2**20)
F.scaled_dot_product_attention = plain
"""


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_transformers_and_peft_hold_what_they_held_on_a_t4(capsys):
    """A step measured on a Tesla T4 by others: github.com/Anassbzdd/fitcheck, data/measurements, SmolLM2-135M, fp16, 2 x 512."""
    with oomless.rehearsal("T4"):
        exec(compile(ADAPTED, "adapted.py", "exec"), {})
    resident, allocated, reserved = (float(number) for number in capsys.readouterr().out.split())
    assert (round(resident, 3), round(allocated, 3), reserved) == (270.653, 1026.919, 1070)


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("model")
    LlamaConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


TRAINER = """
import sys, torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

model_name, output, kind = sys.argv[1:]
how = {}
if kind == "qlora":
    how = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
           bnb_4bit_compute_dtype=torch.float16), "device_map": {"": 0}}
model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32, **how)
if kind not in ("full", "fsdp"):
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    if kind == "qlora":
        model = prepare_model_for_kbit_training(model)
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
rows = Dataset.from_dict({"input_ids": [list(range(1, 129))] * 32, "labels": [list(range(1, 129))] * 32})
collate = lambda batch: {key: torch.tensor([row[key] for row in batch]) for key in batch[0]}
arguments = TrainingArguments(output, per_device_train_batch_size=2, gradient_accumulation_steps=2, fp16=True,
    max_steps=40, eval_strategy="steps", eval_steps=3, save_steps=3, report_to="none", logging_steps=1, fsdp=kind == "fsdp")
trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=collate)
trainer.train()
trainer.save_model(output)
"""


ACCELERATED = """
import sys, torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=2)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
rows = [{"input_ids": torch.arange(1, 129), "labels": torch.arange(1, 129)} for _ in range(64)]
loader = torch.utils.data.DataLoader(rows, batch_size=2)
schedule = get_cosine_schedule_with_warmup(optimizer, 1, 10)
model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
for batch in loader:
    with accelerator.accumulate(model):
        loss = model(**batch).loss
        accelerator.backward(loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
accelerator.unwrap_model(model).save_pretrained(sys.argv[2])
"""

TRL = """
import sys, torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2, "b": 3, "<unk>": 4}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
how = dict(max_length=64, per_device_train_batch_size=2, max_steps=20, report_to="none", bf16=True, logging_steps=1)
if sys.argv[3] == "dpo":
    rows = Dataset.from_dict({"prompt": ["a b a b " * 10] * 64, "chosen": ["a a a"] * 64, "rejected": ["b b b b"] * 64})
    trainer = DPOTrainer(model, args=DPOConfig(sys.argv[2], **how), train_dataset=rows, processing_class=tokenizer)
else:
    rows = Dataset.from_dict({"text": ["a b a b " * 30] * 64})
    arguments = SFTConfig(sys.argv[2], packing=sys.argv[3] == "packed", **how)
    trainer = SFTTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer)
trainer.train()
"""


def rehearse(tmp_path, script, *arguments, gpu="T4", options=()):
    path = tmp_path / "train.py"
    path.write_text(script)
    return subprocess.run(
        [sys.executable, "-m", "oomless", "rehearse", str(path), "--gpu", gpu, *options, "--", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(HERE.parent.parent / "src")},
        cwd=tmp_path,
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
def test_a_trainer_evaluates_saves_and_writes_nothing(tmp_path, small_model, kind):
    done = rehearse(tmp_path, TRAINER, str(small_model), str(tmp_path / "out"), kind, options=["--json"])
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["fits"]
    assert answer["steps"] >= 3
    assert {"load", "forward", "backward", "optimizer", "evaluation"} <= set(answer["profile"]["phases"])
    assert answer["line_at_peak"].startswith("train.py:")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", [(ACCELERATED, ""), (TRL, "padded"), (TRL, "packed"), (TRL, "dpo")], ids=lambda s: s[1] or "accelerate"
)
def test_accelerate_and_trl(tmp_path, small_model, script):
    if script[0] is TRL:
        pytest.importorskip("trl")
    output = tmp_path / "out"
    done = rehearse(tmp_path, script[0], str(small_model), str(output), script[1], gpu="RTX4090", options=["--json"])
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["fits"]
    assert answer["steps"] >= 3
    assert not output.exists()


KERNELS = """
import sys, torch, triton
import triton.language as tl

@triton.autotune([triton.Config({"BLOCK": 256}), triton.Config({"BLOCK": 512})], key=["size"], restore_value=["doubled"])
@triton.jit
def double(values, doubled, size, BLOCK: tl.constexpr):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(doubled + places, 2 * tl.load(values + places, mask=places < size), mask=places < size)

assert sys.argv[1:] == ["--debug"]
values = torch.ones(1 << 20, device="cuda")
doubled = torch.zeros(1 << 20, device="cuda")
few = torch.zeros(4, device="cuda")
for _ in range(3):
    double[lambda of: (triton.cdiv(of["size"], of["BLOCK"]),)](values, doubled, values.numel())
before = torch.cuda.max_memory_allocated()
assert before == (3 * 4 << 20) + (256 << 20) + 512, before
double[(1,)](few, few, 4)
if few.sum().item() == 0:
    raise SystemExit("a kernel's result was taken for what stood there before")
raise ValueError("the end")
"""


@pytest.mark.parametrize("interpreted", ["0", "1"])
def test_triton_kernels_are_launched_on_nothing(tmp_path, interpreted, monkeypatch):
    """Two tensors of 4 MiB, a copy of one that is put back between trials, and the 256 MiB that Triton clears."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    done = rehearse(tmp_path, KERNELS, "--debug", options=["--debug"])
    assert done.returncode == 2
    assert "ValueError: the end" in done.stderr
    assert 'train.py", line 22' in done.stderr


@pytest.mark.slow
def test_a_script_that_does_not_fit_says_where(tmp_path):
    script = (
        "import torch\nrows = []\nfor number in range(40):\n    rows.append(torch.zeros(64 << 20, device='cuda'))\n"
    )
    done = rehearse(tmp_path, script, gpu="4GiB")
    assert done.returncode == 1
    assert "does not fit" in done.stdout
    assert "train.py:4" in done.stdout
    assert "CUDA out of memory. Tried to allocate 256.00 MiB" in " ".join(done.stdout.split())


@pytest.mark.slow
def test_a_larger_gpu_is_not_answered_by_a_smaller_one(tmp_path):
    """Both take the same kernels; the one that does not fit comes first."""
    script = "import torch\nrows = [torch.zeros(64 << 20, device='cuda') for _ in range(12)]\n"
    done = rehearse(tmp_path, script, options=["--what-if", "gpu=3GiB,24GiB", "--json"])
    assert [answer["fits"] for answer in json.loads(done.stdout)] == [False, True], done.stderr


@pytest.mark.slow
def test_several_gpus_hold_what_they_hold_in_a_real_run(tmp_path, monkeypatch):
    """The first of two processes, DDP's buckets and what FSDP gathers included, beside two real ones."""
    kinds = ("ddp", "fsdp bf16")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    real = subprocess.run(
        [*launcher, HERE / "several_gpus.py", ",".join(kinds), "--on-cpu"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(HERE.parent.parent / "src")},
    )
    assert real.returncode == 0, real.stderr
    monkeypatch.setenv("WORLD_SIZE", "2")
    script = (HERE / "several_gpus.py").read_text()
    for kind, line in zip(kinds, real.stdout.splitlines()[-2:], strict=True):
        done = rehearse(tmp_path, script, kind, gpu="virtual:1GiB", options=["--json"])
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        allocated, reserved = map(int, line.split())
        # FSDP numbers the processes in five tensors of the host, which a real run in these books has on the device.
        numbers = 5 * 512 if "fsdp" in kind else 0
        assert answer["profile"]["peak_allocated_bytes"] == allocated - numbers
        if kind == "ddp":  # in FSDP the real run's books keep room for the shapes that DTensor asked for
            assert answer["needed_bytes"] == reserved


def test_a_script_on_several_machines_is_told_of_them(tmp_path):
    script = """import os, torch
torch.distributed.init_process_group()
x = torch.ones(3, device='cuda')
print('told', torch.cuda.device_count(), torch.distributed.get_world_size(), os.environ['LOCAL_WORLD_SIZE'], os.environ['GROUP_WORLD_SIZE'])
"""
    done = rehearse(tmp_path, script, gpu="2x4xT4")
    assert done.returncode == 0, done.stderr
    assert "told 4 8 4 2" in done.stderr


@pytest.mark.full_length
def test_a_trainer_on_several_gpus(tmp_path, small_model):
    """In DDP each holds everything, and buckets of gradients beside; FSDP shares it out."""
    held = {}
    for kind in ("full", "fsdp"):
        arguments = (str(small_model), str(tmp_path / "out"), kind)
        done = rehearse(tmp_path, TRAINER, *arguments, gpu="4xT4", options=["--json"])
        assert done.returncode == 0, done.stderr
        held[kind] = json.loads(done.stdout)["profile"]["peak_bytes_by_category"]
    assert 3.9 < held["full"]["optimizer state"] / held["fsdp"]["optimizer state"] <= 4.0
    assert held["full"]["gradients"] > 0.99 * held["full"]["weights"]  # the buckets


@pytest.mark.parametrize(
    ("script", "gpu", "words"),
    [
        ("import torch\nx = torch.ones(3, device='cuda')\nraise ValueError('my own')", "T4", "train.py:3 in <module>: ValueError: my own"),
        pytest.param("import torch\nx = torch.ones(3, device='cuda')", "2xT4", "joined no other process", marks=pytest.mark.slow),
        pytest.param("import torch\ntorch.distributed.init_process_group()", "T4", "--gpu 2xT4", marks=pytest.mark.slow),
        ("print('hello')", "T4", "put nothing on the GPU"),
    ],
)  # fmt: skip
def test_a_script_that_cannot_be_rehearsed(tmp_path, script, gpu, words):
    done = rehearse(tmp_path, script, gpu=gpu)
    assert done.returncode in (1, 2)
    assert words in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
